"""`PackedBatches`: batches of packed documents for each rank and worker, none lost or doubled, resumed mid-epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmtok.lm.documents import PackedDocuments


class PackedBatches(IterableDataset):
    """Batches of packed rows in an order that is a pure function of (seed, epoch, rank); stops and resumes anywhere.

    An epoch's rows are shuffled and dealt to the ranks one by one, so that each is read by one rank, once. Every pass
    over it is one epoch (or what is left of one after `load_state_dict`). `loader` reads with workers, in the same
    order; a `DataLoader` of one's own needs ``batch_size=None``.

    Args:
        rows: a `PackedDocuments`.
        batch_size: rows in a batch; the last one of an epoch has what is left.
        seed: of the order.
        rank, world_size: this process and how many there are.
        shuffle: False: in the order of the file.
        even: True: every rank gets equally many batches, of equal sizes (what synchronous training needs); an epoch
            then leaves out less than one batch of every rank, other rows each time it shuffles.
    """

    def __init__(
        self,
        rows: PackedDocuments,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        even: bool = False,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"expected batch_size >= 1, 0 <= rank < world_size, got {batch_size}, {rank}, {world_size}"
            )
        self.rows, self.batch_size, self.seed, self.rank, self.world_size = rows, batch_size, seed, rank, world_size
        self.shuffle, self.even = shuffle, even
        self.epoch = self.batch = 0  # the batch that comes next
        # Workers are copies: what they read is not counted here. Shared memory tells that one read uncounted.
        self._counting = False
        self._uncounted = torch.zeros(1, dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        """Batches of one whole epoch on this rank."""
        if self.even:
            return len(self.rows) // (self.world_size * self.batch_size)
        mine = len(range(self.rank, len(self.rows), self.world_size))
        return math.ceil(mine / self.batch_size)

    def numbers(self, epoch: int) -> list[np.ndarray]:
        """The rows of each batch of an epoch on this rank."""
        order = np.arange(len(self.rows))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(order))
        mine = order[self.rank :: self.world_size]
        return [mine[i * self.batch_size : (i + 1) * self.batch_size] for i in range(len(self))]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """What is left of the epoch, batches (B, S) by name; a worker reads every so-many-th one."""
        batches = self.numbers(self.epoch)
        if (worker := get_worker_info()) is not None:
            if not self._counting:
                self._uncounted[0] = 1
            for b in range(self.batch + worker.id, len(batches), worker.num_workers):
                yield self._read(batches[b])
            return
        while self.batch < len(batches):
            self.batch += 1
            yield self._read(batches[self.batch - 1])
        self.epoch, self.batch = self.epoch + 1, 0

    def _read(self, numbers: np.ndarray) -> dict[str, Tensor]:
        items = [self.rows[int(i)] for i in numbers]
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    def loader(self, num_workers: int = 0, pin_memory: bool = False) -> Iterator[dict[str, Tensor]]:
        """As iterating, read ahead by workers; `state_dict` counts what was handed out, not what was read ahead."""
        if not num_workers:
            yield from self
            return
        self._counting = True  # before the workers copy it
        try:
            for batch in DataLoader(self, batch_size=None, num_workers=num_workers, pin_memory=pin_memory):
                self.batch += 1
                yield batch
        finally:
            self._counting = False
        self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where the next batch stands. ValueError where workers of a foreign DataLoader did the reading."""
        if self._uncounted[0]:
            raise ValueError(
                "a DataLoader's workers read this dataset, so it cannot count; iterate .loader(num_workers)"
            )
        return {"epoch": self.epoch, "batch": self.batch} | self._fixed()

    def _fixed(self) -> dict[str, int]:
        """What the order of batches hangs on."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "rows": len(self.rows),
            "shuffle": int(self.shuffle),
            "even": int(self.even),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken, on any rank of as many; ValueError where the order would be another."""
        fixed = self._fixed()
        if differ := {k: state.get(k) for k in fixed if state.get(k) != fixed[k]}:
            wanted = {k: fixed[k] for k in differ}
            raise ValueError(
                f"expected a state with {wanted}, got {differ}: the batches would come in another order; build "
                "PackedBatches as it was, or begin anew"
            )
        self.epoch, self.batch = state["epoch"], state["batch"]
        self._uncounted[0] = 0
