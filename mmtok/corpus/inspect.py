"""What is in a corpus and whether it is whole: `stats` and `verify`."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmtok.corpus.index import (
    RUN_AGAIN,
    TABLE,
    build_index,
    done_shards,
    missing_shards,
    planned_items,
    read_index,
    words_of,
)
from mmtok.corpus.open_shards import OpenShards
from mmtok.corpus.records import INDEX, SHARDS, Done
from mmtok.corpus.shard_file import READ_ITEMS, ShardFile, done_path, read_done, sha256_of, shard_path
from mmtok.tokens import TokenSpec

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
TABLE_SIZE = 2**20  # K up to which a level is counted in a table; above, its codes are collected and sorted
COLLECTED = 2**22  # codes of such a level that are kept in memory
REASONS = 20  # different reasons of failures that are told
# What differs between failures of one kind: quoted names, paths, numbers.
PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|\S*[/\\]\S*|0x[0-9a-fA-F]+|\d+(?:\.\d+)?")


def stats(out: str | Path, max_codes: int | None = 2**27) -> dict[str, Any]:
    """Figures of the shards that are done, as plain values; `stats_text` makes tables of them.

    Args:
        out: the corpus folder.
        max_codes: count about so many codes (of all levels together), in blocks of items spread evenly over every
            shard; None: all. Lengths, texts and bytes are always of all items.

    Returns:
        ``tokenizer, packing, shards, missing``; ``items, positions, codes, seconds | pixels, bits`` (nominal) as in
        the index; ``quantiles`` of tokens an item; ``levels``: of each the codes ``counted``, ``usage``,
        ``entropy_bits``, ``perplexity``; ``entropy_bits`` of all codes, were each level coded by its own frequencies;
        ``bytes`` of the shards, ``bytes_per_item``, ``overhead`` = bytes over nominal bits - 1; ``text_share``;
        ``failures``, and ``reasons``: how many of each kind.

    Raises:
        ValueError: damaged files.
    """
    done = done_shards(out)
    missing = missing_shards(out, done)
    index = build_index(out, partial=True)
    shards = OpenShards(out, {m.shard: m.bytes for m in done})
    total_codes = sum(m.codes for m in done)
    share = 1.0 if max_codes is None or total_codes <= max_codes else max_codes / total_codes
    counting: _Counting | None = None
    lengths: list[np.ndarray] = [np.zeros(0, np.int64)]
    tokens: list[np.ndarray] = [np.zeros(0, np.int64)]
    texts = 0
    for marker in done:
        shard = shards[marker.shard]
        counting = counting or _Counting(shard.spec)
        tokens.append(np.sum([g.counts(shard.lengths) for g in shard.groups], axis=0))
        lengths.append(shard.lengths)
        texts += shard.num_texts
        for start, stop in _blocks(len(shard), share):
            counting.add(shard, start, stop)
    each = np.concatenate(tokens)
    totals = index.about["totals"]
    levels = counting.levels() if counting else []
    per_level = counting.of_all(np.concatenate(lengths)) if counting else []
    size, bits = totals["bytes"], totals["bits"]
    return {
        "out": str(out),
        "tokenizer": index.about["tokenizer"],
        "packing": index.about["packing"],
        "shards": len(done),
        "missing": len(missing),
        **{k: totals[k] for k in ("items", "positions", "codes", "seconds", "pixels", "bits") if k in totals},
        "quantiles": {str(q): float(np.quantile(each, q)) for q in QUANTILES} if len(each) else {},
        "levels": levels,
        "entropy_bits": sum(n * level["entropy_bits"] for n, level in zip(per_level, levels, strict=True)),
        "bytes": size,
        "bytes_per_item": size / len(each) if len(each) else 0.0,
        "overhead": size * 8 / bits - 1 if bits else 0.0,
        "text_share": texts / len(each) if len(each) else 0.0,
        "failures": len(index.failures),
        "reasons": _kinds([f.reason.replace(f.key, "…") if f.key else f.reason for f in index.failures]),
    }


def _blocks(items: int, share: float) -> list[tuple[int, int]]:
    """Blocks of items that hold about ``share`` of them, evenly spread; at least one."""
    starts = range(0, items, READ_ITEMS)
    wanted = max(1, round(len(starts) * share)) if items else 0
    chosen = [starts[n * len(starts) // wanted] for n in range(wanted)]
    return [(start, min(start + READ_ITEMS, items)) for start in chosen]


class _Counting:
    """How often each code occurs on each level, block by block."""

    def __init__(self, spec: TokenSpec):
        self.spec = spec
        small = [k <= TABLE_SIZE for k in spec.codebook_sizes]
        self.tables = [np.zeros(k, np.int64) if s else None for k, s in zip(spec.codebook_sizes, small, strict=True)]
        self.found: list[list[np.ndarray]] = [[] for _ in spec.codebook_sizes]
        self.counted = [0] * len(small)

    def add(self, shard: ShardFile, start: int, stop: int) -> None:
        items = [codes.numpy() for codes in shard.block(start, stop)]
        for q, (k, stride) in enumerate(zip(self.spec.codebook_sizes, self.spec.level_strides, strict=True)):
            codes = np.concatenate([item[q, ::stride] for item in items])
            table = self.tables[q]
            if table is not None:
                if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < k:
                    raise ValueError(f"{shard.path}: codes out of range; `mmtok corpus verify` tells which")
                table += np.bincount(codes, minlength=k)
            else:
                codes = codes[: max(0, COLLECTED - self.counted[q])]
                self.found[q].append(codes)
            self.counted[q] += len(codes)

    def levels(self) -> list[dict[str, Any]]:
        """Plug-in estimates from the counts, as `mmtok.metrics.codes` makes them."""
        out = []
        for q, k in enumerate(self.spec.codebook_sizes):
            table = self.tables[q]
            counts = np.unique(np.concatenate(self.found[q]), return_counts=True)[1] if table is None else table
            p = counts[counts > 0] / max(1, self.counted[q])
            entropy = max(0.0, float(-(p * np.log2(p)).sum()))
            out.append(
                {
                    "level": q,
                    "codebook_size": k,
                    "counted": self.counted[q],
                    "usage": len(p) / k,
                    "entropy_bits": entropy,
                    "perplexity": 2.0**entropy if self.counted[q] else 0.0,
                }
            )
        return out

    def of_all(self, lengths: np.ndarray) -> list[int]:
        """Codes that items of these lengths have on each level."""
        return [int((-(-lengths // s)).sum()) for s in self.spec.level_strides]


def _kinds(reasons: Sequence[str]) -> dict[str, int]:
    """Reasons that differ in names and numbers only are one; the most frequent first, the rest together."""
    counts = collections.Counter(PARTICULAR.sub("…", reason) for reason in reasons)
    first = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    rest = sum(n for _, n in first[REASONS:])
    return dict(first[:REASONS]) | ({"other reasons": rest} if rest else {})


def stats_text(found: dict[str, Any]) -> str:
    """The figures of `stats` as text for a terminal."""
    lines = [f"{found['out']}: {found['tokenizer'] or 'nothing is done yet'}"]
    missing = f", {found['missing']} missing" if found["missing"] else ""
    rows = [
        ("shards", f"{found['shards']:,}{missing}"),
        ("items", f"{found['items']:,}"),
        ("failures", f"{found['failures']:,}"),
        ("texts", f"{found['text_share']:.1%} of the items"),
        ("positions", f"{found['positions']:,}"),
        ("tokens", f"{found['codes']:,}"),
    ]
    if "seconds" in found:
        rows.append(("sound", f"{found['seconds'] / 3600:,.3f} hours"))
    if "pixels" in found:
        rows.append(("pictures", f"{found['pixels'] / 1e6:,.3f} megapixels"))
    if found["bits"]:
        rows += [
            ("bits", f"{found['bits']:,.0f} nominal, {found['entropy_bits']:,.0f} by each level's entropy"),
            (
                "on disk",
                f"{found['bytes']:,} bytes ({found['packing']}), {found['bytes_per_item']:,.1f} an item, "
                f"{found['overhead']:+.1%} over the nominal bits",
            ),
        ]
    lines += [f"  {name:<10} {value}" for name, value in rows]
    if found["quantiles"]:
        lines += ["", "tokens an item"]
        lines += _table(
            ["least" if q == "0.0" else "most" if q == "1.0" else f"{float(q):.0%}" for q in found["quantiles"]],
            [[f"{value:,.0f}" for value in found["quantiles"].values()]],
        )
        names = ["level", "codebook", "counted", "usage", "entropy", "of bits", "perplexity"]
        lines += ["", "levels", *_table(names, [_level_cells(level) for level in found["levels"]])]
    if found["reasons"]:
        lines += ["", "failures", *(f"  {count:>9,}  {reason}" for reason, count in found["reasons"].items())]
    return "\n".join(lines)


def _level_cells(level: dict[str, Any]) -> list[str]:
    k = level["codebook_size"]
    return [
        str(level["level"]),
        f"{k:,}",
        f"{level['counted']:,}",
        f"{level['usage']:.2%}",
        f"{level['entropy_bits']:.3f}",
        f"{np.log2(k):.3f}",
        f"{level['perplexity']:,.1f}",
    ]


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(names, *rows, strict=True)]
    return ["  " + "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in (names, *rows)]


def verify(out: str | Path, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Read everything and tell what is wrong and what to do, one line a problem; an empty list: all is well.

    Looked at: every planned shard and its done-marker, each shard's checksum, contents and range of codes, items and
    failures against the plan's number of items, files that belong to nothing, and whether the index, the failures and
    the keys are those that the shards give.

    Args:
        out: the corpus folder, finished or not.
        progress: called after each shard with (shards looked at, shards planned).

    Raises:
        FileNotFoundError: there is no corpus.
    """
    out = Path(out)
    try:
        planned = planned_items(out)
    except ValueError as e:
        return [str(e)]
    problems: list[str] = []
    missing: list[int] = []
    state = _Seen()
    for number, items in enumerate(planned):
        try:
            done = read_done(out, number)
        except ValueError as e:
            problems.append(str(e))
            state.damaged.append(number)
        else:
            if done is None:
                missing.append(number)
            else:
                found = _shard_problems(out, done, items, state)
                problems += found
                state.damaged += [number] if found else []
        if progress is not None:
            progress(number + 1, len(planned))
    if missing:
        problems.append(f"{out} is unfinished: {words_of(missing)}; {RUN_AGAIN}")
    problems += _strays(out, len(planned))
    if not state.damaged:
        problems += _index_problems(out, bool(missing))
    elif (out / INDEX).is_file():
        problems.append(f"{out / INDEX} was not compared with the shards: mend those above first, then verify again")
    return problems


