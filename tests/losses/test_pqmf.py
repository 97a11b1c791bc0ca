from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from mmtok.losses.pqmf import PQMF, SubbandSTFTLoss
from mmtok.losses.spectral import LogMelLoss, MultiScaleSTFTLoss, mel_filterbank
from mmtok.losses.xcodec import xcodec_losses

RATE = 16_000
BANKS = {4: (0.142, 60), 6: (0.10032791, 60), 8: (0.07949452, 47)}  # cutoff, dB


def noise(seed: int = 0, shape: tuple[int, ...] = (2, 1, 4800), size: float = 0.1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def snr_db(x_hat: torch.Tensor, x: torch.Tensor) -> float:
    return 10 * math.log10(float(x.square().sum() / (x_hat - x).square().sum()))


@pytest.mark.parametrize("subbands", BANKS)
def test_synthesis_undoes_analysis(subbands: int):
    cutoff, decibels = BANKS[subbands]
    bank, x = PQMF(subbands, cutoff=cutoff), noise()
    bands = bank.analyse(x)
    assert bands.shape == (2, subbands, 4800 // subbands)
    back = bank.synthesise(bands)
    assert back.shape == x.shape
    inner = slice(2 * 62, -2 * 62)  # near the ends, where zeros surround the sound, it is only almost as good
    assert snr_db(back[..., inner], x[..., inner]) > decibels
    assert snr_db(back, x) > 25


@pytest.mark.parametrize("length", [600, 601, 605])
def test_a_last_incomplete_group_is_filled_with_zeros(length: int):
    bank, x = PQMF(), noise(shape=(1, 1, length))
    bands = bank.analyse(x)
    assert bands.shape[-1] == math.ceil(length / 6)
    filled = torch.nn.functional.pad(x, (0, -length % 6))
    torch.testing.assert_close(bands, bank.analyse(filled))
    assert bank.synthesise(bands).shape[-1] == filled.shape[-1]


@pytest.mark.parametrize("band", range(6))
def test_a_sine_lands_in_its_band(band: int):
    hz = (band + 0.5) / 6 * RATE / 2
    x = torch.sin(2 * math.pi * hz * torch.arange(4800) / RATE)[None, None]
    energy = PQMF().analyse(x).square().mean(dim=-1)[0]
    assert energy.argmax() == band
    assert (energy[[k for k in range(6) if k != band]] < 1e-3 * energy[band]).all()  # 35 dB and more below


def test_filters_equal_the_plain_definition():
    """Numpy's Kaiser window and sinc, filtering by a loop over decimated positions."""
    bank, x = PQMF(), noise(shape=(1, 1, 90))
    n = np.arange(63)
    prototype = 0.10032791 * np.sinc(0.10032791 * (n - 31)) * np.kaiser(63, 9.0)
    padded = np.pad(x[0, 0].double().numpy(), 31)
    for k in range(6):
        h = 2 * prototype * np.cos((2 * k + 1) * np.pi / 12 * (n - 31) + (-1) ** k * np.pi / 4)
        want = [np.dot(h, padded[6 * t : 6 * t + 63]) for t in range(15)]
        np.testing.assert_allclose(bank.analyse(x)[0, k].numpy(), want, atol=1e-6)
    assert not list(bank.parameters()) and not bank.state_dict()


def test_bank_refuses_what_it_cannot_do():
    cases: list[dict[str, Any]] = [{"taps": 61}, {"subbands": 1}, {"cutoff": 1.0}]
    for wrong in cases:
        with pytest.raises(ValueError, match="expected subbands >= 2, an even number of taps and 0 < cutoff < 1, got"):
            PQMF(**wrong)
    with pytest.raises(ValueError, match=r"expected sound \(B,1,L\), got shape \(1, 2, 60\); move channels"):
        PQMF().analyse(torch.zeros(1, 2, 60))
    with pytest.raises(ValueError, match=r"bands: expected \(B,6,T\), got shape \(1, 4, 60\)"):
        PQMF().synthesise(torch.zeros(1, 4, 60))


# ---- distances ----


def subband(**changes: Any) -> SubbandSTFTLoss:
    settings: dict[str, Any] = {"n_ffts": (32, 64), "win_lengths": (20, 64), "hop_lengths": (5, 16)} | changes
    return SubbandSTFTLoss(**settings)


def log_mel(**changes: Any) -> LogMelLoss:
    settings: dict[str, Any] = {"n_fft": 256, "win_length": 200, "hop_length": 40, "n_mels": 20} | changes
    return LogMelLoss(RATE, **settings)


BOTH = [subband, log_mel]


def test_subband_distance_is_the_stft_distance_of_the_bands():
    x_hat, x = noise(1), noise(2)
    bank, distance = PQMF(), MultiScaleSTFTLoss((32, 64), (20, 64), (5, 16))
    want = distance(bank.analyse(x_hat), bank.analyse(x))
    assert float(want) > 0.5
    torch.testing.assert_close(subband()(x_hat, x), want)
    stereo = [s.reshape(1, 2, -1) for s in (x_hat, x)]
    torch.testing.assert_close(subband()(*stereo), want)


def test_log_mel_equals_the_plain_definition():
    x_hat, x = noise(1), noise(2)
    bank, logs = mel_filterbank(256, RATE, 20), []
    window = torch.nn.functional.pad(torch.hann_window(200), (28, 28))
    for s in (x_hat, x):
        mirrored = torch.nn.functional.pad(s, (108, 108), mode="reflect")[:, 0]
        frames = mirrored.unfold(-1, 256, 40) * window
        assert frames.shape[1] == 4800 // 40
        power = torch.fft.rfft(frames).abs().square()
        logs.append(((power + 1e-9).sqrt() @ bank).clamp(min=1e-5).log())
    torch.testing.assert_close(log_mel()(x_hat, x), (logs[0] - logs[1]).abs().mean())
    assert float(log_mel()(math.e * x, x)) == pytest.approx(1, abs=1e-3)  # natural logarithm


@pytest.mark.parametrize("make", BOTH)
def test_equal_sounds_are_at_distance_zero_and_others_send_a_gradient(make: Any):
    x = noise()
    assert make()(x, x.clone()).item() == 0
    for sound in (noise(1), torch.zeros_like(x)):
        x_hat = sound.requires_grad_()
        make()(x_hat, x).backward()
        assert x_hat.grad is not None and x_hat.grad.isfinite().all()
    assert float(x_hat.grad.abs().max()) == 0 or make is log_mel  # silence lies under the floor of the power
    near = (0.9 * x).requires_grad_()
    make()(near, x).backward()
    assert near.grad is not None and (near.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("make", BOTH)
def test_padding_counts_for_nothing(make: Any):
    x_hat, x = noise(1), noise(2)
    mask = torch.ones(2, 4800, dtype=torch.bool)
    torch.testing.assert_close(make()(x_hat, x, mask), make()(x_hat, x))
    mask[:, 3000:] = False
    got = make()(x_hat, x, mask)
    spoilt = torch.where(mask[:, None], x_hat, float("nan"))
    torch.testing.assert_close(make()(spoilt, x, mask), got)
    longer = [torch.nn.functional.pad(s, (0, 600)) for s in (x_hat, x)]
    torch.testing.assert_close(make()(*longer, torch.nn.functional.pad(mask, (0, 600))), got)


@pytest.mark.parametrize(("make", "half"), [(subband, 192), (log_mel, 128)])
def test_short_sound_and_bad_pairs_are_refused(make: Any, half: int):
    assert make()(noise(shape=(1, 1, half + 1)), noise(3, (1, 1, half + 1))).isfinite()
    short = noise(shape=(1, 1, half))
    with pytest.raises(ValueError, match=f"more than {half} samples .*, got {half}; use longer clips"):
        make()(short, short)
    with pytest.raises(ValueError, match="x_hat: expected the shape of x"):
        make()(noise(shape=(1, 1, 900)), noise(shape=(1, 1, 901)))
    with pytest.raises(ValueError, match=r"mask: expected bool of shape \(1, 900\)"):
        make()(noise(shape=(1, 1, 900)), noise(shape=(1, 1, 900)), torch.ones(1, 899, dtype=torch.bool))


def test_impossible_log_mel_is_refused():
    with pytest.raises(ValueError, match="an even n_fft - hop_length, got 41, 200 and 256"):
        log_mel(hop_length=41)
    with pytest.raises(ValueError, match=r"0 < hop_length <= win_length <= n_fft .* got 40, 300 and 256"):
        log_mel(win_length=300)


def test_xcodec_numbers():
    with torch.device("meta"):
        losses = xcodec_losses()
    assert losses.stft.resolutions == ((512, 480, 120), (1024, 960, 240), (2048, 1200, 300))
    assert losses.subband.distance.resolutions == ((128, 80, 20), (256, 120, 40), (256, 200, 50))
    assert losses.subband.pqmf.filters.shape == (6, 1, 63)
    assert [part.hop_length for part in losses.discriminator.parts] == [32, 64, 128, 256, 512, 1024]
    heads = [part.get_submodule("head.conv") for part in losses.discriminator.parts]
    assert [h.in_channels for h in heads] == [64, 128, 256, 512, 512, 512]
    mel = LogMelLoss(RATE)
    assert (mel.n_fft, len(mel.window), mel.hop_length, mel.bank.shape) == (1024, 800, 160, (80, 513))
