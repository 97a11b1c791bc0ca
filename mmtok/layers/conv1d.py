"""1-D convolutions whose output length is exact (L / stride, L * stride), causal or centred, and blind to padding.

Every layer takes ``lengths``: positions at and past an item's length are zeroed before the convolution sees them, so a
padded batch gives each item what it gets alone (where the zero padding of the convolution itself begins).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm as add_weight_norm


def zero_past(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Zero ``x`` (B, C, L) at and past ``lengths`` (B,); None leaves it as it is."""
    if lengths is None:
        return x
    return x * (torch.arange(x.shape[-1], device=x.device) < lengths[:, None]).unsqueeze(1).to(x.dtype)


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
    split, the larger half on the left (this equals DAC's padding for every kernel of 2 * stride).
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
    ):
        super().__init__()
        conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride=stride, dilation=dilation, bias=bias)
        nn.init.trunc_normal_(conv.weight, std=0.02)
        if bias:
            nn.init.zeros_(conv.bias)  # pyright: ignore[reportArgumentType]
        self.conv = add_weight_norm(conv) if weight_norm else conv
        total = dilation * (kernel_size - 1) - (stride - 1)
        self.left = total if causal else (total + 1) // 2
        self.right = total - self.left
        self.stride, self.kernel_size = stride, kernel_size

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if self.kernel_size > 1:
            x = F.pad(zero_past(x, lengths), (self.left, self.right))
        return self.conv(x)  # (B, C', L / stride)


class ConvTranspose1d(nn.Module):
    """Transposed convolution of kernel 2 * stride with output length exactly L * stride (odd strides too).

    The ``stride`` surplus samples are cut on the right when ``causal``, else ceil(stride / 2) of them on the left.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, causal: bool = False, weight_norm: bool = True
    ):
        super().__init__()
        conv = nn.ConvTranspose1d(in_channels, out_channels, 2 * stride, stride=stride)
        nn.init.trunc_normal_(conv.weight, std=0.02)
        nn.init.zeros_(conv.bias)  # pyright: ignore[reportArgumentType]
        self.conv = add_weight_norm(conv, dim=1) if weight_norm else conv
        self.cut = 0 if causal else (stride + 1) // 2
        self.stride = stride

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        y = self.conv(zero_past(x, lengths))
        return y[..., self.cut : self.cut + x.shape[-1] * self.stride]  # (B, C', L * stride)
