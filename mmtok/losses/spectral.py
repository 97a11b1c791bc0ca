"""Spectral losses for sound: multi-scale mel (DAC) and multi-resolution STFT, and the mel filterbank they read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmtok.losses.reconstruction import check_pair, masked_mean

# Slaney's Auditory Toolbox scale: linear (200/3 Hz a mel) to 1 kHz, then 27 steps to each factor of 6.4.
_SLANEY_HZ_PER_MEL = 200.0 / 3.0
_SLANEY_BREAK_HZ = 1000.0
_SLANEY_BREAK_MEL = _SLANEY_BREAK_HZ / _SLANEY_HZ_PER_MEL
_SLANEY_LOG_STEP = math.log(6.4) / 27.0


def hz_to_mel(hz: float, scale: str = "slaney") -> float:
    """Frequency in Hz on the mel scale; `scale` is ``htk`` (2595 log10(1 + f/700)) or ``slaney``."""
    _check_scale(scale)
    if scale == "htk":
        return 2595.0 * math.log10(1.0 + hz / 700.0)
    if hz < _SLANEY_BREAK_HZ:
        return hz / _SLANEY_HZ_PER_MEL
    return _SLANEY_BREAK_MEL + math.log(hz / _SLANEY_BREAK_HZ) / _SLANEY_LOG_STEP


def mel_to_hz(mel: Tensor, scale: str = "slaney") -> Tensor:
    """Inverse of `hz_to_mel`, element-wise, same shape."""
    _check_scale(scale)
    if scale == "htk":
        return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
    linear = mel * _SLANEY_HZ_PER_MEL
    curved = _SLANEY_BREAK_HZ * torch.exp(_SLANEY_LOG_STEP * (mel - _SLANEY_BREAK_MEL))
    return torch.where(mel < _SLANEY_BREAK_MEL, linear, curved)


def _check_scale(scale: str) -> None:
    if scale not in ("htk", "slaney"):
        raise ValueError(f"scale: expected 'htk' or 'slaney', got {scale!r}")


def mel_filterbank(
    n_fft: int,
    sample_rate: int,
    n_mels: int,
    f_min: float = 0.0,
    f_max: float | None = None,
    scale: str = "slaney",
    unit_area: bool = True,
) -> Tensor:
    """Triangular mel filters.

    Args:
        n_fft: FFT length in samples.
        sample_rate: Hz.
        n_mels: number of triangles.
        f_min: foot of the first triangle, Hz.
        f_max: foot of the last triangle, Hz; None: half the sample rate.
        scale: ``slaney`` (librosa's default, DAC) or ``htk``.
        unit_area: divide each triangle by half its width in Hz (Slaney's normalisation); False: peaks of height 1.

    Returns:
        (n_fft // 2 + 1, n_mels) float32. A triangle narrower than the FFT's resolution can be all zero.

    Raises:
        ValueError: a frequency range that is empty or beyond half the sample rate.
    """
    top = sample_rate / 2 if f_max is None else f_max
    if not 0 <= f_min < top <= sample_rate / 2:
        raise ValueError(
            f"f_min, f_max: expected 0 <= f_min < f_max <= {sample_rate / 2} Hz, got {f_min} and {top}; "
            "lower f_max or check sample_rate"
        )
    hz = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    mels = torch.linspace(hz_to_mel(f_min, scale), hz_to_mel(top, scale), n_mels + 2, dtype=torch.float64)
    edges = mel_to_hz(mels, scale)  # (n_mels + 2,)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (hz[:, None] - left) / (centre - left)
    falling = (right - hz[:, None]) / (right - centre)
    bank = torch.minimum(rising, falling).clamp(min=0)  # (n_fft // 2 + 1, n_mels)
    if unit_area:
        bank = bank * (2.0 / (right - left))
    return bank.float()


def _frames(x: Tensor, window: Tensor, n_fft: int, hop_length: int) -> Tensor:
    """Complex STFT of (B,C,L), centred frames with reflected ends -> (B*C, n_fft // 2 + 1, 1 + L // hop)."""
    return torch.stft(
        x.reshape(-1, x.shape[-1]),
        n_fft=n_fft,
        hop_length=hop_length,
        win_length=window.shape[0],
        window=window.float(),
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )


def prepare_sounds(x_hat: Tensor, x: Tensor, mask: Tensor | None, n_fft: int) -> tuple[Tensor, Tensor]:
    """Check a pair of sounds, make them float32, and silence what the mask calls invalid."""
    check_pair(x_hat, x)
    if x.ndim != 3:
        raise ValueError(f"x: expected sound (B,C,L), got shape {tuple(x.shape)}; add the batch or channel axis")
    if x.shape[-1] <= n_fft // 2:
        raise ValueError(
            f"x: expected more than {n_fft // 2} samples (half of the longest window), got {x.shape[-1]}; "
            "use longer clips or shorter windows"
        )
    x_hat, x = x_hat.float(), x.float()
    if mask is None:
        return x_hat, x
    if mask.dtype != torch.bool or mask.shape != (x.shape[0], x.shape[-1]):
        raise ValueError(
            f"mask: expected bool of shape {(x.shape[0], x.shape[-1])} (True = valid sample), "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    valid, zero = mask.unsqueeze(1), x.new_zeros(())
    return torch.where(valid, x_hat, zero), torch.where(valid, x, zero)


def _frame_mask(mask: Tensor | None, hop_length: int, frames: int, channels: int) -> Tensor | None:
    """Validity of each frame = validity of its centre sample -> (B*C, frames); None stays None."""
    if mask is None:
        return None
    last = mask.shape[-1] - 1  # the frame centred just past the end belongs to the last sample
    centres = (torch.arange(frames, device=mask.device) * hop_length).clamp(max=last)
    return mask[:, centres].repeat_interleave(channels, dim=0)


class MultiScaleMelLoss(nn.Module):
    """Sum over scales of the L1 distance of log10 mel magnitudes (DAC, arXiv 2306.06546).

    Window w has n_fft = w, hop = w / 4 and a periodic Hann window; magnitudes (power 1) pass slaney triangles of unit
    area, are clamped to `floor` and go through log10. Triangles that no FFT frequency touches are left out of the mean
    (DAC keeps them as constant zeros, which only dilutes a scale).

    Args:
        sample_rate: Hz.
        window_lengths: samples, each a multiple of 4.
        n_mels: triangles of each scale, as many as `window_lengths`.
        f_min: Hz.
        f_max: Hz; None: half the sample rate.
        floor: smallest mel magnitude that counts; silence has no gradient below it.
        scale: ``slaney`` or ``htk``.

    Raises:
        ValueError: lists of different lengths, or a window that 4 does not divide.
    """

    def __init__(
        self,
        sample_rate: int,
        window_lengths: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048),
        n_mels: Sequence[int] = (5, 10, 20, 40, 80, 160, 320),
        f_min: float = 0.0,
        f_max: float | None = None,
        floor: float = 1e-5,
        scale: str = "slaney",
    ) -> None:
        super().__init__()
        if len(window_lengths) != len(n_mels) or not window_lengths:
            raise ValueError(
                f"n_mels: expected one value for each of the {len(window_lengths)} window_lengths, got {len(n_mels)}"
            )
        if any(w < 4 or w % 4 for w in window_lengths):
            raise ValueError(f"window_lengths: expected multiples of 4 (hop = window / 4), got {tuple(window_lengths)}")
        self.window_lengths = tuple(window_lengths)
        self.floor = floor
        for w, m in zip(window_lengths, n_mels, strict=True):
            bank = mel_filterbank(w, sample_rate, m, f_min, f_max, scale)
            # (n_mels', F): multiplied from the left, so that the STFT's (N, F, frames) needs no transpose.
            bank = bank[:, bank.sum(dim=0) > 0].T.contiguous()
            if bank.shape[0] == 0:
                raise ValueError(f"n_mels: window {w} at {sample_rate} Hz resolves none of {m} mel bands; lengthen it")
            self.register_buffer(f"window_{w}", torch.hann_window(w), persistent=False)
            self.register_buffer(f"bank_{w}", bank, persistent=False)

    def forward(self, x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Distance of two sounds.

        Args:
            x_hat: reconstruction (B,C,L) in [-1,1].
            x: real sound, same shape; its gradient is taken too if it asks for one.
            mask: (B,L) bool, True = valid sample; both sounds are silenced outside, and a frame counts when its centre
                is valid.

        Returns:
            Scalar float32, unit: decades of magnitude (1 = 20 dB) summed over the scales.

        Raises:
            ValueError: shapes that differ, or L not above half of the longest window.
        """
        with torch.autocast(device_type=x.device.type, enabled=False):
            x_hat, x = prepare_sounds(x_hat, x, mask, max(self.window_lengths))
            total = x.new_zeros(())
            for w in self.window_lengths:
                difference = self._log_mel(x_hat, w) - self._log_mel(x, w)  # (B*C, n_mels', frames)
                valid = _frame_mask(mask, w // 4, difference.shape[-1], x.shape[1])
                total = total + masked_mean(difference.abs(), valid)
        return total

    def _log_mel(self, x: Tensor, window_length: int) -> Tensor:
        window: Tensor = getattr(self, f"window_{window_length}")
        bank: Tensor = getattr(self, f"bank_{window_length}")
        magnitude = _frames(x, window, window_length, window_length // 4).abs()
        return torch.matmul(bank.float(), magnitude).clamp(min=self.floor).log10()


class MultiScaleSTFTLoss(nn.Module):
    """Mean over resolutions of spectral convergence and log-magnitude L1 (arXiv 1910.11480 eq. 4 and 5).

    Spectral convergence is ||S - S_hat||_F / ||S||_F over the whole batch, the other term the mean of
    |ln S - ln S_hat|; magnitudes are sqrt(max(re^2 + im^2, floor)).

    Args:
        n_ffts: FFT length of each resolution, samples.
        win_lengths: Hann window of each resolution, samples, not above its FFT length.
        hop_lengths: hop of each resolution, samples.
        convergence_weight: weight of the first term.
        log_weight: weight of the second term.
        floor: smallest power that counts; keeps silence finite in value and gradient.

    Raises:
        ValueError: lists of different lengths, or a window longer than its FFT.
    """

    def __init__(
        self,
        n_ffts: Sequence[int] = (512, 1024, 2048),
        win_lengths: Sequence[int] = (480, 960, 1200),
        hop_lengths: Sequence[int] = (120, 240, 300),
        convergence_weight: float = 1.0,
        log_weight: float = 1.0,
        floor: float = 1e-7,
    ) -> None:
        super().__init__()
        if not len(n_ffts) == len(win_lengths) == len(hop_lengths) > 0:
            raise ValueError(
                "n_ffts, win_lengths, hop_lengths: expected one value of each for every resolution, got "
                f"{len(n_ffts)}, {len(win_lengths)} and {len(hop_lengths)}"
            )
        self.resolutions = tuple(zip(n_ffts, win_lengths, hop_lengths, strict=True))
        for index, (n_fft, win, hop) in enumerate(self.resolutions):
            if not 0 < hop <= win <= n_fft:
                raise ValueError(f"resolution {index}: expected 0 < hop <= window <= n_fft, got {hop}, {win}, {n_fft}")
            self.register_buffer(f"window_{index}", torch.hann_window(win), persistent=False)
        self.convergence_weight = convergence_weight
        self.log_weight = log_weight
        self.floor = floor

    def forward(self, x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Distance of two sounds; arguments, result and errors as in `MultiScaleMelLoss.forward`."""
        with torch.autocast(device_type=x.device.type, enabled=False):
            x_hat, x = prepare_sounds(x_hat, x, mask, max(n_fft for n_fft, _, _ in self.resolutions))
            total = x.new_zeros(())
            for index, (n_fft, _, hop) in enumerate(self.resolutions):
                fake, real = self._magnitude(x_hat, index, n_fft, hop), self._magnitude(x, index, n_fft, hop)
                valid = _frame_mask(mask, hop, real.shape[-1], x.shape[1])
                weight = 1.0 if valid is None else valid.unsqueeze(1).float()
                residual = torch.linalg.vector_norm((real - fake) * weight)
                # Never 0: every magnitude is at least sqrt(floor); the clamp is for a mask that hides everything.
                size = torch.linalg.vector_norm(real * weight).clamp(min=math.sqrt(self.floor))
                log_l1 = masked_mean((real.log() - fake.log()).abs(), valid)
                total = total + self.convergence_weight * residual / size + self.log_weight * log_l1
        return total / len(self.resolutions)

    def _magnitude(self, x: Tensor, index: int, n_fft: int, hop_length: int) -> Tensor:
        window: Tensor = getattr(self, f"window_{index}")
        spectrum = torch.view_as_real(_frames(x, window, n_fft, hop_length))  # (B*C, F, frames, 2)
        return spectrum.square().sum(dim=-1).clamp(min=self.floor).sqrt()


class LogMelLoss(nn.Module):
    """L1 distance of natural-log mel magnitudes at one resolution (HiFi-GAN, arXiv 2010.05646 eq. 3).

    Frame t is centred on the samples t * hop .. (t + 1) * hop, the sound mirrored beyond its ends; magnitudes are
    sqrt(power + 1e-9), triangles slaney's of unit area. The defaults are X-Codec's at 16 kHz, whose weight is 45.

    Args:
        sample_rate: Hz.
        n_fft: FFT length, samples.
        win_length: Hann window, samples, not above `n_fft`.
        hop_length: samples, as odd or even as `n_fft`.
        n_mels: triangles.
        f_min, f_max: Hz; None: half the sample rate.
        floor: smallest mel magnitude that counts.

    Raises:
        ValueError: a hop that leaves half a sample at each end, or lengths out of order.
    """

    window: Tensor
    bank: Tensor

    def __init__(
        self,
        sample_rate: int,
        n_fft: int = 1024,
        win_length: int = 800,
        hop_length: int = 160,
        n_mels: int = 80,
        f_min: float = 0.0,
        f_max: float | None = None,
        floor: float = 1e-5,
    ) -> None:
        super().__init__()
        if not 0 < hop_length <= win_length <= n_fft or (n_fft - hop_length) % 2:
            raise ValueError(
                "expected 0 < hop_length <= win_length <= n_fft and an even n_fft - hop_length, got "
                f"{hop_length}, {win_length} and {n_fft}"
            )
        self.n_fft, self.hop_length, self.floor = n_fft, hop_length, floor
        self.register_buffer("window", torch.hann_window(win_length), persistent=False)
        bank = mel_filterbank(n_fft, sample_rate, n_mels, f_min, f_max).T.contiguous()
        self.register_buffer("bank", bank, persistent=False)  # (n_mels, F)

    def forward(self, x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Distance of two sounds; arguments and errors as in `MultiScaleMelLoss.forward`, unit: natural log."""
        with torch.autocast(device_type=x.device.type, enabled=False):
            x_hat, x = prepare_sounds(x_hat, x, mask, max(self.n_fft, 2 * self.hop_length))
            difference = self._log_mel(x_hat) - self._log_mel(x)  # (B*C, n_mels, frames)
            centred = None if mask is None else mask[:, self.hop_length // 2 :]
            valid = _frame_mask(centred, self.hop_length, difference.shape[-1], x.shape[1])
            return masked_mean(difference.abs(), valid)

    def _log_mel(self, x: Tensor) -> Tensor:
        edge = (self.n_fft - self.hop_length) // 2
        padded = torch.nn.functional.pad(x, (edge, edge), mode="reflect")
        power = torch.view_as_real(
            torch.stft(
                padded.reshape(-1, padded.shape[-1]),
                self.n_fft,
                self.hop_length,
                self.window.shape[0],
                window=self.window.float(),
                center=False,
                return_complex=True,
            )
        ).square()
        magnitude = (power.sum(dim=-1) + 1e-9).sqrt()
        return torch.matmul(self.bank.float(), magnitude).clamp(min=self.floor).log()


class CompressedSpectrumLoss(nn.Module):
    """Squared distance of spectra whose magnitudes are raised to ``power``: with phase, and of the magnitudes alone.

    The compressed complex error of speech enhancement (arXiv 2005.06685, eq. 2): loud and quiet parts count alike,
    and unlike the mel and log distances it also rewards the right phase where the bits allow it.

    Args:
        n_ffts: window lengths in samples; the hop is a quarter.
        power: exponent of the magnitudes.
        phase_share: weight of the complex term; the magnitudes have the rest.
    """

    def __init__(self, n_ffts: Sequence[int] = (320, 1024), power: float = 0.5, phase_share: float = 0.5) -> None:
        super().__init__()
        if not 0 <= phase_share <= 1 or not 0 < power <= 1:
            raise ValueError(f"expected phase_share in [0, 1] and power in (0, 1], got {phase_share} and {power}")
        self.n_ffts, self.power, self.phase_share = tuple(n_ffts), power, phase_share
        for n_fft in self.n_ffts:
            self.register_buffer(f"window_{n_fft}", torch.hann_window(n_fft), persistent=False)

    def _compressed(self, x: Tensor, n_fft: int) -> tuple[Tensor, Tensor]:
        """(B, C, L) -> real and imaginary parts (..., 2) and magnitudes, both compressed."""
        window = self.get_buffer(f"window_{n_fft}")
        spectrum = torch.stft(x.flatten(0, 1), n_fft, n_fft // 4, window=window, normalized=True, return_complex=True)
        parts = torch.view_as_real(spectrum)
        energy = parts.square().sum(-1, keepdim=True) + 1e-8
        return parts * energy ** ((self.power - 1) / 2), energy ** (self.power / 2)

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """(B, C, L) twice -> scalar.

        Raises:
            ValueError: shapes that differ, or a clip of at most half the longest window.
        """
        if x_hat.shape != x.shape or x.shape[-1] <= max(self.n_ffts) // 2:
            raise ValueError(
                f"expected two (B, C, L) of one shape with L > {max(self.n_ffts) // 2}, "
                f"got {tuple(x_hat.shape)} and {tuple(x.shape)}"
            )
        with torch.autocast(x.device.type, enabled=False):
            total = x_hat.new_zeros((), dtype=torch.float32)
            for n_fft in self.n_ffts:
                parts_hat, size_hat = self._compressed(x_hat.float(), n_fft)
                parts, size = self._compressed(x.float(), n_fft)
                with_phase = (parts_hat - parts).square().sum(-1).mean()
                alone = (size_hat - size).square().mean()
                total = total + self.phase_share * with_phase + (1 - self.phase_share) * alone
            return total / len(self.n_ffts)
