"""The readers that `bench_corpus.py` compares: the stored tokens, a raw numpy array, and WebDataset."""

from __future__ import annotations

import io
import itertools
import json
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtok.corpus.index import Corpus
from mmtok.corpus.records import INDEX
from mmtok.corpus.stream import TokenStream
from mmtok.tokens import smallest_uint


def write_rivals(out: Path, aside: Path) -> tuple[np.ndarray, np.ndarray, int, list[str]]:
    """The codes of a corpus as one raw array (mapped, with offsets and Q), and as WebDataset tars of .npy and .txt."""
    corpus = Corpus(out)
    assert corpus.spec is not None
    Q = corpus.spec.num_codebooks
    dtype = smallest_uint(max(corpus.spec.codebook_sizes) - 1)
    codes = [corpus.codes(i).numpy().astype(dtype) for i in range(len(corpus))]
    offsets = np.cumsum([0, *(c.size for c in codes)])
    aside.mkdir(parents=True)
    np.concatenate([c.ravel() for c in codes]).tofile(aside / "codes.raw")
    tars: list[str] = []
    for number, items in itertools.groupby(range(len(corpus)), lambda i: corpus.locate(i)[0]):
        tars.append(str(aside / f"{number:05d}.tar"))
        with tarfile.open(tars[-1], "w") as tar:
            for i in items:
                buffer = io.BytesIO()
                np.save(buffer, codes[i])
                for suffix, data in (("npy", buffer.getvalue()), ("txt", (corpus[i].text or "").encode())):
                    info = tarfile.TarInfo(f"{i:08d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return np.memmap(aside / "codes.raw", dtype, "r"), offsets, Q, tars


def readers(out: Path, aside: Path, workers: int) -> dict[str, Callable[[int], Iterator[int]]]:
    """Name -> epoch -> the number of codes of every item (or batch) as it is read, in a shuffled order."""
    import webdataset as wds

    raw, offsets, Q, tars = write_rivals(out, aside)
    corpus, count = Corpus(out), len(offsets) - 1

    def order(epoch: int) -> list[int]:
        return np.random.default_rng(epoch).permutation(count).tolist()

    def memmap(epoch: int) -> Iterator[int]:
        for i in order(epoch):
            part = raw[offsets[i] : offsets[i + 1]]
            yield torch.from_numpy(part.astype(np.int64).reshape(Q, -1)).numel()

    def tar(epoch: int) -> Iterator[int]:
        data = wds.WebDataset(tars, shardshuffle=len(tars), seed=epoch, empty_check=False).shuffle(1000).decode()
        for sample in data:
            yield torch.from_numpy(sample["npy"].astype(np.int64)).numel()

    single, batched = TokenStream(out), TokenStream(out, batch=64)

    def stream(reading: TokenStream, processes: int = 0) -> Iterator[int]:
        for value in reading.loader(processes):  # each pass is the next epoch
            yield int(value.tokens.lengths.sum()) * Q

    return {
        "numpy memmap, items": memmap,
        "WebDataset, items": tar,
        "TokenStream, items": lambda _: stream(single),
        "TokenStream, batches of 64": lambda _: stream(batched),
        f"TokenStream, batches of 64, {workers} workers": lambda _: stream(batched, workers),
        "Corpus, random items": lambda epoch: (corpus[i].tokens.codes.numel() for i in order(epoch)),
        "Corpus, random codes": lambda epoch: (corpus.codes(i).numel() for i in order(epoch)),
    }


def time_reading(out: Path, aside: Path, rounds: int, least: float, workers: int) -> dict[str, Any]:
    """CPU and wall seconds an epoch of each reader in each round; every one must give every code."""
    contest = readers(out, aside, workers)
    index = json.loads((out / INDEX).read_text("utf-8"))["totals"]
    passes = 1
    cpu: dict[str, list[float]] = {name: [] for name in contest}
    wall: dict[str, list[float]] = {name: [] for name in contest}
    for turn in range(rounds + 1):
        for name, read in contest.items():
            start, begun = time.process_time(), time.perf_counter()
            for epoch in range(passes):
                if (codes := sum(read(epoch))) != index["codes"]:
                    raise SystemExit(f"{name}: expected {index['codes']} codes, got {codes}")
            if turn:  # the first one warms up, and tells how often to read
                cpu[name].append((time.process_time() - start) / passes)
                wall[name].append((time.perf_counter() - begun) / passes)
            elif name.startswith("WebDataset"):
                slowest = time.perf_counter() - begun
        passes = max(passes, min(50, round(least / slowest)))
    base = {"WebDataset": "WebDataset, items", "numpy": "numpy memmap, items"}
    rows = []
    for name in contest:
        seconds = wall if "workers" in name else cpu
        rows.append(
            {
                "reader": name,
                "clock": "wall" if "workers" in name else "cpu",
                "items_a_second": index["items"] / statistics.median(seconds[name]),
                "codes_a_second": index["codes"] / statistics.median(seconds[name]),
                **{
                    f"over_{short}": statistics.median(
                        b / a for a, b in zip(seconds[name], (wall if seconds is wall else cpu)[other], strict=True)
                    )
                    for short, other in base.items()
                },
                "cpu_seconds": cpu[name],
                "wall_seconds": wall[name],
            }
        )
    return {"items": index["items"], "codes": index["codes"], "passes": passes, "rows": rows}
