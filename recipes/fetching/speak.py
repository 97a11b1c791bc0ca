"""Speaks lines of text with Piper, a text-to-speech program that is used as a command only.

Piper is GPL-3 and stays apart from the project: it is installed with its onnxruntime into a virtual environment of its
own under the data folder, and nothing of it is imported here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import wave
from collections.abc import Callable
from pathlib import Path

from .clients import FetchError, run_client
from .sources import Item

PIPER = "piper-tts==1.8.0"
BATCH = 40


def install(tools: Path) -> Path:
    """The Python of Piper's own environment; made on the first call, FetchError when pip cannot install it."""
    home = tools / "piper"
    python = home / "bin" / "python"
    marker = home / f".done-{PIPER.replace('==', '-')}"
    if not marker.exists():
        shutil.rmtree(home, ignore_errors=True)
        run_client([sys.executable, "-m", "venv", str(home)])
        run_client([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", PIPER])
        marker.touch()
    return python


def seconds_of(path: Path) -> float:
    with wave.open(str(path)) as sound:
        return sound.getnframes() / sound.getframerate()


def speak(items: list[Item], model: Path, tools: Path, hours: float, tick: Callable[[], None]) -> list[Item]:
    """Writes `item.file` (mono 16-bit WAV) for the first items that together last `hours`; returns those items.

    Files that are there already count and are not made again. Piper loads its model once for a batch of lines and names
    the files by time, so their order is the order of the lines. Raises FetchError when Piper fails.
    """
    python = install(tools)
    spoken, total = [], 0.0
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        todo = [item for item in batch if not item.file.exists()]
        if todo:
            with tempfile.TemporaryDirectory(dir=items[0].file.parents[1].parent) as aside:
                speak_batch(python, model, todo, Path(aside))
        for item in batch:
            total += seconds_of(item.file)
            spoken.append(item)
            tick()
            if total >= hours * 3600:
                return spoken
    return spoken


def speak_batch(python: Path, model: Path, items: list[Item], aside: Path) -> None:
    lines = aside / "lines.txt"
    lines.write_text("".join(f"{item.text}\n" for item in items), "utf-8")
    command = [str(python), "-m", "piper", "-m", str(model), "-i", str(lines), "-d", str(aside / "wav")]
    if shutil.which("nice"):
        command = ["nice", "-n", "10", *command]  # trainings may share this machine
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    made = sorted((aside / "wav").glob("*.wav"), key=lambda path: int(path.stem))
    if done.returncode or len(made) != len(items):
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FetchError(
            f"piper made {len(made)} of {len(items)} files ({reason[:160]}): delete tools/piper and run again"
        )
    for path, item in zip(made, items, strict=True):
        item.file.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, item.file)
