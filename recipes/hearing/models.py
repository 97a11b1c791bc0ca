"""Small codecs and their trainings, which the audio recipes compare and ship."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mmtok.audio.xcodec import XCodec, quantizer_preset
from mmtok.data.packed import AudioBatches, Packed, audio_reader, pack
from mmtok.data.sources import find_sources
from mmtok.losses.spectral import CompressedSpectrumLoss, MultiScaleMelLoss, MultiScaleSTFTLoss
from mmtok.tokenizer import AudioTokenizer
from mmtok.training import AudioObjective

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from imaging.grid import Training

RATE = 16000
ASSETS = Path(__file__).resolve().parents[2] / "mmtok" / "assets"
SEMANTIC_WEIGHT = 3.0  # of standardised features; 100 as released is for HuBERT's, whose variance is far below one
# Convolutions on a short-time Fourier transform: 2.5 times as much sound a second on a CPU as on samples (LOG.md).
STFT = {"front": "stft", "strides": (80, 2, 2), "kernel_size": 3}
SMALL = {**STFT, "encoder_width": 96, "decoder_width": 512, "acoustic_dim": 96}
SEMANTIC_CONV = {"channel_ratios": (0.5,), "strides": (1,), "dilations": (1,)}
TINY = {"front": "stft", "strides": (80, 2, 2), "kernel_size": 3, "encoder_width": 8, "decoder_width": 32}
TINY_TEACHER = {"type": "whisper", "dim": 16, "num_layers": 1, "num_heads": 2}


def small_xcodec(semantic: bool, smoke: bool = False, preset: str = "fixed") -> XCodec:
    """The X-Codec that a CPU can train, with the shipped Whisper teacher, or its twin without the semantic branch."""
    if smoke:
        numbers = quantizer_preset(preset, {"dim": 16, "num_codebooks": 2, "codebook_size": 16})
        return XCodec(**TINY, acoustic_dim=16, semantic=TINY_TEACHER if semantic else None, quantizer=numbers)
    teacher = {"type": "whisper"} if semantic else None
    conv = SEMANTIC_CONV if semantic else None
    return XCodec(**SMALL, semantic=teacher, semantic_conv=conv, quantizer=quantizer_preset(preset, {"dim": 128}))


def objective(semantic: bool = False) -> AudioObjective:
    """Mel, STFT and compressed-spectrum distances; no discriminators, which a run of minutes cannot use."""
    return AudioObjective(
        # Floors near what can be heard: the usual ones ask for the noise 100 dB below speech, which a short run cannot.
        MultiScaleMelLoss(RATE, floor=1e-3),
        MultiScaleSTFTLoss(floor=1e-4),
        CompressedSpectrumLoss(),
        mel_weight=1.0,
        spectrum_weight=30.0,
        wave_weight=5.0,
        aux_weights={"semantic": SEMANTIC_WEIGHT} if semantic else None,
    )


def training_speech(data: Path | str, cache: Path, smoke: bool = False) -> Packed:
    """The training split of ``data``, decoded once to mono 16 kHz."""
    sources = find_sources(ASSETS if smoke else data, "audio")
    training = [s for s in sources if s.split == "train"] or sources
    return pack([s.path for s in training], cache, audio_reader(RATE))


def training_of(
    tokenizer: AudioTokenizer, packed: Packed, clips: int, seconds: float, seed: int, smoke: bool = False
) -> Training:
    """``clips`` clips of ``seconds`` a step."""
    seconds = 0.5 if smoke else seconds
    semantic = isinstance(tokenizer, XCodec) and tokenizer.teacher is not None
    return Training(
        tokenizer,
        objective(semantic),
        AudioBatches(packed, 2 if smoke else clips, int(seconds * RATE), seed),
        compiled=() if smoke else (tokenizer.encoder, tokenizer.decoder),  # pyright: ignore[reportArgumentType]
        codebook_batches=2 if smoke else 20,
    )


def seeded(seed: int) -> None:
    """Weights must not depend on what was built before them."""
    torch.manual_seed(seed)
