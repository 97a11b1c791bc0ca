"""`Vocab`: one id space for text, images and sound; packs segments into language-model ids and back, exactly.

A segment is ``<image> [header] codes </image>``. Each level of each modality has its own id range, so an id says by
itself what it is, and one that stands in the wrong place is an error that names the position.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np
from torch import Tensor

from mmtok.tokens import Tokens, TokensError, TokenSpec
from mmtok.vocab.block import BEGIN, BYTE, END_MARK, TEXT, UNKNOWN, Block, Scan
from mmtok.vocab.grammar import Grammar
from mmtok.vocab.layouts import MAX_LEVELS, PAD, read_layout
from mmtok.vocab.salvage import Salvaged, Salvager, SalvageReport

MAX_CODEBOOK_SIZE = 2**20


class TextTokenizer(Protocol):
    """What `Vocab` asks of a text tokenizer; those of Hugging Face have it."""

    def __len__(self) -> int: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: list[int]) -> str: ...


class Vocab:
    """Id ranges: text, 256 header bytes, then for image and for audio begin, end, pad and one range a level.

    Args:
        text: number of text ids (text segments are lists of ids), or a Hugging Face tokenizer (they are str).
        image: the ``spec`` of an image tokenizer; ``spec.keep(k)`` makes room for its first k levels only.
        audio: the ``spec`` of an audio tokenizer.
        layout: ``flatten`` (default), ``coarse_first``, ``delay``, ``partial_delay``, ``delay:0,1,3`` (a delay each
            level) or ``frame:0,1,2,2,1,2,2`` (order of the levels in one group of positions), for both modalities or
            as {modality: layout}; see `mmtok.vocab.layouts`.

    ``size`` counts all ids, ``ranges`` maps a name (``text``, ``byte``, ``<image>``, ``image_0`` ...) to its ids.
    """

    def __init__(
        self,
        text: int | TextTokenizer,
        image: TokenSpec | None = None,
        audio: TokenSpec | None = None,
        layout: str | Mapping[str, str] = "flatten",
    ) -> None:
        self.tokenizer = None if isinstance(text, int) else text
        self.text_size = text if isinstance(text, int) else len(text)
        if isinstance(text, bool) or self.text_size < 0:
            raise ValueError(f"text: expected a number of ids >= 0 or a tokenizer, got {text!r}")
        specs = {m: s for m, s in (("image", image), ("audio", audio)) if s is not None}
        given = dict.fromkeys(specs, layout) if isinstance(layout, str) else dict(layout)
        self.layouts = dict.fromkeys(specs, "flatten") | given
        if unknown := set(given) - set(specs):
            raise ValueError(f"layout: expected only modalities with a spec {sorted(specs)}, got {sorted(unknown)}")
        self.ranges = {"text": range(self.text_size)}
        self._groups, self._levels = [TEXT], [PAD]  # of each range
        if specs:
            self._add("byte", 256, BYTE)
        self.blocks = {modality: self._add_block(modality, spec) for modality, spec in specs.items()}
        self._names, self._starts = list(self.ranges), [r.start for r in self.ranges.values()]
        self.size = self.ranges[self._names[-1]].stop

    def _add(self, name: str, count: int, group: int, level: int = PAD) -> range:
        start = max(r.stop for r in self.ranges.values())
        self.ranges[name] = range(start, start + count)
        self._groups.append(group)
        self._levels.append(level)
        return self.ranges[name]

    def _add_block(self, modality: str, spec: TokenSpec) -> Block:
        if not isinstance(spec, TokenSpec) or spec.modality != modality:
            raise ValueError(f"{modality}: expected the spec of an {modality} tokenizer (tok.spec), got {spec!r}")
        Q, K, layout = spec.num_codebooks, max(spec.codebook_sizes), self.layouts[modality]
        if K > MAX_CODEBOOK_SIZE or Q > MAX_LEVELS:
            raise ValueError(
                f"{modality}: expected at most {MAX_LEVELS} levels of at most {MAX_CODEBOOK_SIZE} codes, got {Q} "
                f"levels of up to {K}; split large codes into several levels (bits_per_code of the binary tokenizers, "
                f"or mmtok.vocab.BitSplit)"
            )
        order = read_layout(layout, spec.level_strides, f"{modality}={spec.name!r}")
        group = max(END_MARK, *self._groups) + 1
        begin, end = self._add(f"<{modality}>", 1, BEGIN).start, self._add(f"</{modality}>", 1, END_MARK).start
        pad = self._add(f"{modality}_pad", 1, group).start
        digits = len(str(Q - 1))
        levels = [self._add(f"{modality}_{q:0{digits}}", k, group, q) for q, k in enumerate(spec.codebook_sizes)]
        return Block(spec, order, group, begin, end, pad, tuple(levels))

    def __repr__(self) -> str:
        specs = "".join(f", {m}={b.spec.name!r} {self.layouts[m]}" for m, b in self.blocks.items())
        return f"Vocab({self.size} ids: text={self.text_size}{specs})"

    def describe(self) -> str:
        """A table of the id ranges: name, first id, last id, count."""
        rows = [f"{name:<12}{r.start:>10} ..{r.stop - 1:>10}{len(r):>10} ids" for name, r in self.ranges.items() if r]
        return "\n".join([repr(self), *rows])

    def token_strings(self) -> list[str]:
        """A unique string for each id from ``text_size`` on, in id order, to add to a text tokenizer."""
        out: list[str] = []
        for name in self._names[1:]:
            K = len(self.ranges[name])
            width = 3 if name == "byte" else max(5, len(str(K - 1)))
            marker = name if name[0] == "<" else f"<|{name}|>"
            out += [marker] if K == 1 else [f"<|{name}_{code:0{width}}|>" for code in range(K)]
        return out

    def pack(self, parts: Sequence[str | Sequence[int] | Tokens], header: bool = True) -> list[int]:
        """Texts and Tokens of one item each, in reading order -> ids.

        Adjacent texts are joined, empty ones vanish; positions past an item's length are not written. With
        ``header=False`` only codes are written, and `unpack` then gives no side entries, as many levels as it sees (all
        when T = 0) and the largest T that fits where strides leave it open. Raises ValueError (mostly TokensError) for
        foreign Tokens, more than one item, and codes or text ids out of range.
        """
        if isinstance(parts, (str, Tokens)):
            raise ValueError(f"expected a list of segments, got one {type(parts).__name__}; write pack([segment])")
        out, text, n = [np.zeros(0, np.int64)], "", 0
        for n, part in enumerate(parts):
            if isinstance(part, str):
                text += part  # joined before it is encoded, since unpack cannot know where one str ended
                continue
            if text:
                out.append(self._encode_text(text, n - 1))
            out.append(self._encode_tokens(part, n, header) if isinstance(part, Tokens) else self._encode_text(part, n))
            text = ""
        return np.concatenate([*out, self._encode_text(text, n)]).tolist()

    def _encode_text(self, text: str | Sequence[int], n: int) -> np.ndarray:
        if isinstance(text, str) and text and self.tokenizer is None:
            raise ValueError(f"segment {n}: expected a list of ids (text= is an int, no tokenizer), got {text[:40]!r}")
        if isinstance(text, str):
            text = self.tokenizer.encode(text, add_special_tokens=False) if self.tokenizer and text else []
        return _flat_ids(text, self.text_size, f"segment {n}: expected str, Tokens or a flat list of text ids")

    def _encode_tokens(self, tokens: Tokens, n: int, header: bool) -> np.ndarray:
        spec = tokens.spec
        if (block := self.blocks.get(spec.modality)) is None:
            raise TokensError(
                f"segment {n}: this vocab has no {spec.modality} ids; build it with {spec.modality}=tok.spec"
            )
        if len(tokens) != 1:
            raise TokensError(f"segment {n}: expected Tokens of one item, got {len(tokens)}; pack tokens[i] for each i")
        tokens.check(block.spec)
        if spec != block.spec and spec != (mine := block.spec.keep(spec.num_codebooks)):
            raise TokensError(f"segment {n}: expected Tokens of {mine}, got {spec}; build the vocab with this spec")
        codes = tokens.codes[0, :, : int(tokens.lengths[0])].cpu().numpy()
        T = codes.shape[1]
        for q, s in enumerate(spec.level_strides):
            if s > 1 and len(bad := np.flatnonzero(codes[q] != np.repeat(codes[q, ::s], s)[:T])):
                raise TokensError(
                    f"segment {n}: level {q} has stride {s}, expected position {bad[0]} to repeat the code of position "
                    f"{bad[0] // s * s}, {codes[q, bad[0] // s * s]}, got {codes[q, bad[0]]}"
                )
        return block.write(codes, header, tokens.side, self.ranges["byte"].start)

    def unpack(self, ids: Sequence[int] | np.ndarray | Tensor) -> list[str | list[int] | Tokens]:
        """The segments that `pack` was given: texts (str, or lists of ids where text is an int) and Tokens on the CPU.

        Raises TokensError that names the position, what was expected there and what was found.
        """
        array = _flat_ids(ids, self.size, "expected a flat list of ids")
        scan, parts, i = self.scan(array), [], 0
        while i < len(array):
            if (stop := scan.run(i, TEXT)) > i:
                parts.append(self._decode_text(array[i:stop].tolist()))
                i = stop
                continue
            tokens, _, stop = self.segment(array, scan, i)
            if tokens is None:
                self._explain(array, scan, i)
            parts.append(tokens)
            i = stop + 1
        return parts

    def salvage(
        self,
        ids: Sequence[int] | np.ndarray | Tensor,
        policy: str = "repair",
        num_codebooks: Mapping[str, int] | None = None,
    ) -> Salvaged:
        """What can be read of a sequence that a model cut or damaged, and a report that names all that was dropped.

        Where `unpack` reads the ids, the parts are those of `unpack` and the report has no items. Packing the parts
        again is always valid.

        Args:
            ids: integers of any size; those the vocab does not have are dropped.
            policy: ``repair`` keeps the valid beginning of a damaged segment, ``drop`` nothing of it; the policy in
                full is the docstring of `mmtok.vocab.salvage`.
            num_codebooks: levels of a segment without header, {modality: count}, as for `grammar`: then a beginning
                with fewer levels is not taken.

        Raises TokensError for what is no flat list of integers, and nothing for flat lists.
        """
        array = _flat_ids(ids, None, "expected a flat list of ids")
        salvager = Salvager(self, array, ids, policy, num_codebooks)
        parts = [p if isinstance(p, Tokens) else self._decode_text(p) for p in salvager.parts()]
        return Salvaged(parts, SalvageReport(tuple(salvager.items)))

    def scan(self, array: np.ndarray) -> Scan:
        """What each id of a sequence (S,) int64 is."""
        which = np.searchsorted(self._starts, array, side="right") - 1
        group, level = np.array(self._groups)[which], np.array(self._levels)[which]
        unknown = (array < 0) | (array >= self.size)
        group[unknown], level[unknown] = UNKNOWN, PAD
        return Scan(group, level, [*(np.flatnonzero(np.diff(group)) + 1).tolist(), len(array)])

    def segment(self, array: np.ndarray, scan: Scan, i: int) -> tuple[Tokens | None, int, int]:
        """Tokens of the segment at ``i``, None if it is none; where its header stops; where its end marker must be."""
        block = next((b for b in self.blocks.values() if b.begin == array[i]), None)
        if block is None:
            return None, i, i
        head = scan.run(i + 1, BYTE)
        stop = scan.run(head, block.group)
        if stop == len(array) or array[stop] != block.end:
            return None, head, stop
        header = array[i + 1 : head] - self.ranges["byte"].start
        return block.read(header, array[head:stop], scan.level[head:stop]), head, stop

    def _decode_text(self, ids: list[int]) -> str | list[int]:
        if self.tokenizer is None:
            return ids
        decode: Any = self.tokenizer.decode
        if getattr(self.tokenizer, "clean_up_tokenization_spaces", False):  # it would drop the space before a comma
            return decode(ids, clean_up_tokenization_spaces=False)
        return decode(ids)

    def grammar(self, header: bool | None = None, num_codebooks: Mapping[str, int] | None = None) -> Grammar:
        """A fresh `Grammar`: which ids may follow, one step at a time."""
        return Grammar(self, header, num_codebooks)

    def allowed(
        self, prefix_ids: Sequence[int], header: bool | None = None, num_codebooks: Mapping[str, int] | None = None
    ) -> Tensor:
        """(size,) bool, true for each id that may legally follow ``prefix_ids``; the options are those of `Grammar`.

        Reads the whole prefix: hold a `grammar` while generating. TokensError if the prefix itself is out of place.
        """
        grammar = self.grammar(header, num_codebooks)
        for i in _flat_ids(prefix_ids, self.size, "expected a flat list of ids").tolist():
            grammar.push(i)
        return grammar.mask()

    def label(self, i: int) -> str:
        """What an id is, in words: ``image level 2, code 17``."""
        at = bisect_right(self._starts, i) - 1
        return self._words(at) + (f", code {i - self._starts[at]}" if self._levels[at] != PAD else "")

    def _words(self, at: int) -> str:
        name, level = self._names[at], self._levels[at]
        return name if level == PAD else f"{name.rsplit('_', 1)[0]} level {level}"

    def words(self, ids: range) -> str:
        """What a part of one range is: ``image level 2 (1200..2223)``."""
        last = f"..{ids[-1]}" if len(ids) > 1 else ""
        return f"{self._words(bisect_right(self._starts, ids[0]) - 1)} ({ids[0]}{last})"

    def _explain(self, array: np.ndarray, scan: Scan, start: int) -> NoReturn:
        """Raise the error of the segment at ``start``: walk it to the first id that is out of place."""
        grammar = Grammar(self, position=start)
        head = scan.run(start + 1, BYTE)
        for i in array[start:head].tolist():
            grammar.push(i)
        stop = scan.run(head, next(b.group for b in self.blocks.values() if b.begin == array[start]))
        taken = grammar.follow(scan.level[head:stop].tolist())
        for i in array[head + taken :].tolist():
            grammar.push(i)
            if grammar.complete:
                break
        raise TokensError(
            f"position {len(array)}: the sequence ends inside the segment that opens at position {start}, expected "
            f"{grammar.expected()}"
        )


def _flat_ids(ids: Any, size: int | None, what: str) -> np.ndarray:
    """``ids`` as int64 (n,); TokensError naming the first that is no integer in 0..size-1 (None: any; vast ones -1)."""
    values = ids.tolist() if isinstance(ids, Tensor) else ids
    try:
        array = np.asarray(values)
    except ValueError as e:  # rows of unequal length
        raise TokensError(f"{what}, got {type(ids).__name__} of several axes") from e
    if array.ndim != 1:
        raise TokensError(f"{what}, got {type(ids).__name__} with {array.ndim} axes")
    low, high = (-math.inf, math.inf) if size is None else (0, size - 1)
    if array.dtype.kind in "iu":
        bad = [] if size is None else np.flatnonzero((array < 0) | (array >= size))[:1].tolist()
    else:
        bad = [n for n, i in enumerate(values) if type(i) is not int or not low <= i <= high][:1]
    if bad:
        legal = "" if size is None else f" in 0..{size - 1}"
        raise TokensError(f"{what}; position {bad[0]}: expected an integer{legal}, got {values[bad[0]]!r}")
    if array.dtype.kind not in "iu" and len(array):  # integers past 64 bits among them
        return np.array([i if 0 <= i < 2**62 else -1 for i in values], np.int64)
    return array.astype(np.int64)
