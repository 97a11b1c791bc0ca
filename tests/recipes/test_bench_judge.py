"""The judge of recipes/bench_kernels.py: exact answers in fp64, and what it calls wrong."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

from benching import exact, small_ops
from benching.protocol import Verdict


def test_exact_codes_on_offset_data_are_those_of_direct_differences():
    g = torch.Generator().manual_seed(0)
    z, c = (100 + 0.1 * torch.randn(n, 16, generator=g) for n in (60, 40))
    codes, _ = exact.nearest64(z.double(), c.double())
    direct = (z.double()[:, None] - c.double()).square().sum(2).argmin(1)
    assert torch.equal(codes, direct)
    assert exact.judge_codes(exact.answer(z, c), direct) == Verdict(True, "", 0, 60, 0)


def test_a_wrong_code_is_counted_and_a_tie_goes_to_the_lower():
    z, c = torch.tensor([[0.0], [2.1], [5.0]]), torch.tensor([[5.0], [0.0], [2.0], [5.0]])
    truth = exact.answer(z, c)
    assert truth.codes[:, 0].tolist() == [1, 2, 0]
    assert truth.near_ties[:, 0].tolist() == [False, False, True]
    assert exact.judge_codes(truth, torch.tensor([1, 2, 0])).ok
    for codes in ([1, 1, 0], [1, 2, 3]):  # a farther code; the higher of two equals
        verdict = exact.judge_codes(truth, torch.tensor(codes))
        assert (verdict.ok, verdict.wrong, verdict.total) == (False, 1, 3)
    assert not exact.judge_codes(truth, torch.tensor([1, 2, 4])).ok
    assert not exact.judge_codes(truth, torch.tensor([1, 2])).ok


def test_cosine_answers_compare_directions():
    z, c = torch.tensor([[3.0, 0.1]]), torch.tensor([[3.0, 1.0], [0.1, 0.0]])
    assert exact.answer(z, c).codes.item() == 0
    assert exact.answer(z, c, "cosine").codes.item() == 1


def test_a_chain_counts_each_row_at_the_first_level_that_differs():
    books = torch.tensor([[[0.0], [8.0]], [[-1.0], [1.0]]])
    truth = exact.chain_answer(torch.tensor([[7.2], [0.4]]), books)
    assert truth.codes.tolist() == [[1, 0], [0, 1]]
    verdict = exact.judge_codes(truth, torch.tensor([[0, 1], [0, 1]]))  # the second level follows from the first
    assert (verdict.ok, verdict.wrong) == (False, 1)


def test_a_chain_forgives_the_rounding_of_fp32_and_no_more():
    books = torch.tensor([[[0.0], [1.0]]])
    for offset, ok in ((1e-8, True), (1e-3, False)):
        truth = exact.chain_answer(torch.tensor([[0.5]]) + offset, books)
        truth = dataclasses.replace(truth, rows=[torch.tensor([[0.5 + offset]], dtype=torch.float64)])
        truth.codes.fill_(1)
        verdict = exact.judge_codes(truth, torch.tensor([[0]]))
        assert (verdict.ok, verdict.wrong) == (ok, 1)


@pytest.mark.parametrize("bad", [math.nan, 1.0 + 1e-3])
def test_values_are_judged_by_relative_error(bad: float):
    expected = [torch.ones(3, dtype=torch.float64)]
    assert exact.judge_values(expected, [torch.tensor([1.0, 1.0, 1.0 + 1e-6])], 1e-5).ok
    assert not exact.judge_values(expected, [torch.tensor([1.0, bad, 1.0])], 1e-5).ok
    assert not exact.judge_values(expected, [torch.ones(2)], 1e-5).ok
    assert not exact.judge_values(expected, [], 1e-5).ok


def test_integers_may_differ_only_where_rounding_decides():
    expected, got = torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3])
    assert not exact.judge_integers(expected, got).ok
    verdict = exact.judge_integers(expected, got, torch.tensor([False, True, False]))
    assert (verdict.ok, verdict.wrong, verdict.near_ties) == (True, 1, 1)


def test_entropy_answer_is_that_of_independent_equal_bits():
    sample, codebook = small_ops.entropy64(torch.zeros(3, 5))
    assert sample.item() == pytest.approx(5 * math.log(2)) and codebook.item() == pytest.approx(5 * math.log(2))
    logits = torch.linspace(-2, 2, 28).view(4, 7).requires_grad_()
    naive = small_ops.naive_entropy(7, torch.device("cpu"))(logits)
    (naive[0] - naive[1]).backward()
    assert logits.grad is not None
    for a, b in zip([*naive, logits.grad], small_ops.entropy64(logits, gradient=True), strict=True):
        torch.testing.assert_close(a.detach().double(), b, rtol=1e-4, atol=1e-7)
    assert len(small_ops.entropy64(logits)) == 2
