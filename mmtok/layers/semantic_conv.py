"""The plain convolutions around a teacher's features in X-Codec (arXiv 2408.17175, section 3.2), blind to padding.

Both stacks are channels-first (B, D, T) and have no weight norm; ``lengths`` (B,) are the valid frames of each item.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.layers.conv1d import zero_past


@dataclasses.dataclass(frozen=True)
class SemanticShape:
    """How a semantic encoder is built; its decoder mirrors it.

    Args:
        kernel_size: of the first and last layer. unit_kernel_size: of the residual units.
        channel_ratios, strides: width (as a share of the teacher's) and stride of each block.
        dilations: one residual unit for each, in every block.
    """

    kernel_size: int = 3
    unit_kernel_size: int = 3
    channel_ratios: Sequence[float] = (1, 1)
    strides: Sequence[int] = (1, 1)
    dilations: Sequence[int] = (1, 1)

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> SemanticShape:
        """From a mapping with any of the fields. ValueError for others, even kernels, or lists of unequal lengths."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(config or {}) - known):
            raise ValueError(f"semantic_conv: expected any of {sorted(known)}, got {unknown}")
        shape = cls(**(config or {}))
        if len(shape.channel_ratios) != len(shape.strides) or not shape.strides:
            raise ValueError(
                f"semantic_conv: expected one channel ratio for each of the {len(shape.strides)} strides, "
                f"got {len(shape.channel_ratios)}"
            )
        if shape.kernel_size % 2 == 0 or shape.unit_kernel_size % 2 == 0:
            raise ValueError("semantic_conv: expected odd kernel sizes, so that every layer keeps the number of frames")
        return shape

    def widths(self, dim: int) -> list[int]:
        """Channels after each block."""
        return [int(dim * ratio) for ratio in self.channel_ratios]

    def frames(self, count: int) -> int:
        """Frames that the encoder makes of ``count`` frames of the teacher."""
        for stride in self.strides:
            count = count if stride == 1 else max(0, (count - 2) // stride + 1)
        return count

    @property
    def reach(self) -> int:
        """Frames that either stack sees on either side of a frame, at most."""
        reach, step = self.kernel_size // 2, 1
        for stride in self.strides:
            reach += step * sum(d * (self.unit_kernel_size // 2) for d in self.dilations)
            reach += step * max(1, 2 * stride)
            step *= stride
        return reach + step * (self.kernel_size // 2) + step - 1


class _Unit(nn.Module):
    """ELU, dilated convolution, ELU, 1 x 1 convolution, added to the input."""

    def __init__(self, dim: int, kernel_size: int, dilation: int):
        super().__init__()
        padding = (kernel_size - 1) // 2 * dilation
        self.conv1 = nn.Conv1d(dim, dim, kernel_size, padding=padding, dilation=dilation, bias=False)
        self.conv2 = nn.Conv1d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return x + self.conv2(F.elu(self.conv1(zero_past(F.elu(x), lengths))))


class SemanticEncoder(nn.Module):
    """Teacher features (B, D, T) -> (B, D', T / prod(strides))."""

    def __init__(self, dim: int, shape: SemanticShape):
        super().__init__()
        self.first = nn.Conv1d(dim, dim, shape.kernel_size, padding=shape.kernel_size // 2, bias=False)
        self.blocks = nn.ModuleList()
        for width, stride in zip(shape.widths(dim), shape.strides, strict=True):
            block = nn.Module()
            block.units = nn.ModuleList(_Unit(dim, shape.unit_kernel_size, d) for d in shape.dilations)
            kernel = 3 if stride == 1 else 2 * stride
            block.conv = nn.Conv1d(dim, width, kernel, stride, (kernel - 1) // 2)
            self.blocks.append(block)
            dim = width
        self.strides, self.out_dim = tuple(shape.strides), dim

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.first(zero_past(x, lengths))
        for block, stride in zip(self.blocks, self.strides, strict=True):
            for unit in block.units:  # pyright: ignore[reportGeneralTypeIssues]
                x = unit(x, lengths)
            x = block.conv(zero_past(x, lengths))  # pyright: ignore[reportCallIssue]
            lengths = None if lengths is None else lengths // stride
        return x


class SemanticDecoder(nn.Module):
    """(B, D, T) -> the teacher's features (B, D, T * prod(strides)): a regression, used in training alone."""

    def __init__(self, dim: int, shape: SemanticShape):
        super().__init__()
        widths = [*shape.widths(dim), dim]
        self.first = nn.Conv1d(dim, widths[0], shape.kernel_size, padding=shape.kernel_size // 2, bias=False)
        self.blocks = nn.ModuleList()
        for i, stride in enumerate(shape.strides):
            block = nn.Module()
            if stride == 1:
                block.conv = nn.Conv1d(widths[i], widths[i + 1], 3, padding=1)
            else:
                padding = (stride + 1) // 2
                block.conv = nn.ConvTranspose1d(
                    widths[i], widths[i + 1], 2 * stride, stride, padding, stride % 2, bias=False
                )
            block.units = nn.ModuleList(_Unit(widths[i + 1], shape.unit_kernel_size, d) for d in shape.dilations)
            self.blocks.append(block)
        self.last = nn.Conv1d(dim, dim, shape.kernel_size, padding=shape.kernel_size // 2, bias=False)
        self.strides = tuple(shape.strides)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.first(zero_past(x, lengths))
        for block, stride in zip(self.blocks, self.strides, strict=True):
            x = block.conv(zero_past(x, lengths))  # pyright: ignore[reportCallIssue]
            lengths = None if lengths is None else lengths * stride
            for unit in block.units:  # pyright: ignore[reportGeneralTypeIssues]
                x = unit(x, lengths)
        return self.last(zero_past(x, lengths))
