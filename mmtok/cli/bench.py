"""`mmtok bench`: tokenizers compared on your pictures and sounds, and what to do with the numbers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtok.cli.bench_actions import folder, parsers, words

EPILOG = """\
NAME is what mmtok list shows, a folder, family:source or a classical codec; behind a # stand its rates:
  audio-codec-16k-4kbps#levels=2,4,8           three contenders: the first 2, 4 and 8 levels
  image-textok-64px-16x10#tokens=8&text        the first 8 tokens, captions given to encode and decode
  jpeg#bytes=512  webp#bytes=512  opus:6000    classical codecs: bytes an item, or their own setting
  dac:/models/dac_16khz#raw                    another package's codec without mmtok's mitigations

examples:
  mmtok bench image-binary1d-64x64 jpeg#bytes=512 --out runs/try
  mmtok bench audio-codec-16k-4kbps#levels=2,4,8 opus:6000 --data ~/recordings --seconds 5 --out runs/mine
  mmtok bench NAME... --data data --sets photos speech --parts all --out runs/full --report full.html
  mmtok bench NAME... --data photos/ --size 256 --items 50 --scorers image_signal,lpips --out runs/lpips

Without --sets, all of --data is taken; without --data, what ships with mmtok. Pictures and sounds may be mixed: each
contender gets the sets of its modality. The same command on the same --out goes on where it was stopped.

with a finished run:
  mmtok bench table runs/try --format latex    tables in Markdown, LaTeX or CSV
  mmtok bench diff runs/old runs/new           what changed, and whether by more than chance
  mmtok bench report runs/try -o page.html     the page again
and before one:
  mmtok bench sets                             the named test sets
  mmtok bench scorers                          what can be measured here, and how to get the rest
Each has its own --help.

