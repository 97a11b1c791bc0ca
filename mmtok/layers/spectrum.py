"""A short-time Fourier transform as the outermost layer of a codec: exact lengths, blind to padding, invertible.

Magnitudes are compressed by a square root, which halves the range in dB that the convolutions have to carry.

Both directions also run piece by piece with an explicit state (`mmtok.layers.conv1d.Past`, one for each direction) and
then give what the whole gives: the analysis waits for ``edge`` samples, the synthesis holds as many back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmtok.layers.conv1d import Past, zero_past


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

    def samples_read(self, first: int, last: int) -> tuple[int, int]:
        """First and last sample that `analyse` reads for the frames ``first`` .. ``last``."""
        return first * self.hop_length - self.edge, (last + 1) * self.hop_length - 1 + self.edge

    def frames_read(self, first: int, last: int) -> tuple[int, int]:
        """First and last frame that `synthesise` reads for the samples ``first`` .. ``last``."""
        return (first + self.edge) // self.hop_length - 3, (last + self.edge) // self.hop_length

    def analyse(self, x: Tensor, past: Past | None = None) -> Tensor:
        """(B, 1, L) -> (B, channels, L / hop) float32. Zeros past an item's end leave its own frames as they are.

        With ``past``, the first piece of a stream has ``edge`` samples more than the hops that it gives frames for, and
        ``edge`` zeros after the last sample give the last frames.
        """
        with torch.autocast(x.device.type, enabled=False):
            padded = self._padded(x[:, 0].float(), past)
            frames = padded.unfold(-1, self.n_fft, self.hop_length) * self.window  # (B, T, n_fft)
            spectrum = torch.fft.rfft(frames, norm="ortho")
            parts = torch.view_as_real(spectrum)  # (B, T, F, 2)
            # sqrt of the magnitude, phase kept; the small constant bounds the slope at silence
            parts = self.scale * parts * (parts.square().sum(-1, keepdim=True) + 1e-8) ** -0.25
            return parts.flatten(2).transpose(1, 2).contiguous()

    def _padded(self, x: Tensor, past: Past | None) -> Tensor:
        """(B, L) with what the first and the last frame see beyond it."""
        if past is None:
            return nn.functional.pad(x, (self.edge, self.edge))
        before = past.kept.get(self)
        padded = torch.cat([x.new_zeros(len(x), self.edge) if before is None else before, x], -1)
        if padded.shape[-1] < self.n_fft or (padded.shape[-1] - 2 * self.edge) % self.hop_length:
            first = f", and {self.edge} more in the first piece" if before is None else ""
            raise ValueError(
                f"a piece of a stream: expected a multiple of {self.hop_length} samples{first}, got {x.shape[-1]}"
            )
        past.kept[self] = padded[..., padded.shape[-1] - 2 * self.edge :].clone()
        return padded

    def synthesise(self, parts: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        """(B, channels, T) -> (B, 1, T * hop) float32, weighted overlap-add over each item's own ``lengths`` (B,).

        With ``past`` (and no ``lengths``) the stream stays ``edge`` samples behind; `synthesise_rest` gives them.
        """
        with torch.autocast(parts.device.type, enabled=False):
            B, _, T = parts.shape
            parts = zero_past(parts.float(), lengths).transpose(1, 2).unflatten(2, (-1, 2)) / self.scale  # (B, T, F, 2)
            parts = parts * (parts.square().sum(-1, keepdim=True) + 1e-12).sqrt()  # undo the square root
            frames = torch.fft.irfft(torch.view_as_complex(parts.contiguous()), self.n_fft, norm="ortho") * self.window
            present = zero_past(frames.new_ones(B, 1, T), lengths).transpose(1, 2)  # (B, T, 1)
            if past is None:
                return self._overlapped(frames, present)[:, None, self.edge : self.edge + T * self.hop_length]
            frames, present, skip = self._extended(frames, present, past)
            y = self._overlapped(frames, present)[:, 3 * self.hop_length + skip : (3 + T) * self.hop_length]
            return y[:, None]

    def synthesise_rest(self, past: Past) -> Tensor:
        """(B, 1, n): the samples that `synthesise` still holds back, once the last frame has come."""
        kept = past.kept[self]
        frames, present, skip = self._extended(kept[:, :0, :-1], kept[:, :0, -1:], past)
        return self._overlapped(frames, present)[:, None, 3 * self.hop_length + skip : 3 * self.hop_length + self.edge]

    def _extended(self, frames: Tensor, present: Tensor, past: Past) -> tuple[Tensor, Tensor, int]:
        """Frames (B, T, n_fft) and present (B, T, 1) behind the three before them, which reach into their samples; and
        how many of the first samples lie before the beginning of the sound."""
        before = past.kept.get(self)
        if before is None:
            before = frames.new_zeros(len(frames), 3, self.n_fft + 1)  # none is present
        seen = int(before[0, :, -1].sum())
        both = torch.cat([before, torch.cat([frames, present], -1)], 1)
        past.kept[self] = both[:, both.shape[1] - 3 :].clone()
        return both[..., :-1], both[..., -1:], max(0, self.edge - seen * self.hop_length)

    def _overlapped(self, frames: Tensor, present: Tensor) -> Tensor:
        """(B, T, n_fft) of which ``present`` (B, T, 1) count -> (B, (T + 3) * hop), overlap-add over its weight."""
        weight = present * self.window.square()
        return self._overlap_add(frames) / self._overlap_add(weight).clamp_min(1e-3)

    def _overlap_add(self, frames: Tensor) -> Tensor:
        """(B, T, n_fft) -> (B, (T - 1) * hop + n_fft)."""
        B, T, _ = frames.shape
        quarters = frames.unflatten(2, (4, self.hop_length))  # a frame is four hops
        total = frames.new_zeros(B, T + 3, self.hop_length)
        for i in range(4):
            total = total + nn.functional.pad(quarters[:, :, i], (0, 0, i, 3 - i))
        return total.flatten(1)
