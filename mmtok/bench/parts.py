"""What a part of the benchmark gives to the run: jobs, each of which yields results and is done once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtok.bench.records import Result, TestSet
from mmtok.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Job:
    """A piece of work of minutes at most; a killed run does it again from its beginning.

    Args:
        key: unique in a run, e.g. ``probes/keyword/audio-codec-16k-4kbps``.
        run: gives its results; the same ones whatever ran before it (it seeds its own generators).
    """

    key: str
    run: Callable[[], Sequence[Result]]


@dataclasses.dataclass(frozen=True)
class Context:
    """What a part may use.

    Args:
        out: the run's folder, for files of its own below a folder of the part's name.
        data: the data folder (``images.jsonl``, ``speech.jsonl`` ...), None where there is none.
        helpers: folder of the judges' networks, None where there is none.
        sets: the run's test sets of the contender's modality.
        codes: ``codes(test_set)``: the contender's tokens of each item, in order, as the reconstruction part made them.
        seed: of everything random.
        smoke: a few steps and items only, to see that it runs; such results say so in their protocol.
        progress: show bars.
        options: what the command was given for this part, e.g. ``{"steps": 300}``.
    """

    out: Path
    data: Path | None
    helpers: Path | None
    sets: Sequence[TestSet]
    codes: Callable[[TestSet], Sequence[Tokens]]
    seed: int = 0
    smoke: bool = False
    progress: bool = True
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
