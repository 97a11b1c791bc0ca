"""The receptive field is measured, not believed: what one changed sample or frame reaches, against what is stated."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtok.audio.codec import AudioCodec
from mmtok.audio.pieces import receptive_frames

CONFIGS: dict[str, dict[str, Any]] = {
    "centred": {"strides": (3, 4), "kernel_size": 5},
    "causal": {"strides": (3, 4), "kernel_size": 5, "causal": True},
    "odd": {"strides": (5, 2, 3), "kernel_size": 3, "dilations": (1,)},
    "stft": {"strides": (8, 2, 2), "kernel_size": 3, "front": "stft"},
    "stft-causal": {"strides": (8, 2, 2), "kernel_size": 3, "front": "stft", "causal": True},
    "stft-one-hop": {"strides": (8,), "kernel_size": 3, "front": "stft"},
    "stft-one-hop-causal": {"strides": (8,), "kernel_size": 3, "front": "stft", "causal": True},
}
EVERY = pytest.mark.parametrize("name", CONFIGS)


def config(name: str) -> dict[str, Any]:
    sizes = {"encoder_width": 4, "decoder_width": 16, "latent_dim": 5, "num_codebooks": 2, "codebook_size": 16}
    return {**sizes, "dilations": (1, 2), **CONFIGS[name]}


@functools.cache
def codec(name: str) -> AudioCodec:
    torch.manual_seed(0)
    return AudioCodec(**config(name)).eval()


def reached(a: Tensor, b: Tensor) -> tuple[int, int]:
    """First and last position of (..., L) at which a and b differ at all."""
    where = (a != b).flatten(0, -2).any(0).nonzero()[:, 0]
    return int(where.min()), int(where.max())


@EVERY
@torch.no_grad()
def test_the_encoder_reads_exactly_what_it_states(name: str):
    tok = codec(name)
    before, past = tok.encoder_field
    hop, T = tok.hop_length, 2 * tok.margin + 3
    middle = (T // 2) * hop
    x = torch.randn(1, 1, T * hop, generator=torch.Generator().manual_seed(1)) * 0.1
    z = tok.latent(x).transpose(1, 2)
    earliest, latest = [], []
    for offset in range(hop):  # each phase of one frame: the extremes of all are the field
        changed = x.clone()
        changed[..., middle + offset] += 1e3  # large, so that float32 keeps a trace of it through many layers
        first, last = reached(z, tok.latent(changed).transpose(1, 2))
        earliest.append(middle + offset - ((first + 1) * hop - 1))  # how far past a frame's own samples it reads
        latest.append(last * hop - (middle + offset))  # how far before them
    stft = tok.spectrum is not None  # the first sample of a Hann window is 0, so a frame sees one sample less
    assert max(latest) == before - stft
    assert max(earliest) == past
    assert tok.margin * hop >= max(before, past)
    if tok.streams:
        assert past == tok.encode_lookahead


@EVERY
@torch.no_grad()
def test_the_decoder_reads_exactly_what_it_states(name: str):
    tok = codec(name)
    before, past = tok.decoder_field
    hop, T = tok.hop_length, 2 * tok.margin + 3
    z = torch.randn(1, T, 5, generator=torch.Generator().manual_seed(2))
    changed = z.clone()
    changed[:, T // 2] += 1e3
    first, last = reached(tok.sound(z), tok.sound(changed))
    assert last // hop - T // 2 == before and T // 2 - first // hop == past
    assert tok.margin >= max(before, past)
    if tok.streams:
        assert T // 2 * hop - first <= tok.decode_lookahead


@EVERY
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@torch.no_grad()
def test_pieces_of_any_number_of_frames_equal_the_whole(name: str, size: int, monkeypatch: pytest.MonkeyPatch):
    tok = codec(name)
    T = 2 * tok.margin + 5
    lengths = torch.tensor([T, tok.margin + 2, 1])
    x = torch.randn(3, 1, T * tok.hop_length, generator=torch.Generator().manual_seed(3)) * 0.1
    codes = tok.encode_samples(x, lengths * tok.hop_length, None)
    y = tok.decode_samples(codes, lengths)
    assert len(codes.unique()) > 4
    monkeypatch.setattr(tok, "chunk_frames", size)
    valid = torch.arange(T) < lengths[:, None]
    pieces = tok.encode_samples(x, lengths * tok.hop_length, None)
    assert torch.equal(pieces.transpose(1, 2)[valid], codes.transpose(1, 2)[valid])
    sound = tok.decode_samples(codes, lengths)
    heard = valid.repeat_interleave(tok.hop_length, 1)
    assert torch.allclose(sound[:, 0][heard], y[:, 0][heard], atol=1e-5, rtol=0)


@EVERY
@torch.no_grad()
def test_a_margin_one_frame_smaller_would_be_heard(name: str, monkeypatch: pytest.MonkeyPatch):
    """Else the margin would cost more than it must, and the test above could not fail."""
    tok = codec(name)
    T = 2 * tok.margin + 5
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(1, T, 5, generator=generator)
    hop, start = tok.hop_length, tok.margin + 1
    x = torch.randn(1, 1, T * hop, generator=generator)

    def differ(margin: int) -> bool:
        a, b = start - margin, start + 1 + margin
        latent = tok.latent(x[..., a * hop : b * hop])[:, margin], tok.latent(x)[:, start]
        part = slice(margin * hop, (margin + 1) * hop)
        sound = tok.sound(z[:, a:b])[..., part], tok.sound(z)[..., start * hop : (start + 1) * hop]
        return any(not torch.allclose(u, v, atol=1e-6, rtol=0) for u, v in (latent, sound))

    assert differ(tok.margin - 1) and not differ(tok.margin)


@pytest.mark.parametrize("name", ["centred", "causal", "odd"])
def test_the_bound_from_sizes_alone_covers_the_exact_field(name: str):
    own = config(name)
    assert receptive_frames(own["strides"], own["dilations"], own["kernel_size"]) >= codec(name).margin
