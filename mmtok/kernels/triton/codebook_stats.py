"""Counts and vector sums of each code, bitwise repeatable: sort by code, then segment sums in a fixed order.

Atomic additions would be done in another order at every run. Here a stable sort brings the rows of one code together,
and a tree of launches adds them. A launch cuts the sorted rows into chunks of fixed size. A code whose rows lie inside
one chunk is finished there; the chunk's first and last codes, which may go on in its neighbours, leave one partial row
each, and these rows, sorted by code again, are the input of the next launch. So a chunk of R rows leaves 2, a code that
owns all N rows costs log(N) / log(R / 2) launches and never a loop over N, and each sum is written exactly once.
"""

# Triton's own types describe kernels as plain functions, without launch options and compile-time values.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmtok.kernels.triton.variant import Variant

# (BLOCK_D, ROWS): 2048 or 4096 elements a program, at most 32 a thread of 4 warps: sums and codes stay in registers.
TILES = ((16, 128), (32, 128), (64, 32), (128, 32))
_NUM_WARPS = 4


@triton.jit
def _add_same(code_a, sum_a, code_b, sum_b):
    """Joins two neighbouring runs of sorted rows: the sum of the code that the right one ends with."""
    return code_b, sum_b + tl.where(code_a == code_b, sum_a, 0.0)


@triton.jit
def _segment_sums_kernel(
    x_ptr,  # GATHER: (N, D) rows in any order; else (num_rows, D) sorted
    order_ptr,  # GATHER: (num_rows,) int64, which key stands at each place of the sorted order
    code_ptr,  # (num_rows,) int32, sorted; num_codes marks rows that do not count
    sums_ptr,  # (num_codes, D)
    part_ptr,  # (2 * chunks, D)
    part_code_ptr,  # (2 * chunks,) int32
    num_rows,
    num_codes,
    width,
    x_stride,
    repeat,
    GATHER: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, ROWS)
    row = chunk * ROWS + place
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = column < width
    code = tl.load(code_ptr + row, mask=row < num_rows, other=num_codes)
    counts = code < num_codes
    source = tl.load(order_ptr + row, mask=counts, other=0) // repeat if GATHER else row
    # Rows that do not count are never read, so whatever they hold stays there.
    x = tl.load(
        x_ptr + source[:, None] * x_stride + column[None, :], mask=counts[:, None] & in_width[None, :], other=0.0
    ).to(tl.float32)
    wide_code = code[:, None] + tl.zeros((ROWS, BLOCK_D), tl.int32)
    wide_code, total = tl.associative_scan((wide_code, x), 0, _add_same)

    following = tl.load(code_ptr + row + 1, mask=row + 1 < num_rows, other=-1)
    ends = counts & ((code != following) | (place == ROWS - 1))
    sums = sums_ptr + code.to(tl.int64)[:, None] * width + column[None, :]
    if LAST:
        tl.store(sums, total, mask=ends[:, None] & in_width[None, :])
    else:
        last_row = tl.minimum(chunk * ROWS + ROWS, num_rows) - 1
        first_code = tl.load(code_ptr + chunk * ROWS)
        last_code = tl.load(code_ptr + last_row)
        at_edge = (code == first_code) | (code == last_code)
        tl.store(sums, total, mask=(ends & (at_edge == 0))[:, None] & in_width[None, :])
        slot = 2 * chunk + tl.where(code == first_code, 0, 1)
        tl.store(
            part_ptr + slot[:, None] * width + column[None, :],
            total,
            mask=(ends & at_edge)[:, None] & in_width[None, :],
        )
        # One code fills the chunk: its second slot is a row of zeros of the same code, so that the order stays sorted.
        tl.store(
            part_ptr + (2 * chunk + 1) * width + column,
            tl.zeros((BLOCK_D,), tl.float32),
            mask=in_width & (first_code == last_code),
        )
        if tl.program_id(1) == 0:
            tl.store(part_code_ptr + 2 * chunk, first_code)
            tl.store(part_code_ptr + 2 * chunk + 1, last_code)


def tile(width: int) -> tuple[int, int]:
    """(BLOCK_D, ROWS) for rows of ``width`` numbers."""
    return next((t for t in TILES if t[0] >= width), TILES[-1])


