"""What recognisers hear: word errors of decoded speech, and the phone that each frame belongs to.

Recognisers are networks of other packages (extra ``asr``); two of different make, since a codec that was taught by one
family may please that family more than a listener.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

RATE = 16000
SILENCE = "SIL"
FRAME = 160  # samples of a frame of pocketsphinx


class Recogniser(Protocol):
    """``recogniser(x)``: mono speech (1, L) of 16 kHz -> its words."""

    name: str

    def __call__(self, x: Tensor) -> str: ...


class WhisperRecogniser:
    """Whisper base (multilingual, 8-bit) by faster-whisper: greedy, English, no look at the words before.

    Four words are never said twice in a row, without which it repeats itself for half a minute on what it cannot hear.

    Args:
        folder: a CTranslate2 folder, see `join_whisper`.
        threads: of the CPU.

    Raises:
        ImportError: without the extra ``asr``. FileNotFoundError: no model in ``folder``.
    """

    name = "whisper-base"

    def __init__(self, folder: Path, threads: int = 1):
        if not (folder / "model.bin").is_file():
            raise FileNotFoundError(f"expected a CTranslate2 model in {folder}, got none; see join_whisper")
        self.model: Any = _extra("faster_whisper").WhisperModel(
            str(folder), device="cpu", compute_type="int8", cpu_threads=threads
        )

    def __call__(self, x: Tensor) -> str:
        segments, _ = self.model.transcribe(
            _mono(x),
            language="en",
            beam_size=1,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
            no_repeat_ngram_size=4,
        )
        return " ".join(s.text for s in segments)


class SphinxRecogniser:
    """pocketsphinx with the US English model of its package: Gaussian mixtures and a trigram, of another make.

    Raises:
        ImportError: without the extra ``asr``.
    """

    name = "pocketsphinx"

    def __init__(self) -> None:
        self.decoder: Any = _extra("pocketsphinx").Decoder(samprate=RATE, loglevel="FATAL")

    def __call__(self, x: Tensor) -> str:
        pcm = _pcm(x)
        self.decoder.start_utt()
        self.decoder.process_raw(pcm, no_search=False, full_utt=True)
        self.decoder.end_utt()
        found = self.decoder.hyp()
        return "" if found is None else found.hypstr


def join_whisper(helpers: Path) -> Path:
    """The folder of Whisper base whose model came in two halves (``fetch_data.py --helpers``), joined once.

    Raises:
        FileNotFoundError: a half is missing.
    """
    joined = helpers / "whisper-base"
    halves = [helpers / f"whisper-base-{i}" / f"model.bin.part{i}" for i in (1, 2)]
    if (joined / "model.bin").is_file():
        return joined
    for half in halves:
        if not half.is_file():
            raise FileNotFoundError(
                f"{half} is missing; run `python recipes/fetch_data.py --out {helpers.parent} --helpers`"
            )
    joined.mkdir(parents=True, exist_ok=True)
    for file in halves[0].parent.iterdir():
        if file.suffix in (".json", ".txt"):
            (joined / file.name).write_bytes(file.read_bytes())
    aside = joined / f".model.{os.getpid()}"
    with aside.open("wb") as out:
        for half in halves:
            out.write(half.read_bytes())
    os.replace(aside, joined / "model.bin")  # last: a folder that has it is whole
    return joined


def normaliser() -> Callable[[str], str]:
    """Whisper's English normaliser (case, punctuation, spelling, numbers) of transformers.

    Raises:
        ImportError: transformers is not installed.
    """
    try:
        from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
    except ImportError as e:
        raise ImportError("word errors need the text normaliser of transformers: pip install 'mmtok[asr]'") from e
    return EnglishTextNormalizer({})


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> list[tuple[int, int]]:
    """(errors, words of the reference) of each pair by jiwer, after `normaliser`; errors = S + D + I.

    Raises:
        ValueError: lists of different lengths, or a reference without words. ImportError: without the extra ``asr``.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"expected a hypothesis for each of {len(references)} references, got {len(hypotheses)}")
    jiwer, plain = _extra("jiwer"), normaliser()
    found = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        truth = plain(reference).strip()
        if not any(c.isalnum() for c in truth):
            raise ValueError(f"expected a reference with words, got {reference!r}")
        out = jiwer.process_words(truth, plain(hypothesis))
        found.append((out.substitutions + out.deletions + out.insertions, len(truth.split())))
    return found


class PhoneAligner:
    """Which of 39 phones, or silence, is spoken in each frame: pocketsphinx's forced alignment of a transcript.

    Raises:
        ImportError: without the extra ``asr``.
    """

    def __init__(self) -> None:
        self.decoder: Any = _extra("pocketsphinx").Decoder(samprate=RATE, loglevel="FATAL")

    def __call__(self, x: Tensor, text: str, hop_length: int) -> list[str] | None:
        """The phone at the centre of every hop of x (1, L), 16 kHz; None when the words cannot be aligned."""
        words = " ".join(re.findall(r"[a-z']+", text.lower()))
        pcm = _pcm(x)
        try:
            self.decoder.set_align_text(words)
            for second in (False, True):  # words first, then phones within them
                if second:
                    self.decoder.set_alignment()
                self.decoder.start_utt()
                self.decoder.process_raw(pcm, no_search=False, full_utt=True)
                self.decoder.end_utt()
            phones = [(p.name, p.start, p.duration) for word in self.decoder.get_alignment() for p in word]
        except (RuntimeError, TypeError, ValueError):  # a word without pronunciation, or no path through the sound
            return None
        frames = [SILENCE] * (x.shape[-1] // FRAME + 1)
        for name, start, duration in phones:
            frames[start : start + duration] = [name.split("(")[0].strip("+")] * duration
        count = -(-x.shape[-1] // hop_length)
        centres = [min((t * hop_length + hop_length // 2) // FRAME, len(frames) - 1) for t in range(count)]
        return [frames[c] for c in centres]


def signature(x: Tensor) -> str:
    """A short hash of a sound, to keep what was recognised in it."""
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()[:16]


def _mono(x: Tensor) -> np.ndarray:
    if x.ndim != 2 or x.shape[0] != 1 or not bool(torch.isfinite(x).all()):
        raise ValueError(f"x: expected finite mono sound (1, L) of {RATE} Hz, got shape {tuple(x.shape)}")
    return x[0].float().cpu().numpy()


def _pcm(x: Tensor) -> bytes:
    return (np.clip(_mono(x), -1, 1) * 32767).astype("<i2").tobytes()


def _extra(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ImportError(f"recognising speech needs the package {name}: pip install 'mmtok[asr]'") from e
