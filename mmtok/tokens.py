"""`TokenSpec` says what a tokenizer's codes mean; `Tokens` holds the codes of a batch and all that decode needs."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FORMAT = "mmtok-tokens-1"


class TokensError(ValueError):
    """Codes that are malformed, out of range, or that belong to another tokenizer."""


@dataclasses.dataclass(frozen=True)
class TokenSpec:
    """What a tokenizer's codes mean; two tokenizers with equal specs read each other's codes.

    Args:
        name: the tokenizer's name, e.g. ``audio-rvq-16k-4kbps``.
        modality: ``image`` or ``audio``.
        codebook_sizes: K of each level, length Q.
        level_strides: level q carries a new code at every ``level_strides[q]``-th position and repeats it between
            (SNAC's ragged levels); 1 = every position. Empty means 1 everywhere.
        frame_rate: positions a second in Hz (audio); per channel when the sound has several.
        num_tokens: positions of one image (its largest count where the length is dynamic).
        conditions: what decode needs beside the codes, e.g. ``("text",)``.
        fingerprint: hash of the weights and the config that made the codes.
    """

    name: str
    modality: str
    codebook_sizes: tuple[int, ...]
    level_strides: tuple[int, ...] = ()
    frame_rate: float | None = None
    num_tokens: int | None = None
    conditions: tuple[str, ...] = ()
    fingerprint: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "codebook_sizes", tuple(int(k) for k in self.codebook_sizes))
        strides = tuple(int(s) for s in self.level_strides) or (1,) * len(self.codebook_sizes)
        object.__setattr__(self, "level_strides", strides)
        object.__setattr__(self, "conditions", tuple(self.conditions))
        if self.modality not in ("image", "audio"):
            raise ValueError(f"modality: expected 'image' or 'audio', got {self.modality!r}")
        if not self.codebook_sizes or min(self.codebook_sizes) < 2:
            raise ValueError(f"codebook_sizes: expected at least one size >= 2, got {self.codebook_sizes}")
        if len(strides) != len(self.codebook_sizes) or min(strides) < 1:
            raise ValueError(f"level_strides: expected {len(self.codebook_sizes)} values >= 1, got {strides}")
        if (self.frame_rate is None) == (self.num_tokens is None):
            raise ValueError("expected exactly one of frame_rate (audio) and num_tokens (image)")

    @property
    def num_codebooks(self) -> int:
        return len(self.codebook_sizes)

    @property
    def bits_per_position(self) -> float:
        """Nominal bits that one position costs, averaged over the level strides."""
        return sum(math.log2(k) / s for k, s in zip(self.codebook_sizes, self.level_strides, strict=True))

    @property
    def bitrate_bps(self) -> float | None:
        """Nominal bits a second of one audio channel; None for images."""
        return None if self.frame_rate is None else self.bits_per_position * self.frame_rate

    def keep(self, num_codebooks: int) -> TokenSpec:
        """The spec of the first ``num_codebooks`` levels; the fingerprint stays: the same tokenizer decodes them."""
        if not 1 <= num_codebooks <= self.num_codebooks:
            raise TokensError(f"num_codebooks: expected 1..{self.num_codebooks}, got {num_codebooks}")
        return dataclasses.replace(
            self, codebook_sizes=self.codebook_sizes[:num_codebooks], level_strides=self.level_strides[:num_codebooks]
        )

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, d: Mapping) -> TokenSpec:
        names = {f.name for f in dataclasses.fields(cls)}
        if unknown := set(d) - names:
            raise TokensError(f"spec has unknown fields {sorted(unknown)}; it was written by another version of mmtok")
        return cls(**d)


@dataclasses.dataclass
class Tokens:
    """Codes of a batch, with what decode needs to give back the exact size.

    Args:
        codes: (B, Q, T) int64. Positions at and past an item's length are 0 and mean nothing.
        lengths: (B,) int64, valid positions of each item.
        spec: what the codes mean.
        side: tensors whose first axis is B: ``num_samples``, ``sample_rate``, ``height``, ``width``, ``channels`` ...
    """

    codes: Tensor
    lengths: Tensor
    spec: TokenSpec
    side: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.codes.ndim != 3 or self.codes.dtype != torch.int64:
            raise TokensError(f"codes: expected int64 (B, Q, T), got {self.codes.dtype} {tuple(self.codes.shape)}")
        B, Q, T = self.codes.shape
        if self.spec.num_codebooks != Q:
            raise TokensError(f"codes: expected Q = {self.spec.num_codebooks} levels of {self.spec.name!r}, got {Q}")
        if self.lengths.shape != (B,) or self.lengths.dtype != torch.int64:
            found = f"{self.lengths.dtype} {tuple(self.lengths.shape)}"
            raise TokensError(f"lengths: expected int64 of shape ({B},), got {found}")
        if B and (int(self.lengths.min()) < 0 or int(self.lengths.max()) > T):
            raise TokensError(f"lengths: expected 0..{T}, got {int(self.lengths.min())}..{int(self.lengths.max())}")
        for key, value in self.side.items():
            if not isinstance(value, Tensor) or value.shape[:1] != (B,):
                raise TokensError(f"side[{key!r}]: expected a tensor whose first axis is {B}")

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def mask(self) -> Tensor:
        """(B, T) bool, true where a position is valid."""
        return torch.arange(self.codes.shape[2], device=self.codes.device) < self.lengths[:, None]

    def __getitem__(self, i: int | slice) -> Tokens:
        """Item ``i`` (or a slice of items) as a batch, trimmed to its longest valid length."""
        if not isinstance(i, slice):
            i = operator.index(i)
            if not -len(self) <= i < len(self):
                raise IndexError(f"item {i} of a batch of {len(self)}")
            i = slice(i % len(self), i % len(self) + 1)
        lengths = self.lengths[i]
        T = int(lengths.max()) if len(lengths) else 0
        return Tokens(self.codes[i, :, :T], lengths, self.spec, {k: v[i] for k, v in self.side.items()})

    def keep(self, num_codebooks: int | None = None, num_tokens: int | None = None) -> Tokens:
        """The first levels and / or the first positions: a coarser description that the same tokenizer decodes."""
        Q, T = self.codes.shape[1:]
        q = Q if num_codebooks is None else num_codebooks
        t = T if num_tokens is None else num_tokens
        if not 1 <= q <= Q:
            raise TokensError(f"num_codebooks: expected 1..{Q}, got {q}")
        if num_tokens is not None and t < 1:
            raise TokensError(f"num_tokens: expected at least 1, got {t}")
        return Tokens(self.codes[:, :q, :t], self.lengths.clamp(max=t), self.spec.keep(q), dict(self.side))

    @property
    def bits(self) -> Tensor:
        """(B,) float64, nominal bits of each item: sum over levels of ceil(length / stride) * log2(K)."""
        total = torch.zeros(len(self), dtype=torch.float64)
        for k, stride in zip(self.spec.codebook_sizes, self.spec.level_strides, strict=True):
            total += torch.ceil(self.lengths.cpu().double() / stride) * math.log2(k)
        return total

    def to(self, device: torch.device | str) -> Tokens:
        side = {k: v.to(device) for k, v in self.side.items()}
        return Tokens(self.codes.to(device), self.lengths.to(device), self.spec, side)

    def check(self, spec: TokenSpec) -> None:
        """Raise TokensError unless these are codes of ``spec`` (or of its first levels) and every code is in range."""
        mine = self.spec
        if mine.fingerprint != spec.fingerprint:
            raise TokensError(
                f"these are ids of {mine.name!r} (fingerprint {mine.fingerprint or 'none'}), not of {spec.name!r} "
                f"({spec.fingerprint or 'none'}); decode them with the tokenizer that made them"
            )
        if mine.codebook_sizes != spec.codebook_sizes[: mine.num_codebooks]:
            raise TokensError(f"codebook sizes: expected a prefix of {spec.codebook_sizes}, got {mine.codebook_sizes}")
        if mine.level_strides != spec.level_strides[: mine.num_codebooks]:
            raise TokensError(f"level strides: expected a prefix of {spec.level_strides}, got {mine.level_strides}")
        check_range(self.codes, mine.codebook_sizes, self.mask)

    @staticmethod
    def concat(parts: Sequence[Tokens]) -> Tokens:
        """Join batches of one spec along B, padding T with 0 and keeping the side entries that all of them have.

        Side entries of another width (one number a chunk, say) are padded with 0 too: what counts follows from lengths.
        """
        if not parts:
            raise TokensError("expected at least one Tokens, got none")
        spec = parts[0].spec
        if any(p.spec != spec for p in parts):
            raise TokensError(f"expected Tokens of one spec, got {sorted({p.spec.name for p in parts})}")
        T = max(p.codes.shape[2] for p in parts)
        codes = torch.cat([torch.nn.functional.pad(p.codes, (0, T - p.codes.shape[2])) for p in parts])
        keys = set(parts[0].side).intersection(*(p.side for p in parts))
        side = {k: torch.cat(_of_one_width([p.side[k] for p in parts])) for k in sorted(keys)}
        return Tokens(codes, torch.cat([p.lengths for p in parts]), spec, side)

    @staticmethod
    def join(parts: Sequence[Tokens]) -> Tokens:
        """Join the pieces of a stream along T, in their order: what encoding the whole at once gives.

        ``side["num_samples"]`` adds up; every other side entry, the spec and the number of items must be one.

        Raises:
            TokensError: no pieces, or pieces of different streams.
        """
        if not parts:
            raise TokensError("expected at least one Tokens, got none")
        first = parts[0]
        fixed = sorted(set(first.side) - {"num_samples"})
        for p in parts:
            if p.spec != first.spec or len(p) != len(first) or set(p.side) != set(first.side):
                found = f"{p.spec.name!r}, {len(p)} items, side {sorted(p.side)}"
                wanted = f"{first.spec.name!r}, {len(first)} items, side {sorted(first.side)}"
                raise TokensError(f"expected pieces of one stream ({wanted}), got {found}; Tokens.concat joins clips")
            if differ := [k for k in fixed if not torch.equal(p.side[k], first.side[k])]:
                raise TokensError(f"expected one stream, got pieces whose side differs in {differ}")
        rows = [torch.cat([p.codes[b, :, : int(p.lengths[b])] for p in parts], 1).T for b in range(len(first))]
        codes = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2) if rows else first.codes
        side = dict(first.side)
        if "num_samples" in side:
            side["num_samples"] = torch.stack([p.side["num_samples"] for p in parts]).sum(0)
        return Tokens(codes.contiguous(), torch.stack([p.lengths for p in parts]).sum(0), first.spec, side)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, codes in the smallest unsigned integer; written aside, then renamed."""
        from safetensors.torch import save

        check_range(self.codes, self.spec.codebook_sizes, self.mask)
        dtype = smallest_uint(max(self.spec.codebook_sizes) - 1)
        codes = torch.where(self.mask[:, None], self.codes, 0).cpu().numpy().astype(dtype)
        tensors = {"codes": torch.from_numpy(codes), "lengths": self.lengths}
        tensors |= {f"side.{key}": value for key, value in self.side.items()}
        # clone: slices of one batch share memory, which safetensors refuses
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        about = json.dumps({"format": FORMAT, "spec": self.spec.to_dict()})
        write_atomic(path, save(tensors, metadata={"mmtok": about}))  # one entry: safetensors shuffles several

    @classmethod
    def load(cls, path: str | Path) -> Tokens:
        """Read what `save` wrote. Raises FileNotFoundError, or TokensError when the file is not such a file."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"no token file at {path}; `mmtok encode INPUT -o FILE.safetensors` writes one")
        try:
            with safe_open(str(path), framework="pt") as f:
                about = (f.metadata() or {}).get("mmtok", "null")
                tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - safe_open is no mapping
        except (SafetensorError, OSError) as e:
            raise TokensError(f"{path} is not a readable safetensors file ({e}); encode the input again") from e
        try:
            meta = json.loads(about)
            if not isinstance(meta, dict) or meta.get("format") != FORMAT:
                found = meta.get("format") if isinstance(meta, dict) else meta
                raise TokensError(f"expected a token file of format {FORMAT!r}, got {found!r}")
            spec = TokenSpec.from_dict(meta["spec"])
            codes, lengths = tensors.pop("codes"), tensors.pop("lengths")
            if str(codes.dtype).removeprefix("torch.") not in ("uint8", "uint16", "uint32", "uint64"):
                raise TokensError(f"codes: expected unsigned integers, got {codes.dtype}")
            if foreign := [k for k in tensors if not k.startswith("side.")]:
                raise TokensError(f"unknown tensors {foreign}")
            side = {k.removeprefix("side."): v for k, v in tensors.items()}
            tokens = cls(codes.to(torch.int64), lengths, spec, side)
            check_range(tokens.codes, spec.codebook_sizes, tokens.mask)
        except (KeyError, TypeError, ValueError) as e:
            reason = str(e) if isinstance(e, TokensError) else repr(e)
            raise TokensError(f"{path}: damaged token file ({reason}); encode the input again") from e
        return tokens


def _of_one_width(entries: list[Tensor]) -> list[Tensor]:
    """Tensors (B, ...) padded with 0 to their largest size on every axis but the first."""
    if len({tuple(e.shape[1:]) for e in entries}) == 1 or len({e.ndim for e in entries}) > 1:
        return entries
    widest = [max(e.shape[axis] for e in entries) for axis in range(1, entries[0].ndim)]
    pads = [[n for axis in reversed(range(1, e.ndim)) for n in (0, widest[axis - 1] - e.shape[axis])] for e in entries]
    return [torch.nn.functional.pad(e, pad) for e, pad in zip(entries, pads, strict=True)]


def check_range(codes: Tensor, codebook_sizes: Sequence[int], mask: Tensor) -> None:
    """Raise TokensError naming the first code (B, Q, T) outside its level's 0..K-1; ``mask`` is (B, T)."""
    sizes = torch.as_tensor(codebook_sizes, device=codes.device)[None, :, None]
    bad = ((codes < 0) | (codes >= sizes)) & mask[:, None]
    if bool(bad.any()):
        b, q, t = (int(v) for v in bad.nonzero()[0])
        raise TokensError(
            f"code out of range at item {b}, level {q}, position {t}: expected 0..{codebook_sizes[q] - 1}, "
            f"got {int(codes[b, q, t])} ({int(bad.sum())} such codes)"
        )


def side_value(tokens: Tokens, key: str, default: int, legal: range | tuple[int, ...]) -> int:
    """Side entry ``key`` of the only item, checked: a language model may have written anything there."""
    if key not in tokens.side:
        return default
    entry = tokens.side[key]
    value = entry.item() if entry.shape == (1,) else None
    if not isinstance(value, int) or value not in legal:
        words = f"{legal[0]}..{legal[-1]}" if isinstance(legal, range) else f"one of {legal}"
        found = f"shape {tuple(entry.shape)}" if value is None else value
        raise TokensError(f"side[{key!r}]: expected an integer in {words} for each item, got {found}")
    return value


def smallest_uint(largest: int) -> type[np.unsignedinteger]:
    """The narrowest unsigned numpy integer that holds ``largest``."""
    for dtype in (np.uint8, np.uint16, np.uint32):
        if largest <= np.iinfo(dtype).max:
            return dtype
    return np.uint64


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write ``data`` beside ``path`` and rename, so that a kill or a full disk never leaves half a file."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    fd, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
