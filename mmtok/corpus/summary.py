"""What a run over a corpus tells at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

GO_ON = "the same command goes on where this one stopped"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is in the corpus folder after a run.

    Args:
        items: tokenized, and in place. failures: samples that are not, each in ``failures.jsonl`` with its reason;
            they are no failure of the run.
        shards: planned. done: of them in place. made: by this run. made_items: in those.
        missing: shard -> reason, of those that were tried in vain.
        positions, codes, bytes: of all items.
        amount: megapixels or seconds of sound (``unit``) tokenized by this run.
        seconds: that this run took. share_in_model: of the workers' time; None where nothing was to be done.
        padding: share of padding in what the model saw, over all shards.
        stopped: why the run ended before its end, None where it did not. interrupted: by Ctrl-C.
    """

    items: int
    failures: int
    shards: int
    done: int
    made: int
    made_items: int
    missing: Mapping[int, str]
    positions: int
    codes: int
    bytes: int
    amount: float
    unit: str
    seconds: float
    share_in_model: float | None
    padding: float
    stopped: str | None = None
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0: the corpus is whole. 1: shards are missing, or its index. 130: interrupted."""
        if self.interrupted:
            return 130
        return 1 if self.done < self.shards or self.stopped else 0

    def __str__(self) -> str:
        lines = [
            f"{self.items} items, {self.failures} failures, {self.done} of {self.shards} shards, {self.bytes} bytes, "
            f"{self.codes} codes",
            f"this run: {self.made} shards, {self.amount:.1f} {self.unit} in {self.seconds:.1f} s"
            + ("" if self.share_in_model is None else f", {self.share_in_model:.0%} of it in the model"),
            f"padding: {self.padding:.1%}",
        ]
        lines += [f"shard {number:05d} is missing: {reason}" for number, reason in sorted(self.missing.items())]
        lines += [f"stopped: {self.stopped}; {GO_ON}"] if self.stopped else []
        return "\n".join(lines)
