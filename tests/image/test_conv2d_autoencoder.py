"""The convolutional encoder and decoder: shapes, sizes, what each switch changes, bf16 on this CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mmtok.layers.conv2d import (
    ConvDecoder,
    ConvEncoder,
    ConvShape,
    Down,
    GridAttention,
    ResidualBlock,
    Up,
    edge_pad,
    group_norm,
)


def test_groups_are_the_published_32_and_fewer_where_it_is_narrow():
    assert {c: group_norm(c).num_groups for c in (512, 256, 128, 96, 64, 48, 32, 24, 6, 3)} == {
        **{512: 32, 256: 32, 128: 32, 96: 24, 64: 16, 48: 12, 32: 8, 24: 6, 6: 1, 3: 1}
    }
    assert group_norm(128).eps == 1e-6


@pytest.mark.parametrize("style", ["ldm", "maskgit"])
@pytest.mark.parametrize(("multipliers", "patch", "factor"), [((1,), 2, 2), ((1, 2, 1), 1, 4), ((2, 3), 4, 8)])
def test_the_grid_has_the_factor_and_comes_back(style: str, multipliers: tuple[int, ...], patch: int, factor: int):
    shape = ConvShape(8, multipliers, 1, (0,), (0,), True, patch, style)
    assert shape.factor == factor
    encoder, decoder = ConvEncoder(shape, 6), ConvDecoder(shape, 3)
    z = encoder(torch.rand(2, 3, 2 * factor, 3 * factor))
    assert z.shape == (2, 6, 6)
    assert decoder(z[..., :3], 2, 3).shape == (2, 3, 2 * factor, 3 * factor)


def test_raster_order_and_orientation():
    """A change in one corner's pixels moves the latents there most, and the other way round."""
    torch.manual_seed(0)
    shape = ConvShape(8, (1, 1, 1), 1, middle_attention=False)
    encoder, decoder = ConvEncoder(shape, 4), ConvDecoder(shape, 4)
    x = torch.full((1, 3, 40, 56), 0.5)
    other = x.clone()
    other[:, :, :12, -12:] = torch.rand(3, 12, 12)  # top right
    change = (encoder(other) - encoder(x)).square().sum(-1).view(10, 14)
    assert int(change.argmax()) // 14 < 4 and int(change.argmax()) % 14 > 9
    z = torch.zeros(1, 140, 4)
    touched = z.clone()
    touched.view(1, 10, 14, 4)[:, -3:, :3] = torch.rand(3, 3, 4) * 5  # bottom left
    pixels = (decoder(touched, 10, 14) - decoder(z, 10, 14)).square().sum(1)[0]
    assert int(pixels.argmax()) // 56 > 24 and int(pixels.argmax()) % 56 < 16


