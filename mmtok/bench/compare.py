"""Two runs side by side: what changed, whether by more than chance, and what may not be compared at all."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtok.bench.records import ITEMS, RESULTS, RUN, Result, read_lines, read_results
from mmtok.bench.scorers import SUMMARIES
from mmtok.bench.summary import Difference, paired_difference

# Fields of a protocol that do not belong to the measurement, by what they speak of. All others do, so that a field
# that nobody thought of here keeps two numbers apart rather than together.
_GROUPS = {
    "contender": {"tokenizer", "tokenizer_fingerprint", "package", "package_version", "library", "dtype"},
    "rate": {
        "num_codebooks", "codebook_sizes", "bits_per_position", "num_tokens", "bits_per_image", "bitrate_bps", "text",
        "mitigated", "length", "target_bytes", "setting", "levels", "tokens", "bytes", "quality", "rate", "raw",
    },
    "machine": {
        "device", "machine", "processor", "cpu", "gpu", "cores", "threads", "memory", "torch", "python",
        "platform", "system", "mmtok",
    },
    "counting": {
        "exact", "unscored", "counted_on", "bits", "seconds_of_sound", "elapsed_seconds", "seed", "floor",
        "above_target", "source", "left_out", "licences", "texts",
    },
}  # fmt: skip
_WHOLE = {"unscored"}  # reason -> count: one field, not one a reason
# Of a field in one of these nested protocols the place decides, not the name.
_PLACES = {"set": "measurement", "scorer": "measurement", "metric": "measurement", "machine": "machine"}
# The set's fingerprint beside the tokenizer's; `_fields` renames the plain `fingerprint` that both have in their own.
_SET_FINGERPRINTS = ("set_fingerprint", "set.fingerprint", "items_fingerprint")
# Two contenders of another part than the reconstruction differ in much that follows from the contender itself
# (vocabulary, length of its sequences), so there only these decide whether they stand under one protocol.
_SHARED = {
    "set", "split", "selection", "count", "crop", "resize", "size", "sample_rate", "resampler", "seconds", "backend",
    "version", "smoke", "steps", "task", "heads", "seeds", *_SET_FINGERPRINTS,
}  # fmt: skip
VERDICTS = {
    "better": "the interval of the change excludes 0",
    "worse": "the interval of the change excludes 0",
    "changed": "the interval excludes 0, and neither direction is better",
    "within chance": "the interval of the change includes 0",
    "no interval": "it changed, and there is no interval to judge it by",
    "equal": "the same number",
    "not comparable": "measured under another protocol: see differs",
    "not run": "in one run or both there is no number",
    "new": "only the second run has it",
    "missing": "only the first run has it",
}


def flat(protocol: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """The fields of a protocol without nesting: ``{"set": {"crop": 1}}`` -> ``{"set.crop": 1}``; counts stay whole."""
    found: dict[str, Any] = {}
    for key, value in protocol.items():
        if isinstance(value, Mapping) and key not in _WHOLE:
            found |= flat(value, f"{before}{key}.")
        else:
            found[before + key] = value
    return found


def fields(result: Result) -> dict[str, Any]:
    """The flat protocol, in which a plain ``fingerprint`` is named after whose it is: the tokenizer's or the set's."""
    found = flat(result.protocol)
    if "fingerprint" in found:
        of_set = "tokenizer" not in found
        found["set_fingerprint" if of_set else "tokenizer_fingerprint"] = found.pop("fingerprint")
    return found


def field_group(field: str) -> str:
    """What a field of `fields` speaks of: ``measurement``, ``rate``, ``contender``, ``machine`` or ``counting``."""
    place, _, rest = field.partition(".")
    last = field.rsplit(".", 1)[-1]
    if place in _GROUPS["counting"] or (place == "set" and last in _GROUPS["counting"]):
        return "counting"  # the same files may lie elsewhere: their fingerprint decides
    if rest and place in _PLACES:
        return _PLACES[place]
    for group, names in _GROUPS.items():
        if last in names:
            return group
    return "contender" if rest and place == "contender" else "measurement"


def conditions(result: Result) -> dict[str, Any]:
    """The fields that must be equal for the numbers of two contenders to stand beside each other.

    Those of the measurement, and in the part ``systems`` the machine's; see `_SHARED` for other parts.
    """
    found = {k: v for k, v in fields(result).items() if field_group(k) in _groups(result)}
    if result.part == "reconstruction":
        return found
    return {k: v for k, v in found.items() if k.rsplit(".", 1)[-1] in _SHARED or field_group(k) == "machine"}


def _groups(result: Result) -> set[str]:
    return {"measurement", "machine"} if result.part == "systems" else {"measurement"}


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that are not the same in two flat protocols, with both values; None where one lacks it."""
    return {k: (a.get(k), b.get(k)) for k in [*a, *(k for k in b if k not in a)] if a.get(k) != b.get(k)}


