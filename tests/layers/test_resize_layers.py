"""Halving and doubling of the image grid: shapes, shortcuts and positions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmtok.layers.resize import RESIZE, DCDown, DCUp, LinearDown, LinearUp, grid_positions


@pytest.mark.parametrize("kind", sorted(RESIZE))
@pytest.mark.parametrize(("h", "w"), [(2, 2), (4, 6), (10, 2)])
def test_shapes(kind: str, h: int, w: int):
    down, up = RESIZE[kind]
    x = torch.randn(3, h * w, 8)
    half = down(8)(x, h, w)
    assert half.shape == (3, h * w // 4, 8)
    assert up(8)(half, h // 2, w // 2).shape == x.shape


def silence(layer: nn.Module) -> None:
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()


def test_shortcuts_average_and_repeat():
    down, up = DCDown(8), DCUp(8)
    silence(down)
    silence(up)
    x = torch.randn(2, 4 * 6, 8)
    picture = x.transpose(1, 2).reshape(2, 8, 4, 6)
    want = F.pixel_unshuffle(picture, 2).reshape(2, 8, 4, 2, 3).mean(2)  # groups of 4 neighbouring channels
    assert torch.allclose(down(x, 4, 6), want.flatten(2).transpose(1, 2), atol=1e-6)
    grown = up(x, 4, 6).transpose(1, 2).reshape(2, 8, 8, 12)
    assert torch.equal(grown, picture.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_linear_resizing_reads_its_own_two_by_two_tokens():
    h, w, down, up = 4, 6, LinearDown(8), LinearUp(8)
    x = torch.randn(1, h * w, 8)
    changed = x.clone()
    changed[0, 2 * w + 5] += 1  # row 2, column 5 -> row 1, column 2
    moved = (down(x, h, w) != down(changed, h, w)).any(-1)[0].nonzero()[:, 0].tolist()
    assert moved == [1 * 3 + 2]
    moved = (up(x, h, w) != up(changed, h, w)).any(-1)[0].nonzero()[:, 0].tolist()
    assert moved == [4 * 12 + 10, 4 * 12 + 11, 5 * 12 + 10, 5 * 12 + 11]


def test_positions_span_the_same_range_at_every_size():
    for h, w in ((4, 6), (1, 9), (64, 64), (2, 2)):
        at = grid_positions(h, w, 64)
        assert at.shape == (h * w, 2) and float(at.min()) == 0
        assert float(at[-1, 0]) == (63 if h > 1 else 0) and float(at[-1, 1]) == (63 if w > 1 else 0)
    at = grid_positions(3, 2, 5).reshape(3, 2, 2)
    assert at[:, 0, 0].tolist() == [0, 2, 4] and at[0, :, 1].tolist() == [0, 4]  # rows first, row-major
