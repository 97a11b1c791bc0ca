"""Frozen speech models of transformers as teachers: folders, the cache, checksums, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_xcodec import RATE, SEMANTIC, noise, save, transformers
from torch import nn
from torch.nn import functional as F

import mmtok
from mmtok.audio.xcodec import XCodec, quantizer_preset
from mmtok.layers import speech
from mmtok.layers.speech import SpeechEncoder, build_speech


@pytest.mark.parametrize("kind", ["hubert", "wavlm", "wav2vec2"])
def test_a_folder_of_a_speech_model_is_a_teacher_whose_weights_are_checked(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **SEMANTIC)).eval()
    folder = save(model, tmp_path / "models--facebook--hubert-base-ls960" / "snapshots" / "1")
    teacher = build_speech({"type": "hf", "folder": str(folder)})
    x = noise(1600, 2)
    with torch.no_grad():
        states = model(F.pad(x[:, 0], (160, 160)), output_hidden_states=True).hidden_states
    assert isinstance(teacher, SpeechEncoder) and len(states) == 3 and teacher.external_weights
    torch.testing.assert_close(teacher(x), sum(states) / 3, rtol=0, atol=1e-5)  # pyright: ignore
    assert len(teacher.config["sha256"]) == 64

    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    named = build_speech({"type": "hf", "folder": "hubert_base", "sha256": teacher.config["sha256"]})
    assert torch.equal(named(x), teacher(x))
    with pytest.raises(ValueError, match=r"microsoft/wavlm-base-plus is not in transformers' cache; run `hf download"):
        build_speech({"type": "hf", "folder": "wavlm_base_plus"})

    sizes: dict[str, Any] = {"encoder_width": 4, "decoder_width": 32, "acoustic_dim": 8}
    numbers = quantizer_preset("fixed", {"num_codebooks": 2, "codebook_size": 8, "kmeans_init": False})
    ours = XCodec(**sizes, semantic={"type": "hf", "folder": str(folder)}, quantizer=numbers)
    assert ours.config["semantic"] == teacher.config
    ours.save(tmp_path / "ours")
    assert not any(k.startswith("teacher.") for k in load_file(tmp_path / "ours" / "model.safetensors"))
    again = mmtok.load(tmp_path / "ours")
    assert torch.equal(again.encode(x, RATE).codes, ours.eval().encode(x, RATE).codes)
    state = load_file(folder / "model.safetensors")
    save_file({**state, "feature_projection.projection.bias": torch.ones(16)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected weights of sha256 .* they are not those that this config was made"):
        mmtok.load(tmp_path / "ours")
    save_file({k: v for k, v in state.items() if "layers.1.final" not in k}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"lacks weights of a {kind}: .*layers.1.final_layer_norm.bias"):
        build_speech({"type": "hf", "folder": str(folder)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "mel"}, r"expected a type out of \['given', 'hf', 'hf_config', 'whisper'\], got 'mel'"),
        ({"type": "hf", "layer": 3}, r"expected keys out of .*got \['layer'\]"),
        ({"type": "hf", "folder": "nowhere"}, r"expected a transformers folder with a config.json, or a name out of"),
        ({"type": "hf_config"}, r"expected a model_type out of .*got None"),
        ({"type": "hf_config", "config": {"model_type": "bert"}}, r"expected a model_type out of .*got 'bert'"),
        ({"type": "hf_config", "config": {"model_type": "hubert", "hidden_size": 7}}, "no hubert can be built of it"),
        (
            {"type": "hf_config", "config": {"model_type": "hubert", **SEMANTIC}, "padding": 3},
            "expected at least 40 samples",
        ),
        ({"type": "hf_config", "config": {"model_type": "hubert"}, "padding": -1}, "padding: expected samples, 0 or"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused(config: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        build_speech(config)


def test_whisper_is_delegated(monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    monkeypatch.setattr(speech, "build_whisper", lambda config: seen.append(config) or nn.Identity())
    assert isinstance(build_speech({"type": "whisper", "window_frames": 9}), nn.Identity)
    assert seen == [{"type": "whisper", "window_frames": 9}]
