"""The first pass of `nearest_code` and `residual_codes`: fast scores, and a proof of which codes they decide rightly.

Four launches and no synchronisation. `prepare_kernel` shifts every codebook by its mean m and splits it into bf16
parts. `search_kernel` scores a tile of rows against all codes, one level after the other, with the residual on chip,
and keeps the best and the second best score of every row. `join_kernel` does that for a search whose codebook was cut
over programs. A row is *certified* when its best two scores lie further apart than twice the bound E on the error of a
score; any other code is stored as -1 - code, its row put on a list, and `repair_kernel` (code_repair.py) settles it in
fp64 from the original values. So the codes are those of exact arithmetic, whatever the fast scores are.

The score. With y = x - m and c' = c - m, |x - c|^2 = |y|^2 + 2 (|c'|^2 / 2 - y.c'), so the code is the argmin of
s = h - y.c', h = |c'|^2 / 2. Any m is exact as long as it is the same on both sides. For the cosine c' = c / |c| - m
(a zero code has c / |c| = 0, hence cosine 0), y = x, and h = 0: neither x.m nor |x| changes the order.

The bound E on |computed s - exact s|, for the worst code of the level (C = max |c'|, H = max h). Write y = high + low +
rest with high and low rounded to bf16, and c' likewise; the products formed are high.high + low.high + high.low.
* Left out: low.low, rest_y.c' and (high + low).rest_c, together at most
  |low_y| |low_c| + |rest_y| C + (|y| + |rest_y|) |rest_c|. These norms are measured, not assumed: for a row in the
  search kernel, for the codes in fp64 by `prepare_kernel`. With plain bf16 nothing but high.high is formed, and
  rest = y - high, low = 0; with fp32 rest_y = 0 as well. One formula.
* Accumulation: products of bf16 are exact. A tensor core aligns k products (k >= 4) and the accumulator to the largest
  of them and cuts each off below 2^-23 of it, then cuts the sum: k + 2 errors of 2^-23 M per k columns, so at most
  1.5 W 2^-23 M for W columns, M a bound on every partial sum (|y| C + H, by Cauchy-Schwarz, times 1.02 for rounded
  parts). The two correction products come first, while the sum is 2^-7 of M. Together 1.6 W 2^-23 (|y| C + H).
  Fp32 FMA chains stay below that too.
* Rounding y, h, and h - y.c' to fp32: 4 errors of at most 2^-24 (|y| C + H); 12 x 2^-23 is reserved for them.
* The residual of later levels: r - c is rounded, so r lies off the exact residual by at most drift = 2^-24 sum |r|,
  which moves a score by drift C.
* Underflow: products and parts below 2^-126 may vanish, and squares in a norm below 2^-63: norms get 2^-58 added and E
  gets 2^-110 (1 + |y| + C). Overflow: a row is not certified unless |y| C + H < 1e37, which NaN and inf fail as well.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOOSE = tl.constexpr(1.0001)  # norms are fp32 sums of at most 512 squares, and the root is approximate
_TINY_NORM = tl.constexpr(2.0**-58)
_TINY_SCORE = tl.constexpr(2.0**-110)
_LARGEST = tl.constexpr(1e37)
_FP32_ROUNDING = tl.constexpr(2.0**-24)
_STEP = tl.constexpr(2.0**-23)


@triton.jit
def _round_to_bf16(x):
    """fp32 x to the nearest bf16 value (half away from zero), still fp32. On the bits: the same in the interpreter."""
    return ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _length(squares):
    """An upper bound on the length of vectors, from the fp32 sum of their squares."""
    return tl.sqrt(squares) * _LOOSE + _TINY_NORM


@triton.jit
def _raise_to(pointer, norms):
    """Atomic maximum of non-negative values: their bits order as integers. Rounded up to fp32."""
    largest = (tl.max(norms, 0) * 1.000001).to(tl.float32)
    tl.atomic_max(pointer, largest.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["width", "codebook_size"])
def prepare_kernel(
    codebooks_ptr,  # (Q, K, D) fp32
    means_ptr,  # (Q, D) fp32
    high_ptr,  # (Q, padded_size, W) operand of the product
    low_ptr,  # the same for the low parts; not touched when PACKED
    half_ptr,  # (Q, padded_size) fp32: h, +inf at padding
    stats_ptr,  # (Q, 4) int32, zeros: bits of max |c'|, max |low|, max |rest|, max h
    width,
    codebook_size,
    padded_size,
    W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Shift, split and measure BLOCK_K codes of one level; PACKED columns are [-high | -high | -low | h1 h2 h3]."""
    level = tl.program_id(1).to(tl.int64)
    codes = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    real = codes < codebook_size
    columns = tl.arange(0, W)
    dims = columns % width if PACKED else columns
    live = columns < (3 * width if PACKED else width)
    first = (columns < width)[None, :]
    rows = codebooks_ptr + (level * codebook_size + codes)[:, None] * width + dims[None, :]
    c = tl.load(rows, mask=real[:, None] & live[None, :], other=0.0).to(tl.float64)
    if COSINE:
        length = tl.sqrt(tl.sum(tl.where(first, c * c, 0.0), 1))
        c = c / tl.where(length > 0, length, 1.0)[:, None]
    c -= tl.load(means_ptr + level * width + dims, mask=live, other=0.0).to(tl.float64)[None, :]
    c = tl.where(real[:, None] & live[None, :], c, 0.0)
    rounded = c.to(tl.float32)
    high = rounded if PRECISION == "ieee" else _round_to_bf16(rounded)
    rest = c - high.to(tl.float64)
    low = tl.zeros_like(high)
    if PRECISION == "bf16x3":
        low = _round_to_bf16(rest.to(tl.float32))
        rest -= low.to(tl.float64)
    squares = tl.sum(tl.where(first, c * c, 0.0), 1)
    half = (0.0 * squares if COSINE else 0.5 * squares).to(tl.float32)
    stats_ptr += level * 4
    _raise_to(stats_ptr, tl.sqrt(squares))
    _raise_to(stats_ptr + 1, tl.sqrt(tl.sum(tl.where(first, (low * low).to(tl.float64), 0.0), 1)))
    _raise_to(stats_ptr + 2, tl.sqrt(tl.sum(tl.where(first, rest * rest, 0.0), 1)))
    _raise_to(stats_ptr + 3, half.to(tl.float64))
    slots = level * padded_size + codes
    out = slots[:, None] * W + columns[None, :]
    if PACKED:
        h1 = _round_to_bf16(half)
        h2 = _round_to_bf16(half - h1)
        operand = -tl.where((columns < 2 * width)[None, :], high, low)
        operand = tl.where((columns == 3 * width)[None, :], tl.where(real, h1, float("inf"))[:, None], operand)
        operand = tl.where((columns == 3 * width + 1)[None, :], h2[:, None], operand)
        operand = tl.where((columns == 3 * width + 2)[None, :], _round_to_bf16(half - h1 - h2)[:, None], operand)
        tl.store(high_ptr + out, operand.to(high_ptr.dtype.element_ty))
    else:
        tl.store(high_ptr + out, high.to(high_ptr.dtype.element_ty))
        if PRECISION == "bf16x3":
            tl.store(low_ptr + out, low.to(low_ptr.dtype.element_ty))
        tl.store(half_ptr + slots, tl.where(real, half, float("inf")))


