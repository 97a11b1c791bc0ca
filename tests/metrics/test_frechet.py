"""Frechet distance against Gaussians whose distance is known, and against the textbook formula."""

from __future__ import annotations

import pytest
import torch

from mmtok.metrics.frechet import frechet_distance, frechet_floor


def with_moments(N: int, mean: torch.Tensor, root: torch.Tensor, seed: int) -> torch.Tensor:
    """N items whose sample mean and covariance (over N - 1) are exactly ``mean`` and ``root^T root``."""
    x = torch.randn(N, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q = torch.linalg.qr(x - x.mean(0)).Q * (N - 1) ** 0.5  # whitened: columns stay centred
    return q @ root + mean


def rotation(D: int, seed: int) -> torch.Tensor:
    x = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(x).Q


@pytest.mark.parametrize("sizes", [(50, 80), (7, 7)])
def test_gaussians_with_common_axes(sizes: tuple[int, int]):
    """|m_a - m_b|^2 + sum (s_a - s_b)^2 where both covariances have the same eigenvectors."""
    D, axes = 6, rotation(6, 0)
    s_a = torch.tensor([1.0, 2, 3, 0.5, 0.1, 4], dtype=torch.float64)
    s_b = torch.tensor([2.0, 2, 1, 0.5, 0.3, 0], dtype=torch.float64)
    m_a, m_b = torch.zeros(D, dtype=torch.float64), torch.full((D,), 0.5, dtype=torch.float64)
    a = with_moments(sizes[0], m_a, torch.diag(s_a) @ axes, 1)
    b = with_moments(sizes[1], m_b, torch.diag(s_b) @ axes, 2)
    want = D * 0.25 + float((s_a - s_b).square().sum())
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(want, rel=1e-9)


def test_equals_the_formula_with_a_matrix_root():
    a = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) @ torch.randn(5, 5)
    b = torch.randn(30, 5, generator=torch.Generator().manual_seed(1)) + 1
    cov_a, cov_b = torch.cov(a.double().T), torch.cov(b.double().T)
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    want = (a.double().mean(0) - b.double().mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(float(want), rel=1e-8)


def test_fewer_items_than_dimensions():
    """Two sets on lines at right angles share no direction: the distance is the sum of both variances."""
    a, b = torch.zeros(4, 100), torch.zeros(3, 100)
    a[:, 0], b[:, 1] = torch.tensor([1.0, -1, 1, -1]), torch.tensor([2.0, 0, -2])
    assert frechet_distance(a, b) == pytest.approx(4 / 3 + 4, rel=1e-12)
    b[:, 1], b[:, 0] = 0, torch.tensor([2.0, 0, -2])
    assert frechet_distance(a, b) == pytest.approx((2 - (4 / 3) ** 0.5) ** 2, rel=1e-12)
    wide = torch.randn(10, 300, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(wide, wide + 1) == pytest.approx(300, rel=1e-6)


def test_equal_sets_in_any_order_have_no_distance():
    a = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-10)


def test_floor_is_small_seeded_and_shrinks_with_more_items():
    g = torch.Generator().manual_seed(0)
    few, many = torch.randn(60, 8, generator=g), torch.randn(2001, 8, generator=g)
    assert frechet_floor(few, 1) == frechet_floor(few, 1) != frechet_floor(few, 2)
    assert 0 < frechet_floor(many) < frechet_floor(few) < frechet_distance(few, few + 1)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    assert frechet_floor(few, 3) == pytest.approx(frechet_distance(few[order[:30]], few[order[30:]]), rel=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (torch.zeros(1, 3), torch.zeros(4, 3), "at least 2 items"),
        (torch.zeros(4), torch.zeros(4, 3), "expected features"),
        (torch.zeros(4, 3), torch.zeros(4, 2), "one width"),
        (torch.zeros(4, 3), torch.full((4, 3), float("nan")), "b: expected finite"),
    ],
)
def test_bad_features_are_refused(a: torch.Tensor, b: torch.Tensor, words: str):
    with pytest.raises(ValueError, match=words):
        frechet_distance(a, b)


def test_floor_needs_four_items():
    with pytest.raises(ValueError, match="at least 4"):
        frechet_floor(torch.zeros(3, 2))
