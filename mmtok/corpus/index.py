"""The index of a finished corpus, and random access to its items by number and by key.

`write_index` is a function of the done-markers and the shards alone: whoever runs it, whenever, the bytes are the same.
``index.json`` is for people and for the totals, ``index.safetensors`` for machines:

* ``shard``, ``row`` (N,): where item i is, in the order of the shards, without keys that came before.
* ``hash`` (N,) uint64, ascending: the first 8 bytes (little-endian) of BLAKE2b-64 of each key; ``item`` (N,): whose.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from mmtok.corpus.open_shards import OpenShards
from mmtok.corpus.packing import nominal_bits
from mmtok.corpus.records import FAILURES, INDEX, PLAN, SCHEMA, SHARDS, Done, Failure, Row
from mmtok.corpus.shard_columns import json_bytes, narrow, running, utf8
from mmtok.corpus.shard_file import ShardFile, fsync_folder, read_done, shard_path
from mmtok.tokens import Tokens, TokenSpec, write_atomic

FORMAT = "mmtok-corpus"
TABLE = "index.safetensors"
RUN_AGAIN = "run `mmtok corpus tokenize` again with the same arguments: it makes what is missing"


@dataclasses.dataclass(frozen=True)
class Index:
    """What stands in the three files that `write_index` writes.

    Args:
        about: index.json.
        table: index.safetensors, by name.
        failures: failures.jsonl, those of duplicate keys included.
    """

    about: dict[str, Any]
    table: dict[str, np.ndarray]
    failures: list[Failure]

    def files(self) -> dict[str, bytes]:
        """Name -> bytes of each file, index.json last: once it is there, everything is."""
        from safetensors.numpy import save

        table = save(self.table)
        about = {**self.about, "table": {"name": TABLE, "sha256": hashlib.sha256(table).hexdigest()}}
        lines = b"".join(
            json_bytes({"shard": f.shard, "key": f.key, "reason": f.reason}) + b"\n" for f in self.failures
        )
        return {FAILURES: lines, TABLE: table, INDEX: json.dumps(about, indent=1).encode() + b"\n"}


def write_index(out: str | Path) -> None:
    """Write ``failures.jsonl``, ``index.safetensors`` and ``index.json`` of a corpus whose shards are all done.

    A key that occurs twice stays where it came first; its other items are left out of the index and told as failures.

    Raises:
        ValueError: shards are missing, damaged, or of several tokenizers.
    """
    files = build_index(out).files()
    for name, data in files.items():
        write_atomic(Path(out) / name, data)
    fsync_folder(Path(out))


def build_index(out: str | Path, partial: bool = False) -> Index:
    """The index in memory, of which it takes some 50 bytes an item while it is made; about a microsecond an item.

    ``partial``: of the shards that are done so far.

    Raises:
        ValueError: as `write_index`.
    """
    done = done_shards(out)
    if not partial and (missing := missing_shards(out, done)):
        raise ValueError(f"{out} is unfinished: {words_of(missing)}; {RUN_AGAIN}")
    shards = OpenShards(out, {m.shard: m.bytes for m in done})
    hashes: list[np.ndarray] = [np.zeros(0, np.uint64)]
    for marker in done:
        shard = shards[marker.shard]
        if len(shard) != marker.items:
            raise ValueError(
                f"{shard.path}: expected {marker.items} items as its done-marker says, got {len(shard)}; delete both, "
                f"then {RUN_AGAIN}"
            )
        hashes.append(np.fromiter((key_hash(k) for k in shard.keys), np.uint64, len(shard)))
    sizes = np.array([m.items for m in done], np.int64)
    numbers = np.repeat(np.array([m.shard for m in done], np.int32), sizes)
    rows = np.arange(len(numbers)) - np.repeat(running(sizes)[:-1], sizes)
    unsorted = np.concatenate(hashes)
    order = np.argsort(unsorted, kind="stable")  # of equal hashes the first item comes first
    kept, twice = _first_of_each_key(unsorted[order], order, lambda i: shards[int(numbers[i])].key(int(rows[i])))
    failures = {m.shard: list(m.failures) for m in done}
    for item, first in twice:
        number, reason = int(numbers[item]), f"duplicate key, also in shard {int(numbers[first])}"
        failures[number].append(Failure(shards[number].key(int(rows[item])), reason, number))
    order = order[kept[order]]
    table = {
        "shard": narrow(numbers[kept]),
        "row": narrow(rows[kept]),
        "hash": unsorted[order],
        "item": narrow((np.cumsum(kept) - 1)[order]),  # its place among those that are kept
    }
    every = [failure for number in failures for failure in failures[number]]
    return Index(_about(done, shards, np.split(kept, np.cumsum(sizes)[:-1]), len(every)), table, every)


def _first_of_each_key(
    hashes: np.ndarray, items: np.ndarray, key: Callable[[int], str]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Which items (N,) bool are the first of their key, and (item, the first of its key) of all others.

    ``hashes`` (N,) ascending are those of ``items``; keys are compared only where hashes are equal.
    """
    kept = np.ones(len(items), bool)
    twice: list[tuple[int, int]] = []
    same = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
    first: dict[str, int] = {}
    last = -1
    for at in same.tolist():
        if at - 1 != last:  # another hash
            first = {key(int(items[at - 1])): int(items[at - 1])}
        last = at
        item = int(items[at])
        if (original := first.setdefault(key(item), item)) != item:
            kept[item] = False
            twice.append((item, original))
    return kept, sorted(twice)


