"""One attempt at a shard, whoever makes it, and what became of it."""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
import time

import torch

from mmtok.corpus.records import Task
from mmtok.corpus.shard_file import ShardFile, shard_path
from mmtok.corpus.work import Worked, tokenize_shard, tokenizer_of

RETRIES = 3  # further attempts after the first
HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # what every shard would meet


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Args:
        task: of the shard. attempts: made. worker: host and process of the last one.
        worked: None where the shard is not done; then ``reason`` says why, in one line.
        hopeless: whether every other shard would fail alike.
        amount: megapixels, or seconds of sound, in the shard.
        start: of the last attempt, seconds since 1970. seconds: that it took.
    """

    task: Task
    worker: str
    attempts: int = 1
    worked: Worked | None = None
    reason: str | None = None
    hopeless: bool = False
    amount: float = 0.0
    start: float = 0.0
    seconds: float = 0.0


class Stop:
    """Asked to stop: no engine begins another shard once ``reason`` is set."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def ask(self, reason: str) -> None:
        """The first reason counts."""
        self.reason = self.reason or reason


def attempt(task: Task, model_threads: int) -> Outcome:
    """One attempt at a shard in this process; whatever goes wrong is told in the outcome.

    ``model_threads``: of torch on the CPU. It is one number for a whole corpus, since sums over another number of
    threads round differently, and a rounding can become another code.
    """
    torch.set_num_threads(model_threads)
    start, worker = time.time(), f"{socket.gethostname()}:{os.getpid()}"
    worked, reason, hopeless, amount = None, None, True, 0.0
    try:
        tokenizer_of(task)  # what is wrong with it is wrong for every shard
        hopeless, loading = False, time.time() - start
        worked = tokenize_shard(task)
        amount = amount_in(task)
        seconds = dict(worked.seconds)
        seconds |= {name: seconds[name] + loading for name in ("load", "total")}
        worked = dataclasses.replace(worked, seconds=seconds)
    except Exception as e:  # a network, a decoder or a file system may raise anything
        worked = None
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        hopeless = hopeless or (isinstance(e, OSError) and e.errno in HOPELESS)
    return Outcome(task, worker, 1, worked, reason, hopeless, amount, start, time.time() - start)


def amount_in(task: Task) -> float:
    """Megapixels, or seconds of sound (not multiplied by channels), in a shard that is done."""
    shard = ShardFile(shard_path(task.out, task.shard))
    pairs = {name: shard.side(name) for name in ("height", "width", "num_samples", "sample_rate")}
    height, width, samples, rate = pairs.values()
    if height is not None and width is not None:
        return float((height.double() * width.double()).sum()) / 1e6
    if samples is not None and rate is not None:
        return float((samples.double() / rate.double()).sum())
    return 0.0


def devices_of(device: str) -> list[str]:
    """The devices that workers take in turn: ``cuda`` stands for all of this machine."""
    count = torch.cuda.device_count() if device == "cuda" else 0
    return [f"cuda:{i}" for i in range(count)] or [device]


def again(outcome: Outcome) -> bool:
    """Whether another attempt makes sense."""
    return outcome.worked is None and not outcome.hopeless and outcome.attempts <= RETRIES
