"""X-Codec against transformers' XcodecModel from tiny random configs: equal codes and sound, under both key names."""

from __future__ import annotations

import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_xcodec import LEVELS, RATE, K, noise, original_state, released_model, save, transformers
from torch import Tensor
from torch.nn import functional as F

import mmtok
from mmtok.audio.released.xcodec import (
    convert_xcodec,
    convert_xcodec_original,
    load_xcodec,
    load_xcodec_original,
    xcodec_config,
)
from mmtok.audio.xcodec import XCodec, quantizer_preset
from mmtok.layers.speech import SpeechEncoder
from mmtok.quantizers.rvq_legacy import LegacyCodebook


@pytest.fixture(scope="module")
def hubert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, XCodec, Path]:
    model = released_model()
    folder = save(model, tmp_path_factory.mktemp("hubert"))
    return model, load_xcodec(folder), folder


@pytest.fixture(scope="module")
def wavlm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, XCodec, Path]:
    model = released_model("wavlm")
    folder = save(model, tmp_path_factory.mktemp("wavlm"))
    return model, load_xcodec(folder), folder


@torch.no_grad()
def released(model: Any, sounds: Tensor, kbps: float | None = None) -> tuple[Tensor, Tensor]:
    """(codes, sound) of clips (B, 1, L) of one length, through the released feature extractor's padding to the hop."""
    extractor = transformers.DacFeatureExtractor(sampling_rate=RATE, hop_length=model.config.hop_length)
    clips = [np.asarray(s[0]) for s in sounds]
    inputs = extractor(clips, sampling_rate=RATE, return_tensors="pt")["input_values"]
    codes = model.encode(inputs, kbps).audio_codes
    return codes, model.decode(codes).audio_values[..., : sounds.shape[-1]]


def assert_same(model: Any, ours: XCodec, sounds: Tensor, level: int = 4) -> None:
    """``level`` counts in target_bandwidths."""
    codes, sound = released(model, sounds, model.config.target_bandwidths[level])
    tokens = ours.encode(sounds, sample_rate=RATE, num_codebooks=codes.shape[1])
    assert torch.equal(tokens.codes, codes)
    decoded = ours.decode(tokens)
    assert isinstance(decoded, Tensor) and decoded.shape == sounds.shape
    torch.testing.assert_close(decoded, sound, rtol=0, atol=1e-4)
    assert sounds.shape[-1] < 300 or float(sound.abs().max()) > 0.05  # a silent model would agree with anything


@pytest.mark.parametrize("teacher", ["hubert", "wavlm"])
def test_codes_and_sound_are_those_of_the_released_class(teacher: str, request: pytest.FixtureRequest):
    model, ours, _ = request.getfixturevalue(teacher)
    for length in (1, 319, 320, 321, 16001, 16160):
        assert_same(model, ours, noise(length))
    for level, Q in enumerate(LEVELS):
        assert_same(model, ours, noise(1601), level)
        assert ours.encode(noise(1601), sample_rate=RATE, num_codebooks=Q).codes.shape == (1, Q, 6)
    codes = ours.encode(noise(16160), sample_rate=RATE).codes[0]  # the agreement is not that of a codebook half dead
    assert min(len(level.unique()) for level in codes) > K / 4
    assert ours.spec.frame_rate == 50 and ours.spec.codebook_sizes == (K,) * 8


