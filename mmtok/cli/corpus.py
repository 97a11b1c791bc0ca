"""`mmtok corpus`: a whole corpus to tokens on one machine or many, and what to do with it afterwards."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtok.cli.files import checked_device
from mmtok.cli.paths import check_output

if TYPE_CHECKING:
    from mmtok.corpus.records import Failure, PlanSettings
    from mmtok.corpus.summary import Summary

EPILOG = """\
a corpus from its source to training:
  mmtok corpus plan photos/                                         what is there, and how it would be cut
  mmtok corpus tokenize photos/ --tokenizer NAME --out corpus/      all of it; run it again to resume
  mmtok corpus verify corpus/                                       is every byte what it should be
  mmtok corpus stats corpus/                                        tokens, bits, codebook usage, failures
  mmtok corpus sample corpus/ --out sample.html                     some items decoded, beside their originals

and in Python:
  from mmtok.corpus.stream import TokenStream
  stream = TokenStream("corpus/", batch=32)           # shuffled, dealt to ranks and workers, state_dict() resumes
  for batch in stream.loader(workers=2): ...          # batch.tokens.codes (B, Q, T), batch.texts, batch.keys
One item: mmtok.corpus.index.Corpus("corpus/")["key"].

Each action has its own --help.
exit codes: 0 all well, 1 shards are missing or verify found something, 2 bad input, 130 interrupted
"""
SOURCES = """\
SOURCE is one of
  photos/                          a folder of pictures or sounds, with .txt or .json beside them, or an index in it
  'shards/train-{0000..0127}.tar'  tar files as WebDataset names their members; a folder or a glob of them
  table.parquet                    Parquet with a column of bytes; a folder or a glob of them
  dataset/                         a data set that Hugging Face's save_to_disk wrote
Where a folder holds several kinds, write folder:, tar:, parquet: or datasets: before it.
"""
TOKENIZE = f"""\
{SOURCES}
examples:
  mmtok corpus tokenize photos/ --tokenizer image-binary1d-64x64 --out corpus/ --workers 8
  mmtok corpus tokenize 'cc3m/*.tar' --tokenizer NAME --out corpus/ --device cuda --threads 4
  mmtok corpus tokenize speech/ --tokenizer audio-codec-16k-4kbps --levels 4 --out corpus/ --dry-run

every GPU of a machine, or of machines that accelerate knows (each process takes its share of the shards):
  accelerate launch --multi_gpu --num_processes 8 -m mmtok.cli corpus tokenize SOURCE --tokenizer NAME \\
      --out /shared/corpus --engine accelerate --device cuda

many machines with Ray (mmtok installed on all of them, SOURCE, NAME and OUT on a file system that all of them see):
  ray start --head                                    on the first;  ray start --address FIRST:6379  on the others
  mmtok corpus tokenize /shared/source --tokenizer NAME --out /shared/corpus --engine ray --address auto \\
      --workers 64 --device cuda

To resume after a kill, a crash or a full disk: the same command. Shards that are done are not made again, and the
corpus is byte for byte that of an undisturbed run, whatever the engine and the number of workers. Another tokenizer,
source or setting on the same OUT is refused, and so is a second run while one is writing there.

What OUT holds:
  plan.json, plan.files, run.json   what the source was cut into, and the settings; written before any work
  shards/00000.safetensors ...      codes, lengths, keys, texts; readable without mmtok, its header says how
  shards/00000.done.json ...        written once that shard is in place, with its checksum and its failures
  index.json, index.safetensors     totals, and where each key is; written once every shard is there
  failures.jsonl                    what could not be read or tokenized, and why: a bad file never stops a run
  log.jsonl                         who did which shard when; the only one that differs between two runs

exit codes: 0 every shard is there (bad files are no error, failures.jsonl lists them), 1 shards are missing,
2 bad input, 130 interrupted
"""
SAMPLE = """\
examples:
  mmtok corpus sample corpus/ --out sample.html
  mmtok corpus sample corpus/ --out sample.html --items 20 --seed 1 --tokenizer path/to/my/checkpoint

