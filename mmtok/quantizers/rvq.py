"""Residual vector quantizer: each level codes what those before it left over (arXiv 2107.03312, algorithm 1)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from mmtok.kernels.codebook_stats import usage_perplexity
from mmtok.kernels.residual_codes import factorised_codes, residual_codes, residual_decode
from mmtok.quantizers.base import Quantized, Quantizer, masked_mean
from mmtok.quantizers.codebook import Codebook, update_codebooks
from mmtok.quantizers.gradient import check_gradient, choose_gradient
from mmtok.quantizers.linear import ExactLinear, frozen_linear, join_linears


@dataclasses.dataclass
class LevelRun:
    """What a run through Q' levels gives, before loss, statistics and updates.

    Args:
        z_q, z_q_first: (B, T, D) the sum of all levels, and the first level alone, with their gradients.
        codes: one (B, T) for each level, 0 where it is off.
        terms: commitment and codebook loss (2,) of each level.
        seen: for each level its codebook, and what it searched: x (M, d), codes (M,), valid (M,) bool.
    """

    z_q: Tensor
    z_q_first: Tensor
    codes: list[Tensor]
    terms: list[Tensor]
    seen: list[tuple[Codebook, Tensor, Tensor, Tensor]]


class ResidualVectorQuantizer(Quantizer):
    """Q codebooks in a chain; z_q is the sum of their codes, so every prefix of the levels decodes.

    The losses of level q see r_q = z - sg(sum of the levels before), so each level's commitment has a gradient to z
    (with a straight-through residual it is 0 from level 2 on). The loss is the mean over the active levels. The output
    has one outer step of ``gradient`` from z to the sum; straight-through makes it exactly one.

    With ``codebook_dim`` (factorised codes, arXiv 2306.06546) every level has a Linear into its codebook's space and
    one back. The gradient of z_q reaches z through the chain of those Linears, with a step of ``gradient`` inside each,
    since the reconstruction must not push what the narrow spaces cannot carry. The Linears themselves learn from their
    own level alone: through the chain their gradients multiply from level to level, and training diverged
    (recipes/LOG.md, 2026-11-22).

    Args:
        dim: D of z. num_codebooks: Q. codebook_size: K, the same at all levels.
        codebook_dim, metric, codebook, decay, commitment_weight, codebook_weight, kmeans_init, dead_code_threshold,
            gradient: as `VectorQuantizer`, for each level.
        quantizer_dropout: share of a training batch's items that use only their first n levels, n uniform in 1..Q,
            drawn per item. The other levels touch neither that item's z_q nor loss, statistics or codebooks, and its
            codes there are 0. Not used when the call names num_codebooks.
    """

    type_name = "rvq"

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
        gradient: str = "straight_through",
    ) -> None:
        super().__init__()
        if num_codebooks < 1:
            raise ValueError(f"num_codebooks: expected at least 1, got {num_codebooks}")
        check_dropout(quantizer_dropout)
        check_gradient(gradient)
        self.dim, self.codebook_sizes = dim, (codebook_size,) * num_codebooks
        self.codebook_dim, self.quantizer_dropout, self.gradient = codebook_dim, quantizer_dropout, gradient
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        width = codebook_dim or dim
        self.books = nn.ModuleList(
            Codebook(codebook_size, width, metric, codebook, decay, kmeans_init, dead_code_threshold)
            for _ in range(num_codebooks)
        )
        projected = range(num_codebooks if codebook_dim is not None else 0)
        self.project_in = nn.ModuleList(ExactLinear(dim, width) for _ in projected)
        self.project_out = nn.ModuleList(ExactLinear(width, dim) for _ in projected)

    def config(self) -> dict:
        return {
            "type": self.type_name,
            "dim": self.dim,
            "num_codebooks": self.num_codebooks,
            "codebook_size": self.codebook_sizes[0],
            "codebook_dim": self.codebook_dim,
            **self.learning_config(),
            "quantizer_dropout": self.quantizer_dropout,
        }

    def learning_config(self) -> dict:
        """How the levels learn: the arguments that the quantizers built of residual chains share."""
        book = self._book(0)
        return {
            "metric": book.metric,
            "codebook": book.learning,
            "decay": book.decay,
            "commitment_weight": self.commitment_weight,
            "codebook_weight": self.codebook_weight,
            "kmeans_init": book.kmeans_init,
            "dead_code_threshold": book.dead_code_threshold,
            "gradient": self.gradient,
        }

    def _book(self, q: int) -> Codebook:
        book = self.books[q]
        assert isinstance(book, Codebook)
        return book

    def _codebooks(self, num_codebooks: int) -> Tensor:
        return torch.stack([self._book(q).codebook for q in range(num_codebooks)])  # (Q', K, d)

    def _quantize(self, z: Tensor, mask: Tensor | None, num_codebooks: int | None) -> Quantized:
        levels = self._draw_levels(z, num_codebooks)  # (B,)
        run = self.run(z, all_valid(z) if mask is None else mask, levels, num_codebooks or self.num_codebooks)
        return self.finish(run)

    def run(self, z: Tensor, valid: Tensor, levels: Tensor, num_codebooks: int) -> LevelRun:
        """The first ``num_codebooks`` levels of z (B, T, D), item b using ``levels`` (B,) of them where ``valid``."""
        residual = z  # what is left, with gradient one to z
        chain = torch.zeros_like(z)  # the sum so far, with its gradient where levels have projections
        seen_by_z = first = chain  # the sum so far with the gradient to z alone
        codes, terms, seen = [], [], []
        for q in range(num_codebooks):
            on = valid & (levels > q)[:, None]  # (B, T)
            y, y_z, code, losses, looked_up = self._level(q, z - seen_by_z, residual, on)
            y = torch.where(on[..., None], y, 0.0)
            residual, chain = residual - y.detach(), chain + y
            seen_by_z = seen_by_z + torch.where(on[..., None], y_z, 0.0)
            first = first if q else chain
            codes.append(torch.where(on, code, 0))
            terms.append(losses)
            seen.append(looked_up)
        if self.codebook_dim is not None:
            return LevelRun(chain, first, codes, terms, seen)
        z_q = choose_gradient(z, chain, self.gradient)
        z_q_first = z_q if num_codebooks == 1 else choose_gradient(z, first, self.gradient)
        return LevelRun(z_q, z_q_first, codes, terms, seen)

    def finish(self, run: LevelRun) -> Quantized:
        """Loss and statistics of a run, of these levels or of several such chains; updates the codebooks."""
        codes, terms = torch.stack(run.codes, 1), torch.stack(run.terms)  # (B, Q', T), (Q', 2)
        counts = level_counts(run, self.codebook_sizes[0])  # (Q', K)
        present = counts.sum(1) > 0  # (Q',)
        commitment, codebook = (terms * present[:, None]).sum(0) / present.sum().clamp_min(1)
        loss = self.commitment_weight * commitment
        stats = {"commitment_loss": commitment.detach()}
        if self._book(0).learning == "gradient":
            loss = loss + self.codebook_weight * codebook
            stats["codebook_loss"] = codebook.detach()
        if self.training:
            update_codebooks(run.seen)
        return Quantized(run.z_q, codes, loss, stats | usage_perplexity(counts), run.z_q_first)

    def _level(
        self, q: int, left: Tensor, residual: Tensor, on: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Codebook, Tensor, Tensor, Tensor]]:
        """Level q where ``on`` (B, T), of the residual (B, T, D) and of ``left``, the same with its gradient to z.

        Returns its contribution (B, T, D), that again with the gradient to z alone, codes (B, T), losses (2,), and what
        it searched.
        """
        book, T = self._book(q), residual.shape[1]
        pooled, some = self._pool(q, residual, on)  # (B, G, D), (B, G) bool
        h = self.project_in[q](pooled) if self.codebook_dim is not None else pooled  # (B, G, d)
        flat, valid = h.detach().flatten(0, 1), some.flatten()  # (M, d), (M,)
        if self.training:
            book.start(flat, valid)
        code = book.nearest(flat)
        e = book.lookup(code).view_as(h)
        losses = torch.stack(
            [masked_mean((h - e.detach()).square(), some), masked_mean((h.detach() - e).square(), some)]
        )
        y = y_z = e.detach()
        if self.codebook_dim is not None:
            into, out = self.project_in[q], self.project_out[q]
            h_z = frozen_linear(into, self._pool(q, left, on)[0])
            y_z = frozen_linear(out, choose_gradient(h_z, e, self.gradient))
            y = out(choose_gradient(into(pooled.detach()), e, self.gradient)) + (y_z - y_z.detach())
        y, y_z, codes = (self._repeat(q, x, T) for x in (y, y_z, code.view(some.shape)))
        return y, y_z, codes, losses, (book, flat, code, valid)

    def _pool(self, q: int, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, D), valid (B, T) -> what level q sees of them: one vector for each of its codes."""
        return x, all_valid(x) if valid is None else valid

    def _repeat(self, q: int, x: Tensor, length: int) -> Tensor:
        """Values (B, G, ...) of each code of level q -> (B, length, ...) of each position."""
        return x

    def _draw_levels(self, z: Tensor, num_codebooks: int | None) -> Tensor:
        """(B,) how many levels each item uses."""
        return draw_levels(z, self.num_codebooks, num_codebooks, self.quantizer_dropout if self.training else 0.0)

    def _encode(self, z: Tensor, num_codebooks: int) -> Tensor:
        rows, metric = z.flatten(0, 1), self._book(0).metric
        if self.codebook_dim is None:
            books = [self._book(q).codebook for q in range(num_codebooks)]
            codes = residual_codes(rows, books, metric, check_finite=False)  # (N, Q')
        else:
            books = self._codebooks(num_codebooks)
            levels = range(num_codebooks)
            into, bias = (
                torch.stack([getattr(self.project_in[q], name) for q in levels]) for name in ("weight", "bias")
            )
            out, shift = (
                torch.stack([getattr(self.project_out[q], name) for q in levels]) for name in ("weight", "bias")
            )
            codes = factorised_codes(rows, into, bias, books, out, shift, metric, check_finite=False)
        return codes.view(*z.shape[:2], num_codebooks).transpose(1, 2).contiguous()

    def _decode(self, codes: Tensor) -> Tensor:
        B, Q, T = codes.shape
        rows = codes.transpose(1, 2).flatten(0, 1)  # (N, Q)
        if self.codebook_dim is None:
            return residual_decode(rows, self._codebooks(Q)).view(B, T, self.dim)
        e = torch.cat([self._book(q).lookup(codes[:, q]) for q in range(Q)], 2)  # (B, T, Q d)
        return join_linears(self.project_out[:Q], e)


