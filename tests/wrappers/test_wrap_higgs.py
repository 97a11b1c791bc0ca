"""`higgs:` against transformers' HiggsAudioV2TokenizerModel, random and tiny: parity, laws, pieces, and its faults."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtok.bench.laws import check
from mmtok.tokens import Tokens, TokensError
from mmtok.wrappers.higgs import FAMILY, HiggsWrapper, open_higgs

transformers: Any = pytest.importorskip("transformers")
RATE, HOP, LEVELS = 24000, 960, 4
LAWS = ("variety", "padding", "batch shape", "chunking", "levels", "prefix", "determinism", "exact size", "odd sizes")


def sound(length: int, count: int = 1, seed: int = 0) -> Tensor:
    """(count, 1, length): noise that swells and fades, so that codes differ."""
    g = torch.Generator().manual_seed(seed + length)
    swell = 0.02 + 0.3 * torch.sin(torch.arange(length) / 1300.0).square()
    return torch.randn(count, 1, length, generator=g) * swell


def tiny_model(seed: int = 0) -> Any:
    acoustic = {
        "model_type": "dac",
        "encoder_hidden_size": 2,
        "downsampling_ratios": [8, 5, 4, 2, 3],  # the released ones: 960 samples
        "decoder_hidden_size": 64,
        "upsampling_ratios": [8, 5, 4, 2, 3],
        "hidden_size": 8,
    }
    semantic = {
        "model_type": "hubert",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "conv_dim": [8] * 7,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "mask_time_prob": 0.0,
    }
    config = transformers.HiggsAudioV2TokenizerConfig(
        acoustic_model_config=acoustic,
        semantic_model_config=semantic,
        codebook_size=32,
        codebook_dim=4,
        target_bandwidths=[0.25, 0.5],  # at 125 bit/s a level: 2 and 4 of them
    )
    torch.manual_seed(seed)
    model = transformers.HiggsAudioV2TokenizerModel(config).eval()
    for name, p in model.named_parameters():
        if p.ndim > 1 and "semantic_model" not in name:
            torch.nn.init.normal_(p, 0, p[0].numel() ** -0.5)
    for level in model.quantizer.quantizers:
        torch.nn.init.normal_(level.codebook.embed)
    model.fc2.weight.data.mul_(0.1)  # small numbers: snakes of large ones enlarge each rounding error
    model.acoustic_decoder.conv2.weight.data.mul_(0.05)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("wrap") / "tiny-higgs"
    tiny_model().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def tok(folder: Path) -> HiggsWrapper:
    return open_higgs(str(folder))


@torch.no_grad()
def test_codes_and_sound_are_those_of_transformers(tok: HiggsWrapper):
    network: Any = tok.network
    assert (tok.sample_rate, tok.hop_length, tok.spec.frame_rate) == (RATE, HOP, 25)
    assert tok.codebook_sizes == (32,) * LEVELS and network.config.semantic_downsample_factor == 2
    for x in (sound(HOP), sound(14 * HOP), sound(6 * HOP, 3)):
        codes, tokens = network.encode(x).audio_codes, tok.encode(x, RATE)
        assert torch.equal(tokens.codes, codes) and torch.equal(tok.raw().encode(x, RATE).codes, codes)
        for k in range(1, LEVELS + 1):
            theirs = network.decode(codes[:, :k]).audio_values
            y = tok.decode(tokens.keep(num_codebooks=k))
            assert theirs.shape == x.shape and torch.allclose(y, theirs, atol=1e-5)
            assert theirs.std() > 0.01
    x = sound(24 * HOP)
    every = tok.encode(x, RATE).codes
    assert all(len(every[:, q].unique()) >= 4 for q in range(LEVELS))
    assert torch.equal(network.encode(x, bandwidth=0.25).audio_codes, tok.encode(x, RATE, num_codebooks=2).codes)
    for k in range(1, LEVELS + 1):  # 1 and 3 are none of its rates
        assert torch.equal(tok.encode(x, RATE, num_codebooks=k).codes, every[:, :k])
        assert torch.equal(tok.raw().encode(x, RATE, num_codebooks=k).codes, every[:, :k])


def test_laws_hold(tok: HiggsWrapper):
    report = check(tok, only=LAWS, seconds=0.4)
    assert report.ok, report.table()
    assert report["padding"].miss_rate == 0 and report["padding"].compared >= 200
    assert report["chunking"].compared > 1000  # sound was decoded in pieces


@torch.no_grad()
def test_a_frame_reaches_as_far_as_decode_margin_and_no_further(tok: HiggsWrapper):
    """Perturb one frame of codes: what changes lies within the margin, and reaches over most of it."""
    margin = tok.decode_margin
    assert margin is not None and tok.encode_margin is None
    T = 2 * margin + 5
    codes = torch.randint(0, 32, (1, LEVELS, T), generator=torch.Generator().manual_seed(1))
    other = codes.clone()
    other[:, :, T // 2] = (codes[:, :, T // 2] + 7) % 32
    changed = (tok.network_decode(codes) - tok.network_decode(other)).abs()[0, 0].nonzero()[:, 0] // HOP
    reach = max(T // 2 - int(changed.min()), int(changed.max()) - T // 2)
    assert margin - 4 <= reach <= margin


def test_training_mode_files_licence_and_other_tokenizers(tok: HiggsWrapper, folder: Path, tmp_path: Path):
    x = [sound(3000)[0], sound(7000)[0]]
    tokens = tok.encode(x, RATE)
    tok.train()
    assert torch.equal(tok.encode(x, RATE).codes, tokens.codes)
    tok.eval()
    tokens.save(tmp_path / "tokens")
    again = Tokens.load(tmp_path / "tokens")
    assert again.spec == tok.spec and torch.equal(tok.decode(again)[1], tok.decode(tokens)[1])
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    (moved / "README.md").write_text("---\nlicense: other\nlicense_name: boson-higgs-audio-2\n---\n")
    twin = open_higgs(str(moved))
    assert twin.fingerprint == tok.fingerprint and twin.licences["weights"] == "boson-higgs-audio-2 (model card)"
    assert "check the card" in tok.licences["weights"]
    with pytest.raises(TokensError, match="fingerprint"):
        HiggsWrapper(tiny_model(seed=3), "other").decode(tokens)
    config = tok.network.config  # what is not in the weights but in the codes tells tokenizers apart, too
    assert tok.config["semantic_sample_rate"] == config.semantic_sample_rate == 16000


def test_fault_the_non_causal_encoder_corrupts_padded_short_clips(tok: HiggsWrapper):
    found = check(tok.raw(), only=("padding",), seconds=0.4)["padding"]
    assert found.status == "broken" and (found.miss_rate or 0) > 0.1
    long, short = sound(12 * HOP)[0], sound(3 * HOP)[0]
    alone = tok.encode(short, RATE).codes
    assert torch.equal(tok.encode([long, short], RATE)[1].codes, alone)
    assert not torch.equal(tok.raw().encode([long, short], RATE)[1].codes[..., :3], alone)


@torch.no_grad()
def test_fault_a_length_moves_the_acoustic_input_by_half_a_frame(tok: HiggsWrapper):
    """1200 samples: HuBERT gives two frames, the acoustic encoder one; transformers pads the latter's input by 480."""
    seen: list[Tensor] = []
    network: Any = tok.network
    hook = network.acoustic_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = sound(1200)
    tok.raw().encode(x, RATE)
    tok.encode(x, RATE)
    hook.remove()
    late, whole = seen
    assert torch.equal(late[..., 480:1680], x) and not late[..., :480].any()
    assert whole.shape[2] == 2 * HOP and torch.equal(whole[..., :1200], x) and not whole[..., 1200:].any()


def test_fault_other_lengths_come_back(tok: HiggsWrapper):
    report = check(tok.raw(), only=("exact size", "odd sizes"), seconds=0.4)
    assert report["exact size"].status == report["odd sizes"].status == "broken"


def test_bad_input_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="no folder at"):
        FAMILY.open(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no config\.json"):
        FAMILY.open(str(tmp_path))
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no readable folder"):
        FAMILY.open(str(broken))
    mimi = transformers.MimiConfig(hidden_size=8, num_filters=2, num_hidden_layers=1, codebook_dim=4)
    mimi.save_pretrained(tmp_path / "mimi")
    with pytest.raises(ValueError, match="no readable folder"):
        FAMILY.open(str(tmp_path / "mimi"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install"):
        FAMILY.open(str(folder))
