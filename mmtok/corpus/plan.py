"""The plan of a corpus: a source is recognised, listed, and cut into shards, the same on every call and machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtok.corpus import source_folder, source_tables, source_tar
from mmtok.corpus.listing import Listing, find_files, first_differences
from mmtok.corpus.records import SCHEMA, InputShard, Plan, PlanSettings
from mmtok.tokens import write_atomic

KINDS = ("folder", "tar", "parquet", "datasets")
WORDS = {"": "picture or sound", "image": "picture", "audio": "sound"}
LIST_SUFFIX = ".files"  # of the list of files beside plan.json


def make_plan(source: str | Path, settings: PlanSettings | None = None) -> Plan:
    """Recognise ``source``, list it and cut it into shards.

    ``source``: a folder of files, of tar shards, of Parquet files, or a data set that Hugging Face's ``save_to_disk``
    wrote; a tar or Parquet file; a glob or braces (``train-{0000..0012}.tar``) of these. A prefix forces the kind:
    ``folder:``, ``tar:``, ``parquet:``, ``datasets:``. All of it is a function of names, sizes and settings.

    Raises ValueError where there is nothing, several kinds or modalities and no choice, or columns are missing.
    """
    settings = settings or PlanSettings()
    kind, location = split_source(str(source))
    return _planned(str(source), kind, os.path.abspath(os.path.expanduser(location)), settings)


def split_source(source: str) -> tuple[str | None, str]:
    """``tar:shards/`` -> (``tar``, ``shards/``); None where no kind is forced. A path that exists wins."""
    kind, colon, rest = source.partition(":")
    if colon and kind in KINDS and not os.path.exists(source):
        if not rest:
            raise ValueError(f"source {source!r}: expected a path after {kind}:")
        return kind, rest
    return None, source


def _planned(source: str, kind: str | None, location: str, settings: PlanSettings) -> Plan:
    root = Path(location)
    if not root.is_dir():
        if kind in ("folder", "datasets"):
            raise ValueError(f"source {source!r}: expected a folder, there is none at {location}")
        root, files = find_files(location)
        return _of_files(source, location, kind or _kind_of_files(source, files), root, files, settings, {})
    if kind == "datasets" or (kind is None and source_tables.is_dataset(root)):
        _refuse(settings, "datasets", ("extension", "index"))
        listing, shards, chosen, found = source_tables.plan_dataset(root, settings)
        return _plan(source, location, "datasets", root, chosen, listing.finish(), shards, found)
    index = source_folder.index_of(root, settings) if kind in (None, "folder") else None
    if index is not None:
        _refuse(settings, "folder", ("key_column", "bytes_column"))
        rows, modality, left_out = source_folder.from_index(root, index, settings)
        listing, shards = rows.finish()
        found = {"examples": rows.examples, "texts": dict(rows.texts), "left_out": left_out}
        chosen = dataclasses.replace(settings, modality=modality, index=index)
        return _plan(source, location, "folder", root, chosen, listing, shards, found)
    there = source_folder.survey(root, settings)
    left_out = dict(sorted(there.left_out.items()))
    kind = kind or _kind_of_folder(source, there, settings)
    if kind == "folder":
        return _of_survey(source, location, root, there, settings, left_out)
    files, others = (there.tars, there.tables) if kind == "tar" else (there.tables, there.tars)
    left_out |= {f"{m} files": f.items for m, f in there.media.items() if f.items}
    left_out |= {"files of the other kind (tar, Parquet)": len(others)} if others else {}
    return _of_files(source, location, kind, root, files, settings, left_out)


def _of_survey(
    source: str,
    location: str,
    root: Path,
    there: source_folder.Survey,
    settings: PlanSettings,
    left_out: Mapping[str, int],
) -> Plan:
    """The plan of a folder that goes by endings."""
    _refuse(settings, "folder", ("key_column", "bytes_column"))
    counts = {modality: files.items for modality, files in there.media.items() if files.items}
    if settings.modality is None and len(counts) > 1:
        raise ValueError(
            f"{source}: expected pictures or sounds, got {_told(counts)}; choose the modality, image or audio"
        )
    modality = settings.modality or next(iter(counts), "")
    if not counts.get(modality):
        _refuse_empty(source, modality, counts, left_out)
    files = there.media[modality]
    listing, shards = files.finish()
    others = {f"{m} files": n for m, n in counts.items() if m != modality}
    found = {"examples": files.examples, "texts": dict(sorted(files.texts.items())), "left_out": {**others, **left_out}}
    chosen = dataclasses.replace(settings, modality=modality, index=source_folder.NO_INDEX)
    return _plan(source, location, "folder", root, chosen, listing, shards, found)


def _of_files(
    source: str,
    location: str,
    kind: str,
    root: Path,
    files: Sequence[tuple[str, int]],
    settings: PlanSettings,
    left_out: Mapping[str, int],
) -> Plan:
    """The plan of tar shards or Parquet files."""
    if not files:
        _refuse_empty(source, f"{kind} file", {}, left_out)
    if kind == "tar":
        _refuse(settings, kind, ("key_column", "bytes_column", "index"))
        listing, shards, modality, found = source_tar.plan_tars(root, files, settings)
        chosen = dataclasses.replace(settings, modality=modality)
    else:
        _refuse(settings, kind, ("extension", "index"))
        listing, shards, chosen, found = source_tables.plan_parquet(root, files, settings)
    found["left_out"] = {**found.get("left_out", {}), **left_out}
    return _plan(source, location, kind, root, chosen, listing.finish(), shards, found)


def _plan(
    source: str,
    location: str,
    kind: str,
    root: Path,
    settings: PlanSettings,
    listing: Listing,
    shards: Sequence[InputShard],
    found: Mapping[str, Any],
) -> Plan:
    """All of it with its fingerprint, which does not depend on where the source lies or how it was named."""
    assert settings.modality is not None  # every kind chooses one
    chosen = dataclasses.asdict(settings)
    told = [SCHEMA, kind, chosen, listing.sha256, [list(shard.parts) for shard in shards]]
    fingerprint = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return Plan(
        kind=kind,
        source=source,
        modality=settings.modality,
        settings=chosen,
        shards=shards,
        fingerprint=fingerprint,
        location=location,
        root=os.path.abspath(root),
        found=found,
        listing=listing,
    )


def _kind_of_files(source: str, files: Sequence[tuple[str, int]]) -> str:
    """Of the files that a path, glob or braces named."""
    tars = sum(name.lower().endswith(source_folder.TAR_ENDINGS) for name, _ in files)
    tables = sum(name.lower().endswith(source_folder.TABLE_ENDINGS) for name, _ in files)
    if tars == len(files):
        return "tar"
    if tables == len(files):
        return "parquet"
    raise ValueError(
        f"source {source!r}: expected tar or Parquet files by their endings, got {tars} tar, {tables} Parquet and "
        f"{len(files) - tars - tables} others; name a folder of pictures or sounds, or write tar: or parquet: before"
    )


def _kind_of_folder(source: str, there: source_folder.Survey, settings: PlanSettings) -> str:
    """The one kind that a folder holds."""
    media = sum(f.items for m, f in there.media.items() if settings.modality in (None, m))
    counts = {"folder": media, "tar": len(there.tars), "parquet": len(there.tables)}
    kinds = [kind for kind, count in counts.items() if count]
    if len(kinds) > 1:
        words = {"folder": "pictures or sounds", "tar": "tar shards", "parquet": "Parquet files"}
        told = _told({words[k]: counts[k] for k in kinds})
        raise ValueError(
            f"{source} holds {told}: write {' or '.join(f'{k}:' for k in kinds)} before the path to choose"
        )
    return kinds[0] if kinds else "folder"  # of an empty one: its own error tells what there is


def _refuse(settings: PlanSettings, kind: str, options: Sequence[str]) -> None:
    """Raise ValueError for settings that mean nothing for a kind of source."""
    given = [o for o in options if getattr(settings, o) not in (None, source_folder.NO_INDEX)]
    if given:
        raise ValueError(f"{', '.join(given)}: a source of the kind {kind} has none; leave it out")


def _refuse_empty(source: str, wanted: str, counts: Mapping[str, int], left_out: Mapping[str, int]) -> None:
    there = _told({**{f"{m} files": n for m, n in counts.items()}, **left_out}) or "nothing"
    raise ValueError(f"{source}: expected at least one {WORDS.get(wanted, wanted)}, got {there}; give another source")


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write ``plan`` as JSON, and the list of its files beside it (``plan.files``), each aside and renamed."""
    assert plan.listing is not None
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    plan.listing.write(path.with_suffix(LIST_SUFFIX))
    data = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name not in ("shards", "listing")}
    data["schema"] = SCHEMA
    data["listing"] = {"bytes": plan.listing.size, "sha256": plan.listing.sha256}
    shards = ",\n".join(json.dumps([list(s.parts), s.items, s.bytes], sort_keys=True) for s in plan.shards)
    head = json.dumps(data, sort_keys=True, indent=1)
    write_atomic(path, f'{head[:-2]},\n "shards": [\n{shards}\n]}}\n'.encode())