def all_valid(z: Tensor) -> Tensor:
    """(B, T) bool, all true."""
    return torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)


def check_dropout(share: float) -> None:
    """Raise ValueError unless ``share`` is in [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"quantizer_dropout: expected a share in [0, 1], got {share}")


def draw_levels(z: Tensor, most: int, num_codebooks: int | None, dropout: float) -> Tensor:
    """(B,) how many levels each item uses: all (or num_codebooks), or for a share ``dropout`` uniform in 1..most."""
    B = z.shape[0]
    levels = torch.full((B,), num_codebooks or most, device=z.device)
    if num_codebooks is None and dropout > 0:
        drops = torch.rand(B, device=z.device) < dropout
        levels = torch.where(drops, torch.randint(1, most + 1, (B,), device=z.device), levels)
    return levels


def level_counts(run: LevelRun, codebook_size: int) -> Tensor:
    """(Q', K) how often this batch used each code of each level, by one scatter; a repeated code counts once."""
    rows = torch.cat([code + codebook_size * q for q, (_, _, code, _) in enumerate(run.seen)])
    valid = torch.cat([valid for *_, valid in run.seen]).float()
    counts = torch.zeros(codebook_size * len(run.seen), device=rows.device).scatter_add_(0, rows, valid)
    return counts.view(len(run.seen), codebook_size)
