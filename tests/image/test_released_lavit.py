"""LaVIT's published names and shapes -> Dynamic, against its forward written out in plain torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.image.dynamic import PUBLISHED, Dynamic
from mmtok.image.released.lavit import FILES, convert_lavit, decoder_names, encoder_names, load_lavit, vision_names

W, HIDDEN, N, K = 16, 69, 9, 20  # 69 = int(16 * 4.3637)
SMALL: dict[str, Any] = {
    **PUBLISHED,
    "vision": {
        **PUBLISHED["vision"],
        "image_size": 12,
        "depth": 2,
        "arguments": {"embed_dim": W, "num_heads": 2, "patch_size": 4},
    },
    "merger": (W, 2, 2),
    "decoder": (W, 1, 2),
    "code_dim": 4,
    "quantizer": {"type": "vq", "codebook_size": K, "commitment_weight": 0.0},
}
States = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


def fused_block(name: str, own: str, cross: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one block of merger or decoder."""
    layers = {f"{own}.qkv": (3 * width, width), f"{own}.proj": (width, width)}
    layers |= {f"{cross}.{n}": (width, width) for n in ("query", "key", "value", "proj")}
    layers |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.{k}.weight": v for k, v in layers.items()}
    shapes |= {f"{name}.{k}.bias": v[:1] for k, v in layers.items()}
    return shapes | {f"{name}.norm{i}.{part}": (width,) for i in range(3) for part in ("weight", "bias")}


def shapes(
    width: int, hidden: int, patches: int, codes: int, code_dim: int, patch: int, vision_hidden: int, depths: tuple
) -> tuple[dict[str, tuple[int, ...]], ...]:
    """Published names and shapes of the three files as the facts state them."""

    def linear(name: str, out: int, inside: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    encoder = norm("token_predictor.in_conv.0") | linear("token_predictor.in_conv.1", width, width)
    for i, (out, inside) in {0: (2, 1), 2: (4, 2), 4: (0, 4)}.items():
        encoder |= linear(f"token_predictor.out_conv.{i}", width // out if out else 2, width // inside)
    for i in range(depths[0]):
        block = f"causal_encoder.blocks.{i}"
        encoder |= fused_block(block, "token_causal_attn", "token_cross_attn", width, hidden)
    encoder |= norm("causal_encoder.ln_vision") | norm("causal_encoder.norm")
    encoder |= linear("encode_task_layer.0", width, width) | linear("encode_task_layer.2", code_dim, width)
    encoder |= {"quantize.embedding.weight": (codes, code_dim)} | linear("vit_proj", 4096, width)
    decoder = linear("in_proj", width, code_dim) | norm("norm") | linear("unet_proj", 768, width)
    decoder |= {"pos_embed": (1, patches, width), "query_embed": (1, patches, width)}
    for i in range(depths[1]):
        decoder |= fused_block(f"blocks.{i}", "self_attn", "cross_attn", width, hidden)
    decoder |= linear("decode_task_layer.0", width, width) | linear("decode_task_layer.2", width, width)
    vision: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width), "pos_embed": (1, patches + 1, width)}
    vision |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    for i in range(depths[2]):
        block = f"blocks.{i}"
        vision |= norm(f"{block}.norm1") | norm(f"{block}.norm2") | linear(f"{block}.attn.proj", width, width)
        vision |= {f"{block}.attn.q_bias": (width,), f"{block}.attn.v_bias": (width,)}
        vision |= {f"{block}.attn.qkv.weight": (3 * width, width)}
        vision |= linear(f"{block}.mlp.fc1", vision_hidden, width) | linear(f"{block}.mlp.fc2", width, vision_hidden)
    return encoder, decoder, vision | norm("norm") | linear("head", 1024, width)


def small_states() -> States:
    generator = torch.Generator().manual_seed(0)
    states = []
    for table in shapes(W, HIDDEN, N, K, 4, 4, 69, (2, 1, 2)):
        state = {}
        for name, shape in table.items():
            scale = 0.2 if len(shape) == 1 else 0.9 / math.sqrt(math.prod(shape[1:]))
            gain = 1.0 if "norm" in name or "ln_vision" in name or "in_conv.0" in name else 0.0
            state[name] = torch.randn(shape, generator=generator) * scale + gain * name.endswith("weight")
        states.append(state)
    states[0]["quantize.embedding.weight"] = F.normalize(states[0]["quantize.embedding.weight"], dim=-1)
    return states[0], states[1], states[2]


