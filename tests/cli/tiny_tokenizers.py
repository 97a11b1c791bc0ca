"""Two tokenizers under the real contract whose codes can be worked out by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from mmtok.layers.text import TextFeatures
from mmtok.tokenizer import AudioTokenizer, ImageTokenizer
from mmtok.tokens import TokenSpec


class TinyImage(ImageTokenizer):
    """16 cells of mean brightness in two levels of 16 codes: the high and the low four bits of a byte."""

    type_name = "image-tiny"

    def __init__(self) -> None:
        super().__init__({})
        self.one = torch.nn.Parameter(torch.ones(1))

    def base_spec(self) -> TokenSpec:
        return TokenSpec(self.name, "image", (16, 16), num_tokens=16)

    def encode_pixels(
        self, x: Tensor, num_codebooks: int | None, num_tokens: int | None, text: TextFeatures | None
    ) -> tuple[Tensor, Tensor]:
        cells = torch.nn.functional.adaptive_avg_pool2d(x.mean(1), 4).flatten(1)
        byte = (cells * 255).round().long()
        codes = torch.stack([byte // 16, byte % 16], dim=1)  # (B, 2, 16)
        codes = codes[:, :num_codebooks, :num_tokens]
        return codes, torch.full((len(x),), codes.shape[2])

    def decode_pixels(
        self,
        codes: Tensor,
        height: int,
        width: int,
        text: TextFeatures | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        byte = codes[:, 0] * 16 + (codes[:, 1] if codes.shape[1] > 1 else 8)
        byte = torch.nn.functional.pad(byte, (0, 16 - byte.shape[1]), value=128)
        cells = (byte / 255 * self.one).reshape(-1, 1, 4, 4).expand(-1, 3, -1, -1)
        return torch.nn.functional.interpolate(cells, (height, width))


class TinyAudio(AudioTokenizer):
    """Loudness of each frame in 64 codes and its loudest half in 2, at 50 Hz."""

    type_name = "audio-tiny"

    def __init__(self) -> None:
        super().__init__({})
        self.one = torch.nn.Parameter(torch.ones(1))

    def base_spec(self) -> TokenSpec:
        return TokenSpec(self.name, "audio", (64, 2), frame_rate=50.0)

    def encode_samples(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        frames = x[:, 0].unflatten(1, (-1, 2, self.hop_length // 2)).square().mean(-1).sqrt()  # (B, T, 2)
        loud = (frames.mean(-1) * 63).round().long().clamp(0, 63)
        return torch.stack([loud, frames.argmax(-1)], dim=1)[:, :num_codebooks]

    def decode_samples(self, codes: Tensor, lengths: Tensor) -> Tensor:
        time = torch.arange(codes.shape[2] * self.hop_length) / self.sample_rate
        loud = (codes[:, 0] / 63).repeat_interleave(self.hop_length, dim=1)
        return (loud * torch.sin(2 * torch.pi * 220 * time) * self.one)[:, None]
