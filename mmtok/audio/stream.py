"""Streams: sound or tokens that arrive in pieces of any size, with the codes and the samples of the whole.

``enc = tok.streamer()`` takes sound with ``enc.push(x)`` and ``enc.flush()``, ``dec = tok.decode_streamer()`` takes its
Tokens. The state is explicit (a `Past` and less than two frames of input) and does not grow with the stream; one
tokenizer serves any number of streams. The same sums are formed as offline, in another order at most: codes are equal
but where two codes are equally near within float32 rounding.
"""

from __future__ import annotations

import abc
import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtok.audio.resampling import StreamResampler
from mmtok.data import audio as audio_io
from mmtok.data.arrays import as_tensor
from mmtok.layers.conv1d import Past
from mmtok.tokenizer import AudioTokenizer, evaluation, integers
from mmtok.tokens import Tokens, TokensError, side_value


class StreamingTokenizer(AudioTokenizer, abc.ABC):
    """An audio tokenizer that can run piece by piece with an explicit state.

    A subclass writes `encode_stream` and `decode_stream`, and sets

        streams: whether this one can (a causal network), else the streamers are refused.
        encode_lookahead: samples past a frame's own that its codes depend on.
        decode_lookahead: samples by which `decode_stream` stays behind its frames; then also `decode_rest`.
        stream_frames: most frames in one call, which bounds the memory that a long piece takes.
    """

    streams: bool = True
    encode_lookahead: int = 0
    decode_lookahead: int = 0
    stream_frames: int = 500

    @abc.abstractmethod
    def encode_stream(self, x: Tensor, past: Past, num_codebooks: int | None = None) -> Tensor:
        """(B, 1, n * hop) -> codes (B, Q, n), n >= 1; the first piece has ``encode_lookahead`` samples more."""

    @abc.abstractmethod
    def decode_stream(self, codes: Tensor, past: Past) -> Tensor:
        """Codes (B, Q, n), n >= 1 -> (B, 1, n * hop), from which the first calls leave out ``decode_lookahead``."""

    def decode_rest(self, past: Past) -> Tensor:
        """(B, 1, n): the samples that `decode_stream` held back, n <= ``decode_lookahead``."""
        del past
        return torch.zeros(1, 1, 0, device=self.device)

    def streamer(self, num_codebooks: int | None = None) -> EncodeStreamer:
        """An encoder of one sound that arrives in pieces; ``num_codebooks`` as in `encode`.

        Raises ValueError where the network looks ahead further than a fixed few samples.
        """
        return EncodeStreamer(self, num_codebooks)

    def decode_streamer(self) -> DecodeStreamer:
        """A decoder of one sound's Tokens that arrive in pieces. Raises ValueError as `streamer`."""
        return DecodeStreamer(self)

    def timing(self) -> dict[str, Any]:
        """As `AudioTokenizer.timing`; where it streams also the algorithmic latency of both directions."""
        facts = super().timing() | {"streams": self.streams}
        if self.streams:
            samples = self.hop_length + self.encode_lookahead, self.decode_lookahead
            facts["latency_samples"] = {"encoder": samples[0], "decoder": samples[1]}
            facts["latency_seconds"] = sum(samples) / self.sample_rate
        return facts


