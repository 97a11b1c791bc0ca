"""A folder as a source: files by their endings with texts beside them, or the rows of an index (images.jsonl ...)."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtok.corpus.beside import media_of, split_text, text_and_extra
from mmtok.corpus.listing import MISSING, Line, Listing, ListingWriter, readable_name, unique_keys, walk
from mmtok.corpus.records import Failure, InputShard, Plan, PlanSettings, Sample
from mmtok.data.sources import MANIFESTS

SIDECARS = ("txt", "json")
NO_INDEX = "none"


class FileShards:
    """Files, one after another, cut into shards: a shard is a range of lines of the list, however many files."""

    def __init__(self, items_per_shard: int) -> None:
        self.items_per_shard = items_per_shard
        self.writer = ListingWriter()
        self.shards: list[InputShard] = []
        self.examples: list[str] = []
        self.texts: collections.Counter[str] = collections.Counter()
        self.items = 0
        self._begin(0)

    def _begin(self, start: int) -> None:
        self.start, self.count, self.bytes, self.crc32, self.last = start, 0, 0, 0, ""

    def add(self, path: str, size: int, key: str, beside: Any) -> None:
        """One file; ``key`` is ``path`` where the ending stays. Rows of one path stay in one shard."""
        if self.count >= self.items_per_shard and path != self.last:
            self._cut()
        line = self.writer.add(path, size, key == path, beside)
        self.count, self.bytes, self.last = self.count + 1, self.bytes + max(0, size), path
        self.crc32 = zlib.crc32(line, self.crc32)
        self.items += 1
        if len(self.examples) < 3:
            self.examples.append(readable_name(key))

    def _cut(self) -> None:
        part = {"lines": [self.start, self.writer.position], "crc32": self.crc32}
        self.shards.append(InputShard(len(self.shards), [part], self.count, self.bytes))
        self._begin(self.writer.position)

    def finish(self) -> tuple[Listing, list[InputShard]]:
        """The list and the shards of it."""
        if self.count:
            self._cut()
        return self.writer.finish(), self.shards


@dataclasses.dataclass
class Survey:
    """All that a walk through a folder found."""

    media: Mapping[str, FileShards]
    tars: list[tuple[str, int]]
    tables: list[tuple[str, int]]
    left_out: collections.Counter[str]


TAR_ENDINGS, TABLE_ENDINGS = (".tar", ".tar.gz", ".tgz"), (".parquet", ".pq")


def survey(root: Path, settings: PlanSettings) -> Survey:
    """Walk through a folder once and sort what is there, without opening a file."""
    found = Survey({m: FileShards(settings.items_per_shard) for m in MANIFESTS}, [], [], collections.Counter())
    for folder in walk(root):
        if folder.hidden:
            found.left_out["names that begin with a dot"] += folder.hidden
        sizes: dict[str, int] = dict(folder.files)
        chosen: dict[str, list[str]] = {m: [] for m in found.media}
        others = []
        for name, size in folder.files:
            path, low = folder.path + name, name.lower()
            modality = media_of(name)
            if settings.pattern and not fnmatch.fnmatchcase(path, settings.pattern):
                if modality or low.endswith((*TAR_ENDINGS, *TABLE_ENDINGS)):
                    found.left_out[f"files that do not fit {settings.pattern}"] += 1
            elif low.endswith(TAR_ENDINGS):
                found.tars.append((path, size))
            elif low.endswith(TABLE_ENDINGS):
                found.tables.append((path, size))
            elif modality is None:
                others.append(name)
            elif settings.extension and not low.endswith("." + settings.extension.lower().lstrip(".")):
                found.left_out[os.path.splitext(low)[1]] += 1
            else:
                chosen[modality].append(name)
        used = set()
        for modality, names in chosen.items():
            shards = found.media[modality]
            for name, key in zip(names, unique_keys(names), strict=True):
                stem = os.path.splitext(name)[0]
                beside = {s: sizes[f"{stem}.{s}"] for s in SIDECARS if f"{stem}.{s}" in sizes}
                used.update(f"{stem}.{s}" for s in beside)
                shards.texts.update(f".{s}" for s in beside)
                shards.add(folder.path + name, sizes[name], folder.path + key, beside or None)
        found.left_out.update(os.path.splitext(name)[1].lower() or name for name in others if name not in used)
    return found


def index_of(root: Path, settings: PlanSettings) -> str | None:
    """The name of the index that a folder is to be read by, None to go by endings.

    Raises ValueError where a named one is not there, or two are and no modality was chosen.
    """
    if settings.index == NO_INDEX:
        return None
    if settings.index is not None:
        if not (root / settings.index).is_file():
            raise ValueError(f"index: no file {settings.index!r} in {root}; give a name there, or {NO_INDEX!r}")
        return settings.index
    there = [name for m, name in MANIFESTS.items() if settings.modality in (None, m) and (root / name).is_file()]
    if len(there) > 1:
        raise ValueError(f"{root} has pictures and sounds ({' and '.join(there)}): choose the modality, image or audio")
    return there[0] if there else None


def from_index(root: Path, index: str, settings: PlanSettings) -> tuple[FileShards, str, dict[str, int]]:
    """The rows of an index as shards, sorted by path, their modality, and what was left out.

    The index itself is the first line of the list, with its hash, so that a changed text is noticed.
    Raises ValueError for a row that is no JSON object with a path below the folder, and where both modalities occur.
    """
    data = (root / index).read_bytes()
    rows: list[tuple[tuple[str, ...], str, int, bool]] = []  # (parents, name, byte at which it begins, has a text)
    kinds: collections.Counter[str] = collections.Counter()
    left_out: collections.Counter[str] = collections.Counter()
    start = 0
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            path, text = _path_and_text(line, settings.text_column, f"{root / index}, line {number}")
            if not _fits(path, settings):
                left_out["rows that do not fit pattern or extension"] += 1
            else:
                *parents, name = path.split("/")
                kinds[media_of(name) or "other"] += 1
                rows.append((tuple(parents), name, start, text is not None))
        start += len(line) + 1
    modality = settings.modality or next((m for m, name in MANIFESTS.items() if name == index), None)
    if modality is None:
        if kinds["image"] and kinds["audio"]:
            raise ValueError(f"{root / index} names pictures and sounds: choose the modality, image or audio")
        modality = "image" if kinds["image"] else "audio" if kinds["audio"] else None
    if modality is None or not rows:
        raise ValueError(f"{root / index}: expected rows that name pictures or sounds, got none that fits")
    other = {"image": "audio", "audio": "image"}[modality]
    shards = FileShards(settings.items_per_shard)
    shards.writer.add(index, len(data), beside=hashlib.sha256(data).hexdigest())
    shards.start = shards.writer.position
    rows.sort()
    for parents, some in itertools.groupby(rows, key=lambda row: row[0]):
        here = [(name, at, text) for _, name, at, text in some]
        if any(media_of(name) == other for name, *_ in here):
            left_out[f"{other} files"] += sum(media_of(name) == other for name, *_ in here)
            here = [row for row in here if media_of(row[0]) != other]
        names = list(dict.fromkeys(name for name, *_ in here))
        keys = dict(zip(names, unique_keys(names), strict=True))
        folder = "".join(f"{p}/" for p in parents)
        for name, at, text in here:
            shards.texts[index] += text
            try:
                size = os.path.getsize(root / folder / name)
            except OSError:
                size = MISSING
            shards.add(folder + name, size, folder + keys[name], at)
    return shards, modality, dict(left_out)


def _fits(path: str, settings: PlanSettings) -> bool:
    fits = not settings.pattern or fnmatch.fnmatchcase(path, settings.pattern)
    return fits and (not settings.extension or path.lower().endswith("." + settings.extension.lower().lstrip(".")))


def _path_and_text(line: bytes, field: str | None, where: str) -> tuple[str, str | None]:
    """The path of an index row, checked, and its text."""
    try:
        row = json.loads(line)
        path, text = row["path"], split_text(row, field)[0]
        inside = isinstance(path, str) and path != "" and not path.startswith("/") and ".." not in path.split("/")
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"{where}: expected a JSON object with a path ({e!r}); correct the line") from e
    if not inside:
        raise ValueError(f"{where}: expected a path below the folder, got {path!r}; keys are made of it")
    return "/".join(part for part in path.split("/") if part not in ("", ".")), text


def read(plan: Plan, shard: InputShard) -> Iterator[Sample | Failure]:
    """Samples of a folder's shard: paths of files that can be opened, with their texts."""
    assert plan.listing is not None  # `make_plan` and `load_plan` give every plan one
    root, settings = Path(plan.root), PlanSettings(**plan.settings)
    for part in shard.parts:
        lines = plan.listing.range(*part["lines"], crc32=part["crc32"])
        yield from _read_lines(lines, root, settings, shard.number)


