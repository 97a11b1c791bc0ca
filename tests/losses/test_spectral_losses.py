from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torchaudio

from mmtok.losses.spectral import (
    CompressedSpectrumLoss,
    MultiScaleMelLoss,
    MultiScaleSTFTLoss,
    hz_to_mel,
    mel_filterbank,
    mel_to_hz,
)

SR = 16_000


def mel(**changes: Any):
    settings: dict[str, Any] = {"window_lengths": (64, 512), "n_mels": (10, 40)} | changes
    return MultiScaleMelLoss(SR, **settings)


def stft():
    return MultiScaleSTFTLoss((128, 512), (100, 512), (25, 128))


BOTH = [mel, stft]


def sound(seed=0, shape=(2, 1, 2000), size=0.1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


@pytest.mark.parametrize("scale", ["htk", "slaney"])
@pytest.mark.parametrize("unit_area", [True, False])
@pytest.mark.parametrize(("n_fft", "n_mels", "f_min", "f_max"), [(512, 40, 0.0, 8000.0), (1024, 80, 50.0, 7600.0)])
def test_filterbank_equals_torchaudio(scale, unit_area, n_fft, n_mels, f_min, f_max):
    theirs = torchaudio.functional.melscale_fbanks(
        n_fft // 2 + 1, f_min, f_max, n_mels, SR, norm="slaney" if unit_area else None, mel_scale=scale
    )
    ours = mel_filterbank(n_fft, SR, n_mels, f_min, f_max, scale, unit_area)
    assert ours.shape == (n_fft // 2 + 1, n_mels) and ours.max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", ["htk", "slaney"])
def test_mel_scale_inverts(scale):
    hz = [0.0, 440.0, 1000.0, 7000.0]
    mels = torch.tensor([hz_to_mel(f, scale) for f in hz], dtype=torch.float64)
    torch.testing.assert_close(mel_to_hz(mels, scale), torch.tensor(hz, dtype=torch.float64))
    assert hz_to_mel(1000.0) == pytest.approx(15) and hz_to_mel(6400.0) == pytest.approx(42)


@pytest.mark.parametrize("make", BOTH)
def test_equal_inputs_give_zero(make):
    x = sound()
    assert make()(x, x.clone()).item() == 0


def test_mel_of_a_gain_is_its_log10_once_a_scale():
    x = sound(size=1.0)
    assert mel()(x / 10, x).item() == pytest.approx(2.0, abs=1e-4)  # every magnitude is one decade lower, two scales
    assert mel(window_lengths=(64,), n_mels=(10,))(x * 10, x).item() == pytest.approx(1.0, abs=1e-4)


def test_mel_equals_the_plain_definition():
    x, y = sound(1), sound(2)
    want = 0.0
    for w, m in ((64, 10), (512, 40)):
        bank = torchaudio.functional.melscale_fbanks(w // 2 + 1, 0.0, SR / 2, m, SR, norm="slaney", mel_scale="slaney")
        logs = []
        for s in (x, y):
            padded = torch.nn.functional.pad(s, (w // 2, w // 2), mode="reflect")[:, 0]
            frames = padded.unfold(-1, w, w // 4) * torch.hann_window(w)
            logs.append((torch.fft.rfft(frames).abs() @ bank).clamp(min=1e-5).log10())
        want = want + (logs[0] - logs[1]).abs().mean()
    torch.testing.assert_close(mel()(y, x), want, rtol=1e-4, atol=1e-5)


def test_stft_of_a_gain_has_a_closed_form():
    # Convergence |1 - g| and |ln g|, wherever the power floor is far below.
    x, gain = sound(size=10.0), 0.5
    assert stft()(gain * x, x).item() == pytest.approx(0.5 + math.log(2), abs=1e-3)
    only_log = MultiScaleSTFTLoss((128,), (128,), (32,), convergence_weight=0.0, log_weight=2.0)
    assert only_log(gain * x, x).item() == pytest.approx(2 * math.log(2), abs=1e-3)


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize(("fake", "real"), [(0.0, 0.0), (0.0, 0.1), (0.1, 0.0), (1e-12, 1e-12)])
def test_silence_keeps_value_and_gradient_finite(make, fake, real):
    x_hat = (sound(1) * fake).requires_grad_()
    value = make()(x_hat, sound(2) * real)
    value.backward()
    assert value.isfinite() and x_hat.grad.isfinite().all()


@pytest.mark.parametrize("make", BOTH)
def test_gradient_leads_towards_the_target(make):
    x, x_hat = sound(1), sound(2).requires_grad_()
    value = make()(x_hat, x)
    value.backward()
    step = x_hat - 1e-3 * x_hat.grad / x_hat.grad.abs().max()
    assert make()(step, x) < value


@pytest.mark.parametrize("make", BOTH)
def test_autocast_and_bf16_input_change_nothing(make):
    loss, x, x_hat = make(), sound(1).bfloat16(), sound(2).bfloat16()
    plain = loss(x_hat.float(), x.float())
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(x_hat, x)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)


@pytest.mark.parametrize("make", BOTH)
def test_mask_hides_the_padding(make):
    loss, x, x_hat = make(), sound(1), sound(2)
    mask = torch.arange(2000) < torch.tensor([[2000], [900]])
    noisy = torch.where(mask[:, None], x_hat, torch.full((), math.nan)).requires_grad_()
    value = loss(noisy, x, mask)
    value.backward()
    assert (
        (noisy.grad[1, :, 900:] == 0).all() and noisy.grad[1, :, :900].abs().max() > 0 and noisy.grad.isfinite().all()
    )
    torch.testing.assert_close(loss(x_hat, x, torch.ones(2, 2000, dtype=torch.bool)), loss(x_hat, x))
    # More padding moves nothing.
    longer = [torch.nn.functional.pad(t, (0, 640), value=0.3) for t in (x_hat[1:], x[1:])]
    more = torch.arange(2640)[None] < 900
    torch.testing.assert_close(loss(longer[0], longer[1], more), loss(x_hat[1:], x[1:], mask[1:]))


@pytest.mark.parametrize("make", BOTH)
def test_channels_are_items(make):
    loss, x, x_hat = make(), sound(1, (2, 2, 1000)), sound(2, (2, 2, 1000))
    torch.testing.assert_close(loss(x_hat, x), loss(x_hat.reshape(4, 1, -1), x.reshape(4, 1, -1)))


def test_empty_bands_are_left_out():
    crowded = MultiScaleMelLoss(SR, (64,), (60,))
    bank = crowded.get_buffer("bank_64")
    assert 0 < bank.shape[0] < 60 and (bank.sum(dim=1) > 0).all()
    x = sound(size=1.0)
    assert crowded(x / 10, x).item() == pytest.approx(1.0, abs=1e-4)  # not diluted by the empty ones


def test_default_scales_are_those_of_dac():
    loss = MultiScaleMelLoss(SR)
    assert [loss.get_buffer(f"bank_{w}").shape[0] for w in loss.window_lengths] == [5, 10, 20, 40, 80, 160, 320]
    x = sound(shape=(1, 1, 1025), size=1.0)  # the shortest clip that the longest window reflects
    assert loss(x / 10, x).item() == pytest.approx(7.0, abs=1e-2)
    assert not loss.state_dict() and not MultiScaleSTFTLoss().state_dict()


@pytest.mark.parametrize("make", BOTH)
def test_bad_input_is_refused(make):
    loss, x = make(), sound()
    with pytest.raises(ValueError, match="more than 256 samples"):
        loss(x[..., :256], x[..., :256])
    with pytest.raises(ValueError, match="shape of x"):
        loss(x[..., :-1], x)
    with pytest.raises(ValueError, match=r"\(B,C,L\)"):
        loss(x[0], x[0])
    with pytest.raises(ValueError, match="mask: expected bool"):
        loss(x, x, torch.ones(2, 2000))


def test_bad_configurations_are_refused():
    with pytest.raises(ValueError, match="n_mels"):
        MultiScaleMelLoss(SR, (64, 128), (10,))
    with pytest.raises(ValueError, match="multiples of 4"):
        MultiScaleMelLoss(SR, (66,), (10,))
    with pytest.raises(ValueError, match="f_max"):
        MultiScaleMelLoss(SR, (64,), (10,), f_max=9000.0)
    with pytest.raises(ValueError, match="'htk' or 'slaney'"):
        MultiScaleMelLoss(SR, (64,), (10,), scale="bark")
    with pytest.raises(ValueError, match="one value of each"):
        MultiScaleSTFTLoss((512,), (512, 256), (128,))
    with pytest.raises(ValueError, match="hop <= window <= n_fft"):
        MultiScaleSTFTLoss((512,), (600,), (128,))


def test_compressed_spectrum_loss():
    x = sound()
    loss = CompressedSpectrumLoss((64, 256))
    assert loss(x, x) == 0
    # A scaled signal: magnitudes grow by sqrt(c), so either term is (sqrt(c) - 1)^2 of the signal's own.
    twice, nine = loss(4 * x, x), loss(9 * x, x)
    torch.testing.assert_close(nine / twice, torch.tensor(4.0), rtol=1e-2, atol=0)
    # The sign is phase: the magnitudes alone do not see it.
    assert CompressedSpectrumLoss((64,), phase_share=0.0)(-x, x) < 1e-9 < CompressedSpectrumLoss((64,))(-x, x)
    silence = torch.zeros_like(x, requires_grad=True)
    loss(silence, x).backward()
    assert silence.grad is not None and bool(torch.isfinite(silence.grad).all())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(4 * x, x), twice)
    with pytest.raises(ValueError, match="one shape"):
        loss(x[..., :100], x)
