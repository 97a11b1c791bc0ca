"""Files to make corpora of: drawn from what was fetched, or generated."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np


def draw_files(data: Path, index: str, count: int, seed: int, folder: Path) -> None:
    """``count`` files of an index (0: all) in ``folder``, linked, not copied, where one disk holds both."""
    if not (data / index).is_file():
        raise SystemExit(f"no {data / index}; `python recipes/fetch_data.py` makes it, or pass --smoke")
    rows = [json.loads(line) for line in (data / index).read_text("utf-8").splitlines() if line.strip()]
    random.Random(seed).shuffle(rows)
    folder.mkdir(parents=True)
    for n, row in enumerate(rows[: count or None]):
        source = data / row["path"]
        target = folder / f"{n:06d}{source.suffix}"
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
        if row.get("text"):
            target.with_suffix(".txt").write_text(row["text"], "utf-8")


def generate_files(modality: str, count: int, seed: int, folder: Path) -> None:
    """Gradients in noise of 48 to 96 px, or tones of 0.2 to 0.8 s."""
    import soundfile
    from PIL import Image

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for n in range(count):
        path = folder / f"{n:06d}"
        if modality == "image":
            H, W = rng.integers(48, 97, 2)
            x = np.linspace(0, 200, H)[:, None, None] + rng.integers(0, 40, (H, W, 3))
            Image.fromarray(x.astype(np.uint8)).save(path.with_suffix(".png"))
        else:
            t = np.arange(int(16_000 * rng.uniform(0.2, 0.8))) / 16_000
            x = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 900) * t) + 0.01 * rng.standard_normal(len(t))
            soundfile.write(path.with_suffix(".wav"), x, 16_000)
        path.with_suffix(".txt").write_text(f"number {n}", "utf-8")