class Stream(abc.ABC):
    """What both directions share: state, time and errors.

    Attributes:
        seconds_in: seconds of sound taken so far (of the encoder) or described by the frames so far (of the decoder).
        seconds_of_compute: spent in ``push`` and ``flush``.
    """

    def __init__(self, tokenizer: StreamingTokenizer, instead: str):
        if not tokenizer.streams:
            raise ValueError(tokenizer._cannot_stream(instead))
        self.tokenizer = tokenizer
        self.spec = tokenizer.spec
        self.past = Past()
        self.seconds_of_compute = 0.0
        self.sample_rate = tokenizer.sample_rate  # of the sound outside, in Hz
        self.channels: int | None = None
        self.frames = 0  # of each channel, done
        self.ended = False
        self.resampler: StreamResampler | None = None

    @property
    def seconds_in(self) -> float:
        return self.frames * self.tokenizer.hop_length / self.tokenizer.sample_rate

    @property
    def real_time_factor(self) -> float:
        """Seconds of computing a second of sound, measured so far; below 1 keeps up. NaN before the first sound."""
        return self.seconds_of_compute / self.seconds_in if self.seconds_in else math.nan

    @property
    @abc.abstractmethod
    def network_latency(self) -> int:
        """Samples at the model's rate that the network waits for, without resampling."""

    @property
    def latency_seconds(self) -> float:
        """Algorithmic latency: how long after a sample of the input, at most, its result waits for later input."""
        resampling = 0.0 if self.resampler is None else self.resampler.latency_seconds
        return self.network_latency / self.tokenizer.sample_rate + resampling

    @property
    def latency_samples(self) -> int:
        """`latency_seconds` in samples at the model's rate, rounded up."""
        resampling = 0.0 if self.resampler is None else self.resampler.latency_seconds
        return self.network_latency + math.ceil(resampling * self.tokenizer.sample_rate)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            with torch.no_grad():
                yield
        finally:
            self.seconds_of_compute += time.perf_counter() - begun

    def _check_open(self) -> None:
        if self.ended:
            raise ValueError(
                "this stream has ended with flush(): expected no more pieces; take a new one from the tokenizer"
            )

    def _agree(self, what: str, before: int, now: int) -> None:
        if before != now:
            raise ValueError(
                f"{what}: expected {before} as in the pieces before, got {now}; use one streamer for each sound"
            )