def load_plan(path: str | Path) -> Plan:
    """The plan that `save_plan` wrote; its list of files stays on disk. Raises ValueError where it is damaged."""
    path = Path(path)
    try:
        data = json.loads(path.read_bytes())
        if data.pop("schema") != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA}")
        listing = Listing(data["listing"]["bytes"], data["listing"]["sha256"], path=path.with_suffix(LIST_SUFFIX))
        shards = [InputShard(n, parts, items, size) for n, (parts, items, size) in enumerate(data["shards"])]
        plan = Plan(**{**data, "listing": listing, "shards": shards})
        PlanSettings(**plan.settings)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: expected a plan of a corpus, which this is not ({e}); plan again") from e
    listing.open().close()
    return plan


def changed(plan: Plan) -> str | None:
    """What differs in the source since it was planned, by names and sizes, in words; None where nothing does."""
    assert plan.listing is not None
    try:
        now = _planned(plan.source, plan.kind, plan.location, PlanSettings(**plan.settings))
    except (ValueError, OSError) as e:
        return f"the source cannot be planned any more: {e}"
    assert now.listing is not None
    if now.listing != plan.listing:
        return first_differences(plan.listing, now.listing)
    return None if now.fingerprint == plan.fingerprint else "equal names and sizes, but other rows or columns"


