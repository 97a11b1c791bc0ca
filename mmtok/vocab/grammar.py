"""`Grammar`: which id may follow which, for constrained decoding and for errors that say what was expected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmtok.tokens import TokensError
from mmtok.vocab.block import Block
from mmtok.vocab.header import read_header
from mmtok.vocab.layouts import Walker

if TYPE_CHECKING:
    from mmtok.vocab.vocab import Vocab


class Grammar:
    """Reads a sequence id by id and knows which may follow: for constrained decoding, and for errors.

    Any sequence it accepts up to a point where `complete` holds is one that `Vocab.unpack` reads, and the reverse.

    Args:
        vocab: whose sequences.
        header: True = segments must have a header, False = must not (what a model that generates codes wants), None =
            either.
        num_codebooks: levels of a segment without header, {modality: count}; a modality not named may have any number.
        position: of the first id, for error messages.
    """

    def __init__(
        self,
        vocab: Vocab,
        header: bool | None = None,
        num_codebooks: Mapping[str, int] | None = None,
        position: int = 0,
    ) -> None:
        self._vocab, self._header, self._pinned = vocab, header, dict(num_codebooks or {})
        for modality, count in self._pinned.items():
            if modality not in vocab.blocks or not 1 <= count <= len(vocab.blocks[modality].levels):
                known = {m: len(b.levels) for m, b in vocab.blocks.items()}
                raise ValueError(f"num_codebooks: expected at most {known} levels, got {modality}: {count}")
        self.position = position
        self._block: Block | None = None  # the open segment
        self._walkers: list[Walker] = []  # one for each number of levels that the open segment may still have
        self._reader, self._request, self._bytes = None, None, bytearray()

    @property
    def complete(self) -> bool:
        """True between segments: the sequence may end here."""
        return self._block is None

    def allowed(self) -> list[range]:
        """The ranges of ids that may come next."""
        vocab, block = self._vocab, self._block
        if block is None:
            begins = [range(b.begin, b.begin + 1) for b in vocab.blocks.values()]
            return [vocab.ranges["text"], *begins] if vocab.text_size else begins
        legal = self._request[0] if self._request else ()
        byte = vocab.ranges["byte"].start
        choices = {choice for walker in self._walkers for choice in walker.choices()}
        return [range(byte + r.start, byte + r.stop) for r in legal] + [block.ids(choice) for choice in sorted(choices)]

    def mask(self) -> Tensor:
        """(size,) bool, true for each id that may come next."""
        out = torch.zeros(self._vocab.size, dtype=torch.bool)
        for r in self.allowed():
            out[r.start : r.stop] = True
        return out

    def expected(self) -> str:
        """`allowed` in words."""
        return " or ".join(self._vocab.words(r) for r in self.allowed())

    @property
    def in_header(self) -> bool:
        """True where only a byte of a header may come next."""
        return self._request is not None and not self._walkers

    def allows(self, i: int) -> bool:
        """True if id ``i`` may come next."""
        return any(i in r for r in self.allowed())

    def follow(self, choices: Iterable[int]) -> int:
        """Push cells of the open segment (levels or PAD) up to the first that may not come next; how many were taken.

        As `push` of their ids, some ten times faster.
        """
        walkers, count = self._walkers, 0
        for choice in choices:
            agreeing = [w for w in walkers if choice in w.choices()]
            if not agreeing:
                break
            for walker in agreeing:
                walker.push(choice)
            walkers, count = agreeing, count + 1
        if count:
            self._walkers, self._request = walkers, None
            self.position += count
        return count

    def push(self, i: int) -> None:
        """Take the next id; TokensError if it may not stand here."""
        if not self.allows(i):
            got = f"{i} ({self._vocab.label(i)})" if 0 <= i < self._vocab.size else f"{i}, no id of this vocab"
            raise TokensError(f"position {self.position}: expected {self.expected()}, got {got}")
        block, byte = self._block, self._vocab.ranges.get("byte", range(0))
        if block is not None and i not in byte and i != block.end:
            self.follow([block.choice(i)])
            return
        self.position += 1
        if block is None:
            if i >= self._vocab.text_size:
                self._open(next(b for b in self._vocab.blocks.values() if b.begin == i))
        elif i == block.end:
            self._block, self._walkers, self._request = None, [], None
        else:
            self._push_byte(block, i - byte.start)

    def _open(self, block: Block) -> None:
        self._block = block
        if self._header is not True:
            count = self._pinned.get(block.spec.modality)
            counts = [count] if count else range(1, len(block.levels) + 1)
            self._walkers = [block.layout.walk(block.spec.level_strides[:q]) for q in counts]
        if self._header is not False:
            self._reader = read_header(len(block.levels))
            self._request = next(self._reader)

    def _push_byte(self, block: Block, value: int) -> None:
        assert self._reader and self._request
        self._walkers = []
        self._bytes.append(value)
        if len(self._bytes) < self._request[1]:
            return
        try:
            self._request = self._reader.send(bytes(self._bytes))
        except StopIteration as done:
            self._request, (levels, length, _) = None, done.value
            self._walkers = [block.layout.walk(block.spec.level_strides[:levels], length)]
        self._bytes.clear()
