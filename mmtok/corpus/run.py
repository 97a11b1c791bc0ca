"""`tokenize_corpus`: a source to a folder of shards, by any engine, killed and resumed without a lost or doubled token.

What is there decides what is left to do: a shard with its done-marker is done, every other one is made, and the index
follows from the markers. So a run that was killed is resumed by the same call, and the bytes are those of an
undisturbed run, whatever the engine and the number of workers; only ``log.jsonl`` tells them apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from mmtok import auto
from mmtok.corpus.attempts import HOPELESS, Outcome, Stop
from mmtok.corpus.engines import ENGINES, Ranks, RaySettings, join_ranks, run_ranks, run_ray
from mmtok.corpus.index import write_index
from mmtok.corpus.lock import FolderLock
from mmtok.corpus.packing import PACKINGS
from mmtok.corpus.plan import changed, load_plan, make_plan, save_plan, split_source
from mmtok.corpus.pool import run_local
from mmtok.corpus.progress import Progress, log_line
from mmtok.corpus.records import INDEX, LOCK, LOG, PLAN, SCHEMA, SHARDS, Done, Plan, PlanSettings, Task
from mmtok.corpus.shard_file import read_done, shard_path
from mmtok.corpus.summary import Summary
from mmtok.tokens import write_atomic

RUN = "run.json"
UNITS = {"image": "Mpx", "audio": "s of sound"}


def tokenize_corpus(
    source: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    engine: str = "local",
    workers: int = 1,
    plan_settings: PlanSettings | None = None,
    device: str = "cpu",
    *,
    batch_seconds: float = 60.0,
    batch_pixels: int = 2**22,
    padding: float = 0.1,
    text: bool = False,
    num_codebooks: int | None = None,
    num_tokens: int | None = None,
    packing: str = "auto",
    decode_threads: int = 1,
    model_threads: int = 1,
    ray: RaySettings | None = None,
    progress: bool = True,
    stream: TextIO | None = None,
) -> Summary:
    """Tokenize all of ``source`` into the folder ``out``, or what is left of it.

    The first run writes ``plan.json`` and ``run.json`` before any work. Later runs compare: another tokenizer, source
    or setting is refused. A script calls this under ``if __name__ == "__main__":``, as every use of processes needs.

    Args:
        source: see `mmtok.corpus.plan.make_plan`.
        tokenizer: what `mmtok.load` takes.
        out: the corpus folder, new, empty or of a former run.
        engine: ``local``: processes of this machine. ``accelerate``: the processes of `accelerate launch`, each with
            its share; without it a single one. ``ray``: tasks of Ray, on one machine or many. Those of many machines
            need ``source``, ``tokenizer`` and ``out`` on a file system that all of them see.
        workers: processes (local), or tasks at a time (ray).
        plan_settings: how the source is cut and read; None: as before, or the defaults.
        device: ``cpu``, ``cuda`` (local and accelerate: the GPUs in turn; ray: the one that Ray gives) or ``cuda:1``.
        batch_seconds, batch_pixels, padding, text, num_codebooks, num_tokens, packing: see `mmtok.corpus.records.Task`.
        decode_threads: of each worker, beside the model.
        model_threads: of each worker on the CPU. Codes depend on it, as sums of other parts round differently (one code
            in some thousands for some tokenizers), so it belongs to the settings, and more workers is the way to more
            speed.
        ray: see `RaySettings`.
        progress: shown on ``stream`` (standard error).

    Raises:
        ValueError: bad arguments, another run writes there, or what is there is not what would be written now.
        OSError: ``out`` cannot be written. ImportError: a package is missing.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    for name, count in (("workers", workers), ("decode_threads", decode_threads), ("model_threads", model_threads)):
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")
    try:
        torch.device(device)
    except RuntimeError as e:
        raise ValueError(f"device: expected cpu, cuda or cuda:1, got {device!r}") from e
    begun = time.monotonic()
    ranks = join_ranks() if engine == "accelerate" else Ranks()
    stop = Stop()
    with contextlib.ExitStack() as stack:
        encode = {
            **{"batch_seconds": batch_seconds, "batch_pixels": batch_pixels, "padding": padding, "text": text},
            **{"num_codebooks": num_codebooks, "num_tokens": num_tokens, "packing": packing},
        }
        folder = Path(out).expanduser().absolute()
        job, error = None, None
        if ranks.rank == 0:
            try:
                job = _open_job(source, tokenizer, folder, plan_settings, device, model_threads, encode, stack)
            except (ValueError, OSError, ImportError) as e:
                if ranks.size == 1:
                    raise
                error = e
        job, error = ranks.share((job, error))
        if error is not None:
            raise error  # of rank 0, on all of them
        tasks = [dataclasses.replace(t, threads=decode_threads) for t in job.tasks]
        running = {
            "local": lambda: run_local(tasks, workers, model_threads, stop),
            "accelerate": lambda: run_ranks(tasks, ranks, model_threads, stop),
            "ray": lambda: run_ray(tasks, workers, model_threads, stop, ray or RaySettings()),
        }[engine]
        ready = job.shards - len(tasks) if ranks.size == 1 else 0  # of several ranks, the first tells of its own shards
        total, seen = ready + len(ranks.own(tasks)), progress and ranks.rank == 0
        shown = Progress(total, ready, UNITS[job.modality], stream, shown=seen)
        outcomes = _carry_out(running, folder, stop, shown, max(3, workers))
        found = [o for part in ranks.collect(outcomes) for o in part]
        stop.reason = next((r for r in ranks.collect(stop.reason) if r), None)
        summary = _finish(folder, job, found, stop, time.monotonic() - begun) if ranks.rank == 0 else None
        return ranks.share(summary)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is left to do: a task for every shard that is not in place, of ``shards``."""

    tasks: Sequence[Task]
    shards: int
    modality: str


def _open_job(
    source: str | Path,
    tokenizer: str | Path,
    out: Path,
    plan_settings: PlanSettings | None,
    device: str,
    model_threads: int,
    encode: Mapping[str, Any],
    stack: contextlib.ExitStack,
) -> _Job:
    """Lock the folder, plan or compare, and see what is left. The lock is held until ``stack`` ends."""
    card = tokenizer_card(str(tokenizer))
    _check_encode(str(tokenizer), card, encode)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: expected a folder, got a file; choose another --out")
    if out.is_dir() and not (out / RUN).is_file():
        _check_ours(out)  # before the lock: in a folder of somebody else's nothing is left behind
    out.mkdir(parents=True, exist_ok=True)
    stack.enter_context(FolderLock(out))
    sweep(out)
    (out / SHARDS).mkdir(exist_ok=True)
    # Codes of a GPU and of a CPU may differ in roundings, so a corpus has one of them; whose is no matter.
    about = {"device": torch.device(device).type, "model_threads": model_threads, **encode}
    settings = {"tokenizer": card["name"], "fingerprint": card["fingerprint"], "settings": about, "schema": SCHEMA}
    if (out / RUN).is_file():
        plan = _former_plan(out, source, plan_settings, settings)
    else:
        plan = _first_plan(out, source, plan_settings, card["modality"])
        write_atomic(out / RUN, json.dumps({**settings, "plan": plan.fingerprint}, indent=1).encode() + b"\n")
    name = os.path.abspath(tokenizer) if "folder" in card and str(tokenizer) not in auto.available() else str(tokenizer)
    name = str(tokenizer) if str(tokenizer).startswith(auto.HUB_PREFIX) else name
    first = Task(name, card["fingerprint"], str(out / PLAN), 0, str(out), device, **encode)
    left = [s.number for s in plan.shards if done_marker(out, s.number) is None]
    if left:
        (out / INDEX).unlink(missing_ok=True)  # it would tell of shards that are gone
    return _Job([dataclasses.replace(first, shard=n) for n in left], len(plan.shards), plan.modality)


def tokenizer_card(name: str) -> dict[str, Any]:
    """`mmtok.auto.card` of one tokenizer; ValueError for a family, which is none yet."""
    found = auto.card(name)
    if found.get("family"):
        raise ValueError(f"tokenizer: {name} is a family: name one of it, {name}:SOURCE ({found['source']})")
    return found


def _check_encode(tokenizer: str, card: Mapping[str, Any], encode: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments that the tokenizer cannot take: once here instead of once a shard."""
    levels, wanted = card["num_codebooks"], encode["num_codebooks"]
    if wanted is not None and not 1 <= wanted <= levels:
        raise ValueError(f"num_codebooks: expected 1..{levels} for {tokenizer}, got {wanted}")
    if encode["num_tokens"] is not None and encode["num_tokens"] < 1:
        raise ValueError(f"num_tokens: expected at least 1, got {encode['num_tokens']}")
    if encode["packing"] not in PACKINGS:
        raise ValueError(f"packing: expected one of {', '.join(PACKINGS)}, got {encode['packing']!r}")
    if encode["text"] and "text" not in card["conditions"]:
        raise ValueError(f"text: {tokenizer} takes no text; leave it out (texts are kept beside the codes anyway)")


