"""Results as tables: Markdown, LaTeX (booktabs), CSV; one a test set, the best of what is comparable in bold."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmtok.bench.compare import conditions, differing
from mmtok.bench.records import Result

ORIGINAL = "original"
RATE_METRICS = ("bpp", "bitrate_bps", "bits_per_item")  # the first that a row has is what it is sorted by
FORMATS = ("md", "latex", "csv")
TITLES = {
    "bits_per_item": "bits",
    "bitrate_bps": "bitrate",
    "bpp": "bpp",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "st_lpips_alex": "ST-LPIPS (AlexNet)",
    "st_lpips_vgg": "ST-LPIPS (VGG)",
    "semantic_similarity": "semantic similarity",
    "speaker_similarity": "speaker similarity",
    "si_sdr": "SI-SDR",
    "si_sdr_aligned": "SI-SDR aligned",
    "sdr": "SDR",
    "pesq_wb": "PESQ-wb",
    "stoi": "STOI",
    "mel_distance": "mel distance",
    "stft_distance": "STFT distance",
    "dnsmos_ovrl": "DNSMOS overall",
    "dnsmos_p808": "DNSMOS P.808",
    "plcmos": "PLCMOS",
    "distillmos": "DistillMOS",
    "wer": "WER",
    "cer": "CER",
}


@dataclasses.dataclass(frozen=True)
class Column:
    """A measure of a table; ``digits`` are enough for two figures of its intervals."""

    metric: str
    unit: str
    direction: str
    digits: int

    @property
    def title(self) -> str:
        return TITLES.get(self.metric, self.metric)


@dataclasses.dataclass(frozen=True)
class Table:
    """One set: ``cells[row][column]`` is a `Result` or None.

    Args:
        part, test_set: of all its results.
        columns: the measures. contenders: the rows, by bits. cells: the numbers.
        best: (row, column) of the best comparable values. odd: (row, column) of numbers under another protocol than
            most of their column. notes: what a reader must know: reasons, left out items, other protocols.
    """

    part: str
    test_set: str
    columns: Sequence[Column]
    contenders: Sequence[str]
    cells: Sequence[Sequence[Result | None]]
    best: frozenset[tuple[int, int]]
    odd: frozenset[tuple[int, int]]
    notes: Sequence[str]


def make_tables(
    results: Iterable[Result],
    measures: Sequence[str] | None = None,
    sets: Sequence[str] | None = None,
    part: str = "reconstruction",
) -> list[Table]:
    """One table a set: contenders by bits below each other (the untouched originals last), measures side by side.

    Args:
        results: of a run.
        measures: the columns, in this order; None = all that the set has, the rates first.
        sets: of these only, in this order; None = all, sorted.
        part: whose numbers.

    Raises:
        ValueError: a measure or set without any result, or no results at all; it names what there is.
    """
    own = [r for r in results if r.part == part]
    if not own:
        raise ValueError(f"table: there are no results of the part {part}")
    _known("set", sets, [r.test_set for r in own])
    _known("measure", measures, [r.metric for r in own])
    found = []
    for name in sorted({r.test_set for r in own}) if sets is None else sets:
        here = [r for r in own if r.test_set == name]
        there = list(dict.fromkeys(r.metric for r in here))
        rates_first = [m for m in RATE_METRICS if m in there]
        wanted = [*rates_first, *(m for m in there if m not in rates_first)] if measures is None else measures
        metrics = [m for m in wanted if m in there]
        if metrics:
            found.append(_table(part, name, metrics, here))
    return found


def _known(what: str, wanted: Sequence[str] | None, there: Sequence[str]) -> None:
    if missing := [w for w in wanted or () if w not in there]:
        raise ValueError(f"{what}: expected of {list(dict.fromkeys(there))}, got {missing[0]!r}")


def _table(part: str, test_set: str, metrics: Sequence[str], results: Sequence[Result]) -> Table:
    by_key = {(r.contender, r.metric): r for r in results}
    rows = sorted({r.contender for r in results if r.metric in metrics}, key=lambda c: _order(c, by_key))
    cells = [[by_key.get((c, m)) for m in metrics] for c in rows]
    columns, best, odd = [], set(), set()
    notes: list[tuple[str, str]] = []
    for j, metric in enumerate(metrics):
        column = [row[j] for row in cells]
        first = next(r for r in column if r is not None)
        columns.append(Column(metric, first.unit, first.direction, _digits(column)))
        own_best, own_odd, own_notes = _compared(rows, column, columns[-1])
        best |= {(i, j) for i in own_best}
        odd |= {(i, j) for i in own_odd}
        notes += own_notes
    notes = _not_run_notes(rows, columns, cells) + notes
    return Table(part, test_set, columns, rows, cells, frozenset(best), frozenset(odd), _grouped(notes))


def _grouped(notes: Sequence[tuple[str, str]]) -> list[str]:
    """(measure, what to say of it) -> one note for all measures of which the same is said."""
    found: dict[str, list[str]] = {}
    for measure, said in notes:
        found.setdefault(said, []).append(measure)
    return [said.format(", ".join(dict.fromkeys(measures))) for said, measures in found.items()]


def _order(contender: str, by_key: Mapping[tuple[str, str], Result]) -> tuple[Any, ...]:
    rates = (by_key.get((contender, m)) for m in RATE_METRICS)
    bits = next((r.value for r in rates if r is not None and r.value is not None), math.inf)
    return contender == ORIGINAL, bits, contender


def _digits(column: Sequence[Result | None]) -> int:
    """Digits behind the point that show two figures of the narrowest interval, or four of the values without one."""
    there = [r for r in column if r is not None and r.value is not None and math.isfinite(r.value)]
    least = 2 if any(r.unit == "dB" for r in there) else 0  # differences on the same items are finer than the intervals
    widths = [r.high - r.low for r in there if r.low is not None and r.high is not None]
    widths = [w for w in widths if 0 < w < math.inf]
    if widths:
        return min(4, max(least, 1 - math.floor(math.log10(min(widths)))))
    values = [abs(r.value) for r in there if r.value is not None]
    if all(v == round(v) for v in values):
        return 0
    return min(4, max(least, 3 - math.floor(math.log10(max(values)))))


def _compared(
    rows: Sequence[str], column: Sequence[Result | None], about: Column
) -> tuple[list[int], list[int], list[tuple[str, str]]]:
    """Rows that are best, rows under another protocol than most, and what to say about them and left-out items."""
    notes, groups = [], {}
    for i, r in enumerate(column):
        if r is None or r.value is None:
            continue
        left = "; ".join(f"{reason} ({n})" for reason, n in r.protocol.get("unscored", {}).items())
        if left:
            notes.append((about.title, _fixed(f" of {rows[i]}: items without a value, in no mean: {left}")))
        if exact := r.protocol.get("exact", 0) if math.isfinite(r.value) else 0:
            notes.append((about.title, _fixed(f" of {rows[i]}: {exact} items are exact (infinite), in no mean")))
        groups.setdefault(repr(sorted(conditions(r).items(), key=lambda kv: kv[0])), []).append(i)
    if not groups:
        return [], [], notes
    most = max(groups.values(), key=len)
    odd = sorted(i for group in groups.values() if group is not most for i in group)
    usual = column[most[0]]
    for i in odd:
        r = column[i]
        assert r is not None and usual is not None
        fields = differing(conditions(usual), conditions(r))
        said = ", ".join(f"{k} {new} instead of {old}" for k, (old, new) in fields.items())
        notes.append((about.title, "† " + _fixed(f" of {rows[i]}, not comparable: {said}")))
    ranked = [(r.value, i) for i in most if (r := column[i]) and r.value is not None and rows[i] != ORIGINAL]
    if about.direction == "neither" or _is_rate(about) or len(ranked) < 2:
        return [], odd, notes
    values = [v for v, _ in ranked]
    top = (max if about.direction == "higher" else min)(values)
    # Where all are equal, none is best.
    return [i for v, i in ranked if v == top and min(values) < max(values)], odd, notes


def _not_run_notes(
    rows: Sequence[str], columns: Sequence[Column], cells: Sequence[Sequence[Result | None]]
) -> list[tuple[str, str]]:
    """One note a measure and reason, naming the contenders where it is not all of them."""
    notes = []
    for j, column in enumerate(columns):
        reasons: dict[str, list[str]] = {}
        for contender, row in zip(rows, cells, strict=True):
            if (r := row[j]) is not None and r.not_run is not None:
                reasons.setdefault(r.not_run, []).append(contender)
        for reason, who in reasons.items():
            of = "" if len(who) == len(rows) else f" of {', '.join(who)}"
            notes.append((column.title, _fixed(f"{of} not run: {reason}")))
    return notes


def _fixed(text: str) -> str:
    """A note with a place for its measures in front, whatever braces the text has."""
    return "{}" + text.replace("{", "{{").replace("}", "}}")


def number(value: float, digits: int) -> str:
    """``12.30``, ``inf`` for an infinite value; a minus sign never before a rounded zero."""
    if not math.isfinite(value):
        return "inf" if value > 0 else "-inf" if value < 0 else "nan"
    return f"{value + 0.0:.{digits}f}" if abs(value) >= 0.5 * 10**-digits else f"{0:.{digits}f}"


def cell_text(result: Result | None, digits: int) -> str:
    """``value [low, high]``, ``not run``, or ``-`` where nobody asked for the number."""
    value, interval = _cell(result, digits)
    return f"{value} {interval}" if interval else value


def _cell(result: Result | None, digits: int) -> tuple[str, str]:
    if result is None or result.value is None:
        return ("-" if result is None else "not run"), ""
    if result.low is None or result.high is None or result.low == result.high == result.value:
        return number(result.value, digits), ""
    return number(result.value, digits), f"[{number(result.low, digits)}, {number(result.high, digits)}]"


def to_markdown(table: Table) -> str:
    """A GitHub table with its notes below."""
    arrows = {"higher": " ↑", "lower": " ↓", "neither": ""}
    header = [f"{table.test_set} ({table.part})" if table.part != "reconstruction" else table.test_set]
    header += [f"{c.title}{_unit(c)}{'' if _is_rate(c) else arrows[c.direction]}" for c in table.columns]
    rows = []
    for i, contender in enumerate(table.contenders):
        row = [contender]
        for j, (cell, column) in enumerate(zip(table.cells[i], table.columns, strict=True)):
            value, interval = _cell(cell, column.digits)
            value = (f"**{value}**" if (i, j) in table.best else value) + ("†" if (i, j) in table.odd else "")
            row.append(f"{value} {interval}" if interval else value)
        rows.append(row)
    escaped = [[_in_table(c) for c in line] for line in (header, *rows)]
    text = markdown_table(escaped[0], escaped[1:])
    return text + "".join(f"\n\n{_in_table(note)}" for note in table.notes)


def to_text(table: Table, width: int = 120) -> str:
    """Values alone in aligned columns for a terminal; one measure a line where that is wider than ``width``.

    Measures without a single value are left out: the table's notes say why they have none.
    """
    lines = [[table.test_set, *table.contenders]]
    for j, column in enumerate(table.columns):
        own = [row[j] for row in table.cells]
        if not any(r is not None and r.value is not None for r in own):
            continue
        arrow = {"higher": " ↑", "lower": " ↓", "neither": ""}["neither" if _is_rate(column) else column.direction]
        texts = [_cell(r, column.digits)[0] for r in own]
        marks = [("*" if (i, j) in table.best else "") + ("†" if (i, j) in table.odd else "") for i in range(len(own))]
        lines.append([column.title + _unit(column) + arrow, *(t + m for t, m in zip(texts, marks, strict=True))])
    across = _aligned(list(zip(*lines, strict=True)))
    return across if len(across.split("\n", 1)[0]) <= width else _aligned(lines)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        [f"{line[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True))] for line in lines
    ]
    return "\n".join("  ".join(row).rstrip() for row in rows)


def to_latex(table: Table) -> str:
    """A ``table`` environment for the package booktabs; the notes stand in its caption."""
    arrows = {"higher": r" $\uparrow$", "lower": r" $\downarrow$", "neither": ""}
    header = ["contender"]
    for c in table.columns:
        arrow = "" if _is_rate(c) else arrows[c.direction]
        header.append(escape_latex(c.title + _unit(c)) + arrow)
    lines = []
    for i, contender in enumerate(table.contenders):
        row = [escape_latex(contender)]
        for j, (cell, column) in enumerate(zip(table.cells[i], table.columns, strict=True)):
            value, interval = (escape_latex(t) for t in _cell(cell, column.digits))
            value = value.replace("-", "$-$", 1) if re.match(r"-[\di]", value) else value
            value = rf"\textbf{{{value}}}" if (i, j) in table.best else value
            value += r"$^\dagger$" if (i, j) in table.odd else ""
            row.append(rf"{value} {{\scriptsize {interval}}}" if interval else value)
        lines.append("    " + " & ".join(row) + r" \\")
    notes = " ".join(f"{note}." for note in table.notes)
    caption = escape_latex(f"{table.test_set}, {table.part}. Brackets: 95 % intervals. {notes}".strip())
    label = re.sub(r"[^A-Za-z0-9]+", "-", f"{table.part}-{table.test_set}").strip("-")
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{caption}}}",
            rf"  \label{{tab:{label}}}",
            rf"  \begin{{tabular}}{{l{'r' * len(table.columns)}}}",
            r"    \toprule",
            "    " + " & ".join(header) + r" \\",
            r"    \midrule",
            *lines,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
    )


def to_csv(tables: Sequence[Table]) -> str:
    """One line a number, for spreadsheets, pandas and R; an empty value with its reason where it was not run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = ("part", "test_set", "contender", "metric", "value", "low", "high", "unit", "direction", "count")
    writer.writerow([*fields, "interval", "not_run"])
    for table in tables:
        for row in table.cells:
            for r in row:
                if r is not None:
                    writer.writerow(
                        ["" if (v := getattr(r, f)) is None else v for f in (*fields, "interval", "not_run")]
                    )
    return text.getvalue()


