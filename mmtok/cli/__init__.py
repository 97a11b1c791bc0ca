"""The command `mmtok`: one module a group of commands, torch imported only once a command runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from mmtok.cli import bench, check, corpus, demo, doctor, files, show
from mmtok.cli.paths import INPUT_ERRORS, one_line

EPILOG = """\
start here:
  mmtok demo                                  a photo and a spoken sentence to LLM ids and back, as an HTML report
  mmtok encode photo.jpg -o p.safetensors     photo -> codes
  mmtok decode p.safetensors -o p.png         codes -> photo of the same size
  mmtok encode corpus/ -o tokens/             a whole folder, images and sound; run it again to resume
  mmtok corpus --help                         millions of files or tar shards, on one machine or many
  mmtok list                                  the tokenizers that are there
  mmtok check NAME                            does it keep the laws: padding, batching, streaming, sizes ...
  mmtok bench NAME jpeg#bytes=512 --out run/  what it costs and what comes back, beside others, as an HTML report
  mmtok doctor                                is this installation whole?

exit codes: 0 all well, 1 some of many failed, or doctor, check, bench or corpus found something broken, 2 bad input,
130 interrupted
"""


def parser() -> argparse.ArgumentParser:
    """The argument parser with every command registered."""
    top = argparse.ArgumentParser(
        prog="mmtok",
        description="Images and sound to the ids a language model reads, and back.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--traceback", action="store_true", help="show the Python traceback of an error (for bug reports)")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=bench.Command)
    for module in (demo, files, corpus, show, check, bench, doctor):
        module.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Bad input is one line on standard error and code 2."""
    args = parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted; what was written so far is whole", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `mmtok list | head`: the reader has gone, and so must the flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except INPUT_ERRORS as e:
        if args.traceback:
            raise
        print(f"error: {one_line(e)}", file=sys.stderr)
        return 2
