"""What the laws are measured on: the photograph and the sentence that come with mmtok, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtok.data import audio as audio_io
from mmtok.data import images as image_io
from mmtok.tokenizer import Tokenizer
from mmtok.tokens import Tokens

PICTURE_SIZES = ((64, 64), (33, 57), (80, 48))  # a square, odd sides, another shape
CLIP_SHARES = (1.0, 0.61, 0.37)


class Subject:
    """A tokenizer under measurement, its probes, and what it gave for each of them alone.

    Attributes:
        clips: at least three probes of different sizes: sounds (C, L) at ``rate``, or pictures (C, H, W).
        alike: three probes of one shape.
    """

    def __init__(
        self, tokenizer: Tokenizer, items: Sequence[Any] | None, sample_rate: int | None, seconds: float, seed: int
    ):
        self.tokenizer, self.seed = tokenizer, seed
        self.audio = tokenizer.modality == "audio"
        self.rate: int | None = int(getattr(tokenizer, "sample_rate", 16000)) if self.audio else None
        self.hop = int(getattr(tokenizer, "hop_length", 160))
        if items is not None and len(items) < 3:
            raise ValueError(f"items: expected at least three, to make batches of, got {len(items)}")
        if seconds <= 0:
            raise ValueError(f"seconds: expected a positive length, got {seconds}")
        self.generator = torch.Generator().manual_seed(seed)
        probes = self._sounds(items, sample_rate, seconds) if self.audio else self._pictures(items)
        self.clips, self.alike = probes
        self._alone: dict[int, Tokens] = {}

    def _sounds(
        self, items: Sequence[Any] | None, sample_rate: int | None, seconds: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        rate = int(self.rate or 0)
        most = max(3 * self.hop, round(seconds * rate))
        if items is None:
            sound = audio_io.to_sounds(asset("speech.flac"), None)[0][0]
            speech = audio_io.resample(sound.samples[:1], sound.sample_rate, rate)
            begin = loudest(speech[0], most)
            speech = speech.roll(-begin, 1).repeat(1, -(-4 * most // speech.shape[1]))
            clips = [speech[:, : round(most * share) + i] for i, share in enumerate(CLIP_SHARES)]
            alike = [speech[:, start : start + most] for start in (0, most // 3, most)]
            return [*clips, self.noise(1, round(most * 0.5) + 7)], alike
        sounds, _ = audio_io.to_sounds(list(items), sample_rate)
        clips = [audio_io.resample(s.samples, s.sample_rate, rate)[:, :most] for s in sounds]
        shortest = min(c.shape[1] for c in clips)
        return clips, [c[:1, :shortest] for c in clips[:3]]

    def _pictures(self, items: Sequence[Any] | None) -> tuple[list[Tensor], list[Tensor]]:
        if items is None:
            photo = image_io.read_image(asset("chelsea.jpg"))
            clips = []
            for i, (height, width) in enumerate(PICTURE_SIZES):
                part = photo[:, 20 * i : 20 * i + 3 * height, 100 : 100 + 3 * width]
                clips.append(torch.nn.functional.avg_pool2d(part, 3)[:, :height, :width])
            clips.append(torch.rand(3, 40, 40, generator=self.generator))
            alike = [photo[:, y : y + 64, x : x + 64].clone() for y, x in ((30, 120), (60, 200), (100, 60))]
            return clips, alike
        clips = [image_io.to_rgb(p.pixels) for p in image_io.to_pictures(list(items))[0]]
        height, width = (min(c.shape[i] for c in clips) for i in (1, 2))
        return clips, [c[:, :height, :width].clone() for c in clips[:3]]

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).mul(0.1).clamp(-1, 1)

    def encode(self, x: Any, num_codebooks: int | None = None, num_tokens: int | None = None) -> Tokens:
        return self.tokenizer.encode(x, self.rate, num_codebooks=num_codebooks, num_tokens=num_tokens)

    def alone(self, i: int) -> Tokens:
        """Clip ``i`` encoded by itself, once."""
        if i not in self._alone:
            self._alone[i] = self.encode(self.clips[i])
        return self._alone[i]


def loudest(x: Tensor, length: int) -> int:
    """Where the loudest ``length`` samples of (L,) begin."""
    energy = torch.nn.functional.pad(x.double().square().cumsum(0), (1, 0))
    return int((energy[length:] - energy[:-length]).argmax()) if length < len(x) else 0


def asset(name: str) -> Path:
    """A file that comes with mmtok."""
    return Path(__file__).parent.parent / "assets" / name
