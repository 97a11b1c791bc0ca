"""Vector quantizer: one code a position (arXiv 1711.00937), optionally in a narrow space (arXiv 2110.04627)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmtok.quantizers.base import Quantized, Quantizer, level_stats, masked_mean, valid_levels
from mmtok.quantizers.codebook import Codebook
from mmtok.quantizers.gradient import check_gradient, choose_gradient
from mmtok.quantizers.linear import ExactLinear


class VectorQuantizer(Quantizer):
    """The nearest of K codes; loss and gradient of VQ-VAE eq. 3.

    With ``codebook_dim`` z passes a Linear into the codebook's space and another back; the straight-through step is
    taken inside, so the gradient to z is that of the two Linears. Without, it is exactly one.

    Args:
        dim: D of z. codebook_size: K.
        codebook_dim: width of the codes; None = dim, without projections.
        metric: ``euclidean`` or ``cosine``; cosine compares directions, codes and z keep their lengths.
        codebook: ``ema`` (moving averages) or ``gradient`` (a parameter that learns from the codebook loss).
        decay, kmeans_init, dead_code_threshold: see `Codebook`. The threshold is relative to the mean use of a code.
        commitment_weight: of mean |h - sg(e)|^2, h = z or its projection.
        codebook_weight: of mean |sg(h) - e|^2, for ``codebook="gradient"`` only.
        gradient: how it passes from the code to h: ``straight_through``, or ``rotation`` (arXiv 2410.06424), see
            `mmtok.quantizers.gradient`.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        metric: str = "euclidean",
        codebook: str = "ema",
        decay: float = 0.99,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        kmeans_init: bool = True,
        dead_code_threshold: float = 0.1,
        gradient: str = "straight_through",
    ) -> None:
        super().__init__()
        check_gradient(gradient)
        self.dim, self.codebook_sizes = dim, (codebook_size,)
        self.codebook_dim, self.gradient = codebook_dim, gradient
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        self.project_in = nn.Identity() if codebook_dim is None else ExactLinear(dim, codebook_dim)
        self.project_out = nn.Identity() if codebook_dim is None else ExactLinear(codebook_dim, dim)
        self.book = Codebook(
            codebook_size, codebook_dim or dim, metric, codebook, decay, kmeans_init, dead_code_threshold
        )

    def config(self) -> dict:
        return {
            "type": "vq",
            "dim": self.dim,
            "codebook_size": self.codebook_sizes[0],
            "codebook_dim": self.codebook_dim,
            "metric": self.book.metric,
            "codebook": self.book.learning,
            "decay": self.book.decay,
            "commitment_weight": self.commitment_weight,
            "codebook_weight": self.codebook_weight,
            "kmeans_init": self.book.kmeans_init,
            "dead_code_threshold": self.book.dead_code_threshold,
            "gradient": self.gradient,
        }

    def _quantize(self, z: Tensor, mask: Tensor | None, num_codebooks: int | None) -> Quantized:
        B, T, _ = z.shape
        h = self.project_in(z)  # (B, T, d)
        flat = h.detach().flatten(0, 1)  # (N, d)
        valid = torch.ones_like(flat[:, 0], dtype=torch.bool) if mask is None else mask.flatten()
        if self.training:
            self.book.start(flat, valid)
        codes = self.book.nearest(flat)  # (N,)
        e = self.book.lookup(codes).view_as(h)
        commitment = masked_mean((h - e.detach()).square(), mask)
        codebook = masked_mean((h.detach() - e).square(), mask)
        loss = self.commitment_weight * commitment
        stats = {"commitment_loss": commitment.detach()}
        if self.book.learning == "gradient":
            loss = loss + self.codebook_weight * codebook
            stats["codebook_loss"] = codebook.detach()
        z_q = self.project_out(choose_gradient(h, e, self.gradient))
        if self.training:
            self.book.update(flat, codes, valid)
        codes = codes.view(B, 1, T)
        stats |= level_stats(codes, self.codebook_sizes[0], valid_levels(codes, mask))
        return Quantized(z_q, codes, loss, stats)

    def _encode(self, z: Tensor, num_codebooks: int) -> Tensor:
        return self.book.nearest(self.project_in(z).flatten(0, 1)).view(z.shape[0], 1, z.shape[1])

    def _decode(self, codes: Tensor) -> Tensor:
        return self.project_out(self.book.lookup(codes[:, 0]))
