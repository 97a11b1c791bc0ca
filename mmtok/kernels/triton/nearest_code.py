"""The code nearest to each vector, on the device: the codes of exact arithmetic, from bf16 tensor cores where possible.

How and why they are exact is written in `mmtok.kernels.triton.code_search`. Here: which tile sizes, and the launches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from mmtok.kernels.triton.code_repair import repair_kernel
from mmtok.kernels.triton.code_search import join_kernel, prepare_kernel, search_kernel
from mmtok.kernels.triton.variant import Variant

PRECISIONS = ("auto", "ieee", "bf16x3", "bf16")
MAX_WIDTH = 256  # D; beyond it neither the rows nor the codes of a tile stay on chip
PACKED_WIDTH = 20  # up to here three products and the norms fit one product of at most 64 columns
_MAX_SPLITS = 64
_REPAIR_PROGRAMS_PER_CORE = 8
_REPAIR_ROWS = 2
# W -> numbers of the codebook in a tile, warps. Near these sizes the assembler now and then spills a register or two.
_REPAIR = {16: (2048, 8), 32: (2048, 8), 64: (2048, 8), 128: (2048, 4), 256: (1024, 8)}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One configuration of the search: W columns of the product, tile sizes and launch options."""

    precision: str
    packed: bool
    W: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# (columns W up to which it holds) -> BLOCK_N, BLOCK_K, warps, stages. Chosen by what compiles without a spill for sm_80
# and sm_90 with the most warps on a core.
_PACKED = {64: (128, 64, 8, 3)}
_PACKED_CHAIN = {32: (128, 64, 8, 2), 64: (64, 64, 8, 2)}
_SPLIT = {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (128, 16, 8, 2)}
_SPLIT_CHAIN = {**_SPLIT, 256: (64, 16, 8, 2)}
_SPLIT_HOPPER = {**_SPLIT, 256: (64, 32, 4, 2)}  # there the rows stay in shared memory, so that more codes fit
_IEEE = {32: (64, 64, 8, 1)}
_BF16 = {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 64, 4, 2)}


