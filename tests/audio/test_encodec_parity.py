"""EnCodec against transformers' EncodecModel: networks of every kind, codes and sound of the mono models."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmtok.audio.encodec import ENCODEC_24KHZ, ENCODEC_32KHZ, EnCodec
from mmtok.audio.released.encodec import (
    convert_encodec,
    convert_encodec_networks,
    encodec_shape,
    load_encodec,
    num_codebooks,
)
from mmtok.layers.conv1d import Past
from mmtok.layers.seanet_lstm import LstmDecoder, LstmEncoder, SEANetShape
from mmtok.tokens import Tokens

transformers: Any = pytest.importorskip("transformers")

HOP = 24  # strides 4, 3, 2 of the decoder
CAUSAL = {"use_causal_conv": True}
CENTRED = {"use_causal_conv": False}
GROUPED = {"use_causal_conv": False, "norm_type": "time_group_norm"}
OTHER = {  # every size that the published models leave alone
    "pad_mode": "constant",
    "use_conv_shortcut": False,
    "num_residual_layers": 2,
    "kernel_size": 5,
    "last_kernel_size": 3,
    "num_lstm_layers": 1,
}
KINDS = {
    "causal": CAUSAL,
    "centred": CENTRED,
    "grouped": GROUPED,
    "causal-grouped": CAUSAL | {"norm_type": "time_group_norm"},
    "causal-other": CAUSAL | OTHER,
    "centred-deep": CENTRED | {"num_residual_layers": 2, "residual_kernel_size": 5, "compress": 4},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def released(folder: Path | None, changes: dict, channels: int = 1) -> Any:
    """A random model whose latents and codebooks have spread; saved into ``folder``."""
    torch.manual_seed(3)
    sizes = {"num_filters": 4, "hidden_size": 8, "upsampling_ratios": [4, 3, 2], "codebook_size": 32}
    rates = {"sampling_rate": 2400, "target_bandwidths": [0.5, 1.0, 1.5, 2.0, 2.5]}  # 100 Hz, 5 bits: 1 to 5 levels
    config = transformers.EncodecConfig(audio_channels=channels, **sizes, **rates, **changes)
    model = transformers.EncodecModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lstm" in name or name.endswith("bias"):
                p.normal_(std=0.2)
            elif name.endswith("original0"):
                p.mul_(1.7)  # against what ELU takes, or the latent hardly moves
            elif ".norm." in name:
                p.uniform_(0.5, 1.5)
        z = model.encoder(noise(1, channels, 60 * HOP))
        for q, layer in enumerate(model.quantizer.layers):
            layer.codebook.embed.copy_(torch.randn(32, 8) * z.std((0, 2)) * 0.6**q + (z.mean((0, 2)) if q == 0 else 0))
    if folder is not None:
        model.save_pretrained(folder)
    return model


def noise(*shape: int) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.5).clamp(-1, 1)


def decoded(tokenizer: EnCodec, tokens: Tokens) -> Tensor:
    y = tokenizer.decode(tokens)
    assert isinstance(y, Tensor)
    return y


@each_kind
@torch.no_grad()
def test_codes_and_sound_are_those_of_transformers(tmp_path: Path, kind: str):
    theirs = released(tmp_path, KINDS[kind])
    ours = load_encodec(tmp_path)
    used = set()
    for T in (1, 2, 8, 41):  # 1 and 2 frames are shorter than what the edges reflect
        x = noise(1, T * HOP)
        for rate, levels in zip(theirs.config.target_bandwidths, range(1, 6), strict=True):
            expected = theirs.encode(x[None], bandwidth=rate)
            codes = expected.audio_codes[0]
            assert codes.shape == (1, levels, T)
            tokens = ours.encode(x, sample_rate=2400, num_codebooks=levels)
            assert torch.equal(tokens.codes, codes)
            sound = theirs.decode(expected.audio_codes, expected.audio_scales).audio_values
            assert T < 8 or sound.std() > 0.1
            torch.testing.assert_close(decoded(ours, tokens), sound, atol=1e-4, rtol=0)
        used |= set(codes.flatten().tolist())
    assert len(used) > 16  # of 32: the codes are no constant


@each_kind
@torch.no_grad()
def test_any_length_is_reflected_to_whole_frames_in_each_layer_as_in_transformers(tmp_path: Path, kind: str):
    theirs = released(tmp_path, KINDS[kind])
    ours = load_encodec(tmp_path)
    for L in (1, HOP - 1, HOP + 1, 9 * HOP - 7, 20 * HOP + 5):
        x = noise(1, 1, L)
        z = ours.latent(x)
        assert z.shape == (1, -(-L // HOP), 8)
        torch.testing.assert_close(z.transpose(1, 2), theirs.encoder(x), atol=1e-4, rtol=0)
        assert torch.equal(ours.quantizer.encode(z), theirs.encode(x, bandwidth=2.5).audio_codes[0])
    x = noise(1, 9 * HOP - 7)  # the tokenizer pads to whole frames instead, and gives back the clip's own length
    tokens = ours.encode(x, sample_rate=2400)
    padded = torch.nn.functional.pad(x, (0, 7))[None]
    assert torch.equal(tokens.codes, theirs.encode(padded, bandwidth=2.5).audio_codes[0])
    assert decoded(ours, tokens).shape == (1, 1, 9 * HOP - 7)


@torch.no_grad()
def test_the_networks_of_the_stereo_model_are_those_of_transformers():
    """As encodec_48khz: stereo, group norm over time, not causal. Pieces and loudness are around them."""
    theirs = released(None, GROUPED | {"normalize": True, "chunk_length_s": 1.0, "overlap": 0.01}, channels=2)
    shape = SEANetShape(**encodec_shape(theirs.config.to_dict()))
    networks = nn.ModuleDict({"encoder": LstmEncoder(2, 8, shape), "decoder": LstmDecoder(2, 8, shape)})
    networks.load_state_dict(convert_encodec_networks(theirs.state_dict(), networks, shape))
    for L in (HOP, 10 * HOP + 3):
        x = noise(2, 2, L)
        z = networks["encoder"](x)
        torch.testing.assert_close(z, theirs.encoder(x), atol=1e-4, rtol=0)
        y = networks["decoder"](z)
        assert y.shape[:2] == (2, 2)
        torch.testing.assert_close(y, theirs.decoder(z), atol=1e-4, rtol=0)


@each_kind
@torch.no_grad()
def test_batches_and_pieces_equal_single_whole_clips(tmp_path: Path, kind: str):
    theirs = released(tmp_path, KINDS[kind])
    ours = load_encodec(tmp_path)
    T = 2 * max(ours.encoder.margin, ours.decoder.margin) + 11
    clips = [noise(1, n) for n in (T * HOP, 9 * HOP, 9 * HOP - 5, 1)]
    tokens = ours.encode(clips, sample_rate=2400)
    together = ours.decode(tokens)
    batch = torch.stack([clips[1], torch.nn.functional.pad(clips[2], (0, 5))])
    expected = theirs.encode(batch, bandwidth=2.5).audio_codes[0]
    assert torch.equal(ours.encode_samples(batch, torch.tensor([9, 9]) * HOP, None), expected)
    lengths = torch.tensor([T, 9, 1])
    codes = torch.cat([tokens.codes[:2], tokens.codes[3:]])
    joined = ours.decode_samples(codes, lengths)
    for i, n in enumerate(lengths.tolist()):
        alone = ours.decode_samples(codes[i : i + 1, :, :n], lengths[i : i + 1])
        torch.testing.assert_close(joined[i : i + 1, :, : n * HOP], alone, atol=1e-5, rtol=0)
    ours.chunk_frames = 4
    assert torch.equal(ours.encode(clips, sample_rate=2400).codes, tokens.codes)
    for i, clip in enumerate(clips):
        alone = ours.encode(clip, sample_rate=2400)
        assert torch.equal(tokens[i].codes, alone.codes)
        torch.testing.assert_close(decoded(ours, alone)[0], together[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["causal", "causal-other"])
@torch.no_grad()
def test_a_stream_equals_the_whole(tmp_path: Path, kind: str):
    released(tmp_path, KINDS[kind])
    ours = load_encodec(tmp_path)
    assert ours.lead == (7 if kind == "causal" else 1) and ours.streams == (kind != "causal")
    for T, cuts in ((40, (1, 1, 0, 4, 2, 20, 5, 7)), (40, (40,)), (3, (1, 2)), (1, (1,))):
        x = noise(2, 1, T * HOP)
        whole = ours.encode_samples(x, torch.tensor([T, T]) * HOP, 3)
        sound = ours.decode_samples(whole, torch.tensor([T, T]))
        forth, back, codes, parts = Past(), Past(), [], []
        for piece in x.split([n * HOP for n in cuts], -1):
            codes.append(ours.encode_stream(piece, forth, 3))
            parts.append(ours.decode_stream(codes[-1], back))
        assert codes[0].shape[-1] == (cuts[0] if cuts[0] >= ours.lead else 0)
        codes.append(ours.encode_stream(x[..., :0], forth, 3, final=True))
        parts.append(ours.decode_stream(codes[-1], back, final=True))
        assert torch.equal(torch.cat(codes, -1), whole)
        torch.testing.assert_close(torch.cat(parts, -1), sound, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"multiple of 24 samples, got 5"):
        ours.encode_stream(x[..., :5], Past())
    if kind == "causal":
        with pytest.raises(ValueError, match=r"reflects the beginning .* first 7 frames"):
            ours.streamer()


def test_what_sees_the_end_of_a_sound_does_not_stream():
    for changes in ({"causal": False}, {"norm": "time_group_norm"}):
        ours = EnCodec(2400, 2, 8, 4, shape={"width": 4, "strides": (2, 3), **changes})
        with pytest.raises(ValueError, match=r"expected a causal model with weight norm"):
            ours.encode_stream(torch.zeros(1, 1, 60), Past())
        with pytest.raises(ValueError, match=r"past: expected"):
            ours.encoder(torch.zeros(1, 1, 60), past=Past())
        with pytest.raises(ValueError, match=r"past: expected"):
            ours.decoder.long_part(torch.zeros(1, 16, 6), past=Past())


@pytest.mark.parametrize(
    ("sizes", "changes", "millions"),
    [
        (ENCODEC_24KHZ, {}, 14.85),
        (
            ENCODEC_32KHZ,
            {
                "num_filters": 64,
                "upsampling_ratios": [8, 5, 4, 4],
                "use_causal_conv": False,
                "use_conv_shortcut": False,
                "sampling_rate": 32000,
                "target_bandwidths": [2.2],
                "codebook_size": 2048,
            },
            56.88,
        ),
    ],
    ids=["24k", "32k"],
)
def test_published_sizes_have_the_published_parameters(sizes: dict, changes: dict, millions: float):
    config = transformers.EncodecConfig(**changes)
    with torch.device("meta"):
        ours, theirs = EnCodec(**sizes), transformers.EncodecModel(config)
    assert num_codebooks(config.to_dict()) == config.num_quantizers == ours.config["num_codebooks"]
    count = sum(p.numel() for p in ours.parameters())
    # A transposed convolution has one length for each output channel here, for each input channel there.
    width, stages = ours.shape.width, len(ours.shape.strides)
    assert sum(p.numel() for p in theirs.parameters()) - count == sum(width * 2**i for i in range(stages))
    assert round(count / 1e6, 2) == millions
    found = convert_encodec(theirs.state_dict(), ours)
    assert set(found) == {k for k in ours.state_dict() if not k.endswith((".cluster_size", ".codebook_sum"))}


def test_wrong_files_are_refused_with_names(tmp_path: Path):
    state = dict(released(tmp_path, CAUSAL).state_dict())
    ours = load_encodec(tmp_path)
    lost = state.pop("encoder.layers.0.conv.bias")
    with pytest.raises(ValueError, match=r"missing \['encoder.layers.0.conv.bias'\] \(1\), unexpected \['odd'\] \(1\)"):
        convert_encodec(state | {"odd": lost}, ours)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "dac"}, "expected model_type 'encodec', got 'dac'"),
        ({"audio_channels": 2, "normalize": True}, "more than codes"),
        ({"chunk_length_s": 1.0}, "more than codes"),
        ({"trim_right_ratio": 0.5}, "expected trim_right_ratio 1"),
        ({"codebook_dim": 4}, "expected codebook_dim 8"),
        ({"num_filters": 8}, "do not fit the config"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_encodec(tmp_path)
    shapes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"norm": "layer"}, "expected norm in"),
        ({"strides": (2, 1)}, "each at least 2"),
        ({"width": 5}, "multiple of compress"),
    )
    for change, message in shapes:
        with pytest.raises(ValueError, match=message):
            SEANetShape(**change)


def test_older_files_with_plain_weight_norm_names_load(tmp_path: Path):
    """The published files of 2023 say weight_g and weight_v."""
    theirs = released(tmp_path, CENTRED)
    ours = load_encodec(tmp_path)
    pairs = (("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v"))
    old = {}
    for key, value in theirs.state_dict().items():
        for new, before in pairs:
            key = key.replace(new, before)
        old[key] = value
    assert any(key.endswith("weight_g") for key in old)
    found = convert_encodec(old, ours)
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in found.items())


@pytest.mark.parametrize("causal", [True, False])
def test_a_training_step_moves_everything_and_a_copy_gives_the_same_codes(tmp_path: Path, causal: bool):
    shape = {"width": 4, "strides": (2, 3), "causal": causal, "lstm_layers": 1}
    ours = EnCodec(2400, 3, 8, 4, shape=shape, quantizer_dropout=0.0)
    x = noise(2, 1, 60 * 6)
    mask = torch.arange(60) < torch.tensor([[60], [40]])
    out = ours.train()(x, mask)
    assert out.x_hat.shape == x.shape
    ((out.x_hat - x).square().mean() + out.quantized.loss).backward()
    still = [n for n, p in ours.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not still
    with torch.no_grad():
        z, alone = ours.latent(x, mask.sum(1) * 6), ours.latent(x[1:, :, : 40 * 6])
        torch.testing.assert_close(z[1:, :40], alone, atol=1e-5, rtol=0)
        if not causal:
            y = ours.sound(z, torch.tensor([60, 0]))
            assert y.shape == x.shape and y[0].any() and not y[1].any()
    assert bool(ours.state_dict()["quantizer.books.0.cluster_size"].any())  # the codebooks moved too
    tokens = ours.encode(x[0], sample_rate=2400)
    ours.save(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["type"] == "encodec" and SEANetShape(**stored["config"]["shape"]) == ours.shape
    copy = EnCodec(**stored["config"])
    copy.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    again = copy.encode(x[0], sample_rate=2400)
    assert copy.fingerprint == ours.fingerprint and torch.equal(again.codes, tokens.codes)
    assert torch.equal(decoded(copy, again), decoded(ours, tokens))


@pytest.mark.parametrize("padding", ["reflect", "constant"])
@torch.no_grad()
def test_margin_and_lead_are_what_the_networks_need_and_no_wild_overstatement(padding: str):
    shape = SEANetShape(4, (2, 3), padding=padding, causal=False, residual_layers=2)
    encoder, decoder = LstmEncoder(1, 4, shape).double(), LstmDecoder(1, 4, shape).double()
    T = 60
    x = torch.randn(1, 1, T * 6, dtype=torch.float64)
    changed = x.clone()
    changed[..., 30 * 6 : 31 * 6] += 1
    frames = (encoder.long_part(x) != encoder.long_part(changed)).any(1)[0].nonzero()[:, 0]
    assert 30 - encoder.margin <= int(frames.min()) and int(frames.max()) <= 30 + encoder.margin
    assert encoder.margin <= 2 * max(30 - int(frames.min()), int(frames.max()) - 30) + 1
    h = torch.randn(1, 16, T, dtype=torch.float64)
    changed = h.clone()
    changed[..., 30] += 1
    samples = (decoder.long_part(h) != decoder.long_part(changed)).any(1)[0].nonzero()[:, 0] // 6
    assert 30 - decoder.margin <= int(samples.min()) and int(samples.max()) <= 30 + decoder.margin
    assert decoder.margin <= 2 * max(30 - int(samples.min()), int(samples.max()) - 30) + 1
    causal = dataclasses.replace(shape, causal=True)
    expected = 7 if padding == "reflect" else 1
    assert LstmEncoder(1, 4, causal).lead == LstmDecoder(1, 4, causal).lead == expected
    assert math.prod(causal.strides) == causal.hop_length == 6
