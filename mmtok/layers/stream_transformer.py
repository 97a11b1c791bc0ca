"""A causal transformer with a sliding window, which gives the same for a whole sequence and for pieces of it.

LayerNorm before each branch, rotary positions, GELU, a learnt scale on each branch: the transformer that Mimi puts
between its convolutions and its quantizer (arXiv 2410.00037, section 3.3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.layers.conv1d import Past
from mmtok.layers.transformer import rope_tables, rotate

MIN_BLOCK = 64  # queries attended at once; fewer would not fill a product


def window_attention(q: Tensor, k: Tensor, v: Tensor, context: int) -> Tensor:
    """softmax(q k' / sqrt(d)) v where each position sees itself and the ``context`` - 1 before it.

    Blocks of queries see only the keys of their windows, so time and memory grow with T * context, not with T * T.

    Args:
        q: (B, heads, T, d). k, v: (B, heads, P + T, d); the first P positions lie before q's first.

    Returns:
        (B, heads, T, d).
    """
    T, before = q.shape[2], k.shape[2] - q.shape[2]
    if before == 0 and context >= T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    size, parts = max(context, MIN_BLOCK), []
    for start in range(0, T, size):
        stop = min(start + size, T)
        first = max(0, before + start - context + 1)
        rows = torch.arange(before + start, before + stop, device=q.device)
        age = rows[:, None] - torch.arange(first, before + stop, device=q.device)  # how far back each key lies
        keys, values = k[:, :, first : before + stop], v[:, :, first : before + stop]
        seen = (age >= 0) & (age < context)
        parts.append(F.scaled_dot_product_attention(q[:, :, start:stop], keys, values, attn_mask=seen))
    return torch.cat(parts, 2)


class WindowAttention(nn.Module):
    """Causal self-attention without biases over a window of ``context`` positions, with rotary positions."""

    def __init__(self, dim: int, num_heads: int, context: int):
        super().__init__()
        self.head_dim, self.context = dim // num_heads, context
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, tables: Tensor, past: Past | None = None) -> Tensor:
        """x (B, T, D) with the rotary ``tables`` of its positions; ``past`` holds turned keys, and values."""
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, D // self.head_dim, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, tables), rotate(k, tables)
        if past is not None:
            if self in past.kept:
                kept_k, kept_v = past.kept[self]
                k, v = torch.cat([kept_k, k], 2), torch.cat([kept_v, v], 2)
            first = max(0, k.shape[2] - self.context + 1)
            past.kept[self] = torch.stack([k[:, :, first:], v[:, :, first:]])  # (2, B, heads, <= context - 1, d)
        y = window_attention(q, k, v, self.context)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class StreamBlock(nn.Module):
    """x + scale1 * attention(norm1(x)), then x + scale2 * fc2(gelu(fc1(norm2(x)))); no biases but the norms'."""

    def __init__(self, dim: int, num_heads: int, hidden: int, context: int, layer_scale: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, context)
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)
        self.scale1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.scale2 = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Tensor, tables: Tensor, past: Past | None = None) -> Tensor:
        x = x + self.scale1 * self.attn(self.norm1(x), tables, past)
        return x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class StreamTransformer(nn.Module):
    """(B, T, D) -> (B, T, D), causal; no norm at the end.

    With ``past`` a call goes on where the one before ended. The state is the turned keys and the values of
    ``context`` - 1 positions a layer, and how many positions have passed.

    Args:
        dim: D. depth: layers. num_heads: they share D. hidden: width of the MLP.
        context: positions that a layer sees, its own one included; ``depth`` layers reach depth * (context - 1) back.
        layer_scale: where the learnt scale of each branch starts (arXiv 2103.17239, eq. 4).

    Raises:
        ValueError: D / num_heads is not an even integer, or context is below 1.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, hidden: int, context: int, layer_scale: float = 0.01):
        super().__init__()
        if dim % (2 * num_heads):
            raise ValueError(f"dim: expected a multiple of 2 * num_heads = {2 * num_heads}, got {dim}")
        if context < 1:
            raise ValueError(f"context: expected at least 1 position, got {context}")
        self.head_dim, self.context = dim // num_heads, context
        self.blocks = nn.ModuleList(StreamBlock(dim, num_heads, hidden, context, layer_scale) for _ in range(depth))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        if past is not None:
            seen = past.kept.get(self, positions.new_zeros(()))
            past.kept[self] = seen + x.shape[1]
            positions = positions + seen
        # Angles come from fp64: positions of an hour-long stream times a frequency leave fp32 no digits for the turn.
        tables = rope_tables(positions[:, None], (self.head_dim,))  # (2, T, head_dim)
        for block in self.blocks:
            x = block(x, tables, past)
        return x
