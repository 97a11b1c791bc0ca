"""From the constants that `bench_corpus.py` measured to a billion images and a million hours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from benching.report import table

from mmtok.tokens import smallest_uint

PAPER_SHARD = 10_000  # items


@dataclasses.dataclass(frozen=True)
class Constants:
    """Measured, of one corpus.

    Args:
        bytes_an_item: in a shard, key and text included. header_bytes: that a shard takes beside. nominal_bytes: of an
            item's codes. index_bytes: of index.json, a shard. core_seconds: CPU time of an item, decoding included.
        flops: floating point operations of an item. seconds_of_sound: of an item; None for pictures.
    """

    bytes_an_item: float
    header_bytes: float
    nominal_bytes: float
    index_bytes: float
    core_seconds: float
    flops: float
    seconds_of_sound: float | None = None


def constants_of(result: Mapping[str, Any]) -> Constants:
    """Of what `in_turn` measured."""
    sound, counted = result["seconds_of_sound"], result["flops"]
    # The clips that were counted may be shorter or longer than all of them: operations go with the seconds.
    amount = counted["amount"] if sound is None else counted["amount"] * result["items"] / sound
    return Constants(
        result["bytes_an_item"],
        result["header_bytes_a_shard"],
        result["nominal_bytes_an_item"],
        result["index_bytes_a_shard"],
        1 / result["items_a_second"]["corpus_cpu"],
        counted["flops"] / amount,
        None if sound is None else sound / result["items"],
    )


def paper_calculation(
    pictures: Constants, sound: Constants, items_per_shard: int = PAPER_SHARD, tflops: float = 100.0
) -> list[dict[str, Any]]:
    """What a billion images and a million hours take, in proportion to what was measured.

    Args:
        pictures, sound: measured constants.
        items_per_shard: of the corpora to come; clips are as long as those measured.
        tflops: 1e12 operations a second that a GPU is taken to reach in these networks; an assumption, not measured.
    """
    if sound.seconds_of_sound is None:
        raise ValueError("sound: expected constants of a corpus of sound, got those of pictures")
    rows = []
    for name, c, items in (
        ("a billion images", pictures, 10**9),
        ("a million hours of sound", sound, round(10**6 * 3600 / sound.seconds_of_sound)),
    ):
        shards, core_hours = -(-items // items_per_shard), items * c.core_seconds / 3600
        # The index' own types: a 64-bit hash of each key, its item, and the shard and row of each item.
        entry = 8 + sum(np.dtype(smallest_uint(n - 1)).itemsize for n in (items, shards, items_per_shard))
        rows.append(
            {
                "corpus": name,
                "items": items,
                "shards_bytes": items * c.bytes_an_item + shards * c.header_bytes,
                "nominal_bytes": items * c.nominal_bytes,
                "index_bytes": items * entry + shards * c.index_bytes,
                "shards": shards,
                "cpu_core_hours": core_hours,
                "flops": items * c.flops,
                "gpu_hours": items * c.flops / (tflops * 1e12) / 3600,
            }
        )
    return rows


def paper_table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["corpus", "items", "shards on disk", "nominal bits", "index", f"shards of {PAPER_SHARD:,}"]
    head += ["CPU core hours", "operations", "GPU hours"]
    cells = [
        [row["corpus"], f"{row['items']:,.0f}"]
        + [f"{row[k] / 1e12:.3g} TB" for k in ("shards_bytes", "nominal_bytes", "index_bytes")]
        + [f"{row['shards']:,}", f"{row['cpu_core_hours']:,.0f}", f"{row['flops']:.2g}", f"{row['gpu_hours']:,.0f}"]
        for row in rows
    ]
    return table(head, cells)
