"""The memory of a run's processes while it goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

import numpy as np
import psutil

LEAST = 30.0  # seconds from which on a slope says something: workers fill their windows at first


def lasting(found: Mapping[str, float] | None) -> Mapping[str, float] | None:
    """A report that is long enough to tell of memory over time, else None."""
    return found if found is not None and found["seconds"] >= LEAST else None


class Memory(threading.Thread):
    """Resident MiB of all processes below this one, sampled while the ``with`` block runs."""

    def __init__(self, every: float = 0.25) -> None:
        super().__init__(daemon=True)
        self.every, self.samples, self._over = every, [], threading.Event()

    def __enter__(self) -> Memory:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(self.every):
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.samples.append((time.time(), total / 2**20))

    def report(self, begin: float, end: float) -> dict[str, float] | None:
        """Of the second half of ``begin`` .. ``end`` (seconds since 1970): mean, slope, and the rise as a share.

        None where that is less than 10 seconds: what a process takes at first would look like a slope.
        """
        half = [(t, mib) for t, mib in self.samples if (begin + end) / 2 <= t <= end]
        if len(half) < 10 or half[-1][0] - half[0][0] < 10:
            return None
        t, mib = np.array(half).T
        slope = float(np.polyfit(t - t[0], mib, 1)[0])
        return {
            "largest_mib": max(m for _, m in self.samples),
            "mean_mib": float(mib.mean()),
            "slope_mib_a_minute": 60 * slope,
            "rise": slope * float(t[-1] - t[0]) / float(mib.mean()),
            "seconds": float(t[-1] - t[0]),
        }
