"""The log of a run: JSON lines on disk, a progress bar on the terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from mmtok.tokens import write_atomic


class RunLog:
    """Appends rows to ``log.jsonl`` and shows the latest on the bar; silent on every process but the first."""

    def __init__(self, folder: Path, steps: int, start: int, active: bool):
        self.path, self.active = folder / "log.jsonl", active
        self.bar = tqdm(total=steps, initial=start, disable=not active, unit="step", mininterval=2, dynamic_ncols=True)
        self.since, self.items = time.monotonic(), 0
        if active:
            self._drop_after(start)

    def _drop_after(self, step: int) -> None:
        """Rows of steps that a kill undid are taken out, so that a resumed log reads like an undisturbed one."""
        if self.path.is_file():
            rows = [r for r in self.path.read_text().splitlines() if _step_of(r) <= step]
            write_atomic(self.path, "".join(r + "\n" for r in rows).encode())

    def write(self, step: int, values: Mapping[str, Tensor | float], kind: str = "train") -> None:
        """One row: scalars as numbers, per-level statistics as lists; training rows carry items a second."""
        if not self.active:
            return
        row: dict = {"step": step, "kind": kind}
        for key, value in values.items():
            plain = value if isinstance(value, int | float) else value.detach().float().cpu().tolist()
            row[key] = [_short(v) for v in plain] if isinstance(plain, list) else _short(plain)
        if kind == "train":
            now = time.monotonic()
            row["items_per_second"] = round(self.items / max(1e-9, now - self.since), 3)
            self.since, self.items = now, 0
        with self.path.open("a") as f:
            f.write(json.dumps(row) + "\n")
        shown = {k: f"{v:.4g}" for k, v in row.items() if isinstance(v, float)}
        self.bar.set_postfix(dict(list(shown.items())[:6]))
        if kind != "train":
            self.bar.write(f"step {step} {kind}: " + "  ".join(f"{k} {v}" for k, v in shown.items()))

    def close(self) -> None:
        self.bar.close()


def _step_of(row: str) -> float:
    """The step of a row; infinity for one that a kill tore in the middle."""
    try:
        return json.loads(row)["step"]
    except json.JSONDecodeError:
        return float("inf")


def _short(value: float) -> float:
    """Six significant digits: a small loss or learning rate must not become 0."""
    return float(f"{float(value):.6g}")
