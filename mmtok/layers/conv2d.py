"""The convolutional encoder and decoder of VQGAN (arXiv 2012.09841) and latent diffusion's autoencoders (2112.10752).

Pictures enter as (B, C, H, W) with H and W multiples of `ConvShape.factor`; latents leave and enter channels-last,
(B, h * w, D) in raster order. Plain 3 x 3 convolutions of stride 1 and 2 are right in bf16 on CPU, unlike the long
strided ones of `layers.conv1d`: values and gradients have a cosine above 0.9999 with fp32 at every width tried.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.layers.transformer import attend

STYLES = ("ldm", "maskgit")


@dataclasses.dataclass(frozen=True)
class ConvShape:
    """Sizes that an encoder and its decoder share.

    Args:
        width: channels of the first level.
        multipliers: channels of level i are width * multipliers[i]; each level but the last halves the grid.
        blocks: residual blocks of a level of the encoder.
        attention: levels of the encoder whose blocks are each followed by attention.
        decoder_attention: the same for the decoder; level 0 is the finest in both.
        middle_attention: attention between the two blocks at the coarsest grid.
        patch: pixels of a side that pixel-unshuffle folds into channels before the first convolution (1 = none), and
            that pixel-shuffle unfolds after the last one; it makes small models cheap.
        style: ``ldm``, or ``maskgit`` for MaskGIT-VQ as 1d-tokenizer has it: residual convolutions without bias,
            average pooling, the decoder's levels as deep as the encoder's, and a shortcut over a change of channels
            that reads the block's output instead of its input.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention: tuple[int, ...] = ()
    decoder_attention: tuple[int, ...] = ()
    middle_attention: bool = True
    patch: int = 1
    style: str = "ldm"

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        object.__setattr__(self, "attention", tuple(self.attention))
        object.__setattr__(self, "decoder_attention", tuple(self.decoder_attention))
        if self.style not in STYLES:
            raise ValueError(f"style: expected one of {STYLES}, got {self.style!r}")
        if self.width < 1 or self.blocks < 1 or not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(
                f"expected width, blocks and every multiplier >= 1, got {self.width}, {self.blocks} and "
                f"{self.multipliers}"
            )
        if self.patch not in (1, 2, 4):
            raise ValueError(f"patch: expected 1, 2 or 4, got {self.patch}; halve the grid further by more multipliers")
        levels = range(len(self.multipliers))
        if not {*self.attention, *self.decoder_attention} <= set(levels):
            raise ValueError(
                f"attention: expected levels within 0..{len(levels) - 1}, got {self.attention} and "
                f"{self.decoder_attention}; these are levels, not resolutions"
            )

    @property
    def factor(self) -> int:
        """Pixels of a side that become one position."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width * m for m in self.multipliers)

    def to_dict(self) -> dict[str, Any]:
        """As `dataclasses.asdict`, with lists for tuples: what JSON gives back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups as published, fewer where a group would have less than 4 channels (one would lose its own mean)."""
    most = max(1, min(32, channels // 4))
    groups = next(g for g in range(most, 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x))))))."""

    def __init__(self, in_channels: int, out_channels: int, style: str):
        super().__init__()
        bias, self.shortcut_of_output = style != "maskgit", style == "maskgit"
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        read = out_channels if self.shortcut_of_output else in_channels
        changes = in_channels != out_channels
        self.shortcut = nn.Conv2d(read, out_channels, 1, bias=bias) if changes else nn.Identity()
        self.changes = changes

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.shortcut(h if self.changes and self.shortcut_of_output else x)


