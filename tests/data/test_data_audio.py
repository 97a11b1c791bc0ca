"""Sound of every kind comes in as (C, L) in [-1, 1] with its rate; resampling has exact lengths."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from mmtok.data.audio import fit_length, read_audio, resample, resample_directly, to_sounds, write_audio


@pytest.mark.parametrize(("channels", "rate"), [(1, 16000), (2, 8000), (1, 44100), (6, 48000)])
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_files_come_back(tmp_path: Path, channels: int, rate: int, suffix: str):
    t = torch.arange(3001) / rate
    x = torch.stack([0.5 * torch.sin(2 * torch.pi * 220 * (c + 1) * t) for c in range(channels)])
    write_audio(tmp_path / f"x{suffix}", x, rate)
    y, found = read_audio(tmp_path / f"x{suffix}")
    assert found == rate and y.shape == x.shape and y.dtype == torch.float32
    if suffix == ".ogg":  # lossy, and the last of six channels is for bass alone
        assert float((y - x).square().mean()) < 0.2 * float(x.square().mean())
    else:
        assert torch.allclose(y, x, atol=1e-4)
    (sound,), batch = to_sounds(tmp_path / f"x{suffix}", None)
    assert torch.equal(sound.samples, y) and sound.sample_rate == rate and not batch


def test_long_ogg_files_do_not_crash_the_encoder(tmp_path: Path):
    """One write of 15 million samples ends the process with a segmentation fault; blocks do not."""
    seen: list[int] = []

    class Recorder(soundfile.SoundFile):
        def write(self, data: np.ndarray) -> None:
            seen.append(len(data))
            super().write(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soundfile, "SoundFile", Recorder)
        write_audio(tmp_path / "x.ogg", torch.zeros(1, 300_001), 16000)
    assert read_audio(tmp_path / "x.ogg")[0].shape == (1, 300_001) and max(seen) <= 2**16 and sum(seen) == 300_001


def test_loud_samples_are_clipped(tmp_path: Path):
    write_audio(tmp_path / "x.wav", torch.tensor([[3.0, -3.0]]), 16000)
    assert torch.allclose(read_audio(tmp_path / "x.wav")[0], torch.tensor([[1.0, -1.0]]), atol=1e-4)
    with pytest.raises(ValueError, match=r"\.wav, \.flac or \.ogg, got '\.mp3'"):
        write_audio(tmp_path / "x.mp3", torch.zeros(1, 2), 16000)
    for shape in ((2,), (1, 1, 2), (1, 0)):
        with pytest.raises(ValueError, match=r"expected \(C, L\)"):
            write_audio(tmp_path / "x.wav", torch.zeros(shape), 16000)


def test_arrays_and_tensors():
    x = torch.rand(2, 9) - 0.5
    for form in (x, x.double(), x.numpy(), x.numpy().astype(">f4"), x.T.contiguous().T, x.clone().requires_grad_()):
        (sound,), batch = to_sounds(form, 16000)
        assert torch.equal(sound.samples, x) and sound.sample_rate == 16000 and not batch
    frozen = x.numpy()
    frozen.setflags(write=False)
    rates: list[Any] = [np.int64(16000), 16000.0, torch.tensor(16000)]
    for rate in rates:
        (sound,), _ = to_sounds(frozen, rate)
        assert torch.equal(sound.samples, x) and type(sound.sample_rate) is int and sound.sample_rate == 16000
    assert to_sounds(x[0], 16000)[0][0].samples.shape == (1, 9)
    for form in (np.array([[-32768, 16384]], np.int16), torch.tensor([[-32768, 16384]], dtype=torch.int16)):
        assert to_sounds(form, 16000)[0][0].samples.tolist() == [[-1.0, 0.5]]
    sounds, batch = to_sounds(x[None].repeat(3, 1, 1), 16000)
    assert len(sounds) == 3 and batch
    sounds, batch = to_sounds([x, x[:, :4], x[0]], 44100)
    assert [tuple(s.samples.shape) for s in sounds] == [(2, 9), (2, 4), (1, 9)] and batch


@pytest.mark.parametrize(
    ("x", "rate", "words"),
    [
        (torch.zeros(1, 4), None, "sample_rate: mandatory for arrays"),
        (torch.zeros(1, 4), "16000", r"whole Hz in 1000\.\.768000, got '16000' \(str\)"),
        (torch.zeros(1, 4), "abc", "whole Hz"),
        (torch.zeros(1, 4), [16000], "whole Hz"),
        (torch.zeros(1, 4), True, "whole Hz"),
        (torch.zeros(1, 4), 16000.5, "whole Hz"),
        (torch.zeros(1, 4), float("inf"), "whole Hz"),
        (torch.zeros(1, 4), float("nan"), "whole Hz"),
        (torch.zeros(1, 4), torch.tensor([8000, 8000]), "whole Hz"),
        (torch.zeros(1, 4), 0, "whole Hz"),
        (torch.zeros(1, 4), -16000, "whole Hz"),
        (torch.zeros(1, 4), 10**7, "whole Hz"),
        (torch.zeros(1, 0), 16000, r"at least one sample, got shape \(1, 0\)"),
        (torch.zeros(0), 16000, "at least one sample"),
        (torch.zeros(0, 1, 5), 16000, "at least one clip"),
        (torch.zeros(1, 1, 1, 5), 16000, r"expected \(C, L\)"),
        (torch.zeros(16000, 2), 16000, r"C <= 32, got shape \(16000, 2\); is it \(L, C\)\? transpose it"),
        (torch.tensor([[0.0, float("nan")]]), 16000, "NaN or infinity"),
        (torch.tensor([[1000.0, -32768.0]]), 16000, "peak of 3.28e.04; divide 16-bit values by 32768"),
        (torch.zeros(1, 4, dtype=torch.int32), 16000, "expected int16 or float.*int32"),
        (np.zeros((1, 4), np.uint8), 16000, "expected int16 or float.*uint8"),
        (np.zeros((1, 4), bool), 16000, "expected int16 or float.*bool"),
        (np.zeros((1, 4), object), 16000, "got dtype object"),
        ([], 16000, "at least one clip"),
        (7, 16000, "expected a path, array, tensor or a list of them, got int"),
    ],
)
def test_wrong_input_is_named(x: Any, rate: Any, words: str):
    with pytest.raises(ValueError, match=words):
        to_sounds(x, rate)


def test_files_that_are_no_sound(tmp_path: Path):
    path = tmp_path / "x.wav"
    with pytest.raises(FileNotFoundError, match=r"no audio file at .*x\.wav"):
        read_audio(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.wav is empty"):
        read_audio(path)
    for name in ("x.wav", "x.raw"):
        (tmp_path / name).write_text("this is text, not sound")
        with pytest.raises(ValueError, match="is not a readable audio file"):
            read_audio(tmp_path / name)
    soundfile.write(path, np.zeros((0, 1)), 16000)
    with pytest.raises(ValueError, match=r"x\.wav holds 0 samples"):
        read_audio(path)
    for array, words in ((np.array([0, np.nan]), "NaN"), (np.array([0, 900.0]), "peak of 900")):
        soundfile.write(path, array, 16000, subtype="FLOAT")
        with pytest.raises(ValueError, match=rf"x\.wav: .*{words}"):
            read_audio(path)
    soundfile.write(path, np.zeros(5), 500)
    with pytest.raises(ValueError, match=r"x\.wav: expected whole Hz in 1000"):
        read_audio(path)
    soundfile.write(path, np.zeros(5), 16000)
    with pytest.raises(ValueError, match="the file has 16000 Hz, sample_rate=8000 was given"):
        to_sounds(path, 8000)
    assert to_sounds(path, 16000)[0][0].sample_rate == 16000


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "AIFF"])
def test_damaged_files_are_read_or_refused_by_name(tmp_path: Path, format: str):
    rng, path, refused = random.Random(1), tmp_path / "x.bin", 0
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, (2000, 2)), 16000, format=format)
    whole = path.read_bytes()
    for trial in range(25):
        data = bytearray(whole)
        if trial % 2:
            del data[rng.randrange(4, len(data)) :]
        for _ in range(trial % 6):
            data[rng.randrange(min(len(data), rng.choice([60, 10_000])))] = rng.randrange(256)
        path.write_bytes(data)
        message = None
        try:
            assert read_audio(path)[0].ndim == 2
        except ValueError as e:
            message = str(e)
        assert message is None or str(path) in message
        refused += message is not None
    assert refused


@pytest.mark.parametrize("L", [1, 2, 319, 1000, 4001])
@pytest.mark.parametrize("rates", [(16000, 8000), (8000, 16000), (44100, 16000), (16000, 44100), (16000, 22050)])
def test_resampled_lengths_are_exact(L: int, rates: tuple[int, int]):
    a, b = rates
    assert resample(torch.rand(2, L), a, b).shape == (2, -(-L * b // a))
    x = torch.rand(2, L)
    assert resample(x, a, a) is x


@pytest.mark.parametrize("rates", [(44100, 16000), (16000, 44100), (48000, 16000)])
def test_both_ways_of_resampling_agree(rates: tuple[int, int]):
    x = torch.randn(2, 900) * 0.2
    assert torch.allclose(resample(x, *rates), resample_directly(x, *rates), atol=1e-5)


def test_resampling_keeps_a_tone_at_any_rate():
    for a, b in ((11111, 16000), (16000, 44101), (44100, 16000)):  # the first two have no common divisor
        n = a // 10
        x = torch.sin(2 * torch.pi * 440 * torch.arange(n, dtype=torch.float64) / a).float()
        y = resample(x, a, b)
        assert y.shape == (-(-n * b // a),)
        want = torch.sin(2 * torch.pi * 440 * torch.arange(len(y), dtype=torch.float64) / b).float()
        assert torch.allclose(y[200:-200], want[200:-200], atol=2e-4)


def test_long_clips_keep_exact_lengths():
    assert resample(torch.zeros(2**24 + 1), 16000, 8000).shape == (2**23 + 1,)  # float32 rounds 2**23 + 0.5 down


def test_fit_length():
    assert fit_length(torch.ones(1, 3), 5).tolist() == [[1, 1, 1, 0, 0]]
    assert fit_length(torch.ones(1, 3), 2).tolist() == [[1, 1]]


def test_a_file_that_was_coded_too_loud_is_told_apart_from_integers(tmp_path: Path):
    soundfile.write(tmp_path / "loud.wav", np.array([0.5, 42.4, -3.0], np.float32), 16000, subtype="FLOAT")
    with pytest.raises(
        ValueError, match=r"loud.wav: expected floats in \[-1, 1\], got a peak of 42.4; .* a lower gain"
    ):
        read_audio(tmp_path / "loud.wav")
