"""Rate-distortion plots: bits against a measure, one line a tokenizer over its rates, with 95 % bands.

The background is transparent and every colour has a contrast of 3 or more (text: 4) with white and with a dark page, so
that one file serves README and report in both themes.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtok.bench.records import Result, read_results
from mmtok.bench.tables import ORIGINAL, RATE_METRICS, TITLES
from mmtok.tokens import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS = "plots"
INK = "#7a7a7a"  # text, axes
COLOURS = ("#3b82d6", "#d9622b", "#2f9e58", "#c2529f", "#9a8420", "#8a6fe0", "#2496a3", "#d0495a", "#8c6d5a", "#7d8590")
MARKERS = "osD^vPX<>*"
_AXES = {"bpp": ("bits per pixel", 1.0), "bitrate_bps": ("kbit/s", 1e-3), "bits_per_item": ("bits per item", 1.0)}


@dataclasses.dataclass(frozen=True)
class Point:
    """One contender: what it costs, in the axis' unit, and what it scored with its interval."""

    contender: str
    rate: float
    value: float
    low: float | None
    high: float | None


def family(contender: str) -> str:
    """What a line joins: the label without its rate. ``a#levels=2`` -> ``a``, ``opus:6000`` -> ``opus``,
    ``a#levels=2&text`` -> ``a#text``."""
    name, _, options = contender.partition("#")
    kept = [o for o in options.split("&") if o and o.partition("=")[0] not in ("levels", "tokens", "bytes")]
    name = re.sub(r"^([\w-]+):\d[\d.]*k?$", r"\1", name)
    return name + ("#" + "&".join(kept) if kept else "")


def curves(results: Iterable[Result], measure: str, test_set: str) -> tuple[str, dict[str, list[Point]]]:
    """The rate metric of the set, and for each family its points by rate; the originals have no rate and no point.

    Raises:
        ValueError: no contender of the set has both a rate and a finite value.
    """
    own = [r for r in results if r.part == "reconstruction" and r.test_set == test_set and r.value is not None]
    by_metric = {m: {r.contender: r for r in own if r.metric == m} for m in (*RATE_METRICS, measure)}
    axis = next((m for m in RATE_METRICS if by_metric[m]), RATE_METRICS[-1])
    found: dict[str, list[Point]] = {}
    for contender, r in by_metric[measure].items():
        rate = by_metric[axis].get(contender)
        if rate is not None and rate.value is not None and r.value is not None and math.isfinite(r.value):
            point = Point(contender, rate.value * _AXES[axis][1], r.value, r.low, r.high)
            found.setdefault(family(contender), []).append(point)
    if not found:
        metrics = sorted({r.metric for r in own})
        raise ValueError(f"{measure} on {test_set}: no contender has it and a rate; the set has {metrics}")
    return axis, {name: sorted(points, key=lambda p: (p.rate, p.contender)) for name, points in sorted(found.items())}


def reference(results: Iterable[Result], measure: str, test_set: str) -> float | None:
    """What the untouched items score, for measures that judge a reconstruction alone."""
    for r in results:
        if (r.part, r.contender, r.test_set, r.metric) == ("reconstruction", ORIGINAL, test_set, measure):
            return r.value if r.value is not None and math.isfinite(r.value) else None
    return None


def rate_distortion(results: Sequence[Result], measure: str, test_set: str) -> Figure:
    """A figure of ``measure`` over bits a pixel (pictures) or kbit/s (sounds), on a transparent background.

    A family of several rates is a line with its 95 % band, one of a single rate a mark with its 95 % bar.

    Raises:
        ValueError: nothing to draw, see `curves`. ImportError: no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    except ImportError as e:
        raise ImportError("plots need matplotlib: pip install 'mmtok[bench]'") from e
    axis, lines = curves(results, measure, test_set)
    about = next(r for r in results if r.metric == measure and r.test_set == test_set)
    figure = Figure(figsize=(7.2, 4.0), dpi=150, layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    rates = [p.rate for points in lines.values() for p in points]
    if min(rates) > 0 and max(rates) > 8 * min(rates):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    for number, (name, points) in enumerate(lines.items()):
        look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        # The eleventh family on has the colours again, dashed.
        look["linestyle"] = "-" if number < len(COLOURS) else "--"
        x, y = [p.rate for p in points], [p.value for p in points]
        low = [p.value if p.low is None else p.low for p in points]
        high = [p.value if p.high is None else p.high for p in points]
        axes.plot(x, y, label=f"\u200b{name}", markersize=5, linewidth=1.6, **look)  # a leading _ would hide it
        if len(points) > 1:
            axes.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
        elif low != high:
            axes.vlines(x, low, high, color=look["color"], linewidth=1.6, alpha=0.6)
    if (ceiling := reference(results, measure, test_set)) is not None:
        axes.axhline(ceiling, color=INK, linewidth=1, linestyle=":", label="the originals")
    _dress(axes, axis, about)
    return figure


def _dress(axes: Any, axis: str, about: Result) -> None:
    arrow = {"higher": "higher is better", "lower": "lower is better", "neither": ""}[about.direction]
    title = TITLES.get(about.metric, about.metric)
    unit = f" ({about.unit})" if about.unit not in ("", "1") else ""
    texts = [axes.set_xlabel(_AXES[axis][0]), axes.set_ylabel(title + unit + (f", {arrow}" if arrow else ""))]
    texts.append(axes.set_title(f"{about.test_set}, {about.count} items; bands: 95 %", fontsize=10, loc="left"))
    legend = axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    for text in (*texts, *legend.get_texts()):
        text.set_color(INK)
        text.set_parse_math(False)  # a $ in a name is a $
    axes.tick_params(colors=INK, which="both", labelsize=8)
    axes.grid(color=INK, alpha=0.25, linewidth=0.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def file_bytes(figure: Figure, form: str) -> bytes:
    """The figure as ``svg`` (text stays text) or ``png``; the same figure gives the same bytes."""
    import matplotlib

    data = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mmtok"}):
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(data, format=form, metadata=metadata, transparent=True)
    return data.getvalue()


def plottable(results: Sequence[Result]) -> dict[str, list[str]]:
    """Set -> measures to draw: those of which contenders at two different rates at least have a value."""
    found: dict[str, list[str]] = {}
    own = [r for r in results if r.part == "reconstruction" and r.metric not in RATE_METRICS and r.value is not None]
    for test_set, measure in dict.fromkeys((r.test_set, r.metric) for r in own):
        try:
            _, lines = curves(results, measure, test_set)
        except ValueError:
            continue
        if len({p.rate for points in lines.values() for p in points}) > 1:
            found.setdefault(test_set, []).append(measure)
    return found


def write_plots(run_folder: str | Path) -> list[Path]:
    """Write ``plots/<set>-<measure>.svg`` and ``.png`` of a run; [] where no set has contenders at two rates.

    Raises:
        FileNotFoundError: no results there. ImportError: no matplotlib.
    """
    folder = Path(run_folder)
    results = read_results(folder)
    wanted = plottable(results)
    out = folder / PLOTS
    written = []
    for test_set, measures in wanted.items():
        out.mkdir(exist_ok=True)
        for measure in measures:
            figure = rate_distortion(results, measure, test_set)
            for form in ("svg", "png"):
                path = out / f"{_file_name(f'{test_set}-{measure}')}.{form}"
                write_atomic(path, file_bytes(figure, form))
                written.append(path)
    return written


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-")
