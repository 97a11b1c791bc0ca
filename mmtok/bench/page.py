"""The benchmark's page: one HTML file of a run that sorts, plots, plays and compares, and loads nothing from elsewhere.

The page holds its numbers once, as JSON, and a script (``mmtok/assets/bench_report.js``) draws all that is seen. Its
content security policy names that script and that style by their hashes and allows no address: texts of a run (item
keys, transcripts) can neither run nor load anything.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import math
import wave
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from mmtok.bench import plots, records, report, tables
from mmtok.tokens import Tokens, write_atomic

MAX_SIDE = 1024  # px; of larger pictures the middle is shown, so that a pixel stays a pixel
MAX_SECONDS = 12.0  # longer sounds are shown by their beginning
MAX_POSITIONS = 1500  # of a token map
MAX_MEDIA = 48 * 2**20  # bytes of pictures and sounds in one page; what comes after is left out
MAX_VALUES = 1_000_000  # values of single items in one page
LANGUAGE = "language"
PARTS = ("reconstruction", "tokens", "systems", "probes", LANGUAGE)
SECTIONS = (
    ("numbers", "Numbers"),
    ("plots", "Rate and distortion"),
    ("gallery", "Gallery"),
    ("items", "Item by item"),
    ("samples", "Generated samples"),
    ("missing", "Not run"),
)


def write_page(run_folder: Path, path: Path) -> None:
    """Write the page of a run as one HTML file; written aside, then renamed.

    Args:
        run_folder: what `mmtok bench --out` wrote; a run that was cut short is shown as far as it came.
        path: the file to write.

    Raises:
        FileNotFoundError: the run has no results, or the folder of ``path`` does not exist.
        ValueError: a damaged file of the run, with its name.
    """
    write_atomic(path, render(Path(run_folder)).encode("utf-8"))


def render(run_folder: Path) -> str:
    """The page as text; see `write_page`."""
    results = records.read_results(run_folder)
    run = _json(run_folder / records.RUN, {})
    media = _Media(run_folder)
    items = _items(run_folder / records.ITEMS)
    data = {
        "run": run,
        **_tables(results, items),
        "items": {name: _item_values(one, media.remarks) for name, one in items.items()},
        "gallery": _gallery(run_folder / records.GALLERY, media),
        "samples": _samples(run_folder, media),
        "rates": tables.RATE_METRICS,
        "original": tables.ORIGINAL,
        "heat": report.HEAT,
        "floor": report.FLOOR_DB,
    }
    data["remarks"] = media.all_remarks()
    return _document(_title(run), data, media.blocks)


def _title(run: Mapping[str, Any]) -> str:
    return str(run.get("title") or "mmtok benchmark")


def _document(title: str, data: Mapping[str, Any], blocks: Sequence[str]) -> str:
    style, script = (_asset(f"bench_report.{kind}") for kind in ("css", "js"))
    # Media are blocks of their own: the script reads one when it is looked at, and parses only the numbers at once.
    policy = (
        f"default-src 'none'; img-src data:; media-src blob: data:; style-src {_hash(style)}; "
        f"script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    sections = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title" hidden><h2 id="{key}-title">{name}</h2></section>'
        for key, name in SECTIONS
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body>"
        f'<header id="top"><h1>{html.escape(title)}</h1></header>'
        '<nav id="bar" aria-label="Sections and filters"></nav>'
        "<noscript><p>This page draws its tables and plots with its own script; nothing is loaded from elsewhere. "
        "Allow scripts for this file to read it.</p></noscript>"
        f'<main>{sections}</main><dialog id="protocol" aria-labelledby="protocol-title"></dialog>'
        '<div id="tip" role="status" hidden></div><div id="live" role="status" class="unseen"></div>'
        '<svg id="svg" width="0" height="0" aria-hidden="true"></svg>'
        f'<script type="application/json" id="data">{_inert(data)}</script>{"".join(blocks)}'
        f"<script>{script}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("mmtok.assets").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def _inert(data: Any) -> str:
    """JSON that cannot close its script element: no ``<`` is left in it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _json(path: Path, missing: Any) -> Any:
    if not path.is_file():
        return missing
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
    except ValueError as e:
        raise ValueError(f"{path}: expected JSON ({e}); restore the file, or run the benchmark again") from e


# --- numbers ---------------------------------------------------------------------------------------------------------


