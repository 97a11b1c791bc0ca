"""The pure task of a corpus: an input shard in, an output shard with its done-marker out, whoever runs it and when."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path

from mmtok import auto
from mmtok.corpus.batching import batches, check_limits
from mmtok.corpus.decode_ahead import DecodeAhead, Decoder, Ready, Refused, bytes_of, is_everyones, reason_of
from mmtok.corpus.plan import load_plan
from mmtok.corpus.records import Done, Failure, InputShard, Plan, Row, Sample, Task
from mmtok.corpus.shard_file import About, done_path, read_done, sha256_of, shard_path, write_done, write_shard
from mmtok.corpus.sources import read_samples
from mmtok.tokenizer import AudioTokenizer, Tokenizer, integers
from mmtok.tokens import Tokens

FIRST_WINDOW = 8  # items; the windows grow from there, so that the model need not wait long for the first
# From window to window. While the model works on one, the next is decoded: it may be larger by no more than the model
# takes longer than decoding (for our networks on a CPU: twice for speech, resampling included; for pictures little).
GROWTH = {"image": 1.25, "audio": 2.0}
FULL = (errno.ENOSPC, errno.EDQUOT)
_LOADED: dict[tuple[str, str, str], Tokenizer] = {}  # of this process: the last one, by name, fingerprint and device
_PLANS: dict[tuple[str, int, int], Plan] = {}  # of this process: the last one, by path, time and size


class StoppedError(Exception):
    """The caller's ``stop`` said so; nothing of the shard is written."""


@dataclasses.dataclass(frozen=True)
class Window:
    """How much is decoded before it is sorted into batches: up to ``items``, up to ``bytes`` in memory.

    As much again is decoded ahead, so that twice this is held at most.
    """

    items: int = 256
    bytes: int = 2**28


@dataclasses.dataclass(frozen=True)
class Worked:
    """A finished shard and where the time went.

    Args:
        done: the same on every run.
        seconds: ``wait`` for decoded samples, ``model`` (encode), ``write`` (shard and marker), ``load`` (plan and
            tokenizer, the first time in a process) and ``total``. All but ``total`` are 0 where nothing was to be done.
    """

    done: Done
    seconds: Mapping[str, float]


def tokenize_shard(
    task: Task,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
    window: Window | None = None,
) -> Worked:
    """Tokenize one shard, unless it is there already.

    Reading, decoding and resampling go on in ``task.threads`` threads while the model works. What is written follows
    from the source and the task alone, and each item's codes are those that encode gives it alone. Killed at any
    moment, this leaves nothing, a hidden file that the next start removes, or a shard without a marker that the next
    start makes again.

    Args:
        task: what to do.
        progress: called after each batch and each failure with (items, bytes of them in the source).
        stop: asked before each batch; once it says true, `StoppedError` is raised.
        window: see `Window`; None for the default. Another window makes other batches, not other codes.

    Raises:
        ValueError: the tokenizer, the plan and the task do not fit one another. OSError: the disk is full, the source
            is gone. ImportError: a package is missing. StoppedError: see ``stop``.
    """
    clock = Clock()
    done = finished(task)
    if done is None:
        with clock("load"):
            plan = plan_of(task)
            tokenizer = tokenizer_of(task)
            shard = check_task(task, plan, tokenizer)
        remove_asides(task)
        work = ShardWork(task, tokenizer, clock, progress or (lambda items, size: None), stop or (lambda: False))
        done = written(task, plan, work, work.rows(read_samples(plan, shard), window or Window()), clock)
    return Worked(done, clock.seconds | {"total": time.perf_counter() - clock.started})


def finished(task: Task) -> Done | None:
    """The marker of the task's shard where it is whole and the shard is what it says; None where there is work."""
    path = shard_path(task.out, task.shard)
    try:
        done = read_done(task.out, task.shard)
    except ValueError:  # damaged: it is written again
        return None
    return done if done is not None and path.is_file() and sha256_of(path) == done.sha256 else None


def written(task: Task, plan: Plan, work: ShardWork, rows: Generator[Row, None, None], clock: Clock) -> Done:
    """The shard of ``rows``, which ``work`` makes while they are asked for, then its marker, each aside and renamed."""
    path = shard_path(task.out, task.shard)
    spec = work.tokenizer.spec
    spec = spec if task.num_codebooks is None else spec.keep(task.num_codebooks)
    begun, made = time.perf_counter(), 0.0

    def timed() -> Iterator[Row]:
        nonlocal made
        start = time.perf_counter()
        for row in rows:
            made += time.perf_counter() - start
            yield row
            start = time.perf_counter()
        made += time.perf_counter() - start

    try:
        done = write_shard(path, timed(), spec, About(task.shard, packing=task.packing, plan=plan.fingerprint))
        done = dataclasses.replace(done, failures=tuple(work.failures), padding=work.padding)
        write_done(done, task.out)
    except OSError as e:
        remove_asides(task)
        if e.errno in FULL:
            free = shutil.disk_usage(path.parent).free
            words = f"no room to write {path} ({free} bytes are free there); make room and run again to go on"
            raise OSError(e.errno, words) from e
        raise
    finally:
        rows.close()
    clock.seconds["write"] += time.perf_counter() - begun - made
    return done


