"""The engines of many processes that others start: the ranks of `accelerate launch`, and Ray. Both of them thin.

Every engine (the third is `mmtok.corpus.pool`) is a generator that takes tasks in order, gives the next one to whoever
is free, and yields an `Outcome` for each. A worker that dies costs its shard another attempt and nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import math
import os
import time
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any

import torch

from mmtok.corpus.attempts import RETRIES, Outcome, Stop, again, attempt, devices_of
from mmtok.corpus.pool import LOOK
from mmtok.corpus.records import Task

ENGINES = ("local", "accelerate", "ray")
MPI = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # as accelerate reads them

# ---- accelerate launch ----


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those that `accelerate launch` started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def own(self, tasks: Sequence[Task]) -> list[Task]:
        """The shards of this rank: those whose number leaves it when divided by the number of ranks."""
        return [task for task in tasks if task.shard % self.size == self.rank]

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank; all of them wait here for it."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank; all of them wait here for the last one."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found


def join_ranks() -> Ranks:
    """Meet the other processes; a process that nobody launched is the only one.

    They say little to each other, on the CPU, and may wait for days for the slowest.

    Raises ValueError when several processes were launched that do not know of each other.
    """
    launched = max(int(os.environ.get(name, "1")) for name in MPI)
    if launched == 1:
        return Ranks()
    from datetime import timedelta

    from accelerate import PartialState

    joined = torch.distributed.is_initialized()
    state = PartialState(cpu=True, timeout=timedelta(days=30))
    if not joined:  # the group's threads end before the interpreter does, which else may abort; runs may share a group
        atexit.register(state.destroy_process_group)
    if state.num_processes == 1:
        raise ValueError(
            f"expected {launched} processes, got 1: accelerate was set up before this run without the others; "
            "begin the run first, or unset WORLD_SIZE for a single process"
        )
    return Ranks(state.process_index, state.num_processes, max(state.local_process_index, 0))


def run_ranks(tasks: Sequence[Task], ranks: Ranks, model_threads: int, stop: Stop) -> Generator[Outcome, None, None]:
    """In this process, the shards of this rank, one after another."""
    threads = torch.get_num_threads()
    try:
        for task in ranks.own(tasks):
            if stop.reason is not None:
                return
            devices = devices_of(task.device)
            mine = dataclasses.replace(task, device=devices[ranks.local_rank % len(devices)])
            for number in range(1, RETRIES + 2):
                outcome = dataclasses.replace(attempt(mine, model_threads), task=task, attempts=number)
                if not again(outcome) or stop.reason is not None:
                    break
            yield outcome
    finally:
        torch.set_num_threads(threads)


# ---- Ray ----

RAY_STARTS = 3  # tries at a Ray of our own


@dataclasses.dataclass(frozen=True)
class RaySettings:
    """Where Ray is and what a task asks of it.

    Args:
        address: None or ``local`` starts a Ray of its own, with ``workers`` times ``cpus``; ``auto`` or ``host:port``
            joins a cluster, whose machines have mmtok installed and see the source and ``out`` under the same paths.
            RAY_ADDRESS, which `ray job submit` sets, counts where it is None.
        cpus, gpus: of a task, as Ray counts them. With ``gpus`` the device ``cuda`` is the one that Ray gives it.
    """

    address: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0


def run_ray(
    tasks: Sequence[Task], workers: int, model_threads: int, stop: Stop, settings: RaySettings
) -> Generator[Outcome, None, None]:
    """Ray tasks, at most ``workers`` of them at a time. Ray starts a task again whose process or machine died."""
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as e:
        raise ImportError("the engine ray needs Ray: pip install 'mmtok[corpus]'") from e
    ours = not ray.is_initialized()
    if ours:
        _start_ray(settings, workers)
    flying: dict[Any, tuple[Task, int]] = {}
    try:
        remote = ray.remote(attempt).options(num_cpus=settings.cpus, num_gpus=settings.gpus, max_retries=RETRIES)
        waiting = deque((task, 1) for task in tasks)
        while True:
            while waiting and len(flying) < workers and stop.reason is None:
                task, number = waiting.popleft()
                flying[remote.remote(task, model_threads)] = task, number
            if not flying:
                return
            finished, _ = ray.wait(list(flying), num_returns=1, timeout=LOOK)
            for ref in finished:
                task, number = flying.pop(ref)
                try:
                    outcome = dataclasses.replace(ray.get(ref), task=task, attempts=number)
                except RayError as e:  # after its own retries
                    reason = " ".join(f"{type(e).__name__}: {e}".split())
                    yield Outcome(task, "ray", RETRIES + 1, reason=reason, start=time.time())
                    continue
                if again(outcome) and stop.reason is None:
                    waiting.appendleft((task, number + 1))
                else:
                    yield outcome
    finally:
        for ref in flying:
            with contextlib.suppress(RayError):
                ray.cancel(ref, force=True)
        if ours:
            ray.shutdown()


def _start_ray(settings: RaySettings, workers: int) -> None:
    import ray

    address = settings.address or os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {}
    if address == "local":
        cpus = math.ceil(workers * settings.cpus)
        # Tasks and outcomes are small: the shared memory that Ray takes by default would be wasted.
        own = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": 2**27}
    for left in reversed(range(RAY_STARTS if address == "local" else 1)):
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
            return
        except ConnectionError as e:
            raise ValueError(
                f"no Ray at {address!r} ({e}); start it by `ray start --head`, or leave the address out to have one "
                "started"
            ) from e
        except ValueError:
            raise
        except Exception as e:  # Ray gives its processes 30 s, too few on a busy machine, and then raises a bare one
            ray.shutdown()
            if not left:
                told = " ".join(f"{type(e).__name__}: {e}".split())
                raise TimeoutError(
                    f"Ray did not start at {address!r} ({told}); try again when the machine is less busy, start it "
                    "apart by `ray start --head` and give its address, or use the engine local"
                ) from e
