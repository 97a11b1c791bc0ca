"""The sum over levels of gathered codebook rows in one launch; its gradient is the deterministic segment sum."""

# Triton's own types describe kernels as plain functions, without launch options and compile-time values.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmtok.kernels.triton.codebook_stats import segment_sums
from mmtok.kernels.triton.variant import Variant

# (BLOCK_D, BLOCK_N): 2048 sums a program, 16 a thread of 4 warps.
TILES = ((16, 128), (32, 64), (64, 32), (128, 16))
_NUM_WARPS = 4


@triton.jit
def _decode_kernel(
    code_ptr,  # (N, Q') int64, any strides
    book_ptr,  # (Q, K, D)
    out_ptr,  # (N, D)
    num_rows,
    width,
    codebook_size,
    code_row_stride,
    code_level_stride,
    LEVELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside, in_width = row < num_rows, column < width
    both = inside[:, None] & in_width[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    codes = code_ptr + row * code_row_stride
    for level in range(LEVELS):
        code = tl.load(codes, mask=inside, other=0)
        line = (code + level * codebook_size) * width
        total += tl.load(book_ptr + line[:, None] + column[None, :], mask=both, other=0.0).to(tl.float32)
        codes += code_level_stride
    tl.store(out_ptr + row[:, None] * width + column[None, :], total, mask=both)


def supported(codes: Tensor, codebooks: Tensor) -> bool:
    """Whether this module decodes such tensors: on one CUDA device, fp32, bf16 or fp16, fewer than 2^31 - 1 rows."""
    return (
        codes.is_cuda
        and codebooks.device == codes.device
        and codes.dtype == torch.int64
        and codebooks.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and codebooks.shape[0] * codebooks.shape[1] < 2**31 - 1
    )


def tile(width: int) -> tuple[int, int]:
    """(BLOCK_D, BLOCK_N) for rows of ``width`` numbers."""
    return next((t for t in TILES if t[0] >= width), TILES[-1])


@torch.library.custom_op("mmtok::residual_decode", mutates_args=())
def _residual_decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    N, num_levels = codes.shape
    _, K, D = codebooks.shape
    codebooks = codebooks.contiguous()
    out = torch.empty(N, D, dtype=codebooks.dtype, device=codebooks.device)
    if out.numel() == 0:
        return out
    block, rows = tile(D)
    with torch.cuda.device_of(codebooks):
        _decode_kernel[(triton.cdiv(N, rows), triton.cdiv(D, block))](
            codes,
            codebooks,
            out,
            N,
            D,
            K,
            codes.stride(0),
            codes.stride(1),
            LEVELS=num_levels,
            BLOCK_N=rows,
            BLOCK_D=block,
            num_warps=_NUM_WARPS,
            num_stages=2,
        )
    return out


@_residual_decode.register_fake
def _(codes: Tensor, codebooks: Tensor) -> Tensor:
    return codebooks.new_empty(codes.shape[0], codebooks.shape[2])


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    codes, codebooks = inputs
    ctx.save_for_backward(codes)
    ctx.shape, ctx.dtype = codebooks.shape, codebooks.dtype


def _gradient(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
    (codes,) = ctx.saved_tensors
    Q, K, D = ctx.shape
    keys = codes + K * torch.arange(codes.shape[1], device=codes.device)  # (N, Q')
    _, sums = segment_sums(grad, keys.flatten(), Q * K, codes.shape[1])
    return None, sums.view(Q, K, D).to(ctx.dtype)


_residual_decode.register_autograd(_gradient, setup_context=_keep)


def residual_decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """sum_q C_q[k_q], added in fp32 in the order of the levels.

    Args:
        codes: (N, Q') int64, 1 <= Q' <= Q, each in 0..K-1 (not checked), any strides. codebooks: (Q, K, D).

    Returns:
        (N, D) of the codebooks' type, with a bitwise repeatable gradient to ``codebooks``.
    """
    return _residual_decode(codes, codebooks)


def _variants() -> list[Variant]:
    integers = ("num_rows", "width", "codebook_size", "code_row_stride", "code_level_stride")
    out = []
    for block, rows in TILES:
        for dtype, aligned in (("*fp32", True), ("*bf16", False)):
            signature = {
                **{"code_ptr": "*i64", "book_ptr": dtype, "out_ptr": dtype},
                **dict.fromkeys(integers, "i32"),
                **dict.fromkeys(("LEVELS", "BLOCK_N", "BLOCK_D"), "constexpr"),
            }
            constants = {"LEVELS": 8, "BLOCK_N": rows, "BLOCK_D": block}
            whole = ("code_ptr", "book_ptr", "out_ptr", "width") if aligned else ()
            name = f"residual_decode/{dtype[1:]}_D{block}{'' if aligned else '_odd'}"
            out.append(Variant(name, _decode_kernel, signature, constants, _NUM_WARPS, 2, aligned=whole))
    return out


VARIANTS = _variants()
