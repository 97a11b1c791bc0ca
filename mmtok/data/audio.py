"""Sound in and out: any path, array or tensor becomes (C, L) float32 in [-1, 1] with its sample rate, and back."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtok.data.arrays import as_tensor
from mmtok.tokens import write_atomic

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au")
MAX_CHANNELS = 32
SAMPLE_RATES = range(1000, 768_001)  # Hz
ZERO_CROSSINGS, ROLLOFF, KAISER_BETA = 64, 0.9475937167399596, 14.769656459379492  # of the resampling filter
WRITE_BLOCK = 2**16  # frames; libsndfile's Vorbis encoder overflows the stack on millions at once
MAX_FILTER = 2**24  # numbers in torchaudio's table of filters; odd rates would need gigabytes
TOO_LOUD = "the file was coded far too loud: write it again at a lower gain"
MAX_AMPLITUDE = 2.0  # lossy decoders overshoot 1 a little; integers that were not scaled lie far above


@dataclasses.dataclass
class Sound:
    """One clip: ``samples`` (C, L) float32 and ``sample_rate`` in Hz."""

    samples: Tensor
    sample_rate: int


def read_audio(path: str | Path) -> tuple[Tensor, int]:
    """Read a clip as ((C, L) float32, sample rate in Hz) with libsndfile (WAV, FLAC, OGG, Opus, MP3 ...).

    Raises FileNotFoundError when missing, ValueError when empty, corrupt or without a sample.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no audio file at {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); expected an audio file")
    return _decoded(str(path), str(path))


def sound_from_bytes(data: bytes, name: str) -> Sound:
    """The clip in a file's bytes; errors as `read_audio`, by ``name``."""
    if not data:
        raise ValueError(f"{name} is empty (0 bytes); expected an audio file")
    return Sound(*_decoded(io.BytesIO(data), name))


def _decoded(file: str | io.BytesIO, name: str) -> tuple[Tensor, int]:
    import soundfile

    try:
        array, sample_rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as e:  # TypeError: headerless .raw
        # Of bytes the whole text names an address in memory.
        why = e if isinstance(file, str) else getattr(e, "error_string", None) or e
        raise ValueError(f"{name} is not a readable audio file ({why}); expected WAV, FLAC, OGG, Opus or MP3") from e
    if array.shape[0] == 0:
        raise ValueError(f"{name} holds 0 samples; expected at least one")
    return check_samples(as_tensor(array.T, name), name, TOO_LOUD), check_rate(sample_rate, name)


def check_samples(x: Tensor, name: str = "audio", quieter: str = "divide 16-bit values by 32768") -> Tensor:
    """Return ``x`` (C, L) as float32, or raise ValueError: shape, NaN, amplitude, channel count.

    ``quieter``: what to do about samples that are far above 1.
    """
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name}: expected (C, L) with at least one sample, got shape {tuple(x.shape)}")
    if x.shape[0] > MAX_CHANNELS:
        raise ValueError(
            f"{name}: expected (C, L) with C <= {MAX_CHANNELS}, got shape {tuple(x.shape)}; is it (L, C)? transpose it"
        )
    if x.dtype == torch.int16:
        return x.float() / 32768
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected int16 or float in [-1, 1], got {x.dtype}")
    x = x.float()
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name}: expected finite samples, got NaN or infinity")
    if float(x.abs().max()) > MAX_AMPLITUDE:
        raise ValueError(f"{name}: expected floats in [-1, 1], got a peak of {float(x.abs().max()):.3g}; {quieter}")
    return x


def check_rate(sample_rate: Any, name: str = "sample_rate") -> int:
    """Return ``sample_rate`` as int, or raise ValueError unless it is whole Hz in a sensible range."""
    try:
        whole = int(sample_rate)
        fits = whole == sample_rate and whole in SAMPLE_RATES and not isinstance(sample_rate, bool)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several values
        whole, fits = 0, False
    if not fits:
        found = f"{sample_rate!r} ({type(sample_rate).__name__})"
        raise ValueError(f"{name}: expected whole Hz in {SAMPLE_RATES[0]}..{SAMPLE_RATES[-1]}, got {found}")
    return whole