def _about(done: Sequence[Done], shards: OpenShards, kept: Sequence[np.ndarray], failures: int) -> dict[str, Any]:
    """index.json but for the table; totals are those of the items in the index, ``kept`` of each shard."""
    totals: collections.Counter[str] = collections.Counter(items=0, positions=0, codes=0)
    amount = _Amount()
    bits: list[float] = []
    packing: str | None = None
    for marker, mask in zip(done, kept, strict=False):
        shard = shards[marker.shard]
        if packing not in (None, shard.about["packing"]):
            raise ValueError(f"{shard.path}: expected the packing {packing!r} of the shards before; {RUN_AGAIN}")
        packing = shard.about["packing"]
        lengths = shard.lengths[mask]
        totals["items"] += len(lengths)
        totals["positions"] += int(lengths.sum())
        totals["codes"] += sum(int(g.counts(lengths).sum()) for g in shard.groups)
        bits.append(nominal_bits(shard.spec, lengths))
        amount.add(shard, mask)
    spec = shards.spec
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "tokenizer": spec.name if spec else None,
        "fingerprint": spec.fingerprint if spec else None,
        "spec": spec.to_dict() if spec else None,
        "packing": packing,
        "totals": {
            **totals,
            "bits": math.fsum(bits),
            "bytes": sum(m.bytes for m in done),
            "failures": failures,
            **amount.total(),
        },
        "shards": [
            {
                "number": m.shard,
                "name": f"{SHARDS}/{shard_path('', m.shard).name}",
                "items": m.items,
                "bytes": m.bytes,
                "sha256": m.sha256,
            }
            for m in done
        ],
    }


class _Amount:
    """Seconds of sound or pixels of a corpus, where the side values tell them; integers until the end: exact."""

    def __init__(self) -> None:
        self.samples: collections.Counter[int] = collections.Counter()  # by sample rate
        self.pixels = 0
        self.sound = self.picture = True  # as long as every shard tells

    def add(self, shard: ShardFile, mask: np.ndarray) -> None:
        if not mask.any():
            return
        count, rate = _integers(shard, "num_samples", mask), _integers(shard, "sample_rate", mask)
        height, width = _integers(shard, "height", mask), _integers(shard, "width", mask)
        if count is None or rate is None or rate.min() < 1:
            self.sound = False
        else:
            for hz in np.unique(rate).tolist():
                self.samples[hz] += int(count[rate == hz].sum())
        if height is None or width is None:
            self.picture = False
        else:
            self.pixels += int((height * width).sum())

    def total(self) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.sound and self.samples:
            found["seconds"] = math.fsum(n / hz for hz, n in sorted(self.samples.items()))
        if self.picture and self.pixels:
            found["pixels"] = self.pixels
        return found


def _integers(shard: ShardFile, name: str, mask: np.ndarray) -> np.ndarray | None:
    """Side entry ``name`` of the masked items, (N,) int64; None where it is not one integer an item."""
    value = shard.side(name)
    if value is None or value.ndim != 1 or value.is_floating_point() or value.is_complex():
        return None
    return value.to(torch.int64).numpy()[mask]


def key_hash(key: str) -> int:
    """The first 64 bits of a key's checksum, by which it is found."""
    return int.from_bytes(hashlib.blake2b(utf8(key), digest_size=8).digest(), "little")


def planned_items(out: str | Path) -> list[int | None]:
    """How many samples each planned shard has, by its number; None where only reading tells.

    Read from plan.json alone: the list of files that `plan.load_plan` wants beside it may have been left behind.
    """
    path = Path(out) / PLAN
    try:
        return [items for _, items, _ in json.loads(path.read_bytes())["shards"]]
    except FileNotFoundError:
        raise FileNotFoundError(f"no corpus at {out} ({PLAN} is missing); `mmtok corpus tokenize` makes one") from None
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e!r}); restore it, or tokenize into a new folder") from e


def done_shards(out: str | Path) -> list[Done]:
    """The markers of all planned shards that are done, in order."""
    markers = (read_done(out, number) for number in range(len(planned_items(out))))
    return [m for m in markers if m is not None]


def missing_shards(out: str | Path, done: Sequence[Done]) -> list[int]:
    """Numbers of planned shards that are not ``done``."""
    return sorted(set(range(len(planned_items(out)))) - {m.shard for m in done})


def words_of(missing: Sequence[int]) -> str:
    """E.g. ``2 shards are missing (00004, 00007)``, with the first three numbers."""
    names = ", ".join(f"{n:05d}" for n in missing[:3]) + (", ..." if len(missing) > 3 else "")
    return f"{len(missing)} shard{'s are' if len(missing) > 1 else ' is'} missing ({names})"


