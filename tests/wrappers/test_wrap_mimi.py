"""`mimi:` against transformers' MimiModel from tiny random configs: parity, laws, and the padding mask it ignores."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peers.networks import MIMI, mimi, mimi_config
from torch import Tensor

from mmtok import auto
from mmtok.bench.laws import check
from mmtok.tokens import Tokens, TokensError
from mmtok.wrappers.mimi import FAMILY, MimiWrapper, open_mimi

transformers: Any = pytest.importorskip("transformers")

RATE = 24000
CONFIGS: dict[str, dict[str, Any]] = {
    "published strides": MIMI,
    "two semantic levels": {"upsampling_ratios": [5, 3], "num_semantic_quantizers": 2},
}
SMALL = {"upsampling_ratios": [3, 2], "num_quantizers": 2, "num_hidden_layers": 1}
SECONDS = {"published strides": 0.25, "two semantic levels": 0.01}


def sound(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])).mul(0.25).clamp(-1, 1)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, MimiWrapper, float]:
    transformers.utils.logging.disable_progress_bar()
    model, folder = mimi(CONFIGS[request.param]), tmp_path_factory.mktemp("wrap_mimi")
    model.save_pretrained(folder)
    return model, open_mimi(str(folder)), SECONDS[request.param]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small_mimi")
    mimi(SMALL).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_codes_and_sound_are_those_of_transformers(pair: tuple[Any, MimiWrapper, float]):
    model, tok, _ = pair
    hop, Q = tok.hop_length, len(tok.codebook_sizes)
    for x in (sound(1, 1, 20 * hop), sound(3, 1, 7 * hop), sound(2, 1, hop)):
        codes = model.encode(x).audio_codes
        tokens = tok.encode(x, RATE)
        assert torch.equal(tokens.codes, codes)
        for k in range(1, Q + 1):
            assert torch.equal(tok.encode(x, RATE, num_codebooks=k).codes, codes[:, :k])
            y, theirs = tok.decode(tokens.keep(num_codebooks=k)), model.decode(codes[:, :k]).audio_values
            assert y.shape == theirs.shape and torch.allclose(y, theirs, atol=1e-4)  # ours decodes one at a time
        assert torch.equal(tok.raw().encode(x, RATE).codes, codes)  # transformers' own default is all levels too
    codes = model.encode(sound(1, 1, 20 * hop)).audio_codes
    assert all(len(codes[:, q].unique()) >= 4 for q in range(Q))


def test_every_law_holds(pair: tuple[Any, MimiWrapper, float]):
    report = check(pair[1], seconds=pair[2])
    assert report.ok, report.table()
    assert report["chunking"].status == "not applicable"


@torch.no_grad()
def test_a_clip_that_ends_within_a_frame(pair: tuple[Any, MimiWrapper, float]):
    """Ours pads the sound, transformers the input of each layer, which changes the last frame alone; raw is theirs."""
    model, tok, _ = pair
    hop, same = tok.hop_length, []
    for L in (1, hop // 2, 2 * hop + 1, 5 * hop + hop // 3, 9 * hop - 1):
        x = sound(1, 1, L)
        filled = torch.nn.functional.pad(x, (0, -L % hop))
        ours, theirs = tok.encode(x, RATE), model.encode(x).audio_codes
        assert torch.equal(ours.codes, model.encode(filled).audio_codes)
        assert torch.equal(ours.codes[..., :-1], theirs[..., :-1])
        same.append(torch.equal(ours.codes, theirs))
        assert torch.equal(tok.raw().encode(x, RATE).codes, theirs)
        y, longer = tok.decode(ours), tok.raw().decode(ours)
        assert y.shape == (1, 1, L) and longer.shape == (1, 1, ours.codes.shape[2] * hop)
        assert torch.equal(y, longer[..., :L])
    assert not all(same)


def test_padding_is_taken_for_sound_and_here_it_is_not(pair: tuple[Any, MimiWrapper, float]):
    """huggingface/transformers#43377: codes of a clip depend on the batch, though its padding mask is passed."""
    _, tok, seconds = pair
    broken, kept = check(tok.raw(), only=("padding",), seconds=seconds), check(tok, only=("padding",), seconds=seconds)
    assert broken["padding"].status == "broken" and broken["padding"].miss_rate > 0
    assert kept["padding"].status == "ok" and kept["padding"].miss_rate == 0