def to_sounds(x: Any, sample_rate: int | None) -> tuple[list[Sound], bool]:
    """Clips of any accepted input, and whether it was a batch.

    Accepts a path, an array or tensor (L,), (C, L) or (B, C, L), or a list of these. ``sample_rate`` in Hz is mandatory
    for arrays; for a file it must be None or equal the file's own.
    """
    if isinstance(x, (list, tuple)):
        if not x:
            raise ValueError("expected at least one clip, got an empty list")
        return [s for item in x for s in to_sounds(item, sample_rate)[0]], True
    if isinstance(x, (str, Path)):
        samples, rate = read_audio(x)
        if sample_rate is not None and sample_rate != rate:
            raise ValueError(
                f"{x}: the file has {rate} Hz, sample_rate={sample_rate} was given; leave it out for files"
            )
        return [Sound(samples, rate)], False
    if not isinstance(x, (np.ndarray, Tensor)):
        raise ValueError(f"audio: expected a path, array, tensor or a list of them, got {type(x).__name__}")
    if sample_rate is None:
        raise ValueError("sample_rate: mandatory for arrays and tensors, e.g. encode(x, sample_rate=16000)")
    rate = check_rate(sample_rate)
    tensor = as_tensor(x, "audio") if isinstance(x, np.ndarray) else x.detach().cpu()
    if tensor.ndim == 1:
        tensor = tensor[None]
    if tensor.ndim == 3:
        if not len(tensor):
            raise ValueError(f"expected at least one clip, got an empty batch of shape {tuple(tensor.shape)}")
        return [Sound(check_samples(item), rate) for item in tensor], True
    return [Sound(check_samples(tensor), rate)], False


def resample(x: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Resample (..., L) to exactly ceil(L * to / from) samples by a windowed sinc, Kaiser window, 64 zero crossings.

    torchaudio's filter bank, or `resample_directly` for rates with so small a common divisor that the bank is huge.
    """
    if from_rate == to_rate:
        return x
    length = -(-x.shape[-1] * to_rate // from_rate)
    step = math.gcd(from_rate, to_rate)
    width = 2 * ZERO_CROSSINGS * max(1.0, from_rate / to_rate) / ROLLOFF
    if to_rate // step * (from_rate // step + width) > MAX_FILTER:
        return resample_directly(x, from_rate, to_rate)
    try:
        from torchaudio.functional import resample as sinc_resample
    except (ImportError, RuntimeError, OSError) as e:
        raise RuntimeError(
            f"resampling {from_rate} -> {to_rate} Hz needs torchaudio, which does not load here ({e}); "
            "run `mmtok doctor`, or give audio at the tokenizer's own rate"
        ) from e
    y = sinc_resample(
        x,
        from_rate,
        to_rate,
        lowpass_filter_width=ZERO_CROSSINGS,
        rolloff=ROLLOFF,
        resampling_method="sinc_interp_kaiser",
        beta=KAISER_BETA,
    )
    return fit_length(y, length)  # torchaudio counts in float32 and is off by one above 2^24 samples


def resample_directly(x: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """The same filter as `resample`, worked out at every output sample: slower, but small for any two rates."""
    L = x.shape[-1]
    length = -(-L * to_rate // from_rate)
    cutoff = min(1.0, to_rate / from_rate) * ROLLOFF  # in cycles of half the input rate
    reach = math.ceil(ZERO_CROSSINGS / cutoff)
    taps = torch.arange(-reach, reach + 1, device=x.device)
    padded = torch.nn.functional.pad(x, (reach, reach + 1))
    out = x.new_empty(*x.shape[:-1], length)
    block = max(1, 2**20 // len(taps))
    for start in range(0, length, block):
        n = torch.arange(start, min(start + block, length), device=x.device)
        centre, rest = n * from_rate // to_rate, (n * from_rate % to_rate).double() / to_rate
        t = (taps - rest[:, None]) * cutoff  # (n, taps), in zero crossings
        window = torch.special.i0(KAISER_BETA * (1 - (t / ZERO_CROSSINGS).square()).clamp_min(0).sqrt())
        window = torch.where(t.abs() < ZERO_CROSSINGS, window / torch.special.i0(t.new_tensor(KAISER_BETA)), 0.0)
        kernel = (torch.sinc(t) * window * cutoff).to(x.dtype)
        out[..., start : start + len(n)] = (padded[..., centre[:, None] + taps + reach] * kernel).sum(-1)
    return out


def fit_length(x: Tensor, length: int) -> Tensor:
    """Cut or zero-pad (..., L) to ``length`` samples."""
    return torch.nn.functional.pad(x[..., :length], (0, max(0, length - x.shape[-1])))


def write_audio(path: str | Path, x: Tensor, sample_rate: int) -> None:
    """Write (C, L) float in [-1, 1] (clipped) as 16-bit WAV or FLAC, or OGG, by the suffix of ``path``."""
    import soundfile

    path = Path(path)
    if path.suffix.lower() not in (".wav", ".flac", ".ogg"):
        raise ValueError(f"{path}: expected the suffix .wav, .flac or .ogg, got {path.suffix!r}")
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"audio: expected (C, L) with at least one sample, got shape {tuple(x.shape)}")
    buffer = io.BytesIO()
    array = x.detach().float().cpu().clamp(-1, 1).T.numpy()  # (L, C)
    subtype = "VORBIS" if path.suffix.lower() == ".ogg" else "PCM_16"
    format = path.suffix[1:].upper()
    with soundfile.SoundFile(buffer, "w", check_rate(sample_rate), x.shape[0], subtype, format=format) as f:
        for start in range(0, len(array), WRITE_BLOCK):
            f.write(array[start : start + WRITE_BLOCK])
    write_atomic(path, buffer.getvalue())
