"""`xcodec:` against transformers' XcodecModel, random and tiny: parity, rates as levels, laws, and its faults."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtok import auto
from mmtok.bench.laws import check
from mmtok.tokens import Tokens, TokensError
from mmtok.wrappers.xcodec import FAMILY, XCodecWrapper, open_xcodec

transformers: Any = pytest.importorskip("transformers")


def _tiny() -> Any:
    """tests/audio/tiny_xcodec.py, which stands in a folder that is importable only from its own tests."""
    path = Path(__file__).parents[1] / "audio" / "tiny_xcodec.py"
    spec: Any = importlib.util.spec_from_file_location("tiny_xcodec_of_wrappers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = _tiny()
RATE, HOP, LEVELS, KBPS = tiny.RATE, 320, tiny.LEVELS, tiny.KBPS


@pytest.fixture(scope="module", params=["hubert", "wavlm"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, XCodecWrapper]:
    model = tiny.released_model(request.param)
    return model, open_xcodec(str(tiny.save(model, tmp_path_factory.mktemp("wrap_xcodec"))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.released_model(), tmp_path_factory.mktemp("small_xcodec"))


def sound(length: int, count: int = 1) -> Tensor:
    return tiny.noise(length, count)


@torch.no_grad()
def test_codes_and_sound_are_those_of_transformers(pair: tuple[Any, XCodecWrapper]):
    model, tok = pair
    for x in (sound(30 * HOP), sound(9 * HOP, 3), sound(HOP, 2)):
        codes = model.encode(x).audio_codes
        tokens = tok.encode(x, RATE)
        assert torch.equal(tokens.codes, codes) and torch.equal(tok.raw().encode(x, RATE).codes, codes)
        for k in range(1, 9):
            y, theirs = tok.decode(tokens.keep(num_codebooks=k)), model.decode(codes[:, :k]).audio_values
            assert y.shape == theirs.shape == x.shape and torch.allclose(y, theirs, atol=1e-4)
    codes = model.encode(sound(40 * HOP)).audio_codes
    assert all(len(codes[:, q].unique()) >= 4 for q in range(8))


@torch.no_grad()
def test_rates_are_levels(pair: tuple[Any, XCodecWrapper]):
    model, tok = pair
    x = sound(12 * HOP + 7)
    filled = torch.nn.functional.pad(x, (0, -x.shape[-1] % HOP))
    every = tok.encode(x, RATE).codes
    assert tok.rates == dict(zip(LEVELS, KBPS, strict=True)) and tok.codebook_sizes == (32,) * 8
    for kbps, levels in zip(KBPS, LEVELS, strict=True):
        found = tok.encode(x, RATE, num_codebooks=levels).codes
        assert torch.equal(found, model.encode(filled, bandwidth=kbps).audio_codes) and found.shape[1] == levels
    for levels in range(1, 9):  # 5 to 7 are none of its rates
        assert torch.equal(tok.encode(x, RATE, num_codebooks=levels).codes, every[:, :levels])
        assert torch.equal(tok.raw().encode(filled, RATE, num_codebooks=levels).codes, every[:, :levels])
    with pytest.raises(ValueError, match=r"expected 1\.\.8"):
        tok.encode(x, RATE, num_codebooks=9)


def test_every_law_holds(pair: tuple[Any, XCodecWrapper]):
    report = check(pair[1], seconds=0.25)
    assert report.ok, report.table()
    assert report["chunking"].status == "ok"  # the decoder's pieces


def test_decoding_in_pieces(pair: tuple[Any, XCodecWrapper], monkeypatch: pytest.MonkeyPatch):
    tok = pair[1]
    tokens = tok.encode(sound(40 * HOP), RATE)
    whole = tok.decode(tokens)
    assert tok.decode_margin == 11 and tok.encode_margin is None
    monkeypatch.setattr(tok, "chunk_frames", 3)
    assert torch.allclose(tok.decode(tokens), whole, atol=1e-5)
    assert torch.equal(tok.encode(sound(40 * HOP), RATE).codes, tokens.codes)  # never in pieces
    # Frames that the margin leaves out change nothing at all, and the bound is no loose one.
    changed = tokens.codes.clone()
    changed[..., 20] = (changed[..., 20] + 1) % 32
    with torch.no_grad():
        differs = (tok.network_decode(changed) != tok.network_decode(tokens.codes))[0, 0].view(40, HOP).any(1).nonzero()
    assert differs.min() >= 20 - 11 and differs.max() <= 20 + 11
    assert differs.max() - differs.min() >= 2 * 11 - 3


def test_padding_changes_codes_and_here_it_does_not(pair: tuple[Any, XCodecWrapper]):
    """No mask: HuBERT attends to the padding, and normalizes over it."""
    tok = pair[1]
    broken, kept = (check(t, only=("padding",), seconds=0.25)["padding"] for t in (tok.raw(), tok))
    assert broken.status == "broken" and broken.miss_rate > 0.1
    assert kept.status == "ok" and kept.miss_rate == 0


@torch.no_grad()
def test_odd_lengths_come_back_short_and_here_they_do_not(pair: tuple[Any, XCodecWrapper]):
    model, tok = pair
    raw = tok.raw()
    for length, frames in ((16001 - 40 * HOP, 10), (10 * HOP + HOP // 4 - 1, 10), (10 * HOP + HOP // 4, 11)):
        x = sound(length)
        theirs, tokens = model(x), raw.encode(x, RATE)
        assert torch.equal(tokens.codes, theirs.audio_codes) and tokens.codes.shape[2] == frames
        assert raw.network_frames(length) == frames
        short = raw.decode(tokens)
        assert short.shape[-1] == frames * HOP
        assert torch.allclose(short[..., :length], theirs.audio_values, atol=1e-5)
        assert tok.decode(tok.encode(x, RATE)).shape == (1, 1, length)
    assert model(sound(16001 - 40 * HOP)).audio_values.shape[-1] == 10 * HOP  # one sample is lost
    report = check(raw, only=("exact size",), seconds=0.25)["exact size"]
    assert report.status == "broken" and report.miss_rate > 0
    assert check(tok, only=("exact size",), seconds=0.25).ok


@torch.no_grad()
def test_the_acoustic_encoder_never_sees_a_shifted_clip(pair: tuple[Any, XCodecWrapper]):
    """Where HuBERT finds a frame more, transformers encodes the sound anew, half a hop later; whole frames never do."""
    model, tok = pair
    wanted: list[int] = []
    handle = model.acoustic_encoder.register_forward_pre_hook(lambda _, args: wanted.append(args[0].shape[-1]))
    seen: list[int] = []
    network: Any = tok.network
    mine = network.acoustic_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    try:
        for length in (HOP, HOP + 1, 5 * HOP - 1, 5 * HOP + HOP // 2):
            model.encode(sound(length))
            tok.encode(sound(length), RATE)
    finally:
        handle.remove()
        mine.remove()
    assert wanted[-1] == 5 * HOP + HOP // 2 + HOP and wanted[0] == HOP
    assert seen == [HOP, 2 * HOP, 5 * HOP, 6 * HOP]


def test_raw_refuses_what_transformers_cannot_encode(folder: Path):
    tok, x = open_xcodec(str(folder)), sound(1)
    with pytest.raises(RuntimeError):
        tok.raw().encode(x, RATE)
    assert tok.decode(tok.encode(x, RATE)).shape == (1, 1, 1)


def test_loads_by_name_says_its_licences_and_refuses_other_ids(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(auto.FAMILIES, "xcodec", "mmtok.wrappers.xcodec:FAMILY")
    tok = auto.load(f"xcodec:{folder}")
    assert isinstance(tok, XCodecWrapper) and auto.families("xcodec")["xcodec"] is FAMILY
    assert tok.licences["code"] == "Apache-2.0" and "CC-BY-4.0" in tok.licences["weights"]
    x = sound(3 * HOP)
    before = tok.encode(x, RATE)
    tok.train()  # dropout, dropped layers and masked time steps of the teacher's config are 0.5 and 0.9
    tokens = tok.encode([x[0], sound(5 * HOP + 9, 2)[:, 0]], RATE)
    assert tok.training and torch.equal(tokens[0].codes, before.codes)
    assert [tuple(y.shape) for y in tok.decode(tokens)] == [(1, 3 * HOP), (2, 5 * HOP + 9)]
    tokens.save(tmp_path / "tokens.safetensors")
    assert torch.equal(Tokens.load(tmp_path / "tokens.safetensors").codes, tokens.codes)
    assert tok.eval().spec.frame_rate == 50.0
    assert tok.timing()["receptive_field"] == {"encoder_frames": "unbounded", "decoder_frames": 11}
    assert "small_xcodec" not in json.dumps(tok.config)
    again = XCodecWrapper(tiny.released_model(), "elsewhere")
    assert again.fingerprint == tok.fingerprint
    with pytest.raises(TokensError):
        XCodecWrapper(tiny.released_model(semantic={"conv_pos_batch_norm": True}), "other").decode(tokens)


def test_bad_folders(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="no folder at"):
        open_xcodec(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"no config\.json"):
        open_xcodec(str(tmp_path))
    transformers.DacModel(
        transformers.DacConfig(encoder_hidden_size=4, decoder_hidden_size=32, hidden_size=8, codebook_size=8)
    ).save_pretrained(tmp_path / "dac")
    with pytest.raises(ValueError, match="XcodecModel"):
        open_xcodec(str(tmp_path / "dac"))
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ValueError, match="no readable folder of transformers' XcodecModel"):
        open_xcodec(str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'mmtok\[codecs\]'"):
        open_xcodec(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_dim": 9}, "cannot run this network"),  # not the latent's width
        ({"acoustic_model_config": {**tiny.ACOUSTIC, "downsampling_ratios": [8, 5, 4]}}, "cannot run this network"),
        (
            {"acoustic_model_config": {**tiny.ACOUSTIC, "upsampling_ratios": [8, 5, 4]}},
            "expected codes .* of two frames",
        ),
    ],
)
def test_networks_that_cannot_be_wrapped(changes: dict[str, Any], message: str):
    numbers = {"codebook_size": 32, "target_bandwidths": list(KBPS), "acoustic_model_config": tiny.ACOUSTIC, **changes}
    teacher = transformers.HubertConfig(**tiny.SEMANTIC)
    config = transformers.XcodecConfig(semantic_model_config=teacher, **numbers)
    with pytest.raises(ValueError, match=message):
        XCodecWrapper(transformers.XcodecModel(config), "strange")