def tokenizer_of(task: Task) -> Tokenizer:
    """The task's tokenizer, loaded once a process. Raises ValueError when it is not the one that the run began with."""
    key = (task.tokenizer, task.fingerprint, task.device)
    if key not in _LOADED:
        found = auto.load(task.tokenizer, device=task.device)
        if found.fingerprint != task.fingerprint:
            raise ValueError(
                f"the tokenizer {task.tokenizer!r} has changed since the run began: expected fingerprint "
                f"{task.fingerprint}, got {found.fingerprint}; restore it, or begin a new run in another folder than "
                f"{task.out}"
            )
        _LOADED.clear()  # of another run: two would hold twice the memory
        _LOADED[key] = found
    return _LOADED[key]


def plan_of(task: Task) -> Plan:
    """The task's plan, read once a process as long as its file stays the same."""
    about = Path(task.plan).stat()
    key = (task.plan, about.st_mtime_ns, about.st_size)
    if key not in _PLANS:
        _PLANS.clear()
        _PLANS[key] = load_plan(task.plan)
    return _PLANS[key]


def check_task(task: Task, plan: Plan, tokenizer: Tokenizer) -> InputShard:
    """The task's shard of ``plan``. Raises ValueError for whatever would fail alike for every sample."""
    spec = tokenizer.base_spec()
    if spec.modality != plan.modality:
        raise ValueError(
            f"{task.tokenizer} takes {spec.modality}, the plan of {plan.source} holds {plan.modality}; choose another "
            "tokenizer, or plan again for its modality"
        )
    if task.text and "text" not in spec.conditions:
        raise ValueError(f"text: {task.tokenizer} takes no text; leave it out (texts are kept beside the codes anyway)")
    if task.num_codebooks is not None:
        spec.keep(task.num_codebooks)
    if task.num_tokens is not None and task.num_tokens < 1:
        raise ValueError(f"num_tokens: expected at least 1, got {task.num_tokens}")
    if task.threads < 1:
        raise ValueError(f"threads: expected at least 1 to decode beside the model, got {task.threads}")
    if not task.batch_seconds > 0:
        raise ValueError(f"batch_seconds: expected more than 0, got {task.batch_seconds}")
    check_limits(task.batch_pixels, task.padding)
    if not 0 <= task.shard < len(plan.shards):
        raise ValueError(f"{task.plan} has the shards 0..{len(plan.shards) - 1}, none of number {task.shard}")
    return plan.shards[task.shard]


def remove_asides(task: Task) -> None:
    """Remove what a killed run left beside the shard and its marker."""
    for path in (shard_path(task.out, task.shard), done_path(task.out, task.shard)):
        path.parent.mkdir(parents=True, exist_ok=True)
        for aside in path.parent.glob(f".{path.name}.*"):
            aside.unlink(missing_ok=True)


