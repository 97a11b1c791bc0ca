"""Resampling of sound that arrives in pieces, with the result of `mmtok.data.audio.resample` on the whole."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mmtok.data.audio import KAISER_BETA, MAX_FILTER, ROLLOFF, ZERO_CROSSINGS, fit_length, resample, resample_directly


class StreamResampler:
    """``push`` the pieces (C, n), ``flush`` the end; the outputs (C, m) together are ``resample`` of the whole.

    The filter has a finite length, so an output is final ``reach`` samples after its own time. What is kept is the part
    of the input that outputs to come still read; it begins at a multiple of ``from_rate / gcd``, where the filters
    repeat, so that the offline filters work on it as they are.

    Rates with so small a common divisor that their table of filters would be huge (44101 and 16000 Hz) are worked on a
    second at a time, or less, which `latency_seconds` counts.
    """

    def __init__(self, from_rate: int, to_rate: int):
        self.from_rate, self.to_rate = from_rate, to_rate
        step = math.gcd(from_rate, to_rate)
        self.period, self.outputs = from_rate // step, to_rate // step  # so many samples in give so many out
        width = ZERO_CROSSINGS * max(1.0, from_rate / to_rate) / ROLLOFF
        self.reach = math.ceil(width)
        tabled = self.outputs * (self.period + 2 * width) <= MAX_FILTER
        self.wait = 1 if tabled else self.period
        self._run = filters(from_rate, to_rate) if tabled else lambda x: resample_directly(x, from_rate, to_rate)
        self.received = 0
        self.given = 0
        self._start = 0  # the input sample at which _window begins
        self._window = torch.zeros(0, 0)
        self._resampled = 0  # of the received samples, those present when the filter last ran

    @property
    def latency_seconds(self) -> float:
        return (self.reach + self.wait - 1) / self.from_rate

    def push(self, x: Tensor, at_least: int = 1) -> Tensor:
        """(C, n) -> (C, m) further outputs; none until ``at_least`` of them are final."""
        self._window = torch.cat([self._window, x], -1) if self.received else x
        self.received += x.shape[-1]
        final = max(0, (self.received - 1 - self.reach) * self.outputs // self.period + 1)
        if final - self.given < at_least or self.received - self._resampled < self.wait:
            return x.new_zeros(len(x), 0)
        self._resampled = self.received
        return self._advance(final)

    def flush(self) -> Tensor:
        """The last outputs: as many in all as ceil(received * to_rate / from_rate)."""
        return self._advance(-(-self.received * self.to_rate // self.from_rate))

    def _advance(self, final: int) -> Tensor:
        """Outputs up to ``final``; keeps the input that later ones read."""
        before = self._start // self.period * self.outputs  # outputs before the window
        y = fit_length(self._run(self._window), final - before)[:, self.given - before :]
        self.given = final
        oldest = final * self.period // self.outputs - self.reach
        start = max(self._start, oldest // self.period * self.period)
        self._window = self._window[:, start - self._start :].clone()  # a view would keep the whole piece alive
        self._start = start
        return y


def filters(from_rate: int, to_rate: int) -> Callable[[Tensor], Tensor]:
    """`resample` at two rates with its table of filters worked out once."""
    resample(torch.zeros(1, 1), from_rate, to_rate)  # says clearly where torchaudio does not load
    from torchaudio.transforms import Resample

    return Resample(
        from_rate,
        to_rate,
        resampling_method="sinc_interp_kaiser",
        lowpass_filter_width=ZERO_CROSSINGS,
        rolloff=ROLLOFF,
        beta=KAISER_BETA,
        dtype=torch.float32,  # the precision in which the offline function works the filters out
    )
