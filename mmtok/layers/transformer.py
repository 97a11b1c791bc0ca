"""The transformer block of 1-D image tokenizers: RMSNorm, joint attention with QK-norm and rotary positions, SwiGLU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROPE_KINDS = ("rotary", "mixed")


def rope_tables(positions: Tensor, axes_dims: Sequence[int], kind: str = "rotary", theta: float = 1e4) -> Tensor:
    """Cosines and sines (2, T, D) of axial rotary positions (arXiv 2104.09864, eq. 15, one block of D an axis).

    Args:
        positions: (T, A) float, one coordinate for each of the A axes.
        axes_dims: even width of each axis; they sum to the head width D.
        kind: ``rotary`` lays the angles out for the half-split rotation, so that it is a true rotation. ``mixed``
            repeats each angle at two neighbouring channels while the rotation stays half-split, as the released
            weights of Instella-T2I were trained: pairs (d, d + D/2) then get two different angles.
    """
    if kind not in ROPE_KINDS:
        raise ValueError(f"rope kind: expected one of {ROPE_KINDS}, got {kind!r}")
    angles = []
    for axis, dim in enumerate(axes_dims):
        speed = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim)
        angles.append(positions[:, axis, None].double() * speed)
    angle = torch.cat(angles, -1)  # (T, D / 2)
    angle = angle.repeat_interleave(2, -1) if kind == "mixed" else torch.cat([angle, angle], -1)
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x: Tensor, tables: Tensor) -> Tensor:
    """Apply `rope_tables` to ``x`` (B, heads, T, D), half-split: channel d turns with channel d + D/2."""
    cos, sin = tables.to(x.dtype)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class RMSNorm(nn.RMSNorm):
    """RMS normalisation whose weight follows the input's type, so that autocast keeps the fused kernel."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)  # pyright: ignore[reportArgumentType]


class Attention(nn.Module):
    """Full self-attention without biases, RMS-normalised queries and keys."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"dim: expected a multiple of head_dim {head_dim}, got {dim}")
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, tables: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, D // self.head_dim, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), tables), rotate(self.k_norm(k), tables)
        y = attend(q.to(v.dtype), k.to(v.dtype), v)  # (B, heads, T, head_dim)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v over (B, heads, T, d).

    Training on CPU takes the plain product up to 512 positions: torch's fused CPU kernel takes four times as
    long, forward and backward, at 128 and as long at 320 (`recipes/measure_cpu.py`). All else takes the fused kernel.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.shape[2] <= 512:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) without biases (arXiv 2002.05202, eq. 6)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, dim: int, head_dim: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, head_dim)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, tables: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), tables)
        return x + self.mlp(self.norm2(x))
