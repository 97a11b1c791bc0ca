"""Tables of a comparison: means over seeds and pictures with bootstrap intervals, paired against a baseline."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmtok.bench.tables import interval_text, markdown_table
from mmtok.tokens import write_atomic

DRAWS = 2000
DIGITS = {"psnr": 2, "ssim": 3, "lpips": 4}
HEADS = {"psnr": "PSNR dB", "ssim": "SSIM", "lpips": "ST-LPIPS"}


def interval(values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean of (seeds, items) and its 95 % bootstrap interval; each draw takes seeds and items with replacement."""
    rng = np.random.default_rng(seed)
    S, N = values.shape
    means = [values[rng.integers(S, size=S)].mean(0)[rng.integers(N, size=N)].mean() for _ in range(DRAWS)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "seeds": S, "items": N}


def summary(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Scores of one variant over its seeds; single numbers keep the value of every seed."""
    found: dict[str, Any] = {"seeds": len(rows)}
    for name in names:
        values = [row[name] for row in rows if name in row]
        if not values:
            continue
        if isinstance(values[0], list):
            found[name] = interval(np.array(values))
        else:
            found[name] = {"mean": float(np.mean(values)), "each": [round(float(v), 4) for v in values]}
    return found


def differences(rows: Mapping[str, Sequence[Mapping[str, Any]]], baseline: str, names: Sequence[str]) -> dict[str, Any]:
    """variant -> score -> variant minus baseline, paired by seed and picture."""
    found: dict[str, Any] = {}
    for variant, mine in rows.items():
        if variant == baseline or baseline not in rows:
            continue
        for name in names:
            pairs = [(a[name], b[name]) for a, b in zip(mine, rows[baseline], strict=False) if name in a and name in b]
            if not pairs:
                continue
            gap = np.array([np.atleast_1d(a) - np.atleast_1d(b) for a, b in pairs])
            entry = interval(gap) if gap.shape[1] > 1 else spread(gap[:, 0])
            found.setdefault(variant, {})[name] = entry
    return found


def spread(values: np.ndarray) -> dict[str, Any]:
    """Mean of one number a seed, with every seed's; three seeds give no honest interval."""
    return {"mean": float(values.mean()), "each": [round(float(v), 4) for v in values], "seeds": len(values)}


def cell(entry: Mapping[str, Any] | None, digits: int) -> str:
    """``mean [low, high]`` or ``mean (seed values)``."""
    if not entry:
        return "-"
    if "low" in entry:
        return interval_text(dict(entry), digits)
    if "each" in entry and len(entry["each"]) > 1:
        return f"{entry['mean']:.{digits}f} ({', '.join(f'{v:.{digits}f}' for v in entry['each'])})"
    return f"{entry['mean']:.{digits}f}"


def write_claim(
    name: str,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    args: argparse.Namespace,
    baseline: str,
    extra: Mapping[str, tuple[str, int]] | None = None,
    notes: Mapping[str, Any] | None = None,
    unit: str = "picture",
) -> dict[str, Any]:
    """Print the table of a claim, and keep it as JSON and Markdown in ``args.results`` when given.

    Args:
        rows: variant -> its scores, one dict a seed.
        baseline: the variant that the differences are taken against.
        extra: further scores: name -> (column head, digits).
        notes: what else the JSON shall hold.
        unit: what a step reads ``args.batch`` of, and what is scored.
    """
    columns = {k: (HEADS[k], DIGITS[k]) for k in HEADS} | {"frechet": ("FD[nsfw-incv3]", 1)} | dict(extra or {})
    present = [k for k in columns if any(k in row for some in rows.values() for row in some)]
    variants = {variant: summary(some, ["bits", *present]) for variant, some in rows.items()}
    gaps = differences(rows, baseline, present)
    result = {
        "claim": name,
        "steps": args.steps,
        "batch": args.batch,
        "baseline": baseline,
        "count": next((row["count"] for some in rows.values() for row in some if "count" in row), 0),
        "variants": variants,
        "differences": gaps,
        **dict(notes or {}),
    }
    header = ["variant", "bits", *(columns[k][0] for k in present)]
    table = []
    for variant, scores in variants.items():
        bits = cell(scores.get("bits"), 0).split(" (")[0]
        table.append([variant, bits, *(cell(scores.get(k), columns[k][1]) for k in present)])
    text = markdown_table(header, table)
    if gaps:
        below = [[f"{v} - {baseline}", "", *(cell(g.get(k), columns[k][1]) for k in present)] for v, g in gaps.items()]
        text += f"\n\nDifferences, paired by seed and {unit}:\n\n" + markdown_table(header, below)
    print(text)
    if args.results is not None:
        folder = Path(args.results)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
        about = (
            f"# {name}\n\n{args.steps} steps of {args.batch} {unit}s, {result['count']} test {unit}s. Brackets:\n"
            f"95 % bootstrap intervals over seeds and {unit}s; parentheses: each seed.\n\n"
        )
        write_atomic(folder / f"{name}.md", (about + text + "\n").encode())
    return result