@dataclasses.dataclass
class _Seen:
    """What `verify` knows of the shards so far: the first one's spec, and which are damaged."""

    spec: TokenSpec | None = None
    damaged: list[int] = dataclasses.field(default_factory=list)


def _shard_problems(out: Path, done: Done, planned: int | None, state: _Seen) -> list[str]:
    """What is wrong with one shard that has a marker."""
    path = shard_path(out, done.shard)
    remedy = f"delete {path.name} and {done_path(out, done.shard).name}, then {RUN_AGAIN}"
    if not path.is_file():
        return [f"{path} is missing, though its done-marker is there; delete the marker, then {RUN_AGAIN}"]
    if (size := path.stat().st_size) != done.bytes:
        return [f"{path}: expected {done.bytes} bytes as its done-marker says, got {size}; {remedy}"]
    if (real := sha256_of(path)) != done.sha256:
        return [f"{path}: expected the checksum {done.sha256[:16]} of its done-marker, got {real[:16]}; {remedy}"]
    try:
        shard = ShardFile(path, spec=state.spec)
        found = shard.problems(checksum=False)
    except ValueError as e:
        return [str(e)]
    state.spec = shard.spec
    problems = [f"{path}: {problem}; {remedy}" for problem in found]
    real_counts = {
        "items": len(shard),
        "positions": int(shard.lengths.sum()),
        "codes": int(sum(g.counts(shard.lengths).sum() for g in shard.groups)),
        "first_key": shard.key(0) if len(shard) and not found else done.first_key,
    }
    for name, value in real_counts.items():
        if (said := getattr(done, name)) != value:
            problems.append(f"{path}: its done-marker says {name} = {said!r}, the file has {value!r}; {remedy}")
    if planned is not None and len(shard) + len(done.failures) != planned:
        counts = f"{len(shard)} items and {len(done.failures)} failures"
        problems.append(f"{path}: expected {planned} samples as planned, got {counts}; {remedy}")
    return problems


