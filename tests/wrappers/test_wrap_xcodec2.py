"""`xcodec2:` and `neucodec:` against transformers' models, random and tiny: parity, rates, laws, and their faults."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtok.bench.laws import check
from mmtok.data.audio import resample
from mmtok.tokens import Tokens, TokensError
from mmtok.wrappers.xcodec2 import NEUCODEC, XCODEC2, NeuCodecWrapper, XCodec2Wrapper

transformers: Any = pytest.importorskip("transformers")
RATE, HOP = 16000, 320
LAWS = ("padding", "batch shape", "prefix", "determinism", "exact size", "odd sizes", "extreme inputs")


def sound(length: int, count: int = 1, seed: int = 0) -> Tensor:
    """(count, 1, length): noise that swells and fades, so that codes differ."""
    g = torch.Generator().manual_seed(seed + length)
    swell = 0.02 + 0.2 * torch.sin(torch.arange(length) / 900.0).square()
    return torch.randn(count, 1, length, generator=g) * swell


def tiny_model(kind: str) -> Any:
    semantic = transformers.Wav2Vec2BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_depthwise_kernel_size=3,
        output_hidden_size=16,
    )
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64,  # GroupNorm has 32 groups, and needs two values in each
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        encoder_hidden_size=2,
        quantization_dim=80,
        semantic_model_config=semantic.to_dict(),
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    for name, p in model.named_parameters():  # upstream's deviation of 0.02 gives one code for everything
        if p.ndim > 1 and "semantic_encoder" not in name:
            torch.nn.init.normal_(p, 0, p[0].numel() ** -0.5)
    model.quantizer.project_in.weight.data.mul_(3)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, kind in (("xcodec2", "Xcodec2"), ("neucodec", "NeuCodec")):
        made[name] = tmp_path_factory.mktemp("wrap") / f"tiny-{name}"
        tiny_model(kind).save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def xcodec2(folders: dict[str, Path]) -> XCodec2Wrapper:
    return XCODEC2.open(str(folders["xcodec2"]))


@pytest.fixture(scope="module")
def neucodec(folders: dict[str, Path]) -> NeuCodecWrapper:
    return NEUCODEC.open(str(folders["neucodec"]))


@pytest.fixture(params=["xcodec2", "neucodec"])
def tok(request: pytest.FixtureRequest) -> XCodec2Wrapper:
    return request.getfixturevalue(request.param)


@torch.no_grad()
def upstream(tok: XCodec2Wrapper, clips: list[Tensor]) -> Any:
    """The model's output for clips (L,), as its documentation has it."""
    extractor = getattr(transformers, tok.extractor_name)()
    network: Any = tok.network
    return network(**extractor(clips, sampling_rate=RATE, return_tensors="pt"))


def test_xcodec2_has_the_codes_and_the_sound_of_transformers_at_any_length(xcodec2: XCodec2Wrapper):
    for length in (HOP, 1000, 1599, 1600, 1601, 4800):
        x = sound(length)
        theirs, tokens = upstream(xcodec2, [x[0, 0]]), xcodec2.encode(x, RATE)
        assert torch.equal(tokens.codes, theirs.audio_codes.long()), length
        assert int(tokens.lengths[0]) == length // HOP + 1
        assert torch.allclose(xcodec2.decode(tokens), theirs.audio_values[..., :length], atol=1e-5)
    x = sound(4000, 3)
    theirs, tokens = upstream(xcodec2, list(x[:, 0])), xcodec2.encode(x, RATE)
    assert torch.equal(tokens.codes, theirs.audio_codes.long()) and len(tokens.codes.unique()) >= 12
    assert torch.allclose(xcodec2.decode(tokens), theirs.audio_values[..., :4000], atol=1e-5)
    assert tokens.spec.codebook_sizes == (65536,) and tokens.spec.frame_rate == 50


def test_neucodec_has_the_codes_and_the_sound_of_transformers(neucodec: NeuCodecWrapper):
    for x in (sound(5 * HOP), sound(13 * HOP), sound(12 * HOP, 3)):
        theirs, tokens = upstream(neucodec, list(x[:, 0])), neucodec.encode(x, RATE)
        assert torch.equal(tokens.codes, theirs.audio_codes.long())
        tokens.side["sample_rate"][:], tokens.side["num_samples"][:] = 24000, x.shape[2] * 3 // 2
        y = neucodec.decode(tokens)  # nothing resampled: the decoder's own output
        assert isinstance(y, Tensor) and y.shape[2] == x.shape[2] * 3 // 2
        assert torch.allclose(y, theirs.audio_values, atol=1e-5)
    assert len(neucodec.encode(sound(13 * HOP), RATE).codes.unique()) >= 4


