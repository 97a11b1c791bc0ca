"""The page on which codecs are compared by ear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmtok.bench.report import Section, SoundsSection, TableSection, write_report
from mmtok.tokenizer import Tokenizer

from .scores import RATE, Spoken

SHOWN = ("whisper-base", "pocketsphinx", "probe1", "probe", "pesq_wb", "stoi", "mel_distance")


def write_page(
    path: Path,
    codecs: Mapping[str, Tokenizer],
    spoken: Spoken,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    few: int,
) -> None:
    """Players of every clip: the original, and each codec at all levels and at ``few``; the scores above them."""
    names = [n for n in SHOWN if all(n in row for some in rows.values() for row in some)]
    table = [
        [variant, *(f"{np.mean([np.mean(row[n]) for row in some]):.3g}" for n in names)]
        for variant, some in rows.items()
    ]
    note = "Means over clips and seeds; whisper-base and pocketsphinx are word error rates in percent."
    sections: list[Section] = [TableSection("Scores", table, ("codec", *names), note)]
    for clip, text in zip(spoken.clips, spoken.texts, strict=True):
        sounds = [("original", clip.numpy())]
        for name, codec in codecs.items():
            levels = codec.spec.num_codebooks
            for n in sorted({levels, min(few, levels)}, reverse=True):
                tokens = codec.encode(clip, RATE, num_codebooks=n)
                x_hat = codec.decode(tokens)
                assert isinstance(x_hat, Tensor)
                sounds.append((f"{name}, {(tokens.spec.bitrate_bps or 0) / 1000:g} kbit/s", x_hat[0].numpy()))
        sections.append(SoundsSection(text, sounds, RATE))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(path, "X-Codec with and without its semantic branch", sections)
