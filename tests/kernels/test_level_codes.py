from __future__ import annotations

import pytest
import torch

from mmtok.kernels.dispatch import force, installed
from mmtok.kernels.level_codes import level_codes, level_codes_reference

IMPLEMENTATIONS = ["torch", pytest.param("numba", marks=pytest.mark.skipif(not installed("numba"), reason="no numba"))]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("N", "D", "K"), [(0, 3, 4), (1, 1, 1), (1, 1, 2), (301, 16, 16), (77, 5, 64), (40, 33, 128)])
def test_nearest_level_of_each_column(implementation, N, D, K):
    torch.manual_seed(0)
    levels = torch.randn(D, K).sort(1).values
    x = 1.5 * torch.randn(N, D)
    with force(implementation):
        codes = level_codes(x, levels)
        assert torch.equal(level_codes(x.T.contiguous().T, levels), codes)
    assert codes.dtype == torch.int64 and torch.equal(codes, level_codes_reference(x, levels))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_go_to_the_lower_level(implementation):
    levels = torch.tensor([[-1.0, 0.0, 2.0]])
    x = torch.tensor([[-5.0], [-0.5], [0.0], [1.0], [1.5], [9.0]])
    with force(implementation):
        assert level_codes(x, levels)[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_many_levels_are_bisected_and_wrong_shapes_named():
    torch.manual_seed(0)
    levels, x = torch.randn(2, 1000).sort(1).values, torch.randn(50, 2)
    assert torch.equal(level_codes(x, levels), level_codes_reference(x, levels))
    with pytest.raises(ValueError, match=r"levels \(D, K\), got \(50, 2\) and \(3, 4\)"):
        level_codes(x, torch.zeros(3, 4))
