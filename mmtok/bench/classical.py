"""Classical codecs at like bytes: JPEG, WebP and AVIF by Pillow, Opus by PyAV's libopus, all in memory.

What a learned tokenizer reconstructs means little without what ordinary codecs give for the same bytes.
Every byte of the file counts here, headers included, because that is what is stored or sent; for Opus, whose Ogg pages
weigh a tenth at 6 kbit/s, the packets alone stand beside the file. The codecs themselves are in `mmtok.wrappers`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor
from tqdm import tqdm

from mmtok.metrics import METRICS
from mmtok.metrics.audio import align
from mmtok.metrics.image import psnr, ssim
from mmtok.wrappers.classical_images import decode_image, encode_image, image_codec
from mmtok.wrappers.classical_streams import decode_opus, encode_opus

ROW_CODECS = ("jpeg", "webp", "avif")
_OPUS_SCORES = ("pesq_wb", "stoi", "si_sdr_aligned")


def fit_image(image: Tensor, codec: str, target_bytes: int) -> tuple[int, bytes]:
    """Search the quality by bisection for the largest file of at most `target_bytes`.

    Args:
        image: (3,H,W) float in [0,1].
        codec: of `ROW_CODECS`.
        target_bytes: whole file, header included.

    Returns:
        quality and file. When even the lowest quality is above the target, that smallest file: compare its length.

    Raises:
        ValueError, ImportError: as `encode_image`, and a target below 1 byte.
    """
    if target_bytes < 1:
        raise ValueError(f"target_bytes: expected at least 1, got {target_bytes}")
    if codec not in ROW_CODECS:
        raise ValueError(f"codec: expected one of {ROW_CODECS}, got {codec!r}")
    low, high = image_codec(codec).settings[0], image_codec(codec).settings[-1]
    tried = {low: encode_image(image, codec, low)}
    if len(tried[low]) <= target_bytes:
        tried[high] = encode_image(image, codec, high)
        while high - low > 1:
            middle = (low + high) // 2
            tried[middle] = encode_image(image, codec, middle)
            if len(tried[middle]) <= target_bytes:
                low = middle
            else:
                high = middle
    # Sizes are not quite monotone in the quality, so the best of all tries is taken, not the last one.
    fitting = [(len(data), quality) for quality, data in tried.items() if len(data) <= target_bytes]
    quality = max(fitting)[1] if fitting else min(tried, key=lambda q: len(tried[q]))
    return quality, tried[quality]


def classical_image_rows(images: Sequence[Tensor], target_bytes: int, progress: bool = True) -> list[dict]:
    """What JPEG, WebP and AVIF give at (at most) a byte count an image.

    Args:
        images: (3,H,W) floats in [0,1], H and W at least 11; sizes may differ.
        target_bytes: for each image, whole file.
        progress: show a bar.

    Returns:
        One row a codec: ``codec, images, target_bytes, reached`` (images whose file is within the target), ``bytes``
        (mean), ``bytes_min, bytes_max, bpp`` (bits a pixel), ``quality`` (mean), ``psnr_db`` (mean over images
        that are not exact; None if all are), ``exact`` (images given back exactly), ``ssim`` (mean).

    Raises:
        ValueError: no images, or one that is not as said.
        ImportError: a Pillow without one of the codecs.
    """
    if not images:
        raise ValueError("images: expected at least one (3,H,W) tensor, got none")
    rows = []
    for codec in ROW_CODECS:
        sizes, qualities, decibels, similar = [], [], [], []
        for image in tqdm(images, desc=codec, unit="image", disable=not progress):
            quality, data = fit_image(image, codec, target_bytes)
            pair = image.detach().cpu()[None], decode_image(data, codec)[None]
            sizes.append(len(data))
            qualities.append(quality)
            decibels.append(float(psnr(*pair)))
            similar.append(float(ssim(*pair)))
        finite = [d for d in decibels if math.isfinite(d)]
        rows.append(
            {
                "codec": codec,
                "images": len(images),
                "target_bytes": target_bytes,
                "reached": sum(size <= target_bytes for size in sizes),
                "bytes": _mean(sizes),
                "bytes_min": min(sizes),
                "bytes_max": max(sizes),
                "bpp": 8 * sum(sizes) / sum(image.shape[-2] * image.shape[-1] for image in images),
                "quality": _mean(qualities),
                "psnr_db": _mean(finite) if finite else None,
                "exact": len(decibels) - len(finite),
                "ssim": _mean(similar),
            }
        )
    return rows


def opus_rows(
    clips: Sequence[Tensor],
    sample_rate: int = 16000,
    bitrate_bps: int = 6000,
    frames_ms: Sequence[int] = (20, 60),
    progress: bool = True,
) -> list[dict]:
    """What Opus gives for speech at a bitrate.

    Args:
        clips: (1,L) floats in [-1,1] at 16 kHz; lengths may differ.
        sample_rate: Hz, 16000 (PESQ-wb knows no other).
        bitrate_bps: asked of the encoder; the row says what it spent.
        frames_ms: one row for each packet length.
        progress: show a bar.

    Returns:
        Rows ``codec, clips, seconds, bitrate_bps, frame_ms, payload_bps`` and ``payload_bytes_per_s`` (packets alone),
        ``file_bps`` and ``file_bytes_per_s`` (with the Ogg container), ``delay_samples`` (mean, signed), the means
        ``pesq_wb, stoi, si_sdr_aligned`` with ``<name>_clips``, how many clips each could be taken of (None over 0),
        and ``unscored``, why not for each of the others.

    Raises:
        ValueError: no clips, another rate, a clip that is not as said.
        ImportError: the extra ``data`` or ``audio-metrics`` is missing.
    """
    if not clips:
        raise ValueError("clips: expected at least one (1,L) tensor, got none")
    if sample_rate != 16000:
        raise ValueError(f"sample_rate: expected 16000 Hz (PESQ-wb knows no other), got {sample_rate}; resample first")
    if wrong := [tuple(c.shape) for c in clips if c.ndim != 2 or c.shape[0] != 1]:
        raise ValueError(f"clips: expected mono (1,L), got {wrong[0]}; mix channels down")
    rows = []
    for frame_ms in frames_ms:
        payload = total = 0
        scores: dict[str, list[float]] = {name: [] for name in (*_OPUS_SCORES, "delay_samples")}
        unscored: list[str] = []
        for index, clip in enumerate(tqdm(clips, desc=f"opus {frame_ms} ms", unit="clip", disable=not progress)):
            encoded = encode_opus(clip, sample_rate, bitrate_bps, frame_ms)
            payload += encoded.payload_bytes
            total += len(encoded.data)
            decoded = decode_opus(encoded.data, sample_rate, clip.shape[-1])
            values, why = _speech_scores(clip.detach().cpu()[None], decoded[None], sample_rate)
            for name, value in values.items():
                scores[name].append(value)
            unscored += [f"clip {index}: {reason}" for reason in why]
        seconds = sum(clip.shape[-1] for clip in clips) / sample_rate
        row: dict = {
            "codec": "opus",
            "clips": len(clips),
            "seconds": seconds,
            "bitrate_bps": bitrate_bps,
            "frame_ms": frame_ms,
            "payload_bps": 8 * payload / seconds,
            "payload_bytes_per_s": payload / seconds,
            "file_bps": 8 * total / seconds,
            "file_bytes_per_s": total / seconds,
        }
        for name, found in scores.items():
            row[name] = _mean(found) if found else None
            row[f"{name}_clips"] = len(found)
        rows.append(row | {"unscored": unscored})
    return rows


def _speech_scores(reference: Tensor, estimate: Tensor, sample_rate: int) -> tuple[dict[str, float], list[str]]:
    """Scores of one pair (1,1,L) that can be taken, and why the others cannot (silence, too short)."""
    values: dict[str, float] = {}
    why: list[str] = []
    for name in _OPUS_SCORES:
        try:
            values[name] = float(METRICS[name].function(reference, estimate, sample_rate))
        except ValueError as error:
            why.append(f"{name}: {error}")
    if "si_sdr_aligned" in values:
        values["delay_samples"] = float(align(reference, estimate, sample_rate // 20)[0])
    return values, why


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
