"""The tables and the plot of a run."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from typing import Any

from benching.protocol import Row

PLOTTED = {  # contestant of the group `nearest` -> colour
    "mmtok": "#0b6e4f",
    "addmm+argmin": "#8d99ae",
    "faiss IndexFlatL2": "#e09f3e",
    "transformers EnCodec": "#6d597a",
    "vector-quantize-pytorch, eval": "#b23a48",
}
HEAD = """# Kernels on {device}

`{command}`

{date}, {machine}. {threads}; PyTorch {torch}. Seed {seed}, {rounds} rounds. Code: {commit}.

All contestants of a table ran in one process, turn by turn in every round, on fresh random inputs each round; the time
is the median over rounds {clock}.
"x ours" is the contestant's time over that of the table's first row, in the same round: median (least to most).
"over floor" is time over the longest of: necessary products at {products}, necessary bytes at the better copy
rate below{scan}. "extra MiB" is the peak of one call over what was there before, results included{memory}.
"wrong" counts codes that differ from fp64 (in chains: rows, at the first level that differs), and "near-ties" the rows
whose best two codes differ by less than 2^-20 of |x| max|c|, about what fp32 cannot tell apart.
Ours is not timed where its check fails; a competitor is, marked "not exact".
"""


def number(x: float | None, digits: int = 3) -> str:
    """Three digits, no exponent."""
    if x is None:
        return ""
    if x != x or x in (float("inf"), float("-inf")):
        return str(x)
    if x == 0:
        return "0"
    whole = len(str(int(abs(x))))
    return f"{x:.{max(0, digits - whole if abs(x) >= 1 else digits)}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] * len(head)) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def contest_table(rows: Sequence[Row], items: str) -> str:
    head = ["contestant", "ms", "wall ms", "x ours", "over floor", "extra MiB"]
    head += [f"wrong {items}", "near-ties"] if items else []
    cells = []
    for row in rows:
        spread = ""
        if row.ratio:
            low, high = number(min(row.ratio)), number(max(row.ratio))
            spread = f"{number(statistics.median(row.ratio))} ({low} to {high})"
        wall = number(statistics.median(row.wall_ms)) if row.wall_ms else ""
        cell = [row.contestant, number(row.median_ms), wall, spread, number(row.over_floor), number(row.extra_mib)]
        verdict = row.verdict
        if items:
            counted = verdict is not None and verdict.wrong is not None
            share = 100 * verdict.wrong / max(1, verdict.total or 0) if counted else 0.0  # type: ignore[union-attr]
            cell += [f"{verdict.wrong} ({share:.2g} %)" if counted else "", str(verdict.near_ties) if counted else ""]  # type: ignore[union-attr]
        said = [] if row.status == "ok" else [row.status]
        if verdict is not None and verdict.note and verdict.note not in row.status:
            said.append(verdict.note)
        cells.append([*cell, "; ".join(said)])
    return table([*head, ""], cells)


def goals_table(goals: Sequence[dict[str, Any]]) -> str:
    cells = []
    for g in goals:
        sign = "at most" if g["at_most"] else "at least"
        value = "not measured" if g["value"] is None else f"{number(g['value'])}{g['unit']}"
        met = "" if g["met"] is None else "yes" if g["met"] else "**no**"
        cells.append([g["text"], f"{sign} {number(g['ask'])}{g['unit']}", value, g["where"], met])
    return table(["goal", "asked", "measured, the worst", "where", "met"], cells)


def exactness_table(records: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for r in records for name in r["wrong"]))
    cells = []
    for name in names:
        counts = [r["wrong"].get(name) for r in records]
        cells.append([name, *("" if c is None else str(c) for c in counts)])
    cells.append(["*near-ties*", *(str(r["near_ties"]) for r in records)])
    return table(["wrong codes of " + str(records[0]["rows"]), *(r["name"] for r in records)], cells)


def markdown(run: dict[str, Any], rows: Sequence[Row], items: dict[str, str], notes: dict[str, str]) -> str:
    """The whole report. ``run`` is what bench_kernels.py collects; items, notes: contest -> text."""
    machine, on_cuda = run["machine"], run["device"] == "cuda"
    parts = [
        HEAD.format(
            device=machine["gpu"] if on_cuda else machine["cpu"],
            command=run["command"],
            date=run["date"],
            machine=f"{machine['cpu']}, {machine['cores']} cores" + (f", {machine['gpu']}" if on_cuda else ""),
            threads=f"{run['threads']} thread(s)",
            torch=machine["versions"]["torch"],
            seed=run["seed"],
            rounds=run["rounds"],
            commit=run["commit"],
            clock="by CUDA events" if on_cuda else "of the CPU time of the whole process, all its threads",
            products="the fp32 GEMM rate below, or a third of the bf16 rate if that is more"
            if on_cuda
            else "the fp32 GEMM rate below",
            scan=", scores at the computed rate of a running minimum in registers" if on_cuda else "",
            memory=" (of PyTorch's allocator)" if on_cuda else " (resident set, in a fresh process)",
        )
    ]
    if not on_cuda:
        kept = (
            ", ".join(f"{k}={v}" for k, v in run["malloc"].items()) or "nothing: first touches of pages are timed too"
        )
        parts.append(f"malloc was told to keep freed memory by {kept}.\n")
    if run["goals"]:
        parts.append("## Goals\n\n" + goals_table(run["goals"]) + "\n")
    if run["ceilings"]:
        cells = [[name.replace("_", " "), number(value)] for name, value in run["ceilings"].items()]
        parts.append("## Ceilings of this machine in this run\n\n" + table(["", "best"], cells) + "\n")
    if run["exactness"]:
        parts.append("## Exactness\n\n" + exactness_table(run["exactness"]) + "\n")
    parts.append("## Times\n")
    for contest in dict.fromkeys(row.contest for row in rows):
        parts.append(f"### {contest}\n")
        if notes.get(contest):
            parts.append(notes[contest] + "\n")
        parts.append(contest_table([r for r in rows if r.contest == contest], items.get(contest, "")) + "\n")
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    parts.append(f"Versions: {versions}. Load average {run['load']} at the start and the end.\n")
    return "\n".join(parts)


def plot(rows: Sequence[Row], title: str) -> bytes | None:
    """PNG: left, time over floor at each shape; right, the others' time over ours elsewhere. None if no times.

    Raises:
        ImportError: no matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    near = [r for r in rows if r.contest.startswith("nearest/") and r.contestant in PLOTTED and r.over_floor]
    others = _competitors([r for r in rows if not r.contest.startswith(("nearest/", "threads/"))])
    if not near and not others:
        return None
    shapes = list(dict.fromkeys(r.contest for r in near))
    height = max(3.0, 1.2 + 0.75 * len(shapes), 1.2 + 0.42 * len(others))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, height), layout="constrained")
    names = [name for name in PLOTTED if any(r.contestant == name for r in near)]
    thick = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        mine = [r for r in near if r.contestant == name]
        at = [shapes.index(r.contest) + (i - (len(names) - 1) / 2) * thick for r in mine]
        values = [r.over_floor or 0.0 for r in mine]
        bars = left.barh(at, values, thick * 0.92, color=PLOTTED[name], label=name)
        left.bar_label(bars, [number(v, 2) for v in values], padding=2, fontsize=7)
    left.set_yticks(range(len(shapes)), [s.partition("/")[2] for s in shapes])
    left.set_title("nearest code, N x D x K: time over the floor", fontsize=10)
    left.axvline(1, color="black", linewidth=0.8)
    if names:
        left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False)
    for i, (colour, what) in enumerate((("#0b6e4f", "another package"), ("#8d99ae", "the fastest other way"))):
        pairs = [(at, pair[i]) for at, pair in enumerate(others)]
        values = [statistics.median(r.ratio) for _, r in pairs]
        at = [at + 0.4 * i - 0.2 for at, _ in pairs]
        right.barh(at, [v - 1 for v in values], 0.37, left=1.0, color=colour, label=what)  # to the left: ours is slower
        for y, v, (_, r) in zip(at, values, pairs, strict=True):
            right.text(1.08 * max(v, 1.0), y, f"{number(v, 2)}x {r.contestant}", fontsize=6, va="center")
    right.set_yticks(range(len(others)), [package.contest for package, _ in others])
    right.set_title("other ops: time of the others over ours", fontsize=10)
    right.axvline(1, color="black", linewidth=0.8)
    if others:
        right.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)
    for axis in (left, right):
        axis.set_xscale("log")
        axis.margins(x=0.12 if axis is left else 0.03)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    if others:
        right.set_xlim(right=40 * max(statistics.median(package.ratio) for package, _ in others))  # room for the names
    figure.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    pyplot.close(figure)
    return buffer.getvalue()


