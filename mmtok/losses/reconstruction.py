"""Element-wise reconstruction losses for images (B,C,H,W) and sound (B,C,L), with an optional validity mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def expand_mask(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A bool mask (B, *spatial) or (B, 1 or C, *spatial) at the full `shape` (B, C, *spatial), without a copy.

    Raises:
        ValueError: the mask is not bool or does not fit.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected bool (True = valid), got {mask.dtype}; pass mask.bool()")
    shape = tuple(shape)
    full = mask.unsqueeze(1) if mask.ndim == len(shape) - 1 else mask
    if full.ndim != len(shape) or tuple(full.shape) not in (shape, (shape[0], 1, *shape[2:])):
        raise ValueError(
            f"mask: expected shape {(shape[0], *shape[2:])} or {shape}, got {tuple(mask.shape)}; "
            "make one bool per position of the signal"
        )
    return full.expand(shape)


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of the valid elements.

    Args:
        values: (B, C, *spatial), e.g. (B,C,L) or (B,C,H,W).
        mask: bool, True = valid, as in `expand_mask`. None: everything is valid.

    Returns:
        Scalar; 0 when no element is valid. What stands in invalid places (NaN included) has no influence.

    Raises:
        ValueError: the mask is not bool or does not fit.
    """
    if mask is None:
        return values.mean()
    full = expand_mask(mask, values.shape)
    # torch.where, not a product: 0 * NaN of an unwritten padding would be NaN.
    return torch.where(full, values, torch.zeros_like(values)).sum() / full.sum().clamp(min=1)


def check_pair(x_hat: Tensor, x: Tensor) -> None:
    """Refuse a reconstruction whose shape is not the real signal's: broadcasting would hide the mistake."""
    if x_hat.shape != x.shape:
        raise ValueError(
            f"x_hat: expected the shape of x {tuple(x.shape)}, got {tuple(x_hat.shape)}; "
            "cut the reconstruction to the input's size first"
        )


def _difference(x_hat: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    check_pair(x_hat, x)
    difference = x_hat.float() - x.float()
    if mask is None:
        return difference
    # Zero before the non-linearity: the gradient of sqrt or square at a NaN is NaN even when its weight is 0.
    return torch.where(expand_mask(mask, difference.shape), difference, torch.zeros_like(difference))


def l1(x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute error, scalar float32. Shapes (B,C,*spatial); `mask` as in `masked_mean`."""
    return masked_mean(_difference(x_hat, x, mask).abs(), mask)


def l2(x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error, scalar float32. Shapes (B,C,*spatial); `mask` as in `masked_mean`."""
    return masked_mean(_difference(x_hat, x, mask).square(), mask)


def smooth_l1(x_hat: Tensor, x: Tensor, mask: Tensor | None = None, delta: float = 1.0) -> Tensor:
    """Quadratic below `delta`, linear above: d^2 / (2 delta) or |d| - delta / 2 (arXiv 1504.08083 eq. 3).

    Args:
        x_hat: reconstruction (B,C,*spatial).
        x: real signal, same shape.
        mask: as in `masked_mean`.
        delta: > 0, in the signal's own unit.
    """
    if delta <= 0:
        raise ValueError(f"delta: expected > 0, got {delta}; use l1() for the limit at 0")
    difference = _difference(x_hat, x, mask)
    return masked_mean(F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none", beta=delta), mask)


def charbonnier(x_hat: Tensor, x: Tensor, mask: Tensor | None = None, eps: float = 1e-3) -> Tensor:
    """Mean of sqrt(d^2 + eps^2) - eps: an L1 with a gradient at 0 (arXiv 1710.01992, shifted so that equal
    inputs give 0).

    Args:
        x_hat: reconstruction (B,C,*spatial).
        x: real signal, same shape.
        mask: as in `masked_mean`.
        eps: > 0, width of the smooth part in the signal's own unit.
    """
    if eps <= 0:
        raise ValueError(f"eps: expected > 0, got {eps}; use l1() for the limit at 0")
    difference = _difference(x_hat, x, mask)
    return masked_mean((difference.square() + eps * eps).sqrt() - eps, mask)
