"""`Row`: what one sequence may go on with while a model writes it; `mmtok.lm.decoding` has one for each of a batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmtok.lm.lengths import Bounded, Lengths
from mmtok.vocab.block import Block
from mmtok.vocab.grammar import Grammar
from mmtok.vocab.header import parse_header
from mmtok.vocab.vocab import Vocab

Bounds = Mapping[str, tuple[int | None, int | None]]


class Rules:
    """The arguments of `mmtok.lm.decoding.DocumentLogits`, checked; shared by its rows."""

    def __init__(
        self,
        vocab: Vocab,
        header: bool | None,
        num_codebooks: Mapping[str, int] | None,
        modality: str | None,
        lengths: Bounds | None,
        eos_id: int | Sequence[int] | None,
        max_length: int | None,
    ) -> None:
        self.vocab, self.header, self.pinned = vocab, header, dict(num_codebooks or {})
        self.modality, self.max_length = modality, max_length
        self.begins = {block.begin: name for name, block in vocab.blocks.items()}
        vocab.grammar(header, num_codebooks)  # refuses a count that the vocab does not have
        if modality is not None and modality not in vocab.blocks:
            raise ValueError(f"modality: expected one of {sorted(vocab.blocks)} or None, got {modality!r}")
        if unknown := set(lengths or {}) - set(vocab.blocks):
            raise ValueError(f"lengths: expected only {sorted(vocab.blocks)}, got {sorted(unknown)}")
        self.eos = self._checked(eos_id)
        self.lengths = {
            name: Lengths(block, (lengths or {}).get(name), self.pinned.get(name), header)
            for name, block in vocab.blocks.items()
        }

    def _checked(self, eos_id: Any) -> tuple[int, ...]:
        eos = () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
        vocab, ends = self.vocab, {block.end for block in self.vocab.blocks.values()}
        for i in eos:
            whole = isinstance(i, int) and not isinstance(i, bool)
            if not whole or not (0 <= i < vocab.text_size or i >= vocab.size or i in ends):
                raise ValueError(
                    f"eos_id: expected ids of text (0..{vocab.text_size - 1}), past the vocab (from {vocab.size}) or "
                    f"end markers {sorted(ends)}, got {i!r}"
                )
        stops = any(i < vocab.text_size or i >= vocab.size for i in eos) or ends <= set(eos)
        if self.max_length is not None and not vocab.text_size and not stops:
            raise ValueError(
                "eos_id: expected an id that ends a document, got none; without text ids nothing else can fill what is "
                "left of max_length"
            )
        return eos

    def room(self, used: int) -> int | None:
        """Ids that may still come after the first ``used``."""
        return None if self.max_length is None else self.max_length - used


class Row:
    """One sequence: its `Grammar`, and the walkers that keep the open segment within its lengths.

    ``done``: an eos was written. ``dead``: something illegal was, as beam search does with a beam of score -inf.
    """

    def __init__(self, rules: Rules, used: int) -> None:
        self.rules, self.used = rules, used  # ids so far, padding and all
        self.done = self.dead = False
        self.wanted = rules.modality  # what must open next
        self._between(rules.header)

    def _between(self, header: bool | None) -> None:
        """Outside of segments; ``header`` is the Grammar's option for the next one."""
        self.grammar = Grammar(self.rules.vocab, header, self.rules.pinned)
        self.block: Block | None = None
        self.bodies: list[Bounded] = []  # for each number of levels that the open segment may still have
        self.opened, self.tail, self.header = self.used, [], bytearray()

    @property
    def lengths(self) -> Lengths:
        """Those of the open segment."""
        assert self.block is not None
        return self.rules.lengths[self.block.spec.modality]

    def resume(self, tail: Sequence[int]) -> None:
        """Take the segment that the prompt leaves open; ValueError where it cannot end as asked."""
        if not tail:
            return
        name = self.rules.begins[tail[0]]
        if self.rules.modality not in (None, name):
            raise ValueError(
                f"modality: expected a prompt that ends between segments or in one of {self.rules.modality}, got one "
                f"that ends in one of {name}; close it first"
            )
        self._replay(tail)
        if not self.allowed():
            raise self._too_small("to close the segment that the prompt leaves open")

    def _replay(self, tail: Sequence[int]) -> None:
        if len(tail) > 1:
            self._between(tail[1] in self.rules.vocab.ranges["byte"])  # whatever generated segments must have
        for i in tail:
            self._take(i)

    def _too_small(self, what: str) -> ValueError:
        bounds = {name: lengths.asked for name, lengths in self.rules.lengths.items()}
        return ValueError(
            f"max_length, lengths: expected room {what}, got max_length={self.rules.max_length} after {self.used} ids "
            f"and lengths={bounds}; give more room or other lengths"
        )

    def push(self, i: int) -> None:
        """Take the next id, whatever it is."""
        if self.done or self.dead:
            return
        if any(i in r for r in self.allowed()):
            self._take(i)
        else:
            self.dead = True

    def _take(self, i: int) -> None:
        rules, byte = self.rules, self.rules.vocab.ranges.get("byte", range(0))
        self.used += 1
        self.done = i in rules.eos
        if i >= rules.vocab.size:
            return
        self.grammar.push(i)
        if self.block is None:
            if i in rules.begins:
                self.block, self.wanted = rules.vocab.blocks[rules.begins[i]], None
                self.opened, self.tail = self.used, [i]
                self.bodies = self.lengths.bodies(rules.room(self.used))
            return
        self.tail.append(i)
        if self.grammar.complete:
            self._between(rules.header)
        elif i in byte:
            self.header.append(i - byte.start)
            parsed = parse_header(bytes(self.header), len(self.block.levels))
            room = rules.room(self.used)
            self.bodies = [] if parsed is None else self.lengths.body(parsed[0], parsed[1], room)
        else:
            choice = self.block.choice(i)
            self.bodies = [body for body in self.bodies if choice in body.choices()]
            for body in self.bodies:
                body.push(choice)

    def allowed(self) -> list[range]:
        """The ranges of ids that may come next; none after the end."""
        if self.done or self.dead:
            return []
        room = self.rules.room(self.used)
        if room is not None and room < 1:
            raise ValueError(f"max_length: expected more than the {self.used} ids so far, got {self.rules.max_length}")
        return self._outside(room) if self.block is None else self._inside(self.block, room)

    def _outside(self, room: int | None) -> list[range]:
        vocab, rules = self.rules.vocab, self.rules
        after = None if room is None else room - 1
        names = [self.wanted] if self.wanted else list(vocab.blocks)
        out = [range(b.begin, b.begin + 1) for m in names if rules.lengths[m].fits(after) for b in [vocab.blocks[m]]]
        if not self.wanted:
            out += [vocab.ranges["text"]] if vocab.text_size else []
            out += [range(i, i + 1) for i in rules.eos if i >= vocab.size]
        if not out:
            raise self._too_small(f"for a segment ({' or '.join(names)})")
        return out

    def _inside(self, block: Block, room: int | None) -> list[range]:
        byte, legal = self.rules.vocab.ranges["byte"], self.grammar.allowed()
        mine = [block.ids(choice) for choice in {c for body in self.bodies for c in body.choices()}]
        out = [r for r in legal if r in mine]
        if any(r.start in byte for r in legal):
            parts = self.lengths.header_bytes(bytes(self.header), room)
            out += [range(byte.start + part.start, byte.start + part.stop) for part in parts]
        return out

    def fork(self) -> Row:
        """A row that goes on from here on its own."""
        vocab = self.rules.vocab
        keep = (self.rules, vocab, *vocab.blocks.values(), *(block.layout for block in vocab.blocks.values()))
        try:
            return copy.deepcopy(self, {id(thing): thing for thing in keep})
        except TypeError:  # a Grammar that reads a header holds a generator, which has no copy
            other = Row(self.rules, self.opened - 1)
            other._replay(self.tail)
            other.done, other.dead = self.done, self.dead
            return other


def open_from(vocab: Vocab, ids: Sequence[int]) -> int:
    """Where the segment begins that ``ids`` leave open, or their number when all are closed."""
    array = np.asarray(ids, np.int64)
    begins = {block.begin: block for block in vocab.blocks.values()}
    at = np.flatnonzero(np.isin(array, list(begins)))
    if not len(at):
        return len(array)
    start = int(at[-1])
    return len(array) if (array[start:] == begins[int(array[start])].end).any() else start
