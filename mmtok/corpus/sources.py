"""Samples of a planned source, shard by shard: what is wrong with one sample is told, and never stops the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mmtok.corpus import source_folder, source_tables, source_tar
from mmtok.corpus.records import Failure, InputShard, Plan, Sample

READERS: dict[str, Callable[[Plan, InputShard], Iterator[Sample | Failure]]] = {
    "folder": source_folder.read,
    "tar": source_tar.read,
    "parquet": source_tables.read_parquet,
    "datasets": source_tables.read_dataset,
}


def read_samples(plan: Plan, shard: InputShard) -> Iterator[Sample | Failure]:
    """Samples of one shard of ``plan`` as they are read, in the order of the source, and a `Failure` for each bad one.

    A tar is read from front to back and never unpacked; one that breaks off gives what comes before, and one failure
    under the tar's name that tells where. Of samples with one key the first stays. Samples of a folder carry their
    ``path``, all others their ``data``.

    Raises ValueError where the plan itself is damaged, ImportError where the package of a table is missing.
    """
    keys = set()
    for item in READERS[plan.kind](plan, shard):
        if isinstance(item, Sample):
            if item.key in keys:
                yield Failure(item.key, "duplicate key: the first sample of that key in the shard stays", shard.number)
                continue
            keys.add(item.key)
        yield item
