"""How long a generated segment may become: bounds on its positions, and the room that is left in a sequence."""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_left
from collections.abc import Sequence

from mmtok.vocab.block import Block
from mmtok.vocab.header import FIELDS, LENGTH, NAMED, Header, read_header
from mmtok.vocab.layouts import Layout

HEADER_REST = 2 * len(FIELDS) + 12  # no less than what the shortest end of a generated header needs


class Bounded:
    """A walker (`mmtok.vocab.layouts.Walker`) that ends at T in least..most only, None = open.

    It walks three times: with T open, with T = least and with T = most. A walker lists its choices from the largest T
    that they leave possible to the smallest, so what stands from the choice of ``most`` to that of ``least`` is legal;
    a walker that another choice was taken against bounds nothing any more.
    """

    def __init__(self, layout: Layout, strides: Sequence[int], least: int, most: int | None) -> None:
        self.open = layout.walk(strides)
        self.least = layout.walk(strides, least) if least else None
        self.most = None if most is None else layout.walk(strides, most)

    def choices(self) -> list[int]:
        found = self.open.choices()
        first = 0 if self.most is None else found.index(self.most.choices()[0])
        last = len(found) - 1 if self.least is None else found.index(self.least.choices()[0])
        return found[first : last + 1]

    def push(self, choice: int) -> None:
        if self.least is not None:
            self.least = self.least if choice in self.least.choices() else None
        if self.most is not None:
            self.most = self.most if choice in self.most.choices() else None
        for walker in (self.open, self.least, self.most):
            if walker is not None:
                walker.push(choice)


