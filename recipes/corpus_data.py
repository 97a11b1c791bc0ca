"""Every picture and every clip that `fetch_data.py` brings, tokenized, checked byte by byte, and what it cost.

Command:   python recipes/corpus_data.py --data data --out runs/corpus
           The same command goes on where a killed one stopped; what is done is only checked again. --smoke: a few
           generated files, below OUT like all it writes.
Data:      `python recipes/fetch_data.py --out data`, then the same with `--only sounds`: its lists images.jsonl,
           speech.jsonl and sounds.jsonl, with their captions and transcripts.
Protocol:  three corpora by `tokenize_corpus`, one worker each with one thread for the network; then `verify` and
           `stats`. Rates are items and seconds of sound a second of a worker at work, from log.jsonl, so that they are
           the same for a run that was killed and went on; loading of the network is left out. Memory is the resident
           set of the worker over the second half of an undisturbed run, and the slope fitted to it.
Writes:    OUT/NAME: the corpora; recipes/results/corpus-data.json, and README's table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from benching.report import table
from corpora.files import generate_files
from corpora.memory import Memory, lasting

from mmtok.bench.system_probes import machine
from mmtok.bench.tables import replace_block
from mmtok.corpus.inspect import stats, verify
from mmtok.corpus.records import FAILURES, LOG, PlanSettings
from mmtok.corpus.run import tokenize_corpus
from mmtok.tokens import write_atomic

ROOT = Path(__file__).resolve().parents[1]
MARK = "results:corpus"
FIGURES = "corpus-data.json"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus to make; ``index`` lists its files below --data."""

    name: str
    tokenizer: str
    modality: str
    index: str


CORPORA = (
    Corpus("pictures", "image-binary1d-64x64", "image", "images.jsonl"),
    Corpus("speech", "audio-codec-16k-4kbps", "audio", "speech.jsonl"),
    Corpus("sounds", "audio-codec-16k-4kbps", "audio", "sounds.jsonl"),
)


def times_of(out: Path) -> dict[str, float]:
    """Seconds of all shards that were made, by what they went to; a shard that was made twice counts once."""
    shards: dict[int, Mapping[str, Any]] = {}
    for line in (out / LOG).read_text("utf-8").splitlines():
        row = json.loads(line)
        if row.get("seconds"):
            shards[row["shard"]] = row
    total: dict[str, float] = {"amount": sum(row["amount"] for row in shards.values())}
    for row in shards.values():
        for what, seconds in row["seconds"].items():
            total[what] = total.get(what, 0.0) + seconds
    return total


def measure(one: Corpus, data: Path, out: Path, results: Path, workers: int) -> dict[str, Any]:
    """Tokenize what is left, check everything, and count."""
    settings = PlanSettings(modality=one.modality, index=one.index)
    begin = time.time()
    with Memory() as memory:
        summary = tokenize_corpus(data, one.tokenizer, out, workers=workers, plan_settings=settings)
    whole = summary.made == summary.shards
    resident = memory.report(begin, time.time()) if whole else _former(results, one.name)
    if summary.exit_code:
        raise SystemExit(str(summary))
    if problems := verify(out):
        raise SystemExit("\n".join([f"{out} is not whole:", *problems]))
    found, times = stats(out), times_of(out)
    found.pop("out")
    levels = found.pop("levels")
    found["usage"] = sum(level["usage"] for level in levels) / len(levels)
    found.pop("reasons")
    lines = (out / FAILURES).read_text("utf-8").splitlines()
    found["failed"] = [{**json.loads(line), "reason": _reason(json.loads(line)["reason"], data)} for line in lines]
    found |= {"padding": summary.padding, "unit": summary.unit, "times": times, "memory": resident}
    return {**dataclasses.asdict(one), **found}


def _former(results: Path, name: str) -> dict[str, float] | None:
    """What an undisturbed run left; of one that was resumed there is nothing to say of its memory over time."""
    path = results / FIGURES
    corpora = json.loads(path.read_text("utf-8"))["corpora"] if path.is_file() else []
    return next((c["memory"] for c in corpora if c["name"] == name), None)


def _reason(reason: str, data: Path) -> str:
    """Without the place of the data, which differs from machine to machine."""
    return reason.replace(f"{data.absolute()}/", "")


