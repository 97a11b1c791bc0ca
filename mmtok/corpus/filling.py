"""Rows on their way into a shard file: checked one by one, kept in small integers, and turned into its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtok.corpus.packing import PLAIN, Group, pack_bits
from mmtok.corpus.records import Row
from mmtok.corpus.shard_columns import bytes_columns, json_bytes, narrow, side_columns, utf8
from mmtok.tokens import TokensError, TokenSpec

HOW_TO_READ = (
    "Items lie one after another; {streams} holds ceil(lengths[i] / stride) codes of item i for each of its levels, "
    "level after level; a width of 8, 16, 32 or 64 bits is a plain integer, any other a little-endian bit stream (code "
    "j fills the bits j*width and on, bit b is bit b%8 of byte b//8) with 8 spare bytes at its end; key.bytes, "
    "text.bytes and extra.bytes hold as many UTF-8 bytes of each item as the .lengths beside them say."
)


def stream_names(groups: Sequence[Group]) -> list[str]:
    """The tensors that hold the codes of each group of levels."""
    return ["codes"] if len(groups) == 1 else [f"codes.{n}" for n in range(len(groups))]


def streams_note(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What the metadata say of each stream."""
    return [
        {"tensor": name, "levels": list(g.levels), "strides": list(g.strides), "width": g.width}
        for name, g in zip(stream_names(groups), groups, strict=True)
    ]


def how_to_read(groups: Sequence[Group]) -> str:
    """The sentence by which anybody reads the file without mmtok."""
    return HOW_TO_READ.format(streams=" and ".join(stream_names(groups)))


class Filling:
    """Rows on their way into a shard: codes in small integers, everything else as it came."""

    def __init__(self, spec: TokenSpec, groups: tuple[Group, ...]):
        self.spec, self.groups = spec, groups
        self.lengths: list[int] = []
        self.codes: list[list[np.ndarray]] = [[] for _ in groups]
        self.keys: list[bytes] = []
        self.texts: list[str | None] = []
        self.extras: list[bytes] = []
        self.sides: list[Mapping[str, Tensor]] = []

    def add(self, row: Row) -> None:
        tokens, spec = row.tokens, self.spec
        if len(tokens) != 1 or tokens.spec != spec:
            raise TokensError(
                f"{row.key!r}: expected one item of {spec}, got {len(tokens)} of {tokens.spec}; a corpus has one "
                "tokenizer and one number of levels"
            )
        T = int(tokens.lengths[0])
        codes = tokens.codes[0, :, :T].cpu().numpy()  # (Q, T)
        low, high = codes.min(1, initial=0).tolist(), codes.max(1, initial=0).tolist()
        for q, (k, s) in enumerate(zip(spec.codebook_sizes, spec.level_strides, strict=True)):
            if low[q] < 0 or high[q] >= k:
                raise TokensError(
                    f"{row.key!r}: expected codes in 0..{k - 1} on level {q}, got {low[q]}..{high[q]}; the tokenizer's "
                    "codes do not fit its spec"
                )
            if s > 1 and not np.array_equal(codes[q], np.repeat(codes[q, ::s], s)[:T]):
                raise TokensError(f"{row.key!r}: expected level {q} to repeat each code {s} times, got other codes")
        for parts, group in zip(self.codes, self.groups, strict=True):
            dtype = PLAIN[min(w for w in PLAIN if w >= group.width)]
            levels = [codes[q, ::s] for q, s in zip(group.levels, group.strides, strict=True)]
            parts.append(np.concatenate(levels).astype(dtype))
        try:
            self.extras.append(json_bytes(dict(row.extra)) if row.extra else b"")
        except ValueError as e:
            raise ValueError(f"{row.key!r}: extra: {e}") from e
        self.keys.append(utf8(row.key))
        self.texts.append(row.text)
        self.lengths.append(T)
        self.sides.append(tokens.side)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of the file, and what its metadata say of the side values."""
        tensors, notes = side_columns(self.sides)
        tensors["lengths"] = torch.from_numpy(narrow(np.array(self.lengths, np.int64)))
        tensors |= bytes_columns("key", self.keys)
        if given := [t is not None for t in self.texts if t is not None]:
            tensors |= bytes_columns("text", [utf8(t or "") for t in self.texts])
            if len(given) < len(self.texts):
                tensors["text.given"] = torch.tensor([t is not None for t in self.texts])
        if any(self.extras):
            tensors |= bytes_columns("extra", self.extras)
        for name, parts, group in zip(stream_names(self.groups), self.codes, self.groups, strict=True):
            codes = np.concatenate(parts) if parts else np.zeros(0, PLAIN.get(group.width, np.dtype(np.uint8)))
            tensors[name] = torch.from_numpy(codes if group.width in PLAIN else pack_bits(codes, group.width))
        return tensors, notes
