"""Files in memory to what the model takes, by threads that stay a bounded way ahead of it and keep the order."""

from __future__ import annotations

import dataclasses
import errno
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mmtok.corpus.records import Failure, Sample
from mmtok.corpus.shard_columns import json_bytes
from mmtok.data import audio as audio_io
from mmtok.data import images as image_io
from mmtok.tokenizer import AudioTokenizer, ImageTokenizer, Tokenizer

LONGEST_REASON = 300  # characters
OUT_OF_HANDLES = (errno.EMFILE, errno.ENFILE)  # says nothing of the file


@dataclasses.dataclass(frozen=True)
class Ready:
    """A sample that the model can take.

    Args:
        key, text, extra: of the sample.
        x: picture (C, H, W) in [0, 1] at the size that the network sees, or sound (C, L) in [-1, 1] at its rate.
        sample_rate: Hz of ``x``; None for pictures.
        group: what all items of a batch have in common.
        length: samples of all channels, whole hops, or pixels: what the item takes of a batch.
        held: what of ``length`` is its own and no rounding to hops.
        side: entries of ``Tokens.side`` that follow from the sample before it was resized or resampled.
        source_bytes: of the encoded sample.
    """

    key: str
    text: str | None
    extra: Mapping[str, Any]
    x: Tensor
    sample_rate: int | None
    group: tuple
    length: int
    held: int
    side: Mapping[str, int]
    source_bytes: int


@dataclasses.dataclass(frozen=True)
class Refused:
    """A sample that cannot be read, with the reason in one line."""

    key: str
    reason: str
    source_bytes: int


class Decoder:
    """``decoder(sample) -> Ready | Refused`` for one tokenizer; safe to call in several threads.

    Pictures are resized and sounds resampled here, by what the tokenizer's encode would do to each alone, so that the
    codes are the same and the memory that waits for the model is that of what the model sees. On another device than
    the CPU, encode alone would resize there, whose last bits may differ.

    Args:
        tokenizer: that will encode.
        with_text: whether texts go into the model, which parts those with one from those without.
    """

    def __init__(self, tokenizer: Tokenizer, with_text: bool):
        self.tokenizer = tokenizer
        self.modality = tokenizer.base_spec().modality
        self.with_text = with_text

    def __call__(self, sample: Sample | Failure) -> Ready | Refused:
        if isinstance(sample, Failure):
            return Refused(sample.key, sample.reason, 0)
        size = 0
        try:
            size = size_of(sample)
            json_bytes(dict(sample.extra))  # what cannot be written must not cost the whole shard
            return self._picture(sample, size) if self.modality == "image" else self._sound(sample, size)
        except (ValueError, OSError, MemoryError, RuntimeError) as e:  # RuntimeError: torch is out of memory
            if is_everyones(e):
                raise
            return Refused(sample.key, reason_of(e), size)

    def _picture(self, sample: Sample, size: int) -> Ready:
        picture = picture_of(sample)
        x, tokenizer = picture.pixels, self.tokenizer
        C, H, W = x.shape
        if isinstance(tokenizer, ImageTokenizer):
            seen = tokenizer.encode_size(H, W)
            # A picture that is not resized stays as it is: encode lays transparency over white by itself.
            if seen != (H, W) and tokenizer.encode_size(*seen) == seen:
                small = tokenizer._resize(image_io.to_rgb(x)[None], seen)[0]
                x = small if small.shape[1:] == seen else x  # raw tokenizers do without
        h, w = x.shape[1:]
        side = {"height": H, "width": W, "channels": C, "bit_depth": picture.bit_depth}
        group = (h, w, self._has_text(sample))
        return Ready(sample.key, sample.text, sample.extra, x, None, group, h * w, h * w, side, size)

    def _sound(self, sample: Sample, size: int) -> Ready:
        sound = sound_of(sample)
        x, rate, tokenizer = sound.samples, sound.sample_rate, self.tokenizer
        C, L = x.shape
        length = held = L
        if isinstance(tokenizer, AudioTokenizer):
            y = audio_io.resample(x, rate, tokenizer.sample_rate)
            held = y.shape[1]
            length = max(held, tokenizer.num_frames(held) * tokenizer.hop_length)
            # The filter may overshoot what encode takes of arrays; then it resamples by itself.
            if float(y.abs().max()) <= audio_io.MAX_AMPLITUDE:
                x, rate = y, tokenizer.sample_rate
        side = {"num_samples": L, "sample_rate": sound.sample_rate, "channels": C}
        group = (rate, C, self._has_text(sample))
        return Ready(sample.key, sample.text, sample.extra, x, rate, group, C * length, C * held, side, size)

    def _has_text(self, sample: Sample) -> bool:
        return self.with_text and sample.text is not None


def size_of(sample: Sample) -> int:
    """Bytes of the encoded sample. Raises OSError for a file that is not there."""
    if sample.data is not None:
        return len(sample.data)
    if sample.path is None:
        raise ValueError(f"{sample.key} has neither data nor path; expected one of them")
    return sample.path.stat().st_size


