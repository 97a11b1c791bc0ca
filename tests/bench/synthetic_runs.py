"""Runs of made-up numbers: items.jsonl and results.jsonl without any tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmtok.bench.records import Result, result_line
from mmtok.bench.scorers import Measure
from mmtok.bench.summary import rate_results, summarise

PSNR = Measure("psnr", "dB", "higher", "peak signal to noise")
WER = Measure("wer", "1", "lower", "word errors", "ratio")
DELAY = Measure("delay", "sample", "neither", "delay", "median")
SET = {"set": "photos", "set_fingerprint": "0f0f", "crop": "center", "resampler": "none", "backend": "made up"}


def line(item: int, contender: str = "a", test_set: str = "photos", **more: Any) -> dict[str, Any]:
    """One line of items.jsonl; ``more`` replaces its fields."""
    plain = {"contender": contender, "set": test_set, "item": f"i{item}", "index": item, "bits": 512.0, "pixels": 4096}
    return {**plain, "values": {}, "unscored": {}, **more}


def psnr_lines(values: Sequence[float], contender: str = "a", bits: float = 512.0) -> list[dict[str, Any]]:
    return [line(i, contender, bits=bits, values={"psnr": float(v)}) for i, v in enumerate(values)]


def psnr_run(
    folder: Path,
    values: Mapping[str, Sequence[float]],
    protocol: Mapping[str, Any] = SET,
    bits: Mapping[str, float] | None = None,
) -> Path:
    """A run's folder with the PSNR of each contender's items."""
    lines = [x for name, v in values.items() for x in psnr_lines(v, name, (bits or {}).get(name, 512.0))]
    results: list[Result] = []
    for name in values:
        about = {"contender": name, "test_set": "photos", "protocol": {**protocol, "tokenizer": name}}
        results += rate_results(lines, **about) + summarise(lines, [PSNR], **about)
    return write_run(folder, results, lines)


def write_run(folder: Path, results: Sequence[Result], lines: Sequence[Mapping[str, Any]] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(result_line(r)) + "\n" for r in results))
    if lines:
        (folder / "items.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def result(contender: str = "a", metric: str = "psnr", value: float | None = 20.0, **more: Any) -> Result:
    plain = {"part": "reconstruction", "test_set": "photos", "unit": "dB", "direction": "higher", "protocol": SET}
    return Result(contender=contender, metric=metric, value=value, **{**plain, **more})


def spread(mean: float, count: int = 60, seed: int = 0) -> np.ndarray:
    """Items whose mean is exactly ``mean`` and whose standard deviation is about 2."""
    x = np.random.default_rng(seed).normal(0, 2, count)
    return x - x.mean() + mean
