"""When each word and phone of a sentence is said: pocketsphinx's forced alignment, kept in the run's folder."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmtok.bench.parts import Context
from mmtok.bench.recognition import FRAME, RATE, PhoneAligner, signature
from mmtok.bench.scorers import NotRunError
from mmtok.data.audio import read_audio, resample
from mmtok.tokens import write_atomic

FILE = "alignments.json"
STEP = FRAME / RATE  # seconds of a frame of pocketsphinx


@dataclasses.dataclass(frozen=True)
class Place:
    """A word or phone and its seconds [start, stop)."""

    text: str
    start: float
    stop: float


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A clip whose words were found: ``x`` (L,) at 16 kHz."""

    path: str
    speaker: str
    x: Tensor
    words: list[Place]
    phones: list[Place]

    def cut(self, place: Place, margin: float) -> Tensor:
        """The samples of a place and ``margin`` seconds around it."""
        first, last = (round(s * RATE) for s in (place.start - margin, place.stop + margin))
        return self.x[max(0, first) : last]


def aligned(context: Context, rows: Iterable[Mapping[str, Any]]) -> Iterator[Sentence]:
    """The rows of a manifest (path, text, speaker) whose texts could be aligned, in their order.

    A row is asked for when the one before it is done, so ``rows`` may stop, or leave some out, by what was found.

    Raises:
        NotRunError: pocketsphinx is not installed.
    """
    assert context.data is not None
    file = context.out / "probes" / FILE
    known: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    before, aligner = len(known), None
    for row in rows:
        samples, rate = read_audio(Path(context.data) / row["path"])
        x = resample(samples.mean(0, keepdim=True), rate, RATE)
        text = row["text"].replace("’", "'")
        key = f"{signature(x)} {text}"
        if key not in known:
            try:
                aligner = aligner or PhoneAligner()
            except ImportError as e:
                raise NotRunError(" ".join(str(e).split())) from e
            known[key] = _align(aligner, x, text)
        if known[key] is not None:
            places = ([Place(*p) for p in known[key][kind]] for kind in ("words", "phones"))
            yield Sentence(row["path"], row["speaker"], x[0], *places)
    if len(known) > before:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(known).encode())


def _align(aligner: PhoneAligner, x: Tensor, text: str) -> dict[str, list[list[Any]]] | None:
    """Words and phones with their seconds; None where a word has no pronunciation or no path fits."""
    if aligner(x, text, FRAME) is None:
        return None
    words, phones = [], []
    for word in aligner.decoder.get_alignment():
        plain = re.sub(r"\(\d+\)$", "", word.name)
        if re.fullmatch(r"[a-z']+", plain):
            words.append([plain, word.start * STEP, (word.start + word.duration) * STEP])
        for phone in word:
            if re.fullmatch(r"[A-Z]+", phone.name) and phone.name != "SIL":
                phones.append([phone.name, phone.start * STEP, (phone.start + phone.duration) * STEP])
    return {"words": words, "phones": phones}