Items of an unfinished corpus are drawn from what is there. Without --tokenizer it is the one that the corpus names;
another one is refused by its fingerprint. The original stands beside it as long as SOURCE is where it was.
"""
VERIFY = """\
Reads every byte: checksums, contents, ranges of codes, items and failures against the plan, the index and its keys.
Each problem is a line with its remedy; for most, delete what it names and run `mmtok corpus tokenize` again.

exit codes: 0 all well, 1 something is wrong or missing, 2 bad input
"""
COLUMNS = ("key_column", "text_column", "bytes_column")
PLAN_OPTIONS = ("modality", "items_per_shard", *COLUMNS, "pattern", "extension", "index")
REASONS = 3  # failures that are told after a run


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command and its actions."""
    command = commands.add_parser(
        "corpus",
        help="tokenize a whole corpus on one machine or many, resumable; look at it, verify it",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Millions of pictures or sounds to shards of tokens that a training reads.",
        epilog=EPILOG,
    )
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
    goes_on = "a source to shards of tokens; the same command again goes on"
    _add_tokenize(_action(actions, "tokenize", goes_on, TOKENIZE, run_tokenize))
    plan = _action(actions, "plan", "what a source holds and how it would be cut; writes nothing", SOURCES, run_plan)
    plan.add_argument("source", metavar="SOURCE", help="see below")
    _add_plan_options(plan)
    figures = _action(actions, "stats", "tokens, bits, lengths, codebook usage, failures", None, run_stats)
    figures.add_argument("folder", metavar="DIR", help="the corpus, finished or not")
    figures.add_argument("--all", action="store_true", help="count every code (default: about 134 million, spread)")
    figures.add_argument("--json", action="store_true", help="print JSON")
    check = _action(actions, "verify", "checksums and contents of all of it", VERIFY, run_verify)
    check.add_argument("folder", metavar="DIR", help="the corpus, finished or not")
    sample = _action(actions, "sample", "some items decoded into an HTML page", SAMPLE, run_sample)
    sample.add_argument("folder", metavar="DIR", help="the corpus, finished or not")
    sample.add_argument("--out", "-o", required=True, metavar="PAGE.html", help="where the page goes")
    sample.add_argument("--items", type=int, default=8, metavar="N", help="how many (default: %(default)s)")
    sample.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    sample.add_argument("--tokenizer", metavar="NAME", help="where it is, if the corpus' own name does not find it")
    sample.add_argument("--decoded-only", action="store_true", help="do not look for the originals")
    sample.add_argument("--device", default="cpu", help="where it decodes (default: %(default)s)")


def _action(actions: Any, name: str, about: str, epilog: str | None, run: Any) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    told = f"{about[0].upper()}{about[1:]}."
    action = actions.add_parser(name, help=about, description=told, epilog=epilog, formatter_class=form)
    action.set_defaults(run=run)
    return action


