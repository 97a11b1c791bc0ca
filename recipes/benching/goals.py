"""The goals the kernels were built for, and what a run says about each."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benching.protocol import Row

VQ_EVAL = "vector-quantize-pytorch, eval"
Found = Iterator[tuple[float, str]]


@dataclasses.dataclass(frozen=True)
class Results:
    """Rows of all contests, and the records of `benching.nearest.exactness`."""

    rows: Sequence[Row]
    exactness: Sequence[dict[str, Any]]

    def ratios(self, group: str, contestant: str, keep: Callable[[str], bool] = lambda shape: True) -> Found:
        """(median over rounds of its time over ours, contest) for each contest of the group."""
        for row in self.rows:
            found, _, shape = row.contest.partition("/")
            if found == group and row.contestant == contestant and keep(shape) and row.ratio:
                yield statistics.median(row.ratio), row.contest

    def first_of(self, group: str, keep: Callable[[str], bool] = lambda shape: True) -> Iterator[Row]:
        """The first row of each contest of the group: ours as users call it."""
        seen = set()
        for row in self.rows:
            found, _, shape = row.contest.partition("/")
            if found == group and row.contest not in seen and keep(shape):
                seen.add(row.contest)
                yield row


def width(shape: str) -> int:
    """D of ``NxDxK``."""
    return int(shape.split("x")[1])


def narrow(shape: str) -> bool:
    return width(shape) <= 16


def wide(shape: str) -> bool:
    return width(shape) >= 128


@dataclasses.dataclass(frozen=True)
class Goal:
    """``value`` gives a number for each contest it looks at; the worst must be at least (or at most) ``ask``."""

    text: str
    ask: float
    value: Callable[[Results], Found]
    at_most: bool = False
    unit: str = "x"


def _memory(results: Results) -> Found:
    for group in ("nearest", "cosine"):
        for row in results.first_of(group):
            if row.extra_mib is not None:
                yield row.extra_mib, row.contest


def _wrong(results: Results) -> Found:
    for record in results.exactness:
        for name, count in record["wrong"].items():
            if name.startswith("mmtok"):
                yield (count if isinstance(count, int) else float("inf")), f"{record['name']}, {name}"


def _dac_frames(results: Results) -> Found:
    """Frames with other codes than transformers'; the check wrote the count at the head of its note."""
    for row in results.first_of("dac"):
        if row.verdict is not None:
            head = row.verdict.note.split(" ", 1)[0]
            yield (float(head) if head.isdigit() else float("inf")), row.contest


def _floor(keep: Callable[[str], bool]) -> Callable[[Results], Found]:
    def value(results: Results) -> Found:
        for row in results.first_of("nearest", keep):
            if row.over_floor is not None:
                yield row.over_floor, row.contest

    return value


def _ratio(group: str, contestant: str, keep: Callable[[str], bool] = lambda shape: True) -> Callable[[Results], Found]:
    return lambda results: results.ratios(group, contestant, keep)


GOALS_CPU = (
    Goal("nearest code at D <= 16 over vector-quantize-pytorch", 10, _ratio("nearest", VQ_EVAL, narrow)),
    Goal("nearest code at D = 128, 256 over vector-quantize-pytorch", 5, _ratio("nearest", VQ_EVAL, wide)),
    Goal("extra memory of nearest code at any K", 32, _memory, at_most=True, unit=" MiB"),
    Goal("RVQ encode over vector-quantize-pytorch", 6, _ratio("rvq", VQ_EVAL)),
    Goal("RVQ decode over vector-quantize-pytorch", 16, _ratio("rvq-decode", "vector-quantize-pytorch")),
    Goal("DAC codes over transformers", 3.5, _ratio("dac", "transformers DAC, forward")),
    Goal("DAC frames with other codes than transformers", 0, _dac_frames, at_most=True, unit=""),
    Goal("codebook statistics over one-hot", 50, _ratio("statistics", "one-hot matmul")),
    Goal("exact entropy at 2^18, forward, over softmax", 50, _ratio("entropy", "softmax over 2^D")),
    Goal("exact entropy at 2^18, with backward, over softmax", 50, _ratio("entropy-backward", "softmax over 2^D")),
    Goal("FSQ packing over vector-quantize-pytorch", 2, _ratio("fsq-pack", "vector-quantize-pytorch FSQ, eval")),
    Goal("FSQ decode over vector-quantize-pytorch", 2, _ratio("fsq-decode", "vector-quantize-pytorch FSQ")),
    Goal("binary packing over vector-quantize-pytorch", 4, _ratio("binary-pack", "vector-quantize-pytorch LFQ, eval")),
    Goal("wrong codes on any data set, any mode", 0, _wrong, at_most=True, unit=""),
)
GOALS_CUDA = (
    Goal("nearest code at D <= 16 over vector-quantize-pytorch", 30, _ratio("nearest", VQ_EVAL, narrow)),
    Goal(
        "nearest code at D = 256 over vector-quantize-pytorch", 8, _ratio("nearest", VQ_EVAL, lambda s: width(s) > 128)
    ),
    Goal("nearest code, time over the fp32 floor", 2.5, _floor(lambda s: True), at_most=True),
    Goal("RVQ chain over vector-quantize-pytorch", 20, _ratio("rvq", VQ_EVAL)),
    Goal("RVQ decode over vector-quantize-pytorch", 10, _ratio("rvq-decode", "vector-quantize-pytorch")),
    Goal("DAC codes over transformers", 10, _ratio("dac", "transformers DAC, forward")),
    Goal("DAC frames with other codes than transformers", 0, _dac_frames, at_most=True, unit=""),
    Goal("codebook statistics over one-hot", 30, _ratio("statistics", "one-hot matmul")),
    Goal("wrong codes on any data set, any mode", 0, _wrong, at_most=True, unit=""),
)


def judge_goals(results: Results, device: str) -> list[dict[str, Any]]:
    """One record a goal: text, ask, unit, at_most, the worst value (None = not measured), where, met."""
    records = []
    for goal in GOALS_CUDA if device == "cuda" else GOALS_CPU:
        found = sorted(goal.value(results), reverse=goal.at_most)
        value, where = found[0] if found else (None, "")
        met = None if value is None else value <= goal.ask if goal.at_most else value >= goal.ask
        record = {"text": goal.text, "ask": goal.ask, "unit": goal.unit, "at_most": goal.at_most}
        records.append(record | {"value": value, "where": where, "met": met})
    return records
