"""The convolutional encoder and decoder of neural audio codecs: DAC's blocks (arXiv 2306.06546) in SEANet's layout.

Widths double at each stride. ``lengths`` is counted in samples at the encoder's input and in frames at the decoder's.
``past`` is the state of a stream, for causal stacks (`mmtok.layers.conv1d.Past`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from mmtok.layers.conv1d import Conv1d, ConvTranspose1d, Past, Snake


class ResidualUnit(nn.Module):
    """Snake, dilated convolution, Snake, 1x1 convolution, added to the input."""

    def __init__(self, channels: int, dilation: int, kernel_size: int, causal: bool, weight_norm: bool):
        super().__init__()
        self.snake1 = Snake(channels)
        self.conv1 = Conv1d(channels, channels, kernel_size, dilation=dilation, causal=causal, weight_norm=weight_norm)
        self.snake2 = Snake(channels)
        # A quiet branch at the start: otherwise every unit doubles the variance, a thousandfold over a decoder.
        self.conv2 = Conv1d(channels, channels, 1, causal=causal, weight_norm=weight_norm, gain=0.1)

    def forward(self, x: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        return x + self.conv2(self.snake2(self.conv1(self.snake1(x), lengths, past)))


class Encoder(nn.Module):
    """(B, channels, L) -> (B, out_dim, L / prod(strides)), for L a multiple of the product.

    Args:
        channels: of the sound.
        width: channels at the sample rate; they double at each stride.
        strides: down-sampling factors, in order.
        out_dim: width of the latent.
        dilations: one residual unit for each, before every stride.
        kernel_size: of the residual units and of the first layer.
        causal: no look-ahead at any layer.
        weight_norm: reparametrise every convolution (arXiv 1602.07868).
    """

    def __init__(
        self,
        channels: int,
        width: int,
        strides: Sequence[int],
        out_dim: int,
        dilations: Sequence[int] = (1, 3, 9),
        kernel_size: int = 7,
        causal: bool = False,
        weight_norm: bool = True,
    ):
        super().__init__()
        self.strides = tuple(strides)
        self.first = Conv1d(channels, width, kernel_size, causal=causal, weight_norm=weight_norm)
        self.blocks = nn.ModuleList()
        for stride in self.strides:
            block = nn.Module()
            block.units = nn.ModuleList(ResidualUnit(width, d, kernel_size, causal, weight_norm) for d in dilations)
            block.snake = Snake(width)
            block.down = Conv1d(width, 2 * width, 2 * stride, stride=stride, causal=causal, weight_norm=weight_norm)
            self.blocks.append(block)
            width *= 2
        self.snake = Snake(width)
        self.last = Conv1d(width, out_dim, 3, causal=causal, weight_norm=weight_norm)

    def forward(self, x: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        x = self.first(x, lengths, past)
        for block, stride in zip(self.blocks, self.strides, strict=True):
            for unit in block.units:  # pyright: ignore[reportGeneralTypeIssues]
                x = unit(x, lengths, past)
            x = block.down(block.snake(x), lengths, past)  # pyright: ignore[reportCallIssue]
            lengths = None if lengths is None else lengths // stride
        return self.last(self.snake(x), lengths, past)


class Decoder(nn.Module):
    """(B, in_dim, T) -> (B, channels, T * prod(strides)); the encoder's mirror, widths halving from ``width``."""

    def __init__(
        self,
        channels: int,
        width: int,
        strides: Sequence[int],
        in_dim: int,
        dilations: Sequence[int] = (1, 3, 9),
        kernel_size: int = 7,
        causal: bool = False,
        weight_norm: bool = True,
    ):
        super().__init__()
        self.strides = tuple(strides)
        if width % 2 ** len(self.strides):
            raise ValueError(f"decoder width: expected a multiple of {2 ** len(self.strides)}, got {width}")
        self.first = Conv1d(in_dim, width, kernel_size, causal=causal, weight_norm=weight_norm)
        self.blocks = nn.ModuleList()
        for stride in self.strides:
            block = nn.Module()
            block.snake = Snake(width)
            block.up = ConvTranspose1d(width, width // 2, stride, causal=causal, weight_norm=weight_norm)
            width //= 2
            block.units = nn.ModuleList(ResidualUnit(width, d, kernel_size, causal, weight_norm) for d in dilations)
            self.blocks.append(block)
        self.snake = Snake(width)
        self.last = Conv1d(width, channels, kernel_size, causal=causal, weight_norm=weight_norm)

    def forward(self, z: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        x = self.first(z, lengths, past)
        for block, stride in zip(self.blocks, self.strides, strict=True):
            x = block.up(block.snake(x), lengths, past)  # pyright: ignore[reportCallIssue]
            lengths = None if lengths is None else lengths * stride
            for unit in block.units:  # pyright: ignore[reportGeneralTypeIssues]
                x = unit(x, lengths, past)
        return self.last(self.snake(x), lengths, past)


def hop_length(strides: Sequence[int]) -> int:
    """Samples between two frames."""
    return math.prod(strides)
