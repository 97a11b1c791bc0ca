"""Finite scalar quantizer: round a few bounded numbers, no codebook to learn (arXiv 2309.15505)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.kernels.scalar_codes import MAX_TABLE_CODES, fsq_bound, fsq_pack, level_table, unpack_digits
from mmtok.quantizers.base import Quantized, Quantizer, level_stats, straight_through, valid_levels
from mmtok.quantizers.linear import ExactLinear

_MARGIN = 1e-3  # keeps tanh's ends from rounding past the outermost level


class FiniteScalarQuantizer(Quantizer):
    """d = len(levels) numbers, number i rounded to one of levels_i values in [-1, 1]; one code of K = prod(levels).

    Number x is first bounded: tanh(x + shift) (L - 1) / 2 - offset, offset 1/2 for an even L so that L integers lie
    inside (section 3.1 there); shift is such that x = 0 gives 0, which takes atanh where the paper's listing has tan.

    Args:
        dim: D of z. levels: sizes, each >= 2. Linears lead from D to d and back unless D = d.
    """

    half_width: Tensor
    offset: Tensor
    shift: Tensor
    steps: Tensor
    table: Tensor

    def __init__(self, dim: int, levels: Sequence[int] = (8, 5, 5, 5)) -> None:
        super().__init__()
        self.levels = tuple(int(n) for n in levels)
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels: expected at least one size, each >= 2, got {self.levels}")
        self.dim, self.codebook_sizes = dim, (math.prod(self.levels),)
        d = len(self.levels)
        self.project_in = nn.Identity() if d == dim else ExactLinear(dim, d)
        self.project_out = nn.Identity() if d == dim else ExactLinear(d, dim)
        n = torch.tensor(self.levels, dtype=torch.float32)
        half, offset = (n - 1) * (1 - _MARGIN) / 2, torch.where(n % 2 == 0, 0.5, 0.0)
        # L = 2 alone needs its own: half is just below 1/2 = offset there, so atanh does not exist; 0 gives (-1, 0).
        shift = torch.where(n > 2, torch.atanh((offset / half).clamp(max=0.999)), 0.0)
        for name, value in (("half_width", half), ("offset", offset), ("shift", shift), ("steps", n // 2)):
            self.register_buffer(name, value, persistent=False)
        if self.codebook_sizes[0] <= MAX_TABLE_CODES:  # one lookup instead of d divisions
            self.register_buffer("table", level_table(self.levels), persistent=False)  # (K, d)

    def config(self) -> dict:
        return {"type": "fsq", "dim": self.dim, "levels": list(self.levels)}

    def _bounded(self, z: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, d), each rounding to one of the integers -floor(L/2) .. ceil(L/2)-1."""
        return fsq_bound(self.project_in(z), self.shift, self.half_width, self.offset)

    def _quantize(self, z: Tensor, mask: Tensor | None, num_codebooks: int | None) -> Quantized:
        bounded = self._bounded(z)
        rounded = straight_through(bounded, bounded.round())
        codes = fsq_pack(bounded, self.levels)[:, None]  # (B, 1, T)
        stats = level_stats(codes, self.codebook_sizes[0], valid_levels(codes, mask))
        return Quantized(self.project_out(rounded / self.steps), codes, 0.0 * rounded.sum(), stats)

    def _encode(self, z: Tensor, num_codebooks: int) -> Tensor:
        return fsq_pack(self._bounded(z), self.levels)[:, None]

    def _decode(self, codes: Tensor) -> Tensor:
        if self.codebook_sizes[0] <= MAX_TABLE_CODES:
            return self.project_out(F.embedding(codes[:, 0], self.table))
        rounded = unpack_digits(codes[:, 0], self.levels) - self.steps
        return self.project_out(rounded / self.steps)
