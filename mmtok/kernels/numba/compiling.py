"""How every compiled function of this folder is compiled."""

from __future__ import annotations

from typing import Any

from numba import njit


def compiled(fastmath: Any = False) -> Any:
    """A decorator: compile on first use and keep the result beside the file, or in the user's cache folder."""

    def decorate(function: Any) -> Any:
        options = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": fastmath}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no folder can be written: compile once a process
            return njit(**options)(function)

    return decorate
