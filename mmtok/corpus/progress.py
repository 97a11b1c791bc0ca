"""What a run shows while it works: a bar on a terminal, a line now and then elsewhere; and the log it keeps."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

LINE_EVERY = 30.0  # seconds between lines where there is no terminal


class Progress:
    """Shards done of all, with items and megapixels (or seconds of sound) a second, time left and failures.

    Args:
        total: shards of the corpus. ready: of them done by an earlier run.
        unit: what ``amount`` of `add` counts: ``Mpx`` or ``s of sound``.
        stream: where it is shown; None: standard error.
        every: seconds between two lines where ``stream`` is no terminal.
        shown: False shows nothing.
    """

    def __init__(
        self,
        total: int,
        ready: int,
        unit: str,
        stream: TextIO | None = None,
        every: float = LINE_EVERY,
        shown: bool = True,
    ) -> None:
        self.total, self.ready, self.unit, self.every = total, ready, unit, every
        self.stream = sys.stderr if stream is None else stream
        self.shards = self.items = self.failures = 0
        self.amount = 0.0
        self.start = self.said = time.monotonic()
        self.bar = None
        self.lines = shown and not self.stream.isatty()
        if shown and not self.lines:
            self.bar = tqdm(total=total, initial=ready, unit="shard", file=self.stream, dynamic_ncols=True)

    def add(self, items: int, amount: float, failures: int) -> None:
        """One more shard is done."""
        self.shards += 1
        self.items += items
        self.amount += amount
        self.failures += failures
        if self.bar is not None:
            self.bar.set_postfix_str(self.rates(), refresh=False)
            self.bar.update()
        elif self.lines and time.monotonic() - self.said >= self.every:
            self._line()

    def rates(self) -> str:
        """Items and amount a second of this run, and failures."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        return f"{self.items / seconds:.1f} items/s, {self.amount / seconds:.2f} {self.unit}/s, {self.failures} failed"

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        elif self.lines:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """The last state."""
        if self.bar is not None:
            self.bar.close()
        elif self.lines:
            self._line()

    def _line(self) -> None:
        self.said = time.monotonic()
        done = self.ready + self.shards
        left = (self.total - done) * (self.said - self.start) / self.shards if self.shards else None
        time_left = "" if left is None or not left else f", about {tqdm.format_interval(left)} left"
        print(f"{done} of {self.total} shards, {self.rates()}{time_left}", file=self.stream, flush=True)


def log_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append one JSON line in one write, so that lines of several processes never mix."""
    text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(file, text.encode("utf-8"))
    finally:
        os.close(file)
