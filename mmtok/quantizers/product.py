"""Product quantizer: k-means in each group of dimensions (Jegou et al., PAMI 2011); one group = plain k-means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mmtok.kernels.codebook_stats import codebook_stats
from mmtok.kernels.nearest_code import nearest_code
from mmtok.quantizers.base import Quantized, Quantizer, level_stats, straight_through, valid_levels
from mmtok.quantizers.codebook import KMEANS_STEPS, KMEANS_VECTORS_PER_CODE
from mmtok.quantizers.frozen import Moments, RowSample, exact_product, read_rows, spread_rows
from mmtok.quantizers.sync import from_rank_zero, gather_rows, sum_over_ranks

NORMALIZATIONS = ("none", "length", "whiten")
_SMALLEST_LENGTH = 1e-12


class ProductQuantizer(Quantizer):
    """D numbers in G groups of D / G consecutive ones, each group with its own K codes; nearest code in each.

    For the features of a frozen network: `fit` once over a data set, then encode. With one group these are plain
    k-means units, as HuBERT's (arXiv 2106.07447). Without `fit`, the first batch in training mode starts
    the codes by k-means over its own vectors, quick and rough; nothing moves after that, and there is no loss. (Groups
    that learn together with an encoder are a grouped residual quantizer of one level.)

    Normalisation comes before the groups and is undone after them: ``length`` scales every vector to length 1 (and z_q
    to the mean length of the fitted vectors, since a vector's own is not coded), ``whiten`` takes away the mean and the
    covariance C (by C^(-1/2), the whitening that turns the axes least).

    A prefix of the groups decodes: a missing group contributes the mean of its fitted vectors. The gradient of z_q to z
    is exactly one.

    Args:
        dim: D. codebook_size: K >= 2. num_codebooks: G, divides D. normalize: ``none``, ``length`` or ``whiten``.
    """

    codebooks: Tensor
    means: Tensor
    centre: Tensor
    whitener: Tensor
    colourer: Tensor
    length: Tensor
    fitted: Tensor

    def __init__(self, dim: int, codebook_size: int, num_codebooks: int = 1, normalize: str = "none") -> None:
        super().__init__()
        if codebook_size < 2:
            raise ValueError(f"codebook_size: expected at least 2, got {codebook_size}")
        if num_codebooks < 1 or dim % num_codebooks:
            raise ValueError(f"num_codebooks: expected a divisor of dim {dim}, got {num_codebooks}; groups are equal")
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize: expected one of {', '.join(NORMALIZATIONS)}, got {normalize!r}")
        self.dim, self.codebook_sizes, self.normalize = dim, (codebook_size,) * num_codebooks, normalize
        self.width = dim // num_codebooks
        self.register_buffer("codebooks", torch.randn(num_codebooks, codebook_size, self.width))
        self.register_buffer("means", torch.zeros(num_codebooks, self.width))
        if normalize == "length":
            self.register_buffer("length", torch.ones(()))
        if normalize == "whiten":
            self.register_buffer("centre", torch.zeros(dim))
            self.register_buffer("whitener", torch.eye(dim))
            self.register_buffer("colourer", torch.eye(dim))
        self.register_buffer("fitted", torch.tensor(False))
        self._ready = False  # spares a device synchronisation in every call
        self.register_load_state_dict_post_hook(_look_again)

    def config(self) -> dict:
        return {
            "type": "pq",
            "dim": self.dim,
            "codebook_size": self.codebook_sizes[0],
            "num_codebooks": self.num_codebooks,
            "normalize": self.normalize,
        }

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor], passes: int = 10, progress: bool = True) -> list[float]:
        """K-means over all rows of ``batches``, read passes + 1 times; memory is one batch, the codes and a sample.

        The first reading measures the normalisation and keeps a uniform sample (at most 64 rows a code), whose k-means
        (from k-means++) is the start; each pass after it is one step of Lloyd's algorithm over every row. A code that
        wins no row is put on a random row of the sample. Under several ranks each hands over its own part of the data,
        and all end with the same codes.

        Args:
            batches: tensors (N, D) that can be read again: a list, a DataLoader. passes: Lloyd steps, at least 1.
            progress: show a bar.

        Returns:
            For each pass the mean squared error per number before its step, in the normalised space.

        Raises:
            ValueError: an iterator, which is spent after one reading; no rows; a wrong shape; NaN.
        """
        if isinstance(batches, Iterator):
            raise ValueError(
                "batches: expected an iterable that can be read several times, got an iterator; "
                "pass a list or a DataLoader, not a generator"
            )
        if passes < 1:
            raise ValueError(f"passes: expected at least 1, got {passes}")
        device = self.codebooks.device
        bar = tqdm(total=passes + 1, desc="k-means", disable=not progress)
        with bar, torch.autocast(device.type, enabled=False):
            sample = RowSample(KMEANS_VECTORS_PER_CODE * self.codebook_sizes[0], self.dim, device)
            moments = Moments(self.dim, device, covariance=self.normalize == "whiten")
            for rows in read_rows(batches, self.dim, device):
                sample.add(rows)
                moments.add(rows)
            rows = gather_rows(sample.rows)
            if len(rows) == 0:
                raise ValueError("batches: expected at least one row, got none")
            moments.join_ranks()
            self._begin(rows, moments)
            bar.update()
            errors = []
            for _ in range(passes):
                errors.append(self._lloyd(batches, rows))
                bar.set_postfix(error=f"{errors[-1]:.4g}")
                bar.update()
        return errors

    def _begin(self, rows: Tensor, moments: Moments) -> None:
        """The normalisation by ``moments``, and k-means over rows (n, D), the same on every rank."""
        if self.normalize == "length":
            self.length.copy_(moments.mean_length())
        if self.normalize == "whiten":
            for buffer, value in zip((self.centre, self.whitener, self.colourer), moments.whitening(), strict=True):
                buffer.copy_(value)
        if len(rows) > (most := KMEANS_VECTORS_PER_CODE * self.codebook_sizes[0]):
            rows = from_rank_zero(rows[torch.randperm(len(rows), device=rows.device)[:most]])
        for g, group in enumerate(self._groups(rows)):
            self.codebooks[g] = from_rank_zero(spread_rows(group, self.codebook_sizes[0]))
        for _ in range(KMEANS_STEPS):
            self._lloyd([rows], rows)  # the ranks hold the same rows: their joint mean is the mean
        self.fitted.fill_(True)
        self._ready = True

    def _lloyd(self, batches: Iterable[Tensor], sample: Tensor) -> float:
        """One step over every row; the mean squared error before it."""
        G, K, device = self.num_codebooks, self.codebook_sizes[0], self.codebooks.device
        totals = torch.zeros(G, K, self.width + 1, dtype=torch.float64, device=device)  # counts in the last column
        error = torch.zeros(2, dtype=torch.float64, device=device)  # sum of squares, how many numbers
        for rows in read_rows(batches, self.dim, device):
            error[1] += rows.numel()
            for g, group in enumerate(self._groups(rows)):
                codes = nearest_code(group, self.codebooks[g], check_finite=False)
                counts, sums = codebook_stats(group, codes, K)
                totals[g] += torch.cat([sums, counts[:, None]], 1)
                error[0] += (group - self.codebooks[g][codes]).square().sum()
        sum_over_ranks(totals)
        sum_over_ranks(error)
        for g, group in enumerate(self._groups(sample)):
            counts = totals[g, :, -1:]  # (K, 1)
            mean = (totals[g, :, :-1] / counts.clamp_min(1)).float()
            fresh = from_rank_zero(group[torch.randint(len(group), (K,), device=device)])
            self.codebooks[g] = torch.where(counts > 0, mean, fresh)
            self.means[g] = totals[g, :, :-1].sum(0) / counts.sum()
        return float(error[0] / error[1])

    def _start(self, z: Tensor, valid: Tensor) -> None:
        """In training, once: fit to the valid rows of z (N, D) of all ranks; waits for a batch that has such rows."""
        if self._ready:
            return
        if not bool(self.fitted):
            rows = gather_rows(z[valid])
            if len(rows) == 0:
                return
            moments = Moments(self.dim, z.device, covariance=self.normalize == "whiten")
            moments.add(rows)
            self._begin(rows, moments)
        self._ready = True

    def _check_fitted(self) -> None:
        if self._ready or torch.compiler.is_compiling():
            return
        if not bool(self.fitted):
            raise ValueError(
                "the product quantizer: expected fitted codes, got random ones; "
                "call fit(batches) first, load weights, or pass one batch in training mode"
            )
        self._ready = True

    def _groups(self, z: Tensor) -> tuple[Tensor, ...]:
        """z (N, D) -> G times the normalised (N, D / G)."""
        if self.normalize == "length":
            z = z / z.norm(dim=-1, keepdim=True).clamp_min(_SMALLEST_LENGTH)
        if self.normalize == "whiten":
            z = exact_product(z - self.centre, self.whitener)
        return z.split(self.width, -1)

    def _quantize(self, z: Tensor, mask: Tensor | None, num_codebooks: int | None) -> Quantized:
        if self.training:
            flat = z.detach().flatten(0, 1)
            with torch.no_grad():
                self._start(flat, torch.ones_like(flat[:, 0], dtype=torch.bool) if mask is None else mask.flatten())
        else:
            self._check_fitted()
        codes = self._nearest(z, num_codebooks or self.num_codebooks)
        stats = level_stats(codes, self.codebook_sizes[0], valid_levels(codes, mask))
        no_loss = 0.0 * (z - z.detach()).sum()  # connected to z, so that a training loop can add it
        z_q = straight_through(z, self._decode(codes))
        first = z_q if codes.shape[1] == 1 else straight_through(z, self._decode(codes[:, :1]))
        return Quantized(z_q, codes, no_loss, stats, first)

    def _nearest(self, z: Tensor, num_codebooks: int) -> Tensor:
        groups = self._groups(z.detach().flatten(0, 1))[:num_codebooks]
        codes = [nearest_code(h, self.codebooks[g], check_finite=False) for g, h in enumerate(groups)]
        return torch.stack(codes).view(num_codebooks, z.shape[0], z.shape[1]).transpose(0, 1).contiguous()

    def _encode(self, z: Tensor, num_codebooks: int) -> Tensor:
        self._check_fitted()
        return self._nearest(z, num_codebooks)

    def _decode(self, codes: Tensor) -> Tensor:
        told = [F.embedding(codes[:, g], self.codebooks[g]) for g in range(codes.shape[1])]  # each (B, T, D / G)
        told += [mean.expand_as(told[0]) for mean in self.means[codes.shape[1] :]]
        z_q = torch.cat(told, -1)
        if self.normalize == "length":
            return z_q * self.length
        return exact_product(z_q, self.colourer) + self.centre if self.normalize == "whiten" else z_q


def _look_again(quantizer: nn.Module, incompatible_keys: object) -> None:
    """After loading weights, ``fitted`` may say something else."""
    quantizer._ready = False  # type: ignore[assignment]
