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
import json
import logging
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from corpora.files import draw_files, generate_files
from corpora.memory import Memory
from corpora.paper import constants_of, paper_calculation
from corpora.reading import time_reading
from corpora.tables import markdown, readme_text

import mmtok
from mmtok.bench.system_probes import machine
from mmtok.bench.tables import replace_block
from mmtok.corpus.index import TABLE, write_index
from mmtok.corpus.plan import make_plan, save_plan
from mmtok.corpus.records import INDEX, LOG, PLAN, SHARDS, PlanSettings, Task
from mmtok.corpus.run import tokenize_corpus
from mmtok.corpus.shard_file import ShardFile, read_done, sha256_of, shard_path
from mmtok.corpus.work import tokenize_shard
from mmtok.tokens import write_atomic

MARK = "results:corpus-cost"
COUNTED = 64  # files whose operations are counted


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


# ---- tokenizing ----


def in_turn(case: Case, source: Path, out: Path, shard_items: int) -> dict[str, Any]:
    """One-by-one and `tokenize_shard` over the same shards in turn, in this process; also what the corpus weighs.

    One by one is the obvious loop: encode a file, keep its tokens.
    """
    tokenizer = mmtok.load(case.tokenizer).requires_grad_(False)  # else the counter of operations asks for gradients
    plan = make_plan(source, PlanSettings(modality=case.modality, items_per_shard=shard_items))
    (out / SHARDS).mkdir(parents=True)
    save_plan(plan, out / PLAN)
    paths = {p.stem: p for p in source.iterdir() if p.suffix != ".txt"}
    tokenizer.encode(next(iter(paths.values())))  # warm
    flops = flops_of(tokenizer, [paths[k] for k in sorted(paths)[:COUNTED]])
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
    return {"turns": turns, "seconds": seconds, "flops": flops, **weigh(out, turns)}


def flops_of(tokenizer: Any, paths: Sequence[Path]) -> dict[str, float]:
    """Floating point operations of encode as torch counts them (products and convolutions), over those files."""
    from torch.utils.flop_counter import FlopCounterMode

    total = amount = 0.0
    for path in paths:
        with FlopCounterMode(display=False) as counter:
            tokens = tokenizer.encode(path)
        total += counter.get_total_flops()
        side = {k: int(v[0]) for k, v in tokens.side.items() if k in ("num_samples", "sample_rate")}
        amount += side["num_samples"] / side["sample_rate"] if side else 1
    return {"flops": total, "amount": amount, "files": float(len(paths))}


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


def run_case(case: Case, folder: Path, files: int, args: argparse.Namespace) -> dict[str, Any]:
    """Files, one process, engines; the corpora of one case all have the same bytes."""
    source = folder / "files"
    if args.smoke:
        generate_files(case.modality, files, args.seed, source)
    else:
        draw_files(args.data, case.index, files, args.seed, source)
    media = sum(p.suffix != ".txt" for p in source.iterdir())
    shard_items = max(4 if args.smoke else 25, -(-media // 8))  # few in a shard: its start would be what is measured
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
    parser.add_argument(
        "--gpu-tflops", type=float, default=100.0, help="1e12 operations a second that your GPU reaches (default 100)"
    )
    parser.add_argument("--readme", type=Path, help="whose tables are rewritten too, e.g. README.md")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few generated files, no Ray: only checks the machinery")
    args = parser.parse_args()
    if args.files < 0 or args.workers < 1 or args.rounds < 1 or not args.gpu_tflops > 0:
        raise SystemExit("expected --files >= 0, --workers >= 1, --rounds >= 1 and --gpu-tflops > 0")
    if args.out.exists() and any(args.out.iterdir()):
        raise SystemExit(f"{args.out} is not empty; pass another --out, or remove it: every run begins anew")
    if args.readme is not None:
        replace_block(args.readme.read_text("utf-8"), MARK, "")  # before the work: are its marks there?
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
        "gpu_tflops": args.gpu_tflops,
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
    run["paper"] = paper_calculation(pictures, sound, tflops=args.gpu_tflops)
    text = markdown(run)
    write_atomic(args.results / "bench-corpus.json", (json.dumps(run, indent=1) + "\n").encode())
    write_atomic(args.results / "bench-corpus.md", text.encode())
    if args.readme is not None:
        page = replace_block(args.readme.read_text("utf-8"), MARK, readme_text(run))
        write_atomic(args.readme, page.encode())
    shutil.rmtree(args.out)
    print(text)


if __name__ == "__main__":
    main()