def describe(plan: Plan) -> str:
    """What was found, for the command line: one line a fact."""
    items = [shard.items for shard in plan.shards]
    known = sum(n for n in items if n is not None)
    unknown = sum(n is None for n in items)
    count = f"{known:,}" if not unknown else f"{known:,} and those of {unknown} files" if known else "known when read"
    lines = {
        "source": f"{plan.source} ({plan.kind}) at {plan.location}",
        "modality": plan.modality,
        "items": f"{count}, in {len(items):,} {'shard' if len(items) == 1 else 'shards'}",
        "bytes": readable_bytes(sum(shard.bytes for shard in plan.shards)),
        "keys": ", ".join(plan.found.get("examples", [])),
        "texts": _texts(plan, known),
    }
    guessed = plan.found.get("guessed", [])
    for option in ("bytes_column", "key_column"):
        if plan.settings.get(option):
            lines[option.replace("_", " ")] = plan.settings[option] + (" (guessed)" if option in guessed else "")
    lines |= {
        "kept beside": ", ".join(plan.found.get("extra", [])),
        "splits": ", ".join(s for s in plan.found.get("splits", []) if s),
        "members": ", ".join(f".{e}" for e in plan.found.get("members", [])),
        "left out": _told(plan.found.get("left_out", {})),
    }
    return "\n".join(f"{name:<12} {value}" for name, value in lines.items() if value)


def _texts(plan: Plan, items: int) -> str:
    """Where the texts come from."""
    column = plan.settings.get("text_column")
    if plan.kind in ("parquet", "datasets"):
        guessed = "text_column" in plan.found.get("guessed", [])
        return f"column {column}{' (guessed; text_column chooses)' if guessed else ''}" if column else "none"
    if column == "":
        return "none (by choice)"
    texts = plan.found.get("texts", {})
    where = f", field {column}" if column else ""
    if isinstance(texts, Mapping):
        return (", ".join(f"{name} for {n:,} of {items:,}" for name, n in texts.items()) or "none") + where
    return (", ".join(texts) or "none in the first members") + where


def readable_bytes(count: int) -> str:
    """``45200000`` -> ``45.2 MB``."""
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
