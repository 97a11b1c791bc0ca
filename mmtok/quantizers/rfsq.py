"""Residual finite scalar quantizer: rounding refined level by level, no codebook to learn (after arXiv 2309.15505)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmtok.kernels.scalar_codes import pack_digits, unpack_digits
from mmtok.quantizers.base import Quantized, Quantizer, level_stats, straight_through, valid_levels
from mmtok.quantizers.linear import ExactLinear
from mmtok.quantizers.rvq import check_dropout, draw_levels

_MAX_CELLS = 2**22  # fp32 tells 2^24 numbers apart in (-1, 1); two bits are kept for the rounding of the chain


class ResidualFiniteScalarQuantizer(Quantizer):
    """Q levels of d = len(levels) digits; level q rounds what the levels before it left over, on a finer grid.

    z (or its projection) is bounded once, u = tanh(h) in (-1, 1). Level 0 cuts (-1, 1) into L equal cells and keeps
    the middle of the one that holds u, so the rest lies within +-1/L; level q does the same at the scale s_q = L^-q:
        digit_q = floor((r_q / s_q + 1) L / 2),    value_q = s_q ((2 digit_q + 1) / L - 1),    r_{q+1} = r_q - value_q.
    Hence |u - sum of the first k values| <= L^-k, all L^Q digit sequences are different numbers, and any prefix of the
    levels decodes: a level that is missing contributes 0, the middle of its range. (A grid that includes the ends of
    the range, with the scale (L - 1)^-q, spends codes twice where neighbouring cells overlap, and for L = 2 it does
    not converge at all.) The digits of all d numbers at one level make one code of K = prod(levels) values.

    The gradient has one outer straight-through step: that of the bound (and of the projections), whatever the levels.
    There is no loss: u cannot run away from a grid that covers (-1, 1).

    Args:
        dim: D of z. num_codebooks: Q. levels: grid sizes L of the d numbers, each >= 2. Linears lead from D to d and
            back unless D = d.
        quantizer_dropout: as `ResidualVectorQuantizer`: share of a training batch's items that use only their first n
            levels, so that a decoder learns to read prefixes.

    Raises:
        ValueError: a size below 2, or L^Q beyond what fp32 resolves.
    """

    sizes: Tensor

    def __init__(
        self, dim: int, num_codebooks: int, levels: Sequence[int] = (8, 5, 5, 5), quantizer_dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_dropout(quantizer_dropout)
        self.levels = tuple(int(n) for n in levels)
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels: expected at least one size, each >= 2, got {self.levels}")
        if num_codebooks < 1:
            raise ValueError(f"num_codebooks: expected at least 1, got {num_codebooks}")
        if max(self.levels) ** num_codebooks > _MAX_CELLS:
            most = int(math.log(_MAX_CELLS) / math.log(max(self.levels)) + 1e-9)
            raise ValueError(
                f"num_codebooks: expected at most {most} for levels of {max(self.levels)}, got {num_codebooks}; "
                f"finer cells than 1 in {_MAX_CELLS} are lost in fp32: take fewer levels or smaller sizes"
            )
        self.dim, self.codebook_sizes = dim, (math.prod(self.levels),) * num_codebooks
        self.quantizer_dropout = quantizer_dropout
        d = len(self.levels)
        self.project_in = nn.Identity() if d == dim else ExactLinear(dim, d)
        self.project_out = nn.Identity() if d == dim else ExactLinear(d, dim)
        self.register_buffer("sizes", torch.tensor(self.levels, dtype=torch.float32), persistent=False)

    def config(self) -> dict:
        return {
            "type": "rfsq",
            "dim": self.dim,
            "num_codebooks": self.num_codebooks,
            "levels": list(self.levels),
            "quantizer_dropout": self.quantizer_dropout,
        }

    def _value(self, digits: Tensor, q: int) -> Tensor:
        """Level q's contribution (..., d) of digits (..., d), in the bounded space."""
        return ((2 * digits + 1) / self.sizes - 1) * self.sizes**-q

    def _chain(self, u: Tensor, num_codebooks: int) -> Tensor:
        """u (B, T, d) in [-1, 1] -> codes (B, Q', T)."""
        rest, codes = u.detach(), []
        for q in range(num_codebooks):
            digits = ((rest * self.sizes**q + 1) * self.sizes / 2).floor()
            digits = digits.clamp_min(0).minimum(self.sizes - 1)  # u = +-1 and rounding land one cell outside
            codes.append(pack_digits(digits.long(), self.levels))
            rest = rest - self._value(digits, q)
        return torch.stack(codes, 1)

    def _sum(self, codes: Tensor, num_levels: Tensor | None = None) -> Tensor:
        """codes (B, Q', T) -> the sum of their values (B, T, d), of an item's first num_levels (B,) alone if given."""
        total = self._value(unpack_digits(codes[:, 0], self.levels), 0)
        for q in range(1, codes.shape[1]):
            value = self._value(unpack_digits(codes[:, q], self.levels), q)
            total = total + (value if num_levels is None else torch.where((num_levels > q)[:, None, None], value, 0.0))
        return total

    def _quantize(self, z: Tensor, mask: Tensor | None, num_codebooks: int | None) -> Quantized:
        u = torch.tanh(self.project_in(z))  # (B, T, d)
        codes = self._chain(u, num_codebooks or self.num_codebooks)
        dropout = self.quantizer_dropout if self.training else 0.0
        num_levels = draw_levels(z, self.num_codebooks, num_codebooks, dropout)  # (B,)
        kept = torch.arange(codes.shape[1], device=z.device) < num_levels[:, None]  # (B, Q')
        codes = torch.where(kept[..., None], codes, 0)
        z_q = self.project_out(straight_through(u, self._sum(codes, num_levels)))
        stats = level_stats(codes, self.codebook_sizes[0], valid_levels(codes, mask) & kept[..., None])
        first = z_q if codes.shape[1] == 1 else self.project_out(straight_through(u, self._sum(codes[:, :1])))
        return Quantized(z_q, codes, 0.0 * u.sum(), stats, first)

    def _encode(self, z: Tensor, num_codebooks: int) -> Tensor:
        return self._chain(torch.tanh(self.project_in(z)), num_codebooks)

    def _decode(self, codes: Tensor) -> Tensor:
        return self.project_out(self._sum(codes))
