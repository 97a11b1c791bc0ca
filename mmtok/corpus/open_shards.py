"""The shard files of a corpus, a few open at a time."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path

from mmtok.corpus.shard_file import ShardFile, shard_path
from mmtok.tokens import TokenSpec


class OpenShards:
    """The shard files of a corpus by number; those longest unused are closed, so that any number of shards will do.

    Args:
        out: the corpus folder. sizes: bytes that each file must have. spec: that all must have; None: that of the first
            one opened. keep_open: how many at a time.
    """

    def __init__(self, out: str | Path, sizes: Mapping[int, int], spec: TokenSpec | None = None, keep_open: int = 16):
        self.out, self.sizes, self.spec, self.keep_open = Path(out), sizes, spec, max(1, keep_open)
        self._open: collections.OrderedDict[int, ShardFile] = collections.OrderedDict()

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def __getitem__(self, number: int) -> ShardFile:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = shard_path(self.out, number)
        shard = ShardFile(path, spec=self.spec)
        if (size := path.stat().st_size) != self.sizes[number]:
            raise ValueError(
                f"{path}: expected {self.sizes[number]} bytes as the corpus says, got {size}; `mmtok corpus verify "
                f"{self.out}` tells what else is wrong"
            )
        self.spec = shard.spec
        while len(self._open) >= self.keep_open:
            self._open.popitem(last=False)
        self._open[number] = shard
        return shard
