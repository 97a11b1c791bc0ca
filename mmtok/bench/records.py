"""What a benchmark is made of: items, contenders' trials, and results that carry their protocol, kept as JSON lines.

A run is a folder: ``run.json`` (settings, versions), ``items.jsonl`` (one line an item and contender), ``codes/`` (what
each contender made of each item), ``results.jsonl`` (one number a line), ``gallery/`` (what the report shows).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmtok.tokens import Tokens, write_atomic

RUN, ITEMS, RESULTS, JOBS = "run.json", "items.jsonl", "results.jsonl", "jobs.jsonl"
CODES, FEATURES, GALLERY = "codes", "features", "gallery"
SHARED = "shared"  # key of a compact file, see `write_compact`
SHORTEST_SHARED = 10  # characters of JSON: what is shorter costs as much as its key


@dataclasses.dataclass(frozen=True)
class Item:
    """One picture or sound of a test set.

    Args:
        key: unique in its set and the same on every machine: the file's path relative to the data folder, and what was
            cut out of it (``images/mvtb/a.jpg#0``).
        x: picture (3, H, W) float in [0, 1] with 8-bit values, or sound (C, L) float in [-1, 1].
        sample_rate: Hz of a sound, None for a picture.
        text: caption or transcript, None where there is none.
        labels: what is known of it: ``speaker``, ``language``, ``kind``, ``package``, ``licence`` ...
        target: what a reconstruction is compared with, where that is not ``x``: a picture (3, h, w) of another size,
            at which it is then decoded.
    """

    key: str
    x: Tensor
    sample_rate: int | None = None
    text: str | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    target: Tensor | None = None

    @property
    def reference(self) -> Tensor:
        """What a reconstruction is compared with."""
        return self.x if self.target is None else self.target


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Items with the protocol that made them; items are read when asked for.

    Args:
        name: e.g. ``photos-128``, or the folder's name.
        modality: ``image`` or ``audio``.
        items: a sequence of `Item`; ``items[i]`` reads from disk, so take each once.
        protocol: plain values, of which every result stores all: ``set, source, split, selection, count, fingerprint``;
            pictures ``crop, resize, size``; sounds ``sample_rate, resampler, channels, seconds``.
    """

    __test__ = False  # pytest: not a class of tests

    name: str
    modality: str
    items: Sequence[Item]
    protocol: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a contender made of one item.

    Args:
        tokens: its codes.
        x_hat: in the shape, rate and range of the item's ``reference``, float on the CPU; pictures with 8-bit values.
        bits: what the item costs, ``tokens.bits``.
        encode_seconds, decode_seconds: wall time of the two calls.
    """

    tokens: Tokens
    x_hat: Tensor
    bits: float
    encode_seconds: float
    decode_seconds: float


@dataclasses.dataclass(frozen=True)
class Result:
    """One number of a benchmark, or the reason why there is none.

    Args:
        part: ``reconstruction``, ``tokens``, ``systems``, ``probes`` or ``language``.
        contender: its label, e.g. ``audio-codec-16k-4kbps#levels=4``; ``original`` for the untouched items.
        test_set: name of the set or task.
        metric: e.g. ``pesq_wb``, ``usage[0]`` (level 0).
        value: None where it was not run.
        unit: e.g. ``dB``; ``1`` for plain numbers.
        direction: ``higher``, ``lower`` (which is better) or ``neither``.
        low, high: the 95 % interval, None where there is none.
        count: of the items (or codes, trials) behind the value.
        interval: how ``low`` and ``high`` came about: bootstrap, seeds ...
        not_run: why there is no value, and what to do; None where there is one. A default value never stands here.
        protocol: everything that the number depends on, as plain values: the set's protocol, the contender's
            (``tokenizer, fingerprint, bits, rate, num_codebooks ...``), the metric's (``backend, version, settings``),
            the machine's where it matters.
    """

    part: str
    contender: str
    test_set: str
    metric: str
    value: float | None
    unit: str
    direction: str
    low: float | None = None
    high: float | None = None
    count: int = 0
    interval: str | None = None
    not_run: str | None = None
    protocol: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.value is None) == (self.not_run is None):
            raise ValueError(
                f"{self.metric}: expected a value or a reason in not_run, got {self.value}, {self.not_run}"
            )
        if self.direction not in ("higher", "lower", "neither"):
            raise ValueError(f"{self.metric}: expected the direction higher, lower or neither, got {self.direction!r}")

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells one number of a run from another: part, contender, set, metric."""
        return self.part, self.contender, self.test_set, self.metric


# What a line of a compact file leaves out.
DEFAULTS: dict[str, Any] = {"low": None, "high": None, "count": 0, "interval": None, "not_run": None, "protocol": {}}


def result_line(result: Result) -> dict[str, Any]:
    """The result as plain values, infinite ones as the strings ``inf`` and ``-inf`` (JSON has no such numbers)."""
    line = dataclasses.asdict(result)
    return {k: _plain(v) if k in ("value", "low", "high") else v for k, v in line.items()}


def result_of(line: Mapping[str, Any]) -> Result:
    """The `Result` of a line. Raises ValueError where a field is missing or unknown."""
    fields = {f.name for f in dataclasses.fields(Result)}
    if unknown := sorted(set(line) - fields):
        raise ValueError(f"result: expected the fields {sorted(fields)}, got {unknown} too; written by a later mmtok?")
    plain: dict[str, Any] = {k: _number(v) if k in ("value", "low", "high") else v for k, v in line.items()}
    try:
        return Result(**plain)
    except TypeError as e:
        raise ValueError(f"result: {e}") from e


def _plain(value: float | None) -> float | str | None:
    if value is None or math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append one JSON line and see it onto the disk; a line that a kill cut short before is taken away first."""
    text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("ab+") as f:
        end = f.seek(0, os.SEEK_END)
        if end:
            f.seek(end - 1)
            if f.read(1) != b"\n":
                f.seek(0)
                f.truncate(f.read().rfind(b"\n") + 1)
        f.seek(0, os.SEEK_END)
        f.write(text.encode("utf-8"))
        f.flush()
        os.fsync(f.fileno())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file, none where it does not exist; a last line without its end is left out.

    Raises:
        ValueError: a line that is no JSON object, with its number.
    """
    if not path.is_file():
        return
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            return
        try:
            found = json.loads(line)
        except ValueError as e:
            raise ValueError(f"{path}, line {number}: expected JSON, got {line[:60]!r}; restore the file") from e
        if not isinstance(found, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {type(found).__name__}")
        yield found


def read_results(path: Path) -> list[Result]:
    """The results of a run folder, a ``results.jsonl`` or a file of `write_compact`; of one key the last one counts.

    Raises:
        FileNotFoundError: there is no such file. ValueError: a damaged one.
    """
    path = path / RESULTS if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no results there; run `mmtok bench ... --out {path.parent}` first")
    found: dict[tuple[str, str, str, str], Result] = {}
    shared: dict[str, Mapping[str, Any]] = {}
    for number, line in enumerate(read_lines(path), 1):
        try:
            if SHARED in line and "metric" not in line:
                shared[line[SHARED]] = line["protocol"]
                continue
            result = result_of(_whole(line, shared))
        except (ValueError, KeyError) as e:
            raise ValueError(f"{path}, line {number}: {e}") from e
        found[result.key] = result
    return list(found.values())


def write_compact(path: Path, results: Sequence[Result]) -> None:
    """Write results as `read_results` reads them, at a fraction of the size: what protocols share stands there once.

    Fields of protocols that always come together are one line with a key, from their content and thus the same in every
    version of the file: ``{"shared": "3f9a1c", "protocol": {...}}``. The results' lines follow with those keys, the
    protocol's own fields, and no field that has its default.
    """
    lines = [result_line(r) for r in results]
    owners: dict[tuple[str, str], list[int]] = {}
    for i, line in enumerate(lines):
        for field, value in line["protocol"].items():
            owners.setdefault((field, json.dumps(value, ensure_ascii=False, sort_keys=True)), []).append(i)
    groups: dict[tuple[int, ...], dict[str, Any]] = {}
    for (field, text), who in owners.items():
        if len(who) > 1:
            groups.setdefault(tuple(who), {})[field] = json.loads(text)
    table: dict[str, dict[str, Any]] = {}
    keys: list[list[str]] = [[] for _ in lines]
    for who, part in groups.items():
        text = json.dumps(part, ensure_ascii=False, sort_keys=True)
        if len(text) < SHORTEST_SHARED:
            continue
        digest = hashlib.sha256(text.encode()).hexdigest()
        key = next(digest[:n] for n in range(6, 65) if table.get(digest[:n], part) == part)
        table[key] = part
        for i in who:
            keys[i].append(key)
            lines[i]["protocol"] = {k: v for k, v in lines[i]["protocol"].items() if k not in part}
    written: list[dict[str, Any]] = [{SHARED: key, "protocol": table[key]} for key in sorted(table)]
    for line, own in zip(lines, keys, strict=True):
        kept = {k: v for k, v in line.items() if k not in DEFAULTS or v != DEFAULTS[k]}
        written.append({**kept, SHARED: sorted(own)} if own else kept)
    texts = (json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":")) for line in written)
    write_atomic(path, "".join(f"{text}\n" for text in texts).encode("utf-8"))


def _whole(line: Mapping[str, Any], shared: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """A line with the fields that its protocol shares with others'."""
    if SHARED not in line:
        return line
    protocol: dict[str, Any] = {}
    for key in line[SHARED]:
        if key not in shared:
            raise ValueError(f"its protocol has the part {key!r}, which no line before gives; restore the file")
        protocol |= shared[key]
    return {k: v for k, v in line.items() if k != SHARED} | {"protocol": protocol | line.get("protocol", {})}