@torch.no_grad()
def test_where_the_ignored_mask_shows(pair: tuple[Any, MimiWrapper, float]):
    """The last, cut frame of a clip padded on its right; hardly a frame of one padded on its left is unchanged."""
    model, tok, _ = pair
    hop = tok.hop_length
    right = torch.zeros(6, dtype=torch.int64)  # misses by frame
    left = torch.zeros(6, dtype=torch.int64)
    for seed in range(4):
        clip = torch.randn(1, 5 * hop + hop // 3, generator=torch.Generator().manual_seed(seed)).mul(0.25)
        other = sound(1, 9 * hop)
        alone = tok.raw().encode(clip, RATE)
        batch = tok.raw().encode([clip, other], RATE)
        assert int(batch.lengths[0]) == alone.codes.shape[2] == 6
        right += (batch[0].codes != alone.codes).sum((0, 1))
        x, mask = torch.zeros(2, 1, 9 * hop), torch.ones(2, 1, 9 * hop, dtype=torch.bool)
        x[0, :, -clip.shape[1] :], x[1] = clip, other
        mask[0, :, : -clip.shape[1]] = False
        masked = model.encode(x, padding_mask=mask).audio_codes
        assert torch.equal(masked, model.encode(x).audio_codes)  # the mask changes nothing at all
        left += (masked[:1, :, -6:] != alone.codes).sum((0, 1))
        ours, single = tok.encode([clip, other], RATE), tok.encode(clip, RATE)
        assert torch.equal(ours[0].codes, single.codes)
    assert int(right[:-1].sum()) == 0 and int(right[-1]) > 0
    assert (left > 0).all()


@torch.no_grad()
def test_whole_frames_are_safe_even_raw(pair: tuple[Any, MimiWrapper, float]):
    _, tok, _ = pair
    clips = [sound(1, n * tok.hop_length) for n in (3, 8, 1)]
    batch = tok.raw().encode(clips, RATE)
    for i, clip in enumerate(clips):
        assert torch.equal(batch[i].codes, tok.raw().encode(clip, RATE).codes)


def test_raw_channels_and_rates(small: Path):
    tok = open_mimi(str(small)).raw()
    clip = sound(2, 101)
    tokens = tok.encode([clip, sound(1, 55)], RATE)
    assert tokens.lengths.tolist() == [2 * 9, 5]
    each = [tok.encode(c[None], RATE).codes for c in clip]  # (1, Q, 9)
    whole = tok.encode(clip, RATE).codes
    assert torch.equal(whole[..., 0::2], each[0]) and torch.equal(whole[..., 1::2], each[1])
    assert tok.encode(sound(1, 50), 12000).codes.shape[2] == 9  # 100 samples at its own rate
    assert tok.encode(clip, RATE, num_tokens=3).codes.shape[2] == 3
    assert tok.rows is None


def test_fewer_levels_than_transformers_allows():
    model = mimi(CONFIGS["two semantic levels"])
    tok, x = MimiWrapper(model, "two"), sound(1, 10 * 30)
    assert tok.fewest == 2
    assert torch.equal(tok.encode(x, RATE, num_codebooks=1).codes, tok.encode(x, RATE).codes[:, :1])
    with pytest.raises(ValueError, match="semantic quantizers"):
        tok.raw().encode(x, RATE, num_codebooks=1)
    with pytest.raises(ValueError, match=r"expected 1\.\.5"):
        tok.encode(x, RATE, num_codebooks=6)


def test_books_follow_the_network_to_another_dtype(small: Path):
    """transformers works out a codebook once and keeps it as no buffer, so `to` would leave it behind."""
    tok, x = open_mimi(str(small)), sound(1, 600)
    before = tok.encode(x, RATE)
    left_behind = transformers.MimiModel.from_pretrained(small).eval()
    left_behind.encode(x[None])
    with pytest.raises(RuntimeError):
        left_behind.double().decode(before.codes)
    tok.double()
    assert tok.network.decode(before.codes).audio_values.dtype == torch.float64
    tok.float()
    assert torch.equal(tok.encode(x, RATE).codes, before.codes)


def test_loads_by_name_says_its_licences_and_refuses_other_ids(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(auto.FAMILIES, "mimi", "mmtok.wrappers.mimi:FAMILY")
    tok = auto.load(f"mimi:{small}")
    assert isinstance(tok, MimiWrapper) and auto.families("mimi")["mimi"] is FAMILY
    assert tok.licences["code"] == "Apache-2.0" and tok.licences["weights"].startswith("CC-BY-4.0 (as published")
    tok.train()
    tokens = tok.encode([sound(1, 100), sound(2, 40)], RATE)
    assert tok.training and [tuple(y.shape) for y in tok.decode(tokens)] == [(1, 100), (2, 40)]
    tokens.save(tmp_path / "tokens.safetensors")
    assert torch.equal(Tokens.load(tmp_path / "tokens.safetensors").codes, tokens.codes)
    assert tok.eval().spec.codebook_sizes == (32, 32) and tok.spec.frame_rate == 2000.0
    assert tok.timing()["receptive_field"] == {"encoder_frames": "unbounded", "decoder_frames": "unbounded"}
    assert "small_mimi" not in json.dumps(tok.config)

    (tmp_path / "copy").mkdir()
    for file in small.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "copy" / "README.md").write_text("---\nlicense: mit\n---\n")
    again = open_mimi(str(tmp_path / "copy"))
    assert again.licences["weights"] == "mit (model card)" and again.fingerprint == tok.fingerprint
    other = MimiWrapper(mimi(SMALL, seed=1), "other")
    with pytest.raises(TokensError):
        other.decode(tokens)


def test_bad_folders(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="no folder at"):
        open_mimi(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"no config\.json"):
        open_mimi(str(tmp_path))
    config = transformers.EncodecConfig(num_filters=4, hidden_size=8, codebook_size=8, codebook_dim=8)
    transformers.EncodecModel(config).save_pretrained(tmp_path / "encodec")
    with pytest.raises(ValueError, match=r"MimiModel"):
        open_mimi(str(tmp_path / "encodec"))
    for file in small.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ValueError, match="no readable folder of transformers' MimiModel"):
        open_mimi(str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'mmtok\[codecs\]'"):
        open_mimi(str(small))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio_channels": 2}, "expected a mono Mimi with encoder and decoder, got 2 channels"),
        ({"decoder_config": None}, "got no decoder"),
        ({"upsample_groups": 1, "frame_rate": 4000.0}, "cannot run this network"),  # one rate: no stride between
    ],
)
def test_networks_that_cannot_be_wrapped(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MimiWrapper(transformers.MimiModel(mimi_config({"upsampling_ratios": [3, 2], **changes})), "strange")