def _competitors(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Of each contest: the slowest other package that does not train meanwhile, and the fastest way that is not ours.

    A contest without a package has that fastest way twice.
    """
    picked = []
    for contest in dict.fromkeys(r.contest for r in rows):
        others = [r for r in rows if r.contest == contest and not r.ours and r.ratio]
        others = [r for r in others if not r.contestant.endswith("train")]
        if others:
            others.sort(key=lambda r: statistics.median(r.ratio))
            packages = [r for r in others if r.contestant.startswith(("vector-quantize-pytorch", "transformers"))]
            picked.append(((packages or others[:1])[-1], others[0]))
    return picked


COMPARED = ("vector-quantize-pytorch, eval", "transformers EnCodec", "addmm+argmin", "faiss IndexFlatL2")


def short_tables(rows: Sequence[Row], goals: Sequence[dict[str, Any]]) -> str:
    """For the README: the search at every shape against the usual ways, and what was asked of the rest."""
    contests: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.contest.startswith(("nearest/", "cosine/")):
            contests.setdefault(row.contest, {})[row.contestant] = row
    cells = []
    for contest, found in contests.items():
        ours = next(row for row in found.values() if row.ours)
        others = [
            f"{number(statistics.median(found[name].ratio), 2)}x" if name in found and found[name].ratio else ""
            for name in COMPARED
        ]
        usual = found.get(COMPARED[0])
        memory = f"{number(ours.extra_mib, 2)} / {number(usual.extra_mib if usual else None, 2)}"
        wrong = "" if ours.verdict is None else str(ours.verdict.wrong)
        name = contest.removeprefix("nearest/").replace("/", " ")
        cells.append([name, number(ours.median_ms), f"{number(ours.over_floor, 2)}x", *others, memory, wrong])
    head = ["N x D x K", "mmtok ms", "over floor", "vector-quantize-pytorch", "EnCodec of transformers"]
    head += ["addmm + argmin", "faiss", "extra MiB, ours / v-q-p", "wrong codes"]
    return table(head, cells) + "\n\n" + goals_table(goals)
