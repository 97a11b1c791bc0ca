from __future__ import annotations

import math

import pytest
import torch

from mmtok.kernels.codebook_stats import codebook_stats, codebook_stats_reference, usage_perplexity
from mmtok.kernels.dispatch import force


@pytest.mark.parametrize(("N", "D", "K"), [(0, 3, 4), (1, 1, 2), (333, 7, 19), (50, 4, 200)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_one_hot_sum(N, D, K, masked):
    torch.manual_seed(0)
    z, codes = torch.randn(N, D), torch.randint(0, K, (N,))
    mask = torch.rand(N) < 0.7 if masked else None
    counts, sums = codebook_stats(z, codes, K, mask)
    expected_counts, expected_sums = codebook_stats_reference(z, codes, K, mask)
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(sums, expected_sums, atol=1e-5, rtol=1e-5)
    with force("reference"):
        assert torch.equal(codebook_stats(z, codes, K, mask)[1], expected_sums)


def test_masked_rows_may_hold_anything():
    z = torch.tensor([[1.0], [float("nan")], [5.0]])
    counts, sums = codebook_stats(z, torch.tensor([0, 0, 1]), 2, torch.tensor([True, False, True]))
    assert counts.tolist() == [1, 1] and sums.tolist() == [[1], [5]]


def test_a_compiled_graph_is_captured_whole():
    torch.manual_seed(0)
    z, codes, mask = torch.randn(40, 3), torch.randint(0, 7, (40,)), torch.rand(40) < 0.8
    compiled = torch.compile(codebook_stats, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(z, codes, 7, mask), codebook_stats(z, codes, 7, mask), strict=True):
        torch.testing.assert_close(got, expected)


def test_repeated_runs_agree_bitwise():
    torch.manual_seed(0)
    z, codes = torch.randn(20000, 8), torch.randint(0, 3, (20000,))
    counts, sums = codebook_stats(z, codes, 3)
    for _ in range(3):
        again = codebook_stats(z, codes, 3)
        assert torch.equal(again[0], counts) and torch.equal(again[1], sums)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"expected z \(N, D\), codes \(N,\)"):
        codebook_stats(torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64), 5)


def test_usage_perplexity_closed_forms():
    uniform, one, skew = torch.full((8,), 5.0), torch.eye(8)[0] * 40, torch.tensor([100.0, 100, 1, 0, 0, 0, 0, 0])
    stats = usage_perplexity(torch.stack([uniform, one, skew, torch.zeros(8)]))
    assert stats["usage"].tolist() == [1.0, 0.125, 0.375, 0.0]
    entropy = -sum(p * math.log(p) for p in (100 / 201, 100 / 201, 1 / 201))
    torch.testing.assert_close(stats["perplexity"], torch.tensor([8.0, 1.0, math.exp(entropy), 0.0]))
    assert stats["dead_share"].tolist() == [0.0, 0.875, 0.75, 0.0]  # mean use of skew is 25: 1 < 2.5 is dead too