exit codes: 0 all well, 1 some contender or part failed, 2 bad input
"""
DEFAULT_OUT = "mmtok-bench"
ALL = "all"
SHOWN = 3  # files that were left out, of a set; the others are in run.json


class Command(argparse.ArgumentParser):
    """A command some of whose first words are actions with a parser of their own: `bench NAME...`, `bench diff A B`."""

    actions: Mapping[str, argparse.ArgumentParser] = {}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if args and args[0] in self.actions:
            return self.actions[args[0]].parse_known_args(args[1:], namespace)
        return super().parse_known_args(args, namespace)


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command and its actions."""
    command = commands.add_parser(
        "bench",
        help="compare tokenizers on your files: numbers, tables, plots, a page",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run tokenizers at their rates on test sets and measure what they cost and what comes back.",
        epilog=EPILOG,
    )
    _add_run(command)
    command.actions = parsers()


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("names", nargs="+", metavar="NAME", help="a contender, or an action: see below")
    command.add_argument(
        "--out",
        metavar="DIR",
        help=f"folder of the run; the same one goes on (default: {DEFAULT_OUT}, or FILE-run beside --report FILE.html)",
    )
    what = command.add_argument_group("what on")
    what.add_argument(
        "--data",
        metavar="DIR|SET",
        help="your files, the folder that recipes/fetch_data.py made, or a named set cut from ./data",
    )
    what.add_argument("--sets", nargs="+", metavar="SET", help="named sets (mmtok bench sets), folders, globs or lists")
    what.add_argument("--split", help="of a list with splits (default: its test splits)")
    what.add_argument("--items", type=int, metavar="N", help="at most so many a set, evenly spaced (default: 100)")
    what.add_argument("--size", type=int, metavar="PX", help="pictures: a square crop of so many pixels a side")
    what.add_argument("--crop", choices=("center", "random"), help="pictures: where --size cuts (default: center)")
    what.add_argument("--resize", type=int, metavar="PX", help="pictures: the shorter side, before the crop")
    what.add_argument("--seconds", type=float, metavar="S", help="sounds: their beginning, at most so long")
    what.add_argument("--sample-rate", type=int, metavar="HZ", help="sounds: resample to it (default: as they are)")
    what.add_argument("--mono", action="store_true", help="sounds: the mean of the channels")
    how = command.add_argument_group("what is measured")
    how.add_argument(
        "--parts",
        default="reconstruction",
        metavar="PART,PART",
        help="of reconstruction, tokens, systems, probes, language, or all (default: %(default)s)",
    )
    how.add_argument(
        "--scorers", default=ALL, metavar="NAME,NAME", help="of mmtok bench scorers (default: %(default)s)"
    )
    how.add_argument("--helpers", metavar="DIR", help="the judges' networks (default: DATA/helpers)")
    how.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="PART.KEY=VALUE",
        help="tell a part something, e.g. language.steps=300",
    )
    how.add_argument("--device", default="cpu", help="where the tokenizers run (default: %(default)s)")
    how.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    how.add_argument("--smoke", action="store_true", help="a few items and steps only, to see that it runs")
    command.add_argument("--report", metavar="FILE.html", help="where the page goes (default: OUT/report.html)")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the contenders, then write page and plots and print the tables; 1 when something failed on the way."""
    from mmtok.bench.contenders import open_contenders
    from mmtok.bench.page import write_page
    from mmtok.bench.records import ITEMS, RESULTS, RUN, read_lines
    from mmtok.bench.run import PARTS, failures, run_bench
    from mmtok.bench.sets import Settings
    from mmtok.cli.paths import check_output

    out = _out(args)
    page = out / "report.html" if args.report is None else Path(args.report)
    if args.report is not None:
        check_output(page)
    settings = Settings(
        items=args.items,
        split=args.split,
        resize=args.resize,
        crop=args.crop or (None if args.size is None else "center"),
        size=args.size,
        seconds=args.seconds,
        sample_rate=args.sample_rate,
        mono=args.mono,
        seed=args.seed,
    )
    parts = ["reconstruction", *PARTS] if args.parts == ALL else words(args.parts, "--parts")
    scorers = None if args.scorers == ALL else words(args.scorers, "--scorers")
    options = _part_options(args.option)
    data, named = _data(args.data)
    helpers = None if args.helpers is None else folder(args.helpers, "--helpers")
    if helpers is None and data is not None and (data / "helpers").is_dir():
        helpers = data / "helpers"
    if (out / RUN).is_file():
        there = sum(1 for _ in read_lines(out / ITEMS))
        print(f"{out} holds a run already: {there} trials of items are there and are not made again.")
    contenders = open_contenders(args.names, args.device, helpers)
    sets: Sequence[Any] = args.sets or named
    if not sets and data is not None:
        sets = _whole(data, sorted({c.modality for c in contenders}), settings, args.smoke)
    run_bench(
        contenders,
        sets,
        out,
        data=data,
        helpers=helpers,
        parts=parts,
        settings=settings,
        scorers=scorers,
        device=args.device,
        seed=args.seed,
        smoke=args.smoke,
        progress=sys.stderr.isatty(),
        options=options,
    )
    _show(out)
    plots = _plots(out)
    write_page(out, page)
    print("\n".join(["", *_left_out(out), f"results  {out / RESULTS}", f"page     {page}", f"plots    {plots}"]))
    if failed := failures(out):
        print("\n".join(f"failed: {line}" for line in failed), file=sys.stderr)
    return 1 if failed else 0


def _left_out(out: Path) -> list[str]:
    """The files that could not be read, and the items that a contender refused: those in no number above."""
    from mmtok.bench.run_folder import read_run

    record = read_run(out)
    lost = [(name, "cannot be read", items) for name, items in record["bad_files"].items()]
    for label, sets in record["refused"].items():
        lost += [(name, f"refused by {label}", items) for name, items in sets.items()]
    found = []
    for name, why, items in lost:
        more = f", and {len(items) - SHOWN} more in {out / 'run.json'}" if len(items) > SHOWN else ""
        found.append(f"left out {len(items)} of {name}, {why}:")
        found += [f"  {one['item']}: {one['reason']}" for one in items[:SHOWN]]
        found[-1] += more
    return found


def _out(args: argparse.Namespace) -> Path:
    if args.out is not None:
        return Path(args.out)
    page = None if args.report is None else Path(args.report)
    return Path(DEFAULT_OUT) if page is None else page.with_name(f"{page.stem}-run")


def _data(given: str | None) -> tuple[Path | None, list[str]]:
    """The data folder, and the set that was named instead of one."""
    from mmtok.bench.named_sets import NAMED

    if given is None or Path(given).expanduser().is_dir():
        return (None if given is None else Path(given).expanduser()), []
    if given not in NAMED:
        raise ValueError(f"--data: expected a folder or a set of `mmtok bench sets`, got {given}; there is neither")
    return (Path("data") if Path("data").is_dir() else None), [given]


def _part_options(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``["language.steps=300"]`` -> ``{"language": {"steps": 300}}``; values are JSON, or else text."""
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        part, dot, key = name.partition(".")
        if not (equals and dot and part and key):
            raise ValueError(f"--option: expected PART.KEY=VALUE such as language.steps=300, got {text!r}")
        try:
            found.setdefault(part, {})[key] = json.loads(value)
        except ValueError:
            found[part][key] = value
    return found


