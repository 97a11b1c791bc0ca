"""An output shard: one safetensors file with the codes of many items, and the done-marker beside it.

The file is readable without mmtok: its only metadata entry ``mmtok`` is JSON that says what is in it and how to read
it. Items come one after another, and inside an item level after level, (Q, T): that is the layout of `Tokens`, levels
of one item may have different numbers of codes (a strided level's repeats are not stored), and the first levels of an
item are one piece. No offsets are stored: they are running sums of the lengths, which take a byte or two, not eight.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtok.corpus.filling import Filling, how_to_read, stream_names, streams_note
from mmtok.corpus.packing import (
    PLAIN,
    Group,
    choose_packing,
    groups_of,
    item_levels,
    nominal_bits,
    stream_bytes,
    unpack_bits,
)
from mmtok.corpus.records import SCHEMA, SHARDS, Done, Failure, Row
from mmtok.corpus.shard_columns import BytesColumn, SideColumn, json_bytes, running
from mmtok.tokens import Tokens, TokensError, TokenSpec, write_atomic

FORMAT = "mmtok-corpus-shard"
ENTRY = "mmtok"  # the metadata's only entry: safetensors shuffles several
READ_ITEMS = 1024  # items unpacked at once where a whole shard is read
PIECE = 2**20  # bytes hashed and written at once
READ_AGAIN = "delete it and its .done.json, then run `mmtok corpus tokenize` again: only this shard is made anew"


@dataclasses.dataclass(frozen=True)
class About:
    """What a shard's file and done-marker say beside its rows.

    Args:
        shard: its number.
        failures: the input's samples that are no rows.
        padding: share of padding in what the model saw.
        packing: ``auto``, ``ints`` or ``bits``; one for a whole corpus.
        plan: fingerprint of the corpus' plan.
    """

    shard: int
    failures: Sequence[Failure] = ()
    padding: float = 0.0
    packing: str = "auto"
    plan: str = ""


def shard_path(out: str | Path, number: int) -> Path:
    """The shard file ``number`` of the corpus in folder ``out``."""
    return Path(out) / SHARDS / f"{number:05d}.safetensors"


def done_path(out: str | Path, number: int) -> Path:
    """The done-marker of the shard ``number``."""
    return Path(out) / SHARDS / f"{number:05d}.done.json"


def write_shard(path: str | Path, rows: Iterable[Row], spec: TokenSpec, about: About) -> Done:
    """Write the rows, one after another as they come, aside and rename; the same rows give the same bytes.

    Returns:
        What `write_done` writes beside it, with the checksum that was taken while writing.

    Raises:
        ValueError: rows of another spec, codes out of range, values that JSON or safetensors do not have.
        OSError: a full disk, say; nothing is left behind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save

    packing = choose_packing(spec, about.packing)
    filling = Filling(spec, groups_of(spec, packing))
    for row in rows:
        filling.add(row)
    tensors, side = filling.tensors()
    lengths = np.array(filling.lengths, np.int64)
    counts = {
        "items": len(lengths),
        "positions": int(lengths.sum()),
        "codes": sum(int(g.counts(lengths).sum()) for g in filling.groups),
    }
    note = {
        "format": FORMAT,
        "schema": SCHEMA,
        "tokenizer": spec.name,
        "spec": spec.to_dict(),
        "shard": about.shard,
        "plan": about.plan,
        **counts,
        "bits": nominal_bits(spec, lengths),
        "packing": packing,
        "streams": streams_note(filling.groups),
        "side": side,
        "read": how_to_read(filling.groups),
    }
    try:
        data = save(tensors, metadata={ENTRY: json.dumps(note)})
    except (SafetensorError, KeyError, ValueError) as e:
        types = {k: str(v.dtype) for k, v in tensors.items() if k.startswith("side.")}
        raise ValueError(f"side entries: expected types that safetensors has, got {types} ({e})") from e
    sha256 = _write_aside(Path(path), data)
    return Done(
        shard=about.shard,
        sha256=sha256,
        bytes=len(data),
        items=counts["items"],
        failures=tuple(about.failures),
        codes=counts["codes"],
        positions=counts["positions"],
        padding=about.padding,
        first_key=filling.keys[0].decode("utf-8", "surrogatepass") if filling.keys else None,
    )


def write_done(done: Done, out: str | Path) -> None:
    """Write the marker of a shard that is in place, aside and renamed."""
    path = done_path(out, done.shard)
    write_atomic(path, json_bytes(dataclasses.asdict(done)) + b"\n")
    fsync_folder(path.parent)


def read_done(out: str | Path, number: int) -> Done | None:
    """The marker of a shard, None where there is none. ValueError for a damaged one."""
    path = done_path(out, number)
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise ValueError(f"{path} is damaged ({e}); delete it and run `mmtok corpus tokenize` again") from e
    try:
        done = Done(**{**found, "failures": tuple(Failure(**f) for f in found["failures"])})
    except (TypeError, KeyError) as e:
        raise ValueError(f"{path}: expected a done-marker of this mmtok, got {e}; delete it and run again") from e
    if done.shard != number:
        raise ValueError(
            f"{path}: expected the marker of shard {number}, got that of {done.shard}; delete it, run again"
        )
    return done


