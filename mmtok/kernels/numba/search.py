"""Exact nearest codes: fp32 scores of a tile in registers, a proof for each row, and fp64 for the rows without one.

numba does not keep a tile of scores in registers, so the tiles are written in LLVM's vector types, which LLVM in turn
splits on processors with narrower registers. All of it is one file, since numba keeps compiled functions on disk and
compiles them again only when their own file changes, not when one does that they take something from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from mmtok.kernels.numba.compiling import compiled

# Registers decide: 32 of 16 floats hold 8 x 2 sums, 16 of 8 floats hold 6 x 2 sums, beside the operands.
LANES, ROWS = (16, 8) if binding.get_host_cpu_features().get("avx512f") else (8, 6)
VECTORS = 2
CODES = LANES * VECTORS  # codes of one block
FOLD_ROWS = 4

_f32, _i32, _i64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_floats, _ints = ir.VectorType(_f32, LANES), ir.VectorType(_i32, LANES)
_shorts = ir.VectorType(ir.IntType(16), LANES)

_ROWS_AT_ONCE = 48  # a multiple of 8 and of 6: their scores' minima stay in the first-level cache
_CACHE_FLOATS = 6 << 10  # of the codes that all those rows meet before the next ones
_PART = 64  # terms of a distance between two looks whether it is already too long
_NONE = np.int32(0)


_compiled = compiled()
# Sums whose order the compiler may choose, so that it can use vectors: the same order for every code, so ties stay.
_any_order = compiled({"reassoc", "contract"})


@intrinsic
def score_tile(typingctx, x, codebook, half, num_blocks, width, first_block, best, second, group):
    """Scores of ROWS rows against ``num_blocks`` blocks of codes, folded into the running minima of each lane.

    Lane l of a row sees the codes k with k % LANES == l and keeps the least score, the second least, and k // LANES of
    the least; a later code takes over only when it is strictly better.

    Args:
        x: (ROWS, D) fp32. codebook: (blocks, D, CODES) fp32, the negated codes. half: (blocks, CODES) fp32, half the
            squared norms. width: D. first_block: number of the first block, for the code numbers.
        best, second: (ROWS, LANES) fp32. group: (ROWS, LANES) int32. Read and written.
    """
    signature = types.void(x, codebook, half, types.intp, types.intp, types.intp, best, second, group)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _generate_tile(builder, *_pointers(context, builder, signature, args))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def fold_products(typingctx, products, half, num_groups, stride, best, second, group):
    """Scores half - product of FOLD_ROWS rows whose products are known in bf16, folded as `score_tile` does.

    Args:
        products: (FOLD_ROWS, stride) uint16, the bits of bf16 numbers. half: (num_groups * LANES,) fp32.
        best, second: (FOLD_ROWS, LANES) fp32. group: (FOLD_ROWS, LANES) int32. Read and written.
    """
    signature = types.void(products, half, types.intp, types.intp, best, second, group)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits, half, num_groups, stride, *state = _pointers(context, builder, signature, args)
        slots = _open_state(builder, state, FOLD_ROWS)
        with cgutils.for_range(builder, num_groups, intp=_i64) as loop:
            start = builder.mul(loop.index, _const(LANES))
            norms = _load(builder, half, start, _floats)
            here = _splat(builder, builder.trunc(loop.index, _i32), _ints)
            for r in range(FOLD_ROWS):
                short = _load(builder, bits, builder.add(builder.mul(stride, _const(r)), start), _shorts)
                shift = ir.Constant(_ints, [16] * LANES)
                product = builder.bitcast(builder.shl(builder.zext(short, _ints), shift), _floats)
                _fold(builder, builder.fsub(norms, product), here, slots[r])
        _close_state(builder, state, slots)
        return context.get_dummy_value()

    return signature, generate


def _generate_tile(
    builder: Any, x: Any, codebook: Any, half: Any, num_blocks: Any, width: Any, first_block: Any, *state: Any
) -> None:
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_floats, [_floats] * 3), f"llvm.fmuladd.v{LANES}f32"
    )
    slots = _open_state(builder, state, ROWS)
    sums = {(r, v): cgutils.alloca_once(builder, _floats) for r in range(ROWS) for v in range(VECTORS)}
    rows = [builder.gep(x, [builder.mul(width, _const(r))]) for r in range(ROWS)]
    with cgutils.for_range(builder, num_blocks, intp=_i64) as block:
        start = builder.mul(block.index, _const(CODES))
        for v in range(VECTORS):
            norms = _load(builder, half, builder.add(start, _const(v * LANES)), _floats)
            for r in range(ROWS):
                builder.store(norms, sums[r, v])
        codes = builder.gep(codebook, [builder.mul(start, width)])
        with cgutils.for_range(builder, width, intp=_i64) as d:
            offset = builder.mul(d.index, _const(CODES))
            c = [_load(builder, codes, builder.add(offset, _const(v * LANES)), _floats) for v in range(VECTORS)]
            for r in range(ROWS):
                value = _splat(builder, builder.load(builder.gep(rows[r], [d.index])), _floats)
                for v in range(VECTORS):
                    builder.store(builder.call(fma, [value, c[v], builder.load(sums[r, v])]), sums[r, v])
        number = builder.mul(builder.add(block.index, first_block), _const(VECTORS))
        for v in range(VECTORS):
            here = _splat(builder, builder.trunc(builder.add(number, _const(v)), _i32), _ints)
            for r in range(ROWS):
                _fold(builder, builder.load(sums[r, v]), here, slots[r])
    _close_state(builder, state, slots)


def _pointers(context: Any, builder: Any, signature: Any, args: Any) -> list[Any]:
    """The arguments, arrays as pointers to their first element."""
    return [
        context.make_array(kind)(context, builder, arg).data if isinstance(kind, types.Array) else arg
        for kind, arg in zip(signature.args, args, strict=True)
    ]


def _open_state(builder: Any, state: Any, num_rows: int) -> list[list[Any]]:
    """best, second and group of each row as local variables, which LLVM turns into registers."""
    slots = []
    for r in range(num_rows):
        row = []
        for pointer, kind in zip(state, (_floats, _floats, _ints), strict=True):
            row.append(cgutils.alloca_once(builder, kind))
            builder.store(_load(builder, pointer, _const(r * LANES), kind), row[-1])
        slots.append(row)
    return slots


def _close_state(builder: Any, state: Any, slots: list[list[Any]]) -> None:
    for r, row in enumerate(slots):
        for pointer, slot in zip(state, row, strict=True):
            _store(builder, builder.load(slot), pointer, _const(r * LANES))


def _fold(builder: Any, score: Any, here: Any, slots: list[Any]) -> None:
    """second = min(second, max(best, score)); where score < best: best = score, group = here."""
    best, second, group = (builder.load(slot) for slot in slots)
    better = builder.fcmp_ordered("<", score, best)
    worse_of_two = builder.select(builder.fcmp_ordered(">", score, best), score, best)
    lower = builder.fcmp_ordered("<", worse_of_two, second)
    builder.store(builder.select(lower, worse_of_two, second), slots[1])
    builder.store(builder.select(better, score, best), slots[0])
    builder.store(builder.select(better, here, group), slots[2])


def _const(n: int) -> Any:
    return ir.Constant(_i64, n)


def _address(builder: Any, pointer: Any, offset: Any, kind: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [offset]), kind.as_pointer())


def _load(builder: Any, pointer: Any, offset: Any, kind: Any) -> Any:
    return builder.load(_address(builder, pointer, offset, kind), align=4)


def _store(builder: Any, value: Any, pointer: Any, offset: Any) -> None:
    builder.store(value, _address(builder, pointer, offset, value.type), align=4)


def _splat(builder: Any, scalar: Any, kind: Any) -> Any:
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, scalar, ir.Constant(_i32, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(_i32, LANES), [0] * LANES))


@_compiled
def centre_codebook(codebook, cosine, centre, inverse):
    """Fill centre (D,) fp64, the mean of the codes (K, D) or of their directions when ``cosine``, and inverse (K,).

    inverse = 1 / |code| when ``cosine``, else 1; 0 for a zero code.
    """
    K, D = codebook.shape
    centre[:] = 0.0
    for k in range(K):
        inverse[k] = 1.0
        if cosine:
            total = _square(codebook[k])
            inverse[k] = 1.0 / np.sqrt(total) if total > 0 else 0.0
        for d in range(D):
            centre[d] += codebook[k, d] * inverse[k]
    for d in range(D):
        centre[d] /= K


@_compiled
def shift_codes(codebook, inverse, centre, shifted, half):
    """Fill shifted (K', D) and half (K',) from codes (K, D), K <= K'; returns the greatest squared norm.

    shifted, in fp32, = code * inverse - centre, and 0 beyond K; half = |shifted|^2 / 2, infinite beyond K. A zero code
    has cosine 0 with everything, which is the distance of a code of length 1 that is orthogonal: + 1/2.
    """
    K, D = codebook.shape
    shifted[K:] = 0.0
    half[K:] = np.inf
    reach = 0.0
    for k in range(K):
        for d in range(D):
            shifted[k, d] = np.float32(codebook[k, d] * inverse[k] - centre[d])
        total = _square(shifted[k])
        reach = max(reach, total)
        half[k] = np.float32(0.5 * total + (0.5 if inverse[k] == 0.0 else 0.0))
    return reach


@_any_order
def _square(x):
    total = 0.0
    for d in range(x.shape[0]):
        total += np.float64(x[d]) * np.float64(x[d])
    return total


@_any_order
def _product(x, code):
    total = 0.0
    for d in range(x.shape[0]):
        total += np.float64(x[d]) * np.float64(code[d])
    return total


@_any_order
def _difference(x, code):
    total = 0.0
    for d in range(x.shape[0]):
        difference = np.float64(x[d]) - np.float64(code[d])
        total += difference * difference
    return total


@_compiled
def _distance(x, code, inverse, cosine, give_up):
    """Squared distance of x (D,) and a code (D,) in fp64, or minus cosine times |x|; any value over ``give_up``."""
    if cosine:
        return -_product(x, code) * inverse
    D = x.shape[0]
    if D <= 2 * _PART:
        return _difference(x, code)
    total = 0.0
    for d in range(0, D, _PART):
        total += _difference(x[d : d + _PART], code[d : d + _PART])
        if total > give_up:
            break
    return total


@_compiled
def exact_row(x, codebook, inverse, cosine, guess):
    """The nearest code to x (D,) in fp64, the lowest on ties; ``guess``, a code that is near, only saves time."""
    best, code = _distance(x, codebook[guess], inverse[guess], cosine, np.inf), guess
    for k in range(codebook.shape[0]):
        total = _distance(x, codebook[k], inverse[k], cosine, best)
        if total < best or (total == best and k < code):
            best, code = total, k
    return code


@_compiled
def _load_row(x, centre, cosine, row):
    """row = x - centre in fp32, or that of the direction of x; returns its norm."""
    scale = 1.0
    if cosine:
        total = _square(x)
        scale = 1.0 / np.sqrt(total) if total > 0 else 0.0
    for d in range(x.shape[0]):
        row[d] = np.float32(x[d] * scale - centre[d])
    return np.sqrt(_square(row))


@_compiled
def _best_two(best, second, group):
    """The least score, the second least, and the code of the least, the lowest on ties, over the lanes of a row."""
    score, code, runner_up = np.float32(np.inf), 1 << 60, np.float32(np.inf)
    for lane in range(LANES):
        score = min(score, best[lane])
    for lane in range(LANES):
        if best[lane] == score:
            code = min(code, np.int64(group[lane]) * LANES + lane)
    for lane in range(LANES):
        mine = np.int64(group[lane]) * LANES + lane == code
        runner_up = min(runner_up, second[lane] if mine else best[lane])
    return score, runner_up, code


@_compiled
def _settle(x, codebook, inverse, cosine, best, second, group, limit):
    """The nearest code in fp64 among those with scores up to ``limit``, which the lanes name unless two share one."""
    code, least = -1, np.inf
    for lane in range(LANES):
        if not second[lane] > limit:
            return exact_row(x, codebook, inverse, cosine, max(code, 0))
        if not best[lane] > limit:
            k = np.int64(group[lane]) * LANES + lane
            distance = _distance(x, codebook[k], inverse[k], cosine, least)
            if code < 0 or distance < least or (distance == least and k < code):
                code, least = k, distance
    return code


@_compiled
def search(x, codebook, inverse, cosine, packed, half, centre, reach, codes):
    """codes (N,) of x (N, D) fp32 or fp64. Returns how many rows were settled in fp64.

    packed (blocks, D, CODES) holds the negated codes that `shift_codes` gives, half (blocks, CODES) their norms.

    The proof. Let u = 2^-24, r the row and c a code as shifted. Rounding to fp32 moves each coordinate by u of itself,
    so the product by 2u |r| |c| and the norm by u |c|^2; the sum of D + 1 terms adds (D + 1) u times their absolute
    sum, at most |r| |c| + |c|^2 / 2 (any order, with or without fused multiply-add, to first order in u). The norm
    itself is summed in fp64. Together less than (D + 8) u (|r| R + R^2 / 2) with R the greatest |c|: two scores further
    apart than twice that are in their true order. The last term covers numbers below the normal range.
    """
    N, D = x.shape
    num_blocks, per_turn = packed.shape[0], max(1, _CACHE_FLOATS // (CODES * D))
    rows = np.zeros((_ROWS_AT_ONCE, D), np.float32)
    norms = np.zeros(_ROWS_AT_ONCE)
    best = np.empty((_ROWS_AT_ONCE, LANES), np.float32)
    second = np.empty((_ROWS_AT_ONCE, LANES), np.float32)
    group = np.empty((_ROWS_AT_ONCE, LANES), np.int32)
    relative, least = 1.01 * (D + 8) * 2.0**-24, (D + 8) * 1.2e-38
    doubtful = 0
    for first in range(0, N, _ROWS_AT_ONCE):
        n = min(_ROWS_AT_ONCE, N - first)
        for r in range(n):
            norms[r] = _load_row(x[first + r], centre, cosine, rows[r])
        best[:] = np.inf
        second[:] = np.inf
        group[:] = _NONE
        for b in range(0, num_blocks, per_turn):
            stop = min(b + per_turn, num_blocks)
            for r in range(0, n, ROWS):
                e = r + ROWS
                state = (best[r:e], second[r:e], group[r:e])
                score_tile(rows[r:e], packed[b:stop], half[b:stop], stop - b, D, b, *state)  # pyright: ignore[reportCallIssue]
        for r in range(n):
            score, runner_up, code = _best_two(best[r], second[r], group[r])
            error = relative * (norms[r] * reach + 0.5 * reach * reach) + least
            if not np.float64(runner_up) - np.float64(score) > 2.0 * error:  # also when either is not a number
                doubtful += 1
                limit = score + 2.0 * error
                code = _settle(x[first + r], codebook, inverse, cosine, best[r], second[r], group[r], limit)
            codes[first + r] = code
    return doubtful


@intrinsic
def _as_pointer(typingctx, address):
    """An integer as the address that it is."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


