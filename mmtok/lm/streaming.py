"""Sound while a language model still writes its ids.

    reader = AudioFromIds(vocab, tok)
    for i in ids:
        if (sound := reader.push(i)) is not None:
            play(sound)                                   # (C, n)
    rest = reader.flush()

or, with transformers, ``model.generate(..., streamer=PlayIds(reader, play))``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mmtok.lm.rows import open_from
from mmtok.lm.segments import Segment
from mmtok.lm.sounds import AtEnd, Live, Sound, Windows, fields_of
from mmtok.tokenizer import AudioTokenizer
from mmtok.tokens import Tokens, TokensError
from mmtok.vocab.layouts import PAD
from mmtok.vocab.salvage import Damage, SalvageReport
from mmtok.vocab.vocab import Vocab


@dataclasses.dataclass(frozen=True)
class Event:
    """What `AudioFromIds` tells in the order of the ids.

    Args:
        kind: ``text`` (``ids``, and ``text`` where the vocab has a tokenizer: whole characters), ``sound`` (``sound``
            (C, n), the next samples of the open segment), ``tokens`` (``tokens``: a segment has ended, with all that
            could be read of it) or ``refused`` (``text``: why a sound cannot be decoded, e.g. a header of 0 channels).
        position: of the first id that it is about, in all that was pushed.
    """

    kind: str
    position: int
    ids: tuple[int, ...] = ()
    text: str | None = None
    sound: Tensor | None = None
    tokens: Tokens | None = None


class AudioFromIds:
    """Decodes audio while its ids arrive: all that ``push`` and ``flush`` give is ``tok.decode`` of each segment.

    With a tokenizer that streams (``tok.decode_streamer()``) a frame sounds as soon as all its levels are there (with
    ``delay`` that is when its diagonal is). With another one whose decoder sees a bounded number of frames
    (``decoder_field``, ``margin``, ``decode_margin``) the sound comes in windows of ``window`` frames that overlap by
    so many; with the rest, with the layout ``coarse_first`` and (where the tokenizer does not stream) with a header of
    another sample rate or of several channels, when the segment ends.

    A segment without header tells its number of levels by its second frame at the latest, the last level of the vocab
    at once; ``num_codebooks`` spares that wait.

    Where an id may not stand, the segment is read up to there, by the policy ``repair`` of `mmtok.vocab.salvage`: what
    has sounded until then stays, the rest of it sounds where it has the same levels, and ``report`` tells the damage,
    all of it after ``flush``.

    Args:
        vocab: whose ids; it must have this tokenizer's audio.
        tokenizer: an audio tokenizer.
        num_codebooks: levels of the segments, where all have so many.
        window: frames between two windows; None: as many as they overlap by, so that the work is twice that of decode.
        on_event: called with each `Event`, in the order of the ids.

    Raises:
        ValueError: a tokenizer that is not the vocab's, or counts out of range.
    """

    def __init__(
        self,
        vocab: Vocab,
        tokenizer: AudioTokenizer,
        num_codebooks: int | None = None,
        window: int | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        block = vocab.blocks.get("audio")
        if block is None or block.spec.fingerprint != tokenizer.spec.fingerprint:
            found = "no audio" if block is None else f"the audio of {block.spec.name!r}"
            raise ValueError(f"vocab: expected one with audio={tokenizer.name!r}'s spec, got one with {found}")
        if num_codebooks is not None and not 1 <= num_codebooks <= len(block.levels):
            raise ValueError(f"num_codebooks: expected 1..{len(block.levels)}, got {num_codebooks}")
        if window is not None and window < 1:
            raise ValueError(f"window: expected at least 1 frame, got {window}")
        self.vocab, self.tokenizer, self.num_codebooks, self.on_event = vocab, tokenizer, num_codebooks, on_event
        self.streams = bool(tokenizer.timing()["streams"])
        self.fields = None if self.streams else fields_of(tokenizer)
        group = tokenizer.frame_group
        self.window = 0
        if self.fields is not None:
            self.window = math.ceil((sum(self.fields) if window is None else window) / group) * group or group
        self.position = 0  # ids so far
        self.ended = False
        self._openers = {b.begin: b for b in vocab.blocks.values()}
        self._segment: Segment | None = None
        self._text: list[int] = []
        self._shown, self._told = 0, 0  # characters and ids of the text that were handed out
        self._stray: list[int] = []
        self._items: list[Damage] = []
        self._out: list[Tensor] = []

    @property
    def report(self) -> SalvageReport:
        """What was damaged so far, by position in all that was pushed."""
        return SalvageReport(tuple(sorted(self._items, key=lambda item: item.position)))

    @functools.cached_property
    def latency_frames(self) -> float:
        """Algorithmic latency: so many further frames must have begun, at most, before a whole frame sounds.

        That of the layout (delay: its largest delay; coarse_first: without bound), of groups, and of the decoder (its
        lookahead where it streams, else the frames past its own that it sees and the step of the windows). ``math.inf``
        where a segment sounds only when it has ended. A tokenizer of several channels counts their frames one by one.
        """
        group = self.tokenizer.frame_group - 1
        layout = self._layout_latency()
        if self.streams:
            lookahead = getattr(self.tokenizer, "decode_lookahead", 0)
            return layout + group + math.ceil(lookahead / self.tokenizer.hop_length)
        return math.inf if self.fields is None else layout + group + self.fields[1] + self.window - 1

    def _layout_latency(self) -> float:
        block = self.vocab.blocks["audio"]
        strides = block.spec.level_strides[: self.num_codebooks]
        found = []
        for T in (64, 128):
            T *= max(strides)
            level, at = block.layout.order(strides, T)
            slow = np.asarray(strides)[level]
            begun = np.maximum.accumulate(np.where(level == PAD, -1, at))  # the last frame begun, at each id
            last = np.zeros(T, np.int64)
            inside = np.flatnonzero(level != PAD)
            for step in range(max(strides)):  # a code stands for `slow` frames
                some = inside[(step < slow[inside]) & (at[inside] + step < T)]
                np.maximum.at(last, at[some] + step, some)
            found.append(int((begun[last] - np.arange(T)).max()))
        return float(found[0]) if found[0] == found[1] else math.inf

    def push(self, ids: int | Sequence[int] | Tensor) -> Tensor | None:
        """Take the next ids, one or several; the sound (C, n) that is now final, or None.

        Raises:
            ValueError: after ``flush``; or where the ids hold the sound of segments with different channel counts or
                rates, which only ``on_event`` tells apart.
        """
        if self.ended:
            raise ValueError("this stream has ended with flush(): expected no more ids; take a new AudioFromIds")
        values = ids.reshape(-1).tolist() if isinstance(ids, Tensor) else [ids] if isinstance(ids, int) else list(ids)
        for i in values:
            self._take(i)
            self.position += 1
        if self._segment is not None:
            self._play(self._segment)
        self._tell_text(False)
        return self._given()

    def flush(self) -> Tensor | None:
        """End the stream: the rest of the sound, or None. A segment that is still open is cut, see ``report``."""
        if self.ended:
            raise ValueError("this stream has already ended with flush(); take a new AudioFromIds")
        self.ended = True
        if self._segment is not None:
            self._close(self._segment, [])
        self._drop_stray([])
        self._tell_text(True)
        return self._given()

    def _given(self) -> Tensor | None:
        parts, self._out = self._out, []
        if not parts:
            return None
        if len({len(p) for p in parts}) > 1:
            raise ValueError(
                f"expected ids of sound with one number of channels in one push, got {[len(p) for p in parts]}; push "
                "fewer ids at a time, or take the sound from on_event"
            )
        return torch.cat(parts, 1)

    def _take(self, i: int) -> None:
        segment = self._segment
        if segment is not None:
            if not segment.damaged:
                segment.damaged = not segment.take(i)
            else:
                segment.ids.append(i)
            if i == segment.block.end:
                self._close(segment, [])
                return
            if not segment.damaged or not (0 <= i < self.vocab.text_size or i in self._openers):
                return
            segment.ids.pop()
            self._close(segment, [i])
        if 0 <= i < self.vocab.text_size:
            self._drop_stray([i])
            self._text.append(i)
        elif i in self._openers:
            self._drop_stray([i])
            self._tell_text(True)
            block = self._openers[i]
            pinned = self.num_codebooks if block.spec.modality == "audio" else None
            self._segment = Segment(self.vocab, block, self.position, pinned)
        else:
            self._stray.append(i)

    def _pins(self) -> Mapping[str, int]:
        return {} if self.num_codebooks is None else {"audio": self.num_codebooks}

    def _drop_stray(self, after: list[int]) -> None:
        if self._stray:
            self._salvage(self._stray, after, self.position - len(self._stray))
            self._stray = []

    def _salvage(self, ids: list[int], after: list[int], start: int) -> Tokens | None:
        """The Tokens in damaged ``ids``, of which the first stands at ``start``; ``after`` is the id behind them."""
        saved = self.vocab.salvage(ids + after, num_codebooks=self._pins())
        for item in saved.report.items:
            if item.start < len(ids):  # not the segment that opens behind them
                moved = {"position": item.position + start, "start": item.start + start}
                self._items.append(dataclasses.replace(item, **moved))
        return next((part for part in saved.parts if isinstance(part, Tokens)), None)

    def _close(self, segment: Segment, after: list[int]) -> None:
        self._segment = None
        if not segment.damaged and segment.ids[-1] == segment.block.end:
            tokens = next(part for part in self.vocab.unpack(segment.ids) if isinstance(part, Tokens))
        else:
            tokens = self._salvage(segment.ids, after, segment.position)
        if segment.block.spec.modality == "audio" and not segment.refused:
            self._finish(segment, tokens)
        if tokens is not None:
            self._tell(Event("tokens", segment.position, tokens=tokens))

    def _finish(self, segment: Segment, tokens: Tokens | None) -> None:
        """The rest of a sound whose Tokens are known now."""
        try:
            if tokens is not None and not segment.taken:  # nothing has sounded: all is as salvage says
                segment.sound = self._sound(tokens.spec.num_codebooks, tokens.side)
            if segment.sound is None:
                return
            T, Q = (0, 0) if tokens is None else (int(tokens.lengths[0]), tokens.spec.num_codebooks)
            if tokens is not None and segment.taken < T and segment.sound.spec.num_codebooks == Q:
                self._hear(segment, segment.sound.push(tokens.codes[0, :, segment.taken : T]))
            self._hear(segment, segment.sound.finish())
        except TokensError as e:
            self._refuse(segment, e)

    def _play(self, segment: Segment) -> None:
        """Decode what is complete of the open segment."""
        if segment.block.spec.modality != "audio" or segment.refused or segment.reading:
            return
        try:
            if segment.sound is None and segment.levels is not None:
                segment.sound = self._sound(segment.levels, segment.side)
            unit = self.tokenizer.frame_group * (1 if segment.sound is None else segment.sound.channels)
            codes = segment.ready(unit)
            if codes is not None and segment.sound is not None:
                self._hear(segment, segment.sound.push(codes))
        except TokensError as e:
            self._refuse(segment, e)

    def _sound(self, Q: int, side: Mapping[str, Tensor]) -> Sound:
        spec = self.vocab.blocks["audio"].spec.keep(Q)
        if self.streams:
            return Live(self.tokenizer, spec, side)
        sound = AtEnd(self.tokenizer, spec, side)
        if self.fields is None or sound.channels > 1 or sound.rate != self.tokenizer.sample_rate:
            return sound
        return Windows(self.tokenizer, spec, side, self.fields, self.window)

    def _hear(self, segment: Segment, sound: Tensor | None) -> None:
        if sound is not None and sound.shape[1]:
            self._out.append(sound)
            self._tell(Event("sound", segment.position, sound=sound))

    def _refuse(self, segment: Segment, error: TokensError) -> None:
        segment.refused = True
        self._tell(Event("refused", segment.position, text=str(error)))

    def _tell_text(self, ends: bool) -> None:
        """Hand out the text that is new: all of it where it ends, else what is whole characters."""
        if len(self._text) > self._told or (ends and self._text):
            (text,) = self.vocab.unpack(self._text)
            new = text[self._shown :] if isinstance(text, str) else None
            if ends or new is None or not new.endswith("\ufffd"):  # a character of which bytes are missing
                ids = tuple(self._text[self._told :])
                if ids or new:
                    self._tell(Event("text", self.position - len(ids), ids, new))
                self._told = len(self._text)
                self._shown = len(text) if isinstance(text, str) else 0
        if ends:
            self._text, self._shown, self._told = [], 0, 0

    def _tell(self, event: Event) -> None:
        if self.on_event is not None:
            self.on_event(event)


class PlayIds:
    """A streamer for ``model.generate(..., streamer=...)`` of one sequence: sound while it is written.

    The first ids that arrive are the prompt; of them only a segment that it leaves open is read (and heard).

    Args:
        reader: what decodes.
        on_sound: called with each piece of sound (C, n).
    """

    def __init__(self, reader: AudioFromIds, on_sound: Callable[[Tensor], None]) -> None:
        self.reader, self.on_sound = reader, on_sound
        self.begun = False

    def put(self, value: Tensor) -> None:
        """Ids (1, S), (S,) or (1,), as transformers gives them. ValueError for several sequences."""
        if value.ndim > 1 and len(value) > 1:
            raise ValueError(f"streamer: expected one sequence, got {len(value)}; generate one prompt, without beams")
        ids = value.reshape(-1).tolist()
        if not self.begun:
            self.begun = True
            ids = ids[open_from(self.reader.vocab, ids) :]
        self._give(self.reader.push(ids))

    def end(self) -> None:
        """The generation is over: the rest of the sound."""
        self._give(self.reader.flush())

    def _give(self, sound: Tensor | None) -> None:
        if sound is not None:
            self.on_sound(sound)