def render(tables: Sequence[Table], form: str = "md") -> str:
    """All tables in one text: ``md``, ``latex`` or ``csv``."""
    if form not in FORMATS:
        raise ValueError(f"format: expected one of {list(FORMATS)}, got {form!r}")
    if form == "csv":
        return to_csv(tables)
    return "\n\n".join((to_markdown if form == "md" else to_latex)(t) for t in tables) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "†": r"$^\dagger$", "±": r"$\pm$", "×": r"$\times$", "[": "{[}", "]": "{]}",
}  # fmt: skip


def escape_latex(text: str) -> str:
    """Text as it stands, for a LaTeX paragraph or cell; brackets too, for ``\\\\`` reads ``[`` as its argument."""
    return "".join(_LATEX.get(c, c) for c in " ".join(text.split()))


def _is_rate(column: Column) -> bool:
    """Whether it says what a contender costs: no rate is better than another by itself."""
    return column.metric in RATE_METRICS


def _unit(column: Column) -> str:
    return "" if column.unit in ("", "1") or column.metric in ("bpp", "bits_per_item") else f" ({column.unit})"


def _in_table(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A GitHub table; floats are expected as text already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines)


def interval_text(score: Mapping[str, float], digits: int) -> str:
    """``mean [low, high]`` of a `summary.mean_interval`, or ``-`` where there is none."""
    if not score or math.isnan(score["mean"]):
        return "-"
    return f"{score['mean']:.{digits}f} [{score['low']:.{digits}f}, {score['high']:.{digits}f}]"


def replace_block(text: str, name: str, content: str) -> str:
    """Put ``content`` between ``<!-- NAME -->`` and ``<!-- /NAME -->``; ValueError when the marks are missing."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start not in text or end not in text:
        raise ValueError(f"expected the marks {start} and {end}")
    head, rest = text.split(start, 1)
    return f"{head}{start}\n{content.strip()}\n{end}{rest.split(end, 1)[1]}"
