"""Metrics as plain functions, and `METRICS`, the table a report is made from (unit, direction, what each needs).

`function` takes, by modality: ``image`` (reference, estimate), both (B,C,H,W) in [0,1]; ``audio`` (reference, estimate,
sample_rate), both (B,C,L) in [-1,1]; ``codes`` (codes (B,Q,T), codebook_sizes, mask (B,T) or None). Image and audio
functions give one value an item, (B,); code functions one value a level, (Q,); both float64 on the CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from mmtok.metrics import audio, codes, image


@dataclasses.dataclass(frozen=True)
class Metric:
    """One line of the table.

    Args:
        name: key in `METRICS` and column name in reports.
        modality: ``image``, ``audio`` or ``codes``.
        unit: of the returned values; ``1`` for plain numbers.
        direction: ``higher`` or ``lower``: which way is better.
        needs: the extra of mmtok that brings the library, or None when the core install has it.
        function: see the module docstring for its arguments.
    """

    name: str
    modality: str
    unit: str
    direction: str
    needs: str | None
    function: Callable[..., Tensor]


_EXTRA = "audio-metrics"
METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("psnr", "image", "dB", "higher", None, image.psnr),
        Metric("ssim", "image", "1", "higher", None, image.ssim),
        Metric("ms_ssim", "image", "1", "higher", None, image.ms_ssim),
        Metric("pesq_wb", "audio", "MOS-LQO", "higher", _EXTRA, audio.pesq_wb),
        Metric("pesq_nb", "audio", "MOS-LQO", "higher", _EXTRA, audio.pesq_nb),
        Metric("stoi", "audio", "1", "higher", _EXTRA, audio.stoi),
        Metric("si_sdr", "audio", "dB", "higher", None, audio.si_sdr),
        Metric("si_sdr_aligned", "audio", "dB", "higher", None, audio.si_sdr_aligned),
        Metric("delay", "audio", "samples", "lower", None, audio.delay),
        Metric("sdr", "audio", "dB", "higher", None, audio.sdr),
        Metric("mel_distance", "audio", "log10 (sum of 7 scales)", "lower", None, audio.mel_distance),
        Metric("stft_distance", "audio", "dB", "lower", None, audio.stft_distance),
        Metric("usage", "codes", "1", "higher", None, codes.usage),
        Metric("perplexity", "codes", "codes", "higher", None, codes.perplexity),
        Metric("entropy", "codes", "bit", "higher", None, codes.entropy),
    )
}

__all__ = ["METRICS", "Metric"]
