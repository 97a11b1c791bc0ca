"""Mimi as a stream: any chunking of frames gives the codes and the sound of the whole, in bounded memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtok.audio.mimi import Mimi
from mmtok.layers.conv1d import Past
from mmtok.layers.stream_transformer import WindowAttention
from mmtok.tokens import Tokens

FRAMES, CONTEXT, Q = 30, 6, 4  # positions of the transformers: 2 a frame, so the window is 3 of the 30 frames


def tiny(chunk_seconds: float = 10.0, context: int = CONTEXT) -> Mimi:
    torch.manual_seed(0)
    mimi = Mimi(24000, (2, 3, 4), 4, 16, 2, 2, 32, context, Q, 32, 8, chunk_seconds=chunk_seconds)
    with torch.no_grad():
        for name, p in mimi.named_parameters():
            if "scale" in name:
                p.fill_(0.7)  # published transformers start nearly as the identity, which would hide their mistakes
            elif "qkv" in name or "units" in name:
                p.mul_(3.0)
        mimi.train()(torch.randn(8, 1, 20 * mimi.hop_length))  # k-means puts the codebooks among the latents
    return mimi.eval()


MIMI = tiny()
HOP = MIMI.hop_length
SOUND = torch.randn(2, 1, FRAMES * HOP, generator=torch.Generator().manual_seed(1))
CODES = MIMI.quantizer.encode(MIMI.latent(SOUND))  # without a state
WAVE = MIMI.sound(MIMI.quantizer.decode(CODES)).detach()


def push(mimi: Mimi, sizes: list[int], num_codebooks: int | None = None) -> tuple[Tensor, Tensor, Past]:
    """Frames pushed through encoder and decoder in pieces of these sizes, by turns and with one state."""
    past, start, codes, sound = Past(), 0, [], []
    for size in sizes:
        codes.append(mimi.encode_stream(SOUND[..., start * HOP : (start + size) * HOP], past, num_codebooks))
        sound.append(mimi.decode_stream(codes[-1], past))
        assert codes[-1].shape[-1] == size and sound[-1].shape == (2, 1, size * HOP)
        start += size
    return torch.cat(codes, 2), torch.cat(sound, 2), past


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_any_chunking_gives_the_whole(sizes: list[int]):
    sizes = [*sizes, 1, 3]
    T = min(FRAMES, sum(sizes))
    while sum(sizes) > T:
        sizes[-1 if sizes[-1] else sizes.index(max(sizes))] -= 1
    codes, sound, _ = push(MIMI, sizes)
    assert torch.equal(codes, CODES[..., :T])
    assert torch.allclose(sound, WAVE[..., : T * HOP], atol=1e-5)


def test_the_codes_are_alive_and_the_window_matters():
    assert all(len(CODES[:, q].unique()) > 8 for q in range(Q)) and WAVE.std() > 1e-2
    wider = tiny(context=FRAMES * 2)
    wider.load_state_dict(MIMI.state_dict())
    other = wider.quantizer.encode(wider.latent(SOUND))
    assert torch.equal(other[..., :3], CODES[..., :3]) and not torch.equal(other, CODES)


def test_frame_by_frame_with_fewer_levels():
    codes, sound, _ = push(MIMI, [1] * FRAMES, num_codebooks=2)
    assert torch.equal(codes, CODES[:, :2])
    assert torch.allclose(sound, MIMI.decode_samples(CODES[:, :2], torch.full((2,), FRAMES)), atol=1e-5)


@torch.no_grad()
def test_the_state_stays_bounded():
    past, sizes = Past(), []
    for i in range(60):
        codes = MIMI.encode_stream(SOUND[..., :HOP] * (i % 7), past)
        MIMI.decode_stream(codes, past)
        sizes.append(sum(t.untyped_storage().nbytes() for t in past.kept.values()))
    assert len(set(sizes[CONTEXT // 2 :])) == 1  # full after the window, and never larger
    kept = [t for layer, t in past.kept.items() if isinstance(layer, WindowAttention)]
    assert len(kept) == 4 and all(t.shape[3] == CONTEXT - 1 for t in kept)


def test_offline_in_pieces_equals_the_whole():
    for seconds in (0.0, 0.005, 0.03):  # 1, 2 and 15 frames at once
        pieces = tiny(seconds)
        pieces.load_state_dict(MIMI.state_dict())
        assert pieces.stream_frames == max(1, int(seconds * 24000 / HOP)) < FRAMES
        lengths = torch.full((2,), FRAMES)
        codes = pieces.encode_samples(SOUND, lengths * HOP, None)
        assert torch.equal(codes, CODES) and torch.allclose(pieces.decode_samples(codes, lengths), WAVE, atol=1e-5)


def test_the_streamers_take_any_number_of_samples():
    clip = SOUND[0, :, : 9 * HOP + 5].numpy() * 0.2
    whole, encoder, decoder = MIMI.encode(clip, 24000), MIMI.streamer(), MIMI.decode_streamer()
    pieces = [
        encoder.push(clip[:, a:b]) for a, b in itertools.pairwise((0, 1, HOP - 1, 3 * HOP, 8 * HOP + 7, 9 * HOP + 5))
    ]
    tokens = [t for t in (*pieces, encoder.flush()) if t is not None]
    assert torch.equal(Tokens.join(tokens).codes, whole.codes)
    sound = torch.cat([*(decoder.push(t) for t in tokens), decoder.flush()], 1)
    assert torch.allclose(sound, MIMI.decode(whole)[0], atol=1e-5)
    assert encoder.latency_samples == HOP and decoder.latency_samples == 0


def test_misuse_is_refused():
    past = Past()
    with pytest.raises(ValueError, match=rf"x: expected \(B, 1, n \* {HOP}\) samples, got \(2, 1, {HOP - 1}\)"):
        MIMI.encode_stream(SOUND[..., : HOP - 1], past)
    assert not past.kept
    codes = MIMI.encode_stream(SOUND[..., :HOP], past)
    MIMI.decode_stream(codes, past)
    with pytest.raises(ValueError, match="expected 2 streams, as in the call before, got 1"):
        MIMI.encode_stream(SOUND[:1, :, :HOP], past)
    with pytest.raises(ValueError, match="expected 2 streams, as in the call before, got 1"):
        MIMI.decode_stream(codes[:1], past)
