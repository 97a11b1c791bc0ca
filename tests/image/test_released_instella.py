"""Instella-T2I's published names and shapes -> Binary1D, against its forward written out in plain torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mmtok.image.binary1d import PUBLISHED, Binary1D
from mmtok.image.released.instella import convert_instella, load_instella, published_names

SMALL: dict[str, Any] = {
    **PUBLISHED,
    "num_tokens": 5,
    "num_bits": 8,
    "patch_size": 4,
    "encoder": (32, 3, 2),
    "decoder": (48, 2, 1),
    "head_dim": 16,
    "axes_dims": (4, 6, 6),
    "span": 8,
}


def published_state(seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the names that the facts state, written out rather than taken from the loader's table."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.patch_embedder.weight": (32, 3, 4, 4),
        "encoder.patch_embedder.bias": (32,),
        "encoder.latent_tokens": (1, 5, 32),
        "encoder.down_layers.0.conv.weight": (32, 32, 3, 3),
        "encoder.down_layers.0.conv.bias": (32,),
        "encoder.norm_out.weight": (32,),
        "encoder.proj_out.weight": (32, 32),
        "encoder.proj_out.bias": (32,),
        "quantizer.proj.0.weight": (8, 32),
        "quantizer.proj.0.bias": (8,),
        "quantizer.embed": (8, 32),
        "decoder.input_layer.0.weight": (32,),
        "decoder.input_layer.1.weight": (48, 32),
        "decoder.input_layer.1.bias": (48,),
        "decoder.mask_tokens": (1, 1, 48),
        "decoder.up_layers.0.conv.weight": (192, 48, 3, 3),
        "decoder.up_layers.0.conv.bias": (192,),
        "decoder.norm_out.weight": (48,),
        "to_pixel.weight": (48, 48),
        "to_pixel.bias": (48,),
    }
    for side, width, depth in (("encoder", 32, 3), ("decoder", 48, 2)):
        for i in range(depth):
            block = f"{side}.transformer_blocks.{i}"
            shapes |= {f"{block}.{n}.weight": (width,) for n in ("input_layernorm", "post_attention_layernorm")}
            shapes |= {f"{block}.attn.{n}_proj.weight": (width, width) for n in "qkvo"}
            shapes |= {f"{block}.attn.norm_{n}.weight": (16,) for n in "qk"}
            shapes |= {f"{block}.mlp.{n}_proj.weight": (4 * width, width) for n in ("gate", "up")}
            shapes[f"{block}.mlp.down_proj.weight"] = (width, 4 * width)
    state = {}
    for name, shape in shapes.items():
        scale = 0.3 if len(shape) == 1 else 0.8 / math.sqrt(math.prod(shape[1:]))
        state[name] = torch.randn(shape, generator=generator) * scale + (1.0 if "norm" in name else 0.0)
    state["decoder.input_layer.0.weight"] += 1
    return state


# --- the published forward, from the facts alone ---


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def published_angles(latents: int, h: int, w: int, span: float) -> Tensor:
    """(T, 16) angles: axes of 4, 6, 6 channels; each angle stands at two neighbouring channels."""
    rows = [(float(i), 0.0, 0.0) for i in range(latents)]
    rows += [(0.0, r / (h - 1) * (span - 1), c / (w - 1) * (span - 1)) for r in range(h) for c in range(w)]
    out = torch.zeros(len(rows), 16)
    for t, position in enumerate(rows):
        channel = 0
        for p, width in zip(position, (4, 6, 6), strict=True):
            for j in range(width // 2):
                out[t, channel : channel + 2] = p / 10000 ** (2 * j / width)
                channel += 2
    return out


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Half-split rotation of (B, T, heads, 16): channel d pairs with d + 8, each with its own angle."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    other = torch.cat([-x[..., 8:], x[..., :8]], -1)
    return x * cos + other * sin


def published_block(x: Tensor, w: dict[str, Tensor], name: str, angles: Tensor) -> Tensor:
    B, T, D = x.shape
    h = rms(x, w[f"{name}.input_layernorm.weight"])
    q, k, v = ((h @ w[f"{name}.attn.{n}_proj.weight"].T).view(B, T, D // 16, 16) for n in "qkv")
    q = turned(rms(q, w[f"{name}.attn.norm_q.weight"]), angles)
    k = turned(rms(k, w[f"{name}.attn.norm_k.weight"]), angles)
    shares = (torch.einsum("bthd,bshd->bhts", q, k) / 4).softmax(-1)
    x = x + torch.einsum("bhts,bshd->bthd", shares, v).reshape(B, T, D) @ w[f"{name}.attn.o_proj.weight"].T
    h = rms(x, w[f"{name}.post_attention_layernorm.weight"])
    gated = F.silu(h @ w[f"{name}.mlp.gate_proj.weight"].T) * (h @ w[f"{name}.mlp.up_proj.weight"].T)
    return x + gated @ w[f"{name}.mlp.down_proj.weight"].T


def published_forward(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Pixels in [-1, 1] (B, 3, H, W) -> bits (B, 5, 8) and pixels in [-1, 1]."""
    B, _, H, W = x.shape
    h, v = H // 4, W // 4
    image = F.conv2d(x, w["encoder.patch_embedder.weight"], w["encoder.patch_embedder.bias"], stride=4)
    y = torch.cat([w["encoder.latent_tokens"].expand(B, -1, -1), image.flatten(2).mT], 1)
    angles = published_angles(5, h, v, 8)
    for i in range(3):
        y = published_block(y, w, f"encoder.transformer_blocks.{i}", angles)
        if i == 1:  # the second block, SMALL's resize_after = 2
            grid = y[:, 5:].mT.reshape(B, 32, h, v)
            down = F.conv2d(
                grid, w["encoder.down_layers.0.conv.weight"], w["encoder.down_layers.0.conv.bias"], stride=2, padding=1
            )
            short = F.pixel_unshuffle(grid, 2).reshape(B, 32, 4, h // 2, v // 2).mean(2)
            y = torch.cat([y[:, :5], (down + short).flatten(2).mT], 1)
            angles = published_angles(5, h // 2, v // 2, 4)
    z = rms(y[:, :5], w["encoder.norm_out.weight"]) @ w["encoder.proj_out.weight"].T + w["encoder.proj_out.bias"]
    bits = (torch.sigmoid(z @ w["quantizer.proj.0.weight"].T + w["quantizer.proj.0.bias"]) > 0.5).float()

    z_q = rms(bits @ w["quantizer.embed"], w["decoder.input_layer.0.weight"])
    latents = z_q @ w["decoder.input_layer.1.weight"].T + w["decoder.input_layer.1.bias"]
    y = torch.cat([latents, w["decoder.mask_tokens"].expand(B, h * v // 4, -1)], 1)
    angles = published_angles(5, h // 2, v // 2, 4)
    for i in range(2):
        y = published_block(y, w, f"decoder.transformer_blocks.{i}", angles)
        if i == 0:
            grid = y[:, 5:].mT.reshape(B, 48, h // 2, v // 2)
            up = F.conv2d(grid, w["decoder.up_layers.0.conv.weight"], w["decoder.up_layers.0.conv.bias"], padding=1)
            up = F.pixel_shuffle(up, 2) + F.pixel_shuffle(grid.repeat_interleave(4, 1), 2)
            y = torch.cat([y[:, :5], up.flatten(2).mT], 1)
            angles = published_angles(5, h, v, 8)
    pixels = rms(y[:, 5:], w["decoder.norm_out.weight"]) @ w["to_pixel.weight"].T + w["to_pixel.bias"]
    pixels = pixels.view(B, h, v, 4, 4, 3)  # row in the patch, column in the patch, channel
    return bits, pixels.permute(0, 5, 1, 3, 2, 4).reshape(B, 3, H, W)


def test_loaded_weights_give_the_published_bits_and_pixels(tmp_path: Path):
    state = published_state()
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "model.safetensors")
    tok = load_instella(tmp_path / "model.safetensors", SMALL)
    x = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        bits, pixels = published_forward(x * 2 - 1, state)
        found = tok(x)
    assert 0.2 < float(bits.mean()) < 0.8 and not torch.equal(bits[0], bits[1])
    assert torch.equal(tok.quantizer.bits(found.quantized.codes).float(), bits)  # type: ignore[operator]
    assert float(pixels.std()) > 0.1
    assert torch.allclose(found.x_hat, pixels / 2 + 0.5, atol=1e-5)
    assert torch.equal(tok.encode(x).codes, found.quantized.codes)
    with torch.no_grad():
        other = load_instella(state, {**SMALL, "rope": "rotary"})(x)
    assert not torch.allclose(other.x_hat, found.x_hat, atol=1e-2)  # a corrected rotation does not fit the weights


def test_names_and_counts_of_the_published_size():
    with torch.device("meta"):
        tok = Binary1D(**PUBLISHED)
    found = {"mask_token": 1024, "latents": 128 * 768}
    W, D = 768, 1024
    block = lambda w: 4 * w * w + 3 * w * 4 * w + 2 * w + 128  # noqa: E731
    encoder = 12 * block(W) + 768 * 768 + W + found["latents"] + 9 * W * W + W + W + W * W + W
    decoder = 16 * block(D) + W + W * D + D + found["mask_token"] + 9 * D * 4 * D + 4 * D + D
    quantizer = 2 * 64 * W + 64
    total = encoder + decoder + quantizer + D * 768 + 768
    assert sum(p.numel() for p in tok.parameters()) == total
    assert (round(encoder / 1e6), round(decoder / 1e6), round(total / 1e6)) == (120, 307, 428)
    names = published_names(12, 16)
    assert set(names) == set(tok.state_dict())
    assert len({n for sources in names.values() for n in sources}) == 20 + 28 * 11


def test_a_training_head_is_passed_over_and_other_names_are_errors():
    state = published_state()
    repa = {"decoder.repa_proj.0.weight": torch.zeros(48, 48)}
    assert convert_instella(state | repa, 3, 2).keys() == convert_instella(state, 3, 2).keys()
    with pytest.raises(ValueError, match=r"unexpected \['decoder.extra'\]"):
        convert_instella(state | {"decoder.extra": torch.zeros(1)}, 3, 2)
    del state["quantizer.embed"]
    with pytest.raises(ValueError, match=r"Instella-T2I: .*missing \['quantizer.embed'\]"):
        convert_instella(state, 3, 2)
    with pytest.raises(ValueError, match=r"missing \['encoder.transformer_blocks.3"):
        convert_instella(published_state(), 4, 2)
    with pytest.raises(ValueError, match=r"weights do not fit Binary1D .* expected"):
        load_instella(published_state(), {**SMALL, "num_bits": 16})
    with pytest.raises(ValueError, match="expected a file"):
        load_instella("nowhere/model.safetensors", SMALL)
