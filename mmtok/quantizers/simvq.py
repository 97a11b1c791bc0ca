"""SimVQ: a frozen random codebook times one learned matrix, so that every code learns from every gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.kernels.nearest_code import nearest_code
from mmtok.quantizers.base import Quantized, Quantizer, level_stats, masked_mean, valid_levels
from mmtok.quantizers.gradient import check_gradient, choose_gradient
from mmtok.quantizers.linear import ExactLinear


class SimVectorQuantizer(Quantizer):
    """The nearest of the K rows of C W, C frozen and random, W learned (arXiv 2411.02038).

    A code of a plain codebook learns only when it is chosen, and the others stay behind; here the gradient of any
    chosen code moves W, hence all codes together, and none dies of neglect. W is a Linear with a bias (the authors'
    own code has one), so the codebook can also follow the mean of the latents. Losses as in VQ-VAE (arXiv 1711.00937,
    eq. 3); the gradient of z_q is that of ``gradient``, exactly one to z for ``straight_through``.

    Args:
        dim: D of z and of the codes. codebook_size: K >= 2.
        commitment_weight: of mean |z - sg(e)|^2. codebook_weight: of mean |sg(z) - e|^2, from which W learns.
        gradient: ``straight_through`` or ``rotation``, see `choose_gradient`.
    """

    basis: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        gradient: str = "straight_through",
    ) -> None:
        super().__init__()
        if dim < 1 or codebook_size < 2:
            raise ValueError(f"expected dim >= 1 and codebook_size >= 2, got {dim} and {codebook_size}")
        check_gradient(gradient)
        self.dim, self.codebook_sizes, self.gradient = dim, (codebook_size,), gradient
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        self.register_buffer("basis", torch.randn(codebook_size, dim) / math.sqrt(dim))
        self.transform = ExactLinear(dim, dim)

    def config(self) -> dict:
        return {
            "type": "simvq",
            "dim": self.dim,
            "codebook_size": self.codebook_sizes[0],
            "commitment_weight": self.commitment_weight,
            "codebook_weight": self.codebook_weight,
            "gradient": self.gradient,
        }

    def codebook(self) -> Tensor:
        """The codes as they stand now, C W + bias, (K, D) fp32; with a gradient to the transform."""
        return self.transform(self.basis)

    def _quantize(self, z: Tensor, mask: Tensor | None, num_codebooks: int | None) -> Quantized:
        codes = self._encode(z, 1)  # (B, 1, T)
        e = self._decode(codes)  # (B, T, D)
        commitment = masked_mean((z - e.detach()).square(), mask)
        codebook = masked_mean((z.detach() - e).square(), mask)
        stats = {"commitment_loss": commitment.detach(), "codebook_loss": codebook.detach()}
        stats |= level_stats(codes, self.codebook_sizes[0], valid_levels(codes, mask))
        loss = self.commitment_weight * commitment + self.codebook_weight * codebook
        return Quantized(choose_gradient(z, e, self.gradient), codes, loss, stats)

    def _encode(self, z: Tensor, num_codebooks: int) -> Tensor:
        codes = nearest_code(z.flatten(0, 1), self.codebook(), check_finite=False)
        return codes.view(z.shape[0], 1, z.shape[1])

    def _decode(self, codes: Tensor) -> Tensor:
        return self.transform(F.embedding(codes[:, 0], self.basis))  # N rows, not all K
