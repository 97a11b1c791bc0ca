"""The second pass under `nearest_code` and `residual_codes`: fp64 for the few rows that the first could not certify."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _exact_codes(
    x, codebook_ptr, width, codebook_size, W: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    COSINE: tl.constexpr,
):  # fmt: skip
    """Of each row of x (ROWS, 1, W) fp64: argmin of |x - c|^2, or argmax of the cosine; the lowest code on ties."""
    dims = tl.arange(0, W)[None, None, :]
    lanes = tl.arange(0, BLOCK_K)
    best = tl.full((ROWS, BLOCK_K), float("inf"), tl.float64)
    codes = tl.zeros((ROWS, BLOCK_K), tl.int32)
    for start in range(0, codebook_size, BLOCK_K):
        k = start + lanes
        cells = codebook_ptr + k[None, :, None] * width + dims
        c = tl.load(cells, mask=(k < codebook_size)[None, :, None] & (dims < width), other=0.0).to(tl.float64)
        if COSINE:
            square = tl.sum(c * c, 2)  # (1, BLOCK_K)
            distance = -tl.sum(x * c, 2) / tl.sqrt(tl.where(square > 0, square, 1.0))
        else:
            distance = tl.sum((x - c) * (x - c), 2)
        distance = tl.where((k < codebook_size)[None, :], distance, float("inf"))
        codes = tl.where(distance < best, k[None, :], codes)
        best = tl.minimum(best, distance)
    return tl.min(tl.where(best == tl.min(best, 1)[:, None], codes, codebook_size - 1), 1)


@triton.jit(do_not_specialize=["width", "codebook_size", "num_levels"])
def repair_kernel(
    z_ptr,  # (N, D) fp32
    codebooks_ptr,  # (Q, K, D) fp32
    codes_ptr,  # in and out (N, Q) int64: those not certified as -1 - code
    worklist_ptr,  # (N,) int32: the rows to settle
    counter_ptr,  # (1,) int32: how many
    width,
    codebook_size,
    num_levels,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COSINE: tl.constexpr,
):
    """Settle the rows on the list, ROWS at a time: they share the reading of the codebook, which is what costs.

    A certified code is right if all codes before it are. So a level is searched again where it was not certified, or
    once an earlier code of the row has turned out wrong.
    """
    dims = tl.arange(0, W)[None, None, :]
    count = tl.load(counter_ptr)
    for item in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        places = item + tl.arange(0, ROWS)
        valid = places < count
        rows = tl.load(worklist_ptr + places, mask=valid, other=0).to(tl.int64)
        residual = tl.load(z_ptr + rows[:, None, None] * width + dims, mask=dims < width, other=0.0).to(tl.float64)
        changed = rows < 0
        codebook_ptr = codebooks_ptr
        code_ptr = codes_ptr + rows * num_levels
        for _ in range(num_levels):
            stored = tl.load(code_ptr, mask=valid, other=0).to(tl.int32)
            code = tl.maximum(stored, -1 - stored)
            again = (stored < 0) | changed
            if tl.max(again.to(tl.int32), 0) > 0:
                exact = _exact_codes(residual, codebook_ptr, width, codebook_size, W, ROWS, BLOCK_K, COSINE)
                changed = changed | (again & (exact != code))
                code = tl.where(again, exact, code)
                tl.store(code_ptr, code.to(tl.int64), mask=valid)
            chosen = codebook_ptr + code[:, None, None] * width + dims
            residual -= tl.load(chosen, mask=dims < width, other=0.0).to(tl.float64)
            codebook_ptr += codebook_size.to(tl.int64) * width
            code_ptr += 1
