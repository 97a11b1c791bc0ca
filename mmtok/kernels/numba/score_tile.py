"""The inner loops of the nearest-code search: a few rows against a run of codes, in vector registers.

numba does not keep a tile of scores in registers, so the tiles are written in LLVM's vector types, which LLVM in turn
splits on processors with narrower registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Registers decide: 32 of 16 floats hold 8 x 2 sums, 16 of 8 floats hold 6 x 2 sums, beside the operands.
LANES, ROWS = (16, 8) if binding.get_host_cpu_features().get("avx512f") else (8, 6)
VECTORS = 2
CODES = LANES * VECTORS  # codes of one block
FOLD_ROWS = 4

_f32, _i32, _i64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_floats, _ints = ir.VectorType(_f32, LANES), ir.VectorType(_i32, LANES)
_shorts = ir.VectorType(ir.IntType(16), LANES)


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
