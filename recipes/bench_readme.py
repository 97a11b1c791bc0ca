"""README's result tables from the benchmark: every shipped checkpoint beside plain baselines and classical codecs.

Command:   python recipes/bench_readme.py --data data --out runs/bench
           python recipes/bench_readme.py --data data --out runs/bench --only speech --parts reconstruction
           python recipes/bench_readme.py --tables       # only rewrite README and Markdown from the stored results
           The same command goes on where a killed one stopped, with identical numbers.
Data:      `python recipes/fetch_data.py --out data`, the judges' networks by `--helpers`, and the baselines by
           `python recipes/baselines_vq.py --data data`; a run goes on without a baseline that is missing.
Protocol:  `mmtok bench sets` names the test sets; what is compared on each stands in `recipes/comparing/runs.py`. Every
           number carries its protocol, 95 % bootstrap intervals over items. Classical images: the best setting within
           the bytes, found for each picture; whole files count. Parts: reconstruction, tokens and systems of all;
           probes and language models of one rate a learned tokenizer.
Hardware:  one or two CPU cores. Reconstruction of speech takes the longest: its judges listen to every clip of every
           contender. `--items N` takes N items of each set, and then leaves README alone.
Result:    OUT/NAME/ with report.html, recipes/results/bench-NAME.jsonl (`mmtok bench table` and `diff` read it), .md,
           and README's tables.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from comparing.runs import FIRST_PARTS, RUNS, STUDIES, as_in_readme, opened, stored, stored_path
from comparing.tables import BLOCKS, block_text, unmeasured
from imaging.readme import claims_table

from mmtok.bench.contenders import open_contenders
from mmtok.bench.page import write_page
from mmtok.bench.records import Result, read_results, write_compact
from mmtok.bench.run import BUILTIN, Settings, failures, run_bench
from mmtok.bench.tables import make_tables, render, replace_block
from mmtok.tokens import write_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "recipes" / "results"
SMOKE_RUNS = ("photos", "speech")
SMOKE_SCORERS = ("image_signal", "audio_signal", "pesq", "stoi")


def bench(name: str, args: argparse.Namespace) -> list[str]:
    """One run and its page; what failed or is missing."""
    run, out, helpers = RUNS[name], args.out / name, args.data / "helpers"
    if args.smoke:
        contenders, missing = open_contenders(run.smoke), []
        data, sets = None, [BUILTIN[contenders[0].modality]]
    else:
        contenders, missing = opened(run, args.baselines, args.device, helpers if helpers.is_dir() else None)
        data, sets = args.data, list(run.sets)
    print("\n".join(f"without {line}" for line in missing), flush=True)
    studied = [c for c in contenders if c.label in run.studied]
    failed = []
    for parts, chosen in ((FIRST_PARTS, contenders), (STUDIES, studied)):
        wanted = [p for p in parts if p in args.parts]
        if not wanted or not chosen:
            continue
        started = time.perf_counter()
        run_bench(
            chosen,
            sets,
            out,
            data=data,
            parts=wanted,
            settings=Settings(items=args.items),
            scorers=SMOKE_SCORERS if args.smoke else None,
            device=args.device,
            smoke=args.smoke,
            progress=sys.stderr.isatty(),
        )
        print(f"{name}, {', '.join(wanted)}: {time.perf_counter() - started:.0f} s", flush=True)
        failed += [f"{name}: {line}" for line in failures(out)]
    write_page(out, out / "report.html")
    args.results.mkdir(parents=True, exist_ok=True)
    write_compact(stored_path(args.results, name), read_results(out))
    return failed


def write_tables(results: Path, readme: Path | None) -> None:
    """Markdown of each stored run, and README's blocks; without a README its tables are printed."""
    found = {name: as_in_readme(stored(results, name), name) for name in RUNS}
    for name, own in found.items():
        if own:
            write_atomic(stored_path(results, name).with_suffix(".md"), markdown(name, own).encode())
    texts = {mark: block_text(tables, found) for mark, tables in BLOCKS.items()}
    texts = {mark: text for mark, text in texts.items() if text}  # of what was not run the old table stays
    for mark, tables in BLOCKS.items():
        for table in tables:
            if lacking := unmeasured(table, found):
                print(f"{mark}, {table.head}: not measured, so without the columns {lacking}")
    if readme is None:
        print("\n\n".join(f"## {mark}\n{text}" for mark, text in texts.items()))
        return
    texts["results:claims"] = claims_table(RESULTS)
    page = readme.read_text(encoding="utf-8")
    for mark, text in texts.items():
        page = replace_block(page, mark, text)
    write_atomic(readme, page.encode())


def markdown(name: str, results: list[Result]) -> str:
    """All numbers of a run but those of single levels, one table a part and set."""
    shown = [r for r in results if not re.search(r"\[\d+\]$", r.metric)]
    parts = dict.fromkeys(r.part for r in shown)
    head = f"`python recipes/bench_readme.py --data data --out runs/bench --only {name}`\n\n"
    return head + "\n".join(f"## {part}\n\n{render(make_tables(shown, part=part))}" for part in parts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*FIRST_PARTS, *STUDIES]
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that fetch_data.py made")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the runs; what is done stays")
    parser.add_argument("--baselines", type=Path, default=Path("runs/baselines_vq"), help="of baselines_vq.py")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), help="these runs")
    parser.add_argument("--parts", nargs="+", choices=every, default=every, help="these parts (default: all)")
    parser.add_argument("--items", type=int, help="of each set at most so many, evenly spread; to try it out")
    parser.add_argument("--device", default="cpu", help="where the tokenizers run")
    parser.add_argument("--results", type=Path, help="where bench-NAME.jsonl go (default: recipes/results)")
    parser.add_argument("--readme", type=Path, help="whose tables are rewritten (default: README.md)")
    parser.add_argument("--tables", action="store_true", help="only rewrite tables from the stored results")
    parser.add_argument("--smoke", action="store_true", help="two contenders a run on what ships, no downloaded data")
    args = parser.parse_args()
    short = args.smoke or args.items is not None  # no results for others to read
    args.only = args.only or (SMOKE_RUNS if args.smoke else list(RUNS))
    args.results = args.results or (args.out / "results" if short else RESULTS)
    args.readme = args.readme or (None if short else ROOT / "README.md")
    return args


def main() -> None:
    args = arguments()
    failed = []
    if not args.tables:
        for name in args.only:
            failed += bench(name, args)
    write_tables(args.results, args.readme)
    if failed:
        sys.exit("\n".join(f"failed: {line}" for line in failed))


if __name__ == "__main__":
    main()
