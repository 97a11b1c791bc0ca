"""Audio metrics against closed forms, and every input they refuse."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.metrics import METRICS
from mmtok.metrics.audio import (
    align,
    delay,
    delay_samples,
    mel_distance,
    pesq_nb,
    pesq_wb,
    si_sdr,
    si_sdr_aligned,
    stft_distance,
    stoi,
)

RATE = 16000


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def voice(seconds: float = 1.5) -> torch.Tensor:
    """A buzz with moving pitch and syllable-like loudness: enough of a voice for PESQ and STOI. (1,1,L)"""
    t = torch.arange(int(seconds * RATE), dtype=torch.float64) / RATE
    phase = 2 * math.pi * (120 * t + 3 * torch.sin(2 * math.pi * 1.5 * t))
    buzz = sum(torch.sin(k * phase) / k for k in range(1, 25))
    return (0.2 * buzz * (0.1 + torch.sin(2 * math.pi * 2 * t).abs())).float()[None, None]


@settings(deadline=None, max_examples=8)
@given(st.floats(0.1, 4.0), st.floats(-10, 40))
def test_si_sdr_of_scaled_signal_plus_orthogonal_noise(gain, decibels):
    x = noise(1, 1, 4000)
    x = x - x.mean()
    n = noise(1, 1, 4000, seed=1)
    n = n - n.mean()
    n = n - (n * x).sum() / x.square().sum() * x  # orthogonal to x and free of a mean
    n = n * (x.norm() / n.norm()) * 10 ** (-decibels / 20)
    assert float(si_sdr(x, gain * (x + n), RATE)) == pytest.approx(decibels, abs=0.02)
    assert float(si_sdr(x, gain * (x + n) + 0.3, RATE)) == pytest.approx(decibels, abs=0.02)  # an offset is no error


@settings(deadline=None, max_examples=25)
@given(st.integers(-60, 60))
def test_align_finds_and_takes_away_a_delay(shift):
    long = noise(2, 2, 2200)
    x, late = long[..., 100:2100], long[..., 100 - shift : 2100 - shift]
    found, aligned = align(x, late, max_shift=64)
    assert found.tolist() == [shift, shift]
    inside = slice(max(0, -shift), 2000 - max(0, shift))
    torch.testing.assert_close(aligned[..., inside], x[..., inside])
    assert int((aligned == 0).sum()) == 2 * 2 * abs(shift)  # zeros exactly where nothing is known


def test_eight_samples_ruin_raw_si_sdr_only():
    long = noise(1, 1, 8008) + noise(1, 1, 8008, seed=1) * 0.01
    x, late = long[..., 8:], long[..., :-8]
    assert float(si_sdr(x, late, RATE)) < 0
    assert float(si_sdr_aligned(x, late, RATE)) > 100
    assert delay(x, late, RATE).tolist() == [8.0]
    assert align(x, late, 20)[0].tolist() == [8]
    assert align(late, x, 20)[0].tolist() == [-8]


@pytest.mark.parametrize("shift", [-800, -8, 0, 3, 799])
def test_the_sign_of_a_delay_is_positive_where_the_estimate_is_late(shift: int):
    long = noise(2, 1, 6000)
    reference, estimate = long[..., 1000:5000], 0.3 * long[..., 1000 - shift : 5000 - shift]
    found = delay_samples(reference, estimate, RATE)
    assert found.tolist() == [shift] * 2 and found.dtype == torch.int64
    assert delay(reference, estimate, RATE).tolist() == [float(abs(shift))] * 2
    raw, aligned = si_sdr(reference, estimate, RATE), si_sdr_aligned(reference, estimate, RATE)
    assert bool((aligned > 100).all()) and bool((raw < 0).all()) == bool(shift)


def test_align_beyond_its_limit_does_not_wrap_around():
    long = noise(1, 1, 3000)
    found, _ = align(long[..., 500:2500], long[..., 400:2400], max_shift=30)
    assert abs(int(found)) <= 30
    assert align(long, long, 0)[0].tolist() == [0]


def test_a_periodic_sound_has_no_delay_against_itself():
    x = torch.sin(torch.arange(4000) * (2 * math.pi / 40))[None, None]
    assert align(x, x, 200)[0].tolist() == [0]


def test_stft_distance_of_a_gain_is_that_gain():
    x = noise(2, 1, 6000)
    estimate = torch.cat([x[:1] * 0.1, x[1:]])  # -20 dB on the first item only
    torch.testing.assert_close(
        stft_distance(x, estimate, RATE), torch.tensor([20.0, 0.0], dtype=torch.float64), atol=1e-2, rtol=0
    )


def test_mel_distance_of_a_gain_counts_each_scale_once():
    x = noise(2, 1, 6000)
    value = mel_distance(x, torch.cat([x[:1] * 0.1, x[1:]]), RATE)  # one decade in every band of 7 scales
    assert value[0] == pytest.approx(7.0, abs=0.01) and value[1] == 0


def test_mel_distance_is_what_the_training_loss_minimises():
    from mmtok.losses.spectral import MultiScaleMelLoss  # another filterbank, written apart

    x, y = voice(0.5), noise(1, 1, RATE // 2)
    assert float(mel_distance(x, y, RATE)) == pytest.approx(float(MultiScaleMelLoss(RATE)(y, x)), rel=1e-4)


def test_mel_bands_below_the_resolution_of_the_fft_stay_in_the_mean():
    x = noise(1, 1, 6000)
    assert 6 < float(mel_distance(x, 0.1 * x, 48000)) < 6.99  # and torchaudio's warning about them is no error


def test_mel_distance_grows_with_noise():
    x = voice(0.5)
    values = [float(mel_distance(x, x + s * noise(*x.shape), RATE)) for s in (0.0, 0.01, 0.1, 1.0)]
    assert values == sorted(values) and values[0] == 0


def test_pesq_and_stoi_are_highest_for_equal_sounds_and_fall_with_noise():
    x = voice()
    bad = x + noise(*x.shape)
    both = torch.cat([x, x]), torch.cat([x, bad])
    for metric, top in ((pesq_wb, 4.64), (pesq_nb, 4.55), (stoi, 1.0)):
        value = metric(*both, RATE)
        assert value.shape == (2,) and value.dtype == torch.float64
        assert value[0] == pytest.approx(top, abs=0.01) and value[1] < value[0] - 0.02


def test_channels_are_scored_apart_and_averaged():
    x = voice()
    bad = x + noise(*x.shape)
    stereo = torch.cat([x, x], dim=1), torch.cat([x, bad], dim=1)  # (1,2,L)
    for metric in (pesq_wb, stoi, si_sdr):
        expected = (metric(x, x, RATE) + metric(x, bad, RATE)) / 2
        torch.testing.assert_close(metric(*stereo, RATE), expected)


AUDIO = [m for m in METRICS.values() if m.modality == "audio"]


@pytest.mark.parametrize("metric", AUDIO, ids=lambda m: m.name)
@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (lambda x: (x, x[..., :-1]), "expected the reference's shape"),
        (lambda x: (x[0], x[0]), "non-empty"),
        (lambda x: (x, x.where(x < 0.05, torch.nan)), "NaN or infinity"),
        (lambda x: (torch.zeros_like(x), x), "reference: expected a sound, got a constant"),
        (lambda x: (x, (x * 32767).short()), "divide 16-bit samples"),
    ],
)
def test_bad_pairs_are_refused_by_every_metric(metric, pair, message):
    with pytest.raises(ValueError, match=message):
        metric.function(*pair(noise(1, 1, 4000)), RATE)


@pytest.mark.parametrize("metric", [pesq_wb, pesq_nb, si_sdr, si_sdr_aligned, delay])
def test_a_silent_estimate_is_refused_where_nothing_is_defined(metric):
    with pytest.raises(ValueError, match="estimate: expected a sound, got a constant"):
        metric(noise(1, 1, 8000), torch.zeros(1, 1, 8000), RATE)


def test_a_silent_estimate_has_a_distance():
    x = noise(1, 1, 8000)
    assert float(mel_distance(x, torch.zeros_like(x), RATE)) > float(mel_distance(x, 0.1 * x, RATE))


@pytest.mark.parametrize(
    ("metric", "samples", "rate", "message"),
    [
        (pesq_wb, 8000, 8000, "expected a sample rate of 16000 Hz, got 8000"),
        (pesq_nb, 8000, 44100, "expected a sample rate of 8000 or 16000 Hz, got 44100"),
        (pesq_wb, 2000, RATE, "cannot score a clip of 0.12 s"),
        (stoi, 3000, RATE, "STOI cannot score a clip of 0.19 s"),
        (stoi, 50, RATE, "STOI cannot score a clip"),
        (si_sdr_aligned, 1600, RATE, "clips need more than 1600, got 1600"),
        (mel_distance, 1024, RATE, "expected more than 1024 samples"),
        (stft_distance, 256, RATE, "expected more than 256 samples"),
        (stft_distance, 4000, 16000.0, "whole number of Hz"),
        (si_sdr, 4000, 0, "whole number of Hz"),
    ],
)
def test_rates_and_short_clips_are_named(metric, samples, rate, message):
    with pytest.raises(ValueError, match=message):
        metric(noise(1, 1, samples), noise(1, 1, samples, seed=1), rate)


def test_align_names_a_shift_out_of_range():
    with pytest.raises(ValueError, match=r"max_shift: expected 0\.\.99"):
        align(noise(1, 1, 100), noise(1, 1, 100), 100)


@pytest.mark.parametrize(("metric", "package"), [(pesq_wb, "pesq"), (stoi, "pystoi")])
def test_a_missing_extra_is_named(metric, package, monkeypatch):
    import importlib

    real = importlib.import_module

    def absent(name, *rest):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r"pip install 'mmtok\[audio-metrics\]'"):
        metric(noise(1, 1, 8000), noise(1, 1, 8000), RATE)


def test_pesq_without_speech_is_a_value_error(monkeypatch):
    import pesq

    def no_speech(*_):
        raise pesq.NoUtterancesError(b"No utterances detected")

    monkeypatch.setattr(pesq, "pesq", no_speech)
    with pytest.raises(ValueError, match=r"No utterances detected.*leave such clips out"):
        pesq_wb(noise(1, 1, 8000), noise(1, 1, 8000), RATE)


def test_importing_the_table_pulls_in_no_metric_library():
    import subprocess
    import sys

    libraries = ("torchaudio", "torchmetrics", "pesq", "pystoi")
    code = f"import sys, mmtok.metrics; print([m for m in {libraries} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
