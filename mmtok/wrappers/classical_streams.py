"""Opus and MP3 by PyAV, Codec 2 by pycodec2: sound to the bytes of a file or stream in memory, and back."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtok.data import audio as audio_io
from mmtok.wrappers import ogg

OPUS_RATES = (8000, 12000, 16000, 24000, 48000)  # Hz, what libopus takes
OPUS_FRAMES_MS = (20, 40, 60, 80, 100, 120)
OPUS_BITRATES = range(500, 256001)  # bits a second and channel
# FFmpeg gives 3 to 8 channels back in the order of loudspeakers, whatever they are: output i is channel ORDER[C][i].
OPUS_ORDER = {
    3: (0, 2, 1),
    5: (0, 2, 1, 3, 4),
    6: (0, 2, 1, 5, 3, 4),
    7: (0, 2, 1, 6, 5, 3, 4),
    8: (0, 2, 1, 7, 5, 6, 3, 4),
}
# Bits a second of a channel -> Hz: the rate at which its band fits, about what the program `lame` chooses for mono.
# Twice the bits must be legal too, for stereo.
MP3_SETTINGS = {
    **{8000: 8000, 16000: 16000, 24000: 16000, 32000: 22050, 40000: 24000, 48000: 32000, 56000: 32000},
    **dict.fromkeys((64000, 80000, 96000, 112000, 128000, 160000), 44100),
}
MP3_DELAY = 1105  # samples: 576 of LAME's encoder, 529 of any decoder, at every rate
# kbit/s of the fields of a frame's header, for MPEG 1 (32 kHz and more) and for the lower rates of MPEG 2 and 2.5.
MP3_KBPS = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
MP3_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
CODEC2_RATE = 8000  # Hz
CODEC2_MODES = (3200, 2400, 1600, 1400, 1300, 1200, 700)  # bits a second; 700 is mode 700C
# Samples by which the sound comes late. A block of 80 is analysed in a window whose middle lies 80 samples before the
# block, and the synthesis is there at the end of its own block; 700C interpolates from the frame before, a block later.
CODEC2_DELAY, CODEC2_DELAY_700 = 160, 240
# Codec 2 draws phases from a state that all decoders of a process share and that cannot be set: only a decoder in a new
# process gives the same sound every time. It finds packages where this process does.
CODEC2_DECODER = """
import sys
sys.path[:] = sys.argv[2:]
import pycodec2
codec = pycodec2.Codec2(int(sys.argv[1]))
step, frames = codec.bytes_per_frame(), sys.stdin.buffer.read()
for at in range(0, len(frames), step):
    sys.stdout.buffer.write(codec.decode(frames[at : at + step]).tobytes())
