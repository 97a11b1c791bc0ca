"""Recall and linear probes where the right number is known."""

from __future__ import annotations

import pytest
import torch

from mmtok.metrics.retrieval import linear_probe, recall_at_k


def test_recall_of_known_ranks():
    """Row i's partner has rank i + 1."""
    M = 12
    similarity = torch.zeros(M, M)
    for i in range(M):
        order = torch.arange(M)
        similarity[i] = -((order - i) % M).float()  # its own column first
        similarity[i, i] = -i - 0.5  # i columns are nearer
    similarity[0, 0] = 1.0
    got = recall_at_k(similarity, ks=(1, 2, 5, 12))
    assert got == {1: 1 / 12, 2: 2 / 12, 5: 5 / 12, 12: 1.0}


def test_partners_may_be_shared_and_out_of_order():
    similarity = torch.tensor([[0.1, 0.9, 0.2], [0.8, 0.1, 0.3], [0.0, 0.5, 0.4], [0.9, 0.2, 0.8]])
    assert recall_at_k(similarity, torch.tensor([1, 0, 2, 2]), ks=(1, 2)) == {1: 0.5, 2: 1.0}


def test_ties_count_against_the_query():
    constant = torch.zeros(10, 10)
    assert recall_at_k(constant, ks=(1, 9, 10)) == {1: 0.0, 9: 0.0, 10: 1.0}
    pair = torch.tensor([[1.0, 1.0, 0.0]])
    assert recall_at_k(pair, torch.tensor([0]), ks=(1, 2)) == {1: 0.0, 2: 1.0}


@pytest.mark.parametrize(
    ("similarity", "positives", "ks", "words"),
    [
        (torch.zeros(3), None, (1,), r"\(N,M\)"),
        (torch.zeros(2, 3), None, (1,), "N must equal M"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), (1,), "int64"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), (1,), r"columns 0\.\.2"),
        (torch.zeros(2, 2), None, (3,), r"ranks in 1\.\.2"),
        (torch.full((2, 2), float("nan")), None, (1,), "NaN"),
    ],
)
def test_bad_similarities_are_refused(similarity: torch.Tensor, positives: torch.Tensor | None, ks: tuple, words: str):
    with pytest.raises(ValueError, match=words):
        recall_at_k(similarity, positives, ks)


def blobs(N: int, seed: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes around corners of a triangle, in badly scaled coordinates with a constant one."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (N,), generator=g)
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    x = corners[y] + spread * torch.randn(N, 2, generator=g)
    return torch.cat([x * torch.tensor([1000.0, 0.001]) + 50, torch.full((N, 1), 3.0)], 1), y


def test_probe_separates_what_is_separable_and_repeats():
    train, test = blobs(300, 0, 0.05), blobs(200, 1, 0.05)
    assert linear_probe(*train, *test) == 1.0
    noisy = blobs(300, 2, 0.4)
    first = linear_probe(*train, *noisy)
    assert 0.5 < first < 0.95
    assert linear_probe(*train, *noisy) == first


def test_probe_of_unrelated_features_is_at_chance():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2000, 4, generator=g), torch.randint(4, (2000,), generator=g)
    assert linear_probe(x[:1000], y[:1000], x[1000:], y[1000:]) == pytest.approx(0.25, abs=0.05)


def test_decay_holds_the_weights_and_not_the_biases():
    """Weights held at 0 leave the classes' frequencies: every guess is the commonest class."""
    x, y = torch.linspace(-1, 1, 10)[:, None], torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    assert linear_probe(x, y, x, y, weight_decay=1e-4) == 1.0
    assert linear_probe(x, y, x, y, weight_decay=1e6) == 0.6


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ((torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)), None, "K >= 2"),
        ((torch.zeros(4, 2), torch.arange(3)), None, "train: expected features"),
        ((torch.zeros(4, 2), torch.arange(4)), (torch.zeros(1, 3), torch.tensor([0])), "one width"),
        ((torch.zeros(4, 2), torch.arange(4)), (torch.zeros(1, 2), torch.tensor([4])), "classes"),
        ((torch.full((4, 2), float("inf")), torch.arange(4)), None, "finite"),
    ],
)
def test_bad_probes_are_refused(train: tuple, test: tuple | None, words: str):
    with pytest.raises(ValueError, match=words):
        linear_probe(*train, *(test or train))