# --- the published forward, from the facts alone ---


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x: Tensor, w: dict[str, Tensor], name: str, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, (W,), w[f"{name}.weight"], w[f"{name}.bias"], eps)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(T, 16) each, two heads of 8; with a mask (R, K) of 0 and 1 the released softmax with policy."""
    out = []
    for part in (slice(0, 8), slice(8, 16)):
        scores = q[:, part] @ k[:, part].T / math.sqrt(8)
        if mask is None:
            shares = scores.softmax(-1)
        else:
            e = (scores - scores.max(-1, keepdim=True).values).exp() * mask
            shares = (e + 1e-6 / N) / (e.sum(-1, keepdim=True) + 1e-6)
        out.append(shares @ v[:, part])
    return torch.cat(out, -1)


def published_vision(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """One normalised picture (3, 12, 12) -> (9, 16): features before the final norm, without the class token."""
    h = F.conv2d(x[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=4)[0].flatten(1).T
    h = torch.cat([w["cls_token"][0], h]) + w["pos_embed"][0]
    for i in range(2):
        y = norm(h, w, f"blocks.{i}.norm1", 1e-6)
        bias = torch.cat([w[f"blocks.{i}.attn.q_bias"], torch.zeros(W), w[f"blocks.{i}.attn.v_bias"]])
        q, k, v = (y @ w[f"blocks.{i}.attn.qkv.weight"].T + bias).chunk(3, -1)
        h = h + linear(attention(q, k, v), w, f"blocks.{i}.attn.proj")
        y = F.gelu(linear(norm(h, w, f"blocks.{i}.norm2", 1e-6), w, f"blocks.{i}.mlp.fc1"))
        h = h + linear(y, w, f"blocks.{i}.mlp.fc2")
    return h[1:]


def published_codes(raw: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Features (9, 16) -> probability of keeping (9,), codes and z of the patches with more than one half."""
    y = F.gelu(linear(norm(raw, w, "token_predictor.in_conv.0"), w, "token_predictor.in_conv.1"))
    y = torch.cat([y[:, :8], y[:, 8:].mean(0, keepdim=True).expand(N, 8)], -1)
    for i in (0, 2):
        y = F.gelu(linear(y, w, f"token_predictor.out_conv.{i}"))
    probability = linear(y, w, "token_predictor.out_conv.4").softmax(-1)[:, 0]
    kept = (probability > 0.5).float()
    causal = torch.ones(N, N).tril() * torch.maximum(kept[None].expand(N, N), torch.eye(N))
    context = norm(raw, w, "causal_encoder.ln_vision")
    h = raw
    for i in range(2):  # at full length, as the release runs it
        name = f"causal_encoder.blocks.{i}"
        q, k, v = linear(norm(h, w, f"{name}.norm0"), w, f"{name}.token_causal_attn.qkv").chunk(3, -1)
        h = h + linear(attention(q, k, v, causal), w, f"{name}.token_causal_attn.proj")
        cross = f"{name}.token_cross_attn"
        q = linear(norm(h, w, f"{name}.norm1"), w, f"{cross}.query")
        k, v = linear(context, w, f"{cross}.key"), linear(context, w, f"{cross}.value")
        h = h + linear(attention(q, k, v, (1 - kept).expand(N, N)), w, f"{cross}.proj")
        h = h + linear(F.gelu(linear(norm(h, w, f"{name}.norm2"), w, f"{name}.mlp.fc1")), w, f"{name}.mlp.fc2")
    h = norm(h, w, "causal_encoder.norm")[kept > 0]
    z = F.normalize(linear(linear(h, w, "encode_task_layer.0").tanh(), w, "encode_task_layer.2"), dim=-1)
    distance = (z[:, None] - w["quantize.embedding.weight"]).square().sum(-1)
    return probability, distance.argmin(1), z