def picture_of(sample: Sample) -> image_io.Picture:
    """The picture of a file or of bytes. Raises OSError, or ValueError when empty, broken or too large."""
    if sample.data is None and sample.path is not None:
        return image_io.read_picture(sample.path)
    return image_io.picture_from_bytes(sample.data or b"", sample.key)


def sound_of(sample: Sample) -> audio_io.Sound:
    """The sound of a file or of bytes. Raises OSError, or ValueError when empty, broken, NaN or too wide."""
    if sample.data is None and sample.path is not None:
        return audio_io.Sound(*audio_io.read_audio(sample.path))
    return audio_io.sound_from_bytes(sample.data or b"", sample.key)


def is_everyones(e: BaseException) -> bool:
    """Whether an error would meet every sample alike: a missing package, a broken device, no file handles left."""
    if isinstance(e, (ImportError, NotImplementedError, torch.AcceleratorError)):
        return True
    if isinstance(e, OSError):
        return e.errno in OUT_OF_HANDLES
    # `resample` says in these words that torchaudio does not load.
    return isinstance(e, RuntimeError) and isinstance(e.__cause__, (ImportError, OSError, RuntimeError))


def reason_of(e: BaseException) -> str:
    """One line that is the same on every run: without addresses in memory; the type where the text says little."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(str(e).split()))
    if not isinstance(e, (ValueError, OSError)) or not text:
        text = f"{type(e).__name__}: {text}" if text else type(e).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 4]} ..."


class DecodeAhead:
    """Iterates over the results of ``decode`` in the order of ``samples``, which other threads read and decode.

    At most ``items`` samples are held at once: read, decoded, or given out and not yet given back by `release`. Once
    decoded ones hold ``bytes``, no further sample is begun until some are released; at most ``threads`` + 1 are under
    way at that moment and come on top. Use as a context manager: leaving it ends the threads.

    Args:
        samples: read in one background thread; an error there comes out of the iteration.
        decode: runs in ``threads`` threads; an error in it comes out of the iteration, in its turn.
        items, bytes: see above. Whoever collects results before releasing them must stay below both.
    """

    def __init__(
        self,
        samples: Iterable[Sample | Failure],
        decode: Callable[[Sample | Failure], Ready | Refused],
        threads: int,
        items: int,
        bytes: int,
    ):
        self._samples, self._decode = samples, decode
        self._threads, self._items, self._bytes = threads, items, bytes
        self._results: deque[Future[Ready | Refused]] = deque()
        self._changed = threading.Condition()
        self._held = self._held_bytes = self._begun = 0  # _begun: read and not yet decoded
        self._closed = self._all_read = False
        self._error: BaseException | None = None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mmtok-decode")
        self._reader = threading.Thread(target=self._read, name="mmtok-read", daemon=True)

    def __enter__(self) -> DecodeAhead:
        self._reader.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._reader.join()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Ready | Refused]:
        while self._wait_for_result():
            yield self._results.popleft().result()  # no name here, which would hold it past its release

    def release(self, items: int, bytes: int) -> None:
        """The consumer no longer holds so many results, which have so many `bytes_of` together."""
        with self._changed:
            self._held -= items
            self._held_bytes -= bytes
            self._changed.notify_all()

    def _wait_for_result(self) -> bool:
        """Wait until another result is under way; False when there is none to come. Raises what reading raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._results or self._all_read)
            if not self._results and self._error is not None:
                raise self._error
            return bool(self._results)

    def _read(self) -> None:
        samples = iter(self._samples)
        try:
            while self._wait_for_room():
                sample = next(samples, None)
                if sample is None:
                    return
                with self._changed:
                    self._held += 1
                    self._begun += 1
                    self._results.append(self._pool.submit(self._run, sample))
                    self._changed.notify_all()
        except BaseException as e:  # whatever it is belongs to the thread that iterates
            self._error = e
        finally:
            close = getattr(samples, "close", None)  # of a generator: it holds a file open
            if close is not None:
                close()
            with self._changed:
                self._all_read = True
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """Wait until another sample may be read; False when there is no more need of one."""

        def room() -> bool:
            # Beyond one a thread and one that waits, nothing is begun: what is begun always finishes, and its bytes
            # are not known before.
            idle = self._begun <= self._threads
            return self._closed or (idle and self._held < self._items and self._held_bytes < self._bytes)

        with self._changed:
            self._changed.wait_for(room)
            return not self._closed

    def _run(self, sample: Sample | Failure) -> Ready | Refused:
        held = 0
        try:
            result = self._decode(sample)
            held = bytes_of(result)
            return result
        finally:
            with self._changed:
                self._begun -= 1
                self._held_bytes += held
                self._changed.notify_all()


def bytes_of(result: Ready | Refused) -> int:
    """Memory of what waits for the model."""
    return result.x.nbytes if isinstance(result, Ready) else 0
