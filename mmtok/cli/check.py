"""`mmtok check`: the laws of mmtok measured on a tokenizer, ours or another package's."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

EPILOG = """\
examples:
  mmtok check audio-codec-16k-4kbps            every law, a table, exit code 1 if one is broken
  mmtok check --all                            every shipped tokenizer
  mmtok check dac:/models/dac_16khz --raw      another package's codec as that package runs it
  mmtok check dac:/models/dac_16khz            the same behind mmtok's mitigations
  mmtok check NAME --items a.wav b.wav c.wav   on your own sounds or pictures
  mmtok check NAME --only padding,chunking --json

The miss rate is the share of codes (or cases) that differ from what they should be: 0.00% keeps the law.
exit codes: 0 every law holds, 1 one is broken, 2 bad input
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    command = commands.add_parser(
        "check",
        help="measure padding, batching, chunking, sizes ... on a tokenizer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure the laws that every tokenizer should obey, as miss rates.",
        epilog=EPILOG,
    )
    command.add_argument("names", nargs="*", metavar="NAME", help="a name, folder, hf:org/repo or family:source")
    command.add_argument("--all", action="store_true", help="every shipped tokenizer")
    command.add_argument("--raw", action="store_true", help="another package's codec without mmtok's mitigations")
    command.add_argument("--only", metavar="LAW,LAW", help="these laws only; --laws names them")
    command.add_argument("--laws", action="store_true", help="say what each law means, and stop")
    command.add_argument("--items", nargs="+", metavar="FILE", help="three or more sounds or pictures of your own")
    command.add_argument("--seconds", type=float, default=1.0, help="longest sound taken (default %(default)s)")
    command.add_argument("--tolerance", type=float, default=0.0, help="miss rate that still counts as kept")
    command.add_argument("--seed", type=int, default=0, help="of noise and cuts (default %(default)s)")
    command.add_argument("--device", default="cpu", help="where the network runs (default %(default)s)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--out", metavar="FILE.json", help="also write the JSON to a file")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check each tokenizer; 1 when a law is broken."""
    from tqdm import tqdm

    from mmtok import auto
    from mmtok.bench.laws import ABOUT, check
    from mmtok.tokens import write_atomic

    if args.laws:
        width = max(map(len, ABOUT))
        print("\n".join(f"{law:<{width}}  {about}" for law, about in ABOUT.items()))
        return 0
    names = [*args.names, *(auto.available() if args.all else [])]
    if not names:
        raise ValueError("expected a tokenizer to check: a name of mmtok list, a folder, family:source, or --all")
    only = None if args.only is None else [law.strip() for law in args.only.split(",")]
    reports = []
    for name in names:
        tokenizer: Any = auto.load(name, args.device)
        if args.raw:
            if not hasattr(tokenizer, "raw"):
                raise ValueError(f"--raw: {name} has no mitigations to leave out; it is for family:source")
            tokenizer = tokenizer.raw()
        silent = args.json or not sys.stderr.isatty()
        report = check(
            tokenizer,
            only,
            args.items,
            seconds=args.seconds,
            tolerance=args.tolerance,
            seed=args.seed,
            progress=lambda laws, name=name, silent=silent: tqdm(laws, desc=name, leave=False, disable=silent),
        )
        reports.append(report)
        if not args.json:
            print(report.table(), end="\n\n" if name != names[-1] else "\n")
    found = [r.to_dict() for r in reports]
    text = json.dumps(found[0] if len(found) == 1 else found, indent=2)
    if args.json:
        print(text)
    if args.out:
        write_atomic(Path(args.out), (text + "\n").encode())
    return 0 if all(r.ok for r in reports) else 1
