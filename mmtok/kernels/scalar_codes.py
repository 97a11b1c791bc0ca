"""Level digits of a scalar quantizer <-> one integer code (a mixed-radix number, the first digit varying fastest)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtok.kernels.dispatch import choose


def pack_digits(digits: Tensor, levels: Sequence[int]) -> Tensor:
    """code = sum_i digit_i * prod_{j<i} levels_j.

    Args:
        digits: (..., d), integers in 0..levels_i-1 of any integer type. levels: d sizes.

    Returns:
        codes (...) int64 in 0..prod(levels)-1.

    Raises:
        ValueError: the last axis is not as long as ``levels``, or digits are not integers.
    """
    if digits.shape[-1:] != (len(levels),) or digits.is_floating_point():
        raise ValueError(
            f"digits: expected integers with a last axis of {len(levels)} (one per level), "
            f"got {digits.dtype} of shape {tuple(digits.shape)}"
        )
    choose("pack_digits", ("torch", "reference"))  # one implementation: the equation
    code = torch.zeros_like(digits[..., 0], dtype=torch.int64)
    for i in reversed(range(len(levels))):  # Horner's scheme
        code = code * levels[i] + digits[..., i]
    return code


def unpack_digits(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """The inverse of `pack_digits`: codes (...) int64 -> digits (..., d) int64."""
    choose("unpack_digits", ("torch", "reference"))
    digits = []
    for size in levels:
        digits.append(codes % size)
        codes = codes // size
    return torch.stack(digits, -1)