@_any_order
def _short_difference(x, code):
    total = np.float32(0)
    for d in range(x.shape[0]):
        total += (x[d] - code[d]) * (x[d] - code[d])
    return total


@_any_order
def _short_product(x, code):
    total = np.float32(0)
    for d in range(x.shape[0]):
        total += x[d] * code[d]
    return total


@_compiled
def chain_few(residual, addresses, codebook_size, cosine, codes):
    """codes (N, Q) of the rows of ``residual`` (N, D) fp64, which is overwritten, by a chain of Q codebooks.

    The way for few rows: nothing is prepared, and all levels are one call. addresses (Q,) are those of contiguous fp32
    codebooks (K, D).

    The proof. Squared distances as sums of squared differences in fp32 are off by (D + 4) u of themselves, and rounding
    x by a = u |x| moves a distance by a, its square by at most 2 a distance + a^2. A product with the direction of x
    is off by (D + 4) u |c|. Two levels of underflow are reserved. What is not certain is searched in fp64.
    """
    (N, D), K = residual.shape, codebook_size
    rows = np.empty((N, D), np.float32)
    best, second, slack = np.empty(N), np.empty(N), np.empty(N)
    inverse, nowhere = np.ones(K), np.zeros(D)
    relative, least = 1.01 * (D + 6) * 2.0**-24, (D + 8) * 1.2e-38
    for q in range(len(addresses)):
        codebook = carray(_as_pointer(addresses[q]), (K, D), np.float32)  # pyright: ignore[reportCallIssue]
        for n in range(N):
            slack[n] = 2.0**-24 * _load_row(residual[n], nowhere, cosine, rows[n])
        best[:] = np.inf
        second[:] = np.inf
        for k in range(K):
            if cosine:
                total = _square(codebook[k])
                inverse[k] = 1.0 / np.sqrt(total) if total > 0 else 0.0
            for n in range(N):
                if cosine:
                    score = -np.float64(_short_product(rows[n], codebook[k])) * inverse[k]
                else:
                    score = np.float64(_short_difference(rows[n], codebook[k]))
                if score < best[n]:
                    best[n], second[n], codes[n, q] = score, best[n], k
                elif score < second[n]:
                    second[n] = score
        for n in range(N):
            a, low, high = slack[n], best[n], second[n]
            error = 2.0 * (relative + least)
            if not cosine:
                error = relative * (low + high) + 2.0 * a * (np.sqrt(low) + np.sqrt(high) + a) + 2.0 * least
            if not high - low > error:
                guess = codes[n, q] if low < np.inf else 0
                codes[n, q] = exact_row(residual[n], codebook, inverse, cosine, guess)
            for d in range(D):
                residual[n, d] -= np.float64(codebook[codes[n, q], d])