def test_down_looks_right_and_below_and_up_repeats():
    down, up = Down(1), Up(1)
    with torch.no_grad():
        for conv in (down.conv, up.conv):
            conv.weight.zero_()
            conv.bias.zero_()
        down.conv.weight[0, 0, 2, 2] = 1.0
        up.conv.weight[0, 0, 1, 1] = 1.0
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(down(x)[0, 0], torch.tensor([[10.0, 0.0], [0.0, 0.0]]))  # two steps right and down, 0 outside
    assert torch.equal(up(x)[0, 0], x[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_the_shortcut_reads_the_input_or_in_maskgit_the_output():
    torch.manual_seed(0)
    x = torch.rand(1, 8, 4, 4)
    for style in ("ldm", "maskgit"):
        block = ResidualBlock(8, 12, style)
        with torch.no_grad():
            block.conv2.weight.zero_()
            if block.conv2.bias is not None:
                block.conv2.bias.zero_()
        want = torch.zeros(1, 12, 4, 4) if style == "maskgit" else block.shortcut(x)
        assert torch.equal(block(x), want)
        same = ResidualBlock(8, 8, style)
        with torch.no_grad():
            same.conv2.weight.zero_()
            if same.conv2.bias is not None:
                same.conv2.bias.zero_()
        assert torch.equal(same(x), x)
    assert not [n for n, _ in ResidualBlock(8, 12, "maskgit").named_parameters() if "conv" in n and "bias" in n]


def test_attention_stands_where_it_is_asked_for():
    def where(**settings: Any) -> list[str]:
        shape = ConvShape(8, (1, 2, 1), 2, **settings)
        parts = {"encoder": ConvEncoder(shape, 4), "decoder": ConvDecoder(shape, 4)}
        return [f"{p}.{n}" for p, m in parts.items() for n, _ in m.named_modules() if n.endswith(".qkv")]

    assert where() == ["encoder.middle.1.qkv", "decoder.middle.1.qkv"]
    assert where(middle_attention=False) == []
    found = where(middle_attention=False, attention=(1,), decoder_attention=(0,))
    assert found == [
        *(f"encoder.levels.1.attention.{j}.qkv" for j in range(2)),
        *(f"decoder.levels.2.attention.{j}.qkv" for j in range(3)),  # levels run from the coarsest, 0 is the finest
    ]


def test_attention_is_blind_to_the_order_of_positions():
    torch.manual_seed(0)
    block, x = GridAttention(8), torch.randn(2, 8, 3, 4)
    order = torch.randperm(12)
    y = block(x).flatten(2)[..., order]
    assert torch.allclose(block(x.flatten(2)[..., order].view_as(x)).flatten(2), y, atol=1e-5)
    assert not torch.allclose(block(x), x, atol=1e-2)


def test_unusable_sizes_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 8, got \(1, 3, 12, 16\)"):
        ConvEncoder(ConvShape(8, (1, 1, 1), 1, patch=2), 4)(torch.rand(1, 3, 12, 16))
    with pytest.raises(ValueError, match=r"expected \(B, 2 \* 3, D\), got \(1, 5, 4\)"):
        ConvDecoder(ConvShape(8, (1,), 1), 4)(torch.rand(1, 5, 4), 2, 3)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"style": "vae"}, "style: expected one of"),
        ({"patch": 3}, "patch: expected 1, 2 or 4, got 3"),
        ({"multipliers": ()}, "every multiplier >= 1"),
        ({"blocks": 0}, "blocks"),
        ({"multipliers": (1, 2), "attention": (16,)}, "levels, not resolutions"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            ConvShape(**arguments)


def test_padding_repeats_the_edge_right_and_below_only():
    x = torch.rand(2, 3, 5, 8)
    y = edge_pad(x, 4)
    assert y.shape == (2, 3, 8, 8) and torch.equal(y[:, :, :5], x)
    assert torch.equal(y[:, :, 5:], x[:, :, 4:].expand(-1, -1, 3, -1))
    assert edge_pad(x[:, :, :4], 4).shape == (2, 3, 4, 8)
    one = torch.rand(1, 3, 1, 1)
    assert torch.equal(edge_pad(one, 8), one.expand(-1, -1, 8, 8))


@pytest.mark.parametrize("patch", [1, 2])
def test_bf16_autocast_agrees_with_fp32_in_values_and_gradients(patch: int):
    """torch's strided conv1d in bf16 is wrong for some shapes on this CPU; these layers must not be."""
    torch.manual_seed(0)
    shape = ConvShape(32, (1, 2), 1, patch=patch)
    encoder, decoder = ConvEncoder(shape, 16), ConvDecoder(shape, 16)
    x = torch.rand(2, 3, 32, 32)
    found = []
    for bf16 in (False, True):
        encoder.zero_grad()
        decoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            side = 32 // shape.factor
            z = encoder(x)
            y = decoder(z, side, side)
        (y.float() * torch.linspace(0, 1, y.numel()).view_as(y)).sum().backward()
        grads = [p.grad.flatten() for m in (encoder, decoder) for p in m.parameters() if p.grad is not None]
        found.append((z.detach().float().flatten(), y.detach().float().flatten(), torch.cat(grads)))
    for exact, rounded in zip(*found, strict=True):
        assert float(F.cosine_similarity(exact, rounded, 0)) > 0.999
