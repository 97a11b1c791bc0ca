"""How the codes of one sound become sound while they still arrive: at once, in windows, or at the end.

All three take whole frames by ``push`` and end with ``finish``; the pieces that they give, one after the other, are
``tok.decode`` of the whole.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mmtok.tokenizer import AudioTokenizer
from mmtok.tokens import Tokens, TokenSpec, side_value


class Sound(abc.ABC):
    """One sound on its way; ``side`` is what its header says."""

    def __init__(self, tokenizer: AudioTokenizer, spec: TokenSpec, side: Mapping[str, Tensor]) -> None:
        self.tokenizer, self.spec, self.side = tokenizer, spec, dict(side)
        said = Tokens(torch.zeros(1, spec.num_codebooks, 0, dtype=torch.int64), torch.tensor([0]), spec, self.side)
        self.channels = side_value(said, "channels", 1, range(1, 2**16))
        self.rate = side_value(said, "sample_rate", tokenizer.sample_rate, range(1, 2**31))
        self.wanted = side_value(said, "num_samples", 0, range(2**63)) if "num_samples" in self.side else None
        self.frames = 0  # positions taken

    def describes(self, positions: int) -> int:
        """Samples a channel that the first so many positions stand for."""
        frames = positions // self.channels
        samples = frames * self.tokenizer.hop_length * self.rate // self.tokenizer.sample_rate
        return samples if self.wanted is None else min(samples, self.wanted)

    def whole(self, codes: Tensor, side: Mapping[str, Tensor]) -> Tokens:
        return Tokens(codes[None], torch.tensor([codes.shape[1]]), self.spec, dict(side))

    @abc.abstractmethod
    def push(self, codes: Tensor) -> Tensor | None:
        """Codes (Q, n) of further positions -> (C, samples), or None."""

    @abc.abstractmethod
    def finish(self) -> Tensor | None:
        """The rest, (C, samples)."""


class Live(Sound):
    """With ``tok.decode_streamer()``: the sound of each frame as soon as its codes are there."""

    def __init__(self, tokenizer: AudioTokenizer, spec: TokenSpec, side: Mapping[str, Tensor]) -> None:
        super().__init__(tokenizer, spec, side)
        self.streamer = tokenizer.decode_streamer()
        self.counted = 0

    def _piece(self, codes: Tensor, samples: int) -> Tensor:
        counts = {} if self.wanted is None else {"num_samples": torch.tensor([samples])}
        self.counted += samples
        return self.streamer.push(self.whole(codes, self.side | counts))

    def push(self, codes: Tensor) -> Tensor | None:
        self.frames += codes.shape[1]
        if self.wanted is not None and self.describes(self.frames - codes.shape[1]) == self.wanted:
            return None  # positions behind the end of the sound
        return self._piece(codes, self.describes(self.frames) - self.counted)

    def finish(self) -> Tensor | None:
        if not self.frames:
            return None
        out = []
        if self.wanted is not None:
            # a header may count one sample more than whole frames stand for, where rates differ
            rest = self.tokenizer.true_length(self.frames // self.channels, self.wanted, self.rate) - self.counted
            out = [self._piece(torch.zeros(self.spec.num_codebooks, 0, dtype=torch.int64), rest)] if rest > 0 else []
        return torch.cat([*out, self.streamer.flush()], 1)


class Windows(Sound):
    """In windows that overlap by what the decoder sees of other frames.

    Args:
        fields: frames before and past its own that the sound of a frame depends on at most.
        step: frames between two windows.
    """

    def __init__(
        self,
        tokenizer: AudioTokenizer,
        spec: TokenSpec,
        side: Mapping[str, Tensor],
        fields: tuple[int, int],
        step: int,
    ) -> None:
        super().__init__(tokenizer, spec, side)
        self.fields, self.step = fields, step
        self.codes = torch.zeros(spec.num_codebooks, 0, dtype=torch.int64)  # those that are still needed
        self.done = self.dropped = self.given = 0  # frames decoded, frames no longer kept, samples

    def push(self, codes: Tensor) -> Tensor | None:
        self.frames += codes.shape[1]
        self.codes = torch.cat([self.codes, codes], 1)
        ready = (self.frames - self.fields[1] - self.done) // self.step * self.step
        return self._decode(self.done + ready) if ready > 0 else None

    def finish(self) -> Tensor | None:
        if not self.frames:
            return None
        group = self.tokenizer.frame_group
        sound = self._decode(
            self.frames // group * group
        )  # as decode does with the frames of a group that is not whole
        if self.wanted is None:
            return sound
        rest = self.tokenizer.true_length(self.frames // group * group, self.wanted, self.rate) - self.given
        return sound if rest <= 0 else torch.cat([sound, sound.new_zeros(len(sound), rest)], 1)

    def _decode(self, stop: int) -> Tensor:
        before, past = self.fields
        start, first = self.done, max(0, self.done - before)
        window = self.codes[:, first - self.dropped : min(stop + past, self.frames) - self.dropped]
        hop, sound = self.tokenizer.hop_length, torch.zeros(1, 0)
        if stop > start:
            decoded = self.tokenizer.decode(self.whole(window, {}))[0]
            sound = decoded[:, (start - first) * hop : (stop - first) * hop]
        sound = sound[:, : self.describes(stop) - self.given]
        self.given += sound.shape[1]
        self.done = stop
        keep = max(0, stop - before)
        self.codes, self.dropped = self.codes[:, keep - self.dropped :], keep
        return sound


class AtEnd(Sound):
    """The whole at its end, for decoders that see all of it, and for sound of another rate or of several channels."""

    def __init__(self, tokenizer: AudioTokenizer, spec: TokenSpec, side: Mapping[str, Tensor]) -> None:
        super().__init__(tokenizer, spec, side)
        self.parts: list[Tensor] = []

    def push(self, codes: Tensor) -> Tensor | None:
        self.frames += codes.shape[1]
        self.parts.append(codes)
        return None

    def finish(self) -> Tensor | None:
        return self.tokenizer.decode(self.whole(torch.cat(self.parts, 1), self.side))[0] if self.frames else None


def fields_of(tokenizer: AudioTokenizer) -> tuple[int, int] | None:
    """Frames before and past its own that the sound of a frame depends on at most, in whole groups; None: unbounded."""
    margins = [getattr(tokenizer, name, None) for name in ("margin", "decode_margin")]
    margin = next((int(m) for m in margins if m is not None), None)
    exact = getattr(tokenizer, "decoder_field", None)
    if exact is None and margin is None:
        return None
    before, past = exact or (margin or 0, margin or 0)
    group = tokenizer.frame_group
    return math.ceil(before / group) * group, math.ceil(past / group) * group
