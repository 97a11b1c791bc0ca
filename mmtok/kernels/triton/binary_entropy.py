"""The mean distribution of grouped soft binary codes, and its gradient, without N x 2^g in memory.

The distribution of a group of g independent bits is the outer product of those of its two halves, so its weighted mean
over rows is a product of two narrow matrices, high' diag(w) low, both made on the fly from the logits. A program owns
one group and a fixed chunk of rows and leaves one partial mean; the partials are added in a fixed order, so the result
is bitwise repeatable. The backward pass computes the halves again.
"""

# Triton's own types describe kernels as plain functions, without launch options and compile-time values.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmtok.kernels.triton.variant import Variant

MAX_GROUP_BITS = 9  # 10 spill registers with 4 warps
_TILE = 32  # rows of one product
_CHUNK_TILES = 16  # tiles of one program of the forward pass
_NUM_WARPS = 4


@triton.jit
def _bit(x_ptr, line, live, column, exists):
    """P(bit = 1) and P(bit = 0) of each row; a bit that the last, smaller group lacks is surely 0."""
    x = tl.load(x_ptr + line + column, mask=live & exists, other=0.0)
    return tl.where(exists, tl.sigmoid(x), 0.0), tl.where(exists, tl.sigmoid(-x), 1.0)


@triton.jit
def _half(x_ptr, line, live, column, width, BITS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """(TILE, BLOCK): the probabilities of the 2^BITS codes of the bits at ``column``.., 0 in the columns above."""
    code = tl.arange(0, BLOCK)
    p = tl.zeros((TILE, BLOCK), tl.float32) + tl.where(code < (1 << BITS), 1.0, 0.0)[None, :]
    for k in tl.static_range(BITS):
        one, zero = _bit(x_ptr, line, live, column + k, column + k < width)
        p *= tl.where(((code >> k) & 1)[None, :] == 1, one[:, None], zero[:, None])
    return p


@triton.jit
def _mean_kernel(
    x_ptr,  # (N, D) fp32
    weight_ptr,  # (N,) fp32
    out_ptr,  # (chunks, G, 2^(LOW + HIGH)) fp32
    num_rows,
    num_columns,
    num_groups,
    LOW: tl.constexpr,  # bits of the lower half of a group
    HIGH: tl.constexpr,
    LOW_BLOCK: tl.constexpr,  # at least 16, which a tile product needs
    HIGH_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
):
    chunk, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = group * (LOW + HIGH)
    width = tl.minimum(num_columns, column + LOW + HIGH)  # the group's bits end here
    total = tl.zeros((HIGH_BLOCK, LOW_BLOCK), tl.float32)
    row = chunk * (TILE * CHUNK_TILES) + tl.arange(0, TILE)
    for _ in range(CHUNK_TILES):
        weight = tl.load(weight_ptr + row, mask=row < num_rows, other=0.0)
        live = weight > 0  # rows without weight are not read
        line = row * num_columns
        low = _half(x_ptr, line, live, column, width, LOW, LOW_BLOCK, TILE)
        high = _half(x_ptr, line, live, column + LOW, width, HIGH, HIGH_BLOCK, TILE)
        total = tl.dot(tl.trans(high * weight[:, None]), low, total, input_precision="ieee")
        row += TILE
    low_code, high_code = tl.arange(0, LOW_BLOCK), tl.arange(0, HIGH_BLOCK)
    code = (high_code[:, None] << LOW) + low_code[None, :]
    inside = (high_code < (1 << HIGH))[:, None] & (low_code < (1 << LOW))[None, :]
    start = (chunk * num_groups + group) << (LOW + HIGH)
    tl.store(out_ptr + start + code, total, mask=inside)


@triton.jit
def _gradient_kernel(
    x_ptr,  # (N, D) fp32
    weight_ptr,  # (N,) fp32
    table_ptr,  # (G, 2^(LOW + HIGH)) fp32: the gradient of the mean distribution
    grad_ptr,  # (N, D) fp32
    num_rows,
    num_columns,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LOW_BLOCK: tl.constexpr,
    HIGH_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """d p_c / d x_k = p_c P(bit k = 0) where c has bit k, -p_c P(bit k = 1) where it has not."""
    group = tl.program_id(1)
    column = group * (LOW + HIGH)
    width = tl.minimum(num_columns, column + LOW + HIGH)
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    weight = tl.load(weight_ptr + row, mask=row < num_rows, other=0.0)
    live = weight > 0
    line = row * num_columns
    low_code, high_code = tl.arange(0, LOW_BLOCK), tl.arange(0, HIGH_BLOCK)
    low = _half(x_ptr, line, live, column, width, LOW, LOW_BLOCK, TILE)
    high = _half(x_ptr, line, live, column + LOW, width, HIGH, HIGH_BLOCK, TILE)
    code = (high_code[:, None] << LOW) + low_code[None, :]
    inside = (high_code < (1 << HIGH))[:, None] & (low_code < (1 << LOW))[None, :]
    table = tl.load(table_ptr + (group.to(tl.int64) << (LOW + HIGH)) + code, mask=inside, other=0.0)
    by_low = low * tl.dot(high, table, input_precision="ieee")  # (TILE, LOW_BLOCK): summed over the upper half
    by_high = high * tl.dot(low, tl.trans(table), input_precision="ieee")  # (TILE, HIGH_BLOCK)
    for k in tl.static_range(LOW + HIGH):
        at = column + k
        one, zero = _bit(x_ptr, line, live, at, at < width)
        if k < LOW:
            has = ((low_code >> k) & 1)[None, :] == 1
            with_bit, without = tl.sum(tl.where(has, by_low, 0.0), 1), tl.sum(tl.where(has, 0.0, by_low), 1)
        else:
            has = ((high_code >> (k - LOW)) & 1)[None, :] == 1
            with_bit, without = tl.sum(tl.where(has, by_high, 0.0), 1), tl.sum(tl.where(has, 0.0, by_high), 1)
        tl.store(grad_ptr + line + at, weight * (zero * with_bit - one * without), mask=(row < num_rows) & (at < width))


def supported(logits: Tensor, bits_per_group: int) -> bool:
    """Whether this module computes such groups: on a CUDA device, at most 9 bits each."""
    return logits.is_cuda and bits_per_group <= MAX_GROUP_BITS


def _halves(bits_per_group: int) -> dict[str, int]:
    low = (bits_per_group + 1) // 2
    high = bits_per_group - low
    return {"LOW": low, "HIGH": high, "LOW_BLOCK": max(16, 2**low), "HIGH_BLOCK": max(16, 2**high)}


@torch.library.custom_op("mmtok::mean_code_distribution", mutates_args=())
def mean_code_distribution(x: Tensor, weight: Tensor, bits_per_group: int) -> Tensor:
    """sum_n w_n p_n of each group of consecutive bits.

    Args:
        x: (N, D) fp32, the log-odds of each bit. weight: (N,) fp32, at least 0; rows of weight 0 are not read.
        bits_per_group: g, 1..9; the last group may be smaller.

    Returns:
        (ceil(D / g), 2^g) fp32, with a gradient to x; 0 for the codes that a smaller last group lacks.
    """
    (N, D), x = x.shape, x.contiguous()
    groups = triton.cdiv(D, bits_per_group)
    chunks = triton.cdiv(N, _TILE * _CHUNK_TILES)
    parts = torch.empty(chunks, groups, 2**bits_per_group, dtype=torch.float32, device=x.device)
    if chunks and groups:
        with torch.cuda.device_of(x):
            _mean_kernel[(chunks, groups)](
                x,
                weight.contiguous(),
                parts,
                N,
                D,
                groups,
                **_halves(bits_per_group),
                TILE=_TILE,
                CHUNK_TILES=_CHUNK_TILES,
                num_warps=_NUM_WARPS,
                num_stages=1,
            )
    return parts.sum(0)


@mean_code_distribution.register_fake
def _(x: Tensor, weight: Tensor, bits_per_group: int) -> Tensor:
    return x.new_empty(-(-x.shape[1] // bits_per_group), 2**bits_per_group)


@torch.library.custom_op("mmtok::mean_code_distribution_gradient", mutates_args=())
def _distribution_gradient(x: Tensor, weight: Tensor, table: Tensor, bits_per_group: int) -> Tensor:
    (N, D), x = x.shape, x.contiguous()
    grad = torch.empty(N, D, dtype=torch.float32, device=x.device)
    if grad.numel():
        with torch.cuda.device_of(x):
            _gradient_kernel[(triton.cdiv(N, _TILE), table.shape[0])](
                x,
                weight.contiguous(),
                table.contiguous(),
                grad,
                N,
                D,
                **_halves(bits_per_group),
                TILE=_TILE,
                num_warps=_NUM_WARPS,
                num_stages=1,
            )
    return grad


@_distribution_gradient.register_fake
def _(x: Tensor, weight: Tensor, table: Tensor, bits_per_group: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, ctx.bits_per_group = inputs
    ctx.save_for_backward(x, weight, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    x, weight, p = ctx.saved_tensors
    # Each row's distribution sums to 1, so a constant added to a group's gradient changes nothing; without its mean
    # there is less to cancel.
    table = grad - (grad * p).sum(1, keepdim=True)
    return _distribution_gradient(x, weight, table, ctx.bits_per_group), None, None


mean_code_distribution.register_autograd(_backward, setup_context=_keep)


def _variants() -> list[Variant]:
    out = []
    for bits in (1, 8, MAX_GROUP_BITS):  # what the sizes between take lies between
        halves = _halves(bits)
        blocks = dict.fromkeys((*halves, "TILE"), "constexpr")
        types = {"x_ptr": "*fp32", "weight_ptr": "*fp32", "out_ptr": "*fp32"}
        types |= dict.fromkeys(("num_rows", "num_columns", "num_groups"), "i32")
        types |= {**blocks, "CHUNK_TILES": "constexpr"}
        constants = {**halves, "TILE": _TILE, "CHUNK_TILES": _CHUNK_TILES}
        whole = ("x_ptr", "weight_ptr", "out_ptr")
        out.append(Variant(f"mean_code/{bits}", _mean_kernel, types, constants, _NUM_WARPS, 1, aligned=whole))
        types = {"x_ptr": "*fp32", "weight_ptr": "*fp32", "table_ptr": "*fp32", "grad_ptr": "*fp32"}
        types |= {"num_rows": "i32", "num_columns": "i32", **blocks}
        whole = ("x_ptr", "weight_ptr", "table_ptr", "grad_ptr")
        constants = {**halves, "TILE": _TILE}
        name = f"mean_code_gradient/{bits}"
        out.append(Variant(name, _gradient_kernel, types, constants, _NUM_WARPS, 1, aligned=whole))
    return out


VARIANTS = _variants()
