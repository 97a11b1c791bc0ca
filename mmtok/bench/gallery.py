"""What the report shows of a run: each contender's worst item of a set and two ordinary ones, from the kept codes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtok.bench.contenders import Contender
from mmtok.bench.records import GALLERY, Item, TestSet
from mmtok.bench.run_folder import RunFolder, file_name
from mmtok.bench.scorers import Measure
from mmtok.bench.summary import line_value
from mmtok.data.audio import write_audio
from mmtok.data.images import write_image
from mmtok.tokens import write_atomic

INDEX = "index.json"
MOST, ORDINARY = 12, 2  # items of a set in all, and those from the middle
# What an item is chosen by: the first of these that the run has.
MAIN = {"image": ("psnr", "ssim"), "audio": ("pesq_wb", "mel_distance", "si_sdr_aligned", "stoi")}


def main_measure(modality: str, measures: Mapping[str, Measure], lines: Sequence[Mapping[str, Any]]) -> Measure | None:
    """The measure that items are chosen by: of `MAIN`, else any with a better side; None where no line has one."""
    names = [*MAIN[modality], *measures]
    judging = [measures[n] for n in names if n in measures and measures[n].direction != "neither"]
    return next((m for m in judging if any(line_value(line, m.name) for line in lines)), None)


def choose(
    lines: Mapping[str, Sequence[Mapping[str, Any]]], measure: Measure, most: int = MOST
) -> list[tuple[int, str]]:
    """Which items to show, in the set's order, and why.

    Args:
        lines: contender -> its lines of the set.
        measure: what is worst is said by.
        most: items in all.

    Returns:
        (index, reason): the worst item of each contender, and two whose mean rank over contenders is in the middle.
    """
    scores: dict[str, dict[int, float]] = {}
    for label, own in lines.items():
        pairs = [(int(line["index"]), _badness(line, measure)) for line in own]
        scores[label] = {index: bad for index, bad in pairs if bad is not None}
    ranks: dict[int, list[float]] = {}
    for own in scores.values():
        for rank, index in enumerate(sorted(own, key=lambda i: (own[i], i))):
            ranks.setdefault(index, []).append(rank / max(1, len(own) - 1))
    order = sorted(ranks, key=lambda i: (sum(ranks[i]) / len(ranks[i]), i))
    middle = max(0, (len(order) - ORDINARY) // 2)
    reasons: dict[int, list[str]] = {i: [f"median by {measure.name}"] for i in order[middle : middle + ORDINARY]}
    for label, own in scores.items():
        if own:
            worst = max(own, key=lambda i: (own[i], -i))
            if worst in reasons or len(reasons) < most:
                reasons.setdefault(worst, []).append(f"worst of {label} by {measure.name}")
    return [(index, "; ".join(reasons[index])) for index in sorted(reasons)]


def _badness(line: Mapping[str, Any], measure: Measure) -> float | None:
    """Larger is worse; errors of a pair by what they are counted on."""
    value = line_value(line, measure.name)
    if value is None or (len(value) == 2 and not value[1]) or any(math.isnan(v) for v in value):
        return None
    number = value[0] / value[1] if len(value) == 2 else value[0]
    return -number if measure.direction == "higher" else number


def write_gallery(
    folder: RunFolder,
    test_set: TestSet,
    contenders: Sequence[Contender],
    measures: Mapping[str, Measure],
    seed_of: Callable[[Item], int],
) -> None:
    """Write ``gallery/<set>/`` and its part of ``gallery/index.json``.

    Contenders of an earlier command are shown where their reconstruction is there already.
    """
    lines: dict[str, list[dict[str, Any]]] = {}
    for (label, name, _), line in sorted(folder.lines.items(), key=lambda entry: entry[0][2]):
        if name == test_set.name and "decode_seconds" in line:
            lines.setdefault(label, []).append(line)
    measure = main_measure(test_set.modality, measures, [line for own in lines.values() for line in own])
    chosen = [] if measure is None else choose(lines, measure)
    root = folder.path / GALLERY
    place = root / file_name(test_set.name)
    place.mkdir(parents=True, exist_ok=True)
    for old in place.iterdir():
        if old.name not in {str(index) for index, _ in chosen}:
            shutil.rmtree(old)
    loaded = {c.label: c for c in contenders}
    entries = []
    for index, why in chosen:
        item, here = test_set.items[index], place / str(index)
        here.mkdir(exist_ok=True)
        suffix = ".png" if test_set.modality == "image" else ".wav"
        original = _written(here / f"original{suffix}", item.reference, item)
        versions = []
        for label, own in lines.items():
            line = next((x for x in own if int(x["index"]) == index), None)
            if line is None:
                continue
            path = here / f"{file_name(label)}{suffix}"
            codes = here / f"{file_name(label)}.codes.safetensors"
            if not (path.is_file() and codes.is_file()):
                tokens = folder.load_codes(label, test_set.name, index)
                if label not in loaded or tokens is None:
                    continue
                torch.manual_seed(seed_of(item))
                _written(path, loaded[label].decode(tokens, item), item)
                tokens.save(codes)
            versions.append(
                {
                    "contender": label,
                    "path": path.relative_to(root).as_posix(),
                    "codes": codes.relative_to(root).as_posix(),
                    "bits": line["bits"],
                    "values": line["values"],
                }
            )
        entries.append(
            {
                "set": test_set.name,
                "modality": test_set.modality,
                "item": item.key,
                "index": index,
                "text": item.text,
                "why": why,
                "original": original.relative_to(root).as_posix(),
                "sample_rate": item.sample_rate,
                "versions": versions,
            }
        )
    known = json.loads((root / INDEX).read_text()) if (root / INDEX).is_file() else []
    whole = [entry for entry in known if entry["set"] != test_set.name] + entries
    write_atomic(root / INDEX, (json.dumps(whole, ensure_ascii=False, indent=1) + "\n").encode())


def _written(path: Path, x: Tensor, item: Item) -> Path:
    if not path.is_file():
        if item.sample_rate is None:
            write_image(path, x)
        else:
            write_audio(path, x, item.sample_rate)
    return path
