"""Which implementation of a kernel runs: the fastest one there is, or the one that `force` names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

IMPLEMENTATIONS = ("reference", "torch", "triton")

# A plain global, not a ContextVar: torch.compile guards on it, so a graph compiled under `force` is not reused outside.
_forced: str | None = None


@contextmanager
def force(implementation: str) -> Iterator[None]:
    """Make every kernel called inside use ``implementation``; for tests and benchmarks, in one thread.

    Args:
        implementation: ``reference`` (the plain equation), ``torch`` or ``triton``.

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
