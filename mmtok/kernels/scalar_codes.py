"""Level digits of a scalar quantizer <-> one integer code (a mixed-radix number, the first digit varying fastest)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmtok.kernels.dispatch import choose, installed
from mmtok.kernels.row_search import reduced_precision

MAX_TABLE_CODES = 1 << 18  # beyond, a table of all codes leaves the caches and costs more than the digits
_MAX_CODES = 1 << 62
_EXACT_CODES = 1 << 24  # whole numbers up to here are exact in fp32
_TILE_ROWS = 256  # rows that are bounded as one long row


def pack_digits(digits: Tensor, levels: Sequence[int]) -> Tensor:
    """code = sum_i digit_i * prod_{j<i} levels_j.

    Args:
        digits: (..., d), integers in 0..levels_i-1 of any integer type. levels: d sizes.

    Returns:
        codes (...) int64 in 0..prod(levels)-1.

    Raises:
        ValueError: the last axis is not as long as ``levels``, digits are not integers, or there are over 2^62 codes.
    """
    if digits.shape[-1:] != (len(levels),) or digits.is_floating_point():
        raise ValueError(
            f"digits: expected integers with a last axis of {len(levels)} (one per level), "
            f"got {digits.dtype} of shape {tuple(digits.shape)}"
        )
    _check_levels(levels)
    if choose("pack_digits", _implementations(digits)) == "triton":
        from mmtok.kernels.triton import packed_codes

        rows = digits.reshape(-1, len(levels))
        return packed_codes.pack_digits(rows, levels, centred=False).view(digits.shape[:-1])
    return _horner(digits, levels)


def unpack_digits(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """The inverse of `pack_digits`: codes (...) int64 -> digits (..., d) int64.

    Raises:
        ValueError: there are over 2^62 codes.
    """
    _check_levels(levels)
    if choose("unpack_digits", _implementations(codes)) == "triton":
        from mmtok.kernels.triton import packed_codes

        return packed_codes.unpack_digits(codes.reshape(-1).long(), levels).view(*codes.shape, len(levels))
    digits = []
    for size in levels:
        digits.append(codes % size)
        codes = codes // size
    return torch.stack(digits, -1)


def fsq_bound(x: Tensor, shift: Tensor, half_width: Tensor, offset: Tensor) -> Tensor:
    """tanh(x + shift) * half_width - offset (arXiv 2309.15505, section 3.1), with gradient to x.

    Args:
        x: (..., d) floating point. shift, half_width, offset: (d,), what keeps number i inside its levels.

    Returns:
        (..., d), between -(levels_i - 1) / 2 - offset_i and (levels_i - 1) / 2 - offset_i when half_width says so.

    Raises:
        ValueError: a constant is not (d,).
    """
    d = x.shape[-1] if x.ndim else 0
    if any(t.shape != (d,) for t in (shift, half_width, offset)):
        shapes = [tuple(t.shape) for t in (shift, half_width, offset)]
        raise ValueError(f"shift, half_width, offset: expected shape ({d},) each, as x {tuple(x.shape)}, got {shapes}")
    how = choose("fsq_bound", ("torch", "reference"))
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (x, shift, half_width, offset))
    if how == "reference" or needs_gradient or x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.tanh(x + shift) * half_width - offset
    # Constants of 4 or 5 numbers broadcast over short rows: repeated to long rows, the same sums run faster.
    rows = x.reshape(-1, d)
    out = torch.empty(rows.shape, dtype=torch.result_type(x, shift))
    whole = rows.shape[0] // _TILE_ROWS * _TILE_ROWS
    for part, into, repeats in (
        (rows[:whole].reshape(-1, _TILE_ROWS * d), out[:whole].view(-1, _TILE_ROWS * d), _TILE_ROWS),
        (rows[whole:], out[whole:], 1),
    ):
        torch.add(part, shift.repeat(repeats), out=into)
        into.tanh_().mul_(half_width.repeat(repeats)).sub_(offset.repeat(repeats))
    return out.view(x.shape)


def fsq_pack(bounded: Tensor, levels: Sequence[int]) -> Tensor:
    """Round bounded numbers and pack them: digit_i = round(bounded_i) + floor(levels_i / 2), halves to even.

    Args:
        bounded: (..., d) floating point, rounding to -floor(levels_i / 2)..ceil(levels_i / 2) - 1 (not checked); values
            that are whole already stay as they are. levels: d sizes.

    Returns:
        codes (...) int64 in 0..prod(levels)-1, no gradient.

    Raises:
        ValueError: the last axis is not as long as ``levels``, or the numbers are integers, or over 2^62 codes.
    """
    d = len(levels)
    if bounded.shape[-1:] != (d,) or not bounded.is_floating_point():
        raise ValueError(
            f"bounded: expected floating point with a last axis of {d} (one per level), "
            f"got {bounded.dtype} of shape {tuple(bounded.shape)}; pack_digits takes integer digits"
        )
    _check_levels(levels)
    bounded = bounded.detach()
    how = choose("fsq_pack", _implementations(bounded))
    if how == "triton":
        from mmtok.kernels.triton import packed_codes

        return packed_codes.pack_digits(bounded.reshape(-1, d), levels, centred=True).view(bounded.shape[:-1])
    halves = [size // 2 for size in levels]
    quick = bounded.dtype == torch.float32 and bounded.device.type == "cpu" and math.prod(levels) <= _EXACT_CODES
    if how == "reference" or not quick or torch.compiler.is_compiling() or reduced_precision("cpu"):
        # Weights as 7^3 are not exact in bf16, so a product must not be asked for where it may be computed in that.
        return _horner(bounded.round().long() + torch.tensor(halves, device=bounded.device), levels)
    weights = _weights(levels)
    with torch.autocast("cpu", enabled=False):
        codes = torch.mv(bounded.reshape(-1, d).round(), torch.tensor(weights, dtype=torch.float32))
    centre = sum(half * weight for half, weight in zip(halves, weights, strict=True))
    return codes.add_(centre).long().view(bounded.shape[:-1])


def level_table(levels: Sequence[int]) -> Tensor:
    """What every code means: number i is (digit_i - h_i) / h_i with h_i = floor(levels_i / 2).

    Made once, it decodes by one lookup (torch.nn.functional.embedding); recipes/bench_kernels.py times it (fsq-decode).

    Returns:
        (prod(levels), d) fp32 on the CPU.

    Raises:
        ValueError: a level below 2, or more than 2^18 codes; decode those by `unpack_digits`.
    """
    _check_levels(levels)
    K = math.prod(levels)
    if min(levels) < 2 or K > MAX_TABLE_CODES:
        raise ValueError(
            f"levels: expected sizes of at least 2 with a product of at most {MAX_TABLE_CODES}, got {tuple(levels)}; "
            f"decode larger sets by unpack_digits"
        )
    half = torch.tensor(levels) // 2
    return (unpack_digits(torch.arange(K), levels) - half) / half.float()


def _check_levels(levels: Sequence[int]) -> None:
    if len(levels) < 1 or min(levels) < 1 or math.prod(levels) > _MAX_CODES:
        raise ValueError(
            f"levels: expected at least one size, each >= 1, with a product of at most 2^62, got {tuple(levels)}; "
            f"split them into several codes"
        )


def _weights(levels: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(levels[:-1], lambda a, b: a * b, initial=1))


def _horner(digits: Tensor, levels: Sequence[int]) -> Tensor:
    code = torch.zeros_like(digits[..., 0], dtype=torch.int64)
    for i in reversed(range(len(levels))):
        code = code * levels[i] + digits[..., i]
    return code


def _implementations(x: Tensor) -> tuple[str, ...]:
    """Triton on CUDA, but not in a captured graph: a compiler joins the plain formula with its neighbours."""
    if x.is_cuda and not torch.compiler.is_compiling() and installed("triton"):
        return ("triton", "torch", "reference")
    return ("torch", "reference")