@dataclasses.dataclass(frozen=True)
class Change:
    """One number in two runs.

    Args:
        key: part, contender, set, metric. unit, direction: of the metric.
        old, new: the values, None where there is none.
        change: new minus old, None unless both may be compared.
        low, high: its 95 % interval; ``method`` says how it came about: items paired, or two intervals.
        verdict: a key of `VERDICTS`. differs: the fields that make it not comparable, field -> (old, new).
        also: fields that differ and do not: the weights, the machine, what was counted.
        why: reasons of what was not run.
    """

    key: tuple[str, str, str, str]
    unit: str
    direction: str
    verdict: str
    old: float | None = None
    new: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    method: str = ""
    differs: Mapping[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    also: Mapping[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, infinite ones as text."""
        found = dataclasses.asdict(self) | dict(zip(("part", "contender", "set", "metric"), self.key, strict=True))
        del found["key"]
        return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}


def diff(a: str | Path, b: str | Path, only: str | None = None, seed: int = 0) -> list[Change]:
    """Compare two runs, number by number.

    Where both are folders whose items stand in ``items.jsonl`` and the sets are the same, items are paired and the
    interval is the bootstrap's (`summary.paired_difference`). Otherwise it follows from the two intervals by the
    square-and-add rule for independent estimates (Zou and Donner 2008, eq. 3), which is wider.

    Args:
        a, b: run folders, or their ``results.jsonl``; a is the old one.
        only: a regular expression that is searched in ``part/contender/set/metric``.
        seed: of the bootstrap.

    Returns:
        In the order of the old run, then what is new.

    Raises:
        FileNotFoundError: no results there. ValueError: a damaged file, or a bad ``only``.
    """
    try:
        wanted = re.compile(only or "")
    except re.error as e:
        raise ValueError(f"only: expected a regular expression, got {only!r}: {e}") from e
    runs = [_Run(Path(p), wanted) for p in (a, b)]
    if not runs[0].results and not runs[1].results:
        raise ValueError(f"only: no part/contender/set/metric of the two runs has {only!r} in it")
    keys = [*runs[0].results, *(k for k in runs[1].results if k not in runs[0].results)]
    return [_change(key, runs[0], runs[1], seed) for key in keys]


class _Run:
    """Results by key, items' lines by contender and set, and the sets' fingerprints of a run's folder."""

    def __init__(self, path: Path, wanted: re.Pattern[str]) -> None:
        self.results = {r.key: r for r in read_results(path) if wanted.search("/".join(r.key))}
        folder = path if path.is_dir() else path.parent if path.name == RESULTS else None
        self.lines: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for line in read_lines(folder / ITEMS) if folder is not None else ():
            self.lines.setdefault((line["contender"], line["set"]), []).append(line)
        self.sets: Mapping[str, Any] = {}
        if folder is not None and (folder / RUN).is_file():
            try:
                self.sets = json.loads((folder / RUN).read_text(encoding="utf-8")).get("sets", {})
            except (ValueError, AttributeError) as e:
                raise ValueError(f"{folder / RUN}: expected a JSON object ({e}); restore the file") from e

    def fingerprint(self, result: Result) -> str | None:
        """Of the set's items: what the result says, else what the run says of its set."""
        found = fields(result)
        own = next((found[name] for name in _SET_FINGERPRINTS if name in found), None)
        known = self.sets.get(result.test_set) if isinstance(self.sets, Mapping) else None
        return own or (known.get("fingerprint") if isinstance(known, Mapping) else None)


def _change(key: tuple[str, str, str, str], run_a: _Run, run_b: _Run, seed: int) -> Change:
    old, new = run_a.results.get(key), run_b.results.get(key)
    there = new if new is not None else old
    assert there is not None
    about: dict[str, Any] = {"key": key, "unit": there.unit, "direction": there.direction}
    about |= {"old": None if old is None else old.value, "new": None if new is None else new.value}
    if old is None or new is None:
        return Change(**about, verdict="new" if old is None else "missing", why=there.not_run or "")
    unlike = differing(fields(old), fields(new))
    kept = {*_groups(old), "rate"}
    differs = {k: v for k, v in unlike.items() if field_group(k) in kept}
    prints = run_a.fingerprint(old), run_b.fingerprint(new)
    if prints[0] != prints[1] and None not in prints and not any(k in differs for k in _SET_FINGERPRINTS):
        differs["set_fingerprint"] = prints
    if (old.unit, old.direction) != (new.unit, new.direction):
        differs["unit"] = (f"{old.unit}, {old.direction}", f"{new.unit}, {new.direction}")
    about |= {"differs": differs, "also": {k: v for k, v in unlike.items() if k not in differs}}
    if old.value is None or new.value is None:
        both = (("old", old.not_run), ("new", new.not_run))
        why = "; ".join(f"{when}: {reason}" for when, reason in both if reason is not None)
        why = old.not_run if old.not_run is not None and old.not_run == new.not_run else why
        return Change(**about, verdict="not run", why=why)
    if differs:
        return Change(**about, verdict="not comparable")
    found, method = None, ""
    summary = str(fields(old).get("summary"))
    # Other parts' numbers are not in items.jsonl, and those of a whole set (Frechet distances) are no items' summary.
    pairs = key[0] == "reconstruction" and summary in SUMMARIES
    if pairs and prints[0] is not None and prints[0] == prints[1]:
        lines_a, lines_b = (run.lines.get((key[1], key[2]), ()) for run in (run_a, run_b))
        found = paired_difference(lines_a, lines_b, key[3], summary, seed)
        method = "" if found is None else f"paired, {found.count} items"
    if found is None:
        found = _of_intervals(old, new)
        method = "" if found.low is None else "from the two intervals"
    about |= {"change": found.value, "low": found.low, "high": found.high, "method": method}
    return Change(**about, verdict=_verdict(found, there.direction))


def _of_intervals(old: Result, new: Result) -> Difference:
    assert old.value is not None and new.value is not None
    count = min(old.count, new.count)
    if new.value == old.value:  # two infinite values are equal too
        return Difference(0.0, None, None, count, 0)
    value = new.value - old.value
    if old.low is None or old.high is None or new.low is None or new.high is None or not math.isfinite(value):
        return Difference(value, None, None, count, 0)
    low = value - math.hypot(new.value - new.low, old.high - old.value)
    high = value + math.hypot(new.high - new.value, old.value - old.low)
    return Difference(value, low, high, count, 0)


def _verdict(found: Difference, direction: str) -> str:
    if found.value == 0 and found.low in (None, 0.0) and found.high in (None, 0.0):
        return "equal"
    if found.low is None:
        return "no interval"
    if not found.certain:
        return "within chance"
    if direction == "neither":
        return "changed"
    return "better" if (found.value > 0) == (direction == "higher") else "worse"
