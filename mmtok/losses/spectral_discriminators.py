"""Discriminators of spectra cut in bands (DAC) and of mel spectra (X-Codec), and several discriminators as one.

Their outputs are those of `losses.discriminators`: one ``(logits, feature maps)`` pair for each part, feature maps
after their activation, frames before frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtok.losses.discriminators import DiscriminatorOutput, NormedConv2d, check_sound
from mmtok.losses.spectral import mel_filterbank

BANDS = ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))


class _BandedPart(nn.Module):
    """One window length: a stack of convolutions for each band, and one head over their outputs side by side."""

    window: Tensor

    def __init__(
        self, n_fft: int, in_channels: int, width: int, bands: Sequence[tuple[float, float]], slope: float
    ) -> None:
        super().__init__()
        self.n_fft, self.slope = n_fft, slope
        size = n_fft // 2 + 1
        self.bands = tuple((int(low * size), int(high * size)) for low, high in bands)
        if any(not 0 <= low < high <= size for low, high in self.bands):
            raise ValueError(
                f"bands: expected shares 0 <= low < high <= 1 with a frequency of n_fft {n_fft} in each, got "
                f"{tuple(bands)}; lengthen the window or widen the band"
            )
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.stacks = nn.ModuleList(self._stack(2 * in_channels, width) for _ in self.bands)
        self.head = NormedConv2d(width, 1, (3, 3), padding=(1, 1))

    @staticmethod
    def _stack(channels: int, width: int) -> nn.ModuleList:
        striding = [NormedConv2d(width, width, (3, 9), stride=(1, 2), padding=(1, 4)) for _ in range(3)]
        first = NormedConv2d(channels, width, (3, 9), padding=(1, 4))
        return nn.ModuleList([first, *striding, NormedConv2d(width, width, (3, 3), padding=(1, 1))])

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        spectrum = self.spectrum(x)
        maps, outputs = [], []
        for (low, high), stack in zip(self.bands, self.stacks, strict=True):
            band = spectrum[..., low:high]
            assert isinstance(stack, nn.ModuleList)
            for layer in stack:
                band = F.leaky_relu(layer(band), self.slope)
                maps.append(band)
            outputs.append(band)
        return self.head(torch.cat(outputs, dim=-1)), maps

    def spectrum(self, x: Tensor) -> Tensor:
        """(B,C,L) -> real and imaginary parts as channels (B, 2C, ceil(L / hop), n_fft // 2 + 1).

        Frame t is centred on the samples t * hop .. (t + 1) * hop; beyond its ends the sound is mirrored.
        """
        B, C, L = x.shape
        hop = self.n_fft // 4
        edge = (self.n_fft - hop) // 2
        with torch.autocast(device_type=x.device.type, enabled=False):
            padded = F.pad(x.float(), (edge, edge + -L % hop), mode="reflect")
            spectrum = torch.stft(
                padded.flatten(0, 1), self.n_fft, hop, window=self.window.float(), center=False, return_complex=True
            )
            parts = torch.view_as_real(spectrum).unflatten(0, (B, C))  # (B, C, F, frames, 2)
            return parts.permute(0, 4, 1, 3, 2).flatten(1, 2)  # (B, 2C, frames, F)


class MultiResolutionDiscriminator(nn.Module):
    """Complex STFTs of several windows, each cut into frequency bands that have convolutions of their own (DAC, arXiv
    2306.06546 section 3.4).

    Each band: a 3 x 9 convolution (frames x frequencies), three of stride 2 in frequency and a 3 x 3 one; the bands'
    outputs stand side by side under one 3 x 3 head. The hop is a quarter of the window and the STFT is not scaled.
    DAC's whole game is ``JoinedDiscriminator([MultiPeriodDiscriminator(), MultiResolutionDiscriminator()], peak=0.8)``.

    Args:
        n_ffts: window length of each part, samples, multiples of 8.
        in_channels: C of the sound.
        width: channels of every hidden layer.
        bands: shares of the spectrum (low, high), 0 = 0 Hz, 1 = half the sample rate.
        slope: of the LeakyReLUs.

    Raises:
        ValueError: a window that 8 does not divide, or a band without a frequency.
    """

    def __init__(
        self,
        n_ffts: Sequence[int] = (2048, 1024, 512),
        in_channels: int = 1,
        width: int = 32,
        bands: Sequence[tuple[float, float]] = BANDS,
        slope: float = 0.1,
    ) -> None:
        super().__init__()
        if not n_ffts or any(n < 8 or n % 8 for n in n_ffts):
            raise ValueError(f"n_ffts: expected multiples of 8 (hop n_fft / 4, edge 3 / 8), got {tuple(n_ffts)}")
        if not bands:
            raise ValueError("bands: expected at least one (low, high), got none; use ((0.0, 1.0),) for the whole")
        self.in_channels = in_channels
        self.shortest = max(n_ffts) * 5 // 8  # the mirrored edge and the filling of the last hop
        self.parts = nn.ModuleList(_BandedPart(n, in_channels, width, bands, slope) for n in n_ffts)

    def forward(self, x: Tensor) -> DiscriminatorOutput:
        """Judge sound (B,C,L) with L >= 5/8 of the longest window.

        Returns:
            For each window: logits (B, 1, frames, F') and the feature maps of all bands (B, width, frames, F'').

        Raises:
            ValueError: wrong shape, or sound too short for the longest window.
        """
        check_sound(x, self.in_channels, self.shortest, "5/8 of the longest window")
        return [part(x) for part in self.parts]


class _MelPart(nn.Module):
    """One hop: mel magnitudes and their decibels as channels, then seven 3 x 3 convolutions."""

    window: Tensor
    bank: Tensor

    def __init__(self, hop_length: int, width: int, in_channels: int, sample_rate: int) -> None:
        super().__init__()
        self.hop_length, self.n_fft = hop_length, 4 * hop_length
        size = self.n_fft // 2 + 1
        # As many triangles as frequencies: most low ones fall between two FFT lines, and the floor keeps them above 0.
        bank = mel_filterbank(self.n_fft, sample_rate, size, scale="htk", unit_area=False).clamp(min=1e-6)
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)
        self.register_buffer("bank", bank, persistent=False)  # (F, F)
        widths = [2 * in_channels, *(width // share for share in (32, 16, 8, 4, 2, 1))]
        self.layers = nn.ModuleList(
            NormedConv2d(before, after, (3, 3), stride=(1 + i % 2, 1 + i % 2))
            for i, (before, after) in enumerate(pairwise(widths))
        )
        self.head = NormedConv2d(width, 1, (3, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.mels(x)
        maps = []
        for layer in self.layers:
            x = F.leaky_relu(layer(self._mirrored(x)), 0.2)
            maps.append(x)
        return self.head(self._mirrored(x)), maps

    @staticmethod
    def _mirrored(x: Tensor) -> Tensor:
        return F.pad(x, (1, 1, 1, 1), mode="reflect")

    def mels(self, x: Tensor) -> Tensor:
        """(B,C,L) -> (B, 2C, 1 + L // hop, F): mel magnitudes, then decibels from -80 to 20 mapped to 0 .. 1."""
        B, C, _ = x.shape
        with torch.autocast(device_type=x.device.type, enabled=False):
            spectrum = torch.stft(
                x.float().flatten(0, 1),
                self.n_fft,
                self.hop_length,
                window=self.window.float(),
                normalized=True,
                return_complex=True,
            )
            power = torch.view_as_real(spectrum).square().sum(dim=-1)  # (B*C, F, frames)
            magnitude = power.clamp(min=1e-7).sqrt().transpose(1, 2)  # (B*C, frames, F)
            mels = (magnitude @ self.bank.float()).unflatten(0, (B, C))  # (B, C, frames, F)
            decibels = ((20 * mels.log10() - 20 + 100) / 100).clamp(0, 1)
            return torch.cat([mels, decibels], dim=1)


class MultiFrequencyDiscriminator(nn.Module):
    """Mel spectra of several hops, as magnitudes and as decibels, under 2-D convolutions (X-Codec, arXiv 2408.17175;
    sizes of its released configuration).

    For each hop: STFT of window 4 * hop, divided by sqrt(window); magnitudes m = sqrt(max(power, 1e-7)); HTK triangles
    of height 1, as many as the STFT has frequencies, weights at least 1e-6; second channel clamp(0.8 + log10(m) / 5,
    0, 1). Seven 3 x 3 convolutions with mirrored edges, of strides 1, 2, 1, 2, 1, 2, 1 in both directions; hidden
    widths h/32, h/16, ..., h. Frames come before frequencies here and after them in the original, which its square
    kernels do not notice.

    Args:
        sample_rate: Hz.
        hop_lengths: samples, each >= 4.
        widths: h of each hop, multiples of 32, as many as `hop_lengths`.
        in_channels: C of the sound.

    Raises:
        ValueError: lists of different lengths, a width that 32 does not divide, a hop below 4.
    """

    def __init__(
        self,
        sample_rate: int,
        hop_lengths: Sequence[int] = (32, 64, 128, 256, 512, 1024),
        widths: Sequence[int] = (64, 128, 256, 512, 512, 512),
        in_channels: int = 1,
    ) -> None:
        super().__init__()
        if len(hop_lengths) != len(widths) or not widths:
            raise ValueError(
                f"widths: expected one for each of the {len(hop_lengths)} hop_lengths (>= 1), got {len(widths)}"
            )
        if any(w < 32 or w % 32 for w in widths) or min(hop_lengths) < 4:
            raise ValueError(
                f"expected widths that 32 divides and hop_lengths >= 4, got {tuple(widths)} and {tuple(hop_lengths)}"
            )
        self.in_channels = in_channels
        # Mirroring needs 2 frames at the head, which sees an eighth of them: 9 frames, 8 hops.
        self.shortest = 8 * max(hop_lengths)
        self.parts = nn.ModuleList(
            _MelPart(hop, width, in_channels, sample_rate) for hop, width in zip(hop_lengths, widths, strict=True)
        )

    def forward(self, x: Tensor) -> DiscriminatorOutput:
        """Judge sound (B,C,L) with L >= 8 times the longest hop.

        Returns:
            For each hop: logits (B, 1, frames', F') and six feature maps (B, width', frames', F').

        Raises:
            ValueError: wrong shape, or sound too short for the longest hop.
        """
        check_sound(x, self.in_channels, self.shortest, "8 times the longest hop")
        return [part(x) for part in self.parts]


class JoinedDiscriminator(nn.Module):
    """Several discriminators as one: their parts one after the other, each counting alike in the losses.

    Args:
        parts: discriminators of one kind of input.
        peak: None: every part sees the signal as it is; a number: each channel first loses its mean and is scaled so
            that its largest magnitude is this (DAC: 0.8).

    Raises:
        ValueError: no parts, or a peak that is not positive.
    """

    def __init__(self, parts: Sequence[nn.Module], peak: float | None = None) -> None:
        super().__init__()
        if not parts:
            raise ValueError("parts: expected at least one discriminator, got none")
        if peak is not None and peak <= 0:
            raise ValueError(f"peak: expected > 0, got {peak}; use None to leave the signal as it is")
        self.parts = nn.ModuleList(parts)
        self.peak = peak

    def forward(self, x: Tensor) -> DiscriminatorOutput:
        """Judge x as the parts do; with a ``peak``, sound (B,C,L) only.

        Returns:
            The pairs of all parts in their order.

        Raises:
            ValueError: what a part refuses.
        """
        if self.peak is not None:
            x = x.float() - x.float().mean(dim=-1, keepdim=True)
            x = self.peak * x / (x.abs().amax(dim=-1, keepdim=True) + 1e-9)
        return [pair for part in self.parts for pair in part(x)]
