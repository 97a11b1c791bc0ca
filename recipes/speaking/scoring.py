"""What the language model knows: bits of pictures and speech, the right text or item among others, valid documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtok.tokens import Tokens
from mmtok.vocab import Vocab
from speaking.learning import TASKS, prompt
from speaking.pairs import Pairs

CANDIDATES = 10


@torch.no_grad()
def log_likelihoods(model: Any, pad: int, beginnings: Sequence[Sequence[int]], ends: Sequence[Sequence[int]]) -> Tensor:
    """(N,) nats of each end after its beginning, in one padded batch."""
    whole = [[*a, *b] for a, b in zip(beginnings, ends, strict=True)]
    S = max(map(len, whole))
    device = next(model.parameters()).device
    ids = torch.full((len(whole), S), pad, device=device)
    counted = torch.zeros(len(whole), S, dtype=torch.bool, device=device)
    for row, (a, b) in enumerate(zip(beginnings, ends, strict=True)):
        ids[row, : len(a) + len(b)] = torch.tensor([*a, *b], device=device)
        counted[row, len(a) : len(a) + len(b)] = True
    mask = torch.zeros_like(ids, dtype=torch.long)
    for row, text in enumerate(whole):
        mask[row, : len(text)] = 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    picked = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return -(picked * counted[:, 1:]).sum(1).cpu()


def segment(vocab: Vocab, tokens: Tokens) -> list[int]:
    return vocab.pack([tokens], header=False)


def bits(
    model: Any, vocab: Vocab, eos: int, own: Pairs, task: str, rows: Sequence[int], seed: int = 0
) -> dict[str, np.ndarray]:
    """Bits of each item after its own text, after another item's text, and of its text after it and after another item.

    The segment's markers are counted: they are what the model has to write.
    """
    rng = np.random.default_rng(seed)
    other = [rows[int(i)] for i in (np.arange(len(rows)) + rng.integers(1, len(rows), len(rows))) % len(rows)]
    found: dict[str, list[float]] = {"item": [], "item, another text": [], "text": [], "text, another item": []}
    for i, j in zip(rows, other, strict=True):
        texts = [vocab.pack([prompt(task, own.texts[k])]) for k in (i, j)]
        spoken = [[*vocab.pack([own.texts[i]]), eos]] * 2
        items = [segment(vocab, own.tokens[k]) for k in (i, j)]
        a, b = (log_likelihoods(model, eos, texts, [items[0]] * 2) / math.log(2)).tolist()
        c, d = (log_likelihoods(model, eos, items, spoken) / math.log(2)).tolist()
        for name, value in zip(found, (a, b, c, d), strict=True):
            found[name].append(value)
    return {k: np.array(v) for k, v in found.items()}


def choices(
    model: Any, vocab: Vocab, eos: int, own: Pairs, task: str, rows: Sequence[int], seed: int = 0
) -> dict[str, np.ndarray]:
    """1 where the right one of `CANDIDATES` has the highest likelihood: of items after a text, of texts after an item.

    Items are compared by how much the text makes of their likelihood (its gain over an empty prompt), texts likewise
    over another item: else the model would choose what is likely anyway.
    """
    rng = np.random.default_rng(seed)
    right: dict[str, list[float]] = {"item of a text": [], "text of an item": []}
    for i in rows:
        others = [int(k) for k in rng.permutation([r for r in rows if own.texts[r] != own.texts[i]])[: CANDIDATES - 1]]
        chosen = [i, *others]
        texts = [vocab.pack([prompt(task, own.texts[k])]) for k in chosen]
        items = [segment(vocab, own.tokens[k]) for k in chosen]
        spoken = [[*vocab.pack([own.texts[k]]), eos] for k in chosen]
        empty = vocab.pack([prompt(task, "")])
        gain = log_likelihoods(model, eos, [empty] * len(items), items) - log_likelihoods(
            model, eos, [texts[0]] * len(items), items
        )
        right["item of a text"].append(float(int(gain.argmax()) == 0))
        after = log_likelihoods(model, eos, [items[0]] * len(items), spoken)
        alone = log_likelihoods(model, eos, [[eos]] * len(items), spoken)
        right["text of an item"].append(float(int((alone - after).argmax()) == 0))
    return {k: np.array(v) for k, v in right.items()}


def interval(values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean with its 95 % bootstrap interval over items."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "items": len(values)}


def summary(
    model: Any, vocab: Vocab, eos: int, pairs: dict[str, Pairs], split: str, most: int, frame_rate: float
) -> dict[str, Any]:
    """All of the above for each modality, on at most ``most`` items of a split."""
    model.eval()
    found: dict[str, Any] = {}
    for task, modality in TASKS.items():
        own = pairs[modality]
        rows = own.rows(split)[:most]
        measured = bits(model, vocab, eos, own, task, rows)
        lengths = own.tokens.lengths[torch.tensor(rows)].numpy()
        unit = lengths / frame_rate if modality == "audio" else np.ones(len(rows))
        nominal = own.tokens.bits[torch.tensor(rows)].numpy()
        per = "second" if modality == "audio" else "image"
        found[modality] = {
            f"bits per {per}": interval(measured["item"] / unit),
            f"bits per {per}, another text": interval(measured["item, another text"] / unit),
            f"bits per {per}, nominal": float((nominal / unit).mean()),
            "bits of its text": interval(measured["text"]),
            "bits of its text, another item": interval(measured["text, another item"]),
            **{f"right {k}": interval(v) for k, v in choices(model, vocab, eos, own, task, rows).items()},
            "chance": 1 / CANDIDATES,
        }
    return found


def validation(model: Any, rows: dict[str, Tensor], most: int = 24) -> dict[str, float]:
    """Mean nats an id over the first rows of held-out documents."""
    from speaking.learning import loss_of

    losses, counts = [], []
    for start in range(0, min(most, len(rows["input_ids"])), 4):
        part = {k: v[start : start + 4] for k, v in rows.items()}
        device = next(model.parameters()).device
        losses.append(float(loss_of(model, {k: v.to(device) for k, v in part.items()})))
        counts.append(int((part["labels"][:, 1:] != -100).sum()))
    return {"validation": float(np.average(losses, weights=counts))}
