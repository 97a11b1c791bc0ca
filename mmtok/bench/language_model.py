"""The small causal transformer of the benchmark's third part: rows of codes, their exact bits, and drawing more.

A tokenizer's codes (Q, T) become rows of levels that a model can hold: a group of positions where levels are ragged,
chunks of at most 10 bits where a codebook is large. `LM` then is one of the heads of `mmtok.lm.heads` over the same
backbone for every tokenizer, trained for the same number of updates; the best of its states on held-out codes is kept.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mmtok.image.dimension_head import draw
from mmtok.lm.backbone import Backbone, Memory
from mmtok.lm.heads import CodesLM, DelayHeads, FlatHead

HEADS = ("flat", "delay")
EVALUATIONS = 10  # on the validation codes, during training
LEARNING_RATE, WEIGHT_DECAY, DROPOUT, CLIP = 2e-3, 0.1, 0.1, 1.0


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Rows of many items: ``codes`` (N, R, S) int64, 0 past an item's ``lengths`` (N,)."""

    codes: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    @staticmethod
    def of(rows: Sequence[Tensor]) -> Corpus:
        """Items (R, S), S of each its own."""
        padded = nn.utils.rnn.pad_sequence([r.T for r in rows], batch_first=True)  # (N, S, R)
        return Corpus(padded.transpose(1, 2).contiguous(), torch.tensor([r.shape[1] for r in rows]))

    def parts(self, steps: int) -> list[Tensor]:
        """Indices of items of like length, about ``steps`` steps a part with its padding."""
        found, part = [], []
        for i in self.lengths.argsort(stable=True).tolist():
            if part and (len(part) + 1) * int(self.lengths[i]) > steps:
                found, part = [*found, torch.tensor(part)], []
            part.append(i)
        return [*found, torch.tensor(part)] if part else found

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """codes (n, R, longest) and lengths (n,) of some items."""
        lengths = self.lengths[index]
        return self.codes[index, :, : int(lengths.max())], lengths


