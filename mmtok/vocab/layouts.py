"""Layouts: the order in which codes (Q, T) become a sequence. Adding one: a class here and a line in `LAYOUTS`.

=================== ==================================================================================================
``flatten``         position by position, levels in their order; a slow level only where it has a new code. For SNAC's
                    strides (4, 2, 1) this is the 7-id frame of Orpheus
``coarse_first``    all of level 0, then all of level 1, and so on
``delay``           level q of position t at step t + q
``delay:0,1,3``     level q of position t at step t + delay q: one delay a level, the smallest is 0
``partial_delay``   the delays 0, 1, 1, 1 and so on
``frame:0,1,1``     groups of positions, the codes of each in the order of this list of levels
=================== ==================================================================================================

Of a prefix of the levels each layout writes what is left when the other levels are taken away, a delay no steps that
are empty then. T need not be known before: from the ids alone follows the largest T that has these codes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

PAD, END = -1, -2  # what may come next beside a level
MAX_LEVELS = 255  # a header has one byte for their number


class Walker(Protocol):
    """Walks the order of a layout one id at a time, without knowing T unless a header gave it."""

    def choices(self) -> list[int]:
        """The levels that may come next, or PAD, END: the one that leaves the largest T possible first."""
        ...

    def push(self, choice: int) -> None:
        """Take one of `choices` other than END."""
        ...


class Layout(Protocol):
    """The order in which the cells (level, position) of one item become a sequence.

    ``order`` lists all cells at once, ``walk`` follows the same order id by id. In every layout the codes of one level
    stand in the order of their positions.
    """

    def refuses(self, strides: Sequence[int]) -> str | None:
        """Why levels of these strides cannot be laid out so, as ``expected ..., got ...``; None where they can."""
        ...

    def order(self, strides: Sequence[int], T: int) -> tuple[np.ndarray, np.ndarray]:
        """Levels (n,), PAD where a cell is empty, and positions (n,), in writing order."""
        ...

    def walk(self, strides: Sequence[int], length: int | None = None) -> Walker: ...


class Flatten:
    """Position-major, level-minor; a level of stride s has a cell at every s-th position."""

    def refuses(self, strides: Sequence[int]) -> str | None:
        del strides
        return None

    def order(self, strides: Sequence[int], T: int) -> tuple[np.ndarray, np.ndarray]:
        if max(strides) == 1:
            return np.tile(np.arange(len(strides)), T), np.repeat(np.arange(T), len(strides))
        t, q = np.nonzero(np.arange(T)[:, None] % np.asarray(strides) == 0)
        return q, t

    def walk(self, strides: Sequence[int], length: int | None = None) -> Walker:
        return _FlattenWalker(strides, length)


class _FlattenWalker:
    def __init__(self, strides: Sequence[int], length: int | None) -> None:
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

    def refuses(self, strides: Sequence[int]) -> str | None:
        del strides
        return None

    def order(self, strides: Sequence[int], T: int) -> tuple[np.ndarray, np.ndarray]:
        positions = [np.arange(0, T, s) for s in strides]
        return np.repeat(np.arange(len(strides)), [len(p) for p in positions]), np.concatenate(positions)

    def walk(self, strides: Sequence[int], length: int | None = None) -> Walker:
        return _CoarseFirstWalker(strides, length)


class _CoarseFirstWalker:
    def __init__(self, strides: Sequence[int], length: int | None) -> None:
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


@dataclasses.dataclass(frozen=True)
class Delay:
    """Level q of position t at step t + delays[q], Q ids a step (arXiv 2306.05284, 2.2).

    T + max(delays) steps, none when T = 0; what has no code there is PAD. The delays of a prefix of the levels count
    from the smallest of them.
    """

    delays: tuple[int, ...]  # may be longer than there are levels
    exact: bool = False  # expect one delay a level

    def refuses(self, strides: Sequence[int]) -> str | None:
        if set(strides) != {1}:
            return f"every level at every position, got the strides {tuple(strides)}; use flatten or coarse_first"
        if self.exact and len(self.delays) != len(strides):
            return f"one delay for each of {len(strides)} levels, got {len(self.delays)}"
        if min(self.delays) != 0:
            return f"delays of 0 and more, the smallest 0 (steps before it are empty), got {_joined(self.delays)}"
        return None

    def kept(self, Q: int) -> np.ndarray:
        """The delays (Q,) of the first Q levels."""
        delays = np.asarray(self.delays[:Q])
        return delays - delays.min()

    def order(self, strides: Sequence[int], T: int) -> tuple[np.ndarray, np.ndarray]:
        Q, delays = len(strides), self.kept(len(strides))
        steps = T + int(delays.max()) if T else 0
        t = np.arange(steps)[:, None] - delays  # (steps, Q)
        inside = (t >= 0) & (t < T)
        return np.where(inside, np.arange(Q), PAD).reshape(-1), np.where(inside, t, 0).reshape(-1)

    def walk(self, strides: Sequence[int], length: int | None = None) -> Walker:
        return _DelayWalker(self.kept(len(strides)).tolist(), length)


class _DelayWalker:
    def __init__(self, delays: list[int], length: int | None) -> None:
        self.delays, self.last = delays, max(delays)
        self.step, self.q = 0, 0  # of the next cell
        self.low, self.high = (0, math.inf) if length is None else (length, length)  # T lies in low..high

    def choices(self) -> list[int]:
        ends = self.q == 0 and (self.low == 0 if self.step == 0 else self.low <= self.step - self.last)
        if ends and self.high <= max(0, self.step - self.last):
            return [END]
        t = self.step - self.delays[self.q]
        if t < 0:
            cell = [PAD]
        elif t < max(self.low, 1, self.step - self.last + 1):  # T = 0 and smaller T would have ended before this step
            cell = [self.q]
        else:
            cell = [PAD] if t >= self.high else [self.q, PAD]
        return [*cell, END] if ends else cell

    def push(self, choice: int) -> None:
        t = self.step - self.delays[self.q]
        if choice != PAD:
            self.low = max(self.low, t + 1)
        elif t >= 0:
            self.high = min(self.high, t)
        self.low = max(self.low, 1, self.step - self.last + 1)
        self.q += 1
        if self.q == len(self.delays):
            self.step, self.q = self.step + 1, 0


@dataclasses.dataclass(frozen=True)
class Frame:
    """Groups of positions; within a group the cells in the order of ``levels``, each level's by position.

    In a group of g positions a level of stride s stands g / s times. A last group that is not whole is written without
    the cells whose positions are past T, so that nothing is padded.
    """

    levels: tuple[int, ...]

    def refuses(self, strides: Sequence[int]) -> str | None:
        spans = {self.levels.count(q) * s for q, s in enumerate(strides)}  # one span: a multiple of every stride
        if set(self.levels) == set(range(len(strides))) and len(spans) == 1:
            return None
        group = math.lcm(*strides)
        wanted = ", ".join(f"{group // s} of level {q}" for q, s in enumerate(strides))
        return (
            f"an order of {wanted} (what {group} positions have with the strides {tuple(strides)}), or whole multiples "
            f"of it, got {_joined(self.levels)}"
        )

    def group(self, strides: Sequence[int]) -> tuple[list[int], list[int], int]:
        """Levels (n,) and positions (n,) of the cells of one group of these first levels, and its positions."""
        levels = [q for q in self.levels if q < len(strides)]
        seen = [0] * len(strides)
        positions = []
        for q in levels:
            positions.append(seen[q])
            seen[q] += strides[q]
        return levels, positions, seen[0]

    def order(self, strides: Sequence[int], T: int) -> tuple[np.ndarray, np.ndarray]:
        levels, positions, span = self.group(strides)
        groups = -(-T // span)
        q = np.tile(np.asarray(levels), groups)
        t = (np.arange(groups)[:, None] * span + np.asarray(positions)).reshape(-1)
        if T % span == 0:
            return q, t
        inside = t < T
        return q[inside], t[inside]

    def walk(self, strides: Sequence[int], length: int | None = None) -> Walker:
        return _FrameWalker(*self.group(strides), length)


class _FrameWalker:
    def __init__(self, levels: list[int], positions: list[int], span: int, length: int | None) -> None:
        self.levels, self.positions, self.span, self.left = levels, positions, span, length
        self._open()

    def _open(self) -> None:
        """A new group, which has low..high positions."""
        self.n, self.low, self.high = 0, 1, self.span
        if self.left is not None:
            self.low = self.high = max(0, min(self.span, self.left))

    def _next(self) -> list[tuple[int, int]]:
        """(level, n) of each cell of this group that may come next, n its place in the group; (END, 0) where none."""
        found, high = [], self.high
        for n in range(self.n, len(self.levels)):
            t = self.positions[n]
            if t >= high:
                continue
            found.append((self.levels[n], n))
            if t < self.low:
                return found
            high = t  # where this cell is not written
        return [*found, (END, 0)]

    def choices(self) -> list[int]:
        if self.high == 0:
            return [END]
        if self.n == 0 and self.left is None:
            return [self.levels[0], END]  # the group before this one was whole, or there was none
        return [choice for choice, _ in self._next()]

    def push(self, choice: int) -> None:
        n = next(place for level, place in self._next() if level == choice)
        for skipped in self.positions[self.n : n]:
            if skipped >= self.low:
                self.high = min(self.high, skipped)
        self.low, self.n = max(self.low, self.positions[n] + 1), n + 1
        if self.n == len(self.levels) and self.high == self.span:
            self.left = None if self.left is None else self.left - self.span
            self._open()


LAYOUTS: dict[str, Layout] = {
    "flatten": Flatten(),
    "delay": Delay(tuple(range(MAX_LEVELS))),
    "partial_delay": Delay((0, *[1] * (MAX_LEVELS - 1))),
    "coarse_first": CoarseFirst(),
}


def read_layout(text: str, strides: Sequence[int], what: str) -> Layout:
    """The layout that ``text`` names, for levels of these strides. ValueError, naming ``what``, where it cannot be."""
    layout = LAYOUTS.get(text) if isinstance(text, str) else None
    name, _, values = text.partition(":") if isinstance(text, str) else ("", "", "")
    numbers = [n.strip() for n in values.split(",")]
    if layout is None and name in ("delay", "frame") and all(n.isascii() and n.isdigit() for n in numbers):
        given = tuple(int(n) for n in numbers)
        layout = Delay(given, exact=True) if name == "delay" else Frame(given)
    if layout is None:
        raise ValueError(
            f"layout: expected one of {sorted(LAYOUTS)}, or delay: or frame: with a list of numbers such as "
            f"'delay:0,1,3' (delays of the levels) or 'frame:0,1,1' (levels of one group), for {what}, got {text!r}"
        )
    if (reason := layout.refuses(strides)) is not None:
        raise ValueError(f"layout: {text} of {what}: expected {reason}")
    return layout


def _joined(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
