"""One item encoded again and again from its own reconstruction: what comes back, and what each generation loses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from mmtok.bench.contenders import Contender
from mmtok.bench.entropy_coding import new_codes
from mmtok.bench.records import Item
from mmtok.metrics.audio import delay_samples, si_sdr, si_sdr_aligned
from mmtok.metrics.image import psnr
from mmtok.tokens import Tokens

GENERATIONS = 5


def fidelity(contender: Contender) -> tuple[str, ...]:
    return ("psnr",) if contender.modality == "image" else ("si_sdr", "si_sdr_aligned")


def generation_values(contender: Contender, item: Item) -> dict[str, Any]:
    """Values of one item: encode(decode(...)) five times over, each from the one before."""
    item = dataclasses.replace(item, target=None)  # a generation has the size of what was encoded
    tokens = contender.encode(item)
    values: dict[str, Any] = {}
    unscored: dict[str, str] = {}
    first = last = contender.decode(tokens, item)
    for generation in range(2, GENERATIONS + 1):
        x = last.clamp(-1, 1) if contender.modality == "audio" else last
        again = contender.encode(dataclasses.replace(item, x=x))
        if generation == 2:
            values |= _agreement(tokens, again)
        last = contender.decode(again, item)
        for name in fidelity(contender):
            _score(values, unscored, f"generation{generation}_{name}", name, first, last, item.sample_rate)
    for name in fidelity(contender):
        ends: dict[str, Any] = {}
        for key, x_hat in (("first", first), ("last", last)):
            _score(ends, unscored, key, name, item.x, x_hat, item.sample_rate)
        loss = f"generation_loss_{name}"
        if len(ends) == 2 and all(map(math.isfinite, ends.values())):
            values[loss] = ends["first"] - ends["last"]
        else:
            unscored[loss] = unscored.pop("first", None) or unscored.pop("last", None) or "a generation is exact"
    if item.sample_rate is not None:
        name = f"generation{GENERATIONS}_delay"
        try:
            values[name] = float(delay_samples(first[None], last[None], item.sample_rate)[0])
        except ValueError as e:
            unscored[name] = " ".join(str(e).split())
    return {"values": values, "unscored": unscored}


def _score(
    values: dict[str, Any],
    unscored: dict[str, str],
    key: str,
    name: str,
    reference: Tensor,
    estimate: Tensor,
    sample_rate: int | None,
) -> None:
    try:
        if reference.shape == estimate.shape and torch.equal(reference, estimate):
            values[key] = math.inf
        elif sample_rate is None:
            values[key] = float(psnr(reference[None], estimate[None])[0])
        else:
            function = si_sdr if name == "si_sdr" else si_sdr_aligned
            values[key] = float(function(reference[None], estimate[None], sample_rate)[0])
    except ValueError as e:
        unscored[key] = " ".join(str(e).split())


def _agreement(wanted: Tokens, found: Tokens) -> dict[str, Any]:
    """(100 times the codes that agree, codes): positions that only one of the two has do not agree."""
    pairs: list[tuple[float, float]] = []
    for q in range(wanted.codes.shape[1]):
        a, b = new_codes(wanted, q), new_codes(found, q)
        pairs.append((100.0 * sum(u == v for u, v in zip(a, b, strict=False)), float(max(len(a), len(b)))))
    values: dict[str, Any] = {"idempotence": (sum(p[0] for p in pairs), sum(p[1] for p in pairs))}
    return values | {f"idempotence[{q}]": pair for q, pair in enumerate(pairs)}
