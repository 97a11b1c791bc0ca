"""Probes: codes through an embedding table of each level, attention over the levels, and one of two small heads.

The order is DASB's (arXiv 2406.14294, section 3): the codec is frozen, each level has its own rows in a table that
starts at random, attention weighs the levels of a frame, and every task is read by two heads, because the choice of the
head moves results as much as the choice of the codec does.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.kernels.binary_codes import unpack_bits
from mmtok.tokens import Tokens

HEADS = {
    "linear": "mean over the positions, one linear layer",
    "conv": "two convolutions (5 and 3 positions), attentive mean and deviation, one linear layer",
}
LARGEST_TABLE = 2**16  # rows of one level; larger levels are cut into bits, or hashed
DIM = 64  # of the embeddings and of the heads
EMBEDDING_STD = 0.1  # small beside what training adds
BATCH, LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 32, 5e-3, 0.05, 0.3
PRIME = 2654435761  # Knuth's multiplier: spreads neighbouring codes over the hash


@dataclasses.dataclass(frozen=True)
class Frames:
    """What a probe reads of the items of a task.

    Args:
        rows: one tensor an item, codes (T, S) int64 of S slots, or features (T, F) float32.
        sizes: codes a slot can have, length S; empty for features.
        about: how levels became slots, for the protocol.
    """

    rows: Sequence[Tensor]
    sizes: tuple[int, ...]
    about: str

    def padded(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, S or F) of some items with 0 at padding, and the mask (B, T) of what is real."""
        chosen = [self.rows[int(i)] for i in items]
        lengths = torch.tensor([len(r) for r in chosen])
        batch = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        return batch, torch.arange(batch.shape[1]) < lengths[:, None]


def slots_of(tokens: Tokens, largest: int = LARGEST_TABLE) -> Frames:
    """The codes of a batch as slots that a table can hold.

    A level of at most ``largest`` codes is one slot. A larger level of 2^b codes becomes b slots of one bit each, any
    other one is hashed to ``largest`` rows (codes that meet there are one to the probe).
    """
    columns: list[Tensor] = []
    sizes: list[int] = []
    how: dict[str, int] = {}
    for q, k in enumerate(tokens.spec.codebook_sizes):
        codes = tokens.codes[:, q].cpu()  # (B, T)
        if k <= largest:
            columns.append(codes[..., None])
            sizes.append(k)
            kind = "as they are"
        elif k & (k - 1) == 0 and k.bit_length() <= 63:
            bits = k.bit_length() - 1
            columns.append(unpack_bits(codes, bits).long())
            sizes += [2] * bits
            kind = "split into bits"
        else:
            columns.append((codes * PRIME % (2**61 - 1) % largest)[..., None])
            sizes.append(largest)
            kind = f"hashed to {largest} rows"
        how[kind] = how.get(kind, 0) + 1
    joined = torch.cat(columns, 2)  # (B, T, S)
    rows = [joined[b, : int(n)] for b, n in enumerate(tokens.lengths)]
    return Frames(rows, tuple(sizes), ", ".join(f"{n} levels {kind}" for kind, n in how.items()))


class LevelEmbedding(nn.Module):
    """Codes (B, T, S) -> (B, T, D): a row of each slot's own part of one table, weighed by attention over the slots."""

    offsets: Tensor

    def __init__(self, sizes: Sequence[int], dim: int):
        super().__init__()
        self.table = nn.Embedding(sum(sizes), dim)
        nn.init.normal_(self.table.weight, std=EMBEDDING_STD)
        self.register_buffer("offsets", torch.tensor([0, *itertools.accumulate(sizes)][:-1]))
        self.score = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1))

    def forward(self, codes: Tensor) -> Tensor:
        rows = codes + self.offsets  # a new tensor: the caller's codes stay as they are
        x = self.table(rows)  # (B, T, S, D)
        if self.table.num_embeddings < rows.numel():  # a row's score does not depend on where it stands
            score = F.embedding(rows, self.score(self.table.weight))
        else:
            score = self.score(x)
        return (score.softmax(2) * x).sum(2)