def rows_table(corpora: Sequence[Mapping[str, Any]]) -> str:
    head = ["corpus", "tokenizer", "items", "failed", "amount", "items/s", "amount/s", "in the model", "padding"]
    head += ["bits a code, entropy", "bytes an item", "of them codes", "texts kept", "memory MiB, a minute later"]
    cells = []
    for c in corpora:
        busy = c["times"]["total"] - c["times"]["load"]
        amount = f"{c['times']['amount'] / 3600:.2f} h" if c["modality"] == "audio" else f"{c['pixels'] / 1e6:,.0f} Mpx"
        rate = c["times"]["amount"] / busy
        cells.append(
            [
                *(c["name"], f"`{c['tokenizer']}`", f"{c['items']:,}", str(c["failures"]), amount),
                f"{c['items'] / busy:.1f}",
                f"{rate:.1f} s" if c["modality"] == "audio" else f"{rate:.2f} Mpx",
                *(f"{c['times']['model'] / busy:.0%}", f"{c['padding']:.1%}"),
                f"{c['bits'] / c['codes']:.1f}, {c['entropy_bits'] / c['codes']:.1f}",
                *(f"{c['bytes_per_item']:,.0f}", f"{c['bits'] / 8 / c['items']:,.0f}", f"{c['text_share']:.0%}"),
                _memory(c["memory"]),
            ]
        )
    return table(head, cells)


def _memory(found: Mapping[str, float] | None) -> str:
    """Mean of the second half of the run, and how it changes."""
    return f"{found['mean_mib']:,.0f}, {found['slope_mib_a_minute']:+.0f}" if (found := lasting(found)) else "too short"


def told(corpora: Sequence[Mapping[str, Any]]) -> str:
    """README's block: the table, and what failed."""
    failed = [f"{len(c['failed'])} of {c['name']}, such as {c['failed'][0]['reason']}" for c in corpora if c["failed"]]
    return "\n\n".join([rows_table(corpora), *(f"Failed: {text}." for text in failed)])


def smoke_data(data: Path) -> None:
    """A few generated files with their lists, as `fetch_data.py` lays them out."""
    for one in CORPORA:
        folder = data / one.name
        if not folder.is_dir():
            generate_files(one.modality, 4, 0, folder)
        paths = sorted(p for p in folder.iterdir() if p.suffix != ".txt")
        rows = [{"path": f"{one.name}/{p.name}", "text": p.with_suffix(".txt").read_text("utf-8")} for p in paths]
        write_atomic(data / one.index, "".join(json.dumps(row) + "\n" for row in rows).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="what recipes/fetch_data.py made")
    parser.add_argument("--out", type=Path, default=Path("runs/corpus"), help="folder of the corpora; done shards stay")
    parser.add_argument("--only", nargs="+", choices=[c.name for c in CORPORA], help="these corpora; README stays")
    parser.add_argument("--workers", type=int, default=1, help="processes (default %(default)s)")
    parser.add_argument("--results", type=Path, help="folder of corpus-data.json (default: recipes/results)")
    parser.add_argument("--readme", type=Path, help="whose table is rewritten (default: README.md)")
    parser.add_argument("--smoke", action="store_true", help="a few generated files: only checks the machinery")
    args = parser.parse_args()
    if args.smoke:
        args.data = args.out / "data"
        smoke_data(args.data)
    args.results = args.results or (args.out if args.smoke else ROOT / "recipes" / "results")
    args.readme = args.readme or (None if args.smoke or args.only else ROOT / "README.md")
    chosen = [c for c in CORPORA if args.only is None or c.name in args.only]
    for one in chosen:
        if not (args.data / one.index).is_file():
            raise SystemExit(f"no {args.data / one.index}; `python recipes/fetch_data.py --out {args.data}` makes it")
    if args.readme is not None:
        replace_block(args.readme.read_text("utf-8"), MARK, "")  # before the work: are its marks there?
    made = [measure(one, args.data, args.out / one.name, args.results, args.workers) for one in chosen]
    print(told(made))
    if args.only is not None:
        return
    args.results.mkdir(parents=True, exist_ok=True)
    run = {"machine": machine(), "workers": args.workers, "corpora": made}
    write_atomic(args.results / FIGURES, (json.dumps(run, indent=1) + "\n").encode())
    if args.readme is not None:
        page = replace_block(args.readme.read_text("utf-8"), MARK, told(made))
        write_atomic(args.readme, page.encode())


if __name__ == "__main__":
    main()
