"""1-D convolutions whose output length is exact (L / stride, L * stride), causal or centred, and blind to padding.

Every layer takes ``lengths``: positions at and past an item's length are zeroed before the convolution sees them, so a
padded batch gives each item what it gets alone (where the zero padding of the convolution itself begins).

Causal layers also take ``past``, the explicit state of a stream: instead of zeros they then read what the call before
left there, so that pieces of any length (multiples of the stride) give what the whole gives.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm as add_weight_norm


def zero_past(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Zero ``x`` (B, C, L) at and past ``lengths`` (B,); None leaves it as it is."""
    if lengths is None:
        return x
    return x * (torch.arange(x.shape[-1], device=x.device) < lengths[:, None]).unsqueeze(1).to(x.dtype)


class Past:
    """The state of one stream: for each causal layer the end of its input so far, zeros before the beginning.

    Create one for a stream and hand it to every call; its size does not grow with the length of the stream.
    """

    def __init__(self) -> None:
        self.kept: dict[nn.Module, Tensor] = {}

    def extend(self, layer: nn.Module, x: Tensor, size: int) -> Tensor:
        """(B, C, L) -> (B, C, size + L): the last ``size`` positions that ``layer`` saw, then x; keeps the new end."""
        before = self.kept.get(layer)
        if before is None:
            before = x.new_zeros(*x.shape[:-1], size)
        x = torch.cat([before, x], -1)
        self.kept[layer] = x[..., x.shape[-1] - size :].clone()  # a view would keep the whole piece alive
        return x


class Snake(nn.Module):
    """x + sin^2(a x) / a with one learnt a per channel (arXiv 2006.08195, eq. 3)."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha.to(x.dtype)
        return x + torch.sin(alpha * x).square() / (alpha + 1e-9)


class Conv1d(nn.Module):
    """Convolution with output length L / stride, for L a multiple of ``stride``.

    Zero padding of ``dilation * (kernel_size - 1) - (stride - 1)`` samples in all: on the left when ``causal``, else
    split, the larger half on the left (this equals DAC's padding for every kernel of 2 * stride). ``gain`` scales the
    initial weights.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        causal: bool = False,
        weight_norm: bool = True,
        bias: bool = True,
        gain: float = 1.0,
    ):
        super().__init__()
        conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride=stride, dilation=dilation, bias=bias)
        # 1 / sqrt(fan-in), not DAC's fixed 0.02: in narrow stacks that lets the latent die out, and its codes with it.
        nn.init.trunc_normal_(conv.weight, std=gain * (in_channels * kernel_size) ** -0.5)
        if bias:
            nn.init.zeros_(cast(Tensor, conv.bias))
        self.conv = cast(nn.Conv1d, add_weight_norm(conv)) if weight_norm else conv
        total = dilation * (kernel_size - 1) - (stride - 1)
        self.left = total if causal else (total + 1) // 2
        self.right = total - self.left
        self.stride, self.kernel_size = stride, kernel_size

    def forward(self, x: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        if past is not None and self.right:
            raise ValueError("past: expected a causal convolution, got one that looks ahead; build it with causal=True")
        if past is not None:
            x = past.extend(self, x, self.left)
        elif self.kernel_size > 1:
            x = F.pad(zero_past(x, lengths), (self.left, self.right))
        if self.stride > 1 and self.kernel_size == 2 * self.stride:
            return self._strided(x)
        return self.conv(x)  # (B, C', L / stride)

    def _strided(self, x: Tensor) -> Tensor:
        """The same sum as a plain convolution of two taps over groups of ``stride`` samples.

        torch's strided convolution in bf16 on CPU gives wrong values for some shapes (recipes/measure_cpu.py).
        """
        out, C, _ = self.conv.weight.shape
        taps = self.conv.weight.view(out, C, 2, self.stride).transpose(2, 3).reshape(out, C * self.stride, 2)
        groups = x.unflatten(2, (-1, self.stride)).transpose(2, 3).flatten(1, 2)  # (B, C * stride, L / stride + 1)
        return F.conv1d(groups, taps, self.conv.bias)


class ConvTranspose1d(nn.Module):
    """Transposed convolution of kernel 2 * stride with output length exactly L * stride (odd strides too).

    The ``stride`` surplus samples are cut on the right when ``causal``, else ceil(stride / 2) of them on the left.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, causal: bool = False, weight_norm: bool = True
    ):
        super().__init__()
        conv = nn.ConvTranspose1d(in_channels, out_channels, 2 * stride, stride=stride)
        nn.init.trunc_normal_(conv.weight, std=(2 * in_channels) ** -0.5)  # two taps reach each output sample
        nn.init.zeros_(cast(Tensor, conv.bias))
        self.conv = cast(nn.ConvTranspose1d, add_weight_norm(conv, dim=1)) if weight_norm else conv
        self.cut = 0 if causal else (stride + 1) // 2
        self.stride = stride

    def forward(self, x: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        if past is not None and self.cut:
            raise ValueError("past: expected a causal convolution, got one that looks ahead; build it with causal=True")
        # Written as a plain convolution of two taps with ``stride`` outputs a position, which is the same sum: the
        # gradient of torch's transposed convolution in bf16 on CPU is wrong for some shapes (recipes/measure_cpu.py).
        weight = self.conv.weight  # (C, C', 2 * stride): the present position's taps, then the one before's
        C, out = weight.shape[:2]
        taps = weight.view(C, out, 2, self.stride).flip(2).permute(1, 3, 0, 2).reshape(out * self.stride, C, 2)
        length = x.shape[-1]
        x = F.pad(zero_past(x, lengths), (1, 1)) if past is None else past.extend(self, x, 1)
        y = F.conv1d(x, taps)  # (B, C' * stride, L + 1), or L with the past
        y = y.unflatten(1, (out, self.stride)).transpose(2, 3).flatten(2)  # (B, C', (L + 1) * stride)
        y = y[..., self.cut : self.cut + length * self.stride]
        return y + cast(Tensor, self.conv.bias)[:, None].to(y.dtype)
