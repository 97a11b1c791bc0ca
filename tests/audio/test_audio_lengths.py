"""Sound of every length, rate, level and channel count goes in, and its exact size comes out (facts 14.2)."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtok.audio.codec import AudioCodec
from mmtok.audio.dac import DAC
from mmtok.audio.encodec import EnCodec
from mmtok.audio.mimi import Mimi
from mmtok.audio.xcodec import XCodec, quantizer_preset
from mmtok.tokenizer import AudioTokenizer

# Another codec joins the laws below with a line: a function that builds a tiny one for 16 kHz with 320 samples a frame.
RATE = 16000
SIZES: dict[str, Any] = {
    "encoder_width": 2,
    "decoder_width": 16,
    "latent_dim": 4,
    "num_codebooks": 2,
    "codebook_size": 16,
}
SAMPLES = SIZES | {"strides": (8, 5, 4, 2), "dilations": (1,), "kernel_size": 3}
STFT = SIZES | {"strides": (80, 2, 2), "dilations": (1,), "kernel_size": 3, "front": "stft"}
CODECS = {
    "centred": lambda: AudioCodec(**SAMPLES),
    "causal": lambda: AudioCodec(**SAMPLES, causal=True),
    "stft": lambda: AudioCodec(**STFT),
    "stft-causal": lambda: AudioCodec(**STFT, causal=True),
    "dac": lambda: DAC(RATE, (2, 4, 5, 8), 2, 16, num_codebooks=2, codebook_size=16, codebook_dim=4),
    "encodec": lambda: EnCodec(RATE, 2, 16, 4, shape={"width": 2, "strides": (2, 4, 5, 8)}),
    "mimi": lambda: Mimi(RATE, (4, 5, 8), 4, 16, 2, 2, 32, 12, 2, 16, 8),
    "xcodec": lambda: XCodec(
        **{k: v for k, v in STFT.items() if k not in ("latent_dim", "num_codebooks", "codebook_size")},
        acoustic_dim=4,
        semantic={"type": "whisper", "dim": 8, "num_layers": 1, "num_heads": 1, "window_frames": 100},
        quantizer=quantizer_preset("fixed", {"num_codebooks": 2, "codebook_size": 16}),
    ),
}
EVERY = pytest.mark.parametrize("name", CODECS)


@functools.cache
def tokenizer(name: str) -> AudioTokenizer:
    torch.manual_seed(0)
    return CODECS[name]().eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).clamp(-4, 4) * 0.2


def comes_back(tok: AudioTokenizer, x: Tensor, rate: int = RATE) -> Tensor:
    """x (C, L) after encode and decode, its size and range checked."""
    tokens = tok.encode(x, rate)
    frames = math.ceil(math.ceil(x.shape[1] * tok.sample_rate / rate) / tok.hop_length)
    assert tokens.lengths.tolist() == [frames * x.shape[0]]
    tokens.check(tok.spec)
    y = tok.decode(tokens)
    assert isinstance(y, Tensor) and y.shape == (1, *x.shape) and bool(y.isfinite().all())
    return y[0]


@EVERY
@pytest.mark.parametrize("length", [1, 2, 319, 320, 321, 641, 4801])
def test_every_length_comes_back(name: str, length: int):
    comes_back(tokenizer(name), noise(1, length))


@EVERY
@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 48000])
def test_every_rate_comes_back(name: str, rate: int):
    for length in (1, rate // 50 + 1):
        comes_back(tokenizer(name), noise(2, length, seed=rate), rate)


@EVERY
def test_channels_come_back_each_as_if_alone(name: str):
    tok, x = tokenizer(name), noise(3, 999)
    y = comes_back(tok, x)
    for c in range(3):
        assert torch.allclose(y[c], comes_back(tok, x[c : c + 1])[0], atol=1e-6)
    assert not torch.allclose(y[0], y[1], atol=1e-3)


@EVERY
@pytest.mark.parametrize("kind", ["silence", "constant", "clipped", "square", "quiet", "one sample"])
def test_extreme_sound_comes_back_finite(name: str, kind: str):
    L = 1600
    one = torch.zeros(1, L)
    one[0, 700] = 1.0
    x = {
        "silence": torch.zeros(1, L),
        "constant": torch.full((1, L), 0.9),
        "clipped": (noise(1, L) * 20).clamp(-1, 1),
        "square": torch.where(torch.arange(L) // 50 % 2 == 0, 1.0, -1.0)[None],
        "quiet": noise(1, L) * 1e-6,
        "one sample": one,
    }[kind]
    y = comes_back(tokenizer(name), x)
    assert float(y.abs().max()) < 100


@EVERY
def test_clips_of_very_different_lengths_in_one_batch(name: str):
    tok = tokenizer(name)
    xs = [noise(1, 16000, seed=1), noise(2, 1, seed=2), noise(1, 320, seed=3), noise(3, 321, seed=4)]
    tokens = tok.encode(xs, RATE)
    decoded = tok.decode(tokens)
    assert isinstance(decoded, list) and tokens.lengths.tolist() == [50, 2, 1, 6]
    for i, x in enumerate(xs):
        alone = tok.encode(x, RATE)
        assert torch.equal(tokens[i].codes, alone.codes) and decoded[i].shape == x.shape
        assert torch.allclose(decoded[i], tok.decode(alone)[0], atol=1e-6)


def test_ten_minutes_come_back_without_seams():
    """In pieces of a minute; of the causal codec, whose margin is all on one side."""
    tok = tokenizer("stft-causal")
    second = noise(1, RATE, seed=5)
    x = second.repeat(1, 600)  # every second is alike, so that the codes of one tell those of all
    tokens = tok.encode(x, RATE)
    assert tokens.lengths.tolist() == [30000]
    inner = tokens.codes[0, :, 50:-50].unflatten(1, (-1, 50))
    assert torch.equal(inner, inner[:, :1].expand_as(inner)) and len(inner.unique()) > 2
    y = tok.decode(tokens)
    assert isinstance(y, Tensor) and y.shape == (1, 1, 600 * RATE) and bool(y.isfinite().all())
    middle = y[0, 0, RATE:-RATE].unflatten(0, (-1, RATE))
    assert torch.allclose(middle, middle[:1].expand_as(middle), atol=1e-5)
