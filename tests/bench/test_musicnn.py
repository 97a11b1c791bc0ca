"""The music tagger: its checkpoint's format, its network and its windows, each against another way to the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from musicnn_bundle import proto, table_block, tagger_weights, write_bundle

import mmtok
from mmtok.bench.audio_scorers import fad_musicnn
from mmtok.bench.musicnn import MusicTagger, read_bundle
from mmtok.bench.records import Item
from mmtok.data.audio import read_audio, resample

RATE = 16000
TEXT = "unless to be rather cold hearted and rather selfish is to be ill disposed"
HELPERS = Path(mmtok.__file__).parents[1] / "data" / "helpers"
NETWORKS = HELPERS / "musicnn" / ".index"


@pytest.fixture(scope="module")
def item() -> Item:
    x, rate = read_audio(Path(mmtok.__file__).parent / "assets" / "speech.flac")
    assert rate == RATE
    return Item("speech.flac", x[:1, :40000], RATE, text=TEXT, labels={"language": "en", "kind": "speech"})


def test_checkpoints_are_read_without_tensorflow(tmp_path: Path):
    rng = np.random.default_rng(0)
    tensors = {f"layer_{i}/{k}": rng.standard_normal((i + 1, 130)).astype("f4") for i in range(4) for k in ("a", "ab")}
    tensors |= {"scalar": np.float32(3.5).reshape(()), "global_step": np.int64([7])}
    prefix = str(tmp_path / "model")
    write_bundle(prefix, tensors)
    found = read_bundle(prefix)
    assert set(found) == set(tensors) - {"global_step"}  # counters are no weights
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), tensors[name])
    index, data = Path(prefix + ".index"), Path(prefix + ".data-00000-of-00001")
    whole, values = index.read_bytes(), data.read_bytes()
    compressed = table_block([(b"", proto((1, 1)))])  # any block's trailer says how it is packed
    assert whole.find(b"\0crc!") > len(compressed)
    for bad, text in (
        (whole[:-1] + b"\0", "no table of tensors"),
        (whole[:20], "no table of tensors"),
        (whole.replace(b"\0crc!", b"\1crc!"), "compressed or cut short"),
    ):
        index.write_bytes(bad)
        with pytest.raises(ValueError, match=text):
            read_bundle(prefix)
    index.write_bytes(whole)
    data.write_bytes(values[:-4])
    with pytest.raises(ValueError, match="damaged or no TensorFlow checkpoint"):
        read_bundle(prefix)
    data.unlink()
    with pytest.raises(FileNotFoundError):
        read_bundle(prefix)


def tagger_written_out(mel: np.ndarray, w: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """One spectrogram (T, 96) by sums over windows in float64."""
    w = {k: v.astype("f8") for k, v in w.items()}

    def norm(x: np.ndarray, i: int) -> np.ndarray:  # over the last axis
        g, b, m, v = (
            w[f"batch_normalization{f'_{i}' if i else ''}/{k}"]
            for k in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return (x - m) / np.sqrt(v + 1e-3) * g + b

    def conv(x: np.ndarray, i: int) -> np.ndarray:  # (T, bands) -> (T, bands', out), as long as before
        name = f"conv2d{f'_{i}' if i else ''}"
        kernel = w[f"{name}/kernel"][:, :, 0]
        high = kernel.shape[0]
        padded = np.pad(x, (((high - 1) // 2, high // 2), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[:2])
        return np.maximum(np.einsum("tbij,ijo->tbo", windows, kernel) + w[f"{name}/bias"], 0)

    x = norm(mel[..., None].astype("f8"), 0)[..., 0]
    front = np.concatenate([norm(conv(x, i), i + 1).max(1) for i in range(5)], 1)
    c1 = norm(conv(front, 5), 6)[:, 0]
    c2 = norm(conv(c1, 6), 7)[:, 0] + c1
    c3 = norm(conv(c2, 7), 8)[:, 0] + c2
    joined = np.concatenate([front, c1, c2, c3], 1)
    pooled = np.stack([joined.max(0), joined.mean(0)], 1).reshape(-1)
    features = norm(np.maximum(norm(pooled, 9) @ w["dense/kernel"] + w["dense/bias"], 0), 10)
    return features @ w["dense_1/kernel"] + w["dense_1/bias"], features


def test_music_tagger_equals_the_network_written_out():
    weights = tagger_weights()
    network = MusicTagger({k: torch.from_numpy(v) for k, v in weights.items()})
    mel = np.random.default_rng(1).random((2, 150, 96)).astype("f4") * 4
    tags, features = network(torch.from_numpy(mel))
    for i in range(2):
        want_tags, want = tagger_written_out(mel[i], weights)
        np.testing.assert_allclose(features[i].numpy(), want, atol=2e-5)
        np.testing.assert_allclose(tags[i].numpy(), want_tags, atol=2e-5)
    with pytest.raises(ValueError, match="a tensor named conv2d_3/bias"):
        MusicTagger({k: torch.from_numpy(v) for k, v in weights.items() if k != "conv2d_3/bias"})


def test_music_frontend_equals_librosa(item: Item):
    librosa = pytest.importorskip("librosa")
    x = item.x[0, :20000]
    power = librosa.feature.melspectrogram(
        y=x.numpy(), sr=RATE, n_fft=512, hop_length=256, n_mels=96, pad_mode="reflect"
    )
    network = MusicTagger({k: torch.from_numpy(v) for k, v in tagger_weights().items()})
    np.testing.assert_allclose(network.frames(x).numpy(), np.log10(1e4 * power.T + 1), atol=1e-4)


def test_musicnn_windows_cover_the_sound(item: Item, tmp_path: Path):
    (tmp_path / "musicnn").mkdir()
    with pytest.raises(FileNotFoundError, match=r"musicnn 0\.1\.0\); run `python recipes/fetch_data\.py"):
        fad_musicnn(tmp_path)
    write_bundle(f"{tmp_path}/musicnn/", tagger_weights())
    scorer = fad_musicnn(tmp_path)
    long = item.x.repeat(1, 3)[:, :100_000]
    found = scorer.features(long, RATE)
    assert found.shape == (3, 6) and found.dtype == torch.float32  # 391 frames: 0..187, 187..374, 204..391
    ends = scorer.features(long[:, 204 * 256 :], RATE)  # its only window is the last one of the whole
    torch.testing.assert_close(ends[-1], found[-1], atol=0.05, rtol=0.05)  # edges apart
    assert scorer.features(item.x[:, :RATE], RATE).shape == (1, 6)
    twice = scorer.features(resample(long, RATE, 48000).repeat(2, 1), 48000)
    torch.testing.assert_close(twice, found, atol=0.05, rtol=0.05)
    assert [m.name for m in scorer.measures] == ["fad[musicnn-mtt]", "fad_floor[musicnn-mtt]"]


@pytest.mark.skipif(not NETWORKS.is_file(), reason="needs recipes/fetch_data.py --helpers")
def test_the_published_tagger_tells_strings_from_a_voice(item: Item):
    weights = read_bundle(f"{HELPERS / 'musicnn'}/")
    assert tuple(weights["conv2d_1/kernel"].shape) == (7, 67, 1, 204) and weights["dense/kernel"].shape == (1506, 200)
    network = MusicTagger(weights)
    t = torch.arange(3 * RATE) / RATE
    plucked = sum(torch.sin(2 * torch.pi * f * k * t) / k for f in (220, 277.2, 329.6) for k in (1, 2, 3, 4))
    chord = 0.05 * plucked * torch.exp(-3 * (t % 1))
    with torch.no_grad():
        frames = torch.stack([network.frames(x)[:187] for x in (chord, item.x[0].repeat(2))])
        tags, features = network(frames)
    assert features.shape == (2, 200)
    # Labels of MagnaTagATune: 0 is "guitar", 13 "vocal", 18 "male".
    assert int(tags[0].argmax()) == 0
    assert float(tags[1, 13]) > float(tags[1, 0]) and float(tags[1, 18]) > float(tags[0, 18])
    sound, noisy = (
        fad_musicnn(HELPERS).features(v, RATE)
        for v in (item.x, item.x + 0.05 * torch.randn(item.x.shape, generator=torch.Generator().manual_seed(0)))
    )
    assert float((sound - noisy).norm()) > 1