class _Pool:
    """Equal values once: protocols repeat most of what they say."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.at: dict[str, int] = {}

    def index(self, value: Any) -> int:
        key = json.dumps(value, sort_keys=True)
        if key not in self.at:
            self.at[key] = len(self.values)
            self.values.append(value)
        return self.at[key]


def _tables(results: Sequence[records.Result], items: Mapping[str, dict]) -> dict[str, Any]:
    """Tables of a set each, and one for the tasks of a modality that are no sets; values, protocols and texts pooled.

    A cell is [row, value, low, high, count, interval, not_run, protocol, mark]: interval and not_run are places in the
    pool, protocol one in the protocols, which are lists of alternating places of keys and values; mark is 1 for the
    best of the column, 2 for another protocol than most of it.
    """
    values, protocols = _Pool(), _Pool()
    modality_of = {c: one["modality"] for one in items.values() for c in one["lines"]}
    main = {r.test_set for r in results if r.part == "reconstruction"} | set(items)
    found: dict[str, dict[str, Any]] = {}

    def place(table: tables.Table) -> tuple[str, str, str | None]:
        if table.test_set in main:
            return table.test_set, items.get(table.test_set, {}).get("modality", ""), None
        modality = next((modality_of[c] for c in table.contenders if c in modality_of), "")
        return f"Tasks ({modality})" if modality else "Tasks", modality, table.test_set

    def cell(row: int, r: records.Result, mark: int) -> list[Any]:
        line = records.result_line(r)
        told = protocols.index([values.index(x) for pair in sorted(r.protocol.items()) for x in pair])
        texts = [None if t is None else values.index(t) for t in (r.interval, r.not_run)]
        return [row, line["value"], line["low"], line["high"], r.count, *texts, told, mark]

    for part in sorted({r.part for r in results}, key=lambda p: (PARTS.index(p) if p in PARTS else len(PARTS), p)):
        for table in tables.make_tables(results, part=part):
            name, modality, task = place(table)
            one = found.setdefault(
                name, {"name": name, "modality": modality, "task": task is not None, "rows": [], "columns": []}
            )
            one["rows"] += [c for c in table.contenders if c not in one["rows"]]
            for j, about in enumerate(table.columns):
                told = {**dataclasses.asdict(about), "title": about.title}
                column = {"part": part, "task": task, **told, "cells": []}
                for i, contender in enumerate(table.contenders):
                    r = table.cells[i][j]
                    if r is not None:
                        mark = (1 if (i, j) in table.best else 0) + (2 if (i, j) in table.odd else 0)
                        column["cells"].append(cell(one["rows"].index(contender), r, mark))
                one["columns"].append(column)
    order = sorted(found.values(), key=lambda t: t["task"])
    families = {c: plots.family(c) for c in dict.fromkeys(c for t in order for c in t["rows"])}
    return {"tables": order, "families": families, "pool": values.values, "protocols": protocols.values}


def _items(path: Path) -> dict[str, dict]:
    """Set -> modality, keys by index and each contender's lines by index; of one item the last line counts."""
    found: dict[str, dict] = {}
    for line in records.read_lines(path):
        one = found.setdefault(line["set"], {"modality": "", "keys": {}, "lines": {}})
        one["modality"] = "image" if line.get("pixels") is not None else "audio"
        one["keys"][line["index"]] = line["item"]
        one["lines"].setdefault(line["contender"], {})[line["index"]] = line
    return found


def _item_values(one: Mapping[str, Any], remarks: list[str]) -> dict[str, Any]:
    """Item keys in order, and each contender's values of each measure in that order, to 5 digits."""
    measures = list(dict.fromkeys(m for c in one["lines"].values() for line in c.values() for m in line["values"]))
    keys = sorted(one["keys"])
    step = math.ceil(len(keys) * len(measures) * len(one["lines"]) / MAX_VALUES) if keys else 1
    shown = keys[:: max(step, 1)]
    if len(shown) < len(keys):
        remarks.append(f"Item by item: one item in {step} of {len(keys)} is in the page.")
    values = {
        contender: {m: [_scalar(lines[i]["values"].get(m)) if i in lines else None for i in shown] for m in measures}
        for contender, lines in one["lines"].items()
    }
    return {"indices": shown, "keys": [one["keys"][i] for i in shown], "measures": measures, "values": values}


def _scalar(value: Any) -> float | str | None:
    if isinstance(value, list):  # errors, and what they are counted on
        value = value[0] / value[1] if value[1] else None
    return value if value is None or isinstance(value, str) else float(f"{value:.5g}")


# --- pictures, sounds, codes -----------------------------------------------------------------------------------------


