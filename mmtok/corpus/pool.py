"""The engine of one machine: processes that take shards in turn, and are started again where they die."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait

from mmtok.corpus.attempts import RETRIES, Outcome, Stop, again, attempt, devices_of
from mmtok.corpus.records import Task

LOOK = 0.5  # seconds between two looks at `Stop`


class _Worker:
    """A process that does one task after another, and the driver's end of the pipe to it."""

    def __init__(self, device: str, model_threads: int) -> None:
        self.device, self.model_threads = device, model_threads
        self.job: tuple[Task, int] | None = None  # the task at work, and which attempt it is
        self.began = 0.0
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads and locks as they stand
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.model_threads), name="mmtok corpus worker")
        self.ready = False
        resource_tracker.ensure_running()  # the first process would start it, and it unblocks interrupts
        with _blocked_interrupts(), _threads_in_environment(self.model_threads):
            self.process.start()
        theirs.close()  # so that the pipe ends when the process does

    @property
    def name(self) -> str:
        return f"{socket.gethostname()}:{self.process.pid}"

    def give(self, task: Task, number: int) -> None:
        """Hand over a task; a worker that died while idle is started again."""
        self.job, self.began = (task, number), time.time()
        try:
            self.pipe.send(dataclasses.replace(task, device=self.device))
        except OSError:
            self.end()
            self.start()
            self.pipe.send(dataclasses.replace(task, device=self.device))

    def end(self, gently: bool = False) -> str:
        """End the process and say how it ended."""
        with contextlib.suppress(OSError):
            self.pipe.close()
        if gently:
            self.process.join(10)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        code = self.process.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self.process.close()
        return name


def run_local(tasks: Sequence[Task], workers: int, model_threads: int, stop: Stop) -> Generator[Outcome, None, None]:
    """A pool of ``workers`` processes. They end with the driver, even where that is killed.

    A shard whose worker dies is begun again, `RETRIES` times; a process that dies before it can work, again and again,
    ends the run.
    """
    waiting = deque((task, 1) for task in tasks)
    devices = devices_of(tasks[0].device) if tasks else []
    pool = [_Worker(devices[i % len(devices)], model_threads) for i in range(min(workers, len(tasks)))]
    stillborn = 0
    try:
        while True:
            for worker in pool:
                if worker.job is None and waiting and stop.reason is None:
                    worker.give(*waiting.popleft())
            busy = {worker.pipe: worker for worker in pool if worker.job is not None}
            if not busy:
                return
            for pipe in wait(list(busy), timeout=LOOK):
                assert isinstance(pipe, Connection)
                worker = busy[pipe]
                assert worker.job is not None
                task, number = worker.job
                try:
                    found = pipe.recv()
                except (EOFError, OSError):
                    stillborn = 0 if worker.ready else stillborn + 1
                    outcome = Outcome(task, worker.name, number, start=worker.began, seconds=time.time() - worker.began)
                    how = worker.end(gently=True)  # the pipe ends a little before the process does
                    outcome = dataclasses.replace(outcome, reason=f"the worker died ({how})")
                    worker.job = None
                    if stillborn > RETRIES:
                        stop.ask(
                            f"workers die before they begin ({how}); a script that starts a run needs "
                            "`if __name__ == '__main__':` around it"
                        )
                    worker.start()
                else:
                    if found is None:
                        worker.ready, stillborn = True, 0
                        continue
                    outcome = dataclasses.replace(found, task=task, attempts=number)
                    worker.job = None
                if again(outcome) and stop.reason is None:
                    waiting.appendleft((task, number + 1))
                else:
                    yield outcome
    finally:
        idle = [worker.job is None for worker in pool]
        for worker, gently in zip(pool, idle, strict=True):
            with contextlib.suppress(OSError):
                worker.pipe.close() if gently else worker.process.terminate()
        for worker, gently in zip(pool, idle, strict=True):
            worker.end(gently)


def _serve(pipe: Connection, model_threads: int) -> None:
    """A worker's life: tasks in, outcomes out, until the driver closes the pipe or is gone."""
    threading.Thread(target=_follow_driver, name="driver", daemon=True).start()
    try:
        pipe.send(None)  # here, and able to work
        while True:
            pipe.send(attempt(pipe.recv(), model_threads))
    except (EOFError, OSError):
        return


def _follow_driver() -> None:
    driver = multiprocessing.parent_process()
    if driver is not None:
        driver.join()
        os._exit(1)  # killed in the middle of a shard, which the next run makes again


@contextlib.contextmanager
def _blocked_interrupts() -> Iterator[None]:
    """Processes started here never see the terminal's Ctrl-C: the driver decides what becomes of them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _threads_in_environment(count: int) -> Iterator[None]:
    """Processes started here have ``count`` threads for their sums, also in libraries that ask when they are loaded."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
