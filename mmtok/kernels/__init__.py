"""Pure tensor functions under the quantizers: each file holds the equation (`x_reference`) and the fast path (`x`)."""

from mmtok.kernels import (
    binary_codes,
    codebook_stats,
    dispatch,
    level_codes,
    nearest_code,
    residual_codes,
    scalar_codes,
)

__all__ = [
    "binary_codes",
    "codebook_stats",
    "dispatch",
    "level_codes",
    "nearest_code",
    "residual_codes",
    "scalar_codes",
]