@triton.jit
def _split(y, PRECISION: tl.constexpr):
    """The parts of y that enter the products; low is 0 unless it is used."""
    high = y if PRECISION == "ieee" else _round_to_bf16(y)
    low = _round_to_bf16(y - high) if PRECISION == "bf16x3" else tl.zeros_like(y)
    return high, low


@triton.jit
def _squares(y, PRECISION: tl.constexpr):
    """Squared lengths of the rows of y, of the low part and of what the parts leave out."""
    high, low = _split(y, PRECISION)
    rest = y - high - low
    return tl.sum(y * y, 1), tl.sum(low * low, 1), tl.sum(rest * rest, 1)


@triton.jit
def _squares_in_pieces(rows_ptr, shifts_ptr, W: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """`_squares` of rows as they stand in memory, read again 16 columns at a time: whole tiles would not fit."""
    squares = tl.zeros((BLOCK_N,), tl.float32)
    low_squares, rest_squares = tl.zeros_like(squares), tl.zeros_like(squares)
    for start in range(0, W, 16):
        columns = start + tl.arange(0, 16)[None, :]
        y = tl.load(rows_ptr + columns) - tl.load(shifts_ptr + columns)
        new, new_low, new_rest = _squares(y, PRECISION)
        squares += new
        low_squares += new_low
        rest_squares += new_rest
    return squares, low_squares, rest_squares


@triton.jit
def _subtract(rows_ptr, chosen_ptr, inside, W: tl.constexpr, BLOCK_N: tl.constexpr):
    """Subtract the chosen codes from the rows in place, as pieces; returns the squared lengths of what is left.

    A program's rows fit the first-level cache, and no other program touches them. The barriers are there because the
    pieces lie otherwise over the threads than the tile that was, and will be, read.
    """
    squares = tl.zeros((BLOCK_N,), tl.float32)
    tl.debug_barrier()
    for start in range(0, W, 16):
        columns = start + tl.arange(0, 16)[None, :]
        left = tl.load(rows_ptr + columns, mask=inside[:, None], other=0.0) - tl.load(chosen_ptr + columns)
        tl.store(rows_ptr + columns, left, mask=inside[:, None])
        squares += tl.sum(left * left, 1)
    tl.debug_barrier()
    return squares


@triton.jit
def _bound(squares, low_squares, rest_squares, stats_ptr, drift, W: tl.constexpr):
    """E for each row, and |y| C + H, by which it is told whether anything may have overflowed."""
    length, low, rest = _length(squares), _length(low_squares), _length(rest_squares)
    code_length = tl.load(stats_ptr).to(tl.float32, bitcast=True)
    code_low = tl.load(stats_ptr + 1).to(tl.float32, bitcast=True)
    code_rest = tl.load(stats_ptr + 2).to(tl.float32, bitcast=True)
    scale = length * code_length + tl.load(stats_ptr + 3).to(tl.float32, bitcast=True)
    bound = (drift + rest) * code_length + (length + rest) * code_rest + low * code_low
    bound += (1.6 * W + 12.0) * _STEP * scale + _TINY_SCORE * (1.0 + length + code_length)
    return bound * _LOOSE, scale


@triton.jit
def _tile_scores(
    high, low, high_ptr, low_ptr, half_ptr, codes, W: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr
):
    """(rows, BLOCK_K) scores of one tile of codes, padding at +inf."""
    cells = codes[:, None] * W + tl.arange(0, W)[None, :]
    c_high = tl.trans(tl.load(high_ptr + cells))  # (W, BLOCK_K)
    if PACKED:
        return tl.dot(high, c_high, input_precision="ieee")
    if PRECISION == "bf16x3":  # the small products first: see the bound
        product = tl.dot(low, c_high, input_precision="ieee")
        product = tl.dot(high, tl.trans(tl.load(low_ptr + cells)), product, input_precision="ieee")
        product = tl.dot(high, c_high, product, input_precision="ieee")
    else:
        product = tl.dot(high, c_high, input_precision="ieee")
    return tl.load(half_ptr + codes)[None, :] - product


@triton.jit
def _search_tiles(
    high,
    low,
    high_ptr,
    low_ptr,
    half_ptr,
    first_tile,
    last_tile,
    codebook_size,
    W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Best score, second best score and code of each row over some tiles of the codebook.

    The running values are kept for each of BLOCK_K / 2 lanes, two neighbouring codes to a lane: five operations a
    score and no shuffle; lanes meet once, at the end. Equal scores need no care here, for no bound certifies them.
    """
    LANES: tl.constexpr = BLOCK_K // 2
    best = tl.full((BLOCK_N, LANES), float("inf"), tl.float32)
    second = tl.full((BLOCK_N, LANES), float("inf"), tl.float32)
    place = tl.zeros((BLOCK_N, LANES), tl.int32)  # 2 * tile + (0: even code, 1: odd code)
    for tile in range(first_tile, last_tile):
        codes = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        scores = _tile_scores(high, low, high_ptr, low_ptr, half_ptr, codes, W, PACKED, PRECISION)
        even, odd = tl.split(tl.reshape(scores, (BLOCK_N, LANES, 2)))
        lesser, greater = tl.minimum(even, odd), tl.maximum(even, odd)
        second = tl.minimum(tl.minimum(second, greater), tl.maximum(best, lesser))
        place = tl.where(lesser < best, tl.where(odd < even, 2 * tile + 1, 2 * tile), place)
        best = tl.minimum(best, lesser)
    lanes = tl.arange(0, LANES)[None, :]
    codes = (place >> 1) * BLOCK_K + 2 * lanes + (place & 1)
    row_best = tl.min(best, 1)
    code = tl.min(tl.where(best == row_best[:, None], codes, codebook_size - 1), 1)  # in range even for NaN
    row_second = tl.min(tl.where(codes == code[:, None], second, best), 1)
    return row_best, row_second, tl.minimum(code, codebook_size - 1)


@triton.jit
def _enlist(worklist_ptr, counter_ptr, rows, doubtful):
    """Append the doubtful rows. Their order on the list may vary; what becomes of each row does not."""
    taken = doubtful.to(tl.int32)
    start = tl.atomic_add(counter_ptr, tl.sum(taken, 0))
    tl.store(worklist_ptr + start + tl.cumsum(taken, 0) - taken, rows.to(tl.int32), mask=doubtful)


@triton.jit(do_not_specialize=["num_rows", "width", "codebook_size", "num_tiles", "tiles_per_program", "num_levels"])
def search_kernel(
    z_ptr,  # (N, width) fp32, width = W unless PACKED. A CHAIN that is not PACKED leaves the last residual here
    codebooks_ptr,  # (Q, K, width) fp32
    shifts_ptr,  # (Q, width) fp32: what is subtracted from a row, the means or, for the cosine, zeros
    high_ptr,  # as `prepare_kernel` wrote them
    low_ptr,
    half_ptr,
    stats_ptr,
    codes_ptr,  # out (N, Q) int64: the code, or -1 - code where not certified
    worklist_ptr,  # out (N,) int32: rows with a code that is not certified
    counter_ptr,  # in and out (1,) int32: how many
    scores_ptr,  # out when SPLIT: (3, splits, N) fp32: best, second, E
    places_ptr,  # out when SPLIT: (splits, N) int32
    num_rows,
    width,
    codebook_size,
    num_tiles,
    tiles_per_program,
    num_levels,
    padded_size,
    W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """All levels for BLOCK_N rows: num_levels of a CHAIN, else one; when SPLIT, only the tiles of program_id(1)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < num_rows
    present = tl.minimum(rows, num_rows - 1)  # rows past the end repeat the last one
    columns = tl.arange(0, W)[None, :]
    if PACKED:  # three copies of the residual side by side, then the columns that meet the norms
        dims = columns % width
        live = columns < 3 * width
        residual = tl.load(z_ptr + present[:, None] * width + dims, mask=live, other=0.0)
        first = columns < width
    drift = tl.zeros((BLOCK_N,), tl.float32)
    doubtful = rows < 0
    first_tile = tl.program_id(1) * tiles_per_program
    last_tile = tl.minimum(first_tile + tiles_per_program, num_tiles)
    codes_ptr += rows * (num_levels if CHAIN else 1)
    for _ in range(num_levels if CHAIN else 1):
        if PACKED:
            y = residual - tl.load(shifts_ptr + dims, mask=live, other=0.0)
            high, low = _split(y, PRECISION)
            squares, low_squares, rest_squares = _squares(tl.where(first, y, 0.0), PRECISION)
            high = tl.where((columns >= width) & (columns < 2 * width), low, high)
            high = tl.where(live, high, tl.where(columns < 3 * width + 3, 1.0, 0.0))
        else:
            rows_ptr = z_ptr + present[:, None] * W
            high, low = _split(tl.load(rows_ptr + columns) - tl.load(shifts_ptr + columns), PRECISION)
            squares, low_squares, rest_squares = _squares_in_pieces(rows_ptr, shifts_ptr, W, BLOCK_N, PRECISION)
        bound, scale = _bound(squares, low_squares, rest_squares, stats_ptr, drift, W)
        best, second, code = _search_tiles(
            high.to(high_ptr.dtype.element_ty),
            low.to(high_ptr.dtype.element_ty),
            high_ptr,
            low_ptr,
            half_ptr,
            first_tile,
            last_tile,
            codebook_size,
            W,
            BLOCK_N,
            BLOCK_K,
            PACKED,
            PRECISION,
        )
        if SPLIT:
            cells = tl.program_id(1).to(tl.int64) * num_rows + rows
            plane = tl.num_programs(1).to(tl.int64) * num_rows
            tl.store(scores_ptr + cells, best, mask=inside)
            tl.store(scores_ptr + plane + cells, second, mask=inside)
            tl.store(scores_ptr + 2 * plane + cells, tl.where(scale < _LARGEST, bound, float("inf")), mask=inside)
            tl.store(places_ptr + cells, code, mask=inside)
        else:
            certain = (second - best > 2 * bound) & (scale < _LARGEST)
            doubtful = doubtful | (inside & ~certain)
            tl.store(codes_ptr, tl.where(certain, code, -1 - code).to(tl.int64), mask=inside)
            if PACKED and CHAIN:
                residual -= tl.load(codebooks_ptr + code[:, None] * width + dims, mask=live, other=0.0)
                squares = tl.sum(tl.where(first, residual * residual, 0.0), 1)
            elif CHAIN:
                squares = _subtract(z_ptr + rows[:, None] * W, codebooks_ptr + code[:, None] * W, inside, W, BLOCK_N)
            drift += _FP32_ROUNDING * _length(squares)
        codes_ptr += 1
        stats_ptr += 4
        shifts_ptr += width
        half_ptr += padded_size
        high_ptr += padded_size.to(tl.int64) * W
        low_ptr += padded_size.to(tl.int64) * W
        codebooks_ptr += codebook_size.to(tl.int64) * width
    if not SPLIT:
        _enlist(worklist_ptr, counter_ptr, rows, doubtful)


@triton.jit(do_not_specialize=["num_rows", "splits"])
def join_kernel(
    scores_ptr,
    places_ptr,
    codes_ptr,
    worklist_ptr,
    counter_ptr,
    num_rows,
    splits,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Certify a search that was cut over ``splits`` <= BLOCK_S programs; arguments as in `search_kernel`."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    parts = tl.arange(0, BLOCK_S)[:, None]
    inside = rows < num_rows
    mask = (parts < splits) & inside[None, :]
    cells = parts.to(tl.int64) * num_rows + rows[None, :]
    plane = splits.to(tl.int64) * num_rows
    best = tl.load(scores_ptr + cells, mask=mask, other=float("inf"))
    second = tl.load(scores_ptr + plane + cells, mask=mask, other=float("inf"))
    bound = tl.load(scores_ptr + 2 * plane + rows, mask=inside, other=0.0)  # the same in every part
    row_best = tl.min(best, 0)
    winner = tl.min(tl.where(best == row_best[None, :], parts, BLOCK_S), 0)
    winner = tl.where(winner < BLOCK_S, winner, 0)
    row_second = tl.min(tl.where(parts == winner[None, :], second, best), 0)
    code = tl.load(places_ptr + winner.to(tl.int64) * num_rows + rows, mask=inside, other=0)
    certain = row_second - row_best > 2 * bound
    tl.store(codes_ptr + rows, tl.where(certain, code, -1 - code).to(tl.int64), mask=inside)
    _enlist(worklist_ptr, counter_ptr, rows, inside & ~certain)