def _whole(data: Path, modalities: Sequence[str], settings: Any, smoke: bool) -> list[Any]:
    """All of a folder as one set a modality; of a folder with lists (``images.jsonl`` ...), one set a list."""
    from mmtok.bench.run import SMOKE_ITEMS
    from mmtok.bench.sets import LISTS, load_set

    found = []
    if smoke:
        settings = dataclasses.replace(settings, items=min(settings.items or SMOKE_ITEMS, SMOKE_ITEMS))
    for modality in modalities:
        lists = [data / name for name, kind in LISTS.items() if kind == modality and (data / name).is_file()]
        for place in lists or [data]:
            chosen = dataclasses.replace(settings, modality=modality)
            loaded = load_set(place, data, chosen, progress=sys.stderr.isatty())
            # Pictures and sounds of one folder are two sets, so they need two names.
            found.append(loaded if lists or len(modalities) == 1 else _renamed(loaded, f"{loaded.name}-{modality}"))
    return found


def _renamed(loaded: Any, name: str) -> Any:
    return dataclasses.replace(loaded, name=name, protocol={**loaded.protocol, "set": name})


def _show(out: Path) -> None:
    from mmtok.bench.records import read_results
    from mmtok.bench.tables import make_tables, to_text

    results = read_results(out)
    width = max(60, shutil.get_terminal_size((120, 24)).columns)
    for part in dict.fromkeys(r.part for r in results):
        # Numbers of single levels, such as usage[3], are left to the page and to mmtok bench table.
        shown = dict.fromkeys(r.metric for r in results if r.part == part and not re.search(r"\[\d+\]$", r.metric))
        for table in make_tables([r for r in results if r.metric in shown], part=part) if shown else ():
            print(f"\n{_heading(part, table)}\n{to_text(table, width)}")
            for note in table.notes:
                print(f"  {note}")


def _heading(part: str, table: Any) -> str:
    counts = [r.count for row in table.cells for r in row if r is not None]
    said = [f"{max(counts)} items"] if part == "reconstruction" else []  # other parts count codes, frames, seeds ...
    said += ["* is the best of its column"] if table.best else []
    return f"{part}, {table.test_set}" + (f" ({'; '.join(said)})" if said else "")


def _plots(out: Path) -> str:
    """Write them and say where they lie, or why there are none."""
    from mmtok.bench.plots import PLOTS, write_plots

    try:
        written = write_plots(out)
    except ImportError as e:
        return f"none: {e}"
    return str(out / PLOTS) if written else "none: every contender of a set has the same rate"
