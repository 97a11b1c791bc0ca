"""PSNR, SSIM and MS-SSIM of image batches, computed by torchmetrics under one set of checks.

Images are (B,C,H,W) floats in [0,1]; every function gives (B,) float64 on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

SSIM_WINDOW = 11  # pixels: 11 x 11 Gaussian with sigma 1.5 (Wang et al. 2004)
MS_SSIM_SCALES = 5
_RANGE_SLACK = 1e-4  # rounding of a resize or a bf16 decoder; more than that is a forgotten clamp


def psnr(reference: Tensor, estimate: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, 10 log10(1 / MSE) over all channels and pixels of an item.

    Args:
        reference: (B,C,H,W) float in [0,1].
        estimate: same shape and range.

    Returns:
        (B,) dB, higher is better; ``inf`` where an item is reproduced exactly.

    Raises:
        ValueError: shapes that differ, values outside [0,1] or not finite.
    """
    reference, estimate = _checked_pair(reference, estimate, smallest=1, metric="PSNR")
    from torchmetrics.functional.image import peak_signal_noise_ratio

    # One item at a time: torchmetrics' own batch form warns and reduces in another way for each version.
    rows = [peak_signal_noise_ratio(e, r, data_range=1.0) for r, e in zip(reference, estimate, strict=True)]
    return torch.stack(rows).cpu().double()  # (B,)


def ssim(reference: Tensor, estimate: Tensor) -> Tensor:
    """Structural similarity with the 11 x 11 Gaussian window (Wang et al. 2004, eq. 13), mean over pixels and channels.

    Args:
        reference: (B,C,H,W) float in [0,1], H and W at least 11.
        estimate: same shape and range.

    Returns:
        (B,), at most 1 (equal images), higher is better.

    Raises:
        ValueError: as `psnr`, and images smaller than the window.
    """
    reference, estimate = _checked_pair(reference, estimate, smallest=SSIM_WINDOW, metric="SSIM")
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(estimate, reference, data_range=1.0, reduction="none")
    return _batch_vector(value, len(reference))


def ms_ssim(reference: Tensor, estimate: Tensor) -> Tensor:
    """Multi-scale SSIM, five scales with the weights of Wang et al. 2003 (eq. 7); negative terms are set to 0.

    Args:
        reference: (B,C,H,W) float in [0,1], H and W at least 176 (11 px at the coarsest of 5 scales).
        estimate: same shape and range.

    Returns:
        (B,) in [0,1], higher is better.

    Raises:
        ValueError: as `psnr`, and images smaller than 176 x 176.
    """
    smallest = SSIM_WINDOW * 2 ** (MS_SSIM_SCALES - 1)
    reference, estimate = _checked_pair(reference, estimate, smallest=smallest, metric="MS-SSIM")
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    value = multiscale_structural_similarity_index_measure(
        estimate, reference, data_range=1.0, reduction="none", normalize="relu"
    )
    return _batch_vector(value, len(reference))


def _batch_vector(value: object, items: int) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"torchmetrics gave {type(value).__name__}, expected a tensor; install torchmetrics >= 1.8,<2")
    return value.reshape(items).cpu().double()  # (B,), also when the library squeezed a batch of one


def _checked_pair(reference: Tensor, estimate: Tensor, smallest: int, metric: str) -> tuple[Tensor, Tensor]:
    if reference.shape != estimate.shape:
        raise ValueError(
            f"estimate: expected the reference's shape {tuple(reference.shape)}, got {tuple(estimate.shape)}; "
            "decode to the reference's size, one call for each size"
        )
    if reference.ndim != 4 or 0 in reference.shape:
        raise ValueError(
            f"images: expected a non-empty (B,C,H,W), got {tuple(reference.shape)}; use image[None] for a single image"
        )
    if min(reference.shape[-2:]) < smallest:
        raise ValueError(
            f"{metric} needs images of at least {smallest} x {smallest} px, got "
            f"{reference.shape[-2]} x {reference.shape[-1]}; compare larger crops or use another metric"
        )
    for name, x in (("reference", reference), ("estimate", estimate)):
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected floats in [0,1], got {x.dtype}; divide uint8 images by 255")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}: expected finite values in [0,1], got NaN or infinity; check the decoder")
        low, high = float(x.min()), float(x.max())
        if low < -_RANGE_SLACK or high > 1 + _RANGE_SLACK:
            raise ValueError(
                f"{name}: expected values in [0,1], got {low:.4g}..{high:.4g}; clamp the image or rescale it to [0,1]"
            )
    return reference.detach().float(), estimate.detach().float()
