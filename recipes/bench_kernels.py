"""The kernels against everything else that computes the same: speed, memory, exactness, and the goals they were for.

Command:   python recipes/bench_kernels.py --out recipes/results
           python recipes/bench_kernels.py --out recipes/results --device cuda
           python recipes/bench_kernels.py --out /tmp/x --only nearest/12800x8 rvq exactness --rounds 7
Needs:     the competitors (pip install 'mmtok[bench]'); one that is missing has a row that says so.
Writes:    kernels-cpu.md (tables), kernels-cpu.json (every round, the machine, the versions), kernels-cpu.png.
Protocol:  contestants take turns in one process, at least 5 rounds on a CPU and 30 on CUDA (events, inputs rotated past
           the L2 cache), fresh random inputs in every round, outputs poisoned before the check. On a CPU: one thread,
           time of the whole process and of the wall, and glibc told to keep freed memory (the command starts itself
           again with MALLOC_MMAP_MAX_=0, since page faults of this size would hide the arithmetic). The machine's
           ceilings are measured in the same run. One of ours whose answer is not that of fp64 is not timed, and the
           command then ends with code 1.
Time:      tens of minutes: every contest is run twice, once for its memory in another process, and torch.compile
           alone takes some 20 s at each of 9 shapes. --only picks groups.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from benching.goals import Results, judge_goals
from benching.memory import extra_memory
from benching.nearest import exactness
from benching.protocol import Row, Setting, ceilings, explain, floor_ms, measure, timer_for
from benching.report import markdown, plot, short_tables
from benching.table import chosen
from tqdm import tqdm

from mmtok.bench.tables import replace_block
from mmtok.tokens import write_atomic

# Blocks come from the heap, and the heap is never given back: a page is touched for the first time once.
KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
PACKAGES = ("numpy", "numba", "triton", "vector-quantize-pytorch", "transformers", "faiss-cpu")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for kernels-<device>.md, .json and .png")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="groups or beginnings of names, such as nearest/12800x8"
    )
    parser.add_argument("--rounds", type=int, help="at least 5 on a CPU (the default 7), 30 on CUDA (the default)")
    parser.add_argument("--threads", type=int, default=1, help="of each op on a CPU (default 1)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, two rounds: only checks the machinery")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readme", type=Path, help="file whose block results:kernels gets the short tables")
    return parser.parse_args(arguments)


def keep_memory(args: argparse.Namespace) -> None:
    """Start this command again with glibc told to keep freed memory, unless it is already so; Linux only."""
    if args.device == "cpu" and sys.platform == "linux" and "MALLOC_MMAP_MAX_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | KEEPS_MEMORY)


def machine(device: torch.device) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [
            line.partition(":")[2].strip() for line in info.read_text("utf-8").splitlines() if "model name" in line
        ]
        model = lines[0] if lines else model
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    instructions = torch.backends.cpu.get_cpu_capability()
    found = {"cpu": model, "cores": os.cpu_count(), "capability": instructions, "gpu": gpu, "versions": versions}
    return found | {"system": platform.platform()}


def commit() -> str:
    """Hash of the checkout, and whether files differ from it."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()

    try:
        return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if git("status", "-s") else "")
    except OSError:
        return "unknown"


def load_average() -> str:
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def memory_of(names: list[str], setting: Setting) -> dict[str, dict[str, float]]:
    """Extra MiB on a CPU, contest -> contestant -> MiB, from other processes, before this one grows."""
    if setting.device.type != "cpu":
        return {}
    names = [name for name in names if not name.startswith("threads/")]
    if setting.smoke:  # one contest shows that it works
        names = [name for name in names if name.startswith("statistics/")]
    with tqdm(total=len(names), desc="memory", unit="", disable=None) as bar:
        return extra_memory(names, setting.seed, setting.smoke, lambda name: bar.update())


def run_contests(
    args: argparse.Namespace, setting: Setting, rounds: int, found: dict[str, float]
) -> tuple[list[Row], dict[str, str], dict[str, str]]:
    """Rows of all chosen contests; what each counts; notes. A contest that cannot be set up is one row that says so."""
    timer, rows, items, notes = timer_for(setting.device), [], {}, {}
    builders = chosen(setting, args.only)
    memory = memory_of(list(builders), setting)
    with tqdm(builders.items(), desc="contests", unit="", disable=None) as bar:
        for name, build in bar:
            bar.set_postfix_str(name)
            try:
                contest = build()
                if contest is None:
                    continue
                new = measure(contest, setting, timer, rounds)
            except Exception as e:  # for example transformers is missing, whose weights ours would be loaded with
                rows.append(Row(name, "all", False, explain(e)))
                continue
            for row in new:
                row.extra_mib = memory.get(name, {}).get(row.contestant, row.extra_mib)
                row.floor_ms = floor_ms(contest, found, setting.device.type == "cuda")
            items[name], notes[name] = contest.items, contest.note
            rows += new
    return rows, items, notes


def write(args: argparse.Namespace, run: dict[str, Any], rows: list[Row], items: dict, notes: dict) -> None:
    stem = args.out / f"kernels-{args.device}"
    full = run | {"rows": [dataclasses.asdict(row) for row in rows]}
    write_atomic(stem.with_suffix(".json"), (json.dumps(full, indent=1) + "\n").encode())
    write_atomic(stem.with_suffix(".md"), markdown(run, rows, items, notes).encode())
    try:
        picture = plot(rows, f"{run['machine']['gpu'] or run['machine']['cpu']}, {run['date']}")
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'mmtok[bench]')")
        return
    if picture is not None:
        write_atomic(stem.with_suffix(".png"), picture)


def main(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    setting, timer = Setting(device, args.seed, args.smoke), timer_for(device)
    least = 2 if args.smoke else timer.least_rounds
    rounds = args.rounds if args.rounds is not None else max(least, 2 if args.smoke else 7)
    if rounds < least:
        raise SystemExit(f"--rounds: expected at least {least} on {args.device}, got {rounds}")
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("highest")
    args.out.mkdir(parents=True, exist_ok=True)
    load = load_average()
    run: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "device": args.device,
        "seed": args.seed,
        "threads": args.threads,
        "rounds": rounds,
        "smoke": args.smoke,
        "commit": commit(),
        "machine": machine(device),
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
        "ceilings": ceilings(setting, timer),
        "exactness": exactness(setting) if args.only is None or "exactness" in args.only else [],
    }
    rows, items, notes = run_contests(args, setting, rounds, run["ceilings"])
    run["goals"] = [] if args.smoke else judge_goals(Results(rows, run["exactness"]), args.device)
    run["load"] = f"{load}, {load_average()}"
    write(args, run, rows, items, notes)
    if args.readme is not None:
        text = replace_block(args.readme.read_text(), "results:kernels", short_tables(rows, run["goals"]))
        write_atomic(args.readme, text.encode())
    wrong = [
        f"{r['name']}: {n}: {c}" for r in run["exactness"] for n, c in r["wrong"].items() if n[:5] == "mmtok" and c
    ]
    failed = [f"{row.contest}: {row.contestant}: {row.status}" for row in rows if row.failed]
    for line in wrong + failed:
        print(f"FAILED {line}", file=sys.stderr)
    print(f"{len(rows)} rows in {args.out / f'kernels-{args.device}.md'}")
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    arguments = parse()
    keep_memory(arguments)
    sys.exit(main(arguments))
