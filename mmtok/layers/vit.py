"""Plain vision transformer parts: pre-norm blocks with a key mask, learnt grid positions, text as extra tokens."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.layers.transformer import attend


def grid_embedding(table: Tensor, grid: tuple[int, int], height: int, width: int) -> Tensor:
    """A learnt table (h0 * w0, D) over the grid (h0, w0), as (height * width, D) over another one.

    The grid it was learnt on gives the table itself. Any other is interpolated (bicubic, antialiased when smaller), so
    that the table spans the whole picture whatever its size.

    Raises:
        ValueError: the table has not h0 * w0 rows.
    """
    if len(table) != grid[0] * grid[1]:
        raise ValueError(f"table: expected {grid[0]} x {grid[1]} rows, got {len(table)}")
    if (height, width) == tuple(grid):
        return table
    image = rearrange(table.float(), "(h w) d -> 1 d h w", h=grid[0])
    image = F.interpolate(image, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return rearrange(image, "1 d h w -> (h w) d").to(table.dtype)


def attend_where(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    causal: bool = False,
    keep: slice | None = None,
) -> Tensor:
    """`attend` over the keys where ``key_mask`` (B, T) is true and, if ``causal``, not after the query.

    q (B, heads, T', d) stand at the positions ``keep`` (None = all) of k and v (B, heads, T, d). Every query must see
    at least one key. As in `attend`, training on CPU takes the plain product, which is faster there than torch's
    fused kernel.
    """
    if key_mask is None and not causal:
        return attend(q, k, v)
    T = k.shape[2]
    seen = torch.ones(1, 1, 1, T, dtype=torch.bool, device=q.device) if key_mask is None else key_mask[:, None, None]
    if causal:
        seen = seen & torch.ones(T, T, dtype=torch.bool, device=q.device).tril()[keep or slice(None)]
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
    if q.device.type == "cpu" and torch.is_grad_enabled() and T <= 512:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class MultiHeadAttention(nn.Module):
    """Self-attention with one Linear for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, causal: bool = False):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width: expected a multiple of num_heads {num_heads}, got {dim}")
        self.num_heads, self.causal = num_heads, causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, keep: slice | None = None) -> Tensor:
        """x (B, T, D) -> (B, T', D), the attention of all positions or of those in ``keep``, to all."""
        if keep is None:
            q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.num_heads)
        else:
            D, bias = x.shape[2], self.qkv.bias
            q = F.linear(x[:, keep], self.qkv.weight[:D], None if bias is None else bias[:D])
            q = rearrange(q, "b t (h d) -> b h t d", h=self.num_heads)
            kv = F.linear(x, self.qkv.weight[D:], None if bias is None else bias[D:])
            k, v = rearrange(kv, "b t (two h d) -> two b h t d", two=2, h=self.num_heads)
        return self.proj(rearrange(attend_where(q, k, v, key_mask, self.causal, keep), "b h t d -> b t (h d)"))


class MLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ViTBlock(nn.Module):
    """Pre-norm block of the vision transformer (arXiv 2010.11929, eq. 2-3): attention, then a GELU MLP.

    Args:
        dim: width. num_heads: a divisor of it. mlp_ratio: hidden width of the MLP over the width.
        eps: of the LayerNorms; 1e-6 is timm's, 1e-5 torch's default (TiTok).
        qkv_bias: biases of queries, keys and values. causal: a position sees itself and earlier ones only.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        eps: float = 1e-6,
        qkv_bias: bool = True,
        causal: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = MultiHeadAttention(dim, num_heads, qkv_bias, causal)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, key_mask: Tensor | None = None, keep: slice | None = None) -> Tensor:
        """x (B, T, D) -> (B, T', D), all positions or those in ``keep``.

        key_mask (B, T) is bool, true where a position may be attended to.
        """
        short = x if keep is None else x[:, keep]
        x = short + self.attn(self.norm1(x), key_mask, keep)
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A stack of `ViTBlock` and a last LayerNorm; Linears start from Xavier's uniform, biases from 0."""

    def __init__(self, dim: int, depth: int, num_heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6):
        super().__init__()
        self.blocks = nn.ModuleList(ViTBlock(dim, num_heads, mlp_ratio, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, keep: slice | None = None) -> Tensor:
        """x (B, T, D) -> (B, T', D), normalised, of the positions ``keep`` (None = all); key_mask as `ViTBlock`.

        The last block works for these positions only: nobody reads its others.
        """
        for i, block in enumerate(self.blocks):
            x = block(x, key_mask, keep if i == len(self.blocks) - 1 else None)
        return self.norm(x)


class TextTokens(nn.Module):
    """Features of a text as tokens of a transformer: a Linear and learnt positions, or one learnt null token.

    Args:
        text_dim: width of the features. dim: of the transformer. max_tokens: longest text, in text tokens.
    """

    def __init__(self, text_dim: int, dim: int, max_tokens: int):
        super().__init__()
        self.proj = nn.Linear(text_dim, dim)
        self.positions = nn.Parameter(torch.randn(max_tokens, dim) * 0.02)
        self.null = nn.Parameter(torch.randn(dim) * 0.02)

    def forward(
        self, batch: int, states: Tensor | None, mask: Tensor | None = None, dropped: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, S, D) and which of them may be attended to (B, S); None = all of them.

        Args:
            batch: B. states: (B, S, text_dim), or None for no text: S is 1 then, the null token.
            mask: (B, S) bool, true at real text tokens; None = all. Whatever stands elsewhere has no influence.
            dropped: (B,) bool, items that get the null token instead; so do items without any real text token.

        Raises:
            ValueError: another width, or more than ``max_tokens`` text tokens.
        """
        if states is None or states.shape[1] == 0:
            return self.null.expand(batch, 1, -1), None
        length, text_dim, longest = states.shape[1], self.proj.in_features, len(self.positions)
        if length > longest or tuple(states.shape) != (batch, length, text_dim):
            raise ValueError(
                f"text: expected features of shape ({batch}, 1..{longest}, {text_dim}), got {tuple(states.shape)}; "
                f"use the text encoder that the config names, with its max_tokens"
            )
        real = torch.ones(batch, length, dtype=torch.bool, device=states.device) if mask is None else mask
        tokens = self.proj(torch.where(real[..., None], states, 0.0))
        tokens = tokens + self.positions[:length].to(tokens.dtype)
        absent = ~real.any(1) if dropped is None else dropped | ~real.any(1)
        first = torch.arange(length, device=states.device) == 0
        tokens = torch.where((absent[:, None] & first)[..., None], self.null.to(tokens.dtype), tokens)
        return tokens, torch.where(absent[:, None], first, real)


def key_mask_with_text(before: int, text_mask: Tensor | None) -> Tensor | None:
    """(B, before + S) bool for text tokens appended to ``before`` others, which are all attended to; None = all are."""
    return None if text_mask is None else F.pad(text_mask, (before, 0), value=True)
