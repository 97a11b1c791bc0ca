"""What a corpus run is made of: samples, input shards, the plan, tasks, and what is written of each shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtok.corpus.listing import Listing
from mmtok.tokens import Tokens

SCHEMA = 1
PLAN, SHARDS, FAILURES, INDEX, LOG, LOCK = "plan.json", "shards", "failures.jsonl", "index.json", "log.jsonl", ".lock"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One encoded picture or sound of a source, before it is decoded.

    Args:
        key: unique in the corpus and the same on every machine: the path below a folder without its ending; the shard's
            name and the member's key in a tar (``train-0001/000123``); a column's value or the row's number in a table.
        data: the file's bytes, or None where ``path`` is to be opened.
        path: of the file, or None.
        text: caption or transcript, None where there is none.
        extra: whatever else the source says of it, as plain JSON values; kept beside the codes.
    """

    key: str
    data: bytes | None = None
    path: Path | None = None
    text: str | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Failure:
    """A sample, or the rest of a shard, that could not be read or tokenized; ``reason`` is one line for people."""

    key: str
    reason: str
    shard: int


@dataclasses.dataclass(frozen=True)
class InputShard:
    """A unit of work.

    Args:
        number: 0, 1, ...; also the output shard's.
        parts: where its samples are, as plain values that `read_samples` of its source understands.
        items: how many samples, None where only reading tells (tar).
        bytes: of the input, for the estimate of time.
    """

    number: int
    parts: Sequence[Mapping[str, Any]]
    items: int | None
    bytes: int


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """How a source is cut into shards and read; a plan holds it with everything chosen.

    Args:
        modality: ``image`` or ``audio``; None: what is there, if that is one.
        items_per_shard: of folders and tables (whole row groups of Parquet). A tar is a shard as it is.
        key_column, bytes_column: of tables; None: keys ``file#row``, and the one column that holds bytes.
        text_column: a table's column, or the field of ``.json`` files, members and index rows. None: ``.txt``, else the
            first of text, caption, transcript, sentence. "": no text.
        pattern: only files (folder, tars, Parquet) or splits whose path fits, e.g. ``train/*``; ``*`` crosses ``/``.
        extension: only files of a folder or members of tars that end so, e.g. ``jpg``, ``left.png``.
        index: a folder's list of files, JSON lines with path and text; None: images.jsonl or speech.jsonl where there
            is one; ``none``: files by their endings.
    """

    modality: str | None = None
    items_per_shard: int = 1000
    key_column: str | None = None
    text_column: str | None = None
    bytes_column: str | None = None
    pattern: str | None = None
    extension: str | None = None
    index: str | None = None

    def __post_init__(self) -> None:
        if self.modality not in (None, "image", "audio"):
            raise ValueError(f"modality: expected image or audio, got {self.modality!r}")
        if isinstance(self.items_per_shard, bool) or self.items_per_shard < 1:
            raise ValueError(f"items_per_shard: expected 1 or more, got {self.items_per_shard!r}; 1000 is usual")


@dataclasses.dataclass(frozen=True)
class Plan:
    """All of a source in shards; a function of the source and the settings alone, so that a resumed run has the same.

    Args:
        kind: ``folder``, ``tar``, ``parquet`` or ``datasets``.
        source: as it was named.
        modality: ``image`` or ``audio``.
        settings: a `PlanSettings` as a dict, with everything chosen: what decided the shards, and the columns.
        shards: in order.
        fingerprint: hash of all names, sizes and settings: a source that has changed is noticed.
        location: the source as an absolute path, glob or braces; plan files work from any working folder.
        root: absolute folder that all paths of the plan begin from.
        found: what `describe` tells of it: examples of keys, texts, what was left out.
        listing: names and sizes of all files.
    """

    kind: str
    source: str
    modality: str
    settings: Mapping[str, Any]
    shards: Sequence[InputShard]
    fingerprint: str
    location: str = ""
    root: str = ""
    found: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    listing: Listing | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One item of an output shard: its codes (a batch of one, with its side values) and what came with it."""

    key: str
    tokens: Tokens
    text: str | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """What a worker needs to tokenize one shard, picklable and small.

    Args:
        tokenizer: what `mmtok.load` takes. fingerprint: that it must have there.
        plan: the source's plan file. shard: number. out: the corpus folder.
        device: e.g. ``cpu``, ``cuda:0``. batch_seconds / batch_pixels: of a padded batch. padding: largest share of
            padding in a batch.
        threads: that decode beside the model. text: give texts to tokenizers that are conditioned on them.
        num_codebooks, num_tokens: arguments of encode. packing: of the codes on disk: ``bits`` (as few as the codebook
            needs), ``ints`` (smallest unsigned ones, which any reader opens), or ``auto``: bits where they save at
            least a tenth.
    """

    tokenizer: str
    fingerprint: str
    plan: str
    shard: int
    out: str
    device: str = "cpu"
    batch_seconds: float = 60.0
    batch_pixels: int = 2**22
    padding: float = 0.1
    threads: int = 1
    text: bool = False
    num_codebooks: int | None = None
    num_tokens: int | None = None
    packing: str = "auto"


@dataclasses.dataclass(frozen=True)
class Done:
    """The done-marker of an output shard: ``NUMBER.done.json``, written after the shard is in place.

    Args:
        shard: number. sha256: of the shard file. bytes: its size. items: rows in it. failures: samples that are not.
        codes: stored. positions: valid ones. padding: share of padding in what the model saw. first_key: of its rows.
    """

    shard: int
    sha256: str
    bytes: int
    items: int
    failures: Sequence[Failure]
    codes: int
    positions: int
    padding: float
    first_key: str | None
