"""The codec's stacks: exact lengths, padded batch items equal to themselves alone, causality, the receptive field."""

from __future__ import annotations

import pytest
import torch

from mmtok.audio.pieces import pieces, receptive_frames
from mmtok.layers.seanet import Decoder, Encoder, hop_length

CAUSAL = pytest.mark.parametrize("causal", [False, True])
STRIDES = ((2, 5), (3, 2, 2), (4,))


def stacks(strides: tuple[int, ...], causal: bool) -> tuple[Encoder, Decoder]:
    torch.manual_seed(0)
    encoder = Encoder(1, 4, strides, 6, (1, 3), 5, causal)
    decoder = Decoder(1, 16, strides[::-1], 6, (1, 3), 5, causal)
    return encoder.eval().double(), decoder.eval().double()


@CAUSAL
@pytest.mark.parametrize("strides", STRIDES)
@torch.no_grad()
def test_a_padded_item_equals_itself_alone(strides: tuple[int, ...], causal: bool):
    encoder, decoder = stacks(strides, causal)
    hop, frames = hop_length(strides), torch.tensor([23, 9, 1])
    x = torch.randn(3, 1, 23 * hop, dtype=torch.float64)  # what lies past an item's length is noise, not silence
    z = encoder(x, frames * hop)
    z_q = torch.randn(3, 6, 23, dtype=torch.float64)
    y = decoder(z_q, frames)
    assert z.shape == (3, 6, 23) and y.shape == (3, 1, 23 * hop)
    for i, T in enumerate(frames.tolist()):
        alone = encoder(x[i : i + 1, :, : T * hop])
        assert alone.abs().max() > 1e-3 and torch.allclose(z[i, :, :T], alone[0], atol=1e-12)
        alone = decoder(z_q[i : i + 1, :, :T])
        assert alone.abs().max() > 1e-5 and torch.allclose(y[i, :, : T * hop], alone[0], atol=1e-12)


@CAUSAL
@pytest.mark.parametrize("strides", STRIDES)
@torch.no_grad()
def test_causal_stacks_never_look_ahead(strides: tuple[int, ...], causal: bool):
    encoder, decoder = stacks(strides, causal)
    hop = hop_length(strides)
    x, z = torch.randn(1, 1, 40 * hop).double(), torch.randn(1, 6, 40).double()
    later_x, later_z = x.clone(), z.clone()
    later_x[..., 20 * hop :] += 1
    later_z[..., 20:] += 1
    assert torch.equal(encoder(x)[..., :20], encoder(later_x)[..., :20]) == causal
    assert torch.equal(decoder(z)[..., : 20 * hop], decoder(later_z)[..., : 20 * hop]) == causal


@CAUSAL
@pytest.mark.parametrize("strides", STRIDES)
def test_the_receptive_field_is_bounded_and_not_wildly_overstated(strides: tuple[int, ...], causal: bool):
    encoder, decoder = stacks(strides, causal)
    margin, hop = receptive_frames(strides, (1, 3), 5), hop_length(strides)
    T = 4 * margin
    x = torch.randn(1, 1, T * hop, dtype=torch.float64, requires_grad=True)
    encoder(x)[..., 2 * margin].sum().backward()
    assert x.grad is not None
    seen = x.grad[0, 0].nonzero()[:, 0] // hop
    z = torch.randn(1, 6, T, dtype=torch.float64, requires_grad=True)
    decoder(z)[..., 2 * margin * hop : (2 * margin + 1) * hop].sum().backward()
    assert z.grad is not None
    read = z.grad[0].abs().sum(0).nonzero()[:, 0]
    for reached in (seen, read):
        assert 2 * margin - int(reached.min()) <= margin and int(reached.max()) - 2 * margin <= margin
    widest = max(2 * margin - int(seen.min()), 2 * margin - int(read.min()))
    assert widest >= margin / 4


def test_pieces_cover_everything_once():
    for T in (1, 5, 12, 13):
        for size, margin in ((5, 2), (1, 0), (20, 3)):
            parts = pieces(T, size, margin)
            assert [p[0] for p in parts] == list(range(0, T, size)) and parts[-1][1] == T
            for start, stop, left, right in parts:
                assert 0 < stop - start <= size and left == min(margin, start) and right == min(margin, T - stop)


def test_a_decoder_width_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="decoder width: expected a multiple of 4, got 6"):
        Decoder(1, 6, (2, 2), 4)
