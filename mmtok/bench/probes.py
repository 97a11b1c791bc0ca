"""What codes tell about what they stand for: probes with two heads and three seeds, phone ABX, retrieval.

The second part of the survey "Discrete Audio Tokens: More Than a Survey!" (arXiv 2506.10274) at the size of a laptop,
and its twin for pictures. The same heads read continuous features, so that every accuracy stands beside one that needed
no tokenizer; those results carry the labels ``continuous[log-mel]`` and ``continuous[pixels 8x8]`` and are made once a
run. Options of this part: ``steps`` and ``seeds`` of a probe, ``tasks``, a list of names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmtok.bench.abx import PHONES_TASK, pair_interval, phone_errors
from mmtok.bench.contenders import Contender
from mmtok.bench.parts import Context, Job
from mmtok.bench.probe_codes import Baseline, Reading, Source, latents_of, reading
from mmtok.bench.probe_heads import (
    BATCH,
    DIM,
    HEADS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    accuracy_interval,
    predict,
    standardised,
    train_probe,
)
from mmtok.bench.probe_material import OTHER, TEST, TRAIN, Family, Task, prepared
from mmtok.bench.probe_retrieval import (
    CAPTIONS_TASK,
    KS,
    VIEWS,
    VIEWS_TASK,
    caption_embeddings,
    caption_hits,
    cosines,
    equal_codes,
    placed_kernel,
    view_hits,
)
from mmtok.bench.probe_tasks import TASKS
from mmtok.bench.records import Result
from mmtok.bench.scorers import NotRunError

PART = "probes"
STEPS, SEEDS = 200, 3
ABX, VIEWS_NAME, CAPTIONS_NAME = "phones", "views", "captions"
SEED_INTERVAL = "bootstrap over seeds and test items, 1000 draws"
ITEM_INTERVAL = "bootstrap over queries, 1000 draws"
PAIR_INTERVAL = "bootstrap over pairs of phones, 1000 draws"


def jobs(contender: Contender, context: Context) -> list[Job]:
    """One job a task and head (all seeds inside), one for ABX, one for each way of retrieval; those of the continuous
    features come with every contender under one key, so that a run does them once.

    Raises:
        ValueError: an unknown task, or numbers of steps or seeds below 1.
    """
    steps, seeds = context.options.get("steps", STEPS), context.options.get("seeds", SEEDS)
    for name, value in (("steps", steps), ("seeds", seeds)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"probes: expected {name} of 1 or more, got {value!r}")
    known = [*TASKS, ABX, VIEWS_NAME, CAPTIONS_NAME]
    wanted = context.options.get("tasks") or known
    if unknown := [t for t in wanted if t not in known]:
        raise ValueError(f"probes: expected tasks of {known}, got {unknown}")
    if context.smoke:
        steps, seeds = min(steps, 5), min(seeds, 2)
    pieces: list[tuple[str, Callable[[Source], list[Result]]]] = []
    for name, family in TASKS.items():
        if family.modality == contender.modality and name in wanted:
            for head in HEADS:
                run = functools.partial(classified, name, family, head, context, steps, seeds)
                pieces.append((f"{name}/{head}", run))
    others = {ABX: phones} if contender.modality == "audio" else {VIEWS_NAME: views, CAPTIONS_NAME: captions}
    pieces += [(name, functools.partial(run, context)) for name, run in others.items() if name in wanted]
    found = []
    for source in (contender, Baseline(contender.modality)):
        for name, run in pieces:
            found.append(Job(f"{PART}/{name}/{source.label}", functools.partial(run, source)))
    return found


# ---- classification ----


def classified(
    name: str, family: Family, head: str, context: Context, steps: int, seeds: int, source: Source
) -> list[Result]:
    """Accuracy of one head on one task, in percent: on the test items, and on words of the other voice."""
    metrics = {TEST: f"accuracy[{head}]"}
    if name == "keyword":
        metrics[OTHER] = f"accuracy_other_voice[{head}]"
    protocol: dict[str, Any] = {
        "task": family.about,
        "head": HEADS[head],
        "steps": steps,
        "seeds": [context.seed + r for r in range(seeds)],
        "batch": BATCH,
        "width": DIM,
        "optimizer": f"AdamW {LEARNING_RATE:g}, weight decay {WEIGHT_DECAY:g}, one cycle, classes drawn evenly",
    }
    try:
        task = prepared(name, family, context)
        protocol |= task.protocol
        read = reading(source, task, context)
    except NotRunError as e:
        return [_not_run(source, name, m, "%", "higher", context, protocol, e) for m in metrics.values()]
    protocol |= {"codes": read.frames.about, "unscored": read.unscored}
    labels = torch.tensor(task.labels)[read.kept]
    rows = {split: _rows(task, read, split) for split in (TRAIN, *metrics)}
    frames = read.frames if read.frames.sizes else standardised(read.frames, rows[TRAIN])
    positional = family.modality == "image"
    if positional:
        protocol["places"] = "a learnt gain and offset of each position"
    short = [c for n, c in enumerate(task.classes) if not bool((labels[rows[TRAIN]] == n).any())]
    empty = [split for split in metrics if not len(rows[split])]
    if short or empty:
        why = NotRunError(f"no items left of {[*short, *empty]}: {read.unscored}")
        return [_not_run(source, name, m, "%", "higher", context, protocol, why) for m in metrics.values()]
    hits: dict[str, list[Tensor]] = {split: [] for split in metrics}
    for seed in protocol["seeds"]:
        probe = train_probe(frames, labels, rows[TRAIN], len(task.classes), head, seed, steps, positional)
        for split in metrics:
            hits[split].append(predict(probe, frames, rows[split]) == labels[rows[split]])
    found = []
    for split, metric in metrics.items():
        joined = torch.stack(hits[split])  # (R, M)
        low, high = accuracy_interval(joined, context.seed)
        each = [round(100 * float(h.double().mean()), 3) for h in joined]
        found.append(
            Result(
                PART,
                source.label,
                name,
                metric,
                100 * float(joined.double().mean()),
                "%",
                "higher",
                100 * low,
                100 * high,
                len(rows[split]),
                SEED_INTERVAL,
                protocol=_protocol(source, context, protocol | {"accuracy_of_each_seed": each}),
            )
        )
    return found


def _rows(task: Task, read: Reading, split: str) -> Tensor:
    """Positions among the items that were read of those of a split."""
    wanted = set(task.rows(split).tolist())
    return torch.tensor([n for n, i in enumerate(read.kept.tolist()) if i in wanted], dtype=torch.int64)


# ---- ABX ----


def phones(context: Context, source: Source) -> list[Result]:
    """ABX error in percent, within and across speakers, by the vectors behind the codes and by the codes themselves."""
    kinds = ("latents",) if isinstance(source, Baseline) else ("latents", "codes")
    protocol: dict[str, Any] = {"task": PHONES_TASK.about}
    names = {kind: [f"abx_{who}[{kind}]" for who in ("within", "across")] for kind in kinds}
    try:
        task = prepared(ABX, PHONES_TASK, context)
        protocol |= task.protocol
        read = reading(source, task, context)
    except NotRunError as e:
        return [_not_run(source, ABX, m, "%", "lower", context, protocol, e) for kind in kinds for m in names[kind]]
    protocol["unscored"] = read.unscored
    found = []
    for kind in kinds:
        try:
            frames, about = _abx_frames(source, read, kind)
        except NotRunError as e:
            found += [_not_run(source, ABX, m, "%", "lower", context, protocol, e) for m in names[kind]]
            continue
        assert read.frame_rate is not None
        errors = phone_errors(task, frames, read.kept, read.frame_rate, kind == "codes")
        told = protocol | {"distance": f"{about}; DTW, mean along the path", "frame_rate": read.frame_rate}
        for metric, values in zip(names[kind], errors.values(), strict=True):
            if not len(values):
                why = NotRunError(f"no triplets are left: {read.unscored}")
                found.append(_not_run(source, ABX, metric, "%", "lower", context, told, why))
                continue
            low, high = pair_interval(values, context.seed)
            found.append(
                Result(
                    PART,
                    source.label,
                    ABX,
                    metric,
                    100 * float(values.mean()),
                    "%",
                    "lower",
                    100 * low,
                    100 * high,
                    len(values),
                    PAIR_INTERVAL,
                    protocol=_protocol(source, context, told | {"average": "pairs of phones alike"}),
                )
            )
    return found


def _abx_frames(source: Source, read: Reading, kind: str) -> tuple[Sequence[Tensor], str]:
    if kind == "codes":
        return read.frames.rows, f"share of differing codes ({read.frames.about})"
    if isinstance(source, Contender):
        assert read.tokens is not None
        return latents_of(source, read.tokens), "angle of dequantised frames over pi"
    return standardised(read.frames, torch.arange(len(read.frames.rows))).rows, "angle of log-mel frames over pi"


# ---- retrieval ----


def views(context: Context, source: Source) -> list[Result]:
    """Recall of a picture from another view of it, in percent."""
    comparisons = ("latents",) if isinstance(source, Baseline) else ("codes", "latents")
    names = {c: [f"recall@{k}[{v}, {c}]" for v in VIEWS[1:] for k in KS] for c in comparisons}
    protocol: dict[str, Any] = {"task": VIEWS_TASK.about}
    try:
        task = prepared(VIEWS_NAME, VIEWS_TASK, context)
        protocol |= task.protocol
        read = reading(source, task, context)
    except NotRunError as e:
        every = [m for c in comparisons for m in names[c]]
        return [_not_run(source, VIEWS_NAME, m, "%", "higher", context, protocol, e) for m in every]
    protocol["unscored"] = read.unscored
    found = []
    for comparison in comparisons:
        try:
            similarity, about = _similarity(source, read, comparison)
        except NotRunError as e:
            found += [_not_run(source, VIEWS_NAME, m, "%", "higher", context, protocol, e) for m in names[comparison]]
            continue
        for metric in names[comparison]:
            k, view = int(metric.split("@")[1].split("[")[0]), metric.split("[")[1].split(",")[0]
            hits = view_hits(similarity, task, read.kept, view, k)
            found.append(_recalled(source, VIEWS_NAME, metric, hits, context, protocol | {"similarity": about}))
    return found


def _similarity(source: Source, read: Reading, comparison: str) -> tuple[Tensor, str]:
    if comparison == "codes":
        return equal_codes(read), f"share of equal codes at equal places ({read.frames.about})"
    if isinstance(source, Contender):
        assert read.tokens is not None
        return cosines(latents_of(source, read.tokens)), "cosine of mean dequantised vectors, centred"
    return cosines([r.flatten()[None] for r in read.frames.rows]), "cosine of pixels, centred"


def captions(context: Context, source: Source) -> list[Result]:
    """Recall of the picture of a caption, in percent."""
    kinds = ("latents",) if isinstance(source, Baseline) else ("codes", "latents")
    names = {kind: [f"recall@{k}[caption, {kind}]" for k in KS] for kind in kinds}
    protocol: dict[str, Any] = {"task": CAPTIONS_TASK.about}
    try:
        task = prepared(CAPTIONS_NAME, CAPTIONS_TASK, context)
        protocol |= task.protocol
        embeddings = caption_embeddings(task, context)
        read = reading(source, task, context)
    except NotRunError as e:
        every = [m for kind in kinds for m in names[kind]]
        return [_not_run(source, CAPTIONS_NAME, m, "%", "higher", context, protocol, e) for m in every]
    protocol["unscored"] = read.unscored
    train, test = _rows(task, read, TRAIN), _rows(task, read, TEST)
    found = []
    for kind in kinds:
        try:
            if kind == "codes":
                kernel, about = equal_codes(read), f"one-hot codes at their places ({read.frames.about})"
            elif isinstance(source, Contender):
                assert read.tokens is not None
                kernel, about = placed_kernel(latents_of(source, read.tokens)), "dequantised vectors at their places"
            else:
                kernel, about = placed_kernel(read.frames.rows), "pixels at their places"
        except NotRunError as e:
            found += [_not_run(source, CAPTIONS_NAME, m, "%", "higher", context, protocol, e) for m in names[kind]]
            continue
        hits = caption_hits(kernel, train, test, embeddings[read.kept], KS)
        for metric, k in zip(names[kind], KS, strict=True):
            told = protocol | {"features": about}
            found.append(_recalled(source, CAPTIONS_NAME, metric, hits[k], context, told))
    return found


def _recalled(
    source: Source, name: str, metric: str, hits: Tensor, context: Context, protocol: Mapping[str, Any]
) -> Result:
    if not len(hits):
        why = NotRunError(f"no queries are left: {protocol['unscored']}")
        return _not_run(source, name, metric, "%", "higher", context, protocol, why)
    low, high = accuracy_interval(hits[None], context.seed)
    value = 100 * float(hits.double().mean())
    interval, told = ITEM_INTERVAL, _protocol(source, context, protocol)
    return Result(
        PART, source.label, name, metric, value, "%", "higher", 100 * low, 100 * high, len(hits), interval, None, told
    )


# ---- results ----


def _protocol(source: Source, context: Context, told: Mapping[str, Any]) -> dict[str, Any]:
    smoke = {"smoke": "a few items and steps, to see that it runs"} if context.smoke else {}
    return {**source.protocol(), **told, "seed": context.seed, "torch": torch.__version__, **smoke}


def _not_run(
    source: Source,
    name: str,
    metric: str,
    unit: str,
    direction: str,
    context: Context,
    told: Mapping[str, Any],
    why: NotRunError,
) -> Result:
    protocol = _protocol(source, context, told)
    return Result(PART, source.label, name, metric, None, unit, direction, not_run=str(why), protocol=protocol)


__all__ = ["PART", "jobs"]
