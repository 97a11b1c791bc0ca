"""The folder of a run: what was asked for, lines of items, kept codes and features, and one writer at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from mmtok.bench.records import (
    CODES,
    FEATURES,
    ITEMS,
    JOBS,
    RESULTS,
    RUN,
    Result,
    append_line,
    read_lines,
    read_results,
    result_line,
    result_of,
)
from mmtok.tokens import Tokens, write_atomic

FORMAT = "mmtok-bench-1"
LOCK = ".lock"
# Of the record in run.json: what must be as before; of these, entries that both runs have.
FIXED = ("format", "seed", "smoke", "device")
SHARED = ("sets", "contenders", "scorers", "options")


class RunFolder:
    """A run's folder, opened for writing: ``with RunFolder(out) as folder``.

    Raises:
        ValueError: another run is at work there, or ``out`` is a file or a folder of something else.
    """

    def __init__(self, out: str | Path):
        self.path = Path(out)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out: expected a folder, {out} is a file; choose another name")
        if self.path.is_dir() and any(self.path.iterdir()) and not _is_run(self.path):
            raise ValueError(f"out: {out} holds other files and no {RUN}; choose a new or empty folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / LOCK).open("a+")
        self.lines: dict[tuple[str, str, int], dict[str, Any]] = {}
        self.jobs: dict[str, list[Result]] = {}

    def __enter__(self) -> RunFolder:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._lock.seek(0)
            process = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise ValueError(
                f"{self.path}: another run (process {process}) is at work there; wait for it, or choose another folder"
            ) from e
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        try:
            for line in read_lines(self.path / ITEMS):
                self.lines[str(line["contender"]), str(line["set"]), int(line["index"])] = line
            for line in read_lines(self.path / JOBS):
                self.jobs[str(line["job"])] = [result_of(r) for r in line["results"]]
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._lock.close()  # and with it the lock

    def begin(self, record: Mapping[str, Any]) -> None:
        """Write ``run.json``: of a new run the ``record``, of one that goes on what it adds to the former.

        Raises:
            ValueError: the folder's run was made under another protocol, with every difference.
        """
        path = self.path / RUN
        full = {**record}
        if path.is_file():
            before = read_run(self.path)
            if differ := _differences(before, record):
                shown = "; ".join(differ[:5]) + (f"; and {len(differ) - 5} more" if len(differ) > 5 else "")
                raise ValueError(
                    f"{self.path} holds a run of another protocol: {shown}. Repeat that one, or choose another folder"
                )
            for name in (*SHARED, "bad_files"):
                full[name] = {**before.get(name, {}), **record.get(name, {})}
            for scorer, known in before.get("scorers", {}).items():
                if "not_run" in full["scorers"][scorer]:
                    full["scorers"][scorer] = known
            for name in ("commands", "machines", "parts"):
                known = before.get(name, [])
                full[name] = known + [x for x in record.get(name, []) if x not in known]
            full["started"] = before.get("started", record.get("started"))
        self.update(full)

    def update(self, record: Mapping[str, Any]) -> None:
        text = json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
        write_atomic(self.path / RUN, text.encode())

    def add_line(self, line: Mapping[str, Any]) -> None:
        append_line(self.path / ITEMS, line)
        self.lines[str(line["contender"]), str(line["set"]), int(line["index"])] = dict(line)

    def add_job(self, key: str, results: Sequence[Result]) -> None:
        append_line(self.path / JOBS, {"job": key, "results": [result_line(r) for r in results]})
        self.jobs[key] = list(results)

    def lines_of(self, contender: str, test_set: str) -> list[dict[str, Any]]:
        found = [line for (label, name, _), line in self.lines.items() if (label, name) == (contender, test_set)]
        return sorted(found, key=lambda line: line["index"])

    def codes_path(self, contender: str, test_set: str, index: int) -> Path:
        return self.path / CODES / file_name(test_set) / file_name(contender) / f"{index:05d}.safetensors"

    def save_codes(self, contender: str, test_set: str, index: int, tokens: Tokens) -> None:
        path = self.codes_path(contender, test_set, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        tokens.save(path)

    def load_codes(self, contender: str, test_set: str, index: int) -> Tokens | None:
        path = self.codes_path(contender, test_set, index)
        return Tokens.load(path) if path.is_file() else None

    def features_path(self, scorer: str, contender: str, test_set: str, index: int) -> Path:
        return self.path / FEATURES / scorer / file_name(test_set) / file_name(contender) / f"{index:05d}.safetensors"

    def save_features(self, scorer: str, contender: str, test_set: str, index: int, features: Tensor) -> None:
        from safetensors.torch import save

        path = self.features_path(scorer, contender, test_set, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save({"features": features.detach().float().cpu().contiguous()}))

    def load_features(self, scorer: str, contender: str, test_set: str, index: int) -> Tensor | None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.features_path(scorer, contender, test_set, index)
        if not path.is_file():
            return None
        try:
            return load_file(path)["features"]
        except (SafetensorError, KeyError) as e:
            raise ValueError(f"{path}: damaged features ({e}); delete the file and run again") from e

    def old_results(self) -> list[Result]:
        return read_results(self.path) if (self.path / RESULTS).is_file() else []

    def write_results(self, results: Sequence[Result]) -> None:
        lines = (json.dumps(result_line(r), ensure_ascii=False, allow_nan=False) + "\n" for r in results)
        write_atomic(self.path / RESULTS, "".join(lines).encode())


def read_run(out: str | Path) -> dict[str, Any]:
    """``run.json`` of a run's folder. Raises FileNotFoundError, or ValueError for a damaged one."""
    path = Path(out) / RUN
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no run there; `mmtok bench ... --out {out}` begins one")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: expected JSON ({e}); restore the file, or choose another folder") from e
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a run of format {FORMAT!r}; written by another mmtok?")
    return found


def failures(out: str | Path) -> list[str]:
    """What failed in the last command of a run, one line each; a caller with some exits with code 1."""
    return [str(line) for line in read_run(out).get("failures", [])]


def file_name(label: str) -> str:
    """A label as the name of a file or folder: readable, and no two labels share one."""
    plain = re.sub(r"[^A-Za-z0-9._=-]+", "-", label).strip(".-")[:80]
    return plain if plain == label else f"{plain}-{hashlib.sha1(label.encode()).hexdigest()[:8]}"


def command_line() -> str:
    """How this process was called."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _is_run(path: Path) -> bool:
    names = {p.name for p in path.iterdir()}
    return RUN in names or names <= {LOCK}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a run that goes on may not change, in words: ``sets.photos.fingerprint: a there, b now``."""
    pairs: list[tuple[str, Any, Any]] = [(name, before.get(name), now.get(name)) for name in FIXED]
    for name in SHARED:
        old, new = before.get(name, {}), now.get(name, {})
        pairs += [(f"{name}.{key}", old[key], new[key]) for key in new if key in old]
    plain = json.loads(json.dumps([list(p) for p in pairs]))  # tuples become lists, as they do in the file
    return [line for name, old, new in plain for line in _unlike(name, old, new)]


def _unlike(name: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        if "not_run" in old or "not_run" in new:  # a scorer that was missing may come, or go
            return
        for key in [*old, *(k for k in new if k not in old)]:
            yield from _unlike(f"{name}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield f"{name} is {json.dumps(old, ensure_ascii=False)} there and {json.dumps(new, ensure_ascii=False)} now"
