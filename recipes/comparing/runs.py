"""What README compares, one run a kind of material: sets, tokenizers with their rates, baselines, classical codecs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import mmtok
from mmtok.bench.contenders import Contender, open_contenders
from mmtok.bench.records import Result, read_results
from mmtok.bench.run import BUILTIN

TRAIN_BASELINES = "python recipes/baselines_vq.py --data data --out {}"
FIRST_PARTS = ("reconstruction", "tokens", "systems")  # of every contender
STUDIES = ("probes", "language")  # of one rate a learned tokenizer: each trains networks of its own


@dataclasses.dataclass(frozen=True)
class Run:
    """One folder of the benchmark.

    Args:
        sets: named sets, the first is that of most tables.
        shipped, baselines, classical: contenders, spelled as `mmtok.bench.contenders` says; baselines are names of
            `recipes/baselines_vq.py`. Tables have them in this order.
        studied: labels that also get probes and language models.
        smoke: contenders that show that it runs, on what ships with mmtok.
    """

    sets: tuple[str, ...]
    shipped: tuple[str, ...]
    baselines: tuple[str, ...]
    classical: tuple[str, ...]
    studied: tuple[str, ...]
    smoke: tuple[str, ...]


RUNS: dict[str, Run] = {
    "photos": Run(
        ("photos", "photos-reduced"),
        ("image-binary1d-64x64",),
        ("vq2d-128px-512B",),
        ("jpeg#bytes=512", "webp#bytes=512", "avif#bytes=512", "jpeg2000#bytes=512"),
        ("image-binary1d-64x64", "vq2d-128px-512B"),
        ("image-binary1d-64x64", "jpeg#bytes=512"),
    ),
    "crops": Run(
        ("crops-64",),
        ("image-bridge-f8-16x6",),
        ("vq2d-64px-768B",),
        ("jpeg#bytes=768", "webp#bytes=768", "avif#bytes=768", "jpeg2000#bytes=768"),
        ("image-bridge-f8-16x6", "vq2d-64px-768B"),
        ("webp#bytes=768",),
    ),
    "captioned": Run(
        ("captioned",),
        ("image-causal1d-16x8", "image-dynamic-49x10", "image-textok-64px-16x10", "image-textok-64px-16x10#text"),
        ("vq2d-64px-16B", "vq2d-64px-20B"),
        (),
        ("image-causal1d-16x8", "image-dynamic-49x10", "image-textok-64px-16x10", "vq2d-64px-16B", "vq2d-64px-20B"),
        ("image-textok-64px-16x10",),
    ),
    "speech": Run(
        ("speech",),
        (
            "audio-codec-16k-4kbps#levels=8,4,2",
            "audio-causal-16k-4kbps#levels=8,4,2",
            "audio-xcodec-16k-4kbps#levels=8,4,2",
        ),
        ("vq1-16k-1kbps",),
        ("opus:6000", "mp3:8000", "codec2:3200", "codec2:1200"),
        (  # all at 1 kbit/s, so that their bits compare
            "audio-codec-16k-4kbps#levels=2",
            "audio-causal-16k-4kbps#levels=2",
            "audio-xcodec-16k-4kbps#levels=2",
            "vq1-16k-1kbps",
        ),
        ("audio-codec-16k-4kbps#levels=8", "opus:6000"),
    ),
}


def run_of(checkpoint: str) -> str:
    """The run that a shipped tokenizer is in."""
    return next(name for name, run in RUNS.items() if checkpoint in {spelled_name(s) for s in run.shipped})


def spelled_name(label: str) -> str:
    """``a#levels=2`` -> ``a``."""
    return label.partition("#")[0]


def opened(run: Run, baselines: Path, device: str, helpers: Path | None) -> tuple[list[Contender], list[str]]:
    """The run's contenders in the tables' order, and what is missing, each with what to do."""
    found, missing = [], []
    for spelled in run.shipped:
        found += open_contenders([spelled], device, helpers)
    for name in run.baselines:
        folder = baselines / f"{name}-s0"
        if not (folder / "finished.json").is_file():  # a training that goes on has a folder `tokenizer` too
            command = f"{TRAIN_BASELINES.format(baselines)} --variants {name}"
            missing.append(f"{name}: no finished training at {folder}; run `{command}`, then this again")
            continue
        tokenizer = mmtok.load(folder / "tokenizer", device)
        tokenizer.name = name
        found.append(Contender(name, tokenizer.eval(), source=str((folder / "tokenizer").absolute())))
    for spelled in run.classical:
        try:
            found += open_contenders([spelled], device)
        except ImportError as e:
            missing.append(f"{spelled}: {e}")
    return found, missing


def stored_path(results: Path, run: str) -> Path:
    return results / f"bench-{run}.jsonl"


def stored(results: Path, run: str) -> list[Result]:
    """The stored results of a run, none where there are none yet."""
    path = stored_path(results, run)
    return read_results(path) if path.is_file() else []


def as_in_readme(results: Sequence[Result], run: str) -> list[Result]:
    """The results with those of a smoke run under the name of the set that tables look for."""
    first = RUNS[run].sets[0]
    return [dataclasses.replace(r, test_set=first) if r.test_set in BUILTIN.values() else r for r in results]


def labels_of(run: Run) -> list[str]:
    """The labels of a run's contenders in the tables' order."""
    found = []
    for spelled in (*run.shipped, *run.baselines, *run.classical):
        name, _, options = spelled.partition("#")
        key, _, values = options.partition("=")
        several: Sequence[str] = values.split(",") if values else ()
        found += [f"{name}#{key}={v}" for v in several] if len(several) > 1 else [spelled]
    return found
