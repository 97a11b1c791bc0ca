"""`Segment`: one segment of a document while its ids arrive, and the codes that are complete so far."""

from __future__ import annotations

import torch
from torch import Tensor

from mmtok.lm.sounds import Sound
from mmtok.vocab.block import Block
from mmtok.vocab.header import parse_header
from mmtok.vocab.layouts import END, PAD, Walker
from mmtok.vocab.vocab import Vocab


class Segment:
    """The open segment, read id by id."""

    def __init__(self, vocab: Vocab, block: Block, position: int, pinned: int | None) -> None:
        self.vocab, self.block, self.position = vocab, block, position
        self.ids = [block.begin]
        self.damaged = False
        self.header: bytearray = bytearray()
        self.side: dict[str, Tensor] = {}
        self.length: int | None = None
        self.reading = False  # a header
        strides, counts = block.spec.level_strides, [pinned] if pinned else range(1, len(block.levels) + 1)
        self.walkers: dict[int, Walker] = {q: block.layout.walk(strides[:q]) for q in counts}
        self.cells: list[list[int]] = [[] for _ in block.levels]
        self.taken = 0  # positions given to the decoder
        self.sound: Sound | None = None
        self.refused = False

    def take(self, i: int) -> bool:
        """Read the next id; False where it may not stand here."""
        self.ids.append(i)
        byte = self.vocab.ranges["byte"]
        if i in byte:
            return self._take_byte(i - byte.start)
        if self.reading or not (i == self.block.end or i == self.block.pad or any(i in r for r in self.block.levels)):
            return False
        choice = self.block.choice(i)
        left = {q: walker for q, walker in self.walkers.items() if choice in walker.choices()}
        if not left:
            return False
        self.walkers = left
        if choice != END:
            for walker in left.values():
                walker.push(choice)
        if choice not in (PAD, END):
            self.cells[choice].append(i - self.block.levels[choice].start)
        return True

    def _take_byte(self, value: int) -> bool:
        if len(self.ids) > 2 and not self.reading:
            return False
        self.reading, self.walkers = True, {}
        self.header.append(value)
        if (parsed := parse_header(bytes(self.header), len(self.block.levels))) is not None:
            q, self.length, self.side = parsed
            self.reading = False
            self.walkers = {q: self.block.layout.walk(self.block.spec.level_strides[:q], self.length)}
        return True

    @property
    def levels(self) -> int | None:
        """How many levels it has; None where that is still open."""
        return next(iter(self.walkers)) if len(self.walkers) == 1 else None

    def ready(self, unit: int) -> Tensor | None:
        """Codes (Q, n) of the positions that are new and complete, in whole units; None before there are any."""
        Q = self.levels
        if Q is None:
            return None
        strides = self.block.spec.level_strides[:Q]
        T = min(len(cells) * s for cells, s in zip(self.cells, strides, strict=False))
        T = (T if self.length is None else min(T, self.length)) // unit * unit
        if self.taken >= T:
            return None
        start, self.taken = self.taken, T
        rows = [[cells[t // s] for t in range(start, T)] for cells, s in zip(self.cells, strides, strict=False)]
        return torch.tensor(rows, dtype=torch.int64)