"""


@dataclasses.dataclass(frozen=True)
class OpusFile:
    """One clip as Opus: the Ogg file, and how many of its bytes are Opus packets (the rest is the container)."""

    data: bytes
    payload_bytes: int
    packets: int


def encode_opus(
    clip: Tensor, sample_rate: int, bitrate_bps: int, frame_ms: int = 60, application: str = "voip"
) -> OpusFile:
    """Encode sound with libopus: variable bitrate, highest complexity; the same bytes every time.

    Args:
        clip: (C,L) float in [-1,1], C up to 32. Two channels are coded as stereo, more of them one by one.
        sample_rate: Hz, one of `OPUS_RATES`.
        bitrate_bps: the encoder's target for the packets of one channel, 500..256000; what it spends is in the result.
        frame_ms: packet length; 20 is usual in calls, 60 spends fewer bits on headers and sounds better at 6 kbit/s.
        application: ``voip`` for speech, ``audio`` for all sound.

    Raises:
        ValueError: anything not as said.
        ImportError: the extra ``data`` (PyAV) is missing, or its FFmpeg has no libopus.
    """
    _require_clip(clip)
    if sample_rate not in OPUS_RATES:
        raise ValueError(f"sample_rate: expected one of {OPUS_RATES} Hz, got {sample_rate}; resample the clip first")
    if bitrate_bps not in OPUS_BITRATES:
        raise ValueError(f"bitrate_bps: expected 500..256000 bits a second and channel for Opus, got {bitrate_bps}")
    if frame_ms not in OPUS_FRAMES_MS:
        raise ValueError(f"frame_ms: expected one of {OPUS_FRAMES_MS}, got {frame_ms}")
    if application not in ("voip", "audio"):
        raise ValueError(f"application: expected voip or audio, got {application!r}")
    av = require_pyav("libopus")
    C = clip.shape[0]
    options = {"application": application, "vbr": "on", "compression_level": "10", "frame_duration": str(frame_ms)}
    options |= {"mapping_family": "255"} if C > 2 else {}  # channels that are no loudspeakers: none is cut to bass
    buffer, payload, packets = io.BytesIO(), 0, 0
    with av.open(buffer, "w", format="ogg") as container:
        stream = container.add_stream("libopus", rate=sample_rate, layout=_layout(C), options=options)
        stream.bit_rate = bitrate_bps * C
        stream.format = "flt"
        interleaved = clip.detach().cpu().float().T.reshape(1, -1)  # (1,L*C)
        frame = _frame(av, interleaved, "flt", C, sample_rate)
        for packet in (*stream.encode(frame), *stream.encode(None)):  # None flushes the last frame
            payload += packet.size
            packets += 1
            container.mux(packet)
    return OpusFile(ogg.with_serial(buffer.getvalue()), payload, packets)


def opus_sound(data: bytes, most: int | None = None) -> Tensor:
    """What an Ogg Opus file, or the beginning of one, holds: without pre-skip and end padding.

    Args:
        data: the file; its last packets may be missing, a damaged page is an error.
        most: samples at 48 kHz after which to stop; None: all.

    Returns:
        (C,L) float32 at 48 kHz; (0,0) where nothing but (a part of) the headers is there.

    Raises:
        ValueError: no such file. ImportError: as `encode_opus`.
    """
    av = require_pyav("libopus")
    try:
        found, end = ogg.packets(data)
        if found and (len(found[0]) < 19 or found[0][:8] != b"OpusHead" or not found[0][9]):
            raise ValueError("its first packet is no OpusHead")
        if len(found) < 3:
            return torch.zeros(0, 0)
        C, skip = found[0][9], int.from_bytes(found[0][10:12], "little")
        limit = None if end is None else max(0, end - skip)
        limit = most if limit is None else limit if most is None else min(limit, most)
        # libopus by name: FFmpeg's own decoder, the default, loses up to 8 samples of a clip of one packet.
        decoder = av.CodecContext.create("libopus", "r")
        decoder.extradata = found[0]
        chunks, length = [], 0
        for packet in found[2:]:
            for frame in decoder.decode(av.Packet(packet)):
                chunks.append(frame.to_ndarray().reshape(-1, C))  # (l,C) int16
                length += len(chunks[-1])
            if limit is not None and length >= limit:
                break
    except (av.FFmpegError, ValueError) as e:
        raise ValueError(f"expected an Ogg Opus file, got {len(data)} bytes that libopus cannot read: {e}") from e
    sound = np.concatenate([np.zeros((0, C), np.int16), *chunks])[:limit].T
    order = np.argsort(OPUS_ORDER.get(C, range(C)))
    return torch.from_numpy(sound[order].astype(np.float32) / 32768)


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
    from torchaudio.functional import resample

    sound = opus_sound(data)
    if not sound.numel():
        raise ValueError("data: expected an Ogg Opus file with sound in it, got one without a frame")
    sound = resample(sound, 48000, sample_rate)
    if sound.shape[0] != 1 or abs(sound.shape[1] - num_samples) > 1:
        raise ValueError(
            f"expected a mono file of {num_samples} samples at {sample_rate} Hz, got {tuple(sound.shape)}; "
            "pass the clip's own rate and length"
        )
    return audio_io.fit_length(sound, num_samples)


def encode_mp3(clip: Tensor, bitrate_bps: int) -> bytes:
    """Encode sound with LAME at a constant bitrate: bare frames, without a tag or a file header.

    Args:
        clip: (C,L) float in [-1,1] at ``MP3_SETTINGS[bitrate_bps]`` Hz. One channel is mono, two are joint stereo;
            more are mono streams whose frames come in turn, which only `mp3_sound` plays.
        bitrate_bps: of one channel, a key of `MP3_SETTINGS`.

    Raises:
        ValueError: anything not as said. ImportError: the extra ``data`` (PyAV) is missing, or has no LAME.
    """
    _require_clip(clip)
    if bitrate_bps not in MP3_SETTINGS:
        raise ValueError(f"bitrate_bps: expected one of {tuple(MP3_SETTINGS)} for MP3, got {bitrate_bps}")
    av, sample_rate = require_pyav("libmp3lame"), MP3_SETTINGS[bitrate_bps]
    streams = []
    for part in [clip] if len(clip) <= 2 else clip[:, None]:
        encoder = av.CodecContext.create("libmp3lame", "w")
        encoder.sample_rate, encoder.layout, encoder.format = sample_rate, _layout(len(part)), "fltp"
        encoder.time_base = Fraction(1, sample_rate)
        encoder.bit_rate = bitrate_bps * len(part)
        encoder.options = {"compression_level": "2"}  # LAME's own advice for quality; 0 is slower, not better
        frame = _frame(av, part, "fltp", len(part), sample_rate)
        packets = (*encoder.encode(frame), *encoder.encode(None))
        streams.append(mp3_frames(b"".join(bytes(p) for p in packets), sample_rate)[0])
    return b"".join(frame for turn in zip(*streams, strict=True) for frame in turn)


def mp3_frames(data: bytes, sample_rate: int) -> tuple[list[bytes], int]:
    """The whole frames of a stream that may have been cut, and whether they have one channel or two.

    Raises:
        ValueError: something that is no frame of ``sample_rate`` Hz, or frames of one channel and of two.
    """
    found, at, counts = [], 0, set()
    while at + 4 <= len(data):
        word = int.from_bytes(data[at : at + 4], "big")
        version, layer, kbps, rate = word >> 19 & 3, word >> 17 & 3, word >> 12 & 15, word >> 10 & 3
        if word >> 21 != 0x7FF or version == 1 or layer != 1 or kbps in (0, 15) or rate == 3:
            raise ValueError(f"no MP3 frame at byte {at}")
        if MP3_RATES[version][rate] != sample_rate:
            raise ValueError(f"expected MP3 frames of {sample_rate} Hz, got {MP3_RATES[version][rate]} at byte {at}")
        low = version != 3
        size = (72000 if low else 144000) * MP3_KBPS[low][kbps] // sample_rate + (word >> 9 & 1)
        counts.add(1 if word >> 6 & 3 == 3 else 2)
        if at + size > len(data):
            break
        found.append(data[at : at + size])
        at += size
    if len(counts) > 1:
        raise ValueError("expected MP3 frames of one channel count, got mono and stereo")
    return found, max(counts, default=1)


def mp3_sound(data: bytes, sample_rate: int, channels: int | None = None) -> Tensor:
    """What `encode_mp3` wrote, or the beginning of it, without the delay: (C,L) float32 at ``sample_rate`` Hz.

    Args:
        channels: C; None: as many as a frame has. (C,0) where no frame is whole.

    Raises:
        ValueError: no such stream, or one of another C. ImportError: as `encode_mp3`.
    """
    av = require_pyav("mp3float")
    frames, per_frame = mp3_frames(data, sample_rate)
    C = channels or per_frame
    turns = C if C > 2 else 1
    if frames and per_frame * turns != C:
        raise ValueError(f"expected MP3 frames of {C} channels, got {per_frame} a frame")
    rows = []
    for turn in range(turns):
        decoder = av.CodecContext.create("mp3float", "r")
        mine = frames[turn : len(frames) // turns * turns : turns]
        try:
            packets = [*(av.Packet(f) for f in mine), None]
            chunks = [frame.to_ndarray() for p in packets for frame in decoder.decode(p)] if mine else []
        except av.FFmpegError as e:
            raise ValueError(f"expected an MP3 stream, got {len(data)} bytes that cannot be decoded: {e}") from e
        rows.append(np.concatenate([np.zeros((min(C, 2) if turns == 1 else 1, 0), np.float32), *chunks], 1))
    length = min(r.shape[1] for r in rows)
    return torch.from_numpy(np.concatenate([r[:, MP3_DELAY:length] for r in rows]))


def encode_codec2(clip: Tensor, mode: int) -> bytes:
    """Encode speech with Codec 2: frames back to back, those of several channels in turn.

    The frames are those of the program `c2enc`, but the last bits of modes 1300 and 700C are not filled up to a byte a
    frame, so that the bits spent are those of the mode.

    Args:
        clip: (C,L) float in [-1,1] at 8 kHz.
        mode: bits a second of one channel, of `CODEC2_MODES`.

    Raises:
        ValueError: anything not as said. ImportError: pycodec2 is missing.
    """
    _require_clip(clip)
    package = require_codec2(mode)
    size = package.Codec2(mode).samples_per_frame()
    frames = -(-(clip.shape[1] + codec2_delay(mode)) // size)
    sound = audio_io.fit_length(clip.detach().cpu().float(), frames * size)
    samples = (sound * 32767).round().clamp(-32768, 32767).to(torch.int16).numpy().reshape(len(clip), frames, size)
    rows = []
    for channel in samples:
        codec = package.Codec2(mode)  # it remembers what came before
        rows.append([np.frombuffer(codec.encode(frame), np.uint8) for frame in channel])
    turns = np.stack(rows, 1)  # (frames, C, bytes)
    return np.packbits(np.unpackbits(turns, axis=2)[..., : codec.bits_per_frame()]).tobytes()


def codec2_sound(data: bytes, mode: int, channels: int) -> Tensor:
    """What `encode_codec2` wrote, or the beginning of it, without the delay: (C,L) float32 at 8 kHz.

    Raises:
        ValueError: bytes on which the decoder fails. ImportError: as `encode_codec2`.
    """
    codec = require_codec2(mode).Codec2(mode)
    width, size = codec.bits_per_frame(), codec.samples_per_frame()
    frames = 8 * len(data) // (width * channels)
    if not frames:
        return torch.zeros(channels, 0)
    bits = np.unpackbits(np.frombuffer(data, np.uint8))[: frames * channels * width]
    turns = np.packbits(bits.reshape(frames, channels, width), axis=2)  # (frames, C, bytes)
    command = [sys.executable, "-c", CODEC2_DECODER, str(mode), *sys.path]
    rows = []
    for channel in range(channels):
        done = subprocess.run(command, input=turns[:, channel].tobytes(), capture_output=True, check=False)
        if done.returncode or len(done.stdout) != frames * size * 2:
            why = done.stderr.decode(errors="replace").strip()[-200:]
            raise ValueError(f"Codec 2 does not decode these {len(data)} bytes (exit code {done.returncode}): {why}")
        rows.append(np.frombuffer(done.stdout, np.int16)[codec2_delay(mode) :])
    return torch.from_numpy(np.stack(rows).astype(np.float32) / 32768)


def codec2_delay(mode: int) -> int:
    """Samples at 8 kHz by which Codec 2 is late."""
    return CODEC2_DELAY_700 if mode == 700 else CODEC2_DELAY


def require_codec2(mode: int) -> ModuleType:
    if mode not in CODEC2_MODES:
        raise ValueError(f"mode: expected one of {CODEC2_MODES} (700 is 700C), got {mode}")
    try:
        import pycodec2
    except ImportError as e:
        raise ImportError(f"Codec 2 needs pycodec2 ({e}): pip install 'mmtok[codecs]'") from e
    return pycodec2


def _frame(av: Any, samples: Tensor, sample_format: str, channels: int, sample_rate: int) -> Any:
    array = np.ascontiguousarray(samples.detach().cpu().float().numpy())
    frame = av.AudioFrame.from_ndarray(array, format=sample_format, layout=_layout(channels))
    frame.sample_rate = sample_rate
    frame.pts, frame.time_base = 0, Fraction(1, sample_rate)  # else Opus' end padding is announced 6.5 ms short
    return frame


def _layout(channels: int) -> str:
    return {1: "mono", 2: "stereo"}.get(channels, f"{channels} channels")


def _require_clip(clip: Tensor) -> None:
    most = audio_io.MAX_CHANNELS
    if clip.ndim != 2 or 0 in clip.shape or clip.shape[0] > most or not clip.is_floating_point():
        raise ValueError(
            f"clip: expected float (C,L) with C up to {most}, got {clip.dtype} {tuple(clip.shape)}; "
            "divide int16 by 32768"
        )
    if not bool(torch.isfinite(clip).all()) or float(clip.abs().max()) > 1 + 1e-3:
        raise ValueError(
            f"clip: expected finite samples in [-1,1], got up to {float(clip.abs().max()):.4g}; rescale it"
        )


def require_pyav(codec: str) -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ImportError("Opus and MP3 need the extra 'data' (PyAV): pip install 'mmtok[data]'") from error
    if codec not in av.codecs_available:
        raise ImportError(f"this PyAV was built without {codec}; install the wheel: pip install 'mmtok[data]'")
    return av
