"""SEANet with an LSTM, as EnCodec builds it (arXiv 2210.13438, section 3.1; arXiv 2009.02095).

ELU, residual blocks of two convolutions beside a convolutional shortcut, an LSTM with a skip at the frame rate, and
reflected edges. Reflection, and a norm over time, make the ends of a sound matter to its inside:

* causal with weight norm: positions past an item's length reach nothing before them, so ``lengths`` works as in
  `mmtok.layers.seanet`, and ``past`` makes a stream of it;
* any other: an item's own end is reflected into it, so items of unequal lengths have to be run apart, without padding.
"""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.layers.conv1d import Conv1d, ConvTranspose1d, Past, zero_past

NORMS = ("weight_norm", "time_group_norm")
PADDINGS = ("reflect", "constant")


@dataclasses.dataclass(frozen=True)
class SEANetShape:
    """Sizes that an encoder and its decoder share; the defaults are EnCodec's at 24 kHz.

    Args:
        width: channels at the sample rate; they double at each stride.
        strides: down-sampling factors of the encoder, in order; the decoder mirrors them.
        kernel_size, last_kernel_size: of the first and the last convolution of each network.
        residual_kernel_size, residual_layers: of the residual blocks, and how many stand at each rate.
        dilation_growth: block j at a rate dilates by dilation_growth^j.
        compress: the inside of a block has width / compress channels.
        conv_shortcut: a 1x1 convolution beside the block instead of the identity.
        lstm_layers: at the frame rate.
        causal: no look-ahead.
        norm: ``weight_norm``, or ``time_group_norm``: group norm over all channels and the whole time.
        padding: ``reflect``, or ``constant`` for zeros.
    """

    width: int = 32
    strides: tuple[int, ...] = (2, 4, 5, 8)
    kernel_size: int = 7
    last_kernel_size: int = 7
    residual_kernel_size: int = 3
    residual_layers: int = 1
    dilation_growth: int = 2
    compress: int = 2
    conv_shortcut: bool = True
    lstm_layers: int = 2
    causal: bool = True
    norm: str = "weight_norm"
    padding: str = "reflect"

    def __post_init__(self) -> None:
        object.__setattr__(self, "strides", tuple(self.strides))
        if self.norm not in NORMS or self.padding not in PADDINGS:
            raise ValueError(
                f"expected norm in {NORMS} and padding in {PADDINGS}, got {self.norm!r} and {self.padding!r}"
            )
        if not self.strides or min(self.strides) < 2:
            raise ValueError(f"strides: expected one or more, each at least 2, got {self.strides}")
        if self.compress < 1 or self.width % self.compress:
            raise ValueError(f"width: expected a multiple of compress = {self.compress}, got {self.width}")

    @property
    def hop_length(self) -> int:
        return math.prod(self.strides)

    @property
    def ends_stay_apart(self) -> bool:
        """Whether nothing past an item's end, and not the end itself, reaches what lies before."""
        return self.causal and self.norm == "weight_norm"