class Lengths:
    """The lengths of one modality's segments.

    Args:
        block: of the modality.
        asked: (least, most) positions, None = open; None: exactly ``spec.num_tokens`` for pictures, any for sound.
        pinned: levels of a segment without header; None: any.
        header: whether segments have one, as in `Grammar`.

    Raises:
        ValueError: bounds that no segment can keep.
    """

    def __init__(
        self, block: Block, asked: tuple[int | None, int | None] | None, pinned: int | None, header: bool | None
    ) -> None:
        self.block, self.header, self.asked = block, header, asked
        spec, Q = block.spec, len(block.levels)
        self.counts = [pinned] if pinned else list(range(1, Q + 1))
        self._bodies: dict[tuple[int, int], int] = {}
        self._limits: dict[tuple[int, int | None], tuple[int, int | None] | None] = {}
        limit = spec.num_tokens
        if asked is None:
            # where strides leave no segment of just so many positions, the next smaller one
            least, most = (0, None) if limit is None else (self._down(limit, Q), limit)
        else:
            least, most = _pair(asked, spec.modality)
            most = limit if most is None else most
            if limit is not None and most is not None and most > limit:
                raise ValueError(f"lengths: expected at most {limit} positions of {spec.name!r}, got {most}")
        self.least, self.most = least, most
        levels = self.counts if header is False else range(1, Q + 1)
        if all(self._bounds(q) is None for q in levels):
            raise ValueError(
                f"lengths: expected {spec.modality} bounds with a number of positions in them that the strides "
                f"{spec.level_strides} allow, got {asked}; widen them"
            )

    def _down(self, T: int, Q: int) -> int:
        """The largest number of positions up to T that codes of Q levels say without a header."""
        return max(T // s * s for s in self.block.spec.level_strides[:Q])

    def _up(self, T: int, Q: int) -> int:
        return min(-(-T // s) * s for s in self.block.spec.level_strides[:Q])

    def _bounds(self, Q: int) -> tuple[int, int | None] | None:
        """``least`` and ``most`` moved inwards to what Q levels can have; None where nothing is left."""
        least = self._up(self.least, Q)
        most = None if self.most is None else self._down(self.most, Q)
        return None if most is not None and most < least else (least, most)

    def _ids(self, Q: int, T: int) -> int:
        """Ids of a body of T positions and its end marker."""
        if (count := self._bodies.get((Q, T))) is None:
            count = len(self.block.layout.order(self.block.spec.level_strides[:Q], T)[0]) + 1
            self._bodies[Q, T] = count
        return count

    def _limit(self, Q: int, room: int | None) -> tuple[int, int | None] | None:
        """Least and most positions of Q levels whose ids, end marker too, fit in ``room``; None where none do."""
        bounds = self._bounds(Q)
        if bounds is None or room is None:
            return bounds
        if (Q, room) in self._limits:
            return self._limits[Q, room]
        least, most = bounds
        found = None
        low, high = least, max(least, room * max(self.block.spec.level_strides[:Q]))  # an id has at most so many
        high = high if most is None else min(high, most)
        if self._ids(Q, low) <= room:
            while low < high:  # the largest T that fits
                middle = (low + high + 1) // 2
                low, high = (middle, high) if self._ids(Q, middle) <= room else (low, middle - 1)
            found = least, max(least, self._down(low, Q))
        self._limits[Q, room] = found
        return found

    def bodies(self, room: int | None) -> list[Bounded]:
        """A walker for each number of levels that a segment without header may have."""
        return [body for q in self.counts for body in self.body(q, None, room)]

    def body(self, Q: int, T: int | None, room: int | None) -> list[Bounded]:
        """The walker of Q levels, of T positions where a header says so; none where they do not fit in ``room``."""
        strides, layout = self.block.spec.level_strides[:Q], self.block.layout
        if T is not None:
            fits = room is None or (room * max(strides) >= T and self._ids(Q, T) <= room)
            return [Fixed(layout, strides, T)] if fits else []
        limit = self._limit(Q, room)
        return [] if limit is None else [Bounded(layout, strides, *limit)]

    def fits(self, room: int | None) -> bool:
        """Whether a segment whose begin marker has been written can end within ``room`` ids."""
        if self.header is True:
            return room is None or any(self._completes(bytes([count]), room - 1) for count in (0, 1))
        return any(self._limit(q, room) is not None for q in self.counts)

    def _completes(self, data: bytes, room: int) -> bool:
        """Whether the header that begins with ``data`` and the codes behind it can end within ``room`` ids."""
        rest, parsed = self._shortest(data, room)
        if parsed is None:
            return False
        levels, length, _ = parsed
        if length is not None:
            return bool(self.body(levels, length, room - rest))
        return self._limit(levels, room - rest) is not None

    def _shortest(self, data: bytes, room: int) -> tuple[int, Header | None]:
        """The header ``data`` with the lowest bytes that are legal behind it: how many, and what it says."""
        reader, rest, at = read_header(len(self.block.levels)), 0, 0
        legal, count = next(reader)
        while True:
            chunk = data[at : at + count]
            at, missing = at + len(chunk), count - len(chunk)
            rest += missing
            if rest > room:
                return rest, None
            try:
                legal, count = reader.send(chunk + bytes([legal[0][0]]) * missing)
            except StopIteration as done:
                return rest, done.value

    def header_bytes(self, data: bytes, room: int | None) -> list[range]:
        """The byte values that may follow ``data`` in a generated header."""
        reader, at, named = read_header(len(self.block.levels)), 0, False
        legal, count = next(reader)
        while at + count <= len(data):
            named = data[at] == NAMED if _is_code(legal) else named  # within a named tensor, which a prompt may have
            legal, count = reader.send(data[at : (at := at + count)])
        values = [value for part in legal for value in part]
        if not data:
            values = values[: len(FIELDS) + 1]  # an entry of each kind
        elif _is_code(legal):
            values, named = [value for value in values if value not in (LENGTH, NAMED)], False
        foreign = named or data[:1] > bytes([len(FIELDS)])  # no header that is generated
        if room is not None and (foreign or not self._roomy(room)):
            fits = functools.partial(self._goes_on, data, room)
            if foreign:
                values = [value for value in values if fits(value)]
            else:  # a larger byte asks for no less room, but for 0 entries: then all levels must be written
                some = values[0 if data else 1 :]
                values = ([] if data or not fits(0) else [0]) + some[
                    : bisect_left(some, True, key=lambda v: not fits(v))
                ]
        breaks = [n for n in range(len(values) + 1) if n in (0, len(values)) or values[n] != values[n - 1] + 1]
        return [range(values[a], values[b - 1] + 1) for a, b in itertools.pairwise(breaks)]

    def _goes_on(self, data: bytes, room: int, value: int) -> bool:
        return self._completes(data + bytes([value]), room - 1)

    def _roomy(self, room: int) -> bool:
        """Whether any header of sizes can be finished: then no byte need be tried."""
        levels = range(1, len(self.block.levels) + 1)
        return room > HEADER_REST and all(self._limit(q, room - HEADER_REST) is not None for q in levels)


class Fixed(Bounded):
    """The walker of exactly T positions, which a header names: also such that codes alone do not say."""

    def __init__(self, layout: Layout, strides: Sequence[int], T: int) -> None:
        self.open, self.least, self.most = layout.walk(strides, T), None, None


def _is_code(legal: Sequence[range]) -> bool:
    """Whether the byte that comes next in a header says what the next entry is."""
    return any(NAMED in part for part in legal) and not any(NAMED - 1 in part for part in legal)


def _pair(asked: tuple[int | None, int | None], modality: str) -> tuple[int, int | None]:
    try:
        least, most = asked
    except (TypeError, ValueError):
        least = most = -1
    least = 0 if least is None else least
    if not isinstance(least, int) or least < 0 or not (most is None or (isinstance(most, int) and most >= least)):
        raise ValueError(f"lengths: expected {modality}: (least, most) with 0 <= least <= most or None, got {asked!r}")
    return least, most
