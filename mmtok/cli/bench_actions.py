"""The actions of `mmtok bench` around a run: compare two, print tables, write the page, and say what there is."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DIFF = """\
examples:
  mmtok bench diff runs/old runs/new
  mmtok bench diff runs/old runs/new --only 'speech/(pesq|stoi)'
  mmtok bench diff runs/old runs/new --fail-on-worse          for a build: exit code 1 when something got worse

A change counts when its 95 % interval excludes 0. Items are paired where both runs have their items.jsonl and saw the
same set. Numbers under different protocols are named, never compared.
exit codes: 0 nothing is worse (or --fail-on-worse was not given), 1 something is, 2 bad input
"""
TABLE = """\
examples:
  mmtok bench table runs/try
  mmtok bench table runs/try --format latex --measures psnr,ssim --set photos --out photos.tex
  mmtok bench table runs/try --format csv --part tokens

Bold is the best of a column among numbers under one protocol. LaTeX needs the package booktabs.
"""


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each action by its name."""
    found = (_diff_parser(), _table_parser(), _report_parser(), _sets_parser(), _scorers_parser())
    return {parser.prog.split()[-1]: parser for parser in found}


def _action(name: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"mmtok bench {name}", description=description, epilog=epilog, formatter_class=form)


def _diff_parser() -> argparse.ArgumentParser:
    action = _action("diff", "Compare two runs number by number.", DIFF)
    action.add_argument("old", metavar="A", help="folder of a run, or its results.jsonl")
    action.add_argument("new", metavar="B", help="the later one")
    action.add_argument("--only", metavar="REGEX", help="searched in part/contender/set/metric")
    action.add_argument("--all", action="store_true", help="also what is equal, or was run in neither")
    action.add_argument("--json", action="store_true", help="print JSON, one object a number")
    action.add_argument("--fail-on-worse", action="store_true", help="exit code 1 when something is worse")
    action.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    action.set_defaults(run=run_diff)
    return action


def _table_parser() -> argparse.ArgumentParser:
    action = _action("table", "Print a run's numbers, one table a test set.", TABLE)
    action.add_argument("folder", metavar="DIR", help="folder of a run, or its results.jsonl")
    action.add_argument("--format", choices=("md", "latex", "csv"), default="md", help="default: %(default)s")
    action.add_argument("--measures", metavar="NAME,NAME", help="the columns, in this order (default: all)")
    action.add_argument("--set", action="append", dest="sets", metavar="SET", help="this one only; may be repeated")
    action.add_argument("--part", default="reconstruction", help="whose numbers (default: %(default)s)")
    action.add_argument("--out", "-o", metavar="FILE", help="write it there instead of printing it")
    action.set_defaults(run=run_table)
    return action


def _report_parser() -> argparse.ArgumentParser:
    action = _action("report", "Write the page of a run: one HTML file that loads nothing from elsewhere.")
    action.add_argument("folder", metavar="DIR", help="folder of a run, finished or not")
    action.add_argument("--out", "-o", metavar="FILE.html", help="default: DIR/report.html")
    action.set_defaults(run=run_report)
    return action


def _sets_parser() -> argparse.ArgumentParser:
    action = _action("sets", "The named test sets: fixed protocols, so that a number of one says what it was taken on.")
    action.add_argument("--json", action="store_true", help="print JSON")
    action.set_defaults(run=run_sets)
    return action


def _scorers_parser() -> argparse.ArgumentParser:
    action = _action("scorers", "What can be measured on this machine, and how to get the rest.")
    action.add_argument("--data", metavar="DIR", help="its folder helpers holds the judges' networks")
    action.add_argument("--helpers", metavar="DIR", help="folder of the judges' networks")
    action.add_argument("--json", action="store_true", help="print JSON")
    action.set_defaults(run=run_scorers)
    return action


def words(text: str, option: str) -> list[str]:
    """``a,b`` -> ``["a", "b"]``; ValueError where there is none."""
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise ValueError(f"{option}: expected names separated by commas, got {text!r}")
    return found


def folder(name: str, option: str) -> Path:
    """The folder of that name; ValueError where there is none."""
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ValueError(f"{option}: expected a folder, got {name}; there is no such folder")
    return path


def run_report(args: argparse.Namespace) -> int:
    """Write the page of a run."""
    from mmtok.bench.page import write_page
    from mmtok.cli.paths import check_output

    run_folder = folder(args.folder, "DIR")
    page = run_folder / "report.html" if args.out is None else Path(args.out)
    check_output(page)
    write_page(run_folder, page)
    print(page)
    return 0


