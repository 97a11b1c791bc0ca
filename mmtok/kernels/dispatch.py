"""Which implementation of a kernel runs: the fastest one there is, or the one that `force` names."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

IMPLEMENTATIONS = ("reference", "torch", "numba", "triton")

# A plain global, not a ContextVar: torch.compile guards on it, so a graph compiled under `force` is not reused outside.
_forced: str | None = None


@contextmanager
def force(implementation: str) -> Iterator[None]:
    """Make every kernel called inside use ``implementation``; for tests and benchmarks, in one thread.

    Args:
        implementation: ``reference`` (the plain equation), ``torch``, ``numba`` (CPU, extra ``fast``) or ``triton``.

    Raises:
        ValueError: for another name, and, at the call, for a kernel that has no such implementation.
    """
    global _forced
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"force: expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    before, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """What `force` names now, for kernels that are made of other kernels."""
    return _forced


def choose(kernel: str, available: Sequence[str]) -> str:
    """The implementation that ``kernel`` runs now.

    Args:
        kernel: its name, for the message.
        available: what the kernel has for these inputs, the preferred one first.

    Raises:
        ValueError: an implementation is forced that is not available here.
    """
    if _forced is None:
        return available[0]
    if _forced not in available:
        raise ValueError(
            f"{kernel}: {_forced!r} is forced but not available for these inputs; "
            f"expected one of {', '.join(available)}: leave force({_forced!r}) or force one of those"
        )
    return _forced


@functools.cache
def installed(package: str) -> bool:
    """Whether ``numba`` or ``triton`` can be imported; one that is there but broken is named in a warning, once.

    Not to be called while a graph is captured.
    """
    if importlib.util.find_spec(package) is None:
        return False
    try:
        importlib.import_module(package)
    except Exception as e:  # numba refuses a NumPy that is newer than it, and what a broken package raises is its own
        warnings.warn(f"{package} is installed but cannot be imported ({e}); slower kernels are used", stacklevel=3)
        return False
    return True


def over_rows(num_rows: int, work: Callable[[int, int], None], cost: float, device: torch.device) -> None:
    """Call ``work(start, stop)`` over all rows; on a CPU by as many threads as torch uses, each on its own rows.

    Ops inside ``work`` then run on one thread each: threads that meet again after every small op wait for each other,
    which on a busy machine costs many times the op.

    Args:
        num_rows: rows in all; nothing is called for 0. work: called for one part after the other, concurrently.
        cost: multiply-adds in all.
        device: where the rows are; only ``cpu`` is parted.
    """
    threads = torch.get_num_threads() if device.type == "cpu" and cost > _WORTH_A_THREAD else 1
    if threads == 1 or num_rows < 2:
        if num_rows:
            work(0, num_rows)
        return
    # More parts than threads: one that does not get its processor holds up no more than the part in its hands.
    size = max(1, -(-num_rows // (_PARTS * threads)))
    parts = iter(range(0, num_rows, size))
    lock, errors = threading.Lock(), []

    def run() -> None:
        try:
            while not errors:
                with lock:
                    start = next(parts, None)
                if start is None:
                    return
                work(start, min(start + size, num_rows))
        except BaseException as e:  # handed to the caller's thread
            errors.append(e)

    torch.set_num_threads(1)  # also what the new threads start with
    try:
        others = [threading.Thread(target=run) for _ in range(threads - 1)]
        for thread in others:
            thread.start()
        run()
        for thread in others:
            thread.join()
    finally:
        torch.set_num_threads(threads)
    if errors:
        raise errors[0]


_PARTS = 6  # for each thread
_WORTH_A_THREAD = 4e8  # multiply-adds: below, starting a thread that may have to wait for its core does not pay
