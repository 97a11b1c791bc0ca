"""`Vocab.salvage`: what can still be read of a sequence that is cut or damaged, and a report of what could not.

The policy, in full. Between segments stand texts and begin markers; anything else there is dropped (``stray``). A
segment that `Vocab.unpack` would read is taken as it is. Any other one is damaged at the first id that may not stand
where it stands, and ends before the next text or begin marker, or with its own end marker, whichever comes first. Of
the ids in front of the damage, ``repair`` keeps the codes of the first Q levels and the first T positions of which all
codes are there, for the Q and T that keep the most codes (the larger Q where several do); ``drop`` keeps none. No code
is put in, moved or changed. Where Q * T is 0 the whole segment is dropped.

Bytes that are no header are dropped and the codes read without one: side entries are lost then. The same is done where
a header contradicts the codes and more of them can be read without it. Otherwise the header's side entries stay as they
are, also those of a cut segment (as with ``Tokens.keep``): decode gives the beginning that the codes describe.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from mmtok.tokens import Tokens
from mmtok.vocab.block import TEXT, UNKNOWN, Block
from mmtok.vocab.grammar import Grammar
from mmtok.vocab.header import parse_header
from mmtok.vocab.layouts import PAD

if TYPE_CHECKING:
    from mmtok.vocab.vocab import Vocab

POLICIES = ("repair", "drop")
KINDS = {
    "cut": "the sequence ends inside the segment",
    "unended": "text or another segment begins before the end marker",
    "incomplete": "the end marker comes before a frame or delay pattern is whole",
    "misplaced": "an id of another level, modality or kind",
    "header": "bytes that are no header of these codes",
    "stray": "ids outside of any segment",
    "unknown": "ids that the vocab does not have",
}


@dataclasses.dataclass(frozen=True)
class Damage:
    """One thing that was wrong.

    Args:
        position: of the first id that is out of place; the length of the sequence where it ends too early.
        kind: a key of `KINDS`.
        expected: what might have stood there, in words.
        found: what stood there.
        dropped: ids lost: codes, header bytes and whatever stood in the way. The begin, end and pad ids of a segment
            that is kept do not count; all ids of a segment that is not do.
        kept: codes kept of the segment (0 for a header whose codes are damaged too: the next item tells them).
        start: where the segment opens, or the first of the stray ids.
    """

    position: int
    kind: str
    expected: str
    found: str
    dropped: int
    kept: int
    start: int

    def __str__(self) -> str:
        where = f"position {self.position}" + (f" (segment at {self.start})" if self.start != self.position else "")
        ids, codes = _count(self.dropped, "id"), _count(self.kept, "code")
        return f"{where}: {self.kind}: expected {self.expected}, got {self.found}; {ids} dropped, {codes} kept"


@dataclasses.dataclass(frozen=True)
class SalvageReport:
    """What `Vocab.salvage` met; no items for a sequence without damage. `str` tells all of it."""

    items: tuple[Damage, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.items

    @property
    def dropped(self) -> int:
        """Ids lost in all."""
        return sum(item.dropped for item in self.items)

    def __str__(self) -> str:
        if self.ok:
            return "nothing dropped"
        head = f"{_count(self.dropped, 'id')} dropped, {_count(len(self.items), 'damaged place')}"
        return "\n".join([head, *(f"  {item}" for item in self.items)])


@dataclasses.dataclass(frozen=True)
class Salvaged:
    """``parts`` as `Vocab.unpack` gives them (texts that dropped ids parted are joined), and what was dropped."""

    parts: list[str | list[int] | Tokens]
    report: SalvageReport


@dataclasses.dataclass(frozen=True)
class _Reading:
    """The codes of a damaged segment, read in one way from ``first`` to ``at``, the first id out of place."""

    first: int
    at: int
    whole: bool  # the end marker stands at ``at``, in its place
    expected: str
    tokens: Tokens
    kept: int  # codes
    pads: int  # between them


class Salvager:
    """One pass over one sequence: `parts`, then `items`.

    Args:
        vocab: whose sequence.
        ids: (S,) int64, negative or past the vocab where there is no such id.
        originals: the same as they were given, for the words of the report.
        policy: ``repair`` or ``drop``.
        num_codebooks: as for `Grammar`.
    """

    def __init__(
        self,
        vocab: Vocab,
        ids: np.ndarray,
        originals: Sequence[int] | np.ndarray | Tensor,
        policy: str,
        num_codebooks: Mapping[str, int] | None,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
        self._outside = Grammar(vocab, num_codebooks=num_codebooks).expected()  # checks num_codebooks too
        self.vocab, self.ids, self.originals, self.pinned = vocab, ids, originals, num_codebooks
        self.repairs = policy == "repair"
        self.scan = vocab.scan(ids)
        self.openers = {block.begin: block for block in vocab.blocks.values()}
        self.items: list[Damage] = []

    def parts(self) -> Iterator[list[int] | Tokens]:
        """Texts (never two in a row) and Tokens, in their order."""
        text: list[int] = []
        i, S = 0, len(self.ids)
        while i < S:
            if (stop := self.scan.run(i, TEXT)) > i:
                text += self.ids[i:stop].tolist()
            elif (block := self.openers.get(int(self.ids[i]))) is None:
                stop = self._stray(i)
            else:
                tokens, stop = self._segment(block, i)
                if tokens is not None:
                    if text:
                        yield text
                    text = []
                    yield tokens
            i = stop
        if text:
            yield text

    @functools.cached_property
    def _anchors(self) -> np.ndarray:
        """Where a text goes on or something new begins."""
        return np.flatnonzero((self.scan.group == TEXT) | np.isin(self.ids, list(self.openers)))

    @functools.cached_property
    def _unknown(self) -> np.ndarray:
        return np.flatnonzero(self.scan.group == UNKNOWN)

    @functools.cached_property
    def _ends(self) -> dict[int, np.ndarray]:
        return {block.end: np.flatnonzero(self.ids == block.end) for block in self.openers.values()}

    def _stop(self, at: int, end: int | None = None) -> int:
        """Where a segment stops that is damaged at ``at``, or stray ids do: before an anchor or with its end marker."""
        anchor = _first_from(self._anchors, at, len(self.ids))
        return anchor if end is None else min(anchor, _first_from(self._ends[end], at, len(self.ids)) + 1)

    def _stray(self, i: int) -> int:
        """Drop the ids from ``i`` on that may not stand outside of a segment; where they stop."""
        unknown = self.scan.group[i] == UNKNOWN  # these have an item of their own
        stop = (
            self.scan.run(i, UNKNOWN) if unknown else min(self._stop(i), _first_from(self._unknown, i, len(self.ids)))
        )
        kind, expected = "unknown" if unknown else "stray", self._outside or "nothing"
        self.items.append(Damage(i, kind, expected, self._found(i), stop - i, 0, i))
        return stop

    def _segment(self, block: Block, i: int) -> tuple[Tokens | None, int]:
        """What can be kept of the segment that opens at ``i``, and where it stops."""
        tokens, head, at = self.vocab.segment(self.ids, self.scan, i)
        pin = (self.pinned or {}).get(block.spec.modality) if head == i + 1 else None
        if tokens is not None and (pin is None or tokens.spec.num_codebooks == pin or not tokens.codes.numel()):
            return tokens, at + 1
        return self._damaged(block, i, head)

    def _damaged(self, block: Block, i: int, head: int) -> tuple[Tokens | None, int]:
        grammar = Grammar(self.vocab, num_codebooks=self.pinned, position=i)
        grammar.push(block.begin)
        at = i + 1
        while at < head and grammar.allows(int(self.ids[at])):
            grammar.push(int(self.ids[at]))
            at += 1
        reading, fault = None, None  # fault: what is wrong with the header, where, and what might stand there
        if at < head or grammar.in_header:
            fault = (self._kind(block, at, "header"), at, grammar.expected())
            cells = np.flatnonzero(self.scan.group[head : self._stop(at, block.end)] == block.group)
            if len(cells):
                reading = self._read_bare(block, head + int(cells[0]))
        else:
            reading = self._read(block, head, grammar, self.ids[i + 1 : head])
            bare = self._read_bare(block, head) if head > i + 1 else reading
            if bare.kept > reading.kept:
                fault, reading = ("header", reading.at, reading.expected), bare

        end = fault if reading is None else (self._kind(block, reading.at), reading.at, reading.expected)
        assert end is not None
        stop = self._stop(end[1], block.end)
        if reading is None or not reading.kept or not self.repairs:
            self._tell(fault or end, stop - i, 0, i)
            return None, stop
        if fault:
            self._tell(fault, reading.first - i - 1, reading.kept if reading.whole else 0, i)
        if not reading.whole:
            markers = int(self.ids[stop - 1] == block.end)
            self._tell(end, stop - reading.first - reading.kept - reading.pads - markers, reading.kept, i)
        return reading.tokens, stop

    def _read_bare(self, block: Block, first: int) -> _Reading:
        """The codes from ``first`` on as those of a segment without header."""
        grammar = Grammar(self.vocab, False, self.pinned)
        grammar.push(block.begin)
        return self._read(block, first, grammar, np.zeros(0, np.int64))

    def _read(self, block: Block, first: int, grammar: Grammar, header: np.ndarray) -> _Reading:
        """The codes from ``first`` on as far as ``grammar`` goes, which has read the segment so far."""
        stop = self.scan.run(first, block.group)
        at = first + grammar.follow(self.scan.level[first:stop].tolist())
        ids, level = self.ids[first:at], self.scan.level[first:at]
        whole = at < len(self.ids) and self.ids[at] == block.end and grammar.allows(block.end)
        pin = (self.pinned or {}).get(block.spec.modality)
        counts, T, side = range(1, len(block.levels) + 1) if pin is None else [pin], None, {}
        if len(header):
            parsed = parse_header(
                (header - self.vocab.ranges["byte"].start).astype(np.uint8).tobytes(), len(block.levels)
            )
            assert parsed is not None  # the grammar took it
            counts, T, side = range(1, parsed[0] + 1), parsed[1], parsed[2]
        kept, Q, T = _most_codes(np.bincount(level[level != PAD], minlength=len(block.levels)), block, counts, T)
        tokens = block.tokens(block.cells(ids, level, Q), T, side)
        return _Reading(first, at, bool(whole), grammar.expected(), tokens, kept, int((level == PAD).sum()))

    def _kind(self, block: Block, at: int, other: str = "misplaced") -> str:
        """A key of `KINDS` for what stands at ``at``, ``other`` for an id that has a place, but not here."""
        if at == len(self.ids):
            return "cut"
        if self.scan.group[at] == TEXT or int(self.ids[at]) in self.openers:
            return "unended"
        if other == "header":
            return other
        if self.scan.group[at] == UNKNOWN:
            return "unknown"
        return "incomplete" if self.ids[at] == block.end else other

    def _found(self, at: int) -> str:
        if at == len(self.ids):
            return "the end of the sequence"
        value = int(self.originals[at])
        return f"{value} ({self.vocab.label(value) if 0 <= value < self.vocab.size else 'no id of this vocab'})"

    def _tell(self, what: tuple[str, int, str], dropped: int, kept: int, start: int) -> None:
        kind, at, expected = what
        self.items.append(Damage(at, kind, expected, self._found(at), dropped, kept, start))


def _most_codes(found: np.ndarray, block: Block, counts: Iterable[int], T: int | None) -> tuple[int, int, int]:
    """Codes kept, levels and positions of the Q in ``counts`` that keeps the most of ``found`` (levels,) codes."""
    best = (0, 1, 0)
    for Q in counts:
        strides = block.spec.level_strides[:Q]
        high = min(int(n) * s for n, s in zip(found[:Q], strides, strict=True))
        high = high if T is None else min(high, T)
        best = max(best, (sum(-(-high // s) for s in strides), Q, high))
    return best


def _first_from(places: np.ndarray, at: int, otherwise: int) -> int:
    """The first of these ascending places that is ``at`` or later."""
    n = int(np.searchsorted(places, at))
    return int(places[n]) if n < len(places) else otherwise


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