def _strays(out: Path, planned: int) -> list[str]:
    """Files beside the shards that belong to nothing."""
    expected = {path(out, number).name for number in range(planned) for path in (shard_path, done_path)}
    folder = out / SHARDS
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    return [f"{folder / name} belongs to no planned shard; delete it" for name in found if name not in expected]


def _index_problems(out: Path, unfinished: bool) -> list[str]:
    """Whether the index and the failures are what the shards give, which also says that its keys are unique."""
    if unfinished or not (out / INDEX).is_file():
        words = f"{out / INDEX} is there, though shards are missing; delete it" if (out / INDEX).is_file() else ""
        return [words] if words else [] if unfinished else [f"{out / INDEX} is missing; {RUN_AGAIN}"]
    try:
        expected = build_index(out)
        found = read_index(out)
    except ValueError as e:
        return [str(e)]
    problems = []
    for name, data in expected.files().items():
        path = out / name
        if path.is_file() and path.read_bytes() == data:
            continue
        what = "is missing" if not path.is_file() else "is not what the shards say"
        if found is not None and name == TABLE:
            differ = [k for k, v in expected.table.items() if not np.array_equal(v, found[1][k])]
            what += f" (other {', '.join(differ)})" if differ else ""
        elif found is not None and name == INDEX:
            differ = [k for k in found[0] if k != "table" and found[0][k] != _plain(expected.about.get(k))]
            what += f" (other {', '.join(differ)})" if differ else ""
        problems.append(f"{path} {what}; delete {INDEX}, then {RUN_AGAIN}")
    return problems


def _plain(value: Any) -> Any:
    """As JSON gives it back: lists for tuples."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
