"""Rotary positions, attention and blocks of the 1-D image tokenizers against their equations."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmtok.layers.transformer import Attention, Block, RMSNorm, SwiGLU, attend, rope_tables, rotate

AXES = (4, 6, 6)


def positions(*rows: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(rows)


def scores(q: torch.Tensor, k: torch.Tensor, at: torch.Tensor, kind: str) -> torch.Tensor:
    """(T, T) products of one query and one key, put at each of the positions."""
    tables = rope_tables(at, AXES, kind)
    T = len(at)
    return rotate(q.expand(1, 1, T, -1), tables)[0, 0] @ rotate(k.expand(1, 1, T, -1), tables)[0, 0].T


def test_rotary_is_a_rotation_and_mixed_is_not():
    at = positions((0, 0, 0), (3, 0, 0), (0, 7.5, 2), (0, 63, 63))
    x = torch.randn(2, 3, 4, 16)
    norms = {kind: rotate(x, rope_tables(at, AXES, kind)).norm(dim=-1) for kind in ("rotary", "mixed")}
    assert torch.allclose(norms["rotary"], x.norm(dim=-1), atol=1e-5)
    assert not torch.allclose(norms["mixed"], x.norm(dim=-1), atol=1e-2)
    assert torch.equal(rotate(x, rope_tables(at, AXES))[:, :, 0], x[:, :, 0])  # position 0 does not turn


def test_only_rotary_products_depend_on_the_difference_alone():
    torch.manual_seed(0)
    q, k = torch.randn(16), torch.randn(16)
    shift = torch.tensor([[5.0, 11.0, 2.0]])
    at = positions((0, 1, 2), (4, 0, 3), (0, 8, 0))
    assert torch.allclose(scores(q, k, at, "rotary"), scores(q, k, at + shift, "rotary"), atol=1e-4)
    assert not torch.allclose(scores(q, k, at, "mixed"), scores(q, k, at + shift, "mixed"), atol=1e-2)


def test_the_tables_follow_the_equation():
    """arXiv 2104.09864, eq. 15: channel pair i of an axis of width d turns by position * 10000^(-2 i / d)."""
    at = positions((2, 3, 5))
    turns = [p * 1e4 ** (-2 * i / d) for p, d in zip((2, 3, 5), AXES, strict=True) for i in range(d // 2)]
    angle = torch.tensor(turns)
    cos, sin = rope_tables(at, AXES)[:, 0]
    assert torch.allclose(cos, angle.cos().repeat(2), atol=1e-6) and torch.allclose(
        sin, angle.sin().repeat(2), atol=1e-6
    )
    x = torch.randn(16)
    y = rotate(x[None, None, None], rope_tables(at, AXES))[0, 0, 0]
    turned = torch.view_as_complex(torch.stack([x[:8], x[8:]], -1)) * torch.exp(1j * angle)
    assert torch.allclose(y, torch.cat([turned.real, turned.imag]), atol=1e-5)
    cos, sin = rope_tables(at, AXES, "mixed")[:, 0]
    assert torch.allclose(cos, angle.cos().repeat_interleave(2), atol=1e-6)
    assert torch.allclose(sin, angle.sin().repeat_interleave(2), atol=1e-6)
    with pytest.raises(ValueError, match=r"rope kind: expected one of .*'rotary', 'mixed'.*got 'half'"):
        rope_tables(at, AXES, "half")


@pytest.mark.parametrize("T", [1, 7, 512, 513])
def test_the_plain_product_is_scaled_dot_product_attention(T: int):
    q, k, v = (torch.randn(1, 2, T, 8, requires_grad=True) for _ in range(3))
    assert torch.is_grad_enabled()
    ours, theirs = attend(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(ours, theirs, atol=1e-6)
    weight = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weight).sum(), (q, k, v)),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_norm_attention_and_mlp_follow_their_equations():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32)
    norm = RMSNorm(32)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(32))
    rms = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(norm(x), x / rms * norm.weight, atol=1e-5)
    assert norm(x.bfloat16()).dtype == torch.bfloat16

    mlp = SwiGLU(32, 24)
    w1, w3 = mlp.w13.weight.chunk(2)
    assert torch.allclose(mlp(x), (F.silu(x @ w1.T) * (x @ w3.T)) @ mlp.w2.weight.T, atol=1e-5)

    attention, tables = Attention(32, 16), rope_tables(torch.rand(5, 3) * 9, AXES)
    q, k, v = (attention.qkv(x).chunk(3, -1)[i].view(2, 5, 2, 16).transpose(1, 2) for i in range(3))
    q, k = rotate(attention.q_norm(q), tables), rotate(attention.k_norm(k), tables)
    weights = (q @ k.transpose(-1, -2) / 4).softmax(-1)
    want = (weights @ v).transpose(1, 2).reshape(2, 5, 32) @ attention.proj.weight.T
    assert torch.allclose(attention(x, tables), want, atol=1e-5)

    block = Block(32, 16, 2.0)
    y = x + block.attn(block.norm1(x), tables)
    assert torch.allclose(block(x, tables), y + block.mlp(block.norm2(y)), atol=1e-5)
    with pytest.raises(ValueError, match="expected a multiple of head_dim 16, got 24"):
        Attention(24, 16)