class Clock:
    """Seconds by what they went to: ``with clock("model"): ...``."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {"load": 0.0, "wait": 0.0, "model": 0.0, "write": 0.0}

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start


class ShardWork:
    """One shard under way: its rows come in the input's order, its failures are collected.

    Attributes:
        failures: so far. padding: share of it in the batches so far.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        clock: Clock,
        progress: Callable[[int, int], None],
        stop: Callable[[], bool],
    ):
        self.task, self.tokenizer, self.clock = task, tokenizer, clock
        self.progress, self.stop = progress, stop
        self.failures: list[Failure] = []
        self._held = self._padded = 0  # samples or pixels of the items, and of the batches that the model saw
        self._alone = False  # whether this tokenizer's items are encoded one by one
        self._made: dict[int, Row | Failure] = {}  # of the window under way, by position in the input

    @property
    def padding(self) -> float:
        return 1 - self._held / self._padded if self._padded else 0.0

    def rows(self, samples: Iterable[Sample | Failure], window: Window) -> Generator[Row, None, None]:
        """Encode every sample, a window at a time."""
        decoder = Decoder(self.tokenizer, self.task.text)
        with DecodeAhead(samples, decoder, self.task.threads, 2 * window.items, 2 * window.bytes) as self._ahead:
            results = iter(self._ahead)
            waiting: dict[int, Ready] = {}
            position = size = 0
            most, growth = min(FIRST_WINDOW, window.items), GROWTH[decoder.modality]
            while (result := self._next(results)) is not None:
                if isinstance(result, Ready):
                    waiting[position] = result
                    size += bytes_of(result)
                else:
                    self._made[position] = Failure(result.key, result.reason, self.task.shard)
                    self._ahead.release(1, 0)
                    self.progress(1, result.source_bytes)
                result = None  # a name would hold the sample past its release
                position += 1
                if len(waiting) >= most or size >= window.bytes:
                    yield from self._work_off(waiting)
                    size, most = 0, min(int(growth * most), window.items)
            yield from self._work_off(waiting)

    def _next(self, results: Iterator[Ready | Refused]) -> Ready | Refused | None:
        self._check_stop()
        with self.clock("wait"):
            return next(results, None)

    def _check_stop(self) -> None:
        if self.stop():
            raise StoppedError(f"shard {self.task.shard} was stopped; run again to go on")

    def _work_off(self, waiting: dict[int, Ready]) -> Iterator[Row]:
        """Encode all that waits, in batches, and forget it; its rows in order."""
        groups: dict[tuple, list[int]] = {}
        for position in waiting:  # no name for what waits: it would outlive its release
            groups.setdefault(waiting[position].group, []).append(position)
        for members in groups.values():
            lengths = [waiting[i].length for i in members]
            limit = self._limit(waiting[members[0]])
            for batch in batches(lengths, limit, self.task.padding, 1 if self._alone else None):
                self._check_stop()
                self._encode_batch({members[k]: waiting.pop(members[k]) for k in batch})
        made = [self._made[position] for position in sorted(self._made)]
        self._made.clear()
        self.failures += [m for m in made if isinstance(m, Failure)]
        yield from (m for m in made if isinstance(m, Row))

    def _limit(self, ready: Ready) -> int:
        """Of a padded batch, in the unit of ``ready.length``."""
        if ready.sample_rate is None:
            return self.task.batch_pixels
        tokenizer = self.tokenizer
        rate = tokenizer.sample_rate if isinstance(tokenizer, AudioTokenizer) else ready.sample_rate
        return max(1, int(self.task.batch_seconds * rate))

    def _encode_batch(self, batch: dict[int, Ready]) -> None:
        """Encode a batch and empty it; where that fails, item by item, so that a bad one costs itself only."""
        found, reason = [], ""
        try:
            with self.clock("model"):
                found = self._encode(list(batch.values()))
        except Exception as e:  # other people's networks raise anything
            if is_everyones(e):
                raise
            reason = reason_of(e)
        if reason and len(batch) > 1:  # not inside the except clause, which holds on to the failed batch's memory
            while batch:
                position = next(iter(batch))
                self._encode_batch({position: batch.pop(position)})
            return
        items, held = len(batch), sum(bytes_of(r) for r in batch.values())
        source_bytes = sum(r.source_bytes for r in batch.values())
        if reason:
            self._made |= {i: Failure(r.key, reason, self.task.shard) for i, r in batch.items()}
        else:
            lengths = [r.length for r in batch.values()]
            self._held += sum(r.held for r in batch.values())
            self._padded += sum(lengths) if self._alone else len(lengths) * max(lengths)
            rows = [Row(r.key, tokens, r.text, r.extra) for r, tokens in zip(batch.values(), found, strict=True)]
            self._made |= dict(zip(batch, rows, strict=True))
        batch.clear()
        self._ahead.release(items, held)
        self.progress(items, source_bytes)

    def _encode(self, items: list[Ready]) -> list[Tokens]:
        """Each item's codes, with the side values that it has alone."""
        task, first = self.task, items[0]
        texts = [r.text for r in items] if task.text and first.text is not None else None
        tokens = self.tokenizer.encode(
            [r.x for r in items], first.sample_rate, texts, task.num_codebooks, task.num_tokens
        ).to("cpu")
        if len(items) > 1 and any(value.ndim > 1 for value in tokens.side.values()):
            # Side values of several numbers an item are padded to the batch's longest: they would tell of the batch.
            self._alone = True
            return [self._encode([r])[0] for r in items]
        return [own(tokens[i], r.side) for i, r in enumerate(items)]


def own(item: Tokens, side: Mapping[str, int]) -> Tokens:
    """An item that shares no memory with its batch, with what the sample was before it was resized or resampled."""
    known = {k: integers([side[k]]) if k in side else v.clone() for k, v in item.side.items()}
    return Tokens(item.codes.clone(), item.lengths.clone(), item.spec, known)
