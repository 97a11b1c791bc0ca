"""Classical codecs at like bytes: JPEG, WebP and AVIF by Pillow, Opus by PyAV's libopus, all in memory.

What a learned tokenizer reconstructs means little without what ordinary codecs give for the same bytes.
Every byte of the file counts here, headers included, because that is what is stored or sent; for Opus, whose Ogg pages
weigh a tenth at 6 kbit/s, the packets alone stand beside the file.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmtok.metrics import METRICS
from mmtok.metrics.audio import align
from mmtok.metrics.image import psnr, ssim

OPUS_RATES = (8000, 12000, 16000, 24000, 48000)  # Hz, what libopus takes
OPUS_FRAMES_MS = (20, 40, 60, 80, 100, 120)
_OPUS_SCORES = ("pesq_wb", "stoi", "si_sdr_aligned")


@dataclasses.dataclass(frozen=True)
class ImageCodec:
    """How Pillow writes one format: its name there, the quality scale, and options for the smallest file."""

    pillow_format: str
    pillow_feature: str
    qualities: tuple[int, int]
    options: dict[str, object]


# Quality 0 is 1 to libjpeg, so its scale starts there, and Pillow advises against more than 95.
IMAGE_CODECS: dict[str, ImageCodec] = {
    "jpeg": ImageCodec("JPEG", "jpg", (1, 95), {"optimize": True, "subsampling": "4:2:0"}),
    "webp": ImageCodec("WEBP", "webp", (0, 100), {"method": 6}),
    "avif": ImageCodec("AVIF", "avif", (0, 100), {"speed": 6, "subsampling": "4:2:0"}),
}


def encode_image(image: Tensor, codec: str, quality: int) -> bytes:
    """The file of one image.

    Args:
        image: (3,H,W) float in [0,1]; rounded to 8 bits.
        codec: key of `IMAGE_CODECS`.
        quality: on that codec's scale.

    Raises:
        ValueError: another shape, type or range, an unknown codec, a quality off the scale.
        ImportError: a Pillow without that codec.
    """
    if codec not in IMAGE_CODECS:
        raise ValueError(f"codec: expected one of {sorted(IMAGE_CODECS)}, got {codec!r}")
    entry = IMAGE_CODECS[codec]
    low, high = entry.qualities
    if not low <= quality <= high:
        raise ValueError(f"quality: expected {low}..{high} for {codec}, got {quality}")
    _require_image(image)
    from PIL import Image, features

    if not features.check(entry.pillow_feature):
        raise ImportError(f"this Pillow was built without {codec}; install the wheel: pip install 'pillow>=11.3'")
    pixels = (image.detach().cpu().float() * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)  # (H,W,3)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(
        buffer, entry.pillow_format, quality=quality, **entry.options
    )
    return buffer.getvalue()


def decode_image(data: bytes) -> Tensor:
    """(3,H,W) float32 in [0,1] of a JPEG, WebP or AVIF file."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)  # (H,W,3)
    return torch.from_numpy(pixels / 255.0).permute(2, 0, 1).contiguous()


def fit_image(image: Tensor, codec: str, target_bytes: int) -> tuple[int, bytes]:
    """Search the quality by bisection for the largest file of at most `target_bytes`.

    Args:
        image: (3,H,W) float in [0,1].
        codec: key of `IMAGE_CODECS`.
        target_bytes: whole file, header included.

    Returns:
        quality and file. When even the lowest quality is above the target, that smallest file: compare its length.

    Raises:
        ValueError, ImportError: as `encode_image`, and a target below 1 byte.
    """
    if target_bytes < 1:
        raise ValueError(f"target_bytes: expected at least 1, got {target_bytes}")
    if codec not in IMAGE_CODECS:
        raise ValueError(f"codec: expected one of {sorted(IMAGE_CODECS)}, got {codec!r}")
    low, high = IMAGE_CODECS[codec].qualities
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
    for codec in IMAGE_CODECS:
        sizes, qualities, decibels, similar = [], [], [], []
        for image in tqdm(images, desc=codec, unit="image", disable=not progress):
            quality, data = fit_image(image, codec, target_bytes)
            pair = image.detach().cpu()[None], decode_image(data)[None]
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


@dataclasses.dataclass(frozen=True)
class OpusFile:
    """One clip as Opus: the Ogg file, and how many of its bytes are Opus packets (the rest is the container)."""

    data: bytes
    payload_bytes: int
    packets: int