@pytest.mark.parametrize("teacher", ["hubert", "wavlm"])
def test_batches_give_what_single_clips_give(teacher: str, request: pytest.FixtureRequest):
    model, ours, _ = request.getfixturevalue(teacher)
    assert_same(model, ours, noise(3333, 3))
    lengths = [1, 320, 5000, 961, 5000]  # the released class would let padding into the teacher here
    clips = [noise(n, seed=i)[0] for i, n in enumerate(lengths)]
    tokens = ours.encode(clips, sample_rate=RATE)
    decoded = ours.decode(tokens)
    assert tokens.lengths.tolist() == [-(-n // 320) for n in lengths]
    for i, clip in enumerate(clips):
        codes, sound = released(model, clip[None])
        assert torch.equal(tokens[i].codes, codes)
        torch.testing.assert_close(decoded[i], sound[0], rtol=0, atol=1e-4)


CONFIGS: dict[str, dict[str, Any]] = {
    "other orders of strides, wide units": {
        "acoustic": {"downsampling_ratios": [2, 4, 5, 8], "upsampling_ratios": [4, 5, 2, 8]},
        "unit_kernel_size": 5,
        "kernel_size": 5,
        "block_dilations": [1, 2, 3],
        "channel_ratios": [2, 3, 1],
        "strides": [1, 1, 1],
        "codebook_dim": 24,
    },
    "odd strides, a hop of 240, 67 frames a second, K no power of two": {
        "acoustic": {"downsampling_ratios": [3, 5, 16], "upsampling_ratios": [5, 3, 16], "hidden_size": 6},
        "semantic": {"conv_stride": [5, 3, 2, 2, 2, 2, 1], "conv_kernel": [10, 3, 3, 3, 3, 2, 1]},
        "codebook_size": 20,
        "target_bandwidths": [0.4, 1.3, 2],
    },
    "a hop of two teacher frames": {
        "kind": "wavlm",
        "acoustic": {"downsampling_ratios": [8, 5, 4, 4], "upsampling_ratios": [8, 5, 4, 4]},
        "strides": [1, 2],
    },
    "layer norm in the teacher, other rates": {
        "semantic": {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
        "sample_rate": 24000,
        "channel_ratios": [1],
        "strides": [1],
        "block_dilations": [2],
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_any_config_that_the_released_class_can_run(name: str, tmp_path: Path):
    model = released_model(**CONFIGS[name])
    ours = load_xcodec(save(model, tmp_path))
    x = noise(3001, 2)
    assert (ours.hop_length, ours.sample_rate) == (model.config.hop_length, model.config.sample_rate)
    for kbps in model.config.target_bandwidths:
        padded = F.pad(x, (0, -x.shape[-1] % ours.hop_length))
        with torch.no_grad():
            codes = model.encode(padded, kbps).audio_codes
            sound = model.decode(codes).audio_values[..., : x.shape[-1]]
        tokens = ours.encode(x, sample_rate=ours.sample_rate, num_codebooks=codes.shape[1])
        assert torch.equal(tokens.codes, codes)
        torch.testing.assert_close(ours.decode(tokens), sound, rtol=0, atol=1e-4)
    assert codes.shape[1] == ours.quantizer.num_codebooks > 1
    # Pieces that overlap by the receptive field give the whole, with features of a higher frame rate too.
    x = noise((ours.margin + 30) * ours.hop_length)
    whole = ours.encode(x, sample_rate=ours.sample_rate)
    ours.chunk_frames = 24
    assert torch.equal(ours.encode(x, sample_rate=ours.sample_rate).codes, whole.codes)
    out = ours(noise(4 * ours.hop_length, 2), torch.tensor([[True] * 4, [True, True, False, False]]))
    assert out.x_hat.shape == (2, 1, 4 * ours.hop_length) and bool(out.aux["semantic"] > 0)


AWAY = 24  # of 51 frames; the acoustic encoder hears 26 frames ahead


def test_raw_lengths_which_the_released_class_codes_without_its_feature_extractor(hubert: Any):
    """Given no multiple of the hop, `XcodecModel.encode` drops the end, or shifts its acoustic branch by half a frame.

    Of 16001 samples it makes 50 frames, so its output is shorter than its input: we make 51. Of 16160 the teacher sees
    51 frames and the acoustic encoder 50; the class then runs the latter again with 160 zeros on both sides, so that
    all its frames are 10 ms late. Our public path always pads to the hop first, as the released feature extractor does.
    """
    model, ours, _ = hubert
    model = copy.deepcopy(model)
    with torch.no_grad():
        x = noise(16001)
        raw, public = model.encode(x).audio_codes, ours.encode(x, sample_rate=RATE).codes
        assert raw.shape[-1] == 50 and public.shape[-1] == 51
        # Not all: the teacher's attention and group norm hear the longer end from everywhere.
        assert float((raw[:, 0, :AWAY] == public[:, 0, :AWAY]).float().mean()) > 0.9
        x = noise(16160)
        raw, public = model.encode(x).audio_codes, ours.encode(x, sample_rate=RATE).codes
        assert raw.shape == public.shape == (1, 8, 51)
        late = model.acoustic_encoder(F.pad(x, (160, 160)))
        delayed = ours.encoder(F.pad(x, (160, 0)))
        torch.testing.assert_close(delayed[..., :AWAY], late[..., :AWAY], rtol=0, atol=1e-5)
        in_time = ours.encoder(F.pad(x, (0, 160)))
        assert float((in_time - late).abs().mean()) > 0.1 * float(late.abs().mean())
        # What is left of the agreement is the teacher's half of the latent.
        assert float((raw[:, 0, :AWAY] == public[:, 0, :AWAY]).float().mean()) < 0.9


def test_prefixes_of_the_levels_decode(wavlm: Any):
    model, ours, _ = wavlm
    tokens = ours.encode(noise(2500), sample_rate=RATE)
    for Q in range(1, 9):
        with torch.no_grad():
            want = model.decode(tokens.codes[:, :Q]).audio_values[..., :2500]
        torch.testing.assert_close(ours.decode(tokens.keep(num_codebooks=Q)), want, rtol=0, atol=1e-4)


def test_saved_and_loaded_gives_the_same_codes(hubert: Any, tmp_path: Path):
    _, ours, folder = hubert
    ours = load_xcodec(folder)
    ours.save(tmp_path / "ours")
    again = mmtok.load(tmp_path / "ours")
    assert isinstance(again, XCodec) and again.spec.fingerprint == ours.spec.fingerprint
    assert torch.equal(again.encode(noise(2000), RATE).codes, ours.encode(noise(2000), RATE).codes)


# ---- key names ----


def test_the_authors_key_names_give_the_same_model(hubert: Any, tmp_path: Path):
    model, ours, folder = hubert
    state = original_state(model)
    spelled_out = """encoder.block.0.weight_g encoder.block.1.block.0.block.1.weight_g encoder.block.4.block.3.alpha
    encoder.block.4.block.4.bias encoder.block.5.alpha encoder.block.6.weight_v decoder_2.model.0.bias
    decoder_2.model.1.block.1.weight_g decoder_2.model.4.block.2.block.3.weight_v decoder_2.model.5.alpha
    encoder_semantic.conv.conv.weight encoder_semantic.conv_blocks.0.res_units.1.conv1.conv.weight
    encoder_semantic.conv_blocks.1.res_units.0.conv2.weight encoder_semantic.conv_blocks.1.conv.conv.bias
    decoder_semantic.conv1.conv.weight decoder_semantic.conv2.conv.weight fc_prior.bias fc_post1.weight fc_post2.weight
    quantizer.vq.layers.7._codebook.embed semantic_model.encoder.pos_conv_embed.conv.weight_g"""
    assert set(spelled_out.split()) <= set(state)
    converted = convert_xcodec_original(state, ours)
    assert converted.keys() == convert_xcodec(model.state_dict(), ours).keys()
    for key, value in ours.state_dict().items():
        if key in converted and not key.endswith(("cluster_size", "codebook_sum")):
            torch.testing.assert_close(converted[key].to(value.dtype), value, rtol=1e-5, atol=1e-7)
    torch.save({**state, "bytes": io.BytesIO(b"as in the released files")}, tmp_path / "xcodec.pth")
    again = load_xcodec_original(tmp_path / "xcodec.pth", XCodec(**xcodec_config(folder)))
    assert_same(model, again, noise(4801))
    with pytest.raises(ValueError, match=r"missing \['fc_prior.bias'\]"):
        convert_xcodec_original({k: v for k, v in state.items() if k != "fc_prior.bias"}, ours)
    with pytest.raises(ValueError, match=r"X-Codec: expected a tokenizer with 3 dilations and a teacher of its own"):
        convert_xcodec_original(state, XCodec(encoder_width=4, decoder_width=32, acoustic_dim=8))


def test_weight_norm_and_pickles_of_the_released_class_load(hubert: Any, tmp_path: Path):
    model, ours, folder = hubert
    model = copy.deepcopy(model)
    model.apply_weight_norm()
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    again = load_xcodec(tmp_path)
    assert torch.equal(again.encode(noise(4801), RATE).codes, ours.encode(noise(4801), RATE).codes)


def test_what_does_not_fit_is_named(hubert: Any, tmp_path: Path):
    _, ours, folder = hubert
    state = load_file(folder / "model.safetensors")
    gone = "acoustic_decoder.block.3.res_unit2.snake1.alpha"
    with pytest.raises(ValueError, match=rf"X-Codec: .*missing \['{gone}'\] \(1\), unexpected \[\] \(0\)"):
        convert_xcodec({k: v for k, v in state.items() if k != gone}, ours)
    with pytest.raises(ValueError, match=r"unexpected \['fc3.weight'\] \(1\)"):
        convert_xcodec({**state, "fc3.weight": torch.zeros(2)}, ours)
    with pytest.raises(ValueError, match=r"missing \['semantic_model.encoder.layers.1.attention.k_proj.bias'\]"):
        convert_xcodec({k: v for k, v in state.items() if "layers.1.attention.k_proj.bias" not in k}, ours)
    with pytest.raises(ValueError, match=r"join.weight \(24, 25\), expected \(24, 24\)"):
        convert_xcodec({**state, "fc.weight": torch.zeros(24, 25)}, ours)
    counters = ("cluster_size", "embed_avg", "inited", "masked_spec_embed")  # no code depends on them
    convert_xcodec({k: v for k, v in state.items() if not k.endswith(counters)}, ours)

    with pytest.raises(ValueError, match=r"config.json: expected"):
        load_xcodec(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"model_type": "dac"}, "expected model_type 'xcodec', got 'dac'"),
        ({"codebook_dim": 64}, "codebook_dim of 24 .* got 64; transformers cannot run"),
        ({"channel_ratios": [1, 2]}, "last channel ratio of 1, got 2"),
        ({"sample_rate": "fast"}, "no config of an X-Codec"),
        ({"strides": [2, 1]}, "expected a teacher of 16000 Hz with a hop of 320 .* got 16000 Hz with 640"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load_xcodec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="found none; restore the folder"):
        load_xcodec(tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="weights: cannot read"):
        load_xcodec(tmp_path)
    save_file({k: v for k, v in state.items() if k != "fc1.bias"}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing \['fc1.bias'\]"):
        load_xcodec(tmp_path)


def test_the_published_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        teacher = {"type": "hf_config", "config": transformers.HubertConfig().to_dict()}
        ours = XCodec(semantic=teacher, quantizer=quantizer_preset("faithful"))
    parts = {"teacher": 94.37, "decoder": 20.20, "semantic_decoder": 16.52, "semantic_encoder": 14.75}
    parts |= {"encoder": 12.76, "join": 1.05, "to_semantic": 0.79, "to_acoustic": 0.26}
    total = 0
    for name, millions in parts.items():
        sizes = {k: p.numel() for k, p in ours.get_submodule(name).named_parameters()}
        if name in ("encoder", "decoder"):  # the released class has folded their weight norm
            sizes = {k: n for k, n in sizes.items() if not k.endswith("original0")}
        assert sum(sizes.values()) / 1e6 == pytest.approx(millions, abs=0.006), name
        total += sum(sizes.values())
    assert total / 1e6 == pytest.approx(160.70, abs=0.006)
    assert {n.partition(".")[0] for n, _ in ours.named_parameters()} == set(parts)  # codebooks are buffers
    assert ours.hop_length == 320 and ours.quantizer.codebook_sizes == (1024,) * 8


# ---- the teacher ----


def test_the_teacher_gives_its_evaluation_features_in_training_and_sees_no_gradient(hubert: Any):
    model, ours, _ = copy.deepcopy(hubert[0]), copy.deepcopy(hubert[1]), None
    x = noise(6400, 2)
    want = model._extract_semantic_features(x)
    torch.manual_seed(0)
    ours.train()
    assert isinstance(ours.teacher, SpeechEncoder) and not any(m.training for m in ours.teacher.modules())
    torch.testing.assert_close(ours.teacher(x), want, rtol=0, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours.teacher(x), ours.teacher(x.double()))
    model.semantic_model.config.layerdrop = 0.0  # transformers leaves dropped layers out of its hidden states
    model.semantic_model.train()  # what the authors' loop did to its targets: facts 1.11
    assert float((model._extract_semantic_features(x) - want).abs().mean()) > 0.1 * float(want.abs().mean())

    before = {k: v.clone() for k, v in ours.teacher.state_dict().items()}
    out = ours(x)
    (out.x_hat.square().mean() + out.quantized.loss + 100 * out.aux["semantic"]).backward()
    assert all(p.grad is None and not p.requires_grad for p in ours.teacher.parameters())
    learnt = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert learnt and all(bool(ours.get_parameter(n).grad.abs().sum() > 0) for n in learnt)  # pyright: ignore
    torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.1).step()
    assert all(torch.equal(v, before[k]) for k, v in ours.teacher.state_dict().items())
    assert ours.teacher.window_frames is None and (ours.teacher.dim, ours.teacher.hop_length) == (16, 320)
    with pytest.raises(ValueError, match=r"expected float sound \(B, 1, L\) with L a multiple of 320"):
        ours.teacher(noise(321))


# ---- the presets ----


def test_faithful_and_fixed_code_alike_and_learn_as_facts_say(hubert: Any):
    _, fixed, folder = hubert
    faithful = load_xcodec(folder, preset="faithful")
    assert torch.equal(faithful.encode(noise(4801), RATE).codes, fixed.encode(noise(4801), RATE).codes)
    assert faithful.config["quantizer"]["dropout_levels"] == list(LEVELS)
    book = faithful.quantizer.get_submodule("books.0")
    assert isinstance(book, LegacyCodebook) and bool((book.cluster_size == 3).all())  # the file's own averages
    torch.testing.assert_close(book.codebook_sum, 3 * book.codebook)

    # 1. The residual: only the first level's commitment reaches the encoder in the released training.
    z = faithful.latent(noise(3200, 2), features=faithful.teacher_features(noise(3200, 2), [10, 10])).detach()
    for ours, levels_that_commit in ((faithful, 1), (fixed, 3)):
        gradients = []
        for Q in (1, 3):
            leaf = z.clone().requires_grad_()
            loss = ours.quantizer.eval()(leaf, num_codebooks=Q).loss * Q  # the loss is the mean over the levels
            gradients.append(torch.autograd.grad(loss, leaf)[0])
        same = torch.allclose(*gradients, rtol=1e-4, atol=1e-7)
        assert same == (levels_that_commit == 1)

    # 2. Dead codes by an absolute count, of which few vectors leave nearly all; 3. a revival without its averages.
    for preset, consistent in (("faithful", False), ("fixed", True)):
        quantizer = copy.deepcopy(load_xcodec(folder, preset).quantizer).train()
        book: Any = quantizer.get_submodule("books.0")
        for _ in range(40):
            quantizer(z[:1, :8], num_codebooks=1)  # 8 vectors a step for 32 codes
        flagged = float(book.dead().float().mean())
        assert flagged < 0.1 if preset == "fixed" else flagged > 0.9
        mean = book.codebook_sum / book.cluster_size[:, None].clamp_min(1e-6)
        assert torch.allclose(mean, book.codebook, atol=1e-4) == consistent