class ShardFile:
    """The rows of a shard, memory-mapped: opening reads the header and the lengths, an item what is its own.

    Args:
        path: of the file.
        verify: also compare the file with the checksum of its done-marker and look at everything in it.
        spec: that it must have, None = any.

    Raises:
        FileNotFoundError: no such file. TokensError: it is of another spec. ValueError: damaged, or of another schema.
    """

    def __init__(self, path: str | Path, verify: bool = False, spec: TokenSpec | None = None):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no shard at {path}; run `mmtok corpus tokenize` again to have it made")
        try:
            # Torch maps the file: a tensor is a view of it, and what nobody looks at is never read.
            with safe_open(str(path), framework="pt") as f:
                note = (f.metadata() or {}).get(ENTRY, "null")
                self._tensors: dict[str, Tensor] = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{path} is no whole safetensors file ({e}); {READ_AGAIN}") from e
        self.about = self._read_note(note)
        if spec is not None and spec != self.spec:
            raise TokensError(
                f"{path}: expected codes of {_short(spec)}, got {_short(self.spec)}; a corpus has one tokenizer and "
                "one rate, so make another one in another folder"
            )
        try:
            self._open()
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise ValueError(f"{path}: damaged shard ({e}); {READ_AGAIN}") from e
        if verify and (problems := self.problems()):
            raise ValueError(f"{path}: {'; '.join(problems)}; {READ_AGAIN}")

    def _read_note(self, note: str) -> dict[str, Any]:
        try:
            about = json.loads(note)
        except ValueError as e:
            raise ValueError(f"{self.path}: damaged metadata ({e}); {READ_AGAIN}") from e
        found = about.get("format") if isinstance(about, dict) else None
        if found != FORMAT:
            raise ValueError(
                f"{self.path}: expected a shard of the format {FORMAT!r}, got {found!r}; name a corpus shard"
            )
        if about.get("schema") != SCHEMA:
            raise ValueError(
                f"{self.path}: expected schema {SCHEMA}, got {about.get('schema')!r}; read it with the mmtok that "
                "wrote it, or tokenize the source again"
            )
        try:
            self.spec = TokenSpec.from_dict(about["spec"])
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{self.path}: damaged metadata ({e}); {READ_AGAIN}") from e
        return about

    def _open(self) -> None:
        self.lengths: np.ndarray = self._tensors["lengths"].numpy().astype(np.int64)  # (N,) positions of each item
        self._count = len(self.lengths)
        self.groups = groups_of(self.spec, self.about["packing"])
        if len(self.lengths) != self.about["items"]:
            raise ValueError(f"expected {self.about['items']} lengths, got {len(self.lengths)}")
        self._streams: list[tuple[Group, np.ndarray, np.ndarray]] = []
        for name, group in zip(stream_names(self.groups), self.groups, strict=True):
            starts = running(group.counts(self.lengths))
            stream = self._tensors[name].numpy()
            plain = PLAIN.get(group.width)
            size, dtype = (starts[-1], plain) if plain else (stream_bytes(int(starts[-1]), group.width), np.uint8)
            if stream.shape != (size,) or stream.dtype != dtype:
                raise ValueError(f"{name}: expected {size} of {np.dtype(dtype)}, got {stream.shape} of {stream.dtype}")
            self._streams.append((group, stream, starts))
        # One stream that holds every level at every position, as most specs have: an item is a plain reshape of it.
        self._plain = len(self.groups) == 1 and set(self.spec.level_strides) == {1}
        present = [name for name in ("key", "text", "extra") if f"{name}.bytes" in self._tensors]
        self._bytes = {name: BytesColumn(self._tensors, name, len(self)) for name in present}
        if "key" not in present:
            raise ValueError("it has no keys")
        self._given = self._tensors["text.given"].numpy() if "text.given" in self._tensors else None  # (N,) bool
        notes: Mapping[str, Any] = self.about["side"]
        self._side = {name: SideColumn(self._tensors, name, note, len(self)) for name, note in notes.items()}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Row:
        i = self._checked(i)
        side = {name: value for name, column in self._side.items() if (value := column[i]) is not None}
        tokens = Tokens(self.codes(i)[None], torch.from_numpy(self.lengths[i : i + 1].copy()), self.spec, side)
        return Row(self.key(i), tokens, self.text(i), self.extra(i))

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def codes(self, i: int) -> Tensor:
        """Codes (Q, T) int64 of item ``i``: the fast path where nothing else is wanted."""
        i = self._checked(i)
        return self._cut([self._unpack(s, i, i + 1) for s in range(len(self._streams))], [0] * len(self._streams), i)

    def block(self, start: int, stop: int) -> list[Tensor]:
        """Codes (Q, T) int64 of the items ``start`` .. ``stop - 1``, unpacked in one go: to read through a shard."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"items {start}..{stop} of a shard of {len(self)}")
        flat = [self._unpack(s, start, stop) for s in range(len(self._streams))]
        offsets = [(starts[start:stop] - starts[start]).tolist() for _, _, starts in self._streams]
        return [self._cut(flat, at, i) for i, at in zip(range(start, stop), zip(*offsets, strict=True), strict=True)]

    def _unpack(self, s: int, start: int, stop: int) -> np.ndarray:
        """The codes of stream ``s`` that the items from ``start`` to before ``stop`` have, int64."""
        group, stream, starts = self._streams[s]
        a, b = int(starts[start]), int(starts[stop])
        if group.width in PLAIN:
            return stream[a:b].astype(np.int64)
        return unpack_bits(stream, group.width, a, b - a).view(np.int64)

    def _cut(self, flat: Sequence[np.ndarray], at: Sequence[int], i: int) -> Tensor:
        """Codes (Q, T) of item ``i``, which begin at ``at`` in ``flat`` of each stream."""
        T, Q = int(self.lengths[i]), self.spec.num_codebooks
        if self._plain:
            return torch.from_numpy(flat[0][at[0] : at[0] + Q * T].reshape(Q, T))
        out = np.empty((Q, T), np.int64)
        for codes, begin, group in zip(flat, at, self.groups, strict=True):
            for q, level in zip(group.levels, item_levels(codes[begin:], T, group.strides), strict=True):
                out[q] = level
        return torch.from_numpy(out)

    def key(self, i: int) -> str:
        return self._bytes["key"][self._checked(i)].decode("utf-8", "surrogatepass")

    def text(self, i: int) -> str | None:
        """Caption or transcript of item ``i``, None where it has none."""
        i = self._checked(i)
        if "text" not in self._bytes or (self._given is not None and not self._given[i]):
            return None
        return self._bytes["text"][i].decode("utf-8", "surrogatepass")

    def extra(self, i: int) -> dict[str, Any]:
        """Whatever else the source said of item ``i``."""
        i = self._checked(i)
        data = self._bytes["extra"][i] if "extra" in self._bytes else b""
        return json.loads(data) if data else {}

    @property
    def keys(self) -> list[str]:
        return [self.key(i) for i in range(len(self))]

    @property
    def texts(self) -> list[str | None]:
        return [self.text(i) for i in range(len(self))]

    def side(self, name: str) -> Tensor | None:
        """Side entry ``name`` of all items, (N, ...) on the CPU; None where an item lacks it or has another shape."""
        return self._side[name].all() if name in self._side else None

    def _checked(self, i: int) -> int:
        if not -self._count <= i < self._count:
            raise IndexError(f"item {i} of a shard of {self._count}")
        return i if i >= 0 else i + self._count

    @property
    def num_texts(self) -> int:
        """How many items have a text."""
        return 0 if "text" not in self._bytes else len(self) if self._given is None else int(self._given.sum())

    def problems(self, checksum: bool = True) -> list[str]:
        """What is wrong with the file, in words; reads all of it, once more for the marker's ``checksum``."""
        found = []
        if checksum and self.path.name == shard_path("", self.about["shard"]).name:
            done = read_done(self.path.parent.parent, self.about["shard"])
            if done is not None and done.sha256 != (real := sha256_of(self.path)):
                found.append(f"its checksum is {real[:12]}, its done-marker says {done.sha256[:12]}")
        for start in range(0, len(self), READ_ITEMS):
            if bad := self._out_of_range(start, min(start + READ_ITEMS, len(self))):
                found.append(bad)
                break
        for i in range(len(self)):
            try:
                _ = self.key(i), self.text(i), self.extra(i)
            except ValueError as e:
                found.append(f"item {i}: its key, text or extra cannot be read ({e})")
                break
        return found

    def _out_of_range(self, start: int, stop: int) -> str:
        """Words for the first code outside its codebook, empty where there is none."""
        sizes = self.spec.codebook_sizes
        largest = [self._unpack(s, start, stop).view(np.uint64).max(initial=0) for s in range(len(self._streams))]
        if all(int(m) < min(sizes[q] for q in g.levels) for m, g in zip(largest, self.groups, strict=True)):
            return ""
        for i, codes in zip(range(start, stop), self.block(start, stop), strict=True):
            top = codes.numpy().view(np.uint64).max(1, initial=0).tolist()
            if bad := [q for q, k in enumerate(sizes) if top[q] >= k]:
                return f"item {i} ({self.key(i)!r}) has the code {top[bad[0]]} on level {bad[0]}, of {sizes[bad[0]]}"
        return ""


def _short(spec: TokenSpec) -> str:
    return f"{spec.name!r} (fingerprint {spec.fingerprint or 'none'}, codebooks {spec.codebook_sizes})"


def sha256_of(path: Path) -> str:
    """Checksum of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def fsync_folder(folder: Path) -> None:
    """See onto the disk that a file of this name is in the folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_aside(path: Path, data: bytes) -> str:
    """Write beside ``path`` and rename, both seen onto the disk; the checksum, taken on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            for at in range(0, len(data), PIECE):
                piece = memoryview(data)[at : at + PIECE]
                digest.update(piece)
                f.write(piece)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)
    return digest.hexdigest()
