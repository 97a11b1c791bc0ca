"""Scores of a speech codec: signal metrics, word errors of decoded speech, and what a linear probe reads in codes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from imaging.scores import codebook_use
from torch import Tensor
from tqdm import tqdm

from mmtok.bench.recognition import PhoneAligner, Recogniser, signature, word_errors
from mmtok.bench.sets import load_set
from mmtok.data.audio import read_audio, resample
from mmtok.data.sources import find_sources
from mmtok.metrics import METRICS
from mmtok.metrics.retrieval import probe_hits
from mmtok.quantizers.base import Quantizer
from mmtok.tokenizer import AudioTokenizer
from mmtok.tokens import Tokens, write_atomic

RATE = 16000
SIGNAL = ("pesq_wb", "stoi", "si_sdr", "si_sdr_aligned", "mel_distance")
SENTENCE = 4  # words that a prompt has at least, for the recognisers


@dataclass
class Spoken:
    """Clips (1, L) of 16 kHz with what is said in them."""

    clips: list[Tensor]
    texts: list[str]

    def part(self, step: int) -> Spoken:
        """Every ``step``-th clip."""
        return Spoken(self.clips[::step], self.texts[::step])


def speech_clips(data: Path) -> list[Tensor]:
    """The sounds (1, L) of the benchmark's set ``speech``; none of a folder that has no test split."""
    if not any(s.split == "test" for s in find_sources(data, "audio")):
        return []
    return [item.x for item in load_set("speech", data).items]


def english_prompts(data: Path) -> Spoken:
    """The Asterisk prompts in English, all in the test split, that have at least four words; sorted by path."""
    found = Spoken([], [])
    for source in sorted(find_sources(data, "audio"), key=lambda s: str(s.path)):
        if source.package.startswith("asterisk-core-sounds-en") and len((source.text or "").split()) >= SENTENCE:
            x, rate = read_audio(source.path)
            found.clips.append(resample(x.mean(0, keepdim=True), rate, RATE))
            found.texts.append(source.text or "")
    return found


@dataclass
class Phones:
    """Phone classes of the frames of clips, -1 where a clip could not be aligned."""

    labels: list[Tensor]
    names: list[str] = field(default_factory=list)


def phones_of(spoken: Spoken, hop_length: int, cache: Path) -> Phones:
    """The phone of every frame by forced alignment; kept in ``cache``, since it depends on the clips alone."""
    key = signature(torch.cat([c[0] for c in spoken.clips]))
    kept = cache / f"phones-{hop_length}-{key}.json"
    if kept.is_file():
        rows = json.loads(kept.read_text())
    else:
        aligner = PhoneAligner()
        pairs = zip(spoken.clips, spoken.texts, strict=True)
        rows = [aligner(x, text, hop_length) for x, text in tqdm(pairs, desc="phones", total=len(spoken.clips))]
        cache.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, json.dumps(rows).encode())
    names = sorted({name for row in rows if row for name in row})
    numbers = {name: i for i, name in enumerate(names)}
    labels = []
    for row, clip in zip(rows, spoken.clips, strict=True):
        count = -(-clip.shape[1] // hop_length)
        labels.append(torch.full((count,), -1) if row is None else torch.tensor([numbers[n] for n in row]))
    return Phones(labels, names)


def signal_scores(tokenizer: AudioTokenizer, clips: Sequence[Tensor], num_codebooks: int) -> dict[str, list[float]]:
    """Every metric of `SIGNAL` for each clip."""
    found: dict[str, list[float]] = {name: [] for name in SIGNAL}
    for clip in tqdm(clips, desc=f"signal, {num_codebooks} levels", mininterval=5):
        x_hat = tokenizer.decode(tokenizer.encode(clip, RATE, num_codebooks=num_codebooks))
        assert isinstance(x_hat, Tensor)
        for name, values in found.items():
            values.append(float(METRICS[name].function(clip[None], x_hat, RATE)))
    return found


def word_scores(
    tokenizer: AudioTokenizer | None, spoken: Spoken, num_codebooks: int, recognisers: Sequence[Recogniser]
) -> dict[str, list[float]]:
    """Recogniser -> errors of each clip, scaled so that their mean is the word error rate in percent of all words.

    A clip counts at most as all its words wrong: what a recogniser invents beyond that says nothing more of the codec.
    Without a tokenizer, of the clips as they are.
    """
    decoded = []
    for clip in spoken.clips:
        x_hat = clip[None]
        if tokenizer is not None:
            x_hat = tokenizer.decode(tokenizer.encode(clip, RATE, num_codebooks=num_codebooks))
        assert isinstance(x_hat, Tensor)
        decoded.append(x_hat[0])
    found = {}
    for recogniser in recognisers:
        heard = [recogniser(x) for x in tqdm(decoded, desc=f"{recogniser.name}, {num_codebooks} levels", mininterval=5)]
        counts = word_errors(spoken.texts, heard)
        words = sum(n for _, n in counts) / len(counts)
        found[recogniser.name] = [100 * min(errors, n) / words for errors, n in counts]
    return found


def probe_scores(
    tokenizer: AudioTokenizer, spoken: Spoken, phones: Phones, levels: Sequence[int]
) -> dict[int, list[float]]:
    """Frames whose phone a linear probe tells from z_q of the first n levels, for each n: percent by test clip.

    Every fourth clip is a test clip. Values are scaled so that their mean is the accuracy over all test frames.
    """
    quantizer: Quantizer = tokenizer.quantizer  # pyright: ignore[reportAssignmentType]
    kept = [i for i, labels in enumerate(phones.labels) if int(labels[0]) >= 0]
    codes = [tokenizer.encode(spoken.clips[i], RATE).codes for i in tqdm(kept, desc="codes to probe", mininterval=5)]
    is_test = [n % 4 == 0 for n in range(len(kept))]
    y = [phones.labels[i] for i in kept]
    train_y, test_y = (torch.cat([v for v, t in zip(y, is_test, strict=True) if t is side]) for side in (False, True))
    sizes = [len(v) for v, t in zip(y, is_test, strict=True) if t]
    seen = torch.isin(test_y, train_y.unique())
    found = {}
    for n in levels:
        x = [quantizer.decode(c[:, :n])[0] for c in codes]  # (T, D) each
        train_x, test_x = (
            torch.cat([v for v, t in zip(x, is_test, strict=True) if t is side]) for side in (False, True)
        )
        right = torch.zeros(len(test_y), dtype=torch.float64)  # a phone that training lacks counts as wrong
        right[seen] = probe_hits(train_x, train_y, test_x[seen], test_y[seen]).double()
        mean = sum(sizes) / len(sizes)
        found[n] = [100 * float(part.sum()) / mean for part in right.split(sizes)]
    return found


def use_of(tokenizer: AudioTokenizer, clips: Sequence[Tensor]) -> dict[str, Any]:
    """Usage and perplexity of every level over the clips."""
    return codebook_use([Tokens(t.codes, t.lengths, t.spec) for t in (tokenizer.encode(c, RATE) for c in clips)])