class Reader(nn.Module):
    """`Backbone` with dropout, and with learnt positions where the place in an item means something.

    Args:
        width, depth: of the backbone; attention heads of 64 or so.
        context: steps of the longest sequence.
        positions: steps that have a vector of their own, 0 for sound, where they mean nothing.
    """

    def __init__(self, width: int, depth: int, context: int, positions: int):
        super().__init__()
        heads = max(h for h in range(1, max(1, width // 64) + 1) if width % (2 * h) == 0)
        self.dim, self.context = width, context
        self.backbone = Backbone(width, depth, heads, context)
        self.dropout = nn.Dropout(DROPOUT)
        self.positions = nn.Parameter(torch.randn(positions, width) * 0.02) if positions else None

    def forward(self, x: Tensor, past: Memory | None = None) -> Tensor:
        """x (B, S, D) -> (B, S, D), as `Backbone`."""
        if self.positions is not None:
            start = 0 if past is None else int(past.kept.get(self, torch.zeros(())))
            if past is not None:
                past.kept[self] = torch.tensor(start + x.shape[1])
            places = torch.arange(start, start + x.shape[1], device=x.device).clamp(max=len(self.positions) - 1)
            x = x + self.positions[places]
        return self.dropout(self.backbone(self.dropout(x), past))


class Measured(CodesLM):
    """What the benchmark asks of a head: nats of every step where lengths are given, and drawing behind a beginning."""

    def mean_nats(self, codes: Tensor, lengths: Tensor) -> Tensor:
        """Mean nats of a code, with gradient: what is trained. Lengths are given, as nominal bits do not count them."""
        total = sum(
            (F.cross_entropy(logits, wanted, reduction="sum") for _, _, logits, wanted in self._levels(codes, lengths)),
            torch.zeros((), device=codes.device),
        )
        return total / (lengths.sum() * self.num_codebooks).clamp(min=1)

    def step_nats(self, codes: Tensor, lengths: Tensor) -> Tensor:
        """(B, S) float64: nats of the codes of each step given those before it."""
        found = torch.zeros(len(lengths), codes.shape[2], dtype=torch.float64, device=codes.device)
        for b, t, logits, wanted in self._levels(codes, lengths):
            nats = F.cross_entropy(logits, wanted, reduction="none")
            found.index_put_((b, t), nats.double(), accumulate=True)
        return found

    def _levels(self, codes: Tensor, lengths: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of each level: item and step of its codes (n,), float32 logits (n, K), and the codes (n,)."""
        codes, places = self._prepare(codes, lengths, None)
        rows = self._rows(codes, lengths, None)
        for q, (place, K) in enumerate(zip(places, self.codebook_sizes, strict=True)):
            b, t = place.nonzero(as_tuple=True)
            real = t < lengths[b]
            b, t = b[real], t[real]
            yield b, t, self._logits(q, rows[q][real])[:, :K].float(), codes[b, q, t]

    @torch.no_grad()
    def go_on(self, begun: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """(B, Q, length): the codes ``begun`` (B, Q, P) and drawn ones behind them, at temperature 1."""
        P = begun.shape[2]

        def choose(level: int, frame: int, logits: Tensor) -> Tensor:
            if frame < P:
                return begun[:, level, frame]
            return draw(logits[:, : self.codebook_sizes[level]], 1.0, generator)

        was_training = self.training
        self.eval()
        try:
            return self._walk(choose, len(begun), length, None)[0]
        finally:
            self.train(was_training)


class FlatLM(Measured, FlatHead):
    """All codes in a row."""


class DelayLM(Measured, DelayHeads):
    """Level q late by q steps."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained; the same for every tokenizer of a run.

    Args:
        head: ``flat`` or ``delay``. width, depth: of the backbone. steps: updates.
        batch: items an update. positions: whether steps have learnt positions (pictures).
        bf16: autocast of training and validation; what is reported is computed in float32.
    """

    head: str
    width: int = 192
    depth: int = 4
    steps: int = 150
    batch: int = 32
    positions: bool = False
    bf16: bool = True

    def protocol(self) -> dict[str, Any]:
        found = {"head": self.head, "width": self.width, "depth": self.depth, "steps": self.steps}
        found |= {"batch_items": self.batch, "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "dropout": DROPOUT}
        return found | {"training_dtype": "bfloat16 autocast" if self.bf16 else "float32"}


class LM:
    """A trained model.

    Attributes:
        model: in eval mode. parameters: their number. best_step: whose state was kept.
    """

    def __init__(self, model: Measured, best_step: int):
        self.model, self.best_step = model.eval(), best_step
        self.parameters = sum(p.numel() for p in model.parameters())

    @torch.no_grad()
    def step_bits(self, corpus: Corpus, steps: int = 8192, bf16: bool = False) -> Tensor:
        """(N, S) float64: bits of each step of each item, 0 past its end, in float32."""
        device = next(self.model.parameters()).device
        found = torch.zeros(len(corpus), corpus.codes.shape[2], dtype=torch.float64)
        for index in corpus.parts(max(1, steps // _length(self.model))):
            codes, lengths = corpus.batch(index)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                nats = self.model.step_nats(codes.to(device), lengths.to(device)).cpu()
            found[index, : nats.shape[1]] = nats / math.log(2)
        return found

    def item_bits(self, corpus: Corpus) -> Tensor:
        """(N,) float64."""
        return self.step_bits(corpus).sum(1)

    def go_on(self, begun: Tensor, length: int, seed: int) -> Tensor:
        """begun (B, R, P) -> (B, R, length)."""
        device = next(self.model.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        return self.model.go_on(begun.to(device), length, generator).cpu()


def train_lm(
    train: Corpus,
    val: Corpus,
    sizes: Sequence[int],
    recipe: Recipe,
    seed: int,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> LM:
    """Train from nothing: heads begin as the training frequencies of their level, the rest at random.

    AdamW, a tenth of the updates to warm up, then a cosine to a tenth; ten times the bits of ``val`` are computed, and
    the state with the fewest is kept. The same arguments give the same model on one machine.

    Raises:
        ValueError: an unknown head, or no items.
    """
    if recipe.head not in HEADS:
        raise ValueError(f"head: expected one of {HEADS}, got {recipe.head!r}")
    if not len(train) or not len(val):
        raise ValueError(f"expected items to train and to validate on, got {len(train)} and {len(val)}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _built(train, val, sizes, recipe).to(device)
        _begin_with_frequencies(model, train)
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.95), weight_decay=WEIGHT_DECAY)
        order, every = _Order(train.lengths, recipe.batch, seed), max(1, recipe.steps // EVALUATIONS)
        best, best_step, fewest = copy.deepcopy(model.state_dict()), 0, _bits(model, val, recipe.bf16)
        model.train()
        for step in tqdm(range(recipe.steps), desc="language model", disable=not progress, leave=False):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * _share(step, recipe.steps)
            codes, lengths = train.batch(order(step))
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=recipe.bf16):
                loss = model.mean_nats(codes.to(device), lengths.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            if (step + 1) % every == 0 or step + 1 == recipe.steps:
                bits = _bits(model, val, recipe.bf16)
                if bits < fewest:
                    best, best_step, fewest = copy.deepcopy(model.state_dict()), step + 1, bits
                model.train()
        model.load_state_dict(best)
    return LM(model, best_step)


def frequency_bits(train: Corpus, corpus: Corpus, sizes: Sequence[int]) -> Tensor:
    """(N, S) float64: bits of each step if codes were independent, with the training frequencies of their level."""
    S = corpus.codes.shape[2]
    real = torch.arange(S) < corpus.lengths[:, None]
    found = torch.zeros(len(corpus), S, dtype=torch.float64)
    for q, K in enumerate(sizes):
        found -= _log_frequencies(train, q, K).div(math.log(2))[corpus.codes[:, q]] * real
    return found


def _log_frequencies(corpus: Corpus, q: int, K: int) -> Tensor:
    """(K,) float64 log of the shares of level q's codes, one half added to each count."""
    real = torch.arange(corpus.codes.shape[2]) < corpus.lengths[:, None]
    counts = torch.bincount(corpus.codes[:, q][real], minlength=K).double() + 0.5
    return (counts / counts.sum()).log()


def _built(train: Corpus, val: Corpus, sizes: Sequence[int], recipe: Recipe) -> Measured:
    steps = max(train.codes.shape[2], val.codes.shape[2]) + len(sizes) + 1
    steps = steps * len(sizes) if recipe.head == "flat" else steps
    reader = Reader(recipe.width, recipe.depth, max(4096, steps), steps if recipe.positions else 0)
    return FlatLM(reader, sizes) if recipe.head == "flat" else DelayLM(reader, sizes)


@torch.no_grad()
def _begin_with_frequencies(model: Measured, train: Corpus) -> None:
    """Biases = log shares, weights = 0: the model starts at the codes' order-0 entropy, whatever their number."""
    ends = math.log(len(train) / max(1, int(train.lengths.sum())))
    heads: Any = [model.head] if isinstance(model, FlatLM) else getattr(model, "heads")  # noqa: B009 - of DelayLM
    biases = [_log_frequencies(train, q, K) for q, K in enumerate(model.codebook_sizes)]
    if isinstance(model, FlatLM):
        heads[0].bias.copy_(torch.cat([*biases, torch.tensor([ends], dtype=torch.float64)]))
    else:
        for q, bias in enumerate(biases):
            end = torch.tensor([ends] if q == model.end_level else [], dtype=torch.float64)
            heads[q].bias.copy_(torch.cat([bias, end]))
    for head in heads:
        head.weight.zero_()


class _Order:
    """``order(step)``: about ``size`` items of like length, every item once an epoch, the same for every model."""

    def __init__(self, lengths: Tensor, size: int, seed: int):
        self.lengths, self.seed = lengths, seed
        self.count = max(1, round(len(lengths) / size))
        self.epoch: tuple[int, list[Tensor]] = (-1, [])

    def __call__(self, step: int) -> Tensor:
        number, place = divmod(step, self.count)
        if self.epoch[0] != number:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            jitter = 1 + 0.2 * torch.rand(len(self.lengths), generator=generator)  # other neighbours in every epoch
            parts = (self.lengths * jitter).argsort().tensor_split(self.count)
            self.epoch = (number, [parts[i] for i in torch.randperm(self.count, generator=generator).tolist()])
        return self.epoch[1][place]


def _share(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _bits(model: Measured, val: Corpus, bf16: bool) -> float:
    return float(LM(model, 0).step_bits(val, bf16=bf16).sum())


def _length(model: Measured) -> int:
    """Steps of the backbone for a step of rows."""
    return model.num_codebooks if isinstance(model, FlatLM) else 1


def middle(lengths: Tensor) -> Tensor:
    """(N,): the first step of the second half."""
    return (lengths + 1) // 2


def summed(values: Tensor, first: Tensor | None = None) -> Tensor:
    """(N, S) -> (N,): the sum of each row, from step ``first`` (N,) on if given."""
    if first is None:
        return values.sum(1)
    return (values * (torch.arange(values.shape[1]) >= first[:, None])).sum(1)
