"""Residual vector quantizer: each level codes what those before it left over (arXiv 2107.03312, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmtok.kernels.residual_codes import residual_codes, residual_decode
from mmtok.quantizers.base import Quantized, Quantizer, level_stats, masked_mean, straight_through
from mmtok.quantizers.codebook import Codebook


class ResidualVectorQuantizer(Quantizer):
    """Q codebooks in a chain; z_q is the sum of their codes, so every prefix of the levels decodes.

    The losses of level q see r_q = z - sg(sum of the levels before), so each level's commitment has a gradient to z
    (with a straight-through residual it is 0 from level 2 on). The loss is the mean over the active levels. The output
    has one outer straight-through step, gradient exactly one.

    With ``codebook_dim`` (factorised codes, arXiv 2306.06546) every level has a Linear into its codebook's space and
    one back. z_q then takes its gradient through the chain of those Linears, straight-through inside each, since the
    reconstruction must not push what the narrow spaces cannot carry.

    Args:
        dim: D of z. num_codebooks: Q. codebook_size: K, the same at all levels.
        codebook_dim, metric, codebook, decay, commitment_weight, codebook_weight, kmeans_init, dead_code_threshold: as
            `VectorQuantizer`, for each level.
        quantizer_dropout: share of a training batch's items that use only their first n levels, n uniform in 1..Q,
            drawn per item. The other levels touch neither that item's z_q nor loss, statistics or codebooks, and its
            codes there are 0. Not used when the call names num_codebooks.
    """

    def __init__(
        self,
        dim: int,
        num_codebooks: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        metric: str = "euclidean",
        codebook: str = "ema",
        decay: float = 0.99,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        kmeans_init: bool = True,
        dead_code_threshold: float = 0.1,
        quantizer_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_codebooks < 1:
            raise ValueError(f"num_codebooks: expected at least 1, got {num_codebooks}")
        if not 0 <= quantizer_dropout <= 1:
            raise ValueError(f"quantizer_dropout: expected a share in [0, 1], got {quantizer_dropout}")
        self.dim, self.codebook_sizes = dim, (codebook_size,) * num_codebooks
        self.codebook_dim, self.quantizer_dropout = codebook_dim, quantizer_dropout
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        width = codebook_dim or dim
        self.books = nn.ModuleList(
            Codebook(codebook_size, width, metric, codebook, decay, kmeans_init, dead_code_threshold)
            for _ in range(num_codebooks)
        )
        projected = range(num_codebooks if codebook_dim is not None else 0)
        self.project_in = nn.ModuleList(nn.Linear(dim, width) for _ in projected)
        self.project_out = nn.ModuleList(nn.Linear(width, dim) for _ in projected)

    def config(self) -> dict:
        book = self._book(0)
        return {
            "type": "rvq",
            "dim": self.dim,
            "num_codebooks": self.num_codebooks,
            "codebook_size": self.codebook_sizes[0],
            "codebook_dim": self.codebook_dim,
            "metric": book.metric,
            "codebook": book.learning,
            "decay": book.decay,
            "commitment_weight": self.commitment_weight,
            "codebook_weight": self.codebook_weight,
            "kmeans_init": book.kmeans_init,
            "dead_code_threshold": book.dead_code_threshold,
            "quantizer_dropout": self.quantizer_dropout,
        }

    def _book(self, q: int) -> Codebook:
        book = self.books[q]
        assert isinstance(book, Codebook)
        return book

    def _codebooks(self, num_codebooks: int) -> Tensor:
        return torch.stack([self._book(q).codebook for q in range(num_codebooks)])  # (Q', K, d)

    def _quantize(self, z: Tensor, mask: Tensor | None, num_codebooks: int | None) -> Quantized:
        B, T, _ = z.shape
        Q = num_codebooks or self.num_codebooks
        levels = self._draw_levels(z, num_codebooks)  # (B,)
        valid = torch.ones(B, T, dtype=torch.bool, device=z.device) if mask is None else mask
        chain = z.new_zeros(z.shape)  # the sum of the levels so far, with its gradient where levels have projections
        codes, active, terms = [], [], []
        for q in range(Q):
            on = valid & (levels > q)[:, None]  # (B, T)
            y, code, *losses = self._level(q, z, chain, on)
            chain = chain + torch.where(on[..., None], y, 0.0)
            codes.append(torch.where(on, code, 0))
            active.append(on)
            terms.append(torch.stack(losses))
        codes, active, terms = torch.stack(codes, 1), torch.stack(active, 1), torch.stack(terms)  # (B,Q,T) twice, (Q,2)
        present = active.any(2).any(0)  # (Q,)
        commitment, codebook = (terms * present[:, None]).sum(0) / present.sum().clamp_min(1)
        loss = self.commitment_weight * commitment
        stats = {"commitment_loss": commitment.detach()}
        if self._book(0).learning == "gradient":
            loss = loss + self.codebook_weight * codebook
            stats["codebook_loss"] = codebook.detach()
        stats |= level_stats(codes, self.codebook_sizes[0], active)
        z_q = chain if self.codebook_dim is not None else straight_through(z, chain)
        return Quantized(z_q, codes, loss, stats)

    def _level(self, q: int, z: Tensor, chain: Tensor, on: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Level q where ``on`` (B, T): its contribution (B, T, D), codes (B, T), commitment and codebook loss."""
        book = self._book(q)
        residual = z - chain.detach()  # (B, T, D)
        h = self.project_in[q](residual) if self.codebook_dim is not None else residual  # (B, T, d)
        flat = h.detach().flatten(0, 1)  # (N, d)
        if self.training:
            book.start(flat, on.flatten())
        code = book.nearest(flat)
        e = book.lookup(code).view_as(h)
        commitment = masked_mean((h - e.detach()).square(), on)
        codebook = masked_mean((h.detach() - e).square(), on)
        if self.codebook_dim is None:
            y = e.detach()
        else:  # the same values as h, but with the gradient through the levels before
            y = self.project_out[q](straight_through(self.project_in[q](z - chain), e))
        if self.training:
            book.update(flat, code, on.flatten())
        return y, code.view(on.shape), commitment, codebook

    def _draw_levels(self, z: Tensor, num_codebooks: int | None) -> Tensor:
        """(B,) how many levels each item uses."""
        B, Q = z.shape[0], self.num_codebooks
        levels = torch.full((B,), num_codebooks or Q, device=z.device)
        if self.training and num_codebooks is None and self.quantizer_dropout > 0:
            drops = torch.rand(B, device=z.device) < self.quantizer_dropout
            levels = torch.where(drops, torch.randint(1, Q + 1, (B,), device=z.device), levels)
        return levels

    def _encode(self, z: Tensor, num_codebooks: int) -> Tensor:
        B, T, _ = z.shape
        if self.codebook_dim is None:
            codes = residual_codes(
                z.flatten(0, 1), self._codebooks(num_codebooks), self._book(0).metric, check_finite=False
            )
            return codes.view(B, T, num_codebooks).transpose(1, 2).contiguous()
        chain, codes = torch.zeros_like(z), []
        for q in range(num_codebooks):
            code = self._book(q).nearest(self.project_in[q](z - chain).flatten(0, 1)).view(B, T)
            chain = chain + self.project_out[q](self._book(q).lookup(code))
            codes.append(code)
        return torch.stack(codes, 1)

    def _decode(self, codes: Tensor) -> Tensor:
        B, Q, T = codes.shape
        if self.codebook_dim is None:
            rows = residual_decode(codes.transpose(1, 2).flatten(0, 1), self._codebooks(Q))  # (N, D)
            return rows.view(B, T, self.dim)
        z_q = torch.zeros(B, T, self.dim, device=codes.device)
        for q in range(Q):
            z_q = z_q + self.project_out[q](self._book(q).lookup(codes[:, q]))
        return z_q