def _read_lines(lines: Sequence[Line], root: Path, settings: PlanSettings, number: int) -> Iterator[Sample | Failure]:
    index = None if settings.index in (None, NO_INDEX) else root / settings.index
    for path, _, whole, beside in lines:
        name = readable_name(path)
        key = name if whole else os.path.splitext(name)[0]
        try:
            with (root / path).open("rb"):
                pass  # opened by a decoder later; here only to tell what cannot be
        except OSError as e:
            yield Failure(key, f"{name}: {e.strerror or e}", number)
            continue
        try:
            if index is not None:
                text, extra = _row_of(index, beside, settings.text_column)
            else:
                stem = os.path.splitext(path)[0]
                files = {s: (root / f"{stem}.{s}").read_bytes() for s in beside or ()}
                text, extra = text_and_extra(files, settings.text_column)
        except (OSError, ValueError) as e:
            yield Failure(key, f"{name}: {e}", number)
            continue
        yield Sample(key, path=root / path, text=text, extra=extra)


def _row_of(index: Path, start: int, field: str | None) -> tuple[str | None, dict[str, Any]]:
    """Text and extra of the row that begins at a byte of an index."""
    with index.open("rb") as f:
        f.seek(start)
        row = json.loads(f.readline())
    return split_text({k: v for k, v in row.items() if k != "path"}, field)
