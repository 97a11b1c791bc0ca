"""What the judges of sounds share: one path to mono at 16 kHz, and the items that have no value, with the reason."""

from __future__ import annotations

import abc
import hashlib
import importlib
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmtok.bench.records import Item
from mmtok.bench.scorers import Measure, NotRunError, Scorer, UnscoredError, Value
from mmtok.data.audio import resample

RATE = 16000  # Hz, of every network here
RESAMPLER = "windowed sinc, Kaiser window, 64 zero crossings (mmtok.data.audio.resample)"
FETCH = "run `python recipes/fetch_data.py --out data --helpers` and give the folder data/helpers as helpers"
AUDIBLE = 1 / 32768  # below it, a sound of 16 bits is silent
SHORTEST = 0.5  # seconds, for networks that judge speech
AT_16K = {"sample_rate": RATE, "resampler": RESAMPLER, "channels": "mean"}


class AudioScorer(Scorer):
    """One that has all of its measures for an item, or none: `values` raises what `scores` then says of each.

    Args:
        measures, backend, version, settings: see `Scorer`.
    """

    modality: ClassVar[str] = "audio"

    def __init__(self, measures: tuple[Measure, ...], backend: str, version: str, settings: Mapping[str, Any]):
        self.measures, self.backend, self.version, self.settings = measures, backend, version, dict(settings)

    @abc.abstractmethod
    def values(self, item: Item, x_hat: Tensor) -> dict[str, Value]:
        """The measures; UnscoredError where the item has none."""

    def scores(self, item: Item, x_hat: Tensor) -> dict[str, Value | UnscoredError]:
        """See `Scorer.scores`. Raises ValueError where ``x_hat`` has another shape, or the item no sample rate."""
        sample_rate_of(item, x_hat)
        try:
            return dict(self.values(item, x_hat))
        except UnscoredError as e:
            return {m.name: e for m in self.measures}


def sample_rate_of(item: Item, x_hat: Tensor) -> int:
    """The item's sample rate. Raises ValueError: none, or another shape than the original's."""
    if item.sample_rate is None or item.reference.ndim != 2 or x_hat.shape != item.reference.shape:
        raise ValueError(
            f"{item.key}: expected a sound (C, L) with its rate and a reconstruction of the same shape, got "
            f"{tuple(item.reference.shape)}, {item.sample_rate} Hz and {tuple(x_hat.shape)}; cut x_hat to the original"
        )
    return item.sample_rate


def refuse_other_sounds(item: Item, shortest: float) -> None:
    """Raises UnscoredError: the item's label ``kind`` is not speech, or it has fewer than ``shortest`` seconds."""
    kind = item.labels.get("kind") or "speech"
    if "speech" not in kind.lower():
        raise UnscoredError(f"no speech: its kind is {kind}")
    assert item.sample_rate is not None
    if item.reference.shape[-1] < shortest * item.sample_rate:
        raise UnscoredError(f"shorter than {shortest:g} s")


def refuse_silence(reference: Tensor | None = None, x_hat: Tensor | None = None) -> None:
    """Raises UnscoredError: silence, NaN or infinity."""
    for name, x in (("original", reference), ("reconstruction", x_hat)):
        if x is not None and not bool(torch.isfinite(x).all()):
            raise UnscoredError(f"a {name} with NaN or infinity")
        if x is not None and float(x.abs().amax()) < AUDIBLE:
            raise UnscoredError(f"a silent {name}")


def unscored(reason: str | ValueError) -> UnscoredError:
    """The reason without what a metric advises its caller, and without the item's own numbers: reasons are counted."""
    return UnscoredError(" ".join(re.split(r";|, got [\d(]", str(reason))[0].split()))


def mono(x: Tensor, rate: int) -> Tensor:
    """(C, L) -> (1, L') at 16 kHz. Raises UnscoredError: NaN or infinity."""
    if not bool(torch.isfinite(x).all()):
        raise UnscoredError("a reconstruction with NaN or infinity")
    return resample(x.detach().float().cpu().mean(0, keepdim=True), rate, RATE)


def helpers_folder(helpers: Path | None) -> Path:
    """The folder of networks. Raises NotRunError: there is none."""
    if helpers is None:
        raise NotRunError(f"its network is not there: {FETCH}")
    return Path(helpers)


def from_extra(module: str, extra: str) -> Any:
    """A module. Raises ImportError naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        package = module.partition(".")[0]
        raise ImportError(f"this judge is the package {package} ({e}): pip install 'mmtok[{extra}]'") from e


def version_of(package: str, extra: str) -> str:
    """Of an installed package. Raises ImportError naming the extra that brings it."""
    from_extra(package, extra)
    return version(package)


def sha256(path: Path) -> str:
    """The first 16 digits, which is what results store of a network's weights."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