@torch.library.custom_op("mmtok::segment_sums", mutates_args=())
def segment_sums(x: Tensor, keys: Tensor, num_keys: int, repeat: int) -> tuple[Tensor, Tensor]:
    """For each key: how often it occurs, and the sum of its rows of x.

    Args:
        x: (N, D) floating point. keys: (N * repeat,) integers, key i belongs to row i // repeat; 0..num_keys-1, or
            num_keys for a row that does not count and is not read. num_keys: below 2^31 - 1.

    Returns:
        counts (num_keys,), sums (num_keys, D), both fp32.
    """
    width, num_rows = x.shape[1], keys.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    sums = torch.zeros(num_keys, width, dtype=torch.float32, device=x.device)
    codes, order = torch.sort(keys.to(torch.int32), stable=True)
    edges = torch.searchsorted(codes, torch.arange(num_keys + 1, dtype=torch.int32, device=x.device))
    counts = (edges[1:] - edges[:-1]).float()  # whole numbers, rounded once
    block, rows = tile(width)
    gather, x_stride = True, x.stride(0)
    while num_rows and width:
        chunks = triton.cdiv(num_rows, rows)
        parts = torch.empty(2 * chunks, width, dtype=torch.float32, device=x.device)
        part_codes = torch.empty(2 * chunks, dtype=torch.int32, device=x.device)
        with torch.cuda.device_of(x):
            _segment_sums_kernel[(chunks, triton.cdiv(width, block))](
                x,
                order,
                codes,
                sums,
                parts,
                part_codes,
                num_rows,
                num_keys,
                width,
                x_stride,
                repeat,
                GATHER=gather,
                LAST=chunks == 1,
                ROWS=rows,
                BLOCK_D=block,
                num_warps=_NUM_WARPS,
                num_stages=1,
            )
        if chunks == 1:
            break
        x, codes, num_rows, gather, x_stride = parts, part_codes, 2 * chunks, False, width
    return counts, sums


@segment_sums.register_fake
def _(x: Tensor, keys: Tensor, num_keys: int, repeat: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(num_keys, dtype=torch.float32), x.new_empty(num_keys, x.shape[1], dtype=torch.float32)


def codebook_stats(z: Tensor, codes: Tensor, codebook_size: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `mmtok.kernels.codebook_stats.codebook_stats`, with checked inputs."""
    keys = codes if mask is None else torch.where(mask, codes, codebook_size)
    return segment_sums(z.detach(), keys, codebook_size, 1)


# What differs from the others by less than a tile does is compiled for one tile.
_ONCE = ((True, False, "*bf16", True), (True, True, "*fp32", True), (False, False, "*fp32", True))


def _variants() -> list[Variant]:
    signature = {
        "x_ptr": "*fp32",
        "order_ptr": "*i64",
        "code_ptr": "*i32",
        "sums_ptr": "*fp32",
        "part_ptr": "*fp32",
        "part_code_ptr": "*i32",
        **dict.fromkeys(("num_rows", "num_codes", "width", "x_stride", "repeat"), "i32"),
        **dict.fromkeys(("GATHER", "LAST", "ROWS", "BLOCK_D"), "constexpr"),
    }
    pointers = tuple(name for name in signature if name.endswith("_ptr"))
    out = []
    for block, rows in TILES:
        for gather, last, dtype, aligned in (
            (True, False, "*fp32", True),
            (True, False, "*fp32", False),
            (False, True, "*fp32", True),
            *(_ONCE if block == TILES[-1][0] else ()),
        ):
            kind = f"{'gather' if gather else 'parts'}{'_last' if last else ''}{'' if aligned else '_odd'}"
            constants = {"GATHER": gather, "LAST": last, "ROWS": rows, "BLOCK_D": block}
            whole = (*pointers, "width", "x_stride") if aligned else ()
            name = f"segment_sums/{kind}_{dtype[1:]}_D{block}"
            types = {**signature, "x_ptr": dtype}
            out.append(Variant(name, _segment_sums_kernel, types, constants, _NUM_WARPS, 1, aligned=whole))
    return out


VARIANTS = _variants()