class EdgeConv1d(Conv1d):
    """`Conv1d` with EnCodec's edges; output length ceil(L / stride).

    An L that is no multiple of the stride is lengthened to one on the right in the same way as the edges. Where a
    reflection would reach further than the sound is long, zeros are put after the sound first, and cut afterwards.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        shape: SEANetShape,
        stride: int = 1,
        dilation: int = 1,
    ):
        plain = shape.norm == "weight_norm"
        super().__init__(in_channels, out_channels, kernel_size, stride, dilation, shape.causal, weight_norm=plain)
        self.padding = shape.padding
        self.norm = None if plain else nn.GroupNorm(1, out_channels)

    def forward(self, x: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        if past is not None and (self.right or self.norm is not None):
            raise ValueError("past: expected a causal network with weight norm, got one that sees the end of the sound")
        if past is not None and self in past.kept:
            x = past.extend(self, x, self.left)
        elif self.left + self.right or x.shape[-1] % self.stride:
            x = self._with_edges(zero_past(x, lengths))
            if past is not None:
                past.kept[self] = x[..., x.shape[-1] - self.left :].clone()
        two_taps = self.stride > 1 and self.kernel_size == 2 * self.stride
        y = self._strided(x) if two_taps else self.conv(x)
        return y if self.norm is None else self.norm(y)

    def _with_edges(self, x: Tensor) -> Tensor:
        left, right = self.left, self.right + -x.shape[-1] % self.stride
        if self.padding == "constant":
            return F.pad(x, (left, right))
        short = max(0, max(left, right) + 1 - x.shape[-1])
        x = F.pad(F.pad(x, (0, short)), (left, right), "reflect")
        return x[..., : x.shape[-1] - short]


class EdgeConvTranspose1d(ConvTranspose1d):
    """`ConvTranspose1d`, with the norm before the surplus samples are cut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shape: SEANetShape):
        plain = shape.norm == "weight_norm"
        super().__init__(in_channels, out_channels, stride, shape.causal, weight_norm=plain)
        self.norm = None if plain else nn.GroupNorm(1, out_channels)

    def forward(self, x: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        if self.norm is None:
            return super().forward(x, lengths, past)
        if past is not None:
            raise ValueError("past: expected weight norm, got a norm over time, which sees the end of the sound")
        y = self.norm(self.conv(zero_past(x, lengths)))  # (B, C', (L + 1) * stride)
        return y[..., self.cut : self.cut + x.shape[-1] * self.stride]


class ResidualBlock(nn.Module):
    """ELU, dilated convolution into width / compress channels, ELU, 1x1 convolution back, added to the shortcut."""

    def __init__(self, channels: int, dilation: int, shape: SEANetShape):
        super().__init__()
        inner = channels // shape.compress
        self.conv1 = EdgeConv1d(channels, inner, shape.residual_kernel_size, shape, dilation=dilation)
        self.conv2 = EdgeConv1d(inner, channels, 1, shape)
        self.shortcut = EdgeConv1d(channels, channels, 1, shape) if shape.conv_shortcut else None

    def forward(self, x: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        y = self.conv2(F.elu(self.conv1(F.elu(x), lengths, past)))
        return y + (x if self.shortcut is None else self.shortcut(x))


def residual_blocks(channels: int, shape: SEANetShape) -> nn.ModuleList:
    dilations = [shape.dilation_growth**j for j in range(shape.residual_layers)]
    return nn.ModuleList(ResidualBlock(channels, d, shape) for d in dilations)


class SkipLSTM(nn.Module):
    """(B, C, T) -> x + LSTM(x); its state is the past of a stream."""

    def __init__(self, channels: int, layers: int):
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, layers, batch_first=True)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        before = None if past is None else past.kept.get(self)
        state = None if before is None else (before[0], before[1])
        y, state = self.lstm(x.transpose(1, 2), state)
        if past is not None:
            past.kept[self] = torch.stack(state)  # (2, layers, B, C): output and cell
        return x + y.transpose(1, 2)


class Stage(nn.Module):
    """The layers of one stride: residual blocks, and the convolution that changes the rate."""

    def __init__(self, change: EdgeConv1d | EdgeConvTranspose1d, units: nn.ModuleList):
        super().__init__()
        self.units, self.change, self.stride = units, change, change.stride

    def blocks(self, x: Tensor, lengths: Tensor | None, past: Past | None) -> Tensor:
        for unit in self.units:
            x = unit(x, lengths, past)
        return x

    def down(self, x: Tensor, lengths: Tensor | None, past: Past | None) -> Tensor:
        return self.change(F.elu(self.blocks(x, lengths, past)), lengths, past)

    def up(self, x: Tensor, lengths: Tensor | None, past: Past | None) -> Tensor:
        x = self.change(F.elu(x), lengths, past)
        return self.blocks(x, None if lengths is None else lengths * self.stride, past)


Layers = list[tuple[EdgeConv1d | EdgeConvTranspose1d, int]]


class _Network(nn.Module):
    """What encoder and decoder share: how far their convolutions look, in frames.

    Attributes:
        margin: of ``long_part``, the convolutions that run at the sample rate: pieces that overlap by so many frames on
            both sides give what the whole gives (with weight norm).
        lead: a stream's first call needs so many frames, because the beginning is reflected.
    """

    margin: int
    lead: int

    def measure(self, shape: SEANetShape, long_part: Layers, frame_layer: EdgeConv1d) -> None:
        """Set margin and lead from the long part's layers, each with the samples between two of its input positions,
        and from the convolution at the frame rate."""
        self.hop_length, reach, edge = shape.hop_length, 0, frame_layer.left * shape.hop_length
        for layer, step in long_part:
            if isinstance(layer, EdgeConv1d):
                reach += (max(layer.left, layer.right) + layer.stride - 1) * step
                edge = max(edge, layer.left * step)
            else:
                reach += step
        self.margin = -(-reach // self.hop_length)
        self.lead = edge // self.hop_length + 1 if shape.padding == "reflect" else 1


class LstmEncoder(_Network):
    """(B, channels, L) -> (B, out_dim, ceil(L / hop)); ``lengths`` counts samples."""

    def __init__(self, channels: int, out_dim: int, shape: SEANetShape):
        super().__init__()
        width, step = shape.width, 1
        self.first = EdgeConv1d(channels, width, shape.kernel_size, shape)
        self.stages = nn.ModuleList()
        layers: Layers = [(self.first, step)]
        for stride in shape.strides:
            down = EdgeConv1d(width, 2 * width, 2 * stride, shape, stride=stride)
            stage = Stage(down, residual_blocks(width, shape))
            layers += [(cast(ResidualBlock, unit).conv1, step) for unit in stage.units] + [(down, step)]
            self.stages.append(stage)
            width, step = 2 * width, step * stride
        self.lstm = SkipLSTM(width, shape.lstm_layers)
        self.last = EdgeConv1d(width, out_dim, shape.last_kernel_size, shape)
        self.measure(shape, layers, self.last)

    def long_part(self, x: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        """The convolutions before the LSTM: (B, channels, L) -> (B, C, ceil(L / hop))."""
        x = self.first(x, lengths, past)
        for module in self.stages:
            stage = cast(Stage, module)
            x = stage.down(x, lengths, past)
            lengths = None if lengths is None else -(-lengths // stage.stride)
        return x

    def frame_part(self, h: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        """The LSTM and the last convolution: (B, C, T) -> (B, out_dim, T); ``lengths`` counts frames."""
        return self.last(F.elu(self.lstm(h, past)), lengths, past)

    def forward(self, x: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        frames = None if lengths is None else -(-lengths // self.hop_length)
        return self.frame_part(self.long_part(x, lengths, past), frames, past)


class LstmDecoder(_Network):
    """(B, in_dim, T) -> (B, channels, T * hop); ``lengths`` counts frames."""

    def __init__(self, channels: int, in_dim: int, shape: SEANetShape):
        super().__init__()
        width, step = shape.width * 2 ** len(shape.strides), shape.hop_length
        self.first = EdgeConv1d(in_dim, width, shape.kernel_size, shape)
        self.lstm = SkipLSTM(width, shape.lstm_layers)
        self.stages = nn.ModuleList()
        layers: Layers = []
        for stride in reversed(shape.strides):
            up = EdgeConvTranspose1d(width, width // 2, stride, shape)
            layers.append((up, step))
            width, step = width // 2, step // stride
            stage = Stage(up, residual_blocks(width, shape))
            layers += [(cast(ResidualBlock, unit).conv1, step) for unit in stage.units]
            self.stages.append(stage)
        self.last = EdgeConv1d(width, channels, shape.last_kernel_size, shape)
        self.measure(shape, [*layers, (self.last, step)], self.first)

    def frame_part(self, z: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        """The first convolution and the LSTM: (B, in_dim, T) -> (B, C, T)."""
        return self.lstm(self.first(z, lengths, past), past)

    def long_part(self, h: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        """The convolutions after the LSTM: (B, C, T) -> (B, channels, T * hop)."""
        for module in self.stages:
            stage = cast(Stage, module)
            h = stage.up(h, lengths, past)
            lengths = None if lengths is None else lengths * stage.stride
        return self.last(F.elu(h), lengths, past)

    def forward(self, z: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        return self.long_part(self.frame_part(z, lengths, past), lengths, past)
