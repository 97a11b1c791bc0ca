"""Discriminators for sound (periods, complex STFTs) and images (patches).

Each returns a list with one ``(logits, feature maps)`` pair for each of its parts; feature maps are the outputs of all
hidden layers after their activation. None holds batch statistics, so one item's logits do not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

DiscriminatorOutput: TypeAlias = "list[tuple[Tensor, list[Tensor]]]"

_SLOPE = 0.2  # of every LeakyReLU but those of the periods
_PERIOD_SLOPE = 0.1


class NormedConv2d(nn.Module):
    """2-D convolution whose reparametrised weight is worked out in float32, whatever the autocast.

    The power iteration of spectral norm is made of matrix products, which autocast would round to bfloat16.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        norm: str = "weight",
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, dilation)
        if norm == "weight":
            conv = cast(nn.Conv2d, parametrizations.weight_norm(conv))
        elif norm == "spectral":
            conv = cast(nn.Conv2d, parametrizations.spectral_norm(conv))
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        with torch.autocast(device_type=x.device.type, enabled=False):
            weight = conv.weight
        reach = conv.dilation[1] * (conv.kernel_size[1] - 1) + 1
        # bfloat16 on some CPUs (torch 2.11, oneDNN): a strided convolution whose output is one column wide reads memory
        # that is not its own. That column is the first of those of stride 1.
        one_column = conv.stride[1] > 1 and x.shape[-1] + 2 * int(conv.padding[1]) - reach < conv.stride[1]
        stride = (conv.stride[0], 1) if one_column else conv.stride
        y = F.conv2d(x, weight, conv.bias, stride, conv.padding, conv.dilation)
        return y[..., :1] if one_column else y


def check_sound(x: Tensor, channels: int, shortest: int, reason: str) -> None:
    """Refuse what is not sound (B, channels, L >= shortest) with one error that names the ``reason`` of the limit."""
    if x.ndim != 3 or x.shape[1] != channels:
        raise ValueError(f"x: expected sound (B,{channels},L), got shape {tuple(x.shape)}; see in_channels")
    if x.shape[-1] < shortest:
        raise ValueError(
            f"x: expected at least {shortest} samples ({reason}), got {x.shape[-1]}; use longer clips or a smaller one"
        )


