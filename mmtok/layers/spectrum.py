"""A short-time Fourier transform as the outermost layer of a codec: exact lengths, blind to padding, invertible.

Magnitudes are compressed by a square root, which halves the range in dB that the convolutions have to carry.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmtok.layers.conv1d import zero_past


class Spectrum(nn.Module):
    """Sound (B, 1, L) <-> real and imaginary parts (B, 2 * (n_fft / 2 + 1), L / hop) of its compressed spectrum.

    Frame t is centred on the samples t * hop .. (t + 1) * hop; Hann window of 4 hops. L is a multiple of the hop.
    """

    window: Tensor
    scale = 4.0  # speech of usual level then reaches the convolutions at about unit variance, where Snake bends

    def __init__(self, hop_length: int):
        super().__init__()
        if hop_length % 2:
            raise ValueError(f"hop_length: expected an even number of samples, got {hop_length}")
        self.hop_length, self.n_fft = hop_length, 4 * hop_length
        self.edge = (self.n_fft - hop_length) // 2  # samples that a frame sees on either side of its own hop
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)

    @property
    def channels(self) -> int:
        return self.n_fft + 2

    def analyse(self, x: Tensor) -> Tensor:
        """(B, 1, L) -> (B, channels, L / hop) float32. Zeros past an item's end leave its own frames as they are."""
        with torch.autocast(x.device.type, enabled=False):
            padded = nn.functional.pad(x[:, 0].float(), (self.edge, self.edge))
            frames = padded.unfold(-1, self.n_fft, self.hop_length) * self.window  # (B, T, n_fft)
            spectrum = torch.fft.rfft(frames, norm="ortho")
            parts = torch.view_as_real(spectrum)  # (B, T, F, 2)
            # sqrt of the magnitude, phase kept; the small constant bounds the slope at silence
            parts = self.scale * parts * (parts.square().sum(-1, keepdim=True) + 1e-8) ** -0.25
            return parts.flatten(2).transpose(1, 2).contiguous()

    def synthesise(self, parts: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, channels, T) -> (B, 1, T * hop) float32, weighted overlap-add over each item's own ``lengths`` (B,)."""
        with torch.autocast(parts.device.type, enabled=False):
            B, _, T = parts.shape
            parts = zero_past(parts.float(), lengths).transpose(1, 2).unflatten(2, (-1, 2)) / self.scale  # (B, T, F, 2)
            parts = parts * (parts.square().sum(-1, keepdim=True) + 1e-12).sqrt()  # undo the square root
            frames = torch.fft.irfft(torch.view_as_complex(parts.contiguous()), self.n_fft, norm="ortho") * self.window
            present = zero_past(frames.new_ones(B, 1, T), lengths).transpose(1, 2)  # (B, T, 1)
            weight = present * self.window.square()
            y = self._overlap_add(frames) / self._overlap_add(weight).clamp_min(1e-3)
            return y[:, None, self.edge : self.edge + T * self.hop_length]

    def _overlap_add(self, frames: Tensor) -> Tensor:
        """(B, T, n_fft) -> (B, (T - 1) * hop + n_fft)."""
        B, T, _ = frames.shape
        quarters = frames.unflatten(2, (4, self.hop_length))  # a frame is four hops
        total = frames.new_zeros(B, T + 3, self.hop_length)
        for i in range(4):
            total = total + nn.functional.pad(quarters[:, :, i], (0, 0, i, 3 - i))
        return total.flatten(1)
