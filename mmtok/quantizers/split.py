"""Split residual vector quantizer: a semantic code beside acoustic ones, of the same z (Mimi, arXiv 2410.00037)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmtok.quantizers.base import Quantized, Quantizer
from mmtok.quantizers.linear import ExactLinear
from mmtok.quantizers.rvq import LevelRun, ResidualVectorQuantizer, all_valid, check_dropout, draw_levels


class SplitResidualVectorQuantizer(Quantizer):
    """One semantic level beside a residual chain of Q - 1 acoustic levels (arXiv 2410.00037, section 3.3.1).

    Both branches quantize the same z, not one the residual of the other, so the acoustic levels need not make up for
    what distillation takes from the semantic one. Each has a Linear into its space and one back, and z_q is their sum.
    Code row 0 is semantic. ``z_q_first`` is the semantic branch alone: hand it to a distillation loss.

    The gradient takes a step of ``gradient`` inside each branch, between its two Linears. An item or a prefix without
    acoustic levels has z_q of the semantic branch alone. The loss is the mean over the Q levels.

    Args:
        dim: D of z. num_codebooks: Q >= 2, semantic and acoustic together; Moshi uses 8 of Mimi.
        codebook_size: K of every level. inner_dim: width of both branches and of the codes; Mimi has 256 of 512.
        bias: of the four Linears. metric and the following: as `ResidualVectorQuantizer`.
        quantizer_dropout: as there, of the Q levels; the semantic one is never dropped.
    """

    def __init__(
        self,
        dim: int,
        num_codebooks: int = 8,
        codebook_size: int = 2048,
        inner_dim: int = 256,
        bias: bool = False,
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
        if num_codebooks < 2:
            raise ValueError(
                f"num_codebooks: expected at least 2 (one semantic, the others acoustic), got {num_codebooks}"
            )
        check_dropout(quantizer_dropout)
        self.dim, self.codebook_sizes = dim, (codebook_size,) * num_codebooks
        self.inner_dim, self.bias, self.quantizer_dropout = inner_dim, bias, quantizer_dropout
        self.semantic, self.acoustic = (
            ResidualVectorQuantizer(
                inner_dim,
                levels,
                codebook_size,
                None,
                metric,
                codebook,
                decay,
                commitment_weight,
                codebook_weight,
                kmeans_init,
                dead_code_threshold,
                gradient=gradient,
            )
            for levels in (1, num_codebooks - 1)
        )
        self.semantic_in, self.acoustic_in = (ExactLinear(dim, inner_dim, bias) for _ in range(2))
        self.semantic_out, self.acoustic_out = (ExactLinear(inner_dim, dim, bias) for _ in range(2))

    def config(self) -> dict:
        return {
            "type": "split_rvq",
            "dim": self.dim,
            "num_codebooks": self.num_codebooks,
            "codebook_size": self.codebook_sizes[0],
            "inner_dim": self.inner_dim,
            "bias": self.bias,
            **self.semantic.learning_config(),
            "quantizer_dropout": self.quantizer_dropout,
        }

    def _quantize(self, z: Tensor, mask: Tensor | None, num_codebooks: int | None) -> Quantized:
        Q = num_codebooks or self.num_codebooks
        valid = all_valid(z) if mask is None else mask
        levels = draw_levels(z, self.num_codebooks, num_codebooks, self.quantizer_dropout if self.training else 0.0)
        run = self.semantic.run(self.semantic_in(z), valid, levels.clamp(max=1), 1)
        run.z_q = run.z_q_first = self.semantic_out(run.z_q)
        if Q > 1:
            other = self.acoustic.run(self.acoustic_in(z), valid, levels - 1, Q - 1)
            acoustic = torch.where((levels > 1)[:, None, None], self.acoustic_out(other.z_q), 0.0)
            run = LevelRun(
                run.z_q + acoustic,
                run.z_q_first,
                run.codes + other.codes,
                run.terms + other.terms,
                run.seen + other.seen,
            )
        return self.semantic.finish(run)

    def _encode(self, z: Tensor, num_codebooks: int) -> Tensor:
        semantic = self.semantic._encode(self.semantic_in(z), 1)
        if num_codebooks == 1:
            return semantic
        return torch.cat([semantic, self.acoustic._encode(self.acoustic_in(z), num_codebooks - 1)], 1)

    def _decode(self, codes: Tensor) -> Tensor:
        z_q = self.semantic_out(self.semantic._decode(codes[:, :1]))
        return z_q if codes.shape[1] == 1 else z_q + self.acoustic_out(self.acoustic._decode(codes[:, 1:]))
