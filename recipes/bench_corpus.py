"""What a corpus run costs and how fast its tokens are read again, and what that makes of a billion images.

Command:   python recipes/bench_corpus.py --data data --out runs/bench-corpus --results recipes/results
           python recipes/bench_corpus.py --files 50          a small one; --smoke: generated files, no Ray
Data:      --files pictures and as many clips of speech, drawn by --seed from data/ (recipes/fetch_data.py), texts too.
           audio-codec-16k-4kbps reads the speech, image-binary1d-64x64 and jpeg:50 the pictures; JPEG has no network,
           so that its run shows what all the rest costs.
Protocol:  one-by-one and `tokenize_shard` take turns, shard by shard, in one process with one thread for the model; the
           engines run one after another on empty folders, timed from the first shard's start to the last one's end,
           without loading. Memory is the resident set of all workers of the run with one local worker, sampled four
           times a second; its slope is fitted to the second half. Readers take turns in one process, round by round,
           over the same codes in the page cache; compared are the CPU seconds of the same round (wall where processes
           help), medians over the rounds.
Writes:    bench-corpus.json (everything, with the machine) and bench-corpus.md (tables).
Result:    recipes/results/bench-corpus.md
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import logging
import os
import random
import shutil
import statistics
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import psutil
import torch
from benching.report import table

import mmtok
from mmtok.bench.systems import machine
from mmtok.corpus.index import TABLE, Corpus, write_index
from mmtok.corpus.plan import make_plan, save_plan
from mmtok.corpus.records import INDEX, LOG, PLAN, SHARDS, PlanSettings, Task
from mmtok.corpus.run import tokenize_corpus
from mmtok.corpus.shard_file import ShardFile, read_done, sha256_of, shard_path
from mmtok.corpus.stream import TokenStream
from mmtok.corpus.work import tokenize_shard
from mmtok.tokens import smallest_uint, write_atomic

PAPER_SHARD = 10_000  # items
GOAL_MODEL, GOAL_PADDING = 0.9, 0.1


@dataclasses.dataclass(frozen=True)
class Case:
    """A corpus to make; ``index`` lists its files below --data."""

    name: str
    tokenizer: str
    modality: str
    index: str


CASES = (
    Case("speech", "audio-codec-16k-4kbps", "audio", "speech.jsonl"),
    Case("pictures", "image-binary1d-64x64", "image", "images.jsonl"),
    Case("pictures, no network", "jpeg:50", "image", "images.jsonl"),
)
READ = ("speech", "pictures")  # of whose corpora the reading is timed
ENGINES = (("local", 1), ("local", 2), ("ray", 1), ("ray", 2))


# ---- files ----


def draw_files(data: Path, index: str, count: int, seed: int, folder: Path) -> None:
    """``count`` files of an index (0: all) in ``folder``, linked, not copied, where one disk holds both."""
    if not (data / index).is_file():
        raise SystemExit(f"no {data / index}; `python recipes/fetch_data.py` makes it, or pass --smoke")
    rows = [json.loads(line) for line in (data / index).read_text("utf-8").splitlines() if line.strip()]
    random.Random(seed).shuffle(rows)
    folder.mkdir(parents=True)
    for n, row in enumerate(rows[: count or None]):
        source = data / row["path"]
        target = folder / f"{n:06d}{source.suffix}"
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
        if row.get("text"):
            target.with_suffix(".txt").write_text(row["text"], "utf-8")


def generate_files(modality: str, count: int, seed: int, folder: Path) -> None:
    """Gradients in noise of 48 to 96 px, or tones of 0.2 to 0.8 s."""
    import soundfile
    from PIL import Image

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for n in range(count):
        path = folder / f"{n:06d}"
        if modality == "image":
            H, W = rng.integers(48, 97, 2)
            x = np.linspace(0, 200, H)[:, None, None] + rng.integers(0, 40, (H, W, 3))
            Image.fromarray(x.astype(np.uint8)).save(path.with_suffix(".png"))
        else:
            t = np.arange(int(16_000 * rng.uniform(0.2, 0.8))) / 16_000
            x = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 900) * t) + 0.01 * rng.standard_normal(len(t))
            soundfile.write(path.with_suffix(".wav"), x, 16_000)
        path.with_suffix(".txt").write_text(f"number {n}", "utf-8")


# ---- tokenizing ----


class Memory(threading.Thread):
    """Resident MiB of all processes below this one, sampled while the ``with`` block runs."""

    def __init__(self, every: float = 0.25) -> None:
        super().__init__(daemon=True)
        self.every, self.samples, self._over = every, [], threading.Event()

    def __enter__(self) -> Memory:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(self.every):
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.samples.append((time.time(), total / 2**20))

    def report(self, begin: float, end: float) -> dict[str, float] | None:
        """Of the second half of ``begin`` .. ``end`` (seconds since 1970): mean, slope, and the rise as a share.

        None where that is less than 10 seconds: what a process takes at first would look like a slope.
        """
        half = [(t, mib) for t, mib in self.samples if (begin + end) / 2 <= t <= end]
        if len(half) < 10 or half[-1][0] - half[0][0] < 10:
            return None
        t, mib = np.array(half).T
        slope = float(np.polyfit(t - t[0], mib, 1)[0])
        return {
            "largest_mib": max(m for _, m in self.samples),
            "mean_mib": float(mib.mean()),
            "slope_mib_a_minute": 60 * slope,
            "rise": slope * float(t[-1] - t[0]) / float(mib.mean()),
            "seconds": float(t[-1] - t[0]),
        }


def in_turn(case: Case, source: Path, out: Path, shard_items: int) -> dict[str, Any]:
    """One-by-one and `tokenize_shard` over the same shards in turn, in this process; also what the corpus weighs.

    One by one is the obvious loop: encode a file, keep its tokens.
    """
    tokenizer = mmtok.load(case.tokenizer)
    plan = make_plan(source, PlanSettings(modality=case.modality, items_per_shard=shard_items))
    (out / SHARDS).mkdir(parents=True)
    save_plan(plan, out / PLAN)
    paths = {p.stem: p for p in source.iterdir() if p.suffix != ".txt"}
    tokenizer.encode(next(iter(paths.values())))  # warm
    for path in paths.values():
        path.read_bytes()  # so that whoever comes first does not read the disk for both
    turns: list[dict[str, float]] = []
    seconds: dict[str, float] = {}
    for shard in plan.shards:
        task = Task(case.tokenizer, tokenizer.fingerprint, str(out / PLAN), shard.number, str(out))
        cpu, wall = time.process_time(), time.perf_counter()
        worked = tokenize_shard(task)
        turn = {"corpus_cpu": time.process_time() - cpu, "corpus_wall": time.perf_counter() - wall}
        keys = ShardFile(shard_path(out, shard.number)).keys
        cpu, wall = time.process_time(), time.perf_counter()
        for key in keys:
            tokenizer.encode(paths[key])
        turn |= {"one_by_one_cpu": time.process_time() - cpu, "one_by_one_wall": time.perf_counter() - wall}
        turns.append({**turn, "items": len(keys)})
        if shard.number:  # the first one loads the tokenizer
            seconds = {k: seconds.get(k, 0.0) + v for k, v in worked.seconds.items()}
    write_index(out)
    return {"turns": turns, "seconds": seconds, **weigh(out, turns)}


def weigh(out: Path, turns: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Bytes against nominal bits, padding, and the rates of `in_turn`, without its first shard."""
    totals = json.loads((out / INDEX).read_text("utf-8"))["totals"]
    shards = [read_done(out, n) for n in range(len(turns))]
    padded = [d.positions / (1 - d.padding) for d in shards if d is not None]
    later = turns[1:] or turns
    rates = {k: sum(t["items"] for t in later) / sum(t[k] for t in later) for k in later[0] if k != "items"}
    headers = [header_bytes(shard_path(out, n)) for n in range(len(turns))]
    return {
        "items": totals["items"],
        "failures": totals["failures"],
        "seconds_of_sound": totals.get("seconds"),
        "codes": totals["codes"],
        "nominal_bytes_an_item": totals["bits"] / 8 / totals["items"],
        "bytes_an_item": (totals["bytes"] - sum(headers)) / totals["items"],
        "header_bytes_a_shard": statistics.mean(headers),
        "index_bytes_an_item": (out / TABLE).stat().st_size / totals["items"],
        "index_bytes_a_shard": (out / INDEX).stat().st_size / len(turns),
        "padding": 1 - totals["positions"] / sum(padded),
        "items_a_second": rates,
        "batched_over_one_by_one": statistics.median(t["one_by_one_cpu"] / t["corpus_cpu"] for t in later),
    }


