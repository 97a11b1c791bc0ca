"""What quantizers that are fitted, not trained, share: reading data, a sample of it, its moments, exact products."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mmtok.kernels.nearest_code import check_is_finite
from mmtok.kernels.row_search import reduced_precision
from mmtok.quantizers.sync import sum_over_ranks

_TINY = 1e-30
_SPREAD_ROWS_PER_CODE = 16
_SMALLEST_VARIANCE = 1e-6  # relative to the largest: what is below carries rounding, and whitening would blow it up


def read_rows(batches: Iterable[Tensor], dim: int, device: torch.device) -> Iterator[Tensor]:
    """Each of ``batches`` as fp32 rows (N, D) on ``device``.

    Raises:
        ValueError: a tensor of another shape or type, NaN or infinity.
    """
    for rows in batches:
        if rows.ndim != 2 or rows.shape[1] != dim or not rows.is_floating_point():
            raise ValueError(
                f"batches: expected floating point tensors of shape (N, {dim}), got {rows.dtype} of shape "
                f"{tuple(rows.shape)}; flatten batch and positions together and leave padding out"
            )
        check_is_finite(rows, "batches")
        yield rows.detach().to(device, torch.float32)


class RowSample:
    """A uniform sample of at most ``size`` rows of all that were added: every row draws a number, the least stay."""

    def __init__(self, size: int, dim: int, device: torch.device) -> None:
        self.rows = torch.empty(0, dim, device=device)
        self.size = size
        self._draws = torch.empty(0, dtype=torch.float64, device=device)  # fp32 draws would tie among millions

    def add(self, rows: Tensor) -> None:
        """rows (N, D)."""
        draws = torch.rand(len(rows), dtype=torch.float64, device=rows.device)
        draws, rows = torch.cat([self._draws, draws]), torch.cat([self.rows, rows])
        if len(rows) > self.size:
            draws, kept = draws.topk(self.size, largest=False)
            rows = rows[kept]
        self._draws, self.rows = draws, rows


def spread_rows(rows: Tensor, size: int) -> Tensor:
    """``size`` rows of (n, D) as starts for k-means: each drawn with a probability proportional to its squared distance
    from those drawn before (k-means++, Arthur and Vassilvitskii 2007), so that far clusters are not left without one.
    Of more than 16 rows a code a random part is drawn from: every draw passes over all of them.
    """
    rows = rows[torch.randperm(len(rows), device=rows.device)[: _SPREAD_ROWS_PER_CODE * size]]
    x = rows - rows.mean(0)  # distances by the product below lose less this way
    half = 0.5 * x.square().sum(1)  # (n,)
    picks, distance = [torch.zeros((), dtype=torch.int64, device=rows.device)], torch.full_like(half, torch.inf)
    for _ in range(size - 1):
        c = x[picks[-1]]
        distance = distance.minimum((half - x @ c + 0.5 * c.square().sum()).clamp_min(0))
        picks.append(torch.multinomial(distance + _TINY, 1)[0])  # all alike: then any row
    return rows[torch.stack(picks)]


class Moments:
    """Mean, mean length and, if asked for, covariance of the rows (N, D) that were added, summed in fp64."""

    def __init__(self, dim: int, device: torch.device, covariance: bool) -> None:
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._length, self._sum = self._count.clone(), self._count.new_zeros(dim)
        self._product = self._count.new_zeros(dim, dim) if covariance else None

    def add(self, rows: Tensor) -> None:
        """rows (N, D)."""
        x = rows.double()
        self._count += len(x)
        self._length += x.norm(dim=1).sum()
        self._sum += x.sum(0)
        if self._product is not None:
            self._product += x.T @ x

    def join_ranks(self) -> None:
        """Add up what all ranks have; on every one of them."""
        for part in (self._count, self._length, self._sum, self._product):
            if part is not None:
                sum_over_ranks(part)

    def mean_length(self) -> Tensor:
        """Mean of |x|, scalar."""
        return self._length / self._count

    def whitening(self) -> tuple[Tensor, Tensor, Tensor]:
        """mean (D,), C^(-1/2) (D, D) and C^(1/2) (D, D), C the covariance; both matrices are symmetric."""
        if self._product is None:
            raise ValueError("expected moments with covariance=True, got those of the mean alone")
        mean = self._sum / self._count
        values, axes = torch.linalg.eigh(self._product / self._count - mean[:, None] * mean)
        largest = values[-1].clamp_min(torch.finfo(torch.float32).tiny)
        spread = values.maximum(_SMALLEST_VARIANCE * largest).sqrt()
        return mean, (axes / spread) @ axes.T, (axes * spread) @ axes.T


def exact_product(x: Tensor, matrix: Tensor) -> Tensor:
    """x (..., m) @ matrix (m, n) in fp32 whatever the global matmul precision, for frozen matrices.

    For learned ones there is `mmtok.quantizers.linear.ExactLinear`, which explains why.
    """
    kind = x.device.type
    if kind not in ("cpu", "cuda") or not (torch.compiler.is_compiling() or reduced_precision(kind)):
        return x @ matrix
    return (x.double() @ matrix.double()).float()