class Corpus:
    """Any item of a finished corpus, by its number or its key; a map-style dataset for torch.

    ``corpus[7]``, ``corpus[-1]`` and ``corpus["a/b"]`` are a `Row`, ``corpus[10:20]`` is a list of them. Pickles
    without its open files, as the workers of a DataLoader need it (whose ``collate_fn`` must take rows).

    Args:
        out: the corpus folder.
        partial: take what is done of an unfinished corpus, as it is now.
        keep_open: shard files that are open at a time.

    Raises:
        FileNotFoundError: no corpus there. ValueError: it is unfinished, damaged or of another schema.
    """

    def __init__(self, out: str | Path, partial: bool = False, keep_open: int = 16):
        self.out, self.partial = Path(out), partial
        found = read_index(out)
        self._read = found is not None  # from the disk, so that a copy can read it again
        if found is not None:
            self.about, self._table = found
        elif partial:
            index = build_index(out, partial=True)
            self.about, self._table = json.loads(json.dumps(index.about)), index.table
        else:
            missing = missing_shards(out, done_shards(out))
            what = words_of(missing) if missing else "its index is missing"
            raise ValueError(f"{out} is unfinished: {what}; {RUN_AGAIN} (partial=True takes what is done)")
        self.spec = TokenSpec.from_dict(self.about["spec"]) if self.about["spec"] else None
        sizes = {s["number"]: s["bytes"] for s in self.about["shards"]}
        self._shards = OpenShards(out, sizes, self.spec, keep_open)

    def __getstate__(self) -> dict[str, Any]:
        shards = OpenShards(self.out, self._shards.sizes, self.spec, self._shards.keep_open)
        return self.__dict__ | {"_shards": shards} | ({"_table": None} if self._read else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._read:
            found = read_index(self.out)
            if found is None or found[0] != self.about:
                raise ValueError(f"{self.out}: the corpus was changed after it was opened; open it again")
            self._table = found[1]

    def __len__(self) -> int:
        return len(self._table["shard"])

    @overload
    def __getitem__(self, i: int | str) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i: int | str | slice) -> Row | list[Row]:
        if isinstance(i, slice):
            return [self[n] for n in range(*i.indices(len(self)))]
        number, row = self.locate(self.find(i) if isinstance(i, str) else i)
        return self._shards[number][row]

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._search(key) is not None

    def locate(self, i: int) -> tuple[int, int]:
        """Shard and row of item ``i``."""
        i = operator.index(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"item {i} of a corpus of {len(self)}")
        return int(self._table["shard"][i]), int(self._table["row"][i])

    def find(self, key: str) -> int:
        """The number of the item of this key. KeyError where there is none."""
        if (i := self._search(key)) is None:
            raise KeyError(f"{key!r} is no key of {self.out}; {FAILURES} there tells what could not be tokenized")
        return i

    def _search(self, key: str) -> int | None:
        wanted = np.uint64(key_hash(key))
        at = int(np.searchsorted(self._table["hash"], wanted))
        while at < len(self) and self._table["hash"][at] == wanted:  # several keys may share a hash
            i = int(self._table["item"][at])
            if self.key(i) == key:
                return i
            at += 1
        return None

    def key(self, i: int) -> str:
        number, row = self.locate(i)
        return self._shards[number].key(row)

    def tokens(self, i: int) -> Tokens:
        """Codes of item ``i`` with its side values, as decode takes them."""
        return self[i].tokens

    def codes(self, i: int) -> Tensor:
        """Codes (Q, T) int64 of item ``i`` and nothing else."""
        number, row = self.locate(i)
        return self._shards[number].codes(row)

    def shard(self, number: int) -> ShardFile:
        """The shard of this number, one of ``about["shards"]``; keys that came before are still in it."""
        return self._shards[number]


def read_index(out: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """index.json and the table, memory-mapped; None where there is no index.json.

    Raises:
        ValueError: damaged, of another schema, or the two do not belong together.
    """
    from safetensors import SafetensorError, safe_open

    path, again = Path(out) / INDEX, f"delete it and {RUN_AGAIN}"
    try:
        about = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise ValueError(f"{path} is damaged ({e}); {again}") from e
    if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("schema") != SCHEMA:
        found = [about.get("format"), about.get("schema")] if isinstance(about, dict) else about
        raise ValueError(
            f"{path}: expected format {FORMAT!r} and schema {SCHEMA}, got {found}; use the mmtok that wrote it"
        )
    try:
        with safe_open(str(Path(out) / TABLE), framework="pt") as f:
            table = {k: f.get_tensor(k).numpy() for k in ("shard", "row", "hash", "item")}
        items = about["totals"]["items"]
        if {len(v) for v in table.values()} != {items}:
            raise ValueError(f"expected {items} items, got {[len(v) for v in table.values()]}")
    except (SafetensorError, OSError, ValueError, KeyError) as e:
        raise ValueError(f"{Path(out) / TABLE} is damaged ({e}); {again}") from e
    return about, table
