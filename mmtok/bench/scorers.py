"""What judges reconstructions: scorers, each with its measures, backend and version, opened where its needs are met."""

from __future__ import annotations

import abc
import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from mmtok.bench.records import Item

Value = float | tuple[float, float]  # a number, or (sum of errors, sum of what they are counted on)
SUMMARIES = ("mean", "median", "ratio")


class NotRunError(RuntimeError):
    """A scorer whose package or network is missing; the text says what to do."""


class UnscoredError(ValueError):
    """An item that a measure has no value for: too short, silent, without speech; it is counted, never defaulted."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number.

    Args:
        name: e.g. ``pesq_wb``. unit: ``1`` for plain numbers. direction: ``higher``, ``lower`` or ``neither``.
        summary: how items become one number: ``mean``, ``median``, or ``ratio`` (sums of pairs, as word errors).
        about: one line for people.
        absolute: whether it judges a reconstruction alone, so that the original has a value too.
    """

    name: str
    unit: str
    direction: str
    about: str
    summary: str = "mean"
    absolute: bool = False


class Scorer(abc.ABC):
    """Judges one item at a time.

    Attributes:
        name: key in `SCORERS`. modality: ``image`` or ``audio``. measures: what `scores` gives.
        backend: the package or network, e.g. ``pesq``. version: of it, as installed. settings: resampler, layer ...
    """

    name: ClassVar[str]
    modality: ClassVar[str]
    measures: tuple[Measure, ...]
    backend: str
    version: str
    settings: Mapping[str, Any] = {}

    @abc.abstractmethod
    def scores(self, item: Item, x_hat: Tensor) -> dict[str, Value | UnscoredError]:
        """A value, or why there is none, for each of ``measures``; ``x_hat`` has the shape of ``item.reference``."""


class SetScorer(abc.ABC):
    """Judges a whole set by the features of its items (Frechet distances). Attributes as in `Scorer`."""

    name: ClassVar[str]
    modality: ClassVar[str]
    measures: tuple[Measure, ...]
    backend: str
    version: str
    settings: Mapping[str, Any] = {}

    @abc.abstractmethod
    def features(self, x: Tensor, sample_rate: int | None) -> Tensor:
        """(N, D) features, float32, of one item's picture (3, H, W) or sound (C, L); N = 1 for a picture."""

    @abc.abstractmethod
    def distance(self, reference: Tensor, estimate: Tensor) -> dict[str, float]:
        """The measures from the joined features of all items, (N, D) and (M, D)."""


# Name -> "module:function"; the function takes the helpers' folder (or None) and gives a Scorer or SetScorer.
SCORERS: dict[str, str] = {
    "image_signal": "mmtok.bench.image_scorers:image_signal",
    "lpips": "mmtok.bench.image_scorers:lpips",
    "image_semantic": "mmtok.bench.image_scorers:image_semantic",
    "fd_inception": "mmtok.bench.image_scorers:fd_inception",
    "fd_efficientnet": "mmtok.bench.image_scorers:fd_efficientnet",
    "audio_signal": "mmtok.bench.audio_scorers:audio_signal",
    "pesq": "mmtok.bench.audio_scorers:pesq",
    "stoi": "mmtok.bench.audio_scorers:stoi",
    "dnsmos": "mmtok.bench.audio_scorers:dnsmos",
    "distillmos": "mmtok.bench.audio_scorers:distillmos",
    "words_whisper": "mmtok.bench.audio_scorers:words_whisper",
    "words_sphinx": "mmtok.bench.audio_scorers:words_sphinx",
    "speaker": "mmtok.bench.audio_scorers:speaker",
    "fad_musicnn": "mmtok.bench.audio_scorers:fad_musicnn",
    "fad_whisper": "mmtok.bench.audio_scorers:fad_whisper",
}


def open_scorer(name: str, helpers: Path | None = None) -> Scorer | SetScorer:
    """Build one of `SCORERS`.

    Raises:
        NotRunError: its package or network is not there. ValueError: an unknown name.
    """
    if name not in SCORERS:
        raise ValueError(f"scorer: expected one of {list(SCORERS)}, got {name!r}")
    module, _, function = SCORERS[name].partition(":")
    try:
        return getattr(importlib.import_module(module), function)(helpers)
    except (ImportError, FileNotFoundError) as e:
        raise NotRunError(" ".join(str(e).split())) from e