def encode_opus(clip: Tensor, sample_rate: int, bitrate_bps: int, frame_ms: int = 60) -> OpusFile:
    """Encode mono sound with libopus: application voip, variable bitrate, highest complexity.

    Args:
        clip: (1,L) float in [-1,1].
        sample_rate: Hz, one of `OPUS_RATES`.
        bitrate_bps: the encoder's target for its packets, 500..256000; what it really spends is in the result.
        frame_ms: packet length; 20 is usual in calls, 60 spends fewer bits on headers and sounds better at 6 kbit/s.

    Raises:
        ValueError: anything not as said.
        ImportError: the extra ``data`` (PyAV) is missing, or its FFmpeg has no libopus.
    """
    _require_clip(clip)
    if sample_rate not in OPUS_RATES:
        raise ValueError(f"sample_rate: expected one of {OPUS_RATES} Hz, got {sample_rate}; resample the clip first")
    if not 500 <= bitrate_bps <= 256000:
        raise ValueError(f"bitrate_bps: expected 500..256000 bits a second for mono Opus, got {bitrate_bps}")
    if frame_ms not in OPUS_FRAMES_MS:
        raise ValueError(f"frame_ms: expected one of {OPUS_FRAMES_MS}, got {frame_ms}")
    av = _pyav()
    options = {"application": "voip", "vbr": "on", "compression_level": "10", "frame_duration": str(frame_ms)}
    buffer, payload, packets = io.BytesIO(), 0, 0
    with av.open(buffer, "w", format="ogg") as container:
        stream = container.add_stream("libopus", rate=sample_rate, layout="mono", options=options)
        stream.bit_rate = bitrate_bps
        stream.format = "flt"
        samples = np.ascontiguousarray(clip.detach().cpu().float().numpy())  # (1,L)
        frame = av.AudioFrame.from_ndarray(samples, format="flt", layout="mono")
        frame.sample_rate = sample_rate
        frame.pts, frame.time_base = 0, Fraction(1, sample_rate)  # else the end padding is announced 6.5 ms short
        for packet in (*stream.encode(frame), *stream.encode(None)):  # None flushes the last frame
            payload += packet.size
            packets += 1
            container.mux(packet)
    return OpusFile(buffer.getvalue(), payload, packets)


def decode_opus(data: bytes, sample_rate: int, num_samples: int) -> Tensor:
    """Decode an Ogg Opus file and give back exactly the samples that went in.

    libopus drops the pre-skip and the end padding that the file announces and works at 48 kHz with 16 bits; the sound
    is resampled to `sample_rate` (linear phase, no delay).

    Args:
        data: an Ogg Opus file, mono.
        sample_rate: Hz of the result.
        num_samples: L of the clip that was encoded, at `sample_rate`.

    Returns:
        (1,L) float32.

    Raises:
        ValueError: `num_samples` is not what the file holds (by more than one sample), or `data` is no such file.
        ImportError: as `encode_opus`.
    """
    av = _pyav()
    from torchaudio.functional import resample

    chunks = []
    try:
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.audio[0]
            # libopus by name: FFmpeg's own decoder, the default, loses up to 8 samples of a clip of one packet.
            decoder = av.CodecContext.create("libopus", "r")
            decoder.extradata = stream.codec_context.extradata
            for packet in container.demux(stream):
                chunks += [frame.to_ndarray() for frame in decoder.decode(packet)]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"data: expected an Ogg Opus file, got {len(data)} bytes that libopus cannot read") from error
    if not chunks:
        raise ValueError("data: expected an Ogg Opus file with sound in it, got one without a frame")
    sound = torch.from_numpy(np.concatenate(chunks, axis=1))  # (1,L48) int16
    sound = resample(sound.float() / 32768, 48000, sample_rate)
    if sound.shape[0] != 1 or abs(sound.shape[1] - num_samples) > 1:
        raise ValueError(
            f"expected a mono file of {num_samples} samples at {sample_rate} Hz, got {tuple(sound.shape)}; "
            "pass the clip's own rate and length"
        )
    return torch.nn.functional.pad(sound[:, :num_samples], (0, max(0, num_samples - sound.shape[1])))


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


def _require_image(image: Tensor) -> None:
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape or not image.is_floating_point():
        raise ValueError(
            f"image: expected float (3,H,W) in [0,1], got {image.dtype} {tuple(image.shape)}; "
            "convert to RGB and divide uint8 by 255"
        )
    if not bool(torch.isfinite(image).all()) or float(image.min()) < -1e-4 or float(image.max()) > 1 + 1e-4:
        raise ValueError(
            f"image: expected finite values in [0,1], got {float(image.min()):.4g}..{float(image.max()):.4g}; "
            "rescale it"
        )


def _require_clip(clip: Tensor) -> None:
    if clip.ndim != 2 or clip.shape[0] != 1 or clip.shape[1] == 0 or not clip.is_floating_point():
        raise ValueError(
            f"clip: expected mono float (1,L), got {clip.dtype} {tuple(clip.shape)}; "
            "mix channels down, divide int16 by 32768"
        )
    if not bool(torch.isfinite(clip).all()) or float(clip.abs().max()) > 1 + 1e-3:
        raise ValueError(
            f"clip: expected finite samples in [-1,1], got up to {float(clip.abs().max()):.4g}; rescale it"
        )


def _pyav() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ImportError("Opus needs the extra 'data' (PyAV): pip install 'mmtok[data]'") from error
    if "libopus" not in av.codecs_available:
        raise ImportError("this PyAV was built without libopus; install the wheel: pip install 'mmtok[data]'")
    return av
