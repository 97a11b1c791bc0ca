"""Rules for new rows: their moments, their geometry, and the matching pursuit against its definition."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from tiny_lm import build
from torch import Tensor

from mmtok.lm.initialise import (
    INITS,
    OMP,
    Anchors,
    Donor,
    Mean,
    MeanCovariance,
    Normal,
    Projected,
    Start,
    code_vectors,
    moments,
)
from mmtok.lm.pursuit import combine, matching_pursuit
from mmtok.tokenizer import Tokenizer
from mmtok.tokens import TokenSpec
from mmtok.vocab import Vocab

V, D = 60, 6
SPEC = TokenSpec("audio-x", "audio", (32, 32), frame_rate=50.0, fingerprint="x")


class Bare(Tokenizer):
    """A tokenizer that shows no quantizer, as those of other packages."""

    def base_spec(self) -> TokenSpec:
        return SPEC


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def old_rows(count: int = V, width: int = D) -> Tensor:
    """Rows with a mean far from 0 and very unequal variances."""
    return torch.randn(count, width, generator=rng(1)) * torch.linspace(0.1, 2.0, width) + torch.arange(width)


def start(vocab: Vocab, sources: Mapping | None = None, old: Tensor | None = None, head: bool = False) -> Start:
    return Start(old_rows() if old is None else old, vocab, head, 0.02, sources or {}, rng())


def books(*shapes: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(*shape, generator=rng(n + 5)) for n, shape in enumerate(shapes)]


@pytest.mark.parametrize("scale", [1.0, 0.04, 0.0])
@pytest.mark.parametrize("count", [V, 4])  # 4 rows span 3 directions: a covariance of low rank
def test_mean_covariance_has_the_moments_of_the_old_rows(scale: float, count: int):
    vocab = Vocab(count, image=TokenSpec("image-x", "image", (20_000,), num_tokens=4))
    old = old_rows(count)
    new = MeanCovariance(scale)(start(vocab, old=old))
    assert new.shape == (vocab.size - count, D)
    mean, cov = moments(new)
    old_mean, old_cov = old.double().mean(0), torch.cov(old.double().T, correction=0)
    assert torch.allclose(mean, old_mean, atol=0.05)
    assert torch.allclose(cov, scale * old_cov, atol=0.03 * scale * float(old_cov.diagonal().max()) + 1e-6)
    if count == 4:
        apart = torch.linalg.svd(old.double() - old_mean)[2][3:]  # directions in which the old rows are all alike
        assert float(((new - old_mean.float()) @ apart.T.float()).abs().max()) < 1e-2


def test_mean_and_normal():
    vocab = Vocab(V, audio=SPEC)
    new = Mean()(start(vocab))
    assert torch.allclose(new, old_rows().mean(0).expand(len(new), D), atol=1e-5)
    new = Normal()(start(vocab))
    assert float(new.std()) == pytest.approx(0.02, rel=0.1) and float(new.mean()) == pytest.approx(0.0, abs=0.002)
    assert float(Normal(std=3.0)(start(vocab)).std()) == pytest.approx(3.0, rel=0.1)
    with pytest.raises(ValueError, match=r"no initializer_range; use init=Normal\(std=0.02\)"):
        Normal()(Start(old_rows(), vocab))


def test_draws_follow_the_generator():
    vocab = Vocab(V, audio=SPEC)
    for name in ("mean_covariance", "normal"):
        rule = INITS[name]()
        assert torch.equal(rule(start(vocab)), rule(start(vocab)))
        other = dataclasses.replace(start(vocab), generator=rng(9))
        assert not torch.equal(rule(start(vocab)), rule(other))


@pytest.mark.parametrize("d", [3, 6, 9])
def test_orthonormal_projection_keeps_the_geometry_of_each_level(d: int):
    vocab = Vocab(V, audio=SPEC)
    books_of = books((32, d), (32, d))
    books_of[1] *= 0.01  # a residual level, far smaller
    new = Projected()(start(vocab, {"audio": books_of}))
    total = float(torch.cov(old_rows().double().T, correction=0).trace())
    for ids, book in zip(vocab.blocks["audio"].levels, books_of, strict=True):
        rows = new[ids.start - V : ids.stop - V]
        mean, cov = moments(rows)
        assert torch.allclose(mean, old_rows().double().mean(0), atol=1e-4)
        assert float(cov.trace()) == pytest.approx(total, rel=1e-4)
        if d <= D:
            ratio = torch.pdist(rows) / torch.pdist(book)
            assert float(ratio.max() / ratio.min()) == pytest.approx(1.0, abs=1e-3)
    first, second = (new[r.start - V : r.stop - V] for r in vocab.blocks["audio"].levels)
    assert not torch.allclose(first, second, atol=0.1)


def test_whitened_projection_has_the_covariance_of_the_old_rows():
    vocab = Vocab(V, audio=SPEC)
    wide = [b @ torch.randn(D, 2 * D, generator=rng(3)) for b in books((32, D), (32, D))]  # rank D in 2 D dimensions
    new = Projected("whitened")(start(vocab, {"audio": wide}))
    for ids in vocab.blocks["audio"].levels:
        mean, cov = moments(new[ids.start - V : ids.stop - V])
        assert torch.allclose(mean, old_rows().double().mean(0), atol=1e-4)
        assert torch.allclose(cov, torch.cov(old_rows().double().T, correction=0), atol=1e-3)
    narrow = Projected("whitened", scale=0.25)(start(vocab, {"audio": books((32, 2), (32, 2))}))
    _, cov = moments(narrow[vocab.blocks["audio"].levels[0].start - V :][:32])
    assert float(cov.trace()) == pytest.approx(0.25 * float(torch.cov(old_rows().T, correction=0).trace()), rel=1e-3)
    assert int(torch.linalg.matrix_rank(cov, rtol=1e-4)) == 2


def test_code_vectors_are_what_a_code_adds():
    codec = build("codec-causal")
    spec = codec.spec.keep(2)
    levels = code_vectors(start(Vocab(V, audio=spec), {"audio": codec}), "audio")
    assert [tuple(x.shape) for x in levels] == [(16, 8), (16, 8)]
    codes = torch.tensor([[[3], [7]]])
    one, two = (codec.quantizer.decode(codes[:, :q])[0, 0] for q in (1, 2))
    assert torch.allclose(levels[0][3], one, atol=1e-5) and torch.allclose(levels[1][7], two - one, atol=1e-5)
    picture = build("bridge")
    levels = code_vectors(start(Vocab(V, image=picture.spec), {"image": picture}), "image")
    for q, x in enumerate(levels):  # one number a level: only its own dimension changes
        moved = (x - x[0]).abs().amax(0) > 0
        assert moved.tolist() == [n == q for n in range(x.shape[1])]


def test_sources_that_do_not_fit_are_refused():
    codec = build("codec-causal")
    vocab = Vocab(V, audio=SPEC)
    with pytest.raises(ValueError, match=r"expected sources=\{'audio': tokenizer\}"):
        Projected()(start(vocab))
    with pytest.raises(ValueError, match=r"expected the tokenizer of the vocab, 'audio-x' \(fingerprint x\)"):
        Projected()(start(vocab, {"audio": codec}))
    with pytest.raises(ValueError, match=r"expected \(K, d\) with K = \[32, 32\]"):
        Projected()(start(vocab, {"audio": books((32, 4))}))
    with pytest.raises(ValueError, match="all 32 vectors of audio level 1 are equal"):
        Projected()(start(vocab, {"audio": [books((32, 4))[0], torch.ones(32, 4)]}))
    with pytest.raises(ValueError, match="expected 'orthonormal' or 'whitened', got 'pca'"):
        Projected("pca")(start(vocab, {"audio": books((32, 4), (32, 4))}))
    bare = Bare({})
    with pytest.raises(ValueError, match=r"no quantizer whose codes decode one by one; pass the vectors"):
        Projected()(start(Vocab(V, audio=bare.spec), {"audio": bare}))
    with pytest.raises(ValueError, match="expected at least 2 text ids"):
        MeanCovariance()(start(Vocab(0, audio=SPEC), old=torch.zeros(0, D)))


def slow_pursuit(target: np.ndarray, atoms: np.ndarray, k: int) -> np.ndarray:
    """The definition: take the atom of the largest |cosine| with what is left, fit all taken ones by least squares."""
    taken: list[int] = []
    weights, residual = np.zeros(len(atoms)), target
    for _ in range(k):
        cosine = np.abs(atoms @ residual) / np.linalg.norm(atoms, axis=1)
        cosine[taken] = -1
        taken.append(int(cosine.argmax()))
        fit = np.linalg.lstsq(atoms[taken].T, target, rcond=None)[0]
        residual = target - atoms[taken].T @ fit
    weights[taken] = fit
    return weights


def dense(chosen: Tensor, weights: Tensor, M: int) -> Tensor:
    return torch.zeros(len(chosen), M, dtype=weights.dtype).scatter_add_(1, chosen, weights)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_matching_pursuit_is_its_definition(k: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mmtok.lm.pursuit.MAX_CELLS", 100)  # several chunks
    targets = torch.randn(17, 8, generator=rng(1), dtype=torch.float64)
    atoms = torch.randn(12, 8, generator=rng(2), dtype=torch.float64) * torch.linspace(0.1, 5, 12)[:, None]
    chosen, weights = matching_pursuit(targets, atoms, k)
    assert all(len(set(row)) == k for row in chosen.tolist())
    want = np.stack([slow_pursuit(t, atoms.numpy(), k) for t in targets.numpy()])
    assert np.allclose(dense(chosen, weights, 12).numpy(), want, atol=1e-9)


def test_matching_pursuit_finds_the_best_set_where_atoms_are_orthogonal():
    atoms = torch.linalg.qr(torch.randn(6, 6, generator=rng(3), dtype=torch.float64))[0]
    for target in torch.randn(5, 6, generator=rng(4), dtype=torch.float64):
        chosen, _ = matching_pursuit(target[None], atoms, 3)
        errors = {s: float((target - (atoms[list(s)] @ target) @ atoms[list(s)]).norm()) for s in subsets(6, 3)}
        assert tuple(sorted(chosen[0].tolist())) == min(errors, key=lambda s: errors[s])


def subsets(n: int, k: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(n), k))


def test_matching_pursuit_takes_no_more_than_it_needs():
    atoms = torch.tensor([[0.0, 0, 0], [2, 0, 0], [4, 0, 0], [0, 3, 0], [0, 0, 0.0]])
    chosen, weights = matching_pursuit(torch.tensor([[1.0, 6, 0], [0, 0, 0], [0, 0, 1]]), atoms, 9)
    found = dense(chosen, weights, 5)
    assert chosen.shape == (3, 5) and bool(weights.isfinite().all())
    assert torch.allclose(found @ atoms, torch.tensor([[1.0, 6, 0], [0, 0, 0], [0, 0, 0]]), atol=1e-6)
    assert (found != 0).sum(1).tolist() == [2, 0, 0]
    assert torch.allclose(combine(atoms[1:3], atoms, torch.eye(5), 1).sum(1), torch.tensor([1.0, 2.0]), atol=1e-6)


def test_omp_from_a_donor_recovers_what_is_sparse_in_shared_tokens():
    vocab = Vocab(V, audio=SPEC)
    old, N = old_rows(V, 40), vocab.size - V
    share = torch.zeros(N, V)
    for n, row in enumerate(share):  # each new id is a mix of 3 of the 30 tokens that both models know
        row[10 + torch.randperm(30, generator=rng(n))[:3]] = torch.tensor([1.5, -1.0, 0.7])
    turn = torch.linalg.qr(torch.randn(40, 40, generator=rng(8)))[0]
    there = torch.zeros(100 + N, 40)
    there[50:80] = old[10:40] @ turn  # the shared tokens stand at other ids, in a turned space
    there[100:] = share @ old @ turn
    pairs = torch.stack([torch.arange(10, 40), torch.arange(50, 80)], 1)
    donor = Donor(there, 100, pairs, head=-2 * there)
    new = OMP(donor, k=30)(start(vocab, old=old))
    assert torch.allclose(new, share @ old, atol=1e-2)
    few = OMP(donor, k=1)(start(vocab, old=old))
    assert float((few - share @ old).norm()) > float((new - share @ old).norm())
    head = OMP(donor, k=30)(start(vocab, old=old, head=True))  # the same weights, since the head is the same space
    assert torch.allclose(head, share @ old, atol=1e-2)


def test_omp_from_anchors_keeps_theirs_and_combines_the_rest():
    vocab = Vocab(V, audio=SPEC)
    levels = books((32, 4), (32, 4))
    A = torch.randn(4, D, generator=rng(2))
    first = vocab.blocks["audio"].levels[0].start
    known = torch.tensor([vocab.blocks["audio"].begin, *range(first + 5, first + 25)])
    rows = torch.cat([torch.full((1, D), 7.0), levels[0][5:25] @ A])
    new = OMP(anchors=Anchors(known, rows), k=4)(start(vocab, {"audio": levels}))
    assert torch.equal(new[known - V], rows)
    assert torch.allclose(new[first - V : first - V + 64], torch.cat(levels) @ A, atol=1e-3)


def test_omp_says_what_it_needs():
    vocab = Vocab(V, audio=SPEC)
    sources = {"audio": books((32, 4), (32, 4))}
    marker = torch.tensor([vocab.blocks["audio"].begin])
    with pytest.raises(ValueError, match="omp needs exactly one of OMP"):
        INITS["omp"]()(start(vocab))
    with pytest.raises(ValueError, match="none of the 1 ids is an audio code"):
        OMP(anchors=Anchors(marker, torch.ones(1, D)))(start(vocab, sources))
    with pytest.raises(ValueError, match=r"expected ids \(M,\) in 60"):
        OMP(anchors=Anchors(torch.tensor([3]), torch.ones(1, D)))(start(vocab, sources))
    N = vocab.size - V
    with pytest.raises(ValueError, match="without shared tokens nothing can be transplanted"):
        OMP(Donor(torch.ones(N + 5, 3), 5, torch.zeros(0, 2, dtype=torch.int64)))(start(vocab))
    with pytest.raises(ValueError, match=f"expected rows for ids 6..{N + 5}, got {N + 5} rows"):
        OMP(Donor(torch.ones(N + 5, 3), 6, torch.zeros(1, 2, dtype=torch.int64)))(start(vocab))
    with pytest.raises(ValueError, match="at least 1 anchor, got 0"):
        OMP(Donor(torch.ones(N + 5, 3), 5, torch.zeros(1, 2, dtype=torch.int64)), k=0)(start(vocab))