class _PeriodPart(nn.Module):
    def __init__(self, period: int, in_channels: int, widths: Sequence[int], kernel: int, stride: int) -> None:
        super().__init__()
        self.period = period
        before = (in_channels, *widths[:-1])
        strides = (stride,) * (len(widths) - 1) + (1,)
        self.layers = nn.ModuleList(
            NormedConv2d(c_in, c_out, (kernel, 1), (s, 1), padding=(kernel // 2, 0))
            for c_in, c_out, s in zip(before, widths, strides, strict=True)
        )
        self.head = NormedConv2d(widths[-1], 1, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = F.pad(x, (0, -x.shape[-1] % self.period), mode="reflect")
        x = x.unflatten(-1, (-1, self.period))  # (B, C, L / period, period)
        maps = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), _PERIOD_SLOPE)
            maps.append(x)
        return self.head(x), maps


class MultiPeriodDiscriminator(nn.Module):
    """Folds sound to L/p rows of p samples for each period p and looks down the columns (HiFi-GAN, arXiv 2010.05646
    section 2.3).

    Args:
        periods: samples, each >= 2; coprime numbers overlap least.
        in_channels: C of the sound.
        widths: channels of the hidden layers; all but the last step by `stride`.
        kernel: odd number of rows a layer sees.
        stride: rows a layer steps.
    """

    def __init__(
        self,
        periods: Sequence[int] = (2, 3, 5, 7, 11),
        in_channels: int = 1,
        widths: Sequence[int] = (32, 128, 512, 1024, 1024),
        kernel: int = 5,
        stride: int = 3,
    ) -> None:
        super().__init__()
        if not periods or min(periods) < 2:
            raise ValueError(f"periods: expected at least one value >= 2, got {tuple(periods)}")
        if not widths or kernel % 2 == 0:
            raise ValueError(f"widths, kernel: expected >= 1 layer and an odd kernel, got {tuple(widths)} and {kernel}")
        self.in_channels = in_channels
        self.shortest = max(periods)
        self.parts = nn.ModuleList(_PeriodPart(p, in_channels, widths, kernel, stride) for p in periods)

    def forward(self, x: Tensor) -> DiscriminatorOutput:
        """Judge sound (B,C,L), any L >= the longest period.

        Returns:
            For each period: logits (B, 1, rows, period) and the feature maps (B, width, rows, period).

        Raises:
            ValueError: wrong shape, or sound shorter than the longest period.
        """
        check_sound(x, self.in_channels, self.shortest, "the longest period")
        return [part(x) for part in self.parts]


class _STFTPart(nn.Module):
    def __init__(self, n_fft: int, in_channels: int, width: int, time_dilations: Sequence[int]) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        layers = [NormedConv2d(2 * in_channels, width, (3, 9), padding=(1, 4))]
        layers += [
            NormedConv2d(width, width, (3, 9), stride=(1, 2), dilation=(d, 1), padding=(d, 4)) for d in time_dilations
        ]
        layers += [NormedConv2d(width, width, (3, 3), padding=(1, 1))]
        self.layers = nn.ModuleList(layers)
        self.head = NormedConv2d(width, 1, (3, 3), padding=(1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self._spectrum(x)
        maps = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), _SLOPE)
            maps.append(x)
        return self.head(x), maps

    def _spectrum(self, x: Tensor) -> Tensor:
        """(B,C,L) -> real and imaginary parts as channels (B, 2C, frames, n_fft // 2 + 1)."""
        batch, channels, length = x.shape
        window: Tensor = self.window  # pyright: ignore[reportAssignmentType]
        with torch.autocast(device_type=x.device.type, enabled=False):
            spectrum = torch.stft(
                x.float().reshape(batch * channels, length),
                n_fft=self.n_fft,
                hop_length=self.n_fft // 4,
                window=window.float(),
                center=True,
                pad_mode="reflect",
                normalized=True,  # by sqrt(n_fft): all resolutions then enter their first layer at one scale
                return_complex=True,
            )
            parts = torch.view_as_real(spectrum)  # (B*C, F, frames, 2)
            parts = parts.reshape(batch, channels, *parts.shape[1:]).permute(0, 4, 1, 3, 2)  # (B, 2, C, frames, F)
        return parts.flatten(1, 2)


class MultiScaleSTFTDiscriminator(nn.Module):
    """Convolutions on complex STFTs at several resolutions (EnCodec, arXiv 2210.13438 section 3.4 and figure 2).

    Each part: a 3 x 9 convolution (frames x frequencies), one of stride 2 in frequency for each time dilation, a 3 x 3
    one and a 3 x 3 head; hop is a quarter of the window.

    Args:
        n_ffts: window length of each part, samples, multiples of 4.
        in_channels: C of the sound.
        width: channels of every hidden layer.
        time_dilations: dilation in frames of each frequency-striding layer.
    """

    def __init__(
        self,
        n_ffts: Sequence[int] = (2048, 1024, 512, 256, 128),
        in_channels: int = 1,
        width: int = 32,
        time_dilations: Sequence[int] = (1, 2, 4),
    ) -> None:
        super().__init__()
        if not n_ffts or any(n < 4 or n % 4 for n in n_ffts):
            raise ValueError(f"n_ffts: expected multiples of 4 (hop = n_fft / 4), got {tuple(n_ffts)}")
        self.in_channels = in_channels
        self.shortest = max(n_ffts) // 2 + 1
        self.parts = nn.ModuleList(_STFTPart(n, in_channels, width, time_dilations) for n in n_ffts)

    def forward(self, x: Tensor) -> DiscriminatorOutput:
        """Judge sound (B,C,L) with L > half of the longest window.

        Returns:
            For each resolution: logits (B, 1, frames, F') and the feature maps (B, width, frames, F').

        Raises:
            ValueError: wrong shape, or sound too short for the longest window.
        """
        check_sound(x, self.in_channels, self.shortest, "half of the longest window and one")
        return [part(x) for part in self.parts]


class PatchDiscriminator(nn.Module):
    """A logit for each overlapping patch of an image (PatchGAN, arXiv 1611.07004 section 3.2.2).

    `num_layers` 4 x 4 convolutions of stride 2, one of stride 1, and a 4 x 4 head; widths double up to eight times
    `width`. With 3 layers each logit sees 70 x 70 pixels.

    Args:
        in_channels: C of the image.
        width: channels of the first layer.
        num_layers: layers of stride 2, >= 1.
        norm: ``spectral`` (spectral norm on every convolution, arXiv 1802.05957), ``group`` (group norm of the hidden
            layers but the first) or ``none``.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, num_layers: int = 3, norm: str = "spectral") -> None:
        super().__init__()
        if norm not in ("spectral", "group", "none"):
            raise ValueError(f"norm: expected 'spectral', 'group' or 'none', got {norm!r}")
        if num_layers < 1:
            raise ValueError(f"num_layers: expected >= 1, got {num_layers}")
        widths = [width * min(2**i, 8) for i in range(num_layers + 1)]
        if norm == "group" and any(w % _groups(w) for w in widths[1:]):
            raise ValueError(f"width: expected a multiple of 32, or a number below 32, for norm='group', got {width}")
        self.in_channels = in_channels
        # Every stride-2 layer halves, then the stride-1 layer and the head take one pixel each.
        self.shortest = 3 * 2**num_layers
        layers = []
        before = in_channels
        for index, after in enumerate(widths):
            step = 2 if index < num_layers else 1
            conv = NormedConv2d(before, after, (4, 4), (step, step), padding=(1, 1), norm=norm)
            grouped = norm == "group" and index > 0
            layers.append(nn.Sequential(conv, nn.GroupNorm(_groups(after), after)) if grouped else conv)
            before = after
        self.layers = nn.ModuleList(layers)
        self.head = NormedConv2d(before, 1, (4, 4), padding=(1, 1), norm=norm)

    def forward(self, x: Tensor) -> DiscriminatorOutput:
        """Judge images (B,C,H,W), any H and W from 3 * 2^num_layers on.

        Returns:
            One pair: logits (B, 1, H', W') and the feature maps (B, width', H', W').

        Raises:
            ValueError: wrong shape, or an image too small for one logit.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: expected images (B,{self.in_channels},H,W), got shape {tuple(x.shape)}")
        if min(x.shape[-2:]) < self.shortest:
            raise ValueError(
                f"x: expected at least {self.shortest} x {self.shortest} pixels, got {x.shape[-2]} x {x.shape[-1]}; "
                "use larger crops or fewer layers"
            )
        maps = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), _SLOPE)
            maps.append(x)
        return [(self.head(x), maps)]


def _groups(width: int) -> int:
    return min(32, width)
