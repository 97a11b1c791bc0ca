"""The head that predicts the D codes of one position: TokenBridge's small transformer over dimensions (2503.16430).

A generator gives one condition vector a position; with 16 codes of 64 values there, one softmax over 64^16 is out of
question. `DimensionHead` predicts the codes one by one, each given those before; `ParallelHead` all at once, as if they
were independent given the condition, which is the paper's comparison. Rows are positions: codes (B, Q, T) of
`Tokens` enter as ``codes.transpose(1, 2).flatten(0, 1)``.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PUBLISHED_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)  # low frequencies of KL-16 first
PUBLISHED = {  # the head of TokenBridge-L
    "condition_dim": 1024,
    "num_dimensions": 16,
    "codebook_size": 64,
    "dim": 1024,
    "depth": 4,
    "num_heads": 8,
    "mlp_ratio": 4.0,
    "dropout": 0.1,
    "order": PUBLISHED_ORDER,
    "first_step_embedding": True,
}
Cache = list[tuple[Tensor, Tensor]]  # of each block: keys and values (N, heads, steps so far, head width)


def energy_order(latents: Tensor) -> list[int]:
    """An order of the dimensions in which each next one explains most of what those before leave unexplained.

    Forward selection on the covariance C: take the d with the largest sum_j C_jd^2 / (C_dd + r), the variance of all
    dimensions that a linear prediction from d removes; then go on with the covariance of the residuals. r is a
    thousandth of the mean variance, about what rounding to 64 cells adds: what is smaller is no longer in the codes.

    Args:
        latents: (N, D), N >= 2.
    """
    if latents.ndim != 2 or len(latents) < 2:
        raise ValueError(f"latents: expected (N, D) with N >= 2, got {tuple(latents.shape)}; flatten batch and cells")
    C = torch.cov(latents.detach().double().T).reshape(latents.shape[1], latents.shape[1])
    noise = (1e-3 * C.diagonal().mean()).clamp_min(1e-300)
    left, order = list(range(len(C))), []
    while left:
        explained = C[:, left].square().sum(0) / (C.diagonal()[left] + noise)
        d = left.pop(int(explained.argmax()))
        order.append(d)
        C = C - C[:, d, None] * C[d] / (C[d, d] + noise)
    return order


class CodesHead(nn.Module, abc.ABC):
    """What both heads share: checks, and the loss."""

    def __init__(self, condition_dim: int, num_dimensions: int, codebook_size: int):
        super().__init__()
        if min(condition_dim, num_dimensions) < 1 or codebook_size < 2:
            raise ValueError(
                f"expected condition_dim and num_dimensions >= 1 and codebook_size >= 2, got {condition_dim}, "
                f"{num_dimensions} and {codebook_size}"
            )
        self.condition_dim, self.num_dimensions, self.codebook_size = condition_dim, num_dimensions, codebook_size

    @abc.abstractmethod
    def forward(self, condition: Tensor, codes: Tensor) -> Tensor:
        """condition (N, D_c) and codes (N, D) int64 -> logits (N, D, K), those of dimension d at [:, d]."""

    @abc.abstractmethod
    def sample(self, condition: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """condition (N, D_c) -> codes (N, D) int64; temperature 0 takes the likeliest code of each step.

        ``generator`` lies on the condition's device.
        """

    def loss(self, condition: Tensor, codes: Tensor) -> Tensor:
        """Mean cross-entropy in nats a dimension; times D / ln 2 it is bits a position."""
        return F.cross_entropy(self(condition, codes).float().flatten(0, 1), codes.flatten())

    def _check(self, condition: Tensor, codes: Tensor | None) -> None:
        if condition.ndim != 2 or condition.shape[1] != self.condition_dim:
            raise ValueError(f"condition: expected (N, {self.condition_dim}), got {tuple(condition.shape)}")
        want = (len(condition), self.num_dimensions)
        if codes is not None and (tuple(codes.shape) != want or codes.dtype != torch.int64):
            raise ValueError(f"codes: expected int64 of shape {want}, got {codes.dtype} of shape {tuple(codes.shape)}")


def draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Logits (..., K) -> codes (...)."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}; 0 takes the likeliest code")
    if temperature == 0:
        return logits.argmax(-1)
    shares = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(shares.flatten(0, -2), 1, generator=generator).view(shares.shape[:-1])


class StepAttention(nn.Module):
    """Causal self-attention with LayerNorm on queries and keys; with a cache it goes on from the steps kept there."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads, eps=1e-6)
        self.k_norm = nn.LayerNorm(dim // num_heads, eps=1e-6)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, kept: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        N, S, D = x.shape
        q, k, v = self.qkv(x).view(N, S, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (N, heads, S, width)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if kept is not None:
            k, v = torch.cat([kept[0], k], 2), torch.cat([kept[1], v], 2)
        # A dozen steps: the plain product is faster than a fused kernel, forward and backward.
        future = torch.ones(S, k.shape[2], dtype=torch.bool, device=x.device).triu(k.shape[2] - S + 1)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).masked_fill(future, -torch.inf).softmax(-1)
        y = F.dropout(weights, self.dropout, self.training) @ v
        y = self.proj(y.transpose(1, 2).reshape(N, S, D))
        return F.dropout(y, self.dropout, self.training), (k, v)


class StepBlock(nn.Module):
    """Pre-norm block whose shifts, scales and gates come from the condition of each step; the gates start at 0."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = StepAttention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout)
        )
        self.modulation = nn.Linear(dim, 6 * dim)  # set to 0 by the head

    def forward(
        self, x: Tensor, condition: Tensor, kept: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, -1)
        y, pair = self.attn(self.norm1(x) * (1 + scale1) + shift1, kept)
        x = x + gate1 * y
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2), pair


class DimensionHead(CodesHead):
    """A causal transformer over the dimensions; step s predicts dimension ``order[s]`` from the condition and the codes
    of the steps before.

    Args:
        condition_dim: D_c. num_dimensions: D. codebook_size: K of every dimension.
        dim, depth, num_heads, mlp_ratio, dropout: of the transformer.
        order: the dimensions in the order in which they are predicted, e.g. of `energy_order`; None = 0, 1, ... It is a
            buffer and travels with the weights.
        first_step_embedding: sampling adds the first step's embedding to the first input, as the released code does
            although training (`forward`) does not; needed to sample as it does from released weights. False = both
            leave it out.
    """

    order: Tensor

    def __init__(
        self,
        condition_dim: int,
        num_dimensions: int = 16,
        codebook_size: int = 64,
        dim: int = 256,
        depth: int = 4,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        order: Sequence[int] | None = None,
        first_step_embedding: bool = False,
    ):
        super().__init__(condition_dim, num_dimensions, codebook_size)
        D, K = num_dimensions, codebook_size
        chosen = list(range(D)) if order is None else [int(d) for d in order]
        if sorted(chosen) != list(range(D)):
            raise ValueError(f"order: expected each of 0..{D - 1} once, got {chosen}")
        if dim % num_heads:
            raise ValueError(f"dim: expected a multiple of num_heads {num_heads}, got {dim}")
        self.first_step_embedding = first_step_embedding
        self.register_buffer("order", torch.tensor(chosen))
        self.condition = nn.Linear(condition_dim, dim)
        self.positions = nn.Parameter(torch.randn(D, dim) * 0.02)  # of the inputs
        self.steps = nn.Parameter(torch.randn(D, dim) * 0.02)  # of the conditions
        self.tables = nn.ModuleList(nn.Embedding(K, dim) for _ in range(D - 1))  # in the order of the steps
        self.blocks = nn.ModuleList(StepBlock(dim, num_heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.last_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.last_modulation = nn.Linear(dim, 2 * dim)
        self.heads = nn.ModuleList(nn.Linear(dim, K) for _ in range(D))  # in the order of the steps
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                if "modulation" in name:
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight)

    def forward(self, condition: Tensor, codes: Tensor) -> Tensor:
        self._check(condition, codes)
        c = self.condition(condition)[:, None]  # (N, 1, dim)
        in_order = codes[:, self.order]
        before = [table(in_order[:, s]) for s, table in enumerate(self.tables)]
        x = torch.stack([c[:, 0], *before], 1)  # (N, D, dim)
        h, _ = self._run(x, c, slice(0, self.num_dimensions), None)
        logits = torch.stack([head(h[:, s]) for s, head in enumerate(self.heads)], 1)  # (N, D, K)
        return logits[:, self.order.argsort()]

    def _run(self, x: Tensor, c: Tensor, steps: slice, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Inputs x (N, S, dim) of ``steps`` and the condition c (N, 1, dim) -> what the heads read (N, S, dim)."""
        x, c = x + self.positions[steps], c + self.steps[steps]
        kept: Cache = []
        for i, block in enumerate(self.blocks):
            x, pair = block(x, c, None if cache is None else cache[i])
            kept.append(pair)
        scale, shift = self.last_modulation(F.silu(c)).chunk(2, -1)
        return self.last_norm(self.norm(x)) * (1 + scale) + shift, kept

    @torch.no_grad()
    def sample(self, condition: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        self._check(condition, None)
        c = self.condition(condition)[:, None]
        x = c + self.steps[:1] if self.first_step_embedding else c
        cache: Cache | None = None
        drawn: list[Tensor] = []
        for s, head in enumerate(self.heads):
            h, cache = self._run(x, c, slice(s, s + 1), cache)
            drawn.append(draw(head(h[:, 0]), temperature, generator))
            if s < len(self.tables):
                x = self.tables[s](drawn[s])[:, None]
        return torch.stack(drawn, 1)[:, self.order.argsort()]


class ParallelHead(CodesHead):
    """One linear head a dimension, all read from the condition alone."""

    def __init__(self, condition_dim: int, num_dimensions: int = 16, codebook_size: int = 64):
        super().__init__(condition_dim, num_dimensions, codebook_size)
        self.heads = nn.Linear(condition_dim, num_dimensions * codebook_size)

    def forward(self, condition: Tensor, codes: Tensor) -> Tensor:
        self._check(condition, codes)
        return self.heads(condition).unflatten(1, (self.num_dimensions, self.codebook_size))

    @torch.no_grad()
    def sample(self, condition: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        self._check(condition, None)
        logits = self.heads(condition).unflatten(1, (self.num_dimensions, self.codebook_size))
        return draw(logits, temperature, generator)