class GridAttention(nn.Module):
    """x + proj(attention(norm(x))), one head as wide as the channels, every position to every other."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, h * w, C)
        q, k, v = self.qkv(tokens)[:, None].chunk(3, -1)  # each (B, 1, h * w, C)
        y = self.proj(attend(q, k, v)[:, 0])
        return x + y.transpose(1, 2).reshape(x.shape)


class Down(nn.Module):
    """3 x 3 convolution of stride 2, padded on the right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Every position repeated 2 x 2, then a 3 x 3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one grid, attention after each where asked for, then the change of the grid."""

    def __init__(self, channels: tuple[int, int], blocks: int, attention: bool, style: str, resample: nn.Module):
        super().__init__()
        first, out = channels
        self.blocks = nn.ModuleList(ResidualBlock(first if i == 0 else out, out, style) for i in range(blocks))
        self.attention = nn.ModuleList(GridAttention(out) for _ in range(blocks if attention else 0))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if len(self.attention):
                x = self.attention[i](x)
        return self.resample(x)


def middle(channels: int, attention: bool, style: str) -> nn.Sequential:
    """Two blocks at the coarsest grid, attention between them."""
    between = [GridAttention(channels)] if attention else []
    return nn.Sequential(ResidualBlock(channels, channels, style), *between, ResidualBlock(channels, channels, style))


class ConvEncoder(nn.Module):
    """(B, C, H, W) -> (B, (H / f)(W / f), out_channels), f = shape.factor.

    Raises ValueError when H or W is not a multiple of f.
    """

    def __init__(self, shape: ConvShape, out_channels: int, in_channels: int = 3):
        super().__init__()
        self.shape, widths, lean = shape, shape.widths, shape.style == "maskgit"
        self.first = nn.Conv2d(in_channels * shape.patch**2, shape.width, 3, padding=1, bias=not lean)
        self.levels = nn.ModuleList()
        for i, out in enumerate(widths):
            resample = nn.Identity() if i == len(widths) - 1 else nn.AvgPool2d(2) if lean else Down(out)
            channels = (widths[i - 1] if i else shape.width, out)
            self.levels.append(Level(channels, shape.blocks, i in shape.attention, shape.style, resample))
        self.middle = middle(widths[-1], shape.middle_attention, shape.style)
        self.norm = group_norm(widths[-1])
        self.last = nn.Conv2d(widths[-1], out_channels, 1 if lean else 3, padding=0 if lean else 1)

    def forward(self, x: Tensor) -> Tensor:
        f = self.shape.factor
        if x.ndim != 4 or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"x: expected (B, C, H, W) with H and W multiples of {f}, got {tuple(x.shape)}; pad first")
        h = self.first(F.pixel_unshuffle(x, self.shape.patch))
        for level in self.levels:
            h = level(h)
        h = self.last(F.silu(self.norm(self.middle(h))))
        return h.flatten(2).transpose(1, 2)


class ConvDecoder(nn.Module):
    """(B, h * w, in_channels) on a grid h x w -> (B, C, h * f, w * f), f = shape.factor."""

    def __init__(self, shape: ConvShape, in_channels: int, out_channels: int = 3):
        super().__init__()
        self.shape, widths, lean = shape, shape.widths, shape.style == "maskgit"
        self.first = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.middle = middle(widths[-1], shape.middle_attention, shape.style)
        self.levels = nn.ModuleList()  # coarsest first
        for i in reversed(range(len(widths))):
            channels = (widths[min(i + 1, len(widths) - 1)], widths[i])
            resample = Up(widths[i]) if i else nn.Identity()
            blocks = shape.blocks + (0 if lean else 1)
            self.levels.append(Level(channels, blocks, i in shape.decoder_attention, shape.style, resample))
        self.norm = group_norm(widths[0])
        self.last = nn.Conv2d(widths[0], out_channels * shape.patch**2, 3, padding=1)

    def forward(self, z: Tensor, height: int, width: int) -> Tensor:
        """``height`` and ``width`` of the grid. Raises ValueError when z has another number of positions."""
        if z.ndim != 3 or z.shape[1] != height * width:
            raise ValueError(f"z: expected (B, {height} * {width}, D), got {tuple(z.shape)}")
        h = self.middle(self.first(z.transpose(1, 2).unflatten(2, (height, width))))
        for level in self.levels:
            h = level(h)
        return F.pixel_shuffle(self.last(F.silu(self.norm(h))), self.shape.patch)


def edge_pad(x: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) with its edge pixels repeated on the right and below up to multiples of ``multiple``."""
    right, below = -x.shape[3] % multiple, -x.shape[2] % multiple
    return F.pad(x, (0, right, 0, below), mode="replicate") if right or below else x
