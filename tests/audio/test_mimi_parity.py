"""Mimi against transformers' MimiModel from random configs, and what ours adds: batches, lengths, training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmtok.audio.mimi import Mimi
from mmtok.audio.released.mimi import convert_mimi, load_mimi, mimi_config
from mmtok.quantizers.codebook import Codebook

transformers = pytest.importorskip("transformers")

CONFIGS: dict[str, dict[str, Any]] = {
    "one acoustic level": {"upsampling_ratios": [3, 2], "num_quantizers": 2, "num_hidden_layers": 1},
    "odd strides": {"upsampling_ratios": [5, 3], "sliding_window": 5},
    "published strides": {"upsampling_ratios": [8, 6, 5, 4], "num_filters": 2, "sliding_window": 4},
}


def released(name: str) -> Any:
    """A MimiModel whose weights all matter: the real initialization leaves the transformers close to the identity."""
    config = transformers.MimiConfig(
        **{
            "hidden_size": 16,
            "num_filters": 4,
            "num_hidden_layers": 2,
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "codebook_size": 32,
            "codebook_dim": 8,
            "vector_quantization_hidden_dimension": 8,
            "num_quantizers": 5,
            "upsample_groups": 16,
            "sliding_window": 6,
        }
        | CONFIGS[name]
    )
    torch.manual_seed(3)
    model = transformers.MimiModel(config).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "layer_scale" in key or "layernorm" in key:
                p.copy_(0.5 + torch.rand_like(p))
            elif "_transformer" in key:
                p.copy_(1.5 * torch.randn_like(p) * p.shape[1] ** -0.5)
        latents = model.encoder(sound(4, 1, 20 * config.frame_size)).latents  # (4, D, 20)
        last = model.decoder.decoder_seanet.layers[-1].conv
        last.weight.div_(2 * model.decoder(latents).audio_values.std())  # a waveform of usual size
        for branch in ("semantic", "acoustic"):
            quantizer = getattr(model.quantizer, f"{branch}_residual_vector_quantizer")
            rest = quantizer.input_proj(latents).transpose(1, 2).flatten(0, 1)  # (80, d)
            for layer in quantizer.layers:  # each book lies among the residuals that it is to code
                book = layer.codebook
                book.cluster_usage.copy_(5 * torch.rand_like(book.cluster_usage))
                book.cluster_usage[0] = 0.0  # a dead code: its sum is divided by the floor
                book.embed_sum.copy_(rest[torch.randperm(80)[:32]] * book.cluster_usage[:, None].clamp_min(1e-5))
                book._embed = None
                rest = rest - book.decode(book.encode(rest)) + 0.1 * rest.std() * torch.randn_like(rest)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Mimi, Path]:
    model, folder = released(request.param), tmp_path_factory.mktemp("mimi")
    model.save_pretrained(folder)
    return model, load_mimi(folder), folder


def sound(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])).mul(0.25).clamp(-1, 1)


def pad(x: Tensor, hop: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % hop))


@torch.no_grad()
def test_codes_are_identical_and_sound_agrees(pair: tuple[Any, Mimi, Path]):
    model, mimi, _ = pair
    hop = mimi.hop_length
    assert hop == model.config.frame_size and not mimi.training
    for x in (sound(1, 1, 30 * hop), sound(3, 1, 7 * hop), sound(2, 1, hop), torch.zeros(1, 1, 3 * hop)):
        lengths = torch.full((len(x),), x.shape[-1] // hop)
        codes = model.encode(x).audio_codes
        assert torch.equal(mimi.encode_samples(x, lengths * hop, None), codes)
        for Q in range(1, codes.shape[1] + 1):
            assert torch.equal(mimi.encode_samples(x, lengths * hop, Q), codes[:, :Q])
            theirs = model.decode(codes[:, :Q]).audio_values
            ours = mimi.decode_samples(codes[:, :Q], lengths)
            assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-4)
    codes = model.encode(sound(1, 1, 30 * hop)).audio_codes
    assert all(len(codes[:, q].unique()) > 5 for q in range(codes.shape[1]))  # the books really choose


@torch.no_grad()
def test_odd_lengths(pair: tuple[Any, Mimi, Path]):
    """A clip is filled up with zeros; transformers fills the input of every layer, which only its last frame sees."""
    model, mimi, _ = pair
    hop, last_frames = mimi.hop_length, []
    for L in (1, hop - 1, hop + 1, 4 * hop - 3, 9 * hop + hop // 2):
        x = sound(1, 1, L)
        tokens = mimi.encode(x[0].numpy(), mimi.sample_rate)
        padded, raw = model.encode(pad(x, hop)).audio_codes, model.encode(x).audio_codes
        assert torch.equal(tokens.codes, padded) and raw.shape == padded.shape
        assert torch.equal(tokens.codes[..., :-1], raw[..., :-1])
        last_frames.append(torch.equal(tokens.codes[..., -1], raw[..., -1]))
        y = mimi.decode(tokens)
        assert isinstance(y, Tensor) and y.shape == (1, 1, L)
        assert torch.allclose(y, model.decode(padded).audio_values[..., :L], atol=1e-4)
    assert not all(last_frames)


@torch.no_grad()
def test_unequal_clips_are_what_they_are_alone(pair: tuple[Any, Mimi, Path]):
    _, mimi, _ = pair
    hop = mimi.hop_length
    clips = [sound(1, L).numpy() for L in (3, 9 * hop + 5, 4 * hop, 12 * hop - 1)]
    batch = mimi.encode(clips, mimi.sample_rate)
    together = mimi.decode(batch)
    for i, clip in enumerate(clips):
        alone = mimi.encode(clip, mimi.sample_rate)
        T = int(alone.lengths[0])
        assert int(batch.lengths[i]) == T and torch.equal(batch.codes[i, :, :T], alone.codes[0])
        assert torch.allclose(together[i], mimi.decode(alone)[0], atol=1e-5)
    frames = torch.tensor([9, 2])
    x = sound(2, 1, 9 * hop)  # noise behind the second item's end, not zeros
    codes, alone = (
        mimi.encode_samples(x, frames * hop, None),
        mimi.encode_samples(x[1:, :, : 2 * hop], frames[1:], None),
    )
    assert torch.equal(codes[1:, :, :2], alone)
    y = mimi.decode_samples(codes, frames)
    assert torch.allclose(y[1:, :, : 2 * hop], mimi.decode_samples(alone, frames[1:]), atol=1e-5)


def test_a_second_is_13_frames(tmp_path: Path):
    model = released("published strides")
    model.save_pretrained(tmp_path)
    tokens = load_mimi(tmp_path).encode(sound(1, 24000).numpy(), 24000)
    assert tokens.codes.shape == (1, 5, 13) and tokens.spec.frame_rate == 12.5
    assert model.encode(sound(1, 1, 24000)).audio_codes.shape == (1, 5, 13)


def test_config_and_weights_rebuild_it(pair: tuple[Any, Mimi, Path]):
    _, mimi, _ = pair
    twin = Mimi(**json.loads(json.dumps(mimi.config)))
    twin.load_state_dict(mimi.state_dict())
    clip = sound(1, 6 * mimi.hop_length).numpy()
    assert torch.equal(twin.encode(clip, 24000).codes, mimi.encode(clip, 24000).codes)
    assert twin.eval().fingerprint == mimi.fingerprint


def test_names_in_memory_and_the_running_sums(pair: tuple[Any, Mimi, Path]):
    model, mimi, _ = pair
    state = convert_mimi(model.state_dict(), mimi)  # these names carry the two halves that saved files leave out
    assert state.keys() == mimi.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in mimi.state_dict().items())
    theirs = model.quantizer.acoustic_residual_vector_quantizer.layers[0].codebook
    book = mimi.quantizer.acoustic.books[0]
    assert isinstance(book, Codebook) and torch.equal(book.codebook, theirs.embed)
    assert bool(book.initialized)
    assert torch.equal(book.cluster_size, theirs.cluster_usage) and torch.equal(book.codebook_sum, theirs.embed_sum)


def kyutai_state(state: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Saved tensors under the names of kyutai's file, queries and keys in its order of channels."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        name = re.sub(r"^(en|de)coder\.layers\.", r"\1coder.model.", key)
        if name.startswith(("encoder.model", "decoder.model")):
            up = name.startswith("decoder") and value.ndim == 3 and name.count(".") == 4 and value.shape[2] % 2 == 0
            bias_of_up = name.endswith("bias") and state[key.replace("bias", "weight")].shape[2] % 2 == 0
            kind = "convtr" if up or (bias_of_up and name.startswith("decoder")) else "conv"
            name = name.replace(".conv.", f".{kind}.{kind}.")
        name = name.replace("downsample.conv.", "downsample.conv.conv.conv.")
        name = name.replace("upsample.conv.", "upsample.convtr.convtr.convtr.")
        name = name.replace("_transformer.layers.", "_transformer.transformer.layers.")
        for ours, theirs in (("mlp.fc", "linear"), ("input_layernorm", "norm1"), ("post_attention_layernorm", "norm2")):
            name = name.replace(ours, theirs)
        name = name.replace("self_attn_layer_scale", "layer_scale_1").replace("mlp_layer_scale", "layer_scale_2")
        name = name.replace("self_attn.o_proj", "self_attn.out_proj")
        for branch, short in (("semantic", "first"), ("acoustic", "rest")):
            name = name.replace(f"{branch}_residual_vector_quantizer.layers", f"rvq_{short}.vq.layers")
            name = name.replace(f"{branch}_residual_vector_quantizer.", f"rvq_{short}.")
        name = name.replace("codebook.embed_sum", "_codebook.embedding_sum").replace(
            "codebook.cluster_usage", "_codebook.cluster_usage"
        )
        name = name.replace("codebook.initialized", "_codebook._initialized")
        match = re.match(r"(.*self_attn\.)([qkv])_proj\.weight", name)
        if match is None:
            out[name] = value
            continue
        if match[2] != "v":  # half-split rows back to neighbouring pairs, one head after another
            heads = value.view(num_heads, 2, -1, value.shape[1])
            value = torch.stack([heads[:, 0], heads[:, 1]], 2).reshape(value.shape)
        joined = f"{match[1]}in_proj_weight"
        before = out.get(joined, torch.zeros(3, *value.shape)).view(3, *value.shape).clone()
        before["qkv".index(match[2])] = value
        out[joined] = before.flatten(0, 1)
    return out


def test_kyutais_own_names(pair: tuple[Any, Mimi, Path], tmp_path: Path):
    _, mimi, folder = pair
    state = kyutai_state(load_file(folder / "model.safetensors"), 2)
    for name in (
        "encoder.model.0.conv.conv.weight",
        "encoder.model.1.block.1.conv.conv.bias",
        "decoder.model.2.convtr.convtr.weight",
        "decoder.model.2.convtr.convtr.bias",
        "downsample.conv.conv.conv.weight",
        "upsample.convtr.convtr.convtr.weight",
        "encoder_transformer.transformer.layers.0.self_attn.in_proj_weight",
        "decoder_transformer.transformer.layers.0.layer_scale_2.scale",
        "quantizer.rvq_first.vq.layers.0._codebook.embedding_sum",
        "quantizer.rvq_rest.input_proj.weight",
    ):  # as other readers of kyutai's file know them
        assert name in state
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "tokenizer.safetensors")
    config = {k: v for k, v in mimi.config.items() if k not in ("semantic_dim", "chunk_seconds")}
    found = load_mimi(tmp_path / "tokenizer.safetensors", {**config, "semantic_dim": 3})  # the head is not published
    own = {k: v for k, v in found.state_dict().items() if not k.startswith("semantic_head.")}
    assert own.keys() == mimi.state_dict().keys()
    assert all(torch.equal(value, own[key]) for key, value in mimi.state_dict().items())


def test_damaged_and_other_folders_are_refused(pair: tuple[Any, Mimi, Path], tmp_path: Path):
    _, mimi, folder = pair
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"missing \['upsample.conv.weight'\] \(1\), unexpected \['extra'\] \(1\)"):
        convert_mimi({k: v for k, v in state.items() if not k.startswith("up")} | {"extra": torch.ones(1)}, mimi)
    with pytest.raises(ValueError, match=r"wrong \['down.conv.weight \(16, 16, 3\), expected \(16, 16, 4\)'\]"):
        convert_mimi(state | {"downsample.conv.weight": torch.ones(16, 16, 3)}, mimi)
    for change in (
        {"use_conv_shortcut": True},
        {"num_key_value_heads": 1},
        {"rope_theta": 5000.0},
        {"pad_mode": "reflect"},
    ):
        ((key, value),) = change.items()
        rope = config["rope_parameters"] | (change if key == "rope_theta" else {})
        with pytest.raises(ValueError, match=rf"Mimi: expected .*{key}.*got .*{key}.*{value}"):
            mimi_config(config | {"rope_parameters": rope} | change)
    with pytest.raises(ValueError, match="expected codebook_dim other than hidden_size 8, got 8"):
        mimi_config(config | {"hidden_size": 8, "upsample_groups": 8, "head_dim": 4})
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "encodec"}))
    with pytest.raises(ValueError, match="expected model_type 'mimi', got 'encodec'"):
        load_mimi(tmp_path)
    with pytest.raises(ValueError, match="the config lacks 'sliding_window'"):
        mimi_config({k: v for k, v in config.items() if k != "sliding_window"})
    with pytest.raises(ValueError, match=r"config.json: expected the config.json that transformers saves"):
        load_mimi(tmp_path / "..")
    with pytest.raises(ValueError, match="weights: expected a file"):
        load_mimi(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="config: expected none for a folder"):
        load_mimi(folder, mimi.config)


def test_the_published_size():
    with torch.device("meta"):
        mimi, theirs = Mimi(), transformers.MimiModel(transformers.MimiConfig())
    count = sum(p.numel() for p in mimi.parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) == 79_308_609
    assert mimi_config(theirs.config.to_dict()) == {k: mimi.config[k] for k in mimi_config(theirs.config.to_dict())}
    assert mimi.hop_length == 1920 and mimi.base_spec().frame_rate == 12.5 and mimi.base_spec().num_codebooks == 32
    state = theirs.state_dict()
    assert {k: v.shape for k, v in convert_mimi(state, mimi).items()} == {
        k: v.shape for k, v in mimi.state_dict().items()
    }


def tiny(**more: Any) -> Mimi:
    torch.manual_seed(0)
    return Mimi(24000, (2, 3), 4, 16, 1, 2, 16, 6, 3, 16, 8, **more)


def test_a_training_step_reaches_every_weight():
    mimi, T = tiny(semantic_dim=5), 10
    mimi.train()
    x, target = sound(4, 1, T * mimi.hop_length), sound(4, T, 5)
    mask = torch.arange(T) < torch.tensor([T, T, 4, 7])[:, None]
    out = mimi(x, mask, target)
    assert out.x_hat.shape == x.shape and out.quantized.codes.shape == (4, 3, T) and list(out.aux) == ["semantic"]
    (out.x_hat - x).square().mean().add(out.quantized.loss).add(out.aux["semantic"]).backward()
    idle = [name for name, p in mimi.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)]
    assert not idle
    assert not mimi(x).aux  # no target, no loss


def test_the_distillation_loss_is_the_cosine_distance_of_level_one():
    mimi, T = tiny(semantic_dim=5), 8
    x, target = sound(2, 1, T * mimi.hop_length), sound(2, T, 5)
    mimi.train()(x)
    mimi.eval()
    mask = torch.arange(T) < torch.tensor([T, 3])[:, None]
    out = mimi(x, mask, target)
    assert mimi.semantic_head is not None
    z_first = mimi.quantizer.decode(out.quantized.codes[:, :1])  # what the semantic level alone decodes to
    found = np.asarray(mimi.semantic_head(z_first).detach(), dtype=np.float64)
    t = np.asarray(target, dtype=np.float64)
    cosine = (found * t).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(t, axis=-1)
    assert out.aux["semantic"].item() == pytest.approx((1 - cosine)[mask.numpy()].mean(), abs=1e-5)
    out.aux["semantic"].backward()
    learns = {name for name, p in mimi.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}
    assert {"semantic_head.weight", "quantizer.semantic_out.weight", "encoder.first.conv.weight"} <= learns
    assert not any("acoustic" in name or name.startswith("decoder") for name in learns)
    with pytest.raises(ValueError, match=r"semantic_target: expected shape \(2, 8, 5\).*got \(2, 7, 5\)"):
        mimi(x, mask, target[:, :7])
    with pytest.raises(ValueError, match="build with semantic_dim="):
        tiny()(x, mask, target)


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="width: expected an even number of channels of at least 2, got 3"):
        Mimi(strides=(2,), width=3, dim=16, depth=1, num_heads=2, mlp_dim=16, codebook_size=16, codebook_dim=8)