class Probe(nn.Module):
    """An embedding of frames and a head.

    Args:
        sizes: of the slots; empty: features of ``width`` numbers go through one linear layer instead.
        width: of features. classes: C. head: key of `HEADS`. positions: give each of so many positions a learnt gain
            and offset of its own, since tokens of a picture stand for places; 0 for sound.
    """

    def __init__(self, sizes: Sequence[int], width: int, classes: int, head: str, positions: int = 0, dim: int = DIM):
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head: expected one of {list(HEADS)}, got {head!r}")
        self.head = head
        self.embed = LevelEmbedding(sizes, dim) if sizes else nn.Linear(width, dim)
        self.places = nn.Parameter(torch.zeros(2, positions, dim)) if positions else None
        self.dropout = nn.Dropout(DROPOUT)
        if head == "conv":
            self.wide, self.near = nn.Conv1d(dim, dim, 5, padding=2), nn.Conv1d(dim, dim, 3, padding=1)
            self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
            self.score = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1))
        self.out = nn.Linear(2 * dim if head == "conv" else dim, classes)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, S or F), mask (B, T) true where real -> logits (B, C); padding changes nothing."""
        z = self.embed(x)
        if self.places is not None:
            gain, offset = self.places[:, : z.shape[1]]
            z = z * (1 + gain) + offset
        z = self.dropout(z) * mask[..., None]
        if self.head == "linear":
            return self.out(z.sum(1) / mask.sum(1, keepdim=True).clamp_min(1))
        for conv, norm in zip((self.wide, self.near), self.norms, strict=True):
            z = (z + F.gelu(conv(norm(z).mul(mask[..., None]).transpose(1, 2)).transpose(1, 2))) * mask[..., None]
        weights = self.score(z).masked_fill(~mask[..., None], -torch.inf).softmax(1)  # (B, T, 1)
        mean = (weights * z).sum(1)
        deviation = ((weights * (z - mean[:, None]).square()).sum(1) + 1e-6).sqrt()
        return self.out(torch.cat([mean, deviation], 1))


def train_probe(
    frames: Frames,
    labels: Tensor,
    train: Tensor,
    classes: int,
    head: str,
    seed: int,
    steps: int,
    positional: bool = False,
) -> Probe:
    """A probe that learnt the labels (N,) of the items ``train``; the same arguments give the same weights.

    Every batch draws its classes evenly. AdamW, one cycle of the learning rate, no early stop, so no validation set.
    """
    width = 0 if frames.sizes else frames.rows[0].shape[1]
    longest = max(len(r) for r in frames.rows) if positional else 0
    members = [train[labels[train] == c] for c in range(classes)]
    if any(not len(m) for m in members):
        raise ValueError(f"probe: expected training items of all {classes} classes, got none of some")
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        probe = Probe(frames.sizes, width, classes, head, longest)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=max(2, steps))
        for _ in range(steps):
            wanted = torch.randint(classes, (BATCH,), generator=draw)
            places = torch.rand(BATCH, generator=draw)
            items = torch.stack(
                [members[int(c)][int(p * len(members[int(c)]))] for c, p in zip(wanted, places, strict=True)]
            )
            loss = F.cross_entropy(probe(*frames.padded(items)), wanted)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return probe.eval()


@torch.no_grad()
def predict(probe: Probe, frames: Frames, items: Tensor) -> Tensor:
    """(M,) the likeliest class of each item."""
    return torch.cat([probe(*frames.padded(part)).argmax(1) for part in items.split(128)])


def standardised(frames: Frames, train: Tensor) -> Frames:
    """Features with mean 0 and deviation 1 over the training items' frames."""
    joined = torch.cat([frames.rows[int(i)] for i in train])
    mean, std = joined.mean(0), joined.std(0).clamp_min(1e-5)
    return dataclasses.replace(frames, rows=[(r - mean) / std for r in frames.rows])


def accuracy_interval(hits: Tensor, seed: int = 0, draws: int = 1000) -> tuple[float, float]:
    """95 % interval of the mean of hits (R, M), R trainings of M test items: both are drawn anew, with replacement."""
    generator = torch.Generator().manual_seed(seed)
    R, M = hits.shape
    means = torch.empty(draws, dtype=torch.float64)
    for d in range(draws):
        seeds = torch.randint(R, (R,), generator=generator)
        items = torch.randint(M, (M,), generator=generator)
        means[d] = hits[seeds][:, items].double().mean()
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)
