"""What `bench_corpus.py` prints, and its part of README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benching.report import table

from corpora.memory import lasting
from corpora.paper import paper_table

GOAL_MODEL, GOAL_PADDING = 0.9, 0.1


def markdown(run: Mapping[str, Any]) -> str:
    """All tables."""
    parts = [
        "# A whole corpus: cost, scaling, reading",
        f"{run['machine']['machine']}, load {run['load']} at the start, {run['date']}. "
        f"`{run['command']}`" + (" A smoke run: generated files, the figures mean nothing." if run["smoke"] else ""),
        "## Tokenizing in one process\n\nRates count CPU time, with decoding; the model's share is of the wall.",
    ]
    head = ["corpus", "tokenizer", "items", "failed", "items/s", "over one by one", "model's share", "padding"]
    head += ["bytes an item", "nominal", "and a shard"]
    cells = []
    for name, r in run["cases"].items():
        share = r["seconds"].get("model", 0.0) / max(1e-9, r["seconds"].get("total", 0.0))
        cells.append(
            [
                *(name, f"`{r['tokenizer']}`", str(r["items"]), str(r["failures"])),
                *(f"{r['items_a_second']['corpus_cpu']:.2f}", f"{r['batched_over_one_by_one']:.2f}x", f"{share:.1%}"),
                *(f"{r['padding']:.1%}", f"{r['bytes_an_item']:.0f}", f"{r['nominal_bytes_an_item']:.0f}"),
                f"{r['header_bytes_a_shard']:.0f}",
            ]
        )
    parts.append(table(head, cells))
    parts.append(f"Goals: {GOAL_MODEL:.0%} in the model, padding below {GOAL_PADDING:.0%}.")
    parts.append("## Engines\n\nOver one worker of the same engine; equal bytes were checked.")
    head = ["corpus", "engine", "workers", "items/s (wall)", "over 1 worker", "model's share", "MiB", "MiB a minute"]
    cells = []
    for name, r in run["cases"].items():
        for e in r["engines"]:
            one = next(o for o in r["engines"] if o["engine"] == e["engine"])
            memory = lasting(e["memory"]) or {}
            told = [f"{memory[k]:.1f}" if k in memory else "too short" for k in ("mean_mib", "slope_mib_a_minute")]
            cells.append(
                [
                    *(name, e["engine"], str(e["workers"]), f"{e['items_a_second']:.2f}"),
                    *(f"{e['items_a_second'] / one['items_a_second']:.2f}x", f"{e['share_in_model']:.1%}", *told),
                ]
            )
    parts.append(table(head, cells))
    for name, reading in run["reading"].items():
        parts.append(f"## Reading: {name}, {reading['items']} items, {reading['codes']} codes")
        head = ["reader", "clock", "items/s", "M codes/s", "over WebDataset", "over numpy memmap"]
        cells = [
            [r["reader"], r["clock"], f"{r['items_a_second']:,.0f}", f"{r['codes_a_second'] / 1e6:.2f}"]
            + [f"{r[k]:.2f}x" for k in ("over_WebDataset", "over_numpy")]
            for r in reading["rows"]
        ]
        parts.append(table(head, cells))
    parts.append(
        "## On paper\n\nIn proportion to the measured constants. GPU hours: the counted operations of the networks at "
        f"{run['gpu_tflops']:g} x 10^12 a second, which is assumed, not measured; decoding stays on CPU cores."
    )
    parts.append(paper_table(run["paper"]))
    return "\n\n".join(parts) + "\n"


def readme_text(run: Mapping[str, Any]) -> str:
    """What a corpus costs, how it scales, how fast it is read, and the calculation on paper, shorter."""
    head = ["2,000 files each", "items/s of a core", "over one by one", "in the model", "padding"]
    head += ["2 local workers", "2 Ray workers"]
    head[0] = f"{min(r['items'] + r['failures'] for r in run['cases'].values()):,} files each"
    cells = []
    for name, r in run["cases"].items():
        share = r["seconds"]["model"] / (r["seconds"]["total"] - r["seconds"]["load"])
        scaled = [_scaling(r, engine) for engine in ("local", "ray")]
        cells.append(
            [
                *(f"{name}, `{r['tokenizer']}`", f"{r['items_a_second']['corpus_cpu']:.1f}"),
                *(f"{r['batched_over_one_by_one']:.2f}x", f"{share:.0%}", f"{r['padding']:.1%}", *scaled),
            ]
        )
    parts = [table(head, cells)]
    head = ["reading again, one process", *run["reading"]]
    names = [row["reader"] for row in next(iter(run["reading"].values()))["rows"]]
    cells = []
    for name in names:
        found = [next(r for r in reading["rows"] if r["reader"] == name) for reading in run["reading"].values()]
        cells.append([name, *(f"{r['items_a_second']:,.0f}/s, {r['over_WebDataset']:.1f}x" for r in found)])
    parts += [table(head, cells), paper_table(run["paper"])]
    return "\n\n".join(parts)


def _scaling(result: Mapping[str, Any], engine: str) -> str:
    """Items a second of two workers over those of one; empty where it was not run."""
    rates = {e["workers"]: e["items_a_second"] for e in result["engines"] if e["engine"] == engine}
    return f"{rates[2] / rates[1]:.2f}x" if {1, 2} <= set(rates) else ""