def run_table(args: argparse.Namespace) -> int:
    """Print or write tables."""
    from mmtok.bench.records import read_results
    from mmtok.bench.tables import make_tables, render
    from mmtok.cli.paths import check_output
    from mmtok.tokens import write_atomic

    measures = None if args.measures is None else words(args.measures, "--measures")
    text = render(make_tables(read_results(Path(args.folder)), measures, args.sets, args.part), args.format)
    if args.out is None:
        print(text, end="")
    else:
        check_output(Path(args.out))
        write_atomic(Path(args.out), text.encode())
        print(args.out)
    return 0


def run_diff(args: argparse.Namespace) -> int:
    """Print what changed; 1 when something is worse and that was asked for."""
    from mmtok.bench.compare import VERDICTS, diff

    changes = diff(args.old, args.new, args.only, args.seed)
    counts = Counter(c.verdict for c in changes)
    if args.json:
        print(json.dumps([c.to_dict() for c in changes], indent=1))
    else:
        dull = [c for c in changes if c.verdict == "equal" or (c.verdict == "not run" and c.old is None is c.new)]
        shown = changes if args.all else [c for c in changes if c not in dull]
        if shown:
            print(_diff_text(shown), end="\n\n")
        print(", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v]))
    return 1 if args.fail_on_worse and counts["worse"] else 0


def _diff_text(changes: Sequence[Any]) -> str:
    """One line a number in aligned columns, what is behind a verdict indented below it."""
    header = ("contender", "set", "metric", "old", "new", "change", "", "verdict")
    lines: list[tuple[tuple[str, ...], list[str]]] = [(header, [])]
    for c in changes:
        interval = "" if c.low is None or c.high is None else f"[{c.low:+.3g}, {c.high:+.3g}]"
        values = ["-" if v is None else f"{v:.4g}" for v in (c.old, c.new)]
        change = "" if c.change is None else f"{c.change:+.3g}" + ("" if c.unit in ("", "1") else f" {c.unit}")
        verdict = c.verdict
        if c.differs and c.verdict == "not comparable":
            verdict += ": " + ", ".join(f"{k} {_short(old)} -> {_short(new)}" for k, (old, new) in c.differs.items())
        metric = c.key[3] if c.key[0] == "reconstruction" else f"{c.key[0]}: {c.key[3]}"
        below = ([c.why] if c.why else []) + (
            [f"({c.method})"] if c.method and c.verdict in ("better", "worse") else []
        )
        lines.append(((c.key[1], c.key[2], metric, *values, change, interval, verdict), below))
    widths = [max(len(line[i]) for line, _ in lines) for i in range(len(header))]
    text = []
    for line, below in lines:
        text.append("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip())
        text += [f"    {b}" for b in below]
    return "\n".join(text)


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def run_sets(args: argparse.Namespace) -> int:
    """Print the named sets."""
    from mmtok.bench.named_sets import NAMED

    if args.json:
        found = {n: {"modality": s.modality, "about": s.about, "needs_data": s.needs_data} for n, s in NAMED.items()}
        print(json.dumps(found, indent=1))
        return 0
    width = max(map(len, NAMED))
    for name, entry in NAMED.items():
        print(f"{name:<{width}}  {entry.modality}  {'--data' if entry.needs_data else 'ships '}  {entry.about}")
    print("\nThose with --data are cut from what recipes/fetch_data.py fetches. Any folder, glob or list is a set too.")
    return 0


def run_scorers(args: argparse.Namespace) -> int:
    """Open every scorer and print what it measures, or what it lacks."""
    from mmtok.bench.scorers import SCORERS, NotRunError, open_scorer

    data = None if args.data is None else folder(args.data, "--data")
    helpers = (
        (None if data is None else data / "helpers") if args.helpers is None else folder(args.helpers, "--helpers")
    )
    found: dict[str, dict[str, Any]] = {}
    for name in SCORERS:
        try:
            scorer = open_scorer(name, helpers)
        except NotRunError as e:
            found[name] = {"here": False, "why": str(e)}
        else:
            measures = {m.name: {"unit": m.unit, "direction": m.direction, "about": m.about} for m in scorer.measures}
            found[name] = {"here": True, "modality": scorer.modality, "backend": scorer.backend}
            found[name] |= {"version": scorer.version, "measures": measures}
        if not args.json:
            print(_scorer_text(name, found[name]))
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        here = sum(1 for f in found.values() if f["here"])
        print(f"{here} of {len(found)} scorers are here; the others' measures stand as \"not run\" in a run's results.")
    return 0


def _scorer_text(name: str, found: Mapping[str, Any]) -> str:
    if not found["here"]:
        return f"{name}: not here\n  {found['why']}\n"
    better = {"higher": "higher is better", "lower": "lower is better", "neither": "neither is better"}
    lines = [f"{name} ({found['modality']}, {found['backend']} {found['version']})"]
    for measure, m in found["measures"].items():
        unit = "" if m["unit"] in ("", "1") else f" in {m['unit']}"
        lines.append(f"  {measure}{unit}, {better[m['direction']]}: {m['about']}")
    return "\n".join(lines) + "\n"
