"""`Block`: the id ranges of one modality, and how one item's codes are written in them and read again."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mmtok.tokens import Tokens, TokenSpec
from mmtok.vocab.header import parse_header, write_header
from mmtok.vocab.layouts import END, PAD, Layout

UNKNOWN, TEXT, BYTE, BEGIN, END_MARK = -1, 0, 1, 2, 3  # groups of ids; each block's cells have one from 4 on


@dataclasses.dataclass(frozen=True)
class Scan:
    """What each id of a sequence is: its group (S,), its level (S,) or PAD, and where runs of one group stop."""

    group: np.ndarray
    level: np.ndarray
    bounds: list[int]

    def run(self, i: int, group: int) -> int:
        """Where the run of ``group`` stops that begins at ``i``; ``i`` itself where there is none."""
        return self.bounds[bisect_right(self.bounds, i)] if i < len(self.group) and self.group[i] == group else i


@dataclasses.dataclass(frozen=True)
class Block:
    """The id ranges of one modality, and how its codes are laid out."""

    spec: TokenSpec
    layout: Layout
    group: int  # of its cells
    begin: int
    end: int
    pad: int
    levels: tuple[range, ...]

    def ids(self, choice: int) -> range:
        """The ids of a layout's choice: a level, PAD or END."""
        if choice >= 0:
            return self.levels[choice]
        return range(self.pad, self.pad + 1) if choice == PAD else range(self.end, self.end + 1)

    def choice(self, i: int) -> int:
        """The level of an id of this block, or PAD or END."""
        if i == self.end or i == self.pad:
            return END if i == self.end else PAD
        return next(q for q, r in enumerate(self.levels) if i in r)

    def read(self, header: np.ndarray, ids: np.ndarray, levels: np.ndarray) -> Tokens | None:
        """Tokens from a segment's header bytes, its other ids and their levels or PAD; None if any is out of place."""
        Q, T, side = int(levels.max(initial=PAD)) + 1 if len(levels) else len(self.levels), None, {}
        if len(header):
            parsed = parse_header(header.astype(np.uint8).tobytes(), len(self.levels))
            if parsed is None:
                return None
            Q, T, side = parsed
        if Q == 0:
            return None
        strides = self.spec.level_strides[:Q]
        cells = self.cells(ids, levels, Q)
        high = min(len(c) * s for c, s in zip(cells, strides, strict=True))  # before `order`: a damaged T may be vast
        T = high if T is None else T
        if high < T or not np.array_equal(self.layout.order(strides, T)[0], levels):
            return None
        return self.tokens(cells, T, side)

    def cells(self, ids: np.ndarray, levels: np.ndarray, Q: int) -> list[np.ndarray]:
        """The codes of each of the first Q levels, in the order of their positions as in every layout."""
        return [ids[levels == q] - r.start for q, r in enumerate(self.levels[:Q])]

    def tokens(self, cells: list[np.ndarray], T: int, side: dict[str, Tensor]) -> Tokens:
        """Tokens (1, Q, T) of the first codes of Q levels."""
        strides = self.spec.level_strides
        rows = [c[:T] if s == 1 else np.repeat(c[: -(-T // s)], s)[:T] for c, s in zip(cells, strides, strict=False)]
        spec = self.spec if len(cells) == len(self.levels) else self.spec.keep(len(cells))
        return Tokens(torch.from_numpy(np.stack(rows))[None], torch.tensor([T]), spec, side)

    def write(self, codes: np.ndarray, header: bool, side: Mapping[str, Tensor], byte: int) -> np.ndarray:
        """Ids of one item, codes (Q, T), with its markers."""
        Q, T = codes.shape
        strides = self.spec.level_strides[:Q]
        level, position = self.layout.order(strides, T)
        starts = np.array([r.start for r in self.levels[:Q]])
        ids = np.where(level == PAD, self.pad, starts[level] + codes[level, position])
        head = np.zeros(0, np.int64)
        if header:
            implied = min(-(-T // s) * s for s in strides)
            data = write_header(Q if len(self.levels) > Q else None, T if implied != T else None, side)
            head = byte + np.frombuffer(data, np.uint8).astype(np.int64)
        return np.concatenate([[self.begin], head, ids, [self.end]])
