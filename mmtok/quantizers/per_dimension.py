"""Per-dimension quantizer: each number of a latent is a code of its own, after training (TokenBridge)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mmtok.kernels.level_codes import level_codes
from mmtok.quantizers.base import Quantized, Quantizer, level_stats, straight_through, valid_levels
from mmtok.quantizers.frozen import RowSample, read_rows
from mmtok.quantizers.sync import gather_rows

_SMALLEST_STD = 1e-6


class PerDimensionQuantizer(Quantizer):
    """D codes a position, code i the nearest of 2^bits centroids to number i (arXiv 2503.16430).

    The table: the standard Gaussian is cut into K = 2^bits cells of equal mass, the outermost end at +-gaussian_range,
    and a centroid is the mean of the Gaussian inside its cell, (pdf(a) - pdf(b)) / (cdf(b) - cdf(a)). The numbers, less
    ``mean`` and divided by ``std``, have [-value_range, value_range] mapped onto [-gaussian_range, gaussian_range]. As
    in the authors' code the choice is by the nearest centroid, not by the cell, which is the better one in squared
    error; on a tie the lower. `fit` replaces the table by one for each dimension, from its empirical quantiles, for
    latents that are not Gaussian. Nothing trains and there is no loss; the gradient of z_q to z is exactly one.

    The defaults are TokenBridge's. Its latents have a deviation of about 1 and lie within +-5, so its cells have equal
    mass in name only; value_range = gaussian_range = 3 gives equal mass for standardised latents.

    A prefix of the codes decodes: a missing dimension contributes its mean (0 unless set or fitted).

    Args:
        dim: D. bits: of each code, 1..16. value_range, gaussian_range: > 0, see above.
    """

    centroids: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, bits: int = 6, value_range: float = 5.0, gaussian_range: float = 3.0) -> None:
        super().__init__()
        if dim < 1 or not 1 <= bits <= 16:
            raise ValueError(f"expected dim >= 1 and bits in 1..16, got {dim} and {bits}")
        if value_range <= 0 or gaussian_range <= 0:
            raise ValueError(f"expected value_range and gaussian_range > 0, got {value_range} and {gaussian_range}")
        self.dim, self.codebook_sizes, self.bits = dim, (2**bits,) * dim, bits
        self.value_range, self.gaussian_range = value_range, gaussian_range
        table = gaussian_centroids(2**bits, gaussian_range) * (value_range / gaussian_range)
        self.register_buffer("centroids", table.float().repeat(dim, 1))  # (D, K), ascending, of standardised numbers
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def config(self) -> dict:
        return {
            "type": "per_dimension",
            "dim": self.dim,
            "bits": self.bits,
            "value_range": self.value_range,
            "gaussian_range": self.gaussian_range,
        }

    @torch.no_grad()
    def set_statistics(self, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> None:
        """Standardise by mean and std (D,) before the table.

        Raises:
            ValueError: a wrong shape, or a deviation that is not positive and finite.
        """
        m, s = (torch.as_tensor(x, dtype=torch.float32, device=self.mean.device) for x in (mean, std))
        if m.shape != (self.dim,) or s.shape != (self.dim,):
            raise ValueError(f"expected mean and std of shape ({self.dim},), got {tuple(m.shape)} and {tuple(s.shape)}")
        if not bool(torch.isfinite(m).all() and torch.isfinite(s).all() and (s > 0).all()):
            raise ValueError("expected a finite mean and a std > 0 in every dimension; use std 1 where it is constant")
        self.mean.copy_(m)
        self.std.copy_(s)

    @torch.no_grad()
    def fit(self, batches: Tensor | Iterable[Tensor], max_rows: int = 65536) -> None:
        """Tables from data: per dimension, K cells of equally many samples, and the mean of each as its centroid.

        Sets mean and std too. Read once; of more than max_rows rows (a rank) a uniform sample is used. Under several
        ranks each hands over its own part, and all get the same tables.

        Args:
            batches: (N, D), or an iterable of such. max_rows: bounds the memory; 2^bits or more.

        Raises:
            ValueError: fewer rows than codes, a wrong shape, NaN.
        """
        sample = RowSample(max_rows, self.dim, self.mean.device)
        for rows in read_rows([batches] if isinstance(batches, Tensor) else batches, self.dim, self.mean.device):
            sample.add(rows)
        x, K = gather_rows(sample.rows).double(), 2**self.bits
        if len(x) < K:
            raise ValueError(f"batches: expected at least {K} rows, one for each code, got {len(x)}; take fewer bits")
        mean, std = x.mean(0), x.std(0, correction=0).clamp_min(_SMALLEST_STD)
        cells = ((x - mean) / std).sort(0).values.tensor_split(K)  # K times (about N / K, D)
        self.centroids.copy_(torch.stack([cell.mean(0) for cell in cells], 1))
        self.mean.copy_(mean)
        self.std.copy_(std)

    def _quantize(self, z: Tensor, mask: Tensor | None, num_codebooks: int | None) -> Quantized:
        codes = self._encode(z.detach(), num_codebooks or self.dim)
        stats = level_stats(codes, self.codebook_sizes[0], valid_levels(codes, mask))
        no_loss = 0.0 * (z - z.detach()).sum()  # connected to z, so that a training loop can add it
        z_q = straight_through(z, self._decode(codes))
        first = z_q if codes.shape[1] == 1 else straight_through(z, self._decode(codes[:, :1]))
        return Quantized(z_q, codes, no_loss, stats, first)

    def _encode(self, z: Tensor, num_codebooks: int) -> Tensor:
        B, T, _ = z.shape
        x = ((z - self.mean) / self.std)[..., :num_codebooks].flatten(0, 1)  # (N, Q')
        codes = level_codes(x, self.centroids[:num_codebooks])
        return codes.view(B, T, num_codebooks).transpose(1, 2).contiguous()

    def _decode(self, codes: Tensor) -> Tensor:
        Q = codes.shape[1]
        B, _, T = codes.shape
        rows = codes.transpose(0, 1).reshape(Q, B * T)
        x = self.centroids[:Q].gather(1, rows).view(Q, B, T).permute(1, 2, 0)  # (B, T, Q')
        told = x * self.std[:Q] + self.mean[:Q]
        return torch.cat([told, self.mean[Q:].expand(B, T, self.dim - Q)], -1)


def gaussian_centroids(codebook_size: int, gaussian_range: float) -> Tensor:
    """(K,) fp64: the means of the standard Gaussian in K cells of mass 1 / K, all of it cut to +-gaussian_range.

    Cells that lie outside the range altogether (a range below the outermost quantiles) are its ends.
    """
    inner = torch.special.ndtri(torch.arange(1, codebook_size, dtype=torch.float64) / codebook_size)
    ends = torch.tensor([-gaussian_range, gaussian_range], dtype=torch.float64)
    edges = torch.cat([ends[:1], inner.clamp(-gaussian_range, gaussian_range), ends[1:]])  # (K + 1,)
    low, high = edges[:-1], edges[1:]
    mass = torch.special.ndtr(high) - torch.special.ndtr(low)
    density = (-0.5 * edges.square()).exp() / math.sqrt(2 * math.pi)
    mean = (density[:-1] - density[1:]) / mass.clamp_min(1e-300)
    centroids = torch.where(mass > 0, mean, low).maximum(low).minimum(high)
    return (centroids - centroids.flip(0)) / 2  # exactly odd, which rounding alone would not leave
