"""Items become numbers: means, medians and ratios of a set with 95 % bootstrap intervals, alone and as differences."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmtok.bench.records import Result
from mmtok.bench.scorers import SUMMARIES, Measure

DRAWS = 2000
METHOD = "95 % percentile bootstrap over items, 2,000 draws"
_CELLS = 1 << 22  # drawn numbers held at once: 32 MB; sets of up to 2,097 items are drawn in one piece

# What every item costs; the ratios are sums over the set, so long sounds and large pictures count by their size.
RATES = (
    Measure("bits_per_item", "bit", "lower", "bits of all codes of an item, as the container counts them"),
    Measure("bpp", "bit/pixel", "lower", "bits over pixels of the set", "ratio"),
    Measure("bitrate_bps", "bit/s", "lower", "bits over seconds of the set", "ratio"),
)
_RATE_OF = {"bpp": "pixels", "bitrate_bps": "seconds_of_sound"}


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far B is above A on the items that both have.

    Args:
        value: B minus A. low, high: its 95 % interval, None below two items. count: of the items in it.
        left_out: items that only one has, or that one of the two has no finite value for.
    """

    value: float
    low: float | None
    high: float | None
    count: int
    left_out: int

    @property
    def certain(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def bootstrap(columns: NDArray[np.float64], summary: str, seed: int = 0) -> tuple[float, float | None, float | None]:
    """The summary of ``columns`` (count, k) and its 95 % percentile interval over 2,000 draws of rows.

    Efron 1979: rows are drawn with replacement, and the 2.5 and 97.5 % points of the draws' summaries are the ends.

    Args:
        columns: k = 1 for ``mean`` and ``median``, k = 2 (errors, words) for ``ratio``; k = 2 or 4 gives the difference
            of the second half from the first, of the same rows.
        summary: ``mean``, ``median`` or ``ratio``.
        seed: the same seed and count draw the same rows, whatever is summarised.

    Returns:
        Value, low and high; the ends are None for fewer than two rows.
    """
    value = float(_summary(columns[None], summary)[0])
    count = len(columns)
    if count < 2:
        return value, None, None
    generator = np.random.default_rng(seed)
    rows = max(1, min(DRAWS, _CELLS // count))
    found = []
    for start in range(0, DRAWS, rows):
        drawn = generator.integers(0, count, (min(rows, DRAWS - start), count))
        found.append(_summary(columns[drawn], summary))
    all_found = np.concatenate(found)
    all_found = all_found[np.isfinite(all_found)]  # a draw of items without a single word has no ratio
    low, high = np.percentile(all_found, [2.5, 97.5])
    return value, float(low), float(high)


def _summary(x: NDArray[np.float64], summary: str) -> NDArray[np.float64]:
    """``x`` (draws, count, k) -> (draws,)."""
    wide = 2 if summary == "ratio" else 1
    parts = []
    for part in np.split(x, x.shape[2] // wide, axis=2):
        if summary == "ratio":
            sums = part.sum(1)
            with np.errstate(divide="ignore", invalid="ignore"):
                parts.append(sums[:, 0] / sums[:, 1])
        else:
            parts.append(part[:, :, 0].mean(1) if summary == "mean" else np.median(part[:, :, 0], 1))
    return parts[0] if len(parts) == 1 else parts[1] - parts[0]


def mean_interval(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Mean, and its 95 % percentile bootstrap interval over items (2,000 draws); one item is its own interval."""
    value, low, high = bootstrap(np.asarray(values, dtype=np.float64)[:, None], "mean", seed)
    ends = {"low": value if low is None else low, "high": value if high is None else high}
    return {"mean": value, **ends, "count": len(values)}


def summarise(
    lines: Iterable[Mapping[str, Any]],
    measures: Sequence[Measure],
    *,
    contender: str,
    test_set: str,
    protocol: Mapping[str, Any],
    seed: int = 0,
    part: str = "reconstruction",
) -> list[Result]:
    """One `Result` for each of ``measures`` from the lines of ``items.jsonl``.

    Args:
        lines: of any contenders and sets; those of ``contender`` on ``test_set`` are taken, of an item the last one.
        measures: of one scorer; each says how its items become one number.
        contender, test_set: the labels in the lines.
        protocol: what the numbers depend on: the set's, the contender's and the scorer's; ``summary`` (mean, median,
            ratio) is added, ``exact`` (items that are infinitely good, in no mean) and ``unscored`` (reason -> items
            without a value) where there are such items, and ``counted_on`` (the sum that a ratio divides by).
        seed: of the bootstrap; the same for all contenders of a run.

    Returns:
        In the order of ``measures``; ``value`` is None with the reasons in ``not_run`` where no item has a value, and
        infinite without an interval where all items are exact.
    """
    own = _own(lines, contender, test_set)
    return [_result(own, m, contender, test_set, protocol, seed, part) for m in measures]


def rate_results(
    lines: Iterable[Mapping[str, Any]], *, contender: str, test_set: str, protocol: Mapping[str, Any], seed: int = 0
) -> list[Result]:
    """``bits_per_item``, and ``bpp`` of pictures or ``bitrate_bps`` of sounds, over all items; [] without bits."""
    own = _own(lines, contender, test_set)
    found = [m for m in RATES if any(line_value(line, m.name) is not None for line in own)]
    return [_result(own, m, contender, test_set, protocol, seed, "reconstruction") for m in found]


def paired_difference(
    lines_a: Iterable[Mapping[str, Any]],
    lines_b: Iterable[Mapping[str, Any]],
    measure: str,
    summary: str = "mean",
    seed: int = 0,
) -> Difference | None:
    """``measure`` of B minus A, where both have the item: the items' own spread cancels.

    Args:
        lines_a, lines_b: of one contender and one set each.
        measure: a key of the lines' ``values``, or one of `RATES`.
        summary: the difference of means (= the mean difference), of medians or of ratios, the same rows in both.

    Returns:
        None where no item has a finite value in both.
    """
    if summary not in SUMMARIES:
        raise ValueError(f"summary: expected one of {list(SUMMARIES)}, got {summary!r}")
    a, b = ({str(line["item"]): line_value(line, measure) for line in lines} for lines in (lines_a, lines_b))
    rows = []
    for item, x in sorted(a.items()):  # in an order that does not depend on how the runs came about
        y = b.get(item)
        if x is not None and y is not None and all(map(math.isfinite, (*x, *y))):
            rows.append((*x, *y))
    widths = {len(row) for row in rows}
    if not rows or widths - {4 if summary == "ratio" else 2}:
        return None
    value, low, high = bootstrap(np.array(rows, dtype=np.float64), summary, seed)
    if not math.isfinite(value):
        return None
    return Difference(value, low, high, len(rows), len(a.keys() | b.keys()) - len(rows))


def line_value(line: Mapping[str, Any], measure: str) -> tuple[float, ...] | None:
    """What a line has of a measure: ``(value,)``, or ``(errors, words)`` of a ratio; None where it has none.

    Infinite values stand in the lines as ``"inf"`` and ``"-inf"``, for JSON has no such numbers.
    """
    value = line.get("values", {}).get(measure)
    if value is None and measure == "bits_per_item":
        value = line.get("bits")
    if value is None and measure in _RATE_OF and line.get("bits") is not None and line.get(_RATE_OF[measure]):
        value = (line["bits"], line[_RATE_OF[measure]])
    if value is None:
        return None
    return tuple(map(float, value)) if isinstance(value, list | tuple) else (float(value),)


def _own(lines: Iterable[Mapping[str, Any]], contender: str, test_set: str) -> list[Mapping[str, Any]]:
    """The lines of one contender and set in the items' order, the last of each item: an order of their own would make
    a resumed run draw other rows than one that was never killed."""
    own = {str(line["item"]): line for line in lines if line["contender"] == contender and line["set"] == test_set}
    return sorted(own.values(), key=lambda line: (line.get("index", 0), str(line["item"])))


def _result(
    own: Sequence[Mapping[str, Any]],
    measure: Measure,
    contender: str,
    test_set: str,
    protocol: Mapping[str, Any],
    seed: int,
    part: str,
) -> Result:
    if measure.summary not in SUMMARIES:
        raise ValueError(f"{measure.name}: expected a summary of {list(SUMMARIES)}, got {measure.summary!r}")
    rows, exact = [], 0
    unscored: Counter[str] = Counter()
    best = {"higher": math.inf, "lower": -math.inf}.get(measure.direction)
    wide = 2 if measure.summary == "ratio" else 1
    for line in own:
        value = line_value(line, measure.name)
        if value is None:
            unscored[str(line.get("unscored", {}).get(measure.name, "not in the run's lines"))] += 1
        elif len(value) != wide:
            expected = "a pair (errors, words)" if wide == 2 else "one number"
            raise ValueError(f"{measure.name} of {line['item']}: expected {expected}, got {list(value)}")
        elif value == (best,):
            exact += 1
        elif not all(map(math.isfinite, value)):
            unscored[f"{value[0]:g}, which has no place in a {measure.summary}"] += 1
        else:
            rows.append(value)
    full = {**protocol, "summary": measure.summary}
    full |= {"exact": exact} if exact else {}
    full |= {"unscored": dict(sorted(unscored.items()))} if unscored else {}
    names: dict[str, Any] = {"part": part, "contender": contender, "test_set": test_set, "metric": measure.name}
    names |= {"unit": measure.unit, "direction": measure.direction}
    if not rows and exact:
        return Result(**names, value=best, count=exact, protocol=full)
    if not rows:
        return Result(**names, value=None, not_run=_why_none(own, unscored), protocol=full)
    columns = np.array(rows, dtype=np.float64)
    if wide == 2:
        full["counted_on"] = float(columns[:, 1].sum())
        if full["counted_on"] <= 0:
            reason = f"nothing to divide by: {len(rows)} items, 0 of what the errors are counted on"
            return Result(**names, value=None, not_run=reason, protocol=full)
    value, low, high = bootstrap(columns, measure.summary, seed)
    method = None if low is None else f"{METHOD}, seed {seed}"
    return Result(**names, value=value, low=low, high=high, count=len(rows), interval=method, protocol=full)


def _why_none(own: Sequence[Mapping[str, Any]], unscored: Counter[str]) -> str:
    if not own:
        return "no item of the set was run; run the same command again"
    return "no item has a value: " + "; ".join(f"{reason} ({n} items)" for reason, n in unscored.most_common(3))
