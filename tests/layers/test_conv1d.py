"""1-D convolutions: exact lengths, blindness to padding, and no look-ahead where causal."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmtok.layers.conv1d import Conv1d, ConvTranspose1d, Snake, zero_past

CAUSAL = pytest.mark.parametrize("causal", [False, True])
STRIDES = (1, 2, 3, 4, 5, 7, 8)


@CAUSAL
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("frames", [1, 2, 13])
def test_lengths_are_exact(stride: int, frames: int, causal: bool):
    x = torch.randn(2, 3, frames * stride)
    for kernel in {stride, 2 * stride, 2 * stride + 1}:
        assert Conv1d(3, 4, kernel, stride=stride, causal=causal)(x).shape == (2, 4, frames)
    assert ConvTranspose1d(4, 3, stride, causal=causal)(torch.randn(2, 4, frames)).shape == (2, 3, frames * stride)


@CAUSAL
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (4, 1), (7, 1), (7, 3), (7, 9), (3, 2)])
def test_dilated_lengths_are_exact(kernel: int, dilation: int, causal: bool):
    assert Conv1d(3, 4, kernel, dilation=dilation, causal=causal)(torch.randn(1, 3, 11)).shape == (1, 4, 11)


@pytest.mark.parametrize("stride", [2, 3, 4, 5, 8])
def test_centred_down_sampling_pads_as_dac_does(stride: int):
    """DAC pads ceil(stride / 2) on both sides (arXiv 2306.06546, released code); the right surplus is never read."""
    layer = Conv1d(2, 2, 2 * stride, stride=stride)
    x = torch.randn(1, 2, 6 * stride)
    pad = -(-stride // 2)
    assert torch.allclose(layer(x), layer.conv(F.pad(x, (pad, pad)))[..., :6], atol=1e-6)


@CAUSAL
@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("up", [False, True])
def test_padding_changes_nothing(stride: int, causal: bool, up: bool):
    frames = torch.tensor([7, 4, 1, 0])
    if up:
        layer, lengths, ratio = ConvTranspose1d(3, 4, stride, causal=causal), frames, stride
    else:
        layer, lengths, ratio = Conv1d(3, 4, 2 * stride + 1, stride=stride, causal=causal), frames * stride, 1 / stride
    x = torch.randn(4, 3, int(lengths.max()), dtype=torch.float64)
    layer.double()
    batch = layer(x, lengths)
    for i, length in enumerate(lengths.tolist()):
        if length:
            alone = layer(x[i : i + 1, :, :length])
            assert torch.allclose(batch[i, :, : round(length * ratio)], alone[0], atol=1e-12)
    if not causal and not (up and stride == 1):  # those look ahead, so without lengths the padding would be heard
        valid = round(int(lengths[1]) * ratio)
        assert not torch.allclose(layer(x)[1, :, :valid], batch[1, :, :valid])


@CAUSAL
@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_only_centred_layers_look_ahead(stride: int, causal: bool, up: bool):
    torch.manual_seed(0)
    if up:
        layer, now, ratio = ConvTranspose1d(2, 2, stride, causal=causal), 6, stride
    else:
        layer, now, ratio = Conv1d(2, 2, 2 * stride + 1, stride=stride, causal=causal), 6 * stride, 1 / stride
    x = torch.randn(1, 2, 2 * now)
    changed = x.clone()
    changed[..., now:] += 1
    before = round(now * ratio)
    same = torch.equal(layer(x)[..., :before], layer(changed)[..., :before])
    assert same == causal or (up and stride == 1)  # a transposed convolution of stride 1 need not look ahead


def test_up_sampling_is_the_transpose_of_down_sampling():
    """With one kernel, <up(x), y> == <x, down(y)>: neither is shifted against the other, odd strides included."""
    for stride in STRIDES:
        up = ConvTranspose1d(1, 1, stride, weight_norm=False)
        down = Conv1d(1, 1, 2 * stride, stride=stride, weight_norm=False)
        with torch.no_grad():
            down.conv.weight.copy_(up.conv.weight)
        x, y = torch.randn(1, 1, 9), torch.randn(1, 1, 9 * stride)
        x[..., [0, -1]] = 0  # away from the borders
        assert torch.allclose((up(x) * y).sum(), (x * down(y)).sum(), atol=1e-5), stride


def test_zero_past_and_snake():
    x = torch.ones(2, 3, 4)
    assert zero_past(x, None) is x
    assert zero_past(x, torch.tensor([4, 1])).sum((1, 2)).tolist() == [12, 3]
    assert zero_past(x.bfloat16(), torch.tensor([0, 9])).dtype == torch.bfloat16
    snake = Snake(3)
    with torch.no_grad():
        snake.alpha.copy_(torch.tensor([[0.5], [1.0], [2.0]]))
    y = torch.randn(2, 3, 5)
    assert torch.allclose(snake(y), y + torch.sin(snake.alpha * y) ** 2 / snake.alpha, atol=1e-6)