def published_features(codes: Tensor, table: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Codes (T,) of one picture -> reconstructed features (9, 16)."""
    x = linear(table[codes], w, "in_proj") + w["pos_embed"][0, : len(codes)]
    h = w["query_embed"][0]
    q, k, v = linear(norm(h, w, "blocks.0.norm0"), w, "blocks.0.self_attn.qkv").chunk(3, -1)
    h = h + linear(attention(q, k, v), w, "blocks.0.self_attn.proj")
    q = linear(norm(h, w, "blocks.0.norm1"), w, "blocks.0.cross_attn.query")
    k, v = linear(x, w, "blocks.0.cross_attn.key"), linear(x, w, "blocks.0.cross_attn.value")
    h = h + linear(attention(q, k, v), w, "blocks.0.cross_attn.proj")
    h = h + linear(F.gelu(linear(norm(h, w, "blocks.0.norm2"), w, "blocks.0.mlp.fc1")), w, "blocks.0.mlp.fc2")
    return linear(linear(norm(h, w, "norm"), w, "decode_task_layer.0").tanh(), w, "decode_task_layer.2")


@pytest.fixture(scope="module")
def states() -> States:
    return small_states()


@torch.no_grad()
def test_loaded_weights_give_the_published_codes_and_features(states: States, tmp_path: Path):
    for name, state in zip(FILES, states, strict=True):
        torch.save(state, tmp_path / name)
    tok = load_lavit(tmp_path, SMALL)
    encoder, decoder, vision = states
    x = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    raw = tok.vision(x)
    tokens = tok.encode(x)
    restored = tok.reconstruct_features(tokens.codes, tokens.lengths)
    counts = []
    for i in range(4):
        expected = published_vision((x[i] - tok.vision.mean[0]) / tok.vision.std[0], vision)
        assert torch.allclose(raw[i], expected, atol=1e-4)
        probability, codes, z = published_codes(raw[i], encoder)
        assert tok.predictor is not None
        assert torch.allclose(tok.predictor(raw[i : i + 1])[0, :, 0].exp(), probability, atol=1e-5)
        counts.append(len(codes))
        assert torch.equal(tokens[i].codes[0, 0], codes)
        found, _ = tok.latent(raw[i : i + 1], tok.select(raw[i : i + 1]))
        assert torch.allclose(found[0], z, atol=1e-4)
        features = published_features(codes, encoder["quantize.embedding.weight"], decoder)
        assert torch.allclose(restored[i], features, atol=1e-4)
    assert len(set(counts)) > 2 and min(counts) < N == max(counts)  # one keeps all and reads nothing dropped


def test_the_published_names_are_those_of_the_full_model():
    with torch.device("meta"):
        state = Dynamic(**PUBLISHED).state_dict()
    tables = encoder_names(12), decoder_names(12), vision_names(40)
    ours = {k for t in tables for k in t} | {
        f"quantizer.book.{s}" for s in ("cluster_size", "codebook_sum", "initialized")
    }
    assert ours == set(state)
    for table, stated in zip(tables, shapes(1408, 6144, 256, 16384, 32, 14, 6144, (12, 12, 40)), strict=True):
        for name, sources in table.items():
            parts = [stated[s] for s in sources]
            joined = (sum(p[0] for p in parts), *parts[0][1:])
            assert joined == tuple(state[name].shape) or joined == (1, *state[name].shape), name


def test_what_has_no_place_is_passed_over_and_other_names_are_errors(states: States):
    encoder, decoder, vision = states
    whole = encoder | {f"encoder.{k}": v for k, v in vision.items()}  # a file with the vision encoder inside
    high = {k: v for k, v in decoder.items() if not k.startswith("unet")}
    high |= {"unet_proj_1.weight": torch.zeros(1), "unet_attnpool.q_proj.weight": torch.zeros(1)}
    found = convert_lavit(whole, high, vision, (2, 1, 2))
    assert found.keys() == convert_lavit(encoder, decoder, vision, (2, 1, 2)).keys()
    with pytest.raises(ValueError, match=r"LaVIT: .*unexpected \['decoder.surplus'\]"):
        convert_lavit(encoder, decoder | {"surplus": torch.zeros(1)}, vision, (2, 1, 2))
    with pytest.raises(ValueError, match=r"missing \['vision.blocks.2"):
        convert_lavit(encoder, decoder, vision, (2, 1, 3))
    with pytest.raises(ValueError, match="the weights do not fit Dynamic as configured"):
        load_lavit(states, {**SMALL, "code_dim": 8})
    with pytest.raises(ValueError, match="expected the tensors of tokenizer_encoder"):
        load_lavit(states[:2], SMALL)


def test_a_pixel_decoder_can_be_added_and_trained(states: States):
    pixels = {"image_size": 8, "patch_size": 4, "width": 8, "depth": 1, "num_heads": 2}
    tok = load_lavit(states, SMALL, pixels).train()
    before = tok.quantizer.decode(torch.arange(K)[None, None])
    out = tok(torch.rand(3, 3, 8, 8))
    out.x_hat.square().mean().backward()
    assert tok.pixel_decoder is not None and tok.pixel_decoder.to_pixel.weight.grad is not None
    assert all(p.grad is None for n, p in tok.named_parameters() if not n.startswith("pixel_decoder."))
    after = tok.quantizer.decode(torch.arange(K)[None, None])
    assert float((after - before).norm(dim=-1).median()) < 0.05  # published codes are not taken for dead ones
