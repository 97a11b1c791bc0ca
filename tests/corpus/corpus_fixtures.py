"""Small sources of every kind for the tests of `mmtok.corpus`, the same on every call and every machine.

Each maker writes a source and returns what is in it, in the order of the keys: `Made` tells the key that `read_samples`
gives (with the default settings), the bytes, the text and the file's or member's name.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmtok.corpus.records import Failure, Sample
from mmtok.tokenizer import Tokenizer

RATES = (8000, 16000, 22050, 44100)  # Hz
WORDS = ("a red boat", "two cats, one asleep", "naïve café", "line of\u2028trees", "水 and stone")


@dataclasses.dataclass(frozen=True)
class Made:
    """One item of a source that was made here."""

    key: str
    data: bytes
    text: str | None
    name: str


def image_bytes(number: int) -> bytes:
    """PNG (even numbers) or JPEG (odd) of 16 to 40 px a side: a gradient with some noise, every fifth one grey."""
    from PIL import Image

    rng = np.random.default_rng(number)
    H, W = (int(n) for n in rng.integers(16, 41, 2))
    x = np.linspace(0, 200, H)[:, None, None] + np.linspace(0, 40, W)[None, :, None] + rng.integers(0, 15, (H, W, 3))
    array = x.astype(np.uint8)
    out = io.BytesIO()
    im = Image.fromarray(array[..., 0] if number % 5 == 4 else array)
    im.save(out, "JPEG" if number % 2 else "PNG")
    return out.getvalue()


def sound_bytes(number: int) -> bytes:
    """WAV (even numbers) or FLAC (odd) of 0.1 to 0.6 s: a tone in noise, of various rates; every third one stereo."""
    import soundfile

    rng = np.random.default_rng(number)
    rate = RATES[number % len(RATES)]
    L = int(rate * rng.uniform(0.1, 0.6))
    t = np.arange(L)[:, None] / rate
    x = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 1000) * t) + 0.01 * rng.standard_normal(
        (L, 2 if number % 3 == 2 else 1)
    )
    out = io.BytesIO()
    soundfile.write(out, x, rate, format="FLAC" if number % 2 else "WAV", subtype="PCM_16")
    return out.getvalue()


def suffix_of(modality: str, number: int) -> str:
    """Of `image_bytes` or `sound_bytes`."""
    return ((".png", ".jpg") if modality == "image" else (".wav", ".flac"))[number % 2]


def item_bytes(modality: str, number: int) -> bytes:
    """`image_bytes` or `sound_bytes`."""
    return image_bytes(number) if modality == "image" else sound_bytes(number)


def caption(number: int) -> str:
    """The text of an item; some hold commas, letters of other scripts and a line separator."""
    return f"{WORDS[number % len(WORDS)]} no. {number}"


def make_folder(
    path: str | Path, images: int = 0, sounds: int = 0, captions: str | None = "txt", first: int = 0
) -> list[Made]:
    """A folder with files in sub-folders; ``captions``: ``txt`` or ``json`` sidecars, ``index`` (images.jsonl and
    speech.jsonl as `recipes/fetch_data.py` writes them) or None.
    """
    path, made = Path(path), []
    path.mkdir(parents=True, exist_ok=True)
    for modality, count, index in (("image", images, "images.jsonl"), ("audio", sounds, "speech.jsonl")):
        lines = []
        for n in range(first, first + count):
            stem = f"{modality}/{n % 3}/{n:04d}"
            name = stem + suffix_of(modality, n)
            data = item_bytes(modality, n)
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
            text = caption(n) if captions else None
            if captions == "txt":
                (path / f"{stem}.txt").write_text(caption(n) + "\n", encoding="utf-8")
            elif captions == "json":
                row = {"caption": text, "number": n}
                (path / f"{stem}.json").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
            lines.append({"path": name, "split": "train", "text": text, "licence": "CC0-1.0"})
            made.append(Made(stem, data, text, name))
        if captions == "index" and count:
            rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
            (path / index).write_text(rows, encoding="utf-8")
    return sorted(made, key=lambda m: m.name)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """One file of a tar, dated 1970, so that equal calls make equal tars."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def make_tars(
    path: str | Path,
    images: int = 0,
    sounds: int = 0,
    shards: int = 2,
    captions: str | None = "txt",
    suffix: str = ".tar",
    first: int = 0,
) -> list[Made]:
    """``shards`` WebDataset tars ``train-0000.tar`` ..., items dealt in turn; ``captions``: ``txt``, ``json``
    (caption and number) or None; ``suffix`` ``.tar`` or ``.tar.gz``.
    """
    path, made = Path(path), []
    path.mkdir(parents=True, exist_ok=True)
    kinds = [("image", n) for n in range(first, first + images)] + [("audio", n) for n in range(first, first + sounds)]
    for shard in range(shards):
        name, buffer = f"train-{shard:04d}", io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for modality, n in kinds[shard::shards]:
                stem, data = f"{n:06d}" if modality == "image" else f"clips/{n:06d}", item_bytes(modality, n)
                member = stem + suffix_of(modality, n)
                add_member(tar, member, data)
                text = caption(n) if captions else None
                if captions == "txt":
                    add_member(tar, f"{stem}.txt", caption(n).encode())
                elif captions == "json":
                    add_member(tar, f"{stem}.json", json.dumps({"caption": text, "number": n}).encode())
                made.append(Made(f"{name}/{stem}", data, text, f"{name}{suffix}/{member}"))
        (path / f"{name}{suffix}").write_bytes(gzipped(buffer.getvalue()) if suffix == ".tar.gz" else buffer.getvalue())
    return made


