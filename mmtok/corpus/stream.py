"""`TokenStream`: a finished corpus as training reads it, shuffled, dealt to ranks and workers, resumed mid-epoch.

stream = TokenStream("corpus/", batch=32)                     # RowBatch: padded Tokens, texts, keys
for batch in stream.loader(workers=2):
    ...
    torch.save(stream.state_dict(), "stream.pt")              # load_state_dict goes on with the next batch

stream = TokenStream("corpus/", batch=512, collate=PackRows(vocab, length=2048, eos_id=2))
for batch in stream.loader(workers=2):
    loss = model(**model_inputs(batch)).loss                  # mmtok.lm.documents
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmtok.corpus.index import Corpus, read_index
from mmtok.corpus.records import Row
from mmtok.lm.documents import PackedDocuments, pack_documents
from mmtok.lm.token_folder import SLOT
from mmtok.tokens import Tokens
from mmtok.vocab import Vocab


@dataclasses.dataclass
class RowBatch:
    """B items of a corpus: ``tokens`` (B, Q, T), padded, and what came with them, in the same order."""

    keys: list[str]
    tokens: Tokens
    texts: list[str | None]
    extra: list[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.keys)


def collate(rows: Sequence[Row]) -> RowBatch:
    """Rows -> one padded batch, as `Tokens.concat` pads. TokensError for none, or for rows of several tokenizers."""
    tokens = Tokens.concat([row.tokens for row in rows])
    return RowBatch([row.key for row in rows], tokens, [row.text for row in rows], [row.extra for row in rows])


def document_of(row: Row, vocab: Vocab, template: str | None = None, header: bool = True) -> list[int]:
    """The ids of one document, as `Vocab.pack` writes them; `mmtok.lm.documents.pack_documents` takes these.

    Args:
        row: of a corpus.
        vocab: that has the row's modality.
        template: as of `mmtok.lm.token_folder.TokenFolder`: text as it stands, ``{text}`` or ``{field}`` of the row's
            extra values, and ``<image>`` / ``<audio>`` for its codes. None: the text, if there is one, then the codes.
        header: as in `Vocab.pack`; False = codes only.

    Raises:
        ValueError: the template names what the row does not have, or the codes are not of the vocab (TokensError).
    """
    if template is None:
        return vocab.pack([*([row.text] if row.text else []), row.tokens], header=header)
    fields = {**row.extra, "text": row.text}
    parts: list[str | Sequence[int] | Tokens] = []
    at = 0
    for slot in SLOT.finditer(template):
        parts.append(template[at : slot.start()])
        at = slot.end()
        if slot[1] and slot[1] != row.tokens.spec.modality:
            raise ValueError(f"{row.key}: expected <{row.tokens.spec.modality}> in the template, got {template!r}")
        value = row.tokens if slot[1] else fields.get(slot[2])
        if not isinstance(value, str | list | Tokens):
            raise ValueError(
                f"{row.key}: expected a text (or a list of ids) for {slot[0]}, got {value!r}; the row has "
                f"{sorted(k for k, v in fields.items() if v is not None)}"
            )
        parts.append(value)
    return vocab.pack([*parts, template[at:]], header=header)


def ids(rows: Sequence[Row], vocab: Vocab, template: str | None = None, header: bool = True) -> list[list[int]]:
    """`document_of` of each row; as a ``collate``: ``functools.partial(ids, vocab=vocab)``."""
    return [document_of(row, vocab, template, header) for row in rows]


@dataclasses.dataclass(frozen=True)
class PackRows:
    """A ``collate`` that packs the documents of a batch into rows of ``length`` ids, which train as they are.

    Args:
        vocab, template, header: of `document_of`. length, eos_id, pad_id, too_long: of `pack_documents`; the more
            documents in a batch, the better they fill the rows.

    A call gives (N, S) tensors by name, as `PackedDocuments` does; N follows from the documents, 0 if none is left.
    """

    vocab: Vocab
    length: int
    eos_id: int | None = None
    pad_id: int = 0
    too_long: str = "refuse"
    template: str | None = None
    header: bool = True

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        documents = ids(rows, self.vocab, self.template, self.header)
        packed = PackedDocuments(
            pack_documents(documents, self.length, self.eos_id, self.pad_id, too_long=self.too_long)
        )
        names = ("input_ids", "position_ids", "labels", "document")
        items = [packed[i] for i in range(len(packed))]
        empty = torch.zeros(0, self.length, dtype=torch.int64)
        return {name: torch.stack([item[name] for item in items]) if items else empty for name in names}


class EpochOrder:
    """Which items one rank reads in one epoch, and in what order; a pure function of its arguments.

    The shards, in an order drawn from (seed, epoch), make one line of all items. The line is cut into ``world`` runs
    whose lengths differ by at most one item, whatever the shards' sizes: a rank opens whole shards but for the two at
    the ends of its run. Then ``buffer`` shards of the run at a time are shuffled together.

    Args:
        sizes: items of each shard; 0 is legal.
        shuffle: False: the corpus' own order, cut into runs.
        even: every rank gets ceil(items / world) items; the last runs go on at the beginning of the line, as
            `torch.utils.data.DistributedSampler` does, so that fewer than ``world`` items come twice in an epoch.
    """

    def __init__(
        self,
        sizes: Sequence[int] | np.ndarray,
        epoch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        buffer: int = 8,
        even: bool = False,
    ) -> None:
        items = np.asarray(sizes, np.int64)
        self._key, self._shuffle = [seed, epoch], shuffle
        order = np.random.default_rng(self._key).permutation(len(items)) if shuffle else np.arange(len(items))
        order = order[items[order] > 0]
        ends = np.cumsum(items[order])
        total = int(ends[-1]) if len(ends) else 0
        start, stop = run_of(total, rank, world, even)
        pieces: list[tuple[int, int, int]] = []  # shard, first row, rows
        self._start = start
        while start < stop:  # once for each shard that the run touches
            at = start % total
            n = int(np.searchsorted(ends, at, side="right"))
            rows = min(int(ends[n]) - at, stop - start)
            pieces.append((int(order[n]), at - int(ends[n] - items[order[n]]), rows))
            start += rows
        self._pieces = np.array(pieces, np.int64).reshape(-1, 3)
        self._edges = np.concatenate([[0], np.cumsum(self._pieces[:, 2])])  # where each piece begins in the run
        self._groups = [*self._edges[:-1:buffer].tolist(), int(self._edges[-1])]  # where each group begins
        self._group: tuple[int, np.ndarray] | None = None  # the last one shuffled: its number and its rows

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getitem__(self, part: slice) -> list[tuple[int, int]]:
        """(shard, row) of the items at these positions of the rank's run."""
        start, stop, _ = part.indices(len(self))
        found: list[tuple[int, int]] = []
        while start < stop:
            g = int(np.searchsorted(self._groups, start, side="right")) - 1
            begin, end = self._groups[g], min(self._groups[g + 1], stop)
            positions = begin + self._shuffled(g)[start - begin : end - begin]
            piece = np.searchsorted(self._edges, positions, side="right") - 1
            rows = self._pieces[piece, 1] + positions - self._edges[piece]
            found += zip(self._pieces[piece, 0].tolist(), rows.tolist(), strict=True)
            start = end
        return found

    def _shuffled(self, g: int) -> np.ndarray:
        """Positions in group ``g``, as they are read."""
        if self._group is None or self._group[0] != g:
            size = self._groups[g + 1] - self._groups[g]
            if self._shuffle:  # its place on the line tells the group from those of other ranks
                rng = np.random.default_rng([*self._key, self._start + self._groups[g], size])
                self._group = g, rng.permutation(size)
            else:
                self._group = g, np.arange(size)
        return self._group[1]