@_compiled
def load_rows(x, centre, cosine, rows, norms):
    """rows (N, D) fp32 = x - centre, or that of the directions of x; norms (N,)."""
    for n in range(x.shape[0]):
        norms[n] = _load_row(x[n], centre, cosine, rows[n])


@_compiled
def search_products(x, codebook, inverse, cosine, products, half, norms, reach, codes):
    """`search` where the products of the shifted rows and codes are known in bf16; returns the codes looked at in fp64.

    products (n, blocks * CODES) uint16 holds bf16 numbers whose operands were rounded to bf16, summed in fp32.

    The proof. Rounding the operands moves a product by at most 2^-8 |r| R, rounding the result by 2^-9 |r| R, summing
    by (D + 1) u |r| R: less than 1.06 (1.5) 2^-8 |r| R together for D up to 1024; then half and the difference by
    u (|r| R + R^2). A code whose score lies within twice that of the least may be the nearest, no other can.
    """
    N, stride = products.shape
    best = np.empty((FOLD_ROWS, LANES), np.float32)
    second = np.empty((FOLD_ROWS, LANES), np.float32)
    group = np.empty((FOLD_ROWS, LANES), np.int32)
    looked_at = 0
    for first in range(0, N, FOLD_ROWS):
        start = max(0, min(first, N - FOLD_ROWS))  # the last rows are done twice rather than read past the end
        best[:] = np.inf
        second[:] = np.inf
        group[:] = _NONE
        state = (best, second, group)
        fold_products(products[start:], half, stride // LANES, stride, *state)  # pyright: ignore[reportCallIssue]
        for r in range(FOLD_ROWS):
            n = start + r
            score, runner_up, code = _best_two(best[r], second[r], group[r])
            error = 1.06 * 1.5 * 2.0**-8 * norms[n] * reach + 2.0**-22 * reach * reach + 1e-36
            if not np.float64(runner_up) - np.float64(score) > 2.0 * error:
                limit = score + 2.0 * error
                crowded = False
                for lane in range(LANES):
                    crowded |= not second[r, lane] > limit
                code, least = -1, np.inf
                for i in range(codebook.shape[0] if crowded else LANES):
                    k = i if crowded else np.int64(group[r, i]) * LANES + i
                    value = best[r, i % LANES]
                    if crowded:
                        value = half[k] - np.uint32(np.uint32(products[n, k]) << np.uint32(16)).view(np.float32)
                    if not value > limit:
                        distance = _distance(x[n], codebook[k], inverse[k], cosine, least)
                        looked_at += 1
                        if code < 0 or distance < least or (distance == least and k < code):
                            code, least = k, distance
            codes[n] = code
    return looked_at