class _Media:
    """Pictures and sounds as blocks of base64, each once, until the page is full."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.blocks: list[str] = []
        self.remarks: list[str] = []
        self.cut: Counter[str] = Counter()
        self.at: dict[Path, dict[str, Any] | None] = {}
        self.size = 0

    def all_remarks(self) -> list[str]:
        return [*self.remarks, *(f"{text}: {count}." for text, count in self.cut.items())]

    def add(self, folder: Path, name: str) -> dict[str, Any] | None:
        """The block of a PNG or WAV of the run, {"media": number, ...}; None where it is missing or left out."""
        path = self.inside(folder, name)
        if path not in self.at:
            self.at[path] = self._read(path) if path.is_file() else None
            if not path.is_file():
                self.cut["Pictures or sounds that the run's folder lacks"] += 1
        return self.at[path]

    def inside(self, folder: Path, name: str) -> Path:
        path = (folder / name).resolve()
        if not path.is_relative_to(self.root):
            raise ValueError(f"{folder}: expected paths inside the run's folder, got {name!r}")
        return path

    def _read(self, path: Path) -> dict[str, Any] | None:
        sound = path.suffix.lower() != ".png"
        content, about = self._sound(path) if sound else self._picture(path)
        if self.size + len(content) > MAX_MEDIA:
            self.cut[f"Pictures and sounds left out past {MAX_MEDIA / 2**20:g} MiB in one page"] += 1
            return None
        self.size += len(content)
        number, text = len(self.blocks), base64.b64encode(content).decode("ascii")
        self.blocks.append(f'<script type="text/plain" id="media-{number}">{text}</script>')
        return {"media": number, **about}

    def _picture(self, path: Path) -> tuple[bytes, dict[str, Any]]:
        from PIL import Image

        with Image.open(path) as image:
            width, height = image.size
            if max(width, height) <= MAX_SIDE:
                return path.read_bytes(), {"width": width, "height": height, "whole": [width, height]}
            self.cut[f"Pictures of which the middle {MAX_SIDE} x {MAX_SIDE} px are shown"] += 1
            w, h = min(width, MAX_SIDE), min(height, MAX_SIDE)
            left, top = (width - w) // 2, (height - h) // 2
            middle = np.asarray(image.convert("RGB").crop((left, top, left + w, top + h)))
        return report.png(middle), {"width": w, "height": h, "whole": [width, height]}

    def _sound(self, path: Path) -> tuple[bytes, dict[str, Any]]:
        content, sample_rate, length, kept = _sixteen_bits(path)
        if kept < length:
            self.cut[f"Sounds shown by their first {MAX_SECONDS:g} s"] += 1
        return content, {"seconds": kept / sample_rate, "sample_rate": sample_rate, "whole": length / sample_rate}

    def codes(self, folder: Path, name: str | None) -> dict[str, Any] | None:
        """Codes of the one item in a file of `Tokens.save`, level by level."""
        if name is None or not self.inside(folder, name).is_file():
            return None
        tokens = Tokens.load(self.inside(folder, name))
        positions = int(tokens.lengths[0])
        if positions > MAX_POSITIONS:
            self.cut[f"Token maps shown by their first {MAX_POSITIONS} positions"] += 1
        levels = tokens.codes[0, :, : min(positions, MAX_POSITIONS)].tolist()
        return {"levels": levels, "sizes": tokens.spec.codebook_sizes, "positions": positions}


def _sixteen_bits(path: Path) -> tuple[bytes, int, int, int]:
    """A sound's beginning as a 16-bit WAV file, its sample rate in Hz, its samples, and how many of them are kept."""
    from mmtok.data.audio import read_audio

    try:
        with wave.open(str(path)) as f:
            if f.getsampwidth() == 2:  # the very samples
                channels, sample_rate, length = f.getnchannels(), f.getframerate(), f.getnframes()
                kept = min(length, math.ceil(MAX_SECONDS * sample_rate))
                x = np.frombuffer(f.readframes(kept), "<i2").reshape(-1, channels).T / np.float32(32767)
                return report.wav(x, sample_rate), sample_rate, length, kept
    except (wave.Error, EOFError):
        pass  # another kind of file
    x, sample_rate = read_audio(path)
    kept = min(x.shape[1], math.ceil(MAX_SECONDS * sample_rate))
    return report.wav(x[:, :kept].numpy(), sample_rate), sample_rate, x.shape[1], kept


def _gallery(folder: Path, media: _Media) -> list[dict[str, Any]]:
    found = []
    for entry in _json(folder / "index.json", []):
        one = {k: entry.get(k) for k in ("set", "modality", "item", "index", "text", "why")}
        one["original"] = media.add(folder, entry["original"])
        if one["original"] is None:  # the page is full, or there is nothing to compare with
            continue
        one["versions"] = [
            {
                "contender": version["contender"],
                "bits": version.get("bits"),
                "values": {m: _scalar(v) for m, v in (version.get("values") or {}).items()},
                "file": media.add(folder, version["path"]) if version.get("path") else None,
                "codes": media.codes(folder, version.get("codes")),
            }
            for version in entry.get("versions", [])
        ]
        found.append(one)
    return found


def _samples(run_folder: Path, media: _Media) -> list[dict[str, Any]]:
    """What language models made: the entries of every ``language/*/index.json``, with the file and all they say."""
    return [
        {"from": path.parent.name, "file": media.add(path.parent, entry["path"]), "about": about}
        for path in sorted((run_folder / LANGUAGE).glob("*/index.json"))
        for entry in _entries(path)
        # No prompt is nothing to tell, of pictures least of all.
        for about in [{k: v for k, v in entry.items() if k != "path" and (k, v) != ("prompt_seconds", 0)}]
    ]


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    found = _json(path, [])
    for entry in found.get("samples", []) if isinstance(found, dict) else found:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise ValueError(f"{path}: expected a list of objects with a path, got {str(entry)[:60]}")
        yield entry