def plan(width: int, num_levels: int = 1, precision: str = "auto", hopper: bool = False) -> Plan:
    """The configuration for vectors of ``width`` numbers; ``hopper``: for compute capability 9.

    Raises:
        ValueError: the precision is unknown or has no kernel at this width.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "auto":
        precision = "bf16x3"
    limit = max(_IEEE) if precision == "ieee" else MAX_WIDTH
    if not 1 <= width <= limit:
        raise ValueError(
            f"z: expected a width D of 1 to {limit} for precision {precision!r}, got {width}; "
            f"use force('torch') for wider vectors"
        )
    packed = precision == "bf16x3" and width <= PACKED_WIDTH
    W = triton.next_power_of_2(max(16, 3 * width + 3) if packed else max(32, width))
    if packed:
        table = _PACKED if num_levels == 1 else _PACKED_CHAIN
    else:
        split = _SPLIT_CHAIN if num_levels > 1 else _SPLIT_HOPPER if hopper else _SPLIT
        coarse = _SPLIT_CHAIN if num_levels > 1 else _BF16
        table = {"ieee": _IEEE, "bf16": coarse, "bf16x3": split}[precision]
    sizes = table[min(most for most in table if most >= W)]
    return Plan(precision, packed, W, *sizes)


def supported(z: Tensor, codebook: Tensor) -> bool:
    """Whether the kernels take z (N, D) and codebook (K, D) or codebooks (Q, K, D): on a CUDA device of compute
    capability 8.0 or later, D <= 256, floating point of at most 32 bits, sizes within their addressing."""
    if z.device != codebook.device or not (z.is_cuda or (_interpreted() and z.device.type == "cpu")):
        return False
    if z.is_cuda and (torch.version.hip is not None or _capability(z.device) < (8, 0)):
        return False
    floats = (torch.float32, torch.bfloat16, torch.float16)
    D, K = z.shape[-1], codebook.shape[-2]
    sizes = 1 <= D <= MAX_WIDTH and 1 <= K <= 1 << 22 and z.shape[0] < 1 << 31  # K * W offsets in 31 bits
    return sizes and z.dtype in floats and codebook.dtype in floats


def nearest_code(z: Tensor, codebook: Tensor, metric: str = "euclidean", precision: str = "auto") -> Tensor:
    """argmin_k |z_n - c_k|^2 of exact arithmetic, or argmax_k of the cosine (0 for a zero vector); the lowest on ties.

    Args:
        z: (N, D) finite. codebook: (K, D) on the same device. metric: ``euclidean`` or ``cosine``.
        precision: of the first pass, all giving the same codes. ``ieee``: fp32, D <= 32; ``bf16x3``: bf16 tensor cores
            at about fp32's accuracy; ``bf16``: fewer products, many more rows to settle in fp64; ``auto``: bf16x3.

    Returns:
        codes (N,) int64.

    Raises:
        ValueError: the precision is unknown or has no kernel at this width.
    """
    return search(z, codebook[None], metric, precision)[:, 0]


def search(z: Tensor, codebooks: Tensor, metric: str, precision: str) -> Tensor:
    """Codes (N, Q) of the chain of ``codebooks`` (Q, K, D) for z (N, D)."""
    codes, worklist, counter = search_first_pass(z, codebooks, metric, precision)
    settle(z, codebooks, metric, codes, worklist, counter)
    return codes


def settle(z: Tensor, codebooks: Tensor, metric: str, codes: Tensor, worklist: Tensor, counter: Tensor) -> None:
    """Make ``codes`` of `search_first_pass` exact, in place: fp64 for the rows on the list."""
    if len(worklist) == 0:
        return
    z, codebooks = _plain(z), _plain(codebooks)
    W = max(16, triton.next_power_of_2(z.shape[1]))
    programs = min(triton.cdiv(len(worklist), _REPAIR_ROWS), _REPAIR_PROGRAMS_PER_CORE * _cores(z.device))
    tile, num_warps = _REPAIR[W]
    with _on(z.device):
        repair_kernel[(programs,)](
            z, codebooks, codes, worklist, counter, z.shape[1], codebooks.shape[1], codebooks.shape[0],
            W=W, ROWS=_REPAIR_ROWS, BLOCK_K=tile // W, COSINE=metric == "cosine", num_warps=num_warps, num_stages=1,
        )  # fmt: skip


def search_first_pass(z: Tensor, codebooks: Tensor, metric: str, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N, Q), those not certified as -1 - code; the rows that hold one (N,) int32, of which ``counter`` count."""
    device, cosine = z.device, metric == "cosine"
    p = plan(z.shape[1], codebooks.shape[0], precision, device.type == "cuda" and _capability(device)[0] == 9)
    room = None if p.packed else p.W
    z, codebooks = _plain(z, room), _plain(codebooks, room)
    if len(codebooks) > 1 and not p.packed:
        z = z.clone()  # the kernel keeps the residual in its place
    (N, D), (Q, K, _) = z.shape, codebooks.shape
    codes = torch.empty(N, Q, dtype=torch.int64, device=device)
    worklist = torch.empty(N, dtype=torch.int32, device=device)
    # One allocation: its first 4 Q numbers are the statistics of the codebooks, the last counts the rows to settle.
    record = torch.zeros(4 * Q + 1, dtype=torch.int32, device=device)
    counter = record[4 * Q :]
    if N == 0:
        return codes, worklist, counter
    num_tiles = triton.cdiv(K, p.BLOCK_K)
    padded = num_tiles * p.BLOCK_K
    means = (F.normalize(codebooks, dim=2) if cosine else codebooks).mean(1)  # (Q, D); any vector would be exact
    shifts = torch.zeros_like(means) if cosine else means
    operand = torch.float32 if p.precision == "ieee" or _interpreted() else torch.bfloat16
    high = torch.empty(Q, padded, p.W, dtype=operand, device=device)
    low = high if p.packed or p.precision != "bf16x3" else torch.empty_like(high)
    half = torch.empty(Q, padded, device=device)
    row_tiles = triton.cdiv(N, p.BLOCK_N)
    splits = 1
    if Q == 1:  # too few rows to fill the device: cut the codebook as well
        splits = max(1, min(_MAX_SPLITS, num_tiles, _cores(device) * 2 // row_tiles))
    per_program = triton.cdiv(num_tiles, splits)
    splits = triton.cdiv(num_tiles, per_program)
    scores = torch.empty((3, splits, N) if splits > 1 else (1,), device=device)
    places = torch.empty((splits, N) if splits > 1 else (1,), dtype=torch.int32, device=device)
    shape = {"W": p.W, "PACKED": p.packed, "PRECISION": p.precision}
    with _on(device):
        prepare_kernel[(padded // _prepare_block(p.W), Q)](
            codebooks, means, high, low, half, record, D, K, padded,
            BLOCK_K=_prepare_block(p.W), COSINE=cosine, **shape, num_warps=4, num_stages=1,
        )  # fmt: skip
        search_kernel[(row_tiles, splits)](
            z, codebooks, shifts, high, low, half, record, codes, worklist, counter, scores, places,
            N, D, K, num_tiles, per_program, Q, padded,
            **shape, BLOCK_N=p.BLOCK_N, BLOCK_K=p.BLOCK_K, SPLIT=splits > 1, CHAIN=Q > 1,
            num_warps=p.num_warps, num_stages=p.num_stages,
        )  # fmt: skip
        if splits > 1:
            join_kernel[(triton.cdiv(N, 32),)](
                scores, places, codes, worklist, counter, N, splits,
                BLOCK_N=32, BLOCK_S=_MAX_SPLITS, num_warps=4, num_stages=1,
            )  # fmt: skip
    return codes, worklist, counter


def _prepare_block(W: int) -> int:
    """Codes that one program prepares, a divisor of every BLOCK_K: in fp64 they fit the registers of four warps."""
    return min(32, 1024 // W)


def _plain(x: Tensor, width: int | None = None) -> Tensor:
    """x in fp32, contiguous, aligned for vector loads, its rows extended by zeros to ``width``: mostly x itself."""
    x = x.detach().float().contiguous()
    if width is not None and x.shape[-1] < width:
        return F.pad(x, (0, width - x.shape[-1]))
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _interpreted() -> bool:
    return not isinstance(search_kernel, triton.JITFunction)


@functools.lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.lru_cache(maxsize=16)
def _cores(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


_POINTERS = {
    "stats_ptr": "*i32",
    "codes_ptr": "*i64",
    "worklist_ptr": "*i32",
    "counter_ptr": "*i32",
    "places_ptr": "*i32",
}


def as_launched(
    name: str, kernel: Any, constants: dict[str, Any], num_warps: int, num_stages: int, matrix_unit: bool = False
) -> Variant:
    """The variant of a kernel of `code_search` that a launch with these constants compiles."""
    operand = "*fp32" if constants.get("PRECISION") == "ieee" else "*bf16"
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ("high_ptr", "low_ptr"):
            signature[argument] = operand
        else:
            signature[argument] = _POINTERS.get(argument, "*fp32" if argument.endswith("_ptr") else "i32")
    # `_plain` aligns the caller's tensors, the others were allocated here, and padded_size is a multiple of a tile.
    aligned = tuple(a for a in signature if a.endswith("_ptr") or a == "padded_size")
    return Variant(name, kernel, signature, constants, num_warps, num_stages, matrix_unit, aligned)


def search_variants(label: str, plans: list[Plan], num_levels: int = 1) -> list[Variant]:
    """The search kernel under every plan, for so many levels (one, or more)."""
    found = []
    for p in plans:
        constants = {"W": p.W, "PACKED": p.packed, "PRECISION": p.precision, "BLOCK_N": p.BLOCK_N, "BLOCK_K": p.BLOCK_K}
        for split in (False, True) if num_levels == 1 else (False,):
            name = f"{label}/search/{_describe(p)}{'/split' if split else ''}"
            constants = {**constants, "SPLIT": split, "CHAIN": num_levels > 1}
            unit = p.precision != "ieee"
            found.append(as_launched(name, search_kernel, constants, p.num_warps, p.num_stages, unit))
    return found


def all_plans(num_levels: int) -> list[Plan]:
    """Every plan for so many levels that holds on any device."""
    widths = {"bf16x3": (4, 9, PACKED_WIDTH, 32, 64, 128, 256), "bf16": (32, 64, 128, 256), "ieee": (32,)}
    return [plan(width, num_levels, precision) for precision in widths for width in widths[precision]]


def _describe(p: Plan) -> str:
    return f"{p.precision}/W{p.W}{'/packed' if p.packed else ''}"


def _other_variants() -> list[Variant]:
    found = [as_launched("join", join_kernel, {"BLOCK_N": 32, "BLOCK_S": _MAX_SPLITS}, 4, 1)]
    for cosine in (False, True):
        metric = "cosine" if cosine else "euclidean"
        for p in all_plans(1):
            constants = {"W": p.W, "PACKED": p.packed, "PRECISION": p.precision, "COSINE": cosine}
            constants["BLOCK_K"] = _prepare_block(p.W)
            found.append(as_launched(f"prepare/{metric}/{_describe(p)}", prepare_kernel, constants, 4, 1))
        for W, (tile, num_warps) in _REPAIR.items():
            constants = {"W": W, "ROWS": _REPAIR_ROWS, "BLOCK_K": tile // W, "COSINE": cosine}
            found.append(as_launched(f"repair/{metric}/W{W}", repair_kernel, constants, num_warps, 1))
    return found


VARIANTS: list[Variant] = [
    *search_variants("nearest_code", all_plans(1)),
    *(
        dataclasses.replace(variant, architectures=(90,))  # launched for compute capability 9 only
        for variant in search_variants("nearest_code/hopper", [plan(MAX_WIDTH, hopper=True)])
    ),
    *_other_variants(),
]
