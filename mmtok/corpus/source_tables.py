"""Tables as a source: Parquet files, and Hugging Face data sets saved to disk. Read as Arrow, not decoded."""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmtok.corpus.columns import READ_ERRORS, choose_columns, first_bytes, holds_bytes, samples_of, short, used_columns
from mmtok.corpus.listing import ListingWriter, file_names, in_order, readable_name, walk
from mmtok.corpus.records import Failure, InputShard, Plan, PlanSettings, Sample

BATCH = 32  # rows that are read at a time
Found = dict[str, Any]
Planned = tuple[ListingWriter, list[InputShard], PlanSettings, Found]


def pyarrow_parquet() -> Any:
    """The module, or ImportError that tells how to get it."""
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise ImportError("Parquet files need pyarrow: pip install 'mmtok[corpus]'") from e
    return pyarrow.parquet


def datasets_module() -> Any:
    """The module, or ImportError that tells how to get it."""
    try:
        import datasets
    except ImportError as e:
        raise ImportError("Hugging Face data sets need datasets: pip install 'mmtok[corpus]'") from e
    return datasets


# ---- Parquet ----------------------------------------------------------------------------------------------------


def table_name(path: str) -> str:
    """``a/b.parquet`` -> ``a/b``."""
    return re.sub(r"\.(parquet|pq)$", "", path, flags=re.IGNORECASE)


def plan_parquet(root: Path, files: Sequence[tuple[str, int]], settings: PlanSettings) -> Planned:
    """Shards of whole row groups, filled up to ``items_per_shard`` over files.

    A file that cannot be read is a part of its own, which fails when its turn comes.
    Raises ValueError where no file can be read or one lacks a column.
    """
    pq = pyarrow_parquet()
    names = file_names([path for path, _ in files], table_name)
    listing, shards, found = ListingWriter(), [], {}
    parts: list[dict[str, Any]] = []
    count, size, chosen, why = 0, 0, None, ""

    def cut() -> None:
        nonlocal parts, count, size
        if parts:
            items = None if any(part["rows"] is None for part in parts) else count
            shards.append(InputShard(len(shards), parts, items, size))
        parts, count, size = [], 0, 0

    for (path, length), name in zip(files, names, strict=True):
        listing.add(path, length)
        try:
            with pq.ParquetFile(root / path) as file:
                if chosen is None:
                    chosen, found = choose_columns(file.schema_arrow, settings, _peek(file), str(root / path))
                else:
                    _check_columns(file.schema_arrow, chosen, root / path)
                groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        except _arrow_errors() as e:
            why = f"{root / path}: {short(e)}"
            cut()
            parts, size = [{"file": path, "name": readable_name(name), "groups": None, "rows": None}], max(0, length)
            cut()
            continue
        row = 0
        for i, group in enumerate(groups):
            rows = group.num_rows
            if count and count + rows > settings.items_per_shard:
                cut()
            if parts and parts[-1]["file"] == path:
                parts[-1] |= {"groups": [parts[-1]["groups"][0], i + 1], "rows": parts[-1]["rows"] + rows}
            else:
                start = {"file": path, "name": readable_name(name), "first": row}
                parts.append({**start, "groups": [i, i + 1], "rows": rows})
            count, row = count + rows, row + rows
            size += sum(group.column(c).total_compressed_size for c in range(group.num_columns))
    cut()
    if chosen is None:
        raise ValueError(f"none of the {len(files)} Parquet files can be read; the last: {why}")
    if not any(shard.items for shard in shards):
        raise ValueError(f"the {len(files)} Parquet files under {root} hold no rows")
    first = next(part for shard in shards for part in shard.parts if part["rows"])
    keys = [f"{first['name']}#{first['first'] + i}" for i in range(min(3, first["rows"]))]
    return listing, shards, chosen, {**found, "examples": [] if chosen.key_column else keys}


def _arrow_errors() -> tuple[type[BaseException], ...]:
    """What pyarrow raises for a damaged file; its ArrowInvalid is a ValueError, while a plain ValueError is ours."""
    import pyarrow as pa

    return (pa.ArrowException, OSError, EOFError, MemoryError)


def _check_columns(schema: Any, settings: PlanSettings, path: Path) -> None:
    """Raise ValueError unless a further file has the columns that the first one decided."""
    for option in ("bytes_column", "text_column", "key_column"):
        name = getattr(settings, option)
        if name and name not in schema.names:
            raise ValueError(f"{option}: {path} has no column {name!r}, as the first file has; it has {schema.names}")
    if not holds_bytes(schema.field(settings.bytes_column).type):
        raise ValueError(f"bytes_column: {settings.bytes_column!r} of {path} holds no bytes, unlike the first file's")


def _peek(file: Any) -> Callable[[str], bytes | None]:
    """The first bytes of a column in the first rows of an open Parquet file."""

    def first(column: str) -> bytes | None:
        with contextlib.suppress(*_arrow_errors()):
            return first_bytes(next(file.iter_batches(batch_size=8, columns=[column]), None), column)
        return None

    return first


