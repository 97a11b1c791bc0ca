"""All contests, in the order in which they are run and shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benching import nearest, residual, small_ops
from benching.protocol import Contest, Setting


def all_contests(setting: Setting) -> Iterator[tuple[str, Callable[[], Contest | None]]]:
    """Name and builder of each; a builder gives None where this version of mmtok lacks the op."""
    yield from nearest.contests(setting)
    yield from residual.contests(setting)
    yield from small_ops.contests(setting)


def chosen(setting: Setting, only: list[str] | None) -> dict[str, Callable[[], Contest | None]]:
    """Those whose group or beginning of the name is in ``only``; all if None.

    Raises:
        ValueError: an entry of ``only`` fits no contest.
    """
    every = dict(all_contests(setting))
    if only is None:
        return every

    def fits(name: str, wanted: str) -> bool:
        return name.partition("/")[0] == wanted or ("/" in wanted and name.startswith(wanted))

    groups = sorted({name.partition("/")[0] for name in every})
    unknown = [w for w in only if w != "exactness" and not any(fits(name, w) for name in every)]
    if unknown:
        raise ValueError(
            f"--only: expected groups ({', '.join(groups)}, exactness) or beginnings of names like "
            f"'nearest/12800x8', got {', '.join(unknown)}"
        )
    return {name: build for name, build in every.items() if any(fits(name, w) for w in only)}
