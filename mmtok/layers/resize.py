"""Halving and doubling the grid of image tokens inside a transformer; tokens are channels-last, (B, H * W, D)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class DCDown(nn.Module):
    """3x3 stride-2 convolution beside a shortcut: pixel-unshuffle, then the mean over groups of 4 channels.

    The residual down-sampling of DC-AE (arXiv 2410.10733, section 3.2), as Instella-T2I uses it.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = rearrange(x, "b (h w) d -> b d h w", h=height, w=width)
        short = F.pixel_unshuffle(x, 2).unflatten(1, (x.shape[1], 4)).mean(2)
        return rearrange(self.conv(x) + short, "b d h w -> b (h w) d")


class DCUp(nn.Module):
    """3x3 convolution to 4 D and pixel-shuffle, beside a shortcut that repeats each token over its 2 x 2 children."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, 4 * dim, 3, padding=1)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = rearrange(x, "b (h w) d -> b d h w", h=height, w=width)
        y = F.pixel_shuffle(self.conv(x), 2) + F.pixel_shuffle(x.repeat_interleave(4, 1), 2)
        return rearrange(y, "b d h w -> b (h w) d")


class LinearDown(nn.Module):
    """Concatenate 2 x 2 tokens and project (Swin's patch merging, arXiv 2103.14030, without the norm)."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        del width
        h = height // 2
        return self.proj(rearrange(x, "b (h p w q) d -> b (h w) (p q d)", h=h, p=2, q=2))


class LinearUp(nn.Module):
    """Project each token to 2 x 2 tokens."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, 4 * dim, bias=False)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        del width
        return rearrange(self.proj(x), "b (h w) (p q d) -> b (h p w q) d", h=height, p=2, q=2)


RESIZE = {"dc": (DCDown, DCUp), "linear": (LinearDown, LinearUp)}


def grid_positions(height: int, width: int, span: float, device: torch.device | None = None) -> Tensor:
    """(H * W, 2) float rows and columns rescaled to 0 .. span - 1 whatever the size, so one model reads every size."""
    rows = torch.linspace(0, span - 1, height, device=device) if height > 1 else torch.zeros(1, device=device)
    cols = torch.linspace(0, span - 1, width, device=device) if width > 1 else torch.zeros(1, device=device)
    return torch.stack(torch.meshgrid(rows, cols, indexing="ij"), -1).reshape(-1, 2)


def grid_sines(height: int, width: int, span: float, dim: int, device: torch.device | None = None) -> Tensor:
    """(H * W, D) fixed sines and cosines of the rescaled row and column, D / 4 speeds each, periods 6 to 6 * span."""
    positions = grid_positions(height, width, span, device)  # (H W, 2)
    speeds = span ** -torch.linspace(0, 1, dim // 4, device=device)
    angles = (positions[:, :, None] * speeds).flatten(1)  # (H W, D / 2)
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, dim - 4 * (dim // 4)))