def _check_ours(out: Path) -> None:
    """Raise ValueError when anything lies in a folder without a run that a run which was killed at its start would
    not have left."""
    ours = {PLAN, SHARDS, LOG, LOCK, Path(PLAN).stem + ".files"}
    asides = tuple(f".{name}." for name in (*ours, RUN))
    others = sorted(p.name for p in out.iterdir() if p.name not in ours and not p.name.startswith(asides))
    others += sorted(f"{SHARDS}/{p.name}" for p in (out / SHARDS).glob("*"))
    if others:
        raise ValueError(
            f"{out}: expected a new or empty folder, or a corpus, got {', '.join(others[:3])}"
            f"{' ...' if len(others) > 3 else ''}; choose another --out"
        )


def _first_plan(out: Path, source: str | Path, settings: PlanSettings | None, modality: str) -> Plan:
    """Plan the source and write the plan. Nothing else may be in the folder."""
    _check_ours(out)
    settings = settings or PlanSettings()
    if settings.modality not in (None, modality):
        raise ValueError(f"modality: the tokenizer takes {modality}, the plan is to hold {settings.modality}")
    plan = make_plan(source, dataclasses.replace(settings, modality=modality))
    save_plan(plan, out / PLAN)
    return plan


def _former_plan(out: Path, source: str | Path, given: PlanSettings | None, now: Mapping[str, Any]) -> Plan:
    """The plan of a former run. Raises ValueError unless this run would write what that one did."""
    remedy = "go on as it began, or choose another --out"
    try:
        then = json.loads((out / RUN).read_bytes())
        pairs = [(key, then[key], now[key]) for key in ("schema", "tokenizer", "fingerprint")]
        pairs += [(key, then["settings"].get(key), value) for key, value in now["settings"].items()]
        fingerprint = then["plan"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{out / RUN} is damaged ({e!r}); restore it, or choose another --out") from e
    plan = load_plan(out / PLAN)
    if plan.fingerprint != fingerprint:
        raise ValueError(f"{out / PLAN} is not the plan that {RUN} names; restore both, or choose another --out")
    kind, location = split_source(str(source))
    pairs.append(("source", plan.location, os.path.abspath(os.path.expanduser(location))))
    pairs += [("kind of source", plan.kind, kind)] if kind else []
    wanted = dataclasses.asdict(given) if given is not None else {}
    pairs += [(key, plan.settings[key], value) for key, value in wanted.items() if value is not None]
    differences = [f"{key} {old!r} then, {new!r} now" for key, old, new in pairs if old != new]
    if differences:
        raise ValueError(f"{out} was begun with other settings: {'; '.join(differences)}; {remedy}")
    if (difference := changed(plan)) is not None:
        raise ValueError(
            f"the source {plan.source} has changed since {out} was begun: {difference}; restore it, or tokenize "
            "what it is now into another --out"
        )
    return plan


def done_marker(out: Path, number: int) -> Done | None:
    """The marker of a shard that is in place; None where the marker or the shard is missing or damaged."""
    try:
        done = read_done(out, number)
        return done if done is not None and shard_path(out, number).stat().st_size == done.bytes else None
    except (ValueError, OSError):
        return None


def sweep(out: Path) -> None:
    """Remove what killed writers left: hidden files that were never renamed. Only the run that holds the lock may."""
    for folder in (out, out / SHARDS):
        for path in folder.glob(".*") if folder.is_dir() else ():
            if path.name != LOCK and path.is_file():
                path.unlink(missing_ok=True)


def _carry_out(
    running: Callable[[], Generator[Outcome, None, None]], out: Path, stop: Stop, shown: Progress, trials: int
) -> list[Outcome]:
    """Work through the engine's tasks; every outcome is logged and shown.

    A full disk stops the run, and so do ``trials`` shards that fail before a single one is done: the rest would too.
    """
    outcomes: list[Outcome] = []
    with contextlib.suppress(OSError):
        log_line(
            out / LOG,
            {"run": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "left": shown.total - shown.ready},
        )
    try:
        with _ctrl_c(stop), contextlib.closing(running()) as found:
            for outcome in found:
                outcomes.append(outcome)
                done = outcome.worked.done if outcome.worked else None
                with contextlib.suppress(OSError):  # a log that finds no room loses lines, and the run nothing
                    log_line(out / LOG, _log_of(outcome))
                if done is not None:
                    shown.add(done.items, outcome.amount, len(done.failures))
                    continue
                shown.say(f"shard {outcome.task.shard:05d}: {outcome.reason}")
                if outcome.hopeless or (len(outcomes) >= trials and not any(o.worked for o in outcomes)):
                    stop.ask(outcome.reason or "nothing can be done")
    except KeyboardInterrupt:
        stop.ask("interrupted")
    finally:
        shown.close()
    return outcomes


def _log_of(outcome: Outcome) -> dict[str, Any]:
    done, seconds = None, {}
    if outcome.worked is not None:
        done, seconds = outcome.worked.done, dict(outcome.worked.seconds)
    return {
        "shard": outcome.task.shard,
        "worker": outcome.worker,
        "attempts": outcome.attempts,
        "start": outcome.start,
        "took": outcome.seconds,
        "seconds": seconds,
        "items": done.items if done else 0,
        "failures": len(done.failures) if done else 0,
        "amount": outcome.amount,
        "reason": outcome.reason,
    }


@contextlib.contextmanager
def _ctrl_c(stop: Stop) -> Iterator[None]:
    """The first Ctrl-C lets the shards at work be finished, the second abandons them; only the main thread is told."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupted(number: int, frame: object) -> None:
        if stop.reason is not None:
            raise KeyboardInterrupt
        stop.ask("interrupted")
        with contextlib.suppress(OSError):  # not print, which must not be entered twice
            os.write(2, b"\nfinishing the shards at work; Ctrl-C again abandons them\n")

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _finish(out: Path, job: _Job, outcomes: Sequence[Outcome], stop: Stop, seconds: float) -> Summary:
    """Index the corpus if it is whole, and tell what is there."""
    sweep(out)
    markers = [done_marker(out, number) for number in range(job.shards)]
    done = [m for m in markers if m is not None]
    failures = sum(len(m.failures) for m in done)
    items = sum(m.items for m in done)
    if len(done) == job.shards:
        try:
            if not (out / INDEX).is_file():
                write_index(out)
            totals = json.loads((out / INDEX).read_bytes())["totals"]
            items, failures = totals["items"], totals["failures"]  # a key of several shards counts once
        except OSError as e:
            if e.errno not in HOPELESS:
                raise
            stop.ask(f"no room for the index ({e})")
    worked = [o.worked.seconds for o in outcomes if o.worked is not None]
    total = sum(s["total"] for s in worked)
    padded = sum(m.positions / (1 - m.padding) for m in done)
    positions = sum(m.positions for m in done)
    return Summary(
        items=items,
        failures=failures,
        shards=job.shards,
        done=len(done),
        made=len(worked),
        made_items=sum(o.worked.done.items for o in outcomes if o.worked is not None),
        missing={o.task.shard: o.reason or "" for o in outcomes if o.worked is None and markers[o.task.shard] is None},
        positions=positions,
        codes=sum(m.codes for m in done),
        bytes=sum(m.bytes for m in done),
        amount=sum(o.amount for o in outcomes),
        unit=UNITS[job.modality],
        seconds=seconds,
        share_in_model=sum(s["model"] for s in worked) / total if total else None,
        padding=1 - positions / padded if padded else 0.0,
        stopped=stop.reason,
        interrupted=stop.reason == "interrupted",
    )
