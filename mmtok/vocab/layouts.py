"""Layouts: the order in which codes (Q, T) become a sequence. Adding one: a class here and a line in `LAYOUTS`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

PAD, END = -1, -2  # what may come next beside a level


class Layout(Protocol):
    """The order in which the cells (level, position) of one item become a sequence.

    ``order`` lists all cells at once. An instance walks the same order one id at a time without knowing T, unless a
    header gave it as ``length``: ``choices()`` are the levels that may come next (or PAD, END), ``push`` takes one.
    """

    def __init__(self, strides: Sequence[int], length: int | None = None) -> None: ...

    @staticmethod
    def order(strides: Sequence[int], T: int) -> tuple[np.ndarray, np.ndarray]:
        """Levels (n,), PAD where a cell is empty, and positions (n,), in writing order."""
        ...

    def choices(self) -> list[int]: ...
    def push(self, choice: int) -> None: ...


class Flatten:
    """Position-major, level-minor; a level of stride s has a cell at every s-th position."""

    @staticmethod
    def order(strides: Sequence[int], T: int) -> tuple[np.ndarray, np.ndarray]:
        t, q = np.nonzero(np.arange(T)[:, None] % np.asarray(strides) == 0)
        return q, t

    def __init__(self, strides: Sequence[int], length: int | None = None) -> None:
        self.strides, self.length = strides, length
        self.t, self.due, self.whole = 0, list(range(len(strides))), True  # levels still due at position t

    def choices(self) -> list[int]:
        if self.length is not None and self.t >= self.length:
            return [END]
        return [self.due[0], END] if self.whole and self.length is None else [self.due[0]]

    def push(self, choice: int) -> None:
        del self.due[0]
        self.whole = not self.due
        if self.whole:
            self.t = min((self.t // s + 1) * s for s in self.strides)
            self.due = [q for q, s in enumerate(self.strides) if self.t % s == 0]


class CoarseFirst:
    """All cells of level 0, then all of level 1, and so on."""

    @staticmethod
    def order(strides: Sequence[int], T: int) -> tuple[np.ndarray, np.ndarray]:
        q, t = np.nonzero(np.arange(T) % np.asarray(strides)[:, None] == 0)
        return q, t

    def __init__(self, strides: Sequence[int], length: int | None = None) -> None:
        self.strides, self.length = strides, length
        self.q, self.n = 0, 0  # n cells of level q so far, and T lies in low..high
        self.low, self.high = (1, math.inf) if length is None else (length, length)

    def choices(self) -> list[int]:
        if self.q == 0 and self.n == 0:
            return [END] if self.length == 0 else [0, END] if self.length is None else [0]
        stride = self.strides[self.q]
        more = [self.q] if self.n * stride < self.high else []
        if self.n * stride < self.low:
            return more
        return [*more, self.q + 1 if self.q + 1 < len(self.strides) else END]

    def push(self, choice: int) -> None:
        if choice == self.q:
            self.n += 1
            return
        stride = self.strides[self.q]
        self.low, self.high = max(self.low, (self.n - 1) * stride + 1), min(self.high, self.n * stride)
        self.q, self.n = choice, 1


class Delay:
    """Level q of position t at step t + q, Q ids a step, T + Q - 1 steps, none when T = 0 (arXiv 2306.05284, 2.2)."""

    @staticmethod
    def order(strides: Sequence[int], T: int) -> tuple[np.ndarray, np.ndarray]:
        Q = len(strides)
        steps = T + Q - 1 if T else 0
        q = np.tile(np.arange(Q), steps)
        t = np.repeat(np.arange(steps), Q) - q
        inside = (t >= 0) & (t < T)
        return np.where(inside, q, PAD), np.where(inside, t, 0)

    def __init__(self, strides: Sequence[int], length: int | None = None) -> None:
        self.strides, self.length = strides, length
        self.i = 0  # cells so far

    def choices(self) -> list[int]:
        Q, T = len(self.strides), self.length
        step, q = divmod(self.i, Q)
        if q == 0 and T is None:  # T shows itself at the first step that has no code of level 0
            return [0, END] if step == 0 or Q == 1 else [0, PAD]
        if q == 0 and step == (T + Q - 1 if T else 0):
            return [END]
        return [q] if q <= step and (T is None or step - q < T) else [PAD]

    def push(self, choice: int) -> None:
        step, q = divmod(self.i, len(self.strides))
        if q == 0 and choice == PAD and self.length is None:
            self.length = step
        self.i += 1


LAYOUTS: dict[str, type[Layout]] = {"flatten": Flatten, "delay": Delay, "coarse_first": CoarseFirst}
