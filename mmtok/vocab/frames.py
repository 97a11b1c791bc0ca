"""What presets are made of: frames of the same cells over and over, each cell with an id range of its own.

`mmtok.vocab.presets` has the published systems; this is how such ids are written, read and checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from mmtok.tokens import Tokens, TokensError, TokenSpec


class Preset:
    """What all presets share: the spec that they are for, and the ids that are no codes.

    Raises:
        ValueError: a spec of another shape than the system's codec has.
    """

    def __init__(
        self,
        spec: TokenSpec,
        modality: str,
        codebook_sizes: Sequence[int],
        level_strides: Sequence[int],
        special: dict[str, int],
    ) -> None:
        wanted = (modality, tuple(codebook_sizes), tuple(level_strides))
        found = (spec.modality, spec.codebook_sizes, spec.level_strides) if isinstance(spec, TokenSpec) else spec
        if found != wanted:
            raise ValueError(
                f"{type(self).__name__}: expected the spec of a tokenizer with (modality, codebook sizes, level "
                f"strides) {wanted}, got {found}; spec.keep(n) has the first n levels, and the "
                "preset takes other sizes as arguments"
            )
        self.spec, self.special = spec, special

    def checked(self, tokens: Tokens, spec: TokenSpec, items: int | None) -> Tensor:
        """The codes (B, Q, T) of Tokens that this convention can write."""
        if not isinstance(tokens, Tokens):
            raise ValueError(f"expected Tokens, got {type(tokens).__name__}")
        tokens.check(self.spec)
        if tokens.spec != spec:
            hint = f"tokens.keep(num_codebooks={spec.num_codebooks}) has the first levels"
            raise TokensError(f"expected Tokens of {spec}, got {tokens.spec}; {hint}")
        if items is not None and len(tokens) != items:
            raise TokensError(f"expected Tokens of {items} item(s), got {len(tokens)}; tokens[i] is one of them")
        if spec.modality == "audio" and bool((tokens.side.get("channels", torch.ones(1)) != 1).any()):
            raise TokensError(
                f"expected mono sound, got {tokens.side['channels'].tolist()} channels; encode a mono mix"
            )
        return tokens.codes


class Cell(NamedTuple):
    """One id of a frame: its name for errors, the row and the position within the frame of its code, its id range."""

    name: str
    row: int
    phase: int
    ids: range


class FlatPreset(Preset):
    """One sequence of ids with offsets: ``begin`` ids, frames of the same cells over and over, an ``end`` id.

    Args:
        cells: the ids of a frame in the order in which they are written.
        begin, end: names in ``special`` of the ids around the frames; ``end`` None: there is none.
        counts: how many frames there may be; None: any number.
        items: how many items are written together.
    """

    def __init__(
        self,
        spec: TokenSpec,
        special: dict[str, int],
        cells: Sequence[Cell],
        modality: str,
        codebook_sizes: Sequence[int],
        level_strides: Sequence[int] = (),
        begin: Sequence[str] = (),
        end: str | None = None,
        counts: range | None = None,
        items: int = 1,
    ) -> None:
        super().__init__(spec, modality, codebook_sizes, level_strides or (1,) * len(codebook_sizes), special)
        self.cells, self.begin, self.end, self.counts, self.items = tuple(cells), tuple(begin), end, counts, items
        self.written = spec  # of the Tokens that are packed
        self.positions = max(c.phase for c in cells) + 1  # of one frame
        rows = max(c.row for c in cells) + 1
        self.repeats = spec.level_strides[:rows] if items == 1 else (1,) * rows  # positions that one code fills
        if len(set(special.values())) < len(special):
            raise ValueError(f"special ids: expected each to differ from the others, got {special}")
        if clash := [name for name, i in special.items() if any(i in c.ids for c in cells)]:
            ranges = [f"{c.ids[0]}..{c.ids[-1]}" for c in cells]
            raise ValueError(f"special ids {clash}: expected none among the codes {ranges}, got {special}")

    @property
    def size(self) -> int:
        """The smallest vocabulary that has all these ids."""
        return 1 + max(*self.special.values(), *(c.ids[-1] for c in self.cells))

    def pack(self, tokens: Tokens, markers: bool = True) -> list[int]:
        """The ids of one item (of `items`), with the marks around them unless ``markers=False``.

        Raises:
            TokensError: Tokens of another tokenizer or number of levels, codes out of range, part of a frame.
        """
        codes = self.checked(tokens, self.written, self.items).cpu().numpy()
        rows = self._rows(codes, tokens.lengths.tolist())  # (rows, T)
        P, T = self.positions, rows.shape[1]
        if T % P or (self.counts is not None and T // P not in self.counts):
            raise TokensError(f"expected {self._count_words()}, got {T} positions; pad or cut the input before encode")
        for row, s in enumerate(self.repeats):
            bad = np.flatnonzero(rows[row] != np.repeat(rows[row, ::s], s))
            if len(bad):
                at, held = int(bad[0]), int(bad[0]) // s * s
                raise TokensError(
                    f"level {row} has stride {s}, expected position {at} to repeat the code of position {held}, "
                    f"{rows[row, held]}, got {rows[row, at]}"
                )
        body = np.stack([c.ids.start + rows[c.row, c.phase :: P] for c in self.cells], 1).reshape(-1).tolist()
        if not markers:
            return body
        return [*self._opening(rows), *body, *([] if self.end is None else [self.special[self.end]])]

    def unpack(self, ids: Sequence[int] | np.ndarray | Tensor, markers: bool = True, partial: str = "refuse") -> Tokens:
        """The Tokens that `pack` was given, on the CPU.

        Args:
            ids: what `pack` wrote, or what a model wrote in its place. `segments` finds it in a longer sequence.
            markers: whether the marks stand around the codes.
            partial: ``drop`` forgives what a model leaves that was stopped early, an incomplete last frame and a
                missing end mark; ``side["dropped_ids"]`` counts the ids left out. ``refuse`` forgives nothing.

        Raises:
            TokensError: an id out of place, named with its position and what was expected there.
        """
        check_partial(partial)
        array = _integers(ids)
        start = self._read_opening(array) if markers else 0
        stop, end = len(array), None
        if markers and self.end is not None:
            end = self.special[self.end]
            found = np.flatnonzero(array[start:] == end)[:1]
            stop = start + int(found[0]) if len(found) else stop
        body, C = array[start:stop], len(self.cells)
        F, rest = divmod(len(body), C)
        first = np.tile([c.ids.start for c in self.cells], F + 1)[: len(body)]
        sizes = np.tile([len(c.ids) for c in self.cells], F + 1)[: len(body)]
        bad = np.flatnonzero((body < first) | (body >= first + sizes))
        if len(bad):
            self.refuse(array, start + int(bad[0]), self.cell_words(int(bad[0]) % C))
        if partial == "refuse" and rest:
            self.refuse(array, stop, self.cell_words(rest))
        if self.counts is not None and F not in self.counts:
            self.refuse(array, min(stop, start + self.counts[-1] * C), f"{self._count_words()}, {F} were read")
        if end is not None and stop == len(array) and partial == "refuse":
            self.refuse(array, stop, f"{self.cell_words(0)} or {self.end} ({end})")
        if end is not None and stop + 1 < len(array):
            self.refuse(array, stop + 1, "the end of the sequence")
        rows = np.zeros((len(self.repeats), F * self.positions), np.int64)
        whole = (body[: F * C] - first[: F * C]).reshape(F, C)
        for i, cell in enumerate(self.cells):
            for j in range(self.repeats[cell.row]):
                rows[cell.row, cell.phase + j :: self.positions] = whole[:, i]
        if markers:
            self._check_rows(array, start, rows, partial)
        codes = torch.from_numpy(self._codes(rows))
        B = len(codes)
        side = {"dropped_ids": torch.full((B,), rest)} if partial == "drop" else {}
        return Tokens(codes, torch.full((B,), codes.shape[2]), self.written, side)

    def segments(self, ids: Sequence[int] | np.ndarray | Tensor, partial: str = "refuse") -> list[slice]:
        """Where the marked segments of a longer sequence stand: ``preset.unpack(ids[s])`` reads each.

        With ``partial="drop"`` the last may lack its end mark. Raises TokensError for marks that do not pair.
        """
        check_partial(partial)
        if self.end is None or not self.begin:
            raise ValueError(f"{type(self).__name__} has no begin and end marks to find a segment by")
        array = _integers(ids)
        begin, end = self.special[self.begin[0]], self.special[self.end]
        out: list[slice] = []
        opened: int | None = None
        for at in np.flatnonzero((array == begin) | (array == end)).tolist():
            if (opened is None) != (array[at] == begin):
                self.refuse(array, at, f"{self.begin[0]} ({begin})" if opened is None else f"{self.end} ({end})")
            if opened is not None:
                out.append(slice(opened, at + 1))
            opened = at if opened is None else None
        if opened is not None and partial == "refuse":
            self.refuse(array, len(array), f"{self.end} ({end}) of the segment that opens at position {opened}")
        return out if opened is None else [*out, slice(opened, len(array))]

    def _rows(self, codes: np.ndarray, lengths: list[int]) -> np.ndarray:
        """Codes (B, Q, T) -> the rows (rows, T) that cells point into: the levels."""
        return codes[0, :, : lengths[0]]

    def _codes(self, rows: np.ndarray) -> np.ndarray:
        return rows[None]

    def _opening(self, rows: np.ndarray) -> list[int]:
        """The ids before the first frame."""
        del rows
        return [self.special[name] for name in self.begin]

    def _read_opening(self, array: np.ndarray) -> int:
        """How many ids stand before the first frame."""
        for at, name in enumerate(self.begin):
            if at >= len(array) or array[at] != self.special[name]:
                self.refuse(array, at, f"{name} ({self.special[name]})")
        return len(self.begin)

    def _check_rows(self, array: np.ndarray, start: int, rows: np.ndarray, partial: str) -> None:
        """Compare the rows that were read from ``start`` on with what stood before."""
        del array, start, rows, partial

    def _count_words(self) -> str:
        if self.counts is None:
            return f"whole frames of {self.positions} positions"
        low, high = self.counts[0], self.counts[-1]
        return f"{low} codes" if low == high else f"{low}..{high} codes"

    def cell_words(self, at: int) -> str:
        """What may stand at one place of a frame."""
        cell = self.cells[at]
        return f"{cell.name} ({cell.ids[0]}..{cell.ids[-1]})"

    def refuse(self, array: np.ndarray, at: int, expected: str) -> NoReturn:
        """Raise the error of one id out of place."""
        names = {i: f" ({name})" for name, i in self.special.items()}
        got = f"{array[at]}{names.get(int(array[at]), '')}" if at < len(array) else "the end of the sequence"
        raise TokensError(f"position {at}: expected {expected}, got {got}")


def _integers(ids: Any) -> np.ndarray:
    """``ids`` as int64 (n,)."""
    try:
        array = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids)
    except ValueError as e:  # rows of unequal length
        raise TokensError(f"expected a flat list of integers, got {type(ids).__name__} of several axes") from e
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TokensError(f"expected a flat list of integers, got {array.dtype} with {array.ndim} axes")
    return array.astype(np.int64)


def check_partial(partial: str) -> None:
    if partial not in ("refuse", "drop"):
        raise ValueError(f"partial: expected 'refuse' or 'drop', got {partial!r}")
