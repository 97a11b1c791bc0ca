"""Frechet distance between two sets of features; the network that makes them is the caller's, and so is its name."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet (Wasserstein-2) distance of the Gaussians with the moments of two sets (arXiv 1706.08500, eq. 6).

    |m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)), covariances divided by N - 1 as is usual for FID. With
    S_a = X^T X and S_b = Y^T Y for centred sets over sqrt(N - 1), the last trace is the sum of the singular values of
    X Y^T: nothing is inverted, so fewer items than dimensions are legal, and equal sets give 0 up to rounding. The
    value still depends on N and M: compare distances of like sizes, beside `frechet_floor`.

    Args:
        a: (N, D) features, N at least 2.
        b: (M, D) features, M at least 2.

    Returns:
        The distance, 0 or more, in squared units of the features; computed in float64 on the CPU.

    Raises:
        ValueError: other shapes, or values that are not finite.
    """
    a, b = _checked(a, "a"), _checked(b, "b")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features: expected one width, got {a.shape[1]} and {b.shape[1]}; take them of one network")
    mean_a, mean_b = a.mean(0), b.mean(0)
    x, y = _root(a - mean_a), _root(b - mean_b)  # (<= D, D) each: x^T x is the covariance
    cross = torch.linalg.svdvals(x @ y.T).sum()
    distance = (mean_a - mean_b).square().sum() + x.square().sum() + y.square().sum() - 2 * cross
    return max(float(distance), 0.0)  # rounding only: a distance is never negative


def frechet_floor(a: Tensor, seed: int = 0) -> float:
    """Distance of two random halves of one set: what N / 2 items against N / 2 of the same kind show anyway.

    Args:
        a: (N, D) features, N at least 4.
        seed: of the split; an odd last item is left out.

    Raises:
        ValueError: as `frechet_distance`, and fewer than 4 items.
    """
    a = _checked(a, "a")
    half = len(a) // 2
    if half < 2:
        raise ValueError(f"a: expected at least 4 items to split in halves, got {len(a)}; compute more features")
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))
    return frechet_distance(a[order[:half]], a[order[half : 2 * half]])


def _root(centred: Tensor) -> Tensor:
    """A factor X of the covariance X^T X with at most D rows."""
    N, D = centred.shape
    x = centred / (N - 1) ** 0.5
    # The triangle of a QR is such a factor too, and keeps the SVD at D x D for any number of items.
    return torch.linalg.qr(x, mode="r").R if N > D else x


def _checked(features: Tensor, name: str) -> Tensor:
    if features.ndim != 2 or features.shape[0] < 2 or features.shape[1] < 1:
        raise ValueError(f"{name}: expected features (N,D) of at least 2 items, got shape {tuple(features.shape)}")
    features = features.detach().double().cpu()
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"{name}: expected finite features, got NaN or infinity; check the network and its input")
    return features
