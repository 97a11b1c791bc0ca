"""Grouped residual vector quantizer: the width is cut into groups, each a residual chain (HiFi-Codec, 2305.02765)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmtok.quantizers.base import Quantized, Quantizer
from mmtok.quantizers.gradient import check_gradient
from mmtok.quantizers.rvq import LevelRun, ResidualVectorQuantizer, all_valid, check_dropout, draw_levels


class GroupedResidualVectorQuantizer(Quantizer):
    """z cut into G parts of D / G numbers, each coded by its own residual chain of Q / G levels (group-residual vector
    quantization of arXiv 2305.02765); z_q is the parts side by side.

    Code row q * G + g is level q of group g: a prefix of the rows is coarse over all groups before any group gets its
    next level. Parts whose levels are not there are 0, without a gradient. The loss is the mean over the active rows.

    Args:
        dim: D of z, a multiple of num_groups. num_codebooks: Q rows in all, a multiple of num_groups.
        codebook_size: K of each row. num_groups: G; the paper has 2 groups of 2 levels with K = 1024.
        codebook_dim and the following: as `ResidualVectorQuantizer`, for each group.
        quantizer_dropout: as there, of the Q rows.
    """

    def __init__(
        self,
        dim: int,
        num_codebooks: int = 4,
        codebook_size: int = 1024,
        num_groups: int = 2,
        codebook_dim: int | None = None,
        metric: str = "euclidean",
        codebook: str = "ema",
        decay: float = 0.99,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        kmeans_init: bool = True,
        dead_code_threshold: float = 0.1,
        quantizer_dropout: float = 0.0,
        gradient: str = "straight_through",
    ) -> None:
        super().__init__()
        if num_groups < 1 or dim % num_groups or num_codebooks < 1 or num_codebooks % num_groups:
            raise ValueError(
                f"expected num_groups >= 1 that divides dim and num_codebooks, got {num_groups}, {dim} and "
                f"{num_codebooks}; every group has the same width and the same number of levels"
            )
        check_dropout(quantizer_dropout)
        check_gradient(gradient)
        self.dim, self.codebook_sizes = dim, (codebook_size,) * num_codebooks
        self.num_groups, self.quantizer_dropout = num_groups, quantizer_dropout
        self.groups = nn.ModuleList(
            ResidualVectorQuantizer(
                dim // num_groups,
                num_codebooks // num_groups,
                codebook_size,
                codebook_dim,
                metric,
                codebook,
                decay,
                commitment_weight,
                codebook_weight,
                kmeans_init,
                dead_code_threshold,
                gradient=gradient,
            )
            for _ in range(num_groups)
        )

    def config(self) -> dict:
        return {
            "type": "grouped_rvq",
            "dim": self.dim,
            "num_codebooks": self.num_codebooks,
            "codebook_size": self.codebook_sizes[0],
            "num_groups": self.num_groups,
            "codebook_dim": self._group(0).codebook_dim,
            **self._group(0).learning_config(),
            "quantizer_dropout": self.quantizer_dropout,
        }

    def _group(self, g: int) -> ResidualVectorQuantizer:
        group = self.groups[g]
        assert isinstance(group, ResidualVectorQuantizer)
        return group

    def _levels_of(self, g: int, rows: int) -> int:
        """How many levels of group g are among the first ``rows`` code rows."""
        return (rows - g + self.num_groups - 1) // self.num_groups

    def _quantize(self, z: Tensor, mask: Tensor | None, num_codebooks: int | None) -> Quantized:
        G, Q = self.num_groups, num_codebooks or self.num_codebooks
        valid = all_valid(z) if mask is None else mask
        dropout = self.quantizer_dropout if self.training else 0.0
        rows = draw_levels(z, self.num_codebooks, num_codebooks, dropout)  # (B,)
        parts, runs = list(z.chunk(G, 2)), []
        for g in range(min(G, Q)):
            levels = torch.div(rows - g + G - 1, G, rounding_mode="floor")  # (B,), 0 where the item ends before
            runs.append(self._group(g).run(parts[g], valid, levels, self._levels_of(g, Q)))
            parts[g] = torch.where((levels > 0)[:, None, None], runs[g].z_q, 0.0)
        parts = parts[: len(runs)] + [torch.zeros_like(part) for part in parts[len(runs) :]]
        z_q = torch.cat(parts, 2)
        z_q_first = z_q if Q == 1 else torch.cat([runs[0].z_q_first, torch.zeros_like(z[..., self.dim // G :])], 2)
        order = [(q, runs[g]) for q in range(self._levels_of(0, Q)) for g in range(min(G, Q - q * G))]
        joined = LevelRun(
            z_q,
            z_q_first,
            [run.codes[q] for q, run in order],
            [run.terms[q] for q, run in order],
            [run.seen[q] for q, run in order],
        )
        return self._group(0).finish(joined)

    def _encode(self, z: Tensor, num_codebooks: int) -> Tensor:
        G = min(self.num_groups, num_codebooks)
        parts = z.chunk(self.num_groups, 2)
        codes = [self._group(g)._encode(parts[g], self._levels_of(g, num_codebooks)) for g in range(G)]
        rows = [codes[row % self.num_groups][:, row // self.num_groups] for row in range(num_codebooks)]
        return torch.stack(rows, 1)

    def _decode(self, codes: Tensor) -> Tensor:
        B, Q, T = codes.shape
        parts = []
        for g in range(self.num_groups):
            if g < Q:
                parts.append(self._group(g)._decode(codes[:, g :: self.num_groups]))
            else:
                parts.append(torch.zeros(B, T, self.dim // self.num_groups, device=codes.device))
        return torch.cat(parts, 2)
