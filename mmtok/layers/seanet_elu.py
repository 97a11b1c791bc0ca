"""SEANet (arXiv 2009.02095) as Mimi builds it: ELU, one short residual unit a stride, zero padding, causal throughout.

Nothing here takes ``lengths``: a causal stack's valid outputs never see what lies behind the end of an item. ``past``
is the state of a stream (`mmtok.layers.conv1d.Past`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.layers.conv1d import Conv1d, ConvTranspose1d, Past


class EluUnit(nn.Module):
    """ELU, convolution of 3 to half the channels, ELU, convolution of 1 back, added to the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = Conv1d(channels, channels // 2, 3, causal=True, weight_norm=False)
        # A quiet branch at the start, as in the other stacks (mmtok/layers/seanet.py).
        self.conv2 = Conv1d(channels // 2, channels, 1, causal=True, weight_norm=False, gain=0.1)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        return x + self.conv2(F.elu(self.conv1(F.elu(x), past=past)))


class EluEncoder(nn.Module):
    """(B, 1, L) -> (B, out_dim, L / prod(strides)), for L a multiple of the product; causal.

    Args:
        width: channels at the sample rate, even; they double at each stride.
        strides: down-sampling factors, in order.
        out_dim: width of the output.
    """

    def __init__(self, width: int, strides: Sequence[int], out_dim: int):
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"width: expected an even number of channels of at least 2, got {width}")
        self.first = Conv1d(1, width, 7, causal=True, weight_norm=False)
        self.units, self.downs = nn.ModuleList(), nn.ModuleList()
        for stride in strides:
            self.units.append(EluUnit(width))
            self.downs.append(Conv1d(width, 2 * width, 2 * stride, stride=stride, causal=True, weight_norm=False))
            width *= 2
        self.last = Conv1d(width, out_dim, 3, causal=True, weight_norm=False)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = self.first(x, past=past)
        for unit, down in zip(self.units, self.downs, strict=True):
            x = down(F.elu(unit(x, past)), past=past)
        return self.last(F.elu(x), past=past)


class EluDecoder(nn.Module):
    """(B, in_dim, T) -> (B, 1, T * prod(strides)), causal.

    Args:
        width: channels at the sample rate, even; they halve down to it at each stride.
        strides: up-sampling factors, in order.
        in_dim: width of the input.
    """

    def __init__(self, width: int, strides: Sequence[int], in_dim: int):
        super().__init__()
        channels = width * 2 ** len(strides)
        self.first = Conv1d(in_dim, channels, 7, causal=True, weight_norm=False)
        self.ups, self.units = nn.ModuleList(), nn.ModuleList()
        for stride in strides:
            self.ups.append(ConvTranspose1d(channels, channels // 2, stride, causal=True, weight_norm=False))
            channels //= 2
            self.units.append(EluUnit(channels))
        self.last = Conv1d(channels, 1, 3, causal=True, weight_norm=False)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = self.first(x, past=past)
        for up, unit in zip(self.ups, self.units, strict=True):
            x = unit(up(F.elu(x), past=past), past)
        return self.last(F.elu(x), past=past)


class FrameDown(Conv1d):
    """(B, D, T) -> (B, D, T / stride), causal: a convolution of 2 * stride without bias.

    What lies before the beginning is the first position repeated, where the other layers have zeros.
    """

    def __init__(self, dim: int, stride: int):
        super().__init__(dim, dim, 2 * stride, stride=stride, causal=True, weight_norm=False, bias=False)

    def forward(self, x: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        past = Past() if past is None else past
        past.kept.setdefault(self, x[..., :1].expand(-1, -1, self.left))
        return super().forward(x, lengths, past)


class FrameUp(nn.Module):
    """(B, D, T) -> (B, D, T * stride), causal: each channel's own transposed convolution of 2 * stride, without bias.

    y[t s + j] = w[j] x[t] + w[s + j] x[t - 1] for j in 0..s-1, with x[-1] = 0.
    """

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(dim, 2 * stride))
        nn.init.trunc_normal_(self.weight, std=2**-0.5)  # two taps reach each output

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = F.pad(x, (1, 0)) if past is None else past.extend(self, x, 1)
        weight = self.weight.to(x.dtype)
        now, before = weight[:, None, : self.stride], weight[:, None, self.stride :]  # (D, 1, stride)
        return (x[..., 1:, None] * now + x[..., :-1, None] * before).flatten(2)