def _add_tokenize(action: argparse.ArgumentParser) -> None:
    action.add_argument("source", metavar="SOURCE", help="see below")
    action.add_argument("--tokenizer", required=True, metavar="NAME", help="of mmtok list, a folder, family:source")
    action.add_argument("--out", "-o", required=True, metavar="DIR", help="the corpus: a new folder, or one to resume")
    action.add_argument("--dry-run", action="store_true", help="say what would be done, write nothing, and stop")
    action.add_argument("--quiet", action="store_true", help="no progress, only the summary")
    codes = action.add_argument_group("which codes; fixed for a corpus")
    codes.add_argument("--levels", type=int, metavar="Q", help="only the first Q levels (default: all)")
    codes.add_argument("--tokens", type=int, metavar="N", help="only the first N positions (default: all)")
    codes.add_argument("--text", action="store_true", help="give texts to a tokenizer that is conditioned on them")
    codes.add_argument(
        "--packing",
        choices=("auto", "bits", "ints"),
        default="auto",
        help="on disk: as few bits as a code needs, smallest unsigned ints, or bits where they save a tenth (auto)",
    )
    who = action.add_argument_group("who works")
    who.add_argument(
        "--engine",
        choices=("local", "accelerate", "ray"),
        default="local",
        help="processes of this machine, of accelerate launch, or tasks of Ray (default: %(default)s)",
    )
    who.add_argument("--workers", type=int, metavar="N", help="local: processes, ray: tasks at a time (default: 1)")
    who.add_argument("--address", help="ray: auto or HOST:PORT (default: RAY_ADDRESS, else a Ray of its own)")
    who.add_argument("--gpus", type=float, metavar="N", help="ray: of a task (default: 1 with --device cuda, else 0)")
    who.add_argument("--device", default="cpu", help="cpu, cuda (all GPUs in turn), cuda:1 (default: %(default)s)")
    who.add_argument("--threads", type=int, default=1, metavar="N", help="that decode, a worker (default: %(default)s)")
    who.add_argument(
        "--model-threads",
        type=int,
        default=1,
        metavar="N",
        help="of the network on a CPU; fixed for a corpus, since roundings depend on it (default: %(default)s)",
    )
    who.add_argument("--batch-seconds", type=float, default=60.0, metavar="S", help="sound a batch (default: 60)")
    who.add_argument("--batch-pixels", type=int, default=2**22, metavar="N", help="pixels a batch (default: 4194304)")
    _add_plan_options(action)


def _add_plan_options(action: argparse.ArgumentParser) -> None:
    what = action.add_argument_group("what is taken of SOURCE; fixed for a corpus")
    what.add_argument("--modality", choices=("image", "audio"), help="default: the tokenizer's, or what is there")
    what.add_argument("--items-per-shard", type=int, metavar="N", help="of folders and tables; a tar is one (1000)")
    what.add_argument("--text-column", metavar="C", help="of tables and .json (default: caption ...); '' for no texts")
    what.add_argument("--key-column", metavar="C", help="of tables (default: keys are file#row)")
    what.add_argument("--bytes-column", metavar="C", help="of tables (default: the one with pictures or sounds)")
    what.add_argument("--pattern", metavar="GLOB", help="only files or splits whose path fits, e.g. 'train/*'")
    what.add_argument("--extension", metavar="E", help="only files or members that end so, e.g. jpg, left.png")
    what.add_argument("--index", metavar="FILE", help="JSON lines in the folder with path and text; 'none': by endings")


def plan_settings(args: argparse.Namespace) -> PlanSettings | None:
    """What the options say of the source; None where they say nothing: then a resumed run keeps what it had."""
    from mmtok.corpus.records import PlanSettings

    given = {name: getattr(args, name) for name in PLAN_OPTIONS if getattr(args, name) is not None}
    return PlanSettings(**given) if given else None


def run_plan(args: argparse.Namespace) -> int:
    """Describe a source."""
    from mmtok.corpus.plan import describe, make_plan

    print(describe(make_plan(args.source, plan_settings(args))))
    return 0


