"""`CodeBPE`: byte-pair encoding over codes, exactly undone (arXiv 2310.14580 for sound; 2410.02155 for pictures).

The codes of an item, written position by position and level by level (layout ``flatten``), become one private-use
character each; Hugging Face ``tokenizers`` learns which neighbours to join. What comes out is a stream of one level
with a spec of its own, so `Vocab`, `Grammar` and all that reads Tokens take it as they take any tokenizer:

    bpe = CodeBPE.train(list_of_tokens, tok.spec, vocab_size=4096)
    vocab = Vocab(text=hf_tokenizer, audio=bpe.spec)        # the ids of the BPE stand at vocab.ranges["audio_0"]
    ids = vocab.pack(["say ", bpe.as_tokens(tokens)])
    tokens = bpe.from_tokens(vocab.unpack(ids)[1])          # what `tok.decode` takes
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmtok.tokens import Tokens, TokensError, TokenSpec, write_atomic
from mmtok.vocab.layouts import LAYOUTS

if TYPE_CHECKING:
    import tokenizers

FORMAT = "mmtok-bpe-1"
PLANES = (0xF0000, 0x100000)  # supplementary private use areas: no text, and no other tokenizer's text, is in them
PLANE = 65_534  # characters of each; the last two of a plane are no characters
MAX_ALPHABET = len(PLANES) * PLANE
MAX_VOCAB = 2**20  # the most that one level of a `Vocab` may have
TRAIN_CHUNK = 512  # codes: the trainer reads a whole word for each merge in it, so that long ones cost hours
LENGTH = "bpe_length"  # side entry with T, where level strides leave it open
Merges = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Repaired:
    """What `CodeBPE.salvage` made of damaged ids: ``tokens`` of whole positions, and what was left out.

    ``dropped`` lists (number among the codes that the ids spell, level, code); ``report`` says it in sentences.
    """

    tokens: Tokens
    dropped: list[tuple[int, int, int]]
    report: list[str]


class CodeBPE:
    """Codes of one spec <-> fewer ids, made by `train` or `load`.

    Args:
        base: the spec of the codes.
        merges: pairs of private-use strings in the order in which they are joined.
        whole_frames: said of the merges: an id is a part of one frame, or whole frames.

    ``base`` is the spec of what goes in, ``spec`` that of what comes out: one level of ``size`` codes. Ids below
    ``sum(base.codebook_sizes)`` are single codes, level after level. The length is dynamic: ``frame_rate`` or
    ``num_tokens`` of ``spec`` is the largest that can occur (nothing joined); `compression` measures what does occur.
    """

    def __init__(self, base: TokenSpec, merges: Sequence[tuple[str, str]], whole_frames: bool) -> None:
        self.base, self.merges, self.whole_frames = base, [(str(a), str(b)) for a, b in merges], whole_frames
        vocab = {c: i for i, c in enumerate(_alphabet(base))}
        for a, b in self.merges:
            vocab.setdefault(a + b, len(vocab))
        self.hf = _build(vocab, self.merges)
        self.size = len(vocab)
        self._firsts = np.cumsum([0, *base.codebook_sizes])
        self._spelled = _cells("".join(vocab))  # what all ids spell, one after the other
        self._starts = np.cumsum([0, *map(len, vocab)])
        self._cycle = math.lcm(*base.level_strides)  # positions after which the order of levels repeats
        self._order = _order(base, self._cycle)
        about = json.dumps([FORMAT, base.to_dict(), self.merges])
        per_position = sum(1 / s for s in base.level_strides)
        self.spec = dataclasses.replace(
            base,
            name=f"{base.name}+bpe{self.size}",
            codebook_sizes=(self.size,),
            level_strides=(1,),
            frame_rate=None if base.frame_rate is None else base.frame_rate * per_position,
            num_tokens=None if base.num_tokens is None else len(_order(base, base.num_tokens)),
            fingerprint=hashlib.sha256(about.encode()).hexdigest()[:16],
        )

    def __repr__(self) -> str:
        kind = "whole frames" if self.whole_frames else "any merge"
        codes = int(self._firsts[-1])
        return f"CodeBPE({self.base.name!r}, {self.size} ids = {codes} codes + {self.size - codes} joined, {kind})"

    @classmethod
    def train(
        cls,
        items: Iterable[Tokens],
        spec: TokenSpec,
        vocab_size: int,
        whole_frames: bool = True,
        min_count: int = 2,
    ) -> CodeBPE:
        """Learn the merges from Tokens (any batch sizes); the same items in the same order give the same merges.

        Args:
            items: Tokens of ``spec``; no merge crosses from one item to the next.
            spec: what the codes are; ``tok.spec.keep(k)`` with ``tokens.keep(k)`` for the first k levels.
            vocab_size: ids in all. Fewer come out where no pair occurs ``min_count`` times any more.
            whole_frames: an id may join codes of one frame, or whole frames, never the end of one with the beginning
                of the next. (A frame is one position; with level strides, the positions until their order repeats.)
                False: any neighbours.
            min_count: how often a pair must occur.

        Raises:
            ValueError: nothing to learn from, a size that cannot be, foreign Tokens, or a spec whose frames cannot be
                told apart. ImportError: no tokenizers package.
        """
        codes = sum(spec.codebook_sizes)
        if not codes <= vocab_size <= MAX_VOCAB:
            raise ValueError(
                f"vocab_size: expected {codes} (every code of {spec.name!r}) up to {MAX_VOCAB}, got {vocab_size}"
            )
        if min_count < 2:
            raise ValueError(f"min_count: expected 2 or more (a pair seen once says nothing), got {min_count}")
        plain = cls(spec, [], whole_frames)
        sequences = [s for tokens in items for s in plain._strings(tokens) if s]
        if not sequences:
            raise ValueError("expected items with at least one code to learn from, got none")
        size = len(plain._order)
        if size == 1 or not whole_frames:
            chunks = [s[i : i + TRAIN_CHUNK] for s in sequences for i in range(0, len(s), TRAIN_CHUNK)]
            return cls(spec, _learn(chunks, _alphabet(spec), vocab_size, min_count), whole_frames)
        inside = list(zip(plain._order[:-1].tolist(), plain._order[1:].tolist(), strict=True))
        if (int(plain._order[-1]), int(plain._order[0])) in inside:
            raise ValueError(
                f"whole_frames: expected strides where the step from frame to frame differs from all steps inside one, "
                f"got {spec.level_strides} (levels in the order {plain._order.tolist()}); pass whole_frames=False"
            )
        # A merge inside a frame can only ever apply inside one, since its characters name their levels. So merges of
        # whole frames come second in the list and lose nothing. How many ids each kind gets is tried out.
        frames = [s[i : i + size] for s in sequences for i in range(0, len(s), size)]
        first = _learn(frames, _alphabet(spec), vocab_size, min_count)
        best: tuple[int, CodeBPE] | None = None
        for quarters in (4, 3, 2, 1):
            merges = first[: len(first) * quarters // 4]
            made = cls(spec, merges, True)
            made = cls(spec, merges + made._join_frames(sequences, vocab_size - made.size, min_count), True)
            total = sum(len(e.ids) for e in made.hf.encode_batch_fast(sequences, add_special_tokens=False))
            if best is None or total < best[0]:
                best = total, made
        assert best is not None
        return best[1]

    def _join_frames(self, sequences: list[str], room: int, min_count: int) -> Merges:
        """Up to ``room`` merges of ids that are whole frames; each such id is one character to the trainer."""
        widths = np.diff(self._starts)
        strings = [s for s, _ in sorted(self.hf.get_vocab().items(), key=lambda entry: entry[1])]
        whole = np.flatnonzero(widths == len(self._order))
        if room < 1 or not len(whole):
            return []
        letter = {int(i): chr(0x10000 + n) for n, i in enumerate(whole)}
        back = {c: strings[i] for i, c in letter.items()}
        runs: list[str] = []
        for e in self.hf.encode_batch_fast(sequences, add_special_tokens=False):
            joined = "".join(letter.get(i, " ") for i in e.ids)
            runs += [r[i : i + TRAIN_CHUNK] for r in joined.split() for i in range(0, len(r), TRAIN_CHUNK)]
        pairs = _learn(runs, list(back), len(back) + room, min_count) if runs else []
        return [("".join(back[c] for c in a), "".join(back[c] for c in b)) for a, b in pairs]

    def _strings(self, tokens: Tokens) -> list[str]:
        """The codes of each item as private-use characters."""
        tokens.check(self.base)
        if tokens.spec != self.base:
            raise TokensError(f"expected Tokens of {self.base}, got {tokens.spec}; train a BPE of that spec")
        codes = tokens.codes.cpu().numpy()
        out = []
        for b, T in enumerate(tokens.lengths.tolist()):
            item = codes[b, :, :T]
            for q, s in enumerate(self.base.level_strides):
                if s > 1 and not np.array_equal(item[q], np.repeat(item[q, ::s], s)[:T]):
                    raise TokensError(f"item {b}: level {q} has stride {s}, expected its codes to repeat, they do not")
            level, position = LAYOUTS["flatten"].order(self.base.level_strides, T)
            out.append(_text(self._firsts[level] + item[level, position]))
        return out

    def encode(self, tokens: Tokens) -> list[int]:
        """Tokens of one item -> BPE ids, 0..size-1. TokensError for foreign Tokens or another number of items."""
        if len(tokens) != 1:
            raise TokensError(f"expected Tokens of one item, got {len(tokens)}; encode tokens[i], or as_tokens(tokens)")
        return self.hf.encode(self._strings(tokens)[0], add_special_tokens=False).ids

    def decode(
        self, ids: Sequence[int] | Tensor, length: int | None = None, side: Mapping[str, Tensor] | None = None
    ) -> Tokens:
        """BPE ids -> the Tokens of one item, exactly those of `encode`.

        Args:
            ids: BPE ids.
            length: T; needed only where level strides leave it open (else the largest that fits).
            side: the side entries to give the Tokens.

        Raises:
            TokensError: ids that no Tokens give; `salvage` takes those.
        """
        level, code = self._spell(ids)
        found = self._whole(level, code, length)
        if found is None:
            n = len(level)
            order = np.resize(self._order, n + 1)
            at = next(iter(np.flatnonzero(order[:n] != level).tolist()), n)
            whole = f"level {order[at]}" if at < n or length is None else f"{length} positions"
            got = f"level {level[at]}" if at < n else f"the end after {n} codes"
            raise TokensError(f"code {at} that the ids spell: expected {whole}, got {got}; salvage(ids) keeps the rest")
        return Tokens(found, torch.tensor([found.shape[2]]), self.base, dict(side or {}))

    def salvage(self, ids: Sequence[int] | Tensor, side: Mapping[str, Tensor] | None = None) -> Repaired:
        """What a model wrote, where it broke off or left the order of levels: whole positions kept, the rest named.

        A frame that breaks in the middle is dropped, and reading goes on at the next code that can begin one; of an
        unfinished last frame the finished positions stay. TokensError only for ids out of 0..size-1.
        """
        level, code = self._spell(ids)
        order, size = self._order, len(self._order)
        kept: list[int] = []
        frame: list[int] = []
        gone: list[int] = []
        for i, q in enumerate(level.tolist()):
            if q != order[len(frame)]:
                gone += frame
                frame = []
            if q == order[len(frame)]:
                frame.append(i)
            else:
                gone.append(i)
            if len(frame) == size:
                kept += frame
                frame = []
        ends = np.cumsum([0, *(sum(t % s == 0 for s in self.base.level_strides) for t in range(self._cycle))])
        stop = int(ends[ends <= len(frame)].max())
        kept, gone = kept + frame[:stop], sorted(gone + frame[stop:])
        found = self._whole(level[kept], code[kept], None)
        assert found is not None
        dropped = [(i, int(level[i]), int(code[i])) for i in gone]
        runs = np.split(gone, np.flatnonzero(np.diff(gone) != 1) + 1) if gone else []
        report = [
            f"dropped {len(run)} hanging codes from number {run[0]} on (levels {' '.join(str(level[i]) for i in run)})"
            for run in runs
        ]
        return Repaired(Tokens(found, torch.tensor([found.shape[2]]), self.base, dict(side or {})), dropped, report)

    def _spell(self, ids: Sequence[int] | Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Levels (n,) and codes (n,) that ids spell."""
        array = np.asarray(ids.tolist() if isinstance(ids, Tensor) else ids)
        if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
            raise TokensError(f"expected a flat list of integer ids, got {array.dtype} with {array.ndim} axes")
        array = array.astype(np.int64)
        if len(bad := np.flatnonzero((array < 0) | (array >= self.size))):
            raise TokensError(f"position {bad[0]}: expected a BPE id in 0..{self.size - 1}, got {array[bad[0]]}")
        widths = (self._starts[1:] - self._starts[:-1])[array]
        first = np.cumsum(widths) - widths  # where each id begins among the codes
        cells = self._spelled[np.arange(widths.sum()) + np.repeat(self._starts[array] - first, widths)]
        level = np.searchsorted(self._firsts, cells, side="right") - 1
        return level, cells - self._firsts[level]

    def _whole(self, level: np.ndarray, code: np.ndarray, length: int | None) -> Tensor | None:
        """Codes (1, Q, T), or None where the levels are not those of whole positions, ``length`` if it is given."""
        strides = self.base.level_strides
        cells = [code[level == q] for q in range(len(strides))]
        T = min(len(c) * s for c, s in zip(cells, strides, strict=True)) if length is None else length
        if T < 0 or max(len(level) * max(strides), 1) < T or not np.array_equal(_order(self.base, T), level):
            return None
        rows = [np.repeat(c, s)[:T] for c, s in zip(cells, strides, strict=True)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))[None]

    def as_tokens(self, tokens: Tokens) -> Tokens:
        """Tokens of ``base`` -> Tokens of ``spec``, one level (B, 1, ids of the longest); side entries go along."""
        encoded = self.hf.encode_batch_fast(self._strings(tokens), add_special_tokens=False)
        rows = [torch.tensor(e.ids, dtype=torch.int64) for e in encoded]
        codes = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 0).long()
        side = {k: v.cpu() for k, v in tokens.side.items()}
        lengths = tokens.lengths.cpu()
        implied = torch.stack([-(-lengths // s) * s for s in self.base.level_strides]).amin(0)
        if not torch.equal(implied, lengths):
            side[LENGTH] = lengths.clone()
        return Tokens(codes[:, None], torch.tensor([len(r) for r in rows], dtype=torch.int64), self.spec, side)

    def from_tokens(self, tokens: Tokens) -> Tokens:
        """What `as_tokens` was given, exactly. TokensError for foreign Tokens and ids that no codes give."""
        tokens.check(self.spec)
        side = {k: v.cpu() for k, v in tokens.side.items() if k != LENGTH}
        lengths = tokens.side[LENGTH].tolist() if LENGTH in tokens.side else [None] * len(tokens)
        codes = tokens.codes.cpu()
        parts = [self.decode(codes[b, 0, :n], lengths[b]) for b, n in enumerate(tokens.lengths.tolist())]
        if not parts:
            return Tokens(torch.zeros(0, self.base.num_codebooks, 0).long(), tokens.lengths.cpu(), self.base, side)
        whole = Tokens.concat(parts)
        return Tokens(whole.codes, whole.lengths, self.base, side)

    def compression(self, items: Iterable[Tokens]) -> float:
        """Ids for each code of ``items``, measured: 0.4 = sequences of 40 % of the length. ValueError without codes."""
        ids = codes = 0
        for tokens in items:
            strings = self._strings(tokens)
            codes += sum(map(len, strings))
            ids += sum(len(e.ids) for e in self.hf.encode_batch_fast(strings, add_special_tokens=False))
        if not codes:
            raise ValueError("expected items with at least one code to measure, got none")
        return ids / codes

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` (Hugging Face's) and ``bpe.json`` (spec, fingerprint), each aside and renamed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"format": FORMAT, "spec": self.base.to_dict(), "whole_frames": self.whole_frames}
        about["fingerprint"] = self.spec.fingerprint
        write_atomic(folder / "tokenizer.json", self.hf.to_str().encode())
        write_atomic(folder / "bpe.json", json.dumps(about, indent=1).encode())

    @classmethod
    def load(cls, folder: str | Path) -> CodeBPE:
        """Read what `save` wrote. FileNotFoundError, or ValueError for files that are damaged or of two trainings."""
        folder = Path(folder)
        for name in ("bpe.json", "tokenizer.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no {name} in {folder}; CodeBPE.save(folder) writes it")
        try:
            about: dict[str, Any] = json.loads((folder / "bpe.json").read_text("utf-8"))
            if about.get("format") != FORMAT:
                raise ValueError(f"expected format {FORMAT!r}, got {about.get('format')!r}")
            merges = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
            made = cls(TokenSpec.from_dict(about["spec"]), [(a, b) for a, b in merges], about["whole_frames"])
            if made.spec.fingerprint != about["fingerprint"]:
                raise ValueError(f"tokenizer.json gives {made.spec.fingerprint}, bpe.json {about['fingerprint']}")
        except ImportError:
            raise
        except Exception as e:  # tokenizers raises a bare Exception for merges that do not fit
            raise ValueError(f"{folder}: damaged or mixed BPE files ({e}); train and save it again") from e
        return made


def _order(spec: TokenSpec, T: int) -> np.ndarray:
    """Levels (n,) in the order in which T positions are written."""
    return LAYOUTS["flatten"].order(spec.level_strides, T)[0]


def _alphabet(spec: TokenSpec) -> list[str]:
    """One character for each code, level after level."""
    size = sum(spec.codebook_sizes)
    if size > MAX_ALPHABET:
        raise ValueError(
            f"codebook_sizes: expected at most {MAX_ALPHABET} codes over all levels (private characters), got {size} "
            f"of {spec.name!r}; keep fewer levels (spec.keep and tokens.keep), or split large codes into several"
        )
    return list(_text(np.arange(size)))


def _text(cells: np.ndarray) -> str:
    """Numbers 0..MAX_ALPHABET-1 -> private-use characters."""
    points = np.asarray(PLANES, np.uint32)[cells // PLANE] + cells % PLANE
    return points.astype("<u4").tobytes().decode("utf-32-le")


def _cells(text: str) -> np.ndarray:
    """The inverse of `_text`."""
    points = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.int64)
    return np.where(points >= PLANES[1], points - PLANES[1] + PLANE, points - PLANES[0])


def _build(vocab: dict[str, int], merges: Merges) -> tokenizers.Tokenizer:
    """A tokenizer that joins and does nothing else: no normalizer, no splitting, no special tokens."""
    try:
        from tokenizers import Tokenizer
        from tokenizers.models import BPE
    except ImportError as e:
        raise ImportError("BPE over codes needs the tokenizers package: pip install 'mmtok[lm]'") from e
    return Tokenizer(BPE(vocab=vocab, merges=merges))


def _learn(words: Iterable[str], alphabet: list[str], vocab_size: int, min_count: int) -> Merges:
    """The merges that ``tokenizers`` learns from words."""
    try:
        from tokenizers import Tokenizer
        from tokenizers.models import BPE
        from tokenizers.trainers import BpeTrainer
    except ImportError as e:
        raise ImportError("BPE over codes needs the tokenizers package: pip install 'mmtok[lm]'") from e
    learner = Tokenizer(BPE())
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_count,
        show_progress=False,
        initial_alphabet=alphabet,
        special_tokens=[],
    )
    learner.train_from_iterator(words, trainer)
    return [(a, b) for a, b in json.loads(learner.to_str())["model"]["merges"]]