def run_of(items: int, rank: int, world: int, even: bool) -> tuple[int, int]:
    """First and last + 1 of a rank's items on the epoch's line; past its end the line begins again."""
    if even:
        each = -(-items // world)
        return rank * each, (rank + 1) * each
    return rank * items // world, (rank + 1) * items // world


def _as_it_is(value: Any) -> Any:
    return value


class TokenStream(IterableDataset):
    """The items of a finished corpus, each once an epoch over all ranks and workers; stops and resumes anywhere.

    The order is a pure function of (corpus, seed, epoch, rank, world), see `EpochOrder`; workers change nothing of it,
    since `loader` deals them whole batches in turn. An interrupted pass goes on where it stood, here by iterating
    again, in another process by `state_dict` and `load_state_dict`: what was handed out counts as given, what workers
    read ahead does not.

    Args:
        out: the corpus folder, with its index.
        shuffle: False: in the corpus' own order.
        seed: of the order.
        buffer: shards that are open and shuffled together; more mix better and read more scattered.
        batch: items in a batch, the last of an epoch has what is left; None: single items, as `Row`.
        collate: what makes a batch of its rows; a function that pickles where workers are spawned.
        world, rank: how many processes read together, and which this is; None: of `torch.distributed`, else 1 and 0.
        even: every rank gets equally many items, as synchronous training needs; fewer than ``world`` then come twice.
            False: exactly once; ranks differ by one item at most.
        epochs: in one pass of iterating, each in another order; None: without end. A pass after a whole one goes on
            with the next epoch.

    A `DataLoader` of one's own reads every item once as well (``batch_size=None`` where ``batch`` is set), but only
    `loader` can count; `set_epoch` then says which epoch comes, as for a DistributedSampler.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        shuffle: bool = True,
        seed: int = 0,
        buffer: int = 8,
        batch: int | None = None,
        collate: Callable[[list[Row]], Any] = collate,
        world: int | None = None,
        rank: int | None = None,
        even: bool = False,
        epochs: int | None = 1,
    ) -> None:
        if (world is None) != (rank is None):
            raise ValueError(f"expected world and rank, or neither, got {world} and {rank}")
        if world is None or rank is None:
            joined = torch.distributed.is_available() and torch.distributed.is_initialized()
            world = torch.distributed.get_world_size() if joined else 1
            rank = torch.distributed.get_rank() if joined else 0
        counts = {"buffer": buffer, "batch": 1 if batch is None else batch, "epochs": 1 if epochs is None else epochs}
        if bad := {name: value for name, value in counts.items() if value < 1}:
            raise ValueError(f"expected at least 1, got {bad}")
        if not 0 <= rank < world or seed < 0:
            raise ValueError(f"expected 0 <= rank < world and seed >= 0, got rank {rank} of {world}, seed {seed}")
        self.out, self.shuffle, self.seed, self.buffer = Path(out), shuffle, seed, buffer
        self.batch, self.collate, self.world, self.rank, self.even = batch, collate, world, rank, even
        self.epochs = epochs
        self._items = Corpus(self.out, keep_open=buffer)
        about, table = read_index(self.out) or ({}, {})  # it is there, or Corpus would have refused
        # Where each shard's items begin; of the table's own type, or searching would convert all of the table.
        numbers = np.array([shard["number"] for shard in about["shards"]], table["shard"].dtype)
        self._starts = np.append(np.searchsorted(table["shard"], numbers), len(self._items))
        self._corpus = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self._epoch = self._given = 0  # what comes next: the item after so many of the epoch's on this rank
        self._order: tuple[int, EpochOrder] | None = None  # of the epoch at hand
        # Workers are copies: what they read is not counted here. Shared memory tells that one read uncounted.
        self._counting = False
        self._uncounted = torch.zeros(1, dtype=torch.uint8).share_memory_()

    def __getstate__(self) -> dict[str, Any]:
        """Without a shuffle that is quickly drawn again; `Corpus` leaves its open files behind itself."""
        return self.__dict__ | {"_order": None}

    @property
    def items(self) -> int:
        """Items of an epoch on this rank."""
        start, stop = run_of(len(self._items), self.rank, self.world, self.even)
        return stop - start

    def __len__(self) -> int:
        """Batches (or items, without ``batch``) of a whole pass on this rank; TypeError where a pass has no end."""
        if self.epochs is None:
            raise TypeError("a TokenStream with epochs=None has no length")
        return self.epochs * -(-self.items // (self.batch or 1))

    def __iter__(self) -> Iterator[Any]:
        """What is left of the pass; a worker reads every so-many-th batch."""
        worker = get_worker_info()
        if worker is not None and not self._counting:
            self._uncounted[0] = 1
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for epoch, start, stop in itertools.islice(self._jobs(), first, None, step):
            value = self._read(epoch, start, stop)
            if worker is None:
                self._epoch, self._given = epoch, stop
            yield value
        self._end_pass()

    def _jobs(self) -> Iterator[tuple[int, int, int]]:
        """(epoch, first item, last + 1) of each batch that is left of the pass."""
        step, last = self.batch or 1, self._last_epoch()
        if not self.items:
            return
        start = self._given
        for epoch in itertools.count(self._epoch) if last is None else range(self._epoch, last + 1):
            for at in range(start, self.items, step):
                yield epoch, at, min(at + step, self.items)
            start = 0

    def _last_epoch(self) -> int | None:
        return None if self.epochs is None else (self._epoch // self.epochs + 1) * self.epochs - 1

    def _end_pass(self) -> None:
        if (last := self._last_epoch()) is not None:
            self._epoch, self._given = last + 1, 0

    def _read(self, epoch: int, start: int, stop: int) -> Any:
        if self._order is None or self._order[0] != epoch:
            sizes = np.diff(self._starts)
            order = EpochOrder(sizes, epoch, self.seed, self.rank, self.world, self.shuffle, self.buffer, self.even)
            self._order = epoch, order
        rows = [self._items[int(self._starts[shard]) + item] for shard, item in self._order[1][start:stop]]
        return rows[0] if self.batch is None else self.collate(rows)

    def loader(self, workers: int = 0, pin_memory: bool = False, start_method: str | None = None) -> Iterator[Any]:
        """As iterating, in the same order, read ahead by ``workers`` processes.

        Args:
            workers: 0: in this process.
            pin_memory: as of `DataLoader`; it knows dicts and lists of tensors, as `PackRows` makes them.
            start_method: of the workers, ``fork`` or ``spawn``; None: as Python does on this machine.
        """
        if not workers:
            yield from self
            return
        self._counting = True  # before the workers copy it
        try:
            # torch's own conversion would make tensors of arrays, and look at every id of a list.
            reading = DataLoader(
                self,
                None,
                num_workers=workers,
                collate_fn=_as_it_is,
                pin_memory=pin_memory,
                multiprocessing_context=start_method,
            )
            for (epoch, _, stop), value in zip(self._jobs(), reading, strict=True):
                self._epoch, self._given = epoch, stop
                yield value
        finally:
            self._counting = False
        self._end_pass()

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch`` with the next pass."""
        if epoch < 0:
            raise ValueError(f"epoch: expected at least 0, got {epoch}")
        self._epoch, self._given = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """What comes next, and what the order hangs on; plain values, a few hundred bytes.

        Raises:
            ValueError: workers of a foreign DataLoader did the reading, so that nobody counted.
        """
        if self._uncounted[0]:
            raise ValueError(
                "a DataLoader's workers read this stream, so it cannot count what was given; iterate .loader(workers)"
            )
        return {"epoch": self._epoch, "given": self._given, **self._fixed()}

    def _fixed(self) -> dict[str, Any]:
        names = ("seed", "shuffle", "buffer", "world", "even")
        return {"corpus": self._corpus} | {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the items that were not given when `state_dict` was taken, in batches and workers of any number.

        Ranks that went in step may share one state; where their numbers of items differ (``even=False``) at the end of
        an epoch, each rank keeps its own.

        Raises:
            ValueError: the corpus, or what decides the order, is another.
        """
        fixed = self._fixed()
        if differ := {k: state.get(k) for k in fixed if state.get(k) != fixed[k]}:
            wanted = {k: fixed[k] for k in differ}
            raise ValueError(
                f"expected a state with {wanted}, got {differ}: the items would come in another order; build "
                "TokenStream as it was, over the same corpus, or begin anew"
            )
        epoch, given = state.get("epoch"), state.get("given")
        if not isinstance(epoch, int) or not isinstance(given, int) or epoch < 0 or not 0 <= given <= self.items + 1:
            raise ValueError(f"expected a state with epoch >= 0 and given in 0..{self.items}, got {epoch} and {given}")
        self._epoch, self._given = epoch, given
        self._uncounted[0] = 0
