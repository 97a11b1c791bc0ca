"""Scores of a tokenizer on held-out files under one stated protocol: the numbers of README and model cards."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmtok.metrics import METRICS
from mmtok.metrics.audio import align
from mmtok.metrics.codes import token_statistics
from mmtok.tokenizer import Tokenizer
from mmtok.tokens import Tokens

IMAGE_SCORES = ("psnr", "ssim")
AUDIO_SCORES = ("pesq_wb", "stoi", "si_sdr", "si_sdr_aligned", "mel_distance")


def mean_interval(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Mean, and its 95 % percentile bootstrap interval over items (2,000 draws)."""
    x = np.asarray(values, dtype=np.float64)
    means = np.random.default_rng(seed).choice(x, (2000, len(x))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(x.mean()), "low": float(low), "high": float(high), "count": len(x)}


def image_scores(tokenizer: Tokenizer, images: Sequence[Tensor]) -> dict[str, Any]:
    """PSNR and SSIM over pictures (3, H, W) in [0, 1], with bytes an image, seconds, and codebook use."""
    found: dict[str, list[float]] = {name: [] for name in IMAGE_SCORES}
    started, parts = time.perf_counter(), []
    for image in tqdm(images, desc=tokenizer.name, unit="image", mininterval=2):
        tokens = tokenizer.encode(image)
        x_hat = tokenizer.decode(tokens)
        assert isinstance(x_hat, Tensor)
        parts.append(tokens)
        # Classical codecs return 8-bit pictures, so ours are rounded to the same.
        estimate = (x_hat * 255).round() / 255
        for name in IMAGE_SCORES:
            found[name].append(float(METRICS[name].function(image[None], estimate)))
    return {
        "tokenizer": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "bytes": float(torch.cat([p.bits for p in parts]).mean()) / 8,
        "seconds_per_item": (time.perf_counter() - started) / len(images),
        **{name: mean_interval(values) for name, values in found.items()},
        **codebook_use(parts),
    }


def audio_scores(
    tokenizer: Tokenizer, clips: Sequence[Tensor], sample_rate: int, num_codebooks: int | None = None
) -> dict[str, Any]:
    """PESQ-wb, STOI, SI-SDR raw and aligned, mel distance over clips (1, L), with the bitrate of the kept levels.

    ``delay_samples`` is the median over clips of how late the reconstruction is, negative where it is early.
    """
    found: dict[str, list[float]] = {name: [] for name in AUDIO_SCORES}
    unscored: dict[str, int] = dict.fromkeys(AUDIO_SCORES, 0)
    started, parts, seconds, delays = time.perf_counter(), [], 0.0, []
    for clip in tqdm(clips, desc=f"{tokenizer.name} {num_codebooks or ''}", unit="clip", mininterval=2):
        tokens = tokenizer.encode(clip, sample_rate=sample_rate, num_codebooks=num_codebooks)
        x_hat = tokenizer.decode(tokens)
        assert isinstance(x_hat, Tensor)
        parts.append(tokens)
        seconds += clip.shape[1] / sample_rate
        delays.append(float(align(clip[None], x_hat, sample_rate // 20)[0]))
        for name in AUDIO_SCORES:
            try:
                found[name].append(float(METRICS[name].function(clip[None], x_hat, sample_rate)))
            except ValueError:  # too short or without speech for this metric: counted, never a default value
                unscored[name] += 1
    elapsed = time.perf_counter() - started
    return {
        "tokenizer": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "num_codebooks": parts[0].codes.shape[1],
        "bitrate_bps": parts[0].spec.bitrate_bps,
        "clips": len(clips),
        "seconds_of_sound": seconds,
        "elapsed_over_sound": elapsed / seconds,
        "unscored": unscored,
        "delay_samples": float(np.median(delays)),
        **{name: mean_interval(values) for name, values in found.items() if values},
        **codebook_use(parts),
    }


def codebook_use(parts: Sequence[Tokens]) -> dict[str, Any]:
    """Usage and perplexity of each level over all tokens, with the number of codes they were counted on."""
    side_free = [Tokens(p.codes, p.lengths, p.spec) for p in parts]
    statistics = token_statistics(Tokens.concat(side_free))
    return {
        "codes_counted": int(torch.cat([p.lengths for p in parts]).sum()),
        "usage": [round(float(v), 4) for v in statistics.usage],
        "perplexity": [round(float(v), 1) for v in statistics.perplexity],
    }


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A GitHub table; floats are expected as text already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines)


def interval_text(score: dict[str, float], digits: int) -> str:
    """``mean [low, high]``, or ``-`` where there is none."""
    if not score or math.isnan(score["mean"]):
        return "-"
    return f"{score['mean']:.{digits}f} [{score['low']:.{digits}f}, {score['high']:.{digits}f}]"


def replace_block(text: str, name: str, content: str) -> str:
    """Put ``content`` between ``<!-- NAME -->`` and ``<!-- /NAME -->``; ValueError when the marks are missing."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start not in text or end not in text:
        raise ValueError(f"expected the marks {start} and {end}")
    head, rest = text.split(start, 1)
    return f"{head}{start}\n{content.strip()}\n{end}{rest.split(end, 1)[1]}"
