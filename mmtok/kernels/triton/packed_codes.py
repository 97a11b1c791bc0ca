"""Bits and level digits <-> integer codes, one launch each; the sign or the rounding in front is part of it.

In a captured graph (torch.compile) the plain torch formulas are used instead, see `mmtok.kernels.binary_codes`: a
compiler makes one kernel of them together with what stands around them.
"""

# Triton's own types describe kernels as plain functions, without launch options and compile-time values.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmtok.kernels.triton.variant import Variant

_ROWS = 128
_NUM_WARPS = 4
# Rounds an fp32 below 2^22 to the nearest integer, halves to even as torch.round: the sum has no fraction bits.
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23


@triton.jit
def _pack_bits_kernel(
    x_ptr,  # (N, NUM_BITS) contiguous
    out_ptr,  # (N,) int64
    num_rows,
    NUM_BITS: tl.constexpr,
    SIGN: tl.constexpr,  # a bit is x > 0; else x itself, which is 0 or 1
    BLOCK: tl.constexpr,  # a power of two >= NUM_BITS
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    bit = tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (bit < NUM_BITS)[None, :]
    x = tl.load(x_ptr + row[:, None] * NUM_BITS + bit[None, :], mask=mask, other=0)
    value = (x > 0).to(tl.int64) if SIGN else x.to(tl.int64)
    tl.store(out_ptr + row, tl.sum(value << bit[None, :].to(tl.int64), 1), mask=row < num_rows)


@triton.jit
def _unpack_bits_kernel(
    code_ptr,  # (N,) int64
    out_ptr,  # (N, NUM_BITS) uint8
    num_rows,
    NUM_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    bit = tl.arange(0, BLOCK)
    code = tl.load(code_ptr + row, mask=row < num_rows, other=0)
    value = (code[:, None] >> bit[None, :].to(tl.int64)) & 1
    mask = (row < num_rows)[:, None] & (bit < NUM_BITS)[None, :]
    tl.store(out_ptr + row[:, None] * NUM_BITS + bit[None, :], value.to(tl.uint8), mask=mask)


@triton.jit
def _pack_digits_kernel(
    x_ptr,  # (N, d) contiguous, d = len(LEVELS)
    out_ptr,  # (N,) int64
    num_rows,
    LEVELS: tl.constexpr,
    CENTRED: tl.constexpr,  # x is rounded first and counted from -(L // 2); else it is a digit 0..L-1
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    code = tl.zeros((ROWS,), tl.int64)
    for i in tl.static_range(len(LEVELS) - 1, -1, -1):  # Horner's scheme
        x = tl.load(x_ptr + row * len(LEVELS) + i, mask=inside, other=0)
        whole = ((x.to(tl.float32) + _ROUNDER) - _ROUNDER) if CENTRED else x
        digit = whole.to(tl.int64) + (LEVELS[i] // 2 if CENTRED else 0)
        code = code * LEVELS[i] + digit
    tl.store(out_ptr + row, code, mask=inside)


@triton.jit
def _unpack_digits_kernel(
    code_ptr,  # (N,) int64
    out_ptr,  # (N, d) int64
    num_rows,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    code = tl.load(code_ptr + row, mask=inside, other=0)
    for i in tl.static_range(len(LEVELS)):
        tl.store(out_ptr + row * len(LEVELS) + i, code % LEVELS[i], mask=inside)
        code = code // LEVELS[i]


def pack_bits(bits: Tensor, sign: bool) -> Tensor:
    """bits (N, D), D <= 62, of any type -> codes (N,) int64; with ``sign`` a bit is [x > 0]."""
    N, D = bits.shape
    bits = bits.contiguous()
    bits = bits.view(torch.uint8) if bits.dtype == torch.bool else bits
    codes = torch.empty(N, dtype=torch.int64, device=bits.device)
    if N:
        with torch.cuda.device_of(bits):
            _pack_bits_kernel[(triton.cdiv(N, _ROWS),)](
                bits, codes, N, NUM_BITS=D, SIGN=sign, BLOCK=_block(D), ROWS=_ROWS, num_warps=_NUM_WARPS, num_stages=1
            )
    return codes


def unpack_bits(codes: Tensor, num_bits: int) -> Tensor:
    """codes (N,) int64 -> bits (N, num_bits) bool."""
    codes = codes.contiguous()
    bits = torch.empty(codes.shape[0], num_bits, dtype=torch.bool, device=codes.device)
    if bits.numel():
        with torch.cuda.device_of(codes):
            _unpack_bits_kernel[(triton.cdiv(codes.shape[0], _ROWS),)](
                codes,
                bits.view(torch.uint8),
                codes.shape[0],
                NUM_BITS=num_bits,
                BLOCK=_block(num_bits),
                ROWS=_ROWS,
                num_warps=_NUM_WARPS,
                num_stages=1,
            )
    return bits


def pack_digits(digits: Tensor, levels: Sequence[int], centred: bool) -> Tensor:
    """digits (N, d) -> codes (N,) int64; ``centred``: floats that are rounded and counted from -(levels_i // 2)."""
    N = digits.shape[0]
    digits = digits.contiguous()
    codes = torch.empty(N, dtype=torch.int64, device=digits.device)
    if N:
        with torch.cuda.device_of(digits):
            _pack_digits_kernel[(triton.cdiv(N, _ROWS),)](
                digits,
                codes,
                N,
                LEVELS=tuple(levels),
                CENTRED=centred,
                ROWS=_ROWS,
                num_warps=_NUM_WARPS,
                num_stages=1,
            )
    return codes


def unpack_digits(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """codes (N,) int64 -> digits (N, d) int64."""
    codes = codes.contiguous()
    digits = torch.empty(codes.shape[0], len(levels), dtype=torch.int64, device=codes.device)
    if digits.numel():
        with torch.cuda.device_of(codes):
            _unpack_digits_kernel[(triton.cdiv(codes.shape[0], _ROWS),)](
                codes,
                digits,
                codes.shape[0],
                LEVELS=tuple(levels),
                ROWS=_ROWS,
                num_warps=_NUM_WARPS,
                num_stages=1,
            )
    return digits


def _block(num_bits: int) -> int:
    return 1 << (num_bits - 1).bit_length()  # the next power of two


def _variants() -> list[Variant]:
    """Tensors made by torch start at a multiple of 16 bytes, views of them need not: both are compiled."""
    out = []
    both = (("x_ptr", "out_ptr"), ())
    for D, dtype, sign in ((8, "*fp32", True), (18, "*u8", False), (62, "*bf16", True)):
        types = {"x_ptr": dtype, "out_ptr": "*i64", "num_rows": "i32"}
        types |= dict.fromkeys(("NUM_BITS", "SIGN", "BLOCK", "ROWS"), "constexpr")
        constants = {"NUM_BITS": D, "SIGN": sign, "BLOCK": _block(D), "ROWS": _ROWS}
        for aligned in both:
            name = f"pack_bits/{dtype[1:]}_{D}{'_sign' if sign else ''}{'' if aligned else '_odd'}"
            out.append(Variant(name, _pack_bits_kernel, types, constants, _NUM_WARPS, 1, aligned=aligned))
    for D in (8, 62):
        types = {"code_ptr": "*i64", "out_ptr": "*u8", "num_rows": "i32"}
        types |= dict.fromkeys(("NUM_BITS", "BLOCK", "ROWS"), "constexpr")
        constants = {"NUM_BITS": D, "BLOCK": _block(D), "ROWS": _ROWS}
        whole = ("code_ptr", "out_ptr")
        out.append(Variant(f"unpack_bits/{D}", _unpack_bits_kernel, types, constants, _NUM_WARPS, 1, aligned=whole))
    for levels in ((8, 5, 5, 5), (8, 8, 8, 6, 5)):
        label = "x".join(map(str, levels))
        for dtype, centred in (("*fp32", True), ("*bf16", True), ("*i64", False)):
            types = {"x_ptr": dtype, "out_ptr": "*i64", "num_rows": "i32"}
            types |= dict.fromkeys(("LEVELS", "CENTRED", "ROWS"), "constexpr")
            constants = {"LEVELS": levels, "CENTRED": centred, "ROWS": _ROWS}
            name = f"pack_digits/{dtype[1:]}_{label}"
            out.append(Variant(name, _pack_digits_kernel, types, constants, _NUM_WARPS, 1, aligned=both[0]))
        types = {"code_ptr": "*i64", "out_ptr": "*i64", "num_rows": "i32", "LEVELS": "constexpr", "ROWS": "constexpr"}
        constants = {"LEVELS": levels, "ROWS": _ROWS}
        whole = ("code_ptr", "out_ptr")
        name = f"unpack_digits/{label}"
        out.append(Variant(name, _unpack_digits_kernel, types, constants, _NUM_WARPS, 1, aligned=whole))
    return out


VARIANTS = _variants()