def header_bytes(path: Path) -> int:
    """Of a safetensors file: what it takes with no item in it."""
    with path.open("rb") as f:
        return 8 + int.from_bytes(f.read(8), "little")


@contextlib.contextmanager
def own_ray(workers: int, trials: int = 4) -> Iterator[None]:
    """A Ray for one run. It gives up when it has not started in 30 s, so a busy machine may need several trials."""
    import ray

    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    for left in reversed(range(trials)):
        try:
            ray.init("local", num_cpus=workers, object_store_memory=2**27, **quiet)
            break
        except Exception as e:  # it raises a bare Exception
            ray.shutdown()
            if not left:
                raise SystemExit(f"Ray did not start in {trials} trials ({e}); pass --engines local") from e
    try:
        yield
    finally:
        ray.shutdown()


def by_engine(case: Case, source: Path, out: Path, shard_items: int, engine: str, workers: int) -> dict[str, Any]:
    """A whole run; its rate from the log, from the first shard's start to the last one's end, loading left out."""
    start = time.perf_counter()
    settings = PlanSettings(modality=case.modality, items_per_shard=shard_items)
    with own_ray(workers) if engine == "ray" else contextlib.nullcontext(), Memory() as memory:
        summary = tokenize_corpus(source, case.tokenizer, out, engine, workers, plan_settings=settings, progress=False)
    if summary.exit_code:
        raise SystemExit(f"{case.name}, {engine}, {workers} workers: the run did not finish\n{summary}")
    lines = [json.loads(line) for line in (out / LOG).read_text("utf-8").splitlines()]
    shards = [line for line in lines if "shard" in line]
    begin = min(s["start"] + s["seconds"]["load"] for s in shards)
    end = max(s["start"] + s["took"] for s in shards)
    worked = {k: sum(s["seconds"][k] for s in shards) for k in ("wait", "model", "write", "load", "total")}
    return {
        "engine": engine,
        "workers": workers,
        "wall_seconds": time.perf_counter() - start,
        "span_seconds": end - begin,
        "items_a_second": summary.items / (end - begin),
        "seconds": worked,
        "share_in_model": worked["model"] / (worked["total"] - worked["load"]),
        "memory": memory.report(begin, end),
        "digest": {p.name: sha256_of(p) for p in sorted((out / SHARDS).glob("*.safetensors"))},
    }