def read_parquet(plan: Plan, shard: InputShard) -> Iterator[Sample | Failure]:
    """Rows of a shard's row groups; each row of a group that is damaged fails by itself, and the next group is read."""
    pq, settings = pyarrow_parquet(), PlanSettings(**plan.settings)
    for part in shard.parts:
        path, name = Path(plan.root) / part["file"], part["name"]
        with contextlib.ExitStack() as stack:
            try:  # pages are read as they are needed, not a row group at once
                file = stack.enter_context(pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20))
                columns = used_columns(file.schema_arrow, settings)
                counts = [file.metadata.row_group(i).num_rows for i in range(*part["groups"] or (0, 0))]
            except READ_ERRORS as e:
                yield from _lost(name, part.get("first"), part["rows"], f"{path.name}: {short(e)}", shard.number)
                continue
            row = part.get("first", 0)
            for i, rows in zip(range(*part["groups"] or (0, 0)), counts, strict=True):
                done = 0
                batches = file.iter_batches(batch_size=BATCH, row_groups=[i], columns=columns)
                while done < rows:
                    try:
                        batch = next(batches)
                    except (*READ_ERRORS, StopIteration) as e:
                        why = f"row group {i} of {path.name} breaks here: {short(e)}"
                        yield from _lost(name, row + done, rows - done, why, shard.number)
                        break
                    yield from samples_of(batch, name, row + done, settings, shard.number)
                    done += batch.num_rows
                row += rows


def _lost(name: str, first: int | None, rows: int | None, why: str, number: int) -> Iterator[Failure]:
    """A failure for every row that cannot be read, or one for a file of which nothing is known."""
    if rows is None or first is None:
        yield Failure(name, why, number)
    else:
        yield from (Failure(f"{name}#{first + i}", why, number) for i in range(rows))


# ---- Hugging Face data sets -------------------------------------------------------------------------------------


def is_dataset(root: Path) -> bool:
    """Whether `datasets.Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote a folder."""
    return (root / "dataset_dict.json").is_file() or (
        (root / "state.json").is_file() and (root / "dataset_info.json").is_file()
    )


def load_splits(root: Path) -> dict[str, Any]:
    """The splits of a saved data set by name, sorted; "" where it has none. Raises ValueError where it is damaged."""
    datasets = datasets_module()
    try:
        loaded = datasets.load_from_disk(str(root))
    except Exception as e:  # of its own and of pyarrow's making
        raise ValueError(f"{root}: expected a data set that save_to_disk wrote; it does not load ({short(e)})") from e
    splits = dict(sorted(loaded.items())) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    return {name: split.with_format("arrow") for name, split in splits.items()}


def plan_dataset(root: Path, settings: PlanSettings) -> Planned:
    """Shards of ``items_per_shard`` rows, within a split. Raises ValueError for no rows or columns that do not fit."""
    listing, total = ListingWriter(), 0
    files = [(f.path + name, size) for f in walk(root) for name, size in f.files if not name.startswith("cache-")]
    for path, size in sorted(files, key=lambda file: in_order(file[0])):  # cache-*: what `map` leaves there
        listing.add(path, size)
        total += size
    splits = load_splits(root)
    fitting = {n: s for n, s in splits.items() if not settings.pattern or fnmatch.fnmatchcase(n, settings.pattern)}
    rows = sum(len(split) for split in fitting.values())
    if not rows:
        raise ValueError(f"the data set {root} has no rows in the splits {sorted(fitting)} of {sorted(splits)}")
    all_rows = sum(len(split) for split in splits.values())
    chosen, found, shards = None, {}, []
    for split, table in fitting.items():
        if not len(table):
            continue
        schema = table.features.arrow_schema
        where = f"{root}{f', split {split}' if split else ''}"
        if chosen is None:
            head = table[: min(8, len(table))]
            chosen, found = choose_columns(schema, settings, lambda c, head=head: first_bytes(head, c), where)
        else:
            _check_columns(schema, chosen, Path(where))
        for start in range(0, len(table), settings.items_per_shard):
            stop = min(start + settings.items_per_shard, len(table))
            part = {"split": split, "rows": [start, stop], "name": split or str(table.split or "data")}
            shards.append(InputShard(len(shards), [part], stop - start, total * (stop - start) // all_rows))
    assert chosen is not None  # some split has rows
    first = shards[0].parts[0]
    keys = [] if chosen.key_column else [f"{first['name']}#{i}" for i in range(min(3, first["rows"][1]))]
    return listing, shards, chosen, {**found, "examples": keys, "splits": list(fitting)}


def read_dataset(plan: Plan, shard: InputShard) -> Iterator[Sample | Failure]:
    """Rows of a shard as Arrow, so that no picture or sound is decoded."""
    settings = PlanSettings(**plan.settings)
    datasets_module()
    splits, why = {}, ""
    try:
        splits = load_splits(Path(plan.root))
    except ValueError as e:
        why = str(e)
    for part in shard.parts:
        name, (start, stop) = part["name"], part["rows"]
        if part["split"] not in splits:
            yield from _lost(name, start, stop - start, why or f"no split {part['split']!r} any more", shard.number)
            continue
        table = splits[part["split"]]
        table = table.select_columns(used_columns(table.features.arrow_schema, settings))
        for i in range(start, stop, BATCH):
            end = min(i + BATCH, stop)
            try:
                rows = table[i:end]
            except READ_ERRORS as e:
                yield from _lost(name, i, end - i, f"rows {i} to {end - 1} cannot be read: {short(e)}", shard.number)
                continue
            yield from samples_of(rows, name, i, settings, shard.number)