def gzipped(data: bytes) -> bytes:
    """``data`` packed without the time of day."""
    import gzip

    return gzip.compress(data, mtime=0)


def make_rows(modality: str, items: int, first: int = 0, struct: bool = True) -> list[dict[str, Any]]:
    """Rows of a table: the modality's column (Hugging Face struct, or plain bytes), ``caption``, ``number``, ``id``."""
    rows = []
    for n in range(first, first + items):
        data = item_bytes(modality, n)
        cell = {"bytes": data, "path": f"{n:04d}{suffix_of(modality, n)}"} if struct else data
        rows.append({modality: cell, "caption": caption(n), "number": n, "id": f"item-{n:05d}"})
    return rows


def make_parquet(
    path: str | Path,
    images: int = 0,
    sounds: int = 0,
    files: int = 2,
    struct: bool = True,
    row_group: int = 3,
    captions: bool = True,
    first: int = 0,
) -> list[Made]:
    """Parquet files ``part-0000.parquet`` ... with `make_rows` of ONE modality, ``row_group`` rows a group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, made = Path(path), []
    path.mkdir(parents=True, exist_ok=True)
    modality, items = ("image", images) if images else ("audio", sounds)
    rows = make_rows(modality, items, first, struct)
    if not captions:
        rows = [{k: v for k, v in row.items() if k != "caption"} for row in rows]
    for number, some in enumerate(in_files(rows, files)):
        name = f"part-{number:04d}"
        pq.write_table(pa.Table.from_pylist(some), path / f"{name}.parquet", row_group_size=row_group)
        for i, row in enumerate(some):
            data = row[modality]["bytes"] if struct else row[modality]
            made.append(Made(f"{name}#{i}", data, row.get("caption"), f"{name}.parquet"))
    return made


def in_files(rows: Sequence[dict[str, Any]], files: int) -> list[list[dict[str, Any]]]:
    """``rows`` in ``files`` runs of nearly the same length."""
    edges = [len(rows) * n // files for n in range(files + 1)]
    return [list(rows[a:b]) for a, b in itertools.pairwise(edges)]


def make_dataset(
    path: str | Path, images: int = 0, sounds: int = 0, features: bool = True, captions: bool = True, first: int = 0
) -> list[Made]:
    """A Hugging Face data set saved to disk, with an Image or Audio feature, or (``features=False``) plain bytes."""
    import datasets

    path = Path(path)
    modality, items = ("image", images) if images else ("audio", sounds)
    rows = make_rows(modality, items, first, struct=features)
    if not captions:
        rows = [{k: v for k, v in row.items() if k != "caption"} for row in rows]
    table = datasets.Dataset.from_list(rows)
    if features:  # cast, not encoded: encoding a sound would need torchcodec
        table = table.cast_column(modality, datasets.Image() if modality == "image" else datasets.Audio())
    progress = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        table.save_to_disk(str(path))
    finally:
        if progress:
            datasets.enable_progress_bars()
    return [
        Made(f"data#{i}", row[modality]["bytes"] if features else row[modality], row.get("caption"), path.name)
        for i, row in enumerate(rows)
    ]


def samples_of(modality: str, count: int, folder: Path) -> list[Sample | Failure]:
    """Every other one in memory, the others as files in ``folder``; texts for two of three."""
    found: list[Sample | Failure] = []
    for n in range(count):
        data, path = item_bytes(modality, n), folder / f"{n}{suffix_of(modality, n)}"
        path.write_bytes(data)
        text = caption(n) if n % 3 else None
        inside = n % 4 < 2
        found.append(Sample(f"k{n:02d}", data if inside else None, None if inside else path, text, {"number": n}))
    return found


def encodes(
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: Tokenizer,
    refuse: Callable[[list], Exception | None] = lambda x: None,
) -> list[int]:
    """Batch sizes that encode is called with from now on; ``refuse`` may give an error to raise."""
    sizes: list[int] = []
    real = type(tokenizer).encode

    def encode(x, *more):
        sizes.append(len(x))
        if error := refuse(x):
            raise error
        return real(tokenizer, x, *more)

    monkeypatch.setattr(tokenizer, "encode", encode)
    return sizes