# ---- reading ----


def write_rivals(out: Path, aside: Path) -> tuple[np.ndarray, np.ndarray, int, list[str]]:
    """The codes of a corpus as one raw array (mapped, with offsets and Q), and as WebDataset tars of .npy and .txt."""
    corpus = Corpus(out)
    assert corpus.spec is not None
    Q = corpus.spec.num_codebooks
    dtype = smallest_uint(max(corpus.spec.codebook_sizes) - 1)
    codes = [corpus.codes(i).numpy().astype(dtype) for i in range(len(corpus))]
    offsets = np.cumsum([0, *(c.size for c in codes)])
    aside.mkdir(parents=True)
    np.concatenate([c.ravel() for c in codes]).tofile(aside / "codes.raw")
    tars: list[str] = []
    for number, items in itertools.groupby(range(len(corpus)), lambda i: corpus.locate(i)[0]):
        tars.append(str(aside / f"{number:05d}.tar"))
        with tarfile.open(tars[-1], "w") as tar:
            for i in items:
                buffer = io.BytesIO()
                np.save(buffer, codes[i])
                for suffix, data in (("npy", buffer.getvalue()), ("txt", (corpus[i].text or "").encode())):
                    info = tarfile.TarInfo(f"{i:08d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return np.memmap(aside / "codes.raw", dtype, "r"), offsets, Q, tars


def readers(out: Path, aside: Path, workers: int) -> dict[str, Callable[[int], Iterator[int]]]:
    """Name -> epoch -> the number of codes of every item (or batch) as it is read, in a shuffled order."""
    import webdataset as wds

    raw, offsets, Q, tars = write_rivals(out, aside)
    corpus, count = Corpus(out), len(offsets) - 1

    def order(epoch: int) -> list[int]:
        return np.random.default_rng(epoch).permutation(count).tolist()

    def memmap(epoch: int) -> Iterator[int]:
        for i in order(epoch):
            part = raw[offsets[i] : offsets[i + 1]]
            yield torch.from_numpy(part.astype(np.int64).reshape(Q, -1)).numel()

    def tar(epoch: int) -> Iterator[int]:
        data = wds.WebDataset(tars, shardshuffle=len(tars), seed=epoch, empty_check=False).shuffle(1000).decode()
        for sample in data:
            yield torch.from_numpy(sample["npy"].astype(np.int64)).numel()

    single, batched = TokenStream(out), TokenStream(out, batch=64)

    def stream(reading: TokenStream, processes: int = 0) -> Iterator[int]:
        for value in reading.loader(processes):  # each pass is the next epoch
            yield int(value.tokens.lengths.sum()) * Q

    return {
        "numpy memmap, items": memmap,
        "WebDataset, items": tar,
        "TokenStream, items": lambda _: stream(single),
        "TokenStream, batches of 64": lambda _: stream(batched),
        f"TokenStream, batches of 64, {workers} workers": lambda _: stream(batched, workers),
        "Corpus, random items": lambda epoch: (corpus[i].tokens.codes.numel() for i in order(epoch)),
        "Corpus, random codes": lambda epoch: (corpus.codes(i).numel() for i in order(epoch)),
    }


def time_reading(out: Path, aside: Path, rounds: int, least: float, workers: int) -> dict[str, Any]:
    """CPU and wall seconds an epoch of each reader in each round; every one must give every code."""
    contest = readers(out, aside, workers)
    index = json.loads((out / INDEX).read_text("utf-8"))["totals"]
    passes = 1
    cpu: dict[str, list[float]] = {name: [] for name in contest}
    wall: dict[str, list[float]] = {name: [] for name in contest}
    for turn in range(rounds + 1):
        for name, read in contest.items():
            start, begun = time.process_time(), time.perf_counter()
            for epoch in range(passes):
                if (codes := sum(read(epoch))) != index["codes"]:
                    raise SystemExit(f"{name}: expected {index['codes']} codes, got {codes}")
            if turn:  # the first one warms up, and tells how often to read
                cpu[name].append((time.process_time() - start) / passes)
                wall[name].append((time.perf_counter() - begun) / passes)
            elif name.startswith("WebDataset"):
                slowest = time.perf_counter() - begun
        passes = max(passes, min(50, round(least / slowest)))
    base = {"WebDataset": "WebDataset, items", "numpy": "numpy memmap, items"}
    rows = []
    for name in contest:
        seconds = wall if "workers" in name else cpu
        rows.append(
            {
                "reader": name,
                "clock": "wall" if "workers" in name else "cpu",
                "items_a_second": index["items"] / statistics.median(seconds[name]),
                "codes_a_second": index["codes"] / statistics.median(seconds[name]),
                **{
                    f"over_{short}": statistics.median(
                        b / a for a, b in zip(seconds[name], (wall if seconds is wall else cpu)[other], strict=True)
                    )
                    for short, other in base.items()
                },
                "cpu_seconds": cpu[name],
                "wall_seconds": wall[name],
            }
        )
    return {"items": index["items"], "codes": index["codes"], "passes": passes, "rows": rows}


# ---- on paper ----


@dataclasses.dataclass(frozen=True)
class Constants:
    """Measured, of one corpus.

    Args:
        bytes_an_item: in a shard, key and text included. header_bytes: that a shard takes beside. nominal_bytes: of an
            item's codes. index_bytes: of index.json, a shard. core_seconds: CPU time of an item, decoding included.
        seconds_of_sound: of an item; None for pictures.
    """

    bytes_an_item: float
    header_bytes: float
    nominal_bytes: float
    index_bytes: float
    core_seconds: float
    seconds_of_sound: float | None = None


def constants_of(result: Mapping[str, Any]) -> Constants:
    """Of what `in_turn` measured."""
    sound = result["seconds_of_sound"]
    return Constants(
        result["bytes_an_item"],
        result["header_bytes_a_shard"],
        result["nominal_bytes_an_item"],
        result["index_bytes_a_shard"],
        1 / result["items_a_second"]["corpus_cpu"],
        None if sound is None else sound / result["items"],
    )


def paper_calculation(
    pictures: Constants, sound: Constants, items_per_shard: int = PAPER_SHARD, gpu_speed: float | None = None
) -> list[dict[str, Any]]:
    """What a billion images and a million hours take, in proportion to what was measured.

    Args:
        pictures, sound: measured constants.
        items_per_shard: of the corpora to come; clips are as long as those measured.
        gpu_speed: how many of the measured CPU cores one GPU replaces, the asker's own figure: measure it by a run with
            `mmtok corpus tokenize --device cuda`. None: GPU hours are told as a formula.
    """
    if sound.seconds_of_sound is None:
        raise ValueError("sound: expected constants of a corpus of sound, got those of pictures")
    rows = []
    for name, c, items in (
        ("a billion images", pictures, 10**9),
        ("a million hours of sound", sound, round(10**6 * 3600 / sound.seconds_of_sound)),
    ):
        shards, core_hours = -(-items // items_per_shard), items * c.core_seconds / 3600
        # The index' own types: a 64-bit hash of each key, its item, and the shard and row of each item.
        entry = 8 + sum(np.dtype(smallest_uint(n - 1)).itemsize for n in (items, shards, items_per_shard))
        rows.append(
            {
                "corpus": name,
                "items": items,
                "shards_bytes": items * c.bytes_an_item + shards * c.header_bytes,
                "nominal_bytes": items * c.nominal_bytes,
                "index_bytes": items * entry + shards * c.index_bytes,
                "shards": shards,
                "cpu_core_hours": core_hours,
                "gpu_hours": core_hours / gpu_speed if gpu_speed else f"{core_hours:,.0f} / R",
            }
        )
    return rows


# ---- the tables ----


def paper_table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["corpus", "items", "shards on disk", "nominal bits", "index", f"shards of {PAPER_SHARD:,}"]
    head += ["CPU core hours", "GPU hours"]
    cells = [
        [row["corpus"], f"{row['items']:,.0f}"]
        + [f"{row[k] / 1e12:.3g} TB" for k in ("shards_bytes", "nominal_bytes", "index_bytes")]
        + [f"{row['shards']:,}", f"{row['cpu_core_hours']:,.0f}"]
        + [row["gpu_hours"] if isinstance(row["gpu_hours"], str) else f"{row['gpu_hours']:,.0f}"]
        for row in rows
    ]
    return table(head, cells)


def markdown(run: Mapping[str, Any]) -> str:
    """All tables."""
    parts = [
        "# A whole corpus: cost, scaling, reading",
        f"{run['machine']['machine']}, load {run['load']} at the start, {run['date']}. "
        f"`{run['command']}`" + (" A smoke run: generated files, the figures mean nothing." if run["smoke"] else ""),
        "## Tokenizing in one process\n\nRates count CPU time, with decoding; the model's share is of the wall.",
    ]
    head = ["corpus", "tokenizer", "items", "failed", "items/s", "over one by one", "model's share", "padding"]
    head += ["bytes an item", "nominal", "and a shard"]
    cells = []
    for name, r in run["cases"].items():
        share = r["seconds"].get("model", 0.0) / max(1e-9, r["seconds"].get("total", 0.0))
        cells.append(
            [
                *(name, f"`{r['tokenizer']}`", str(r["items"]), str(r["failures"])),
                *(f"{r['items_a_second']['corpus_cpu']:.2f}", f"{r['batched_over_one_by_one']:.2f}x", f"{share:.1%}"),
                *(f"{r['padding']:.1%}", f"{r['bytes_an_item']:.0f}", f"{r['nominal_bytes_an_item']:.0f}"),
                f"{r['header_bytes_a_shard']:.0f}",
            ]
        )
    parts.append(table(head, cells))
    parts.append(f"Goals: {GOAL_MODEL:.0%} in the model, padding below {GOAL_PADDING:.0%}.")
    parts.append("## Engines\n\nOver one worker of the same engine; equal bytes were checked.")
    head = ["corpus", "engine", "workers", "items/s (wall)", "over 1 worker", "model's share", "MiB", "MiB a minute"]
    cells = []
    for name, r in run["cases"].items():
        for e in r["engines"]:
            one = next(o for o in r["engines"] if o["engine"] == e["engine"])
            memory = e["memory"] or {}
            told = [f"{memory[k]:.1f}" if k in memory else "too short" for k in ("mean_mib", "slope_mib_a_minute")]
            cells.append(
                [
                    *(name, e["engine"], str(e["workers"]), f"{e['items_a_second']:.2f}"),
                    *(f"{e['items_a_second'] / one['items_a_second']:.2f}x", f"{e['share_in_model']:.1%}", *told),
                ]
            )
    parts.append(table(head, cells))
    for name, reading in run["reading"].items():
        parts.append(f"## Reading: {name}, {reading['items']} items, {reading['codes']} codes")
        head = ["reader", "clock", "items/s", "M codes/s", "over WebDataset", "over numpy memmap"]
        cells = [
            [r["reader"], r["clock"], f"{r['items_a_second']:,.0f}", f"{r['codes_a_second'] / 1e6:.2f}"]
            + [f"{r[k]:.2f}x" for k in ("over_WebDataset", "over_numpy")]
            for r in reading["rows"]
        ]
        parts.append(table(head, cells))
    parts.append(
        "## On paper\n\nIn proportion to the measured constants. R: how many of these CPU cores one GPU replaces "
        + (f"(given: {run['gpu_speed']:g})." if run["gpu_speed"] else "(not measured here).")
    )
    parts.append(paper_table(run["paper"]))
    return "\n\n".join(parts) + "\n"


def run_case(case: Case, folder: Path, files: int, args: argparse.Namespace) -> dict[str, Any]:
    """Files, one process, engines; the corpora of one case all have the same bytes."""
    source = folder / "files"
    if args.smoke:
        generate_files(case.modality, files, args.seed, source)
    else:
        draw_files(args.data, case.index, files, args.seed, source)
    media = sum(p.suffix != ".txt" for p in source.iterdir())
    shard_items = max(4 if args.smoke else 25, -(-media // 16))  # few in a shard: its start would be what is measured
    print(f"{case.name}: {media} files, {shard_items} a shard, {case.tokenizer}", file=sys.stderr)
    found = {"tokenizer": case.tokenizer, **in_turn(case, source, folder / "corpus", shard_items), "engines": []}
    expected = {p.name: sha256_of(p) for p in sorted((folder / "corpus" / SHARDS).glob("*.safetensors"))}
    for engine, workers in ENGINES:
        if workers > args.workers or engine not in args.engines or (args.smoke and case != CASES[-1]):
            continue
        out = folder / f"{engine}-{workers}"
        result = by_engine(case, source, out, shard_items, engine, workers)
        if result.pop("digest") != expected:
            raise SystemExit(f"{case.name}: {engine} with {workers} workers wrote other bytes than one process")
        shutil.rmtree(out)
        found["engines"].append(result)
        print(f"{case.name}: {engine} {workers}: {result['items_a_second']:.2f} items/s", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="what recipes/fetch_data.py made")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-corpus"), help="a new folder for the corpora")
    parser.add_argument("--results", type=Path, default=Path("."), help="folder for bench-corpus.json and .md")
    parser.add_argument("--files", type=int, default=2000, help="files of each kind; 0: all (default 2000)")
    parser.add_argument("--workers", type=int, default=2, help="most workers of an engine, and of a reader (default 2)")
    parser.add_argument("--engines", nargs="*", default=["local", "ray"], choices=["local", "ray"])
    parser.add_argument("--rounds", type=int, default=5, help="of reading (default 5)")
    parser.add_argument("--gpu-speed", type=float, help="CPU cores that one GPU replaces, if you have measured it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few generated files, no Ray: only checks the machinery")
    args = parser.parse_args()
    if args.files < 0 or args.workers < 1 or args.rounds < 1 or (args.gpu_speed is not None and args.gpu_speed <= 0):
        raise SystemExit("expected --files >= 0, --workers >= 1, --rounds >= 1 and --gpu-speed > 0")
    if args.out.exists() and any(args.out.iterdir()):
        raise SystemExit(f"{args.out} is not empty; pass another --out, or remove it: every run begins anew")
    if args.smoke:
        args.engines, args.rounds, args.files, args.workers = ["local"], 1, 8, 1
    torch.set_num_threads(1)  # as every worker has
    args.results.mkdir(parents=True, exist_ok=True)
    run: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "smoke": args.smoke,
        "seed": args.seed,
        "load": round(os.getloadavg()[0], 1),
        "machine": machine(),
        "gpu_speed": args.gpu_speed,
        "cases": {},
        "reading": {},
    }
    for n, case in enumerate(CASES):
        run["cases"][case.name] = run_case(case, args.out / str(n), args.files, args)
        if case.name in READ:
            out = args.out / str(n)
            run["reading"][case.name] = time_reading(
                out / "corpus", out / "rivals", args.rounds, 0.0 if args.smoke else 0.5, args.workers
            )
    pictures, sound = (constants_of(run["cases"][name]) for name in ("pictures", "speech"))
    run["paper"] = paper_calculation(pictures, sound, gpu_speed=args.gpu_speed)
    text = markdown(run)
    write_atomic(args.results / "bench-corpus.json", (json.dumps(run, indent=1) + "\n").encode())
    write_atomic(args.results / "bench-corpus.md", text.encode())
    shutil.rmtree(args.out)
    print(text)


if __name__ == "__main__":
    main()