def run_tokenize(args: argparse.Namespace) -> int:
    """Tokenize, tell what is there now and what to do next; see `Summary.exit_code`."""
    from mmtok.corpus.engines import Ranks, RaySettings, join_ranks
    from mmtok.corpus.run import tokenize_corpus

    if args.engine != "ray" and (args.address is not None or args.gpus is not None):
        raise ValueError(f"--address and --gpus are for --engine ray, got --engine {args.engine}")
    if args.engine == "accelerate" and args.workers is not None:
        raise ValueError("--workers: `accelerate launch --num_processes N` says how many; leave it out")
    settings, out = plan_settings(args), Path(args.out).expanduser()
    if args.dry_run:
        return _dry_run(args, settings, out)
    if args.engine != "ray":  # the machine that asks Ray need not have the device
        checked_device(args.device)
    ranks = join_ranks() if args.engine == "accelerate" else Ranks()
    before = _done_numbers(out)
    if before and ranks.rank == 0:
        print(_resumed(out, before), flush=True)
    gpus = args.gpus if args.gpus is not None else float(args.device.startswith("cuda"))
    summary = tokenize_corpus(
        args.source,
        args.tokenizer,
        out,
        args.engine,
        1 if args.workers is None else args.workers,
        settings,
        args.device,
        batch_seconds=args.batch_seconds,
        batch_pixels=args.batch_pixels,
        text=args.text,
        num_codebooks=args.levels,
        num_tokens=args.tokens,
        packing=args.packing,
        decode_threads=args.threads,
        model_threads=args.model_threads,
        ray=RaySettings(address=args.address, gpus=gpus),
        progress=not args.quiet,
    )
    if ranks.rank == 0:
        print("\n".join(_told(summary, args.out, args.tokenizer)))
    return summary.exit_code


def _dry_run(args: argparse.Namespace, settings: PlanSettings | None, out: Path) -> int:
    import dataclasses

    from mmtok.corpus.plan import describe, make_plan
    from mmtok.corpus.records import PlanSettings
    from mmtok.corpus.run import tokenizer_card

    card = tokenizer_card(args.tokenizer)
    settings = settings or PlanSettings()
    if settings.modality not in (None, card["modality"]):
        raise ValueError(f"--modality {settings.modality}: {args.tokenizer} takes {card['modality']}")
    plan = make_plan(args.source, dataclasses.replace(settings, modality=card["modality"]))
    print(f"{describe(plan)}\n{'tokenizer':<12} {card['name']}, fingerprint {card['fingerprint']}")
    before = _done_numbers(out)
    print(_resumed(out, before) if before else f"{'out':<12} {out}: nothing is done there yet")
    print("nothing was written (--dry-run)")
    return 0


def _done_numbers(out: Path) -> set[str]:
    """Names of the done-markers that are there; one look at the folder, whatever the size of the corpus."""
    from mmtok.corpus.records import SHARDS

    folder = out / SHARDS
    return {e.name for e in os.scandir(folder) if e.name.endswith(".done.json")} if folder.is_dir() else set()


def _resumed(out: Path, before: set[str]) -> str:
    return f"{out} was begun before: {_count(len(before), 'shard')} of it done, not made again."


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _told(summary: Summary, given: str, tokenizer: str) -> list[str]:
    """The summary of a run, and what to do next."""
    from mmtok import auto
    from mmtok.corpus.plan import readable_bytes
    from mmtok.corpus.records import FAILURES, INDEX

    out = Path(given).expanduser()
    whole = (out / INDEX).is_file()
    size = readable_bytes(summary.bytes)
    rows = [("items", f"{summary.items:,} in {summary.done:,} of {_count(summary.shards, 'shard')}, {size}")]
    if whole and summary.items:
        totals = json.loads((out / INDEX).read_bytes())["totals"]
        disk = totals["bytes"] / totals["items"]
        rows.append(("an item", f"{totals['bits'] / totals['items']:,.1f} bits of codes, {disk:,.1f} bytes on disk"))
    if summary.made:
        rows.append(("this run", f"{_count(summary.made, 'shard')} in {summary.seconds:.1f} s: {_rates(summary)}"))
    if summary.share_in_model is not None:
        rows.append(("time", f"{summary.share_in_model:.0%} of the workers' time in the model"))
    if summary.items:
        rows.append(("padding", f"{summary.padding:.1%} of what the model saw"))
    lines = [f"{name:<9} {value}" for name, value in rows]
    if summary.failures:
        where = str(out / FAILURES) if whole else f"{FAILURES}, once every shard is there"
        lines.append(f"{'failures':<9} {summary.failures:,}, each with its reason in {where}")
        lines += [f"  {f.key}: {f.reason}" for f in _first_failures(out, whole)]
    else:
        lines.append(f"{'failures':<9} none")
    lines += [f"missing   shard {number:05d}: {reason}" for number, reason in sorted(summary.missing.items())]
    if summary.stopped:
        lines.append(f"stopped   {summary.stopped}")
    if summary.exit_code:
        left = _count(summary.shards - summary.done, "shard")
        return [*lines, f"unfinished: {left} left; the same command goes on where this one stopped"]
    name = shlex.quote(given)
    # A corpus carries its tokenizer's name, which does not find one that is given by its folder.
    which = "" if tokenizer in auto.available() else f" --tokenizer {shlex.quote(tokenizer)}"
    return [
        *lines,
        "",
        "next:",
        f"  mmtok corpus verify {name}",
        f"  mmtok corpus stats {name}",
        f"  mmtok corpus sample {name} --out sample.html{which}",
    ]


