"""The small speech teacher: its arithmetic against transformers' Whisper, its windows, and the shipped weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmtok.layers import shipped, whisper
from mmtok.layers.whisper import WhisperEncoder, build_whisper


def tiny(window_frames: int = 400, context_frames: int = 25) -> WhisperEncoder:
    torch.manual_seed(0)
    return WhisperEncoder(16, 2, 2, window_frames, context_frames)


def test_hidden_states_equal_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=80
    )
    theirs = transformers.models.whisper.modeling_whisper.WhisperEncoder(config).eval()
    ours = tiny()
    names = {
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.out_proj": "out",
        "self_attn_layer_norm": "norm1",
        "final_layer_norm": "norm2",
        "fc1": "up",
        "fc2": "down",
    }
    state = ours.state_dict()
    for key, value in theirs.state_dict().items():
        for old, new in names.items():
            key = key.replace(f".{old}.", f".{new}.")
        key = key.replace("layer_norm.", "norm.")
        if key in state:
            state[key] = value
        else:
            assert key == "embed_positions.weight"
    ours.load_state_dict(state)
    assert (ours.positions - theirs.embed_positions.weight).abs().max() < 1e-6
    mel = torch.randn(1, 80, 3000)
    with torch.no_grad():
        expected = theirs(mel, output_hidden_states=True).hidden_states
    found = ours.hidden_states(mel)
    assert len(found) == len(expected) == 3
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-4


def test_log_mel_equals_transformers():
    transformers = pytest.importorskip("transformers")
    encoder = build_whisper({"type": "whisper"})
    x = torch.randn(1, 32000) * 0.1
    extractor = transformers.WhisperFeatureExtractor(feature_size=80)
    # Padded to half a minute it would be floored by the same maximum, so only the tail beyond the sound differs.
    expected = extractor(x[0].numpy(), sampling_rate=16000, padding=False, return_tensors="pt").input_features
    assert (encoder.log_mel(x) - expected).abs().max() < 1e-3


def test_windows_are_what_their_neighbourhood_gives():
    encoder = tiny(window_frames=10, context_frames=3)
    x = torch.randn(1, 1, 25 * 320)
    whole = encoder(x)
    assert whole.shape == (1, 25, 16)
    alone = encoder(x[..., 7 * 320 : 23 * 320])  # frames 7..22: the second window with its context
    middle = encoder._window(x[:, 0, 7 * 320 : 23 * 320])[:, 3:13]
    assert torch.allclose(whole[:, 10:20], middle, atol=1e-5)
    assert not torch.allclose(whole[:, 10:20], alone[:, 3:13], atol=1e-3)  # windows count from the beginning
    far = x.clone()
    far[..., 24 * 320 :] += 1
    assert torch.equal(encoder(far)[:, :20], whole[:, :20])


def test_batch_equals_single_items_and_nothing_trains():
    encoder = tiny().train()
    assert not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    x = torch.randn(3, 1, 3200)
    both = encoder(x)
    for i in range(3):
        assert torch.allclose(encoder(x[i : i + 1])[0], both[i], atol=1e-5)
    assert encoder(x[..., :0]).shape == (3, 0, 16)


@pytest.mark.parametrize("shape", [(1, 3200), (1, 2, 3200), (1, 1, 3201)])
def test_other_shapes_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"expected \(B, 1, L\) with L a multiple of 320"):
        tiny()(torch.zeros(shape))


@pytest.mark.parametrize("config", [{"dim": 16}, {"widow_frames": 3}, {"window_frames": 1490, "context_frames": 20}])
def test_wrong_configs_are_refused(config: dict):
    with pytest.raises(ValueError, match="expected"):
        build_whisper({"type": "whisper", **config})


def test_shipped_teacher_is_standardised_and_hears_words():
    encoder = build_whisper({"type": "whisper"})
    assert encoder.external_weights and (encoder.dim, len(encoder.layers)) == (384, 4)
    from mmtok.data.audio import read_audio

    clip = Path(whisper.__file__).resolve().parents[1] / "assets" / "speech.flac"
    x, rate = read_audio(clip)
    assert rate == 16000
    x = x.mean(0)[None, None, : x.shape[1] // 320 * 320]
    found = encoder(x)
    assert 0.3 < float(found.std()) < 2 and float(found.mean().abs()) < 0.5
    # The same speech 6 dB softer says the same; noise of the same level does not.
    softer, noise = encoder(0.5 * x), encoder(torch.randn_like(x) * x.std())
    assert float((softer - found).square().mean()) < 0.1 * float((noise - found).square().mean())


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_damaged_shipped_weights_are_one_clear_error(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "model.safetensors"
    if damage == "flipped":
        data = bytearray(shipped.shipped_file(whisper.SHIPPED).read_bytes())
        data[-1000] ^= 1
        path.write_bytes(data)
    monkeypatch.setattr(shipped, "shipped_file", lambda name: path)
    with pytest.raises(ValueError, match=r"is missing|file is damaged"):
        build_whisper({"type": "whisper"})


def test_packing_is_within_half_a_step_and_keeps_what_is_small():
    state = {"w": torch.randn(8, 32), "v": torch.randn(8), "k": torch.randn(4, 2, 3), "zero": torch.zeros(2, 20)}
    found = shipped.packed(state)
    assert found["w"].dtype == torch.int8 and "v:step" not in found and "k:step" not in found
    back = shipped.unpacked(found)
    assert set(back) == set(state)
    for name, value in state.items():
        step = found.get(f"{name}:step", torch.zeros(len(value)))
        allowed = 0.5001 * step.view(-1, *[1] * (value.ndim - 1))
        assert bool(((back[name] - value).abs() <= allowed).all())
    again = shipped.unpacked(shipped.packed(back))
    assert all(torch.allclose(again[k], back[k], rtol=1e-6) for k in back)