class EncodeStreamer(Stream):
    """Sound in, Tokens out: `Tokens.join` of what ``push`` and ``flush`` give is ``tok.encode`` of the whole.

    Args:
        tokenizer: a causal one.
        num_codebooks: only the first so many levels; None = all.
    """

    def __init__(self, tokenizer: StreamingTokenizer, num_codebooks: int | None = None):
        super().__init__(tokenizer, "encode")
        tokenizer._check_counts(num_codebooks, None)
        self.num_codebooks = num_codebooks
        self.spec = self.spec if num_codebooks is None else self.spec.keep(num_codebooks)
        self.samples_in = 0  # of each channel, at the rate of the input
        self._counted = 0  # of them, those that the Tokens so far stand for
        self._resampled = 0  # samples of each channel at the model's rate
        self._waiting = torch.zeros(0, 0)

    @property
    def seconds_in(self) -> float:
        return self.samples_in / self.sample_rate

    @property
    def network_latency(self) -> int:
        return self.tokenizer.hop_length + self.tokenizer.encode_lookahead

    def push(self, x: Any, sample_rate: int | None = None) -> Tokens | None:
        """Take (C, n) or (n,) samples, n >= 0; Tokens of the frames that are now complete, or None.

        Args:
            x: array or tensor, floats in [-1, 1] or int16.
            sample_rate: Hz, one for the whole stream; None = that of the pieces before, at first the model's.

        Raises:
            ValueError: wrong shape, type, range, rate or channel count, or the stream has ended.
        """
        self._check_open()
        samples = self._checked(x, sample_rate)
        with self._computing():
            self.samples_in += samples.shape[1]
            self._take(samples if self.resampler is None else self.resampler.push(samples, self._lacking()))
            ahead = 0 if self.frames else self.tokenizer.encode_lookahead
            return self._frames((self._waiting.shape[1] - ahead) // self.tokenizer.hop_length)

    def flush(self) -> Tokens | None:
        """End the sound: Tokens of what is left, zeros behind it up to a whole frame as offline; None if nothing is."""
        self._check_open()
        self.ended = True
        if not self.samples_in:
            return None
        with self._computing():
            if self.resampler is not None:
                self._take(self.resampler.flush())
            hop, ahead = self.tokenizer.hop_length, self.tokenizer.encode_lookahead
            left = -(-self._resampled // hop) - self.frames
            self._waiting = audio_io.fit_length(self._waiting, left * hop + (0 if self.frames else ahead))
            return self._frames(left)

    def _checked(self, x: Any, sample_rate: int | None) -> Tensor:
        if not isinstance(x, (np.ndarray, Tensor)):
            raise ValueError(f"x: expected an array or a tensor of samples, (C, n) or (n,), got {type(x).__name__}")
        samples = as_tensor(x, "x") if isinstance(x, np.ndarray) else x.detach().cpu()
        samples = samples[None] if samples.ndim == 1 else samples
        if samples.ndim != 2 or not 1 <= len(samples) <= audio_io.MAX_CHANNELS:
            raise ValueError(
                f"x: expected (n,) or (C, n) with C in 1..{audio_io.MAX_CHANNELS}, got shape {tuple(x.shape)}; "
                "is it (n, C)? transpose it; one stream is one sound"
            )
        samples = audio_io.check_samples(samples, "x") if samples.shape[1] else samples.float()
        if self.channels is not None:
            self._agree("channels", self.channels, len(samples))
        if sample_rate is not None:
            rate = audio_io.check_rate(sample_rate)
            if self.channels is not None:
                self._agree("sample_rate", self.sample_rate, rate)
            self.sample_rate = rate
        if self.channels is None:
            self.channels, self._waiting = len(samples), samples[:, :0]
            if self.sample_rate != self.tokenizer.sample_rate:
                self.resampler = StreamResampler(self.sample_rate, self.tokenizer.sample_rate)
        return samples

    def _lacking(self) -> int:
        """Samples at the model's rate that the next frame still lacks."""
        ahead = 0 if self.frames else self.tokenizer.encode_lookahead
        return max(1, self.tokenizer.hop_length + ahead - self._waiting.shape[1])

    def _take(self, samples: Tensor) -> None:
        self._resampled += samples.shape[1]
        self._waiting = torch.cat([self._waiting, samples], 1)

    def _frames(self, ready: int) -> Tokens | None:
        """Encode ``ready`` frames of what waits."""
        tok = self.tokenizer
        parts, taken = [], 0
        for start in range(0, ready, tok.stream_frames):
            stop = min(start + tok.stream_frames, ready)
            end = stop * tok.hop_length + (0 if self.frames else tok.encode_lookahead)
            piece = self._waiting[:, None, taken:end].to(tok.device)
            with evaluation(tok):
                parts.append(tok.encode_stream(piece, self.past, self.num_codebooks))
            taken = end
        self._waiting = self._waiting[:, taken:].clone()  # a view would keep the whole piece alive
        if not parts:
            return None
        self.frames += ready
        assert self.channels is not None
        codes = torch.cat(parts, 2).permute(1, 2, 0).flatten(1)[None]  # (C, Q, T) -> (1, Q, T * C)
        stand_for = self.frames * tok.hop_length * self.sample_rate // tok.sample_rate
        counted = self.samples_in if self.ended else min(stand_for, self.samples_in)
        side = {"num_samples": counted - self._counted, "sample_rate": self.sample_rate, "channels": self.channels}
        self._counted = counted
        lengths = integers([codes.shape[2]]).to(codes.device)
        return Tokens(codes, lengths, self.spec, {k: integers([v]).to(codes.device) for k, v in side.items()})


class DecodeStreamer(Stream):
    """Tokens in, sound out: the samples that ``push`` and ``flush`` give, one after the other, are ``tok.decode`` of
    the joined Tokens.

    Each piece's ``side["num_samples"]`` counts the samples of that piece, as `EncodeStreamer` writes it. Tokens without
    side (ids of a language model) give all samples of their frames, mono at the model's rate.
    """

    def __init__(self, tokenizer: StreamingTokenizer):
        super().__init__(tokenizer, "decode")
        self.samples_out = 0  # of each channel
        self._wanted: int | None = None  # samples that the pieces so far stand for; None: they do not say
        self._codes = torch.zeros(1, 0, 0, dtype=torch.int64)  # of a frame whose other channels are still to come
        self._waiting = torch.zeros(1, 0)

    @property
    def network_latency(self) -> int:
        return self.tokenizer.decode_lookahead

    def push(self, tokens: Tokens) -> Tensor:
        """Take Tokens of one item, of any number of positions; (C, n) samples that are now final, n >= 0, on the CPU.

        Raises:
            TokensError: Tokens of another tokenizer, of several items, or of another sound than the pieces before.
            ValueError: the stream has ended.
        """
        self._check_open()
        codes = self._checked(tokens)
        assert self.channels is not None
        with self._computing():
            codes = torch.cat([self._codes, codes], 2)
            T = codes.shape[2] // self.channels
            rows = codes[0, :, : T * self.channels].unflatten(1, (T, self.channels)).permute(2, 0, 1)  # (C, Q, T)
            self._codes = codes[..., T * self.channels :].clone()
            for start in range(0, T, self.tokenizer.stream_frames):
                piece = rows[..., start : start + self.tokenizer.stream_frames].to(self.tokenizer.device)
                with evaluation(self.tokenizer):
                    self._take(self.tokenizer.decode_stream(piece, self.past))
            self.frames += T
            final = self._waiting.shape[1]
            return self._give(final if self._wanted is None else min(final, self._wanted - self.samples_out))

    def flush(self) -> Tensor:
        """End the stream: (C, n), the rest, so that all samples together have exactly the sound's length."""
        self._check_open()
        self.ended = True
        with self._computing():
            if self.frames and self.tokenizer.decode_lookahead:
                with evaluation(self.tokenizer):
                    self._take(self.tokenizer.decode_rest(self.past))
            if self.frames and self.resampler is not None:
                self._waiting = torch.cat([self._waiting, self.resampler.flush()], 1)
            whole = self.samples_out + self._waiting.shape[1]
            wanted = whole if self._wanted is None else self._wanted
            length = self.tokenizer.true_length(self.frames, wanted, self.sample_rate)
            self._waiting = audio_io.fit_length(self._waiting, length - self.samples_out)
            return self._give(length - self.samples_out)

    def _checked(self, tokens: Tokens) -> Tensor:
        """(1, Q, T) valid codes."""
        if len(tokens) != 1:
            raise TokensError(f"expected Tokens of one item, got {len(tokens)}; use a streamer for each")
        tokens.check(self.spec)
        T = int(tokens.lengths[0])
        channels = side_value(tokens, "channels", 1, range(1, audio_io.MAX_CHANNELS + 1))
        rate = side_value(tokens, "sample_rate", self.tokenizer.sample_rate, audio_io.SAMPLE_RATES)
        wanted = side_value(tokens, "num_samples", 0, range(2**63)) if "num_samples" in tokens.side else None
        if self.channels is None:
            self.channels, self.sample_rate, self._wanted = channels, rate, wanted
            self.spec = tokens.spec
            self._waiting = torch.zeros(channels, 0)
            self._codes = tokens.codes[:, :, :0].cpu()
            if rate != self.tokenizer.sample_rate:
                self.resampler = StreamResampler(self.tokenizer.sample_rate, rate)
            return tokens.codes[:, :, :T].cpu()
        if tokens.spec != self.spec:
            found, count = tokens.spec.num_codebooks, self.spec.num_codebooks
            raise TokensError(f"expected {count} levels as in the pieces before, got {found}; keep() all to one number")
        self._agree("channels", self.channels, channels)
        self._agree("sample_rate", self.sample_rate, rate)
        if (wanted is None) != (self._wanted is None):
            raise TokensError("side: expected num_samples in every piece of a stream or in none, got both")
        if wanted is not None and self._wanted is not None:
            described = self.frames * self.tokenizer.hop_length * self.sample_rate // self.tokenizer.sample_rate
            if T and self._wanted < described:
                raise TokensError(
                    f"expected no more Tokens: those so far end their sound after {self._wanted} of {described} "
                    "samples; flush(), and use another streamer for the next sound"
                )
            self._wanted += wanted
        return tokens.codes[:, :, :T].cpu()

    def _take(self, sound: Tensor) -> None:
        """Samples (C, 1, n) of the model wait at the rate of the sound."""
        samples = sound[:, 0].float().cpu()
        samples = samples if self.resampler is None else self.resampler.push(samples)
        self._waiting = torch.cat([self._waiting, samples], 1)

    def _give(self, count: int) -> Tensor:
        given, self._waiting = self._waiting[:, :count], self._waiting[:, count:].clone()
        self.samples_out += count
        return given