def _rates(summary: Summary) -> str:
    """What a second brought."""
    seconds = max(summary.seconds, 1e-9)
    made = f"{_short(summary.made_items / seconds)} items/s"
    return f"{made}, {_short(summary.amount)} {summary.unit}, {_short(summary.amount / seconds)} a second"


def _short(x: float) -> str:
    """Three digits, or all before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _first_failures(out: Path, whole: bool) -> list[Failure]:
    """Of the list where it is written, else of the markers, which hold all but those of keys that come twice."""
    from mmtok.corpus.index import done_shards
    from mmtok.corpus.records import FAILURES, Failure

    if not whole:
        return list(itertools.islice((f for done in done_shards(out) for f in done.failures), REASONS))
    with (out / FAILURES).open(encoding="utf-8") as f:
        return [Failure(**json.loads(line)) for line in itertools.islice(f, REASONS)]


def run_stats(args: argparse.Namespace) -> int:
    """Print the figures of a corpus."""
    from mmtok.corpus.inspect import stats, stats_text

    found = stats(args.folder, **({"max_codes": None} if args.all else {}))
    print(json.dumps(found, indent=2) if args.json else stats_text(found))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Read everything; 1 and a line a problem when something is wrong."""
    from tqdm import tqdm

    from mmtok.corpus.index import planned_items
    from mmtok.corpus.inspect import verify

    with tqdm(unit="shard", leave=False, disable=None) as bar:

        def advance(looked_at: int, planned: int) -> None:
            bar.total = planned
            bar.update(looked_at - bar.n)

        problems = verify(args.folder, advance)
    if problems:
        print("\n".join([*problems, f"{args.folder}: {_count(len(problems), 'problem')}"]))
        return 1
    shards = _count(len(planned_items(args.folder)), "shard")
    print(f"{args.folder}: all well ({shards}: checksums, contents, index, keys)")
    return 0


def run_sample(args: argparse.Namespace) -> int:
    """Decode some items into a page."""
    from mmtok.cli.corpus_page import write_page
    from mmtok.corpus.index import Corpus
    from mmtok.corpus.sample_page import draw, sample_items, tokenizer_of_corpus

    page = Path(args.out)
    check_output(page)
    corpus = Corpus(args.folder, partial=True)
    numbers = draw(len(corpus), args.items, args.seed)
    tokenizer = tokenizer_of_corpus(corpus, args.tokenizer, checked_device(args.device))
    shown = sample_items(corpus, numbers, tokenizer, not args.decoded_only)
    write_page(page, corpus, shown, args.seed)
    alone = [s for s in shown if s.original is None]
    without = f", {len(alone)} of them without the original ({alone[0].why})" if alone else ""
    print(f"{_count(len(shown), 'item')} of {len(corpus):,}, decoded by {tokenizer.name}{without}\npage: {page}")
    return 0
