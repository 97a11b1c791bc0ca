"""Ids a second of `Vocab`: pack, unpack and salvage, over documents as a corpus has them.

Command:   python recipes/bench_vocab.py --out recipes/results
Writes:    bench-vocab.md (a table) and bench-vocab.json (every round, the machine, the versions).
Documents: a caption of 40 text ids before each picture of 256 or 1024 positions; a transcript of 60 text ids before
           each clip of 10 seconds (and one of 5 minutes) at the rates of real codecs; headers with the usual side
           entries, random codes. `damaged`: in the middle of every segment stands a header byte instead of a code.
Protocol:  one process, one thread, all operations in turn, CPU time of whole documents, median of the rounds.
Time:      about a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from benching.report import table
from tqdm import tqdm

from mmtok.tokens import Tokens, TokenSpec, write_atomic
from mmtok.vocab import Vocab

TEXT = 128_256
ORPHEUS = "frame:0,1,2,2,1,2,2"


def image(K: int, levels: int, positions: int) -> TokenSpec:
    return TokenSpec(f"image-{positions}x{levels}", "image", (K,) * levels, num_tokens=positions, fingerprint="bench")


def audio(K: int, strides: tuple[int, ...], rate: float) -> TokenSpec:
    name = f"audio-{len(strides)}x{K}"
    return TokenSpec(name, "audio", (K,) * len(strides), strides, frame_rate=rate, fingerprint="bench")


# What it is like, spec, layout, positions of a segment.
CASES: list[tuple[str, TokenSpec, str, int]] = [
    ("picture, 256 positions", image(16_384, 1, 256), "flatten", 256),
    ("picture, 1024 positions", image(8_192, 1, 1024), "flatten", 1024),
    ("picture, 256 x 16 levels (TokenBridge)", image(64, 16, 256), "flatten", 256),
    ("RVQ 8 x 1024, 50 Hz, 10 s", audio(1024, (1,) * 8, 50.0), "flatten", 500),
    ("RVQ 8 x 1024, 50 Hz, 10 s", audio(1024, (1,) * 8, 50.0), "delay", 500),
    ("RVQ 8 x 1024, 50 Hz, 10 s", audio(1024, (1,) * 8, 50.0), "partial_delay", 500),
    ("RVQ 8 x 1024, 50 Hz, 10 s", audio(1024, (1,) * 8, 50.0), "coarse_first", 500),
    ("SNAC 3 x 4096, 47 Hz, 10 s", audio(4096, (4, 2, 1), 24_000 / 512), "flatten", 472),
    ("SNAC 3 x 4096, 47 Hz, 10 s", audio(4096, (4, 2, 1), 24_000 / 512), ORPHEUS, 472),
    ("RVQ 8 x 1024, 50 Hz, 5 min", audio(1024, (1,) * 8, 50.0), "flatten", 15_000),
    ("RVQ 8 x 1024, 50 Hz, 5 min", audio(1024, (1,) * 8, 50.0), "delay", 15_000),
    ("SNAC 3 x 4096, 47 Hz, 5 min", audio(4096, (4, 2, 1), 24_000 / 512), ORPHEUS, 14_064),
]


def segment(spec: TokenSpec, T: int, rng: np.random.Generator) -> Tokens:
    """One item of random codes with the side entries that encode gives."""
    rows = [
        np.repeat(rng.integers(0, k, -(-T // s)), s)[:T]
        for k, s in zip(spec.codebook_sizes, spec.level_strides, strict=True)
    ]
    if spec.frame_rate is None:
        side = {"height": 256, "width": 256, "channels": 3, "bit_depth": 8}
    else:
        side = {"num_samples": int(T / spec.frame_rate * 24_000), "sample_rate": 24_000, "channels": 1}
    entries = {name: torch.tensor([value]) for name, value in side.items()}
    return Tokens(torch.from_numpy(np.stack(rows))[None], torch.tensor([T]), spec, entries)


def documents(spec: TokenSpec, T: int, num_ids: int, rng: np.random.Generator) -> list[list[list[int] | Tokens]]:
    """About ``num_ids`` ids in documents of four texts and four segments (one of a long segment)."""
    size = sum(-(-T // s) for s in spec.level_strides)
    pairs = 1 if size > 10_000 else 4
    count = max(1, round(num_ids / size / pairs))
    text = 40 if spec.modality == "image" else 60
    return [
        [part for _ in range(pairs) for part in (rng.integers(0, TEXT, text).tolist(), segment(spec, T, rng))]
        for _ in range(count)
    ]


def damage(vocab: Vocab, ids: list[int], modality: str) -> list[int]:
    """The ids with a header byte in the middle of every segment."""
    block = vocab.blocks[modality]
    array = np.array(ids)
    middles = (np.flatnonzero(array == block.begin) + np.flatnonzero(array == block.end)) // 2
    array[middles] = vocab.ranges["byte"].start
    return array.tolist()


def measure(case: tuple[str, TokenSpec, str, int], num_ids: int, rounds: int, seed: int) -> dict[str, Any]:
    """Seconds of CPU time of each operation in each round, over all documents of a case."""
    title, spec, layout, T = case
    rng = np.random.default_rng(seed)
    vocab = Vocab(TEXT, layout=layout, **{spec.modality: spec})
    parts = documents(spec, T, num_ids, rng)
    ids = [vocab.pack(document) for document in parts]
    damaged = [damage(vocab, document, spec.modality) for document in ids]
    for document, known in zip(parts, ids, strict=True):  # what is timed is right
        again = vocab.salvage(known)
        if not again.report.ok or vocab.pack(again.parts) != known or len(again.parts) != len(document):
            raise SystemExit(f"{title}, {layout}: the ids do not come back")
    kept = [vocab.salvage(document).report for document in damaged]
    operations: dict[str, tuple[Callable[[Any], Any], list, int]] = {
        "pack": (vocab.pack, parts, sum(map(len, ids))),
        "unpack": (vocab.unpack, ids, sum(map(len, ids))),
        "salvage": (vocab.salvage, ids, sum(map(len, ids))),
        "salvage, damaged": (vocab.salvage, damaged, sum(map(len, damaged))),
    }
    seconds: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(rounds):
        for name, (run, inputs, _) in operations.items():
            start = time.process_time()
            for each in inputs:
                run(each)
            seconds[name].append(time.process_time() - start)
    rates = {name: count / max(1e-9, statistics.median(seconds[name])) for name, (_, _, count) in operations.items()}
    return {
        "case": title,
        "layout": layout,
        "documents": len(ids),
        "ids_per_segment": round(sum(map(len, ids)) / len(ids) / (len(parts[0]) // 2)),
        "ids": operations["pack"][2],
        "damaged_places": sum(len(report.items) for report in kept),
        "seconds": seconds,
        "ids_per_second": rates,
    }


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(), "versions": versions}


def markdown(run: dict[str, Any]) -> str:
    names = list(run["rows"][0]["ids_per_second"])
    head = ["documents", "layout", "ids a segment", *(f"{name} (M ids/s)" for name in names)]
    rows = [
        [row["case"], f"`{row['layout']}`", f"{row['ids_per_segment']:,}"]
        + [f"{row['ids_per_second'][name] / 1e6:.2f}" for name in names]
        for row in run["rows"]
    ]
    made = f"{run['machine']['cpu']}, one thread, CPU time, median of {run['rounds']} rounds, {run['date']}"
    return f"# Vocab: millions of ids a second\n\n{made}. `{run['command']}`\n\n{table(head, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for bench-vocab.md and .json")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ids", type=int, default=400_000, help="about so many ids a case (default 400,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="few ids, two rounds: only checks the machinery")
    args = parser.parse_args()
    if args.rounds < 1 or args.ids < 1:
        raise SystemExit(f"--rounds and --ids: expected at least 1, got {args.rounds} and {args.ids}")
    rounds, num_ids = (2, 2_000) if args.smoke else (args.rounds, args.ids)
    cases = [(title, spec, layout, min(T, 40)) for title, spec, layout, T in CASES] if args.smoke else CASES
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    run = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "smoke": args.smoke,
        "rounds": rounds,
        "seed": args.seed,
        "machine": machine(),
        "rows": [measure(case, num_ids, rounds, args.seed) for case in tqdm(cases, desc="cases", disable=None)],
    }
    text = markdown(run)
    write_atomic(args.out / "bench-vocab.json", (json.dumps(run, indent=1) + "\n").encode())
    write_atomic(args.out / "bench-vocab.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