def test_neucodec_decodes_at_24_khz_and_gives_the_rate_and_length_of_the_clip(neucodec: NeuCodecWrapper):
    x = sound(3001)
    at_16, at_24 = neucodec.encode(x, RATE), neucodec.encode(resample(x[0], RATE, 24000), 24000)
    y16, y24 = neucodec.decode(at_16), neucodec.decode(at_24)
    assert y16.shape == (1, 1, 3001) and y24.shape == (1, 1, -(-3001 * 3 // 2))
    whole = neucodec.network_decode(at_24.codes)
    assert torch.allclose(y24[0], whole[0, :, : y24.shape[2]], atol=1e-6)
    high = torch.fft.rfft(y24[0, 0])[int(y24.shape[2] * 9 / 24) :].abs().square().sum()
    assert high > 0.05 * torch.fft.rfft(y24[0, 0]).abs().square().sum()  # a band that 16 kHz has no room for
    y44 = neucodec.decode(neucodec.encode(resample(sound(1600, 2)[:, 0], RATE, 44100), 44100))
    assert y44.shape == (1, 2, 4410)
    bare = Tokens(at_16.codes, at_16.lengths, at_16.spec)  # of a language model: at the rate that the tokenizer states
    assert neucodec.decode(bare).shape == (1, 1, at_16.codes.shape[2] * HOP)
    assert torch.allclose(neucodec.decode(bare)[..., :3001], y16, atol=1e-6)
    assert (neucodec.sample_rate, neucodec.hop_length) == (RATE, HOP) and neucodec.timing()["output_rate"] == 24000


def test_laws_hold(tok: XCodec2Wrapper):
    report = check(tok, only=(*LAWS, "dtype"), seconds=0.2)
    assert report.ok, report.table()
    assert report["padding"].miss_rate == 0 and report["padding"].compared >= 40
    assert report["dtype"].compared > 1  # it runs under bfloat16 at all


def test_training_mode_files_and_other_tokenizers(tok: XCodec2Wrapper, folders: dict[str, Path], tmp_path: Path):
    x = [sound(1000)[0], sound(2500)[0]]
    tokens = tok.encode(x, RATE)
    tok.train()
    assert torch.equal(tok.encode(x, RATE).codes, tokens.codes) and tok.training
    tok.eval()
    tokens.save(tmp_path / "tokens")
    again = Tokens.load(tmp_path / "tokens")
    assert again.spec == tok.spec and torch.equal(tok.decode(again)[1], tok.decode(tokens)[1])
    assert not any("/" in str(v) for v in tok.config.values())
    json.dumps(tok.config)
    moved = shutil.copytree(folders[tok.family.name], tmp_path / "elsewhere")
    (moved / "README.md").write_text("---\nlicense: openrail\n---\n")
    twin = tok.family.open(str(moved))
    assert twin.fingerprint == tok.fingerprint and twin.licences["weights"] == "openrail (model card)"
    other = NEUCODEC if tok.family is XCODEC2 else XCODEC2
    with pytest.raises(TokensError, match="fingerprint"):
        other.open(str(folders[other.name])).decode(tokens)


def test_fault_padding_changes_codes(tok: XCodec2Wrapper):
    """The convolutions around w2v-BERT see the padding that its own mask keeps from it; `test_laws_hold` without."""
    found = check(tok.raw(), only=("padding",), seconds=0.2)["padding"]
    assert found.status == "broken" and (found.miss_rate or 0) > 0.05


def test_fault_neucodec_loses_the_end_of_a_clip(neucodec: NeuCodecWrapper):
    x = sound(1000)
    theirs = upstream(neucodec, [x[0, 0]])
    assert theirs.audio_codes.shape[2] == 3 and theirs.audio_values.shape[2] == 1440 < 1500
    assert neucodec.raw().encode(x, RATE).codes.shape[2] == 3
    assert neucodec.raw().decode(neucodec.raw().encode(x, RATE)).shape[2] == 960
    assert neucodec.encode(x, RATE).codes.shape[2] == 4 and neucodec.decode(neucodec.encode(x, RATE)).shape[2] == 1000
    with pytest.raises(AssertionError, match="window size"):  # a clip shorter than a frame
        neucodec.raw().encode(sound(319), RATE)
    assert neucodec.encode(sound(319), RATE).codes.shape[2] == 1
    assert check(neucodec.raw(), only=("exact size",), seconds=0.2)["exact size"].status == "broken"


def test_fault_masks_of_codes_count_other_frames(xcodec2: XCodec2Wrapper, neucodec: NeuCodecWrapper):
    """`audio_codes_mask`: X-Codec-2's leaves out a true frame, NeuCodec's takes half as many again for true."""
    clips = [sound(6000)[0, 0], sound(2000)[0, 0]]
    true = [int(n) for n in xcodec2.encode([c[None] for c in clips], RATE).lengths]
    assert true == [19, 7] and upstream(xcodec2, clips).audio_codes_mask.sum(-1).flatten().tolist() == [18, 6]
    true = [int(n) for n in neucodec.raw().encode([c[None] for c in clips], RATE).lengths]
    assert true == [18, 6] and upstream(neucodec, clips).audio_codes_mask.sum(-1).flatten().tolist() == [18, 9]


def test_bad_input_is_named(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="no folder at"):
        XCODEC2.open(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no config\.json"):
        XCODEC2.open(str(tmp_path))
    for family, folder in ((XCODEC2, folders["neucodec"]), (NEUCODEC, folders["xcodec2"])):
        with pytest.raises(ValueError, match="no readable folder of transformers'"):
            family.open(str(folder))
    broken = shutil.copytree(folders["xcodec2"], tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no readable folder"):
        XCODEC2.open(str(broken))
    model = tiny_model("Xcodec2")
    model.config.downsampling_ratios = [2, 2, 4, 4, 4]
    with pytest.raises(ValueError, match=r"expected 320 samples a frame.*got 256"):
        XCodec2Wrapper(model, "tiny")
    model = tiny_model("NeuCodec")
    model.config.output_sampling_rate = 24001
    with pytest.raises(ValueError, match="whole number of samples a frame"):
        NeuCodecWrapper(model, "tiny")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install"):
        XCODEC2.open(str(folders["xcodec2"]))
