"""`mmtok.kernels.row_search.RowSearch` on compiled loops: the same codes, and no block of scores anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mmtok.kernels.numba.search import (
    CODES,
    FOLD_ROWS,
    centre_codebook,
    chain_few,
    exact_row,
    load_rows,
    search,
    search_products,
    shift_codes,
)

_MATRIX_ROWS, _MATRIX_WIDTH, _MATRIX_CODES = 64, 48, 256  # from here on bf16 products are worth their preparation
_PRODUCT_BYTES = 8 << 20  # of one block of rows
_CODES_PER_ROW = 16  # looked at in fp64 on average; with more, fp32 scores are faster
_PIECE_NUMBERS = 1 << 18  # of the codebook that are shifted at once: 1 MiB
_FEW_ROWS = 24  # up to here, preparing the codebooks would cost more than the search


def takes_few(num_rows: int, codebooks: Sequence[Tensor]) -> bool:
    """Whether `few_codes` is the way for so many rows and these codebooks."""
    return num_rows <= _FEW_ROWS and all(c.dtype == torch.float32 and c.is_contiguous() for c in codebooks)


def few_codes(z: Tensor, codebooks: Sequence[Tensor], metric: str) -> Tensor:
    """z (N, D), codebooks Q of (K, D) -> codes (N, Q) of the chain, without preparing anything."""
    codes = np.empty((z.shape[0], len(codebooks)), np.int64)
    addresses = np.array([c.data_ptr() for c in codebooks])
    chain_few(z.detach().double().clone().numpy(), addresses, len(codebooks[0]), metric == "cosine", codes)
    return torch.from_numpy(codes)


class CompiledSearch:
    """One codebook (K, D) on the CPU, packed once for all rows.

    Args:
        codebook: (K, D) floating point. metric: ``euclidean`` or ``cosine``. num_rows: how many rows will come.
    """

    def __init__(self, codebook: Tensor, metric: str, num_rows: int) -> None:
        self.codebook, self.cosine = as_array(codebook), metric == "cosine"
        K, D = self.codebook.shape
        self.inverse, self.centre = np.empty(K), np.empty(D)
        centre_codebook(self.codebook, self.cosine, self.centre, self.inverse)
        self.padded = -(-K // CODES) * CODES
        self.half = np.empty(self.padded, np.float32)
        self.short: Tensor | None = None  # (D, K') bf16
        self.packed: np.ndarray | None = None
        if num_rows >= _MATRIX_ROWS and D >= _MATRIX_WIDTH and K >= _MATRIX_CODES and has_matrix_unit():
            short = torch.empty(self.padded, D, dtype=torch.bfloat16)
            self.reach = self._shift(lambda start, shifted: short[start : start + len(shifted)].copy_(shifted))
            self.short = short.T
        else:
            self.packed = self._pack()

    def _shift(self, take: Callable[[int, Tensor], object]) -> float:
        """Hand the shifted codes over piece by piece, since a whole copy more would be large; returns their reach."""
        D = self.codebook.shape[1]
        size = min(self.padded, CODES * max(1, _PIECE_NUMBERS // (CODES * D)))
        piece, reach = np.empty((size, D), np.float32), 0.0
        for start in range(0, self.padded, size):
            stop = min(start + size, self.padded)
            known = (self.codebook[start:stop], self.inverse[start:stop], self.centre)
            shifted = piece[: stop - start]
            reach = max(reach, shift_codes(*known, shifted, self.half[start:stop]))
            take(start, torch.from_numpy(shifted))
        return math.sqrt(reach)

    def _pack(self) -> np.ndarray:
        """The negated codes (blocks, D, CODES), as `search` reads them."""
        packed = torch.empty(self.padded // CODES, self.codebook.shape[1], CODES)

        def take(start: int, shifted: Tensor) -> None:
            blocks = shifted.unflatten(0, (-1, CODES)).transpose(1, 2)
            torch.neg(blocks, out=packed[start // CODES : start // CODES + len(blocks)])

        self.reach = self._shift(take)
        return packed.numpy()

    def nearest(self, x: Tensor) -> Tensor:
        """x (N, D), any floating type -> codes (N,)."""
        rows, codes = as_array(x), np.empty(x.shape[0], np.int64)
        known = (self.codebook, self.inverse, self.cosine)
        start = self._by_products(rows, codes) if self.short is not None else 0
        if start < len(rows):
            packed = self._pack() if self.packed is None else self.packed
            self.packed, half = packed, self.half.reshape(-1, CODES)
            search(rows[start:], *known, packed, half, self.centre, self.reach, codes[start:])
        return torch.from_numpy(codes)

    def _by_products(self, x: np.ndarray, codes: np.ndarray) -> int:
        """Fill codes with the help of bf16 products on the processor's matrix unit; returns how many rows were done.

        It stops early when a block leaves so many codes to look at that fp32 scores are the shorter way.
        """
        short = self.short
        assert short is not None
        (N, D), stride = x.shape, short.shape[1]
        if N < FOLD_ROWS:  # the end of some caller's blocks
            for n in range(N):
                codes[n] = exact_row(x[n], self.codebook, self.inverse, self.cosine, 0)
            return N
        block = min(N, max(_MATRIX_ROWS // 2, _PRODUCT_BYTES // (2 * stride)))
        rows, norms = np.empty((block, D), np.float32), np.empty(block)
        products = torch.empty(block, stride, dtype=torch.bfloat16)
        known = (self.codebook, self.inverse, self.cosine)
        for done in range(0, N, block):
            first = min(done, N - FOLD_ROWS)  # a last block of one to three rows takes some that are done already
            part = x[first : done + block]
            n = len(part)
            load_rows(part, self.centre, self.cosine, rows, norms)
            torch.mm(torch.from_numpy(rows[:n]).bfloat16(), short, out=products[:n])
            bits = products[:n].view(torch.int16).numpy().view(np.uint16)
            looked_at = search_products(part, *known, bits, self.half, norms, self.reach, codes[first : done + block])
            if looked_at > _CODES_PER_ROW * n:
                self.short = None
                return first + n
        return N


def has_matrix_unit() -> bool:
    """Whether bf16 products run several times faster than fp32 here (AMX)."""
    check = getattr(torch.cpu, "_is_amx_tile_supported", None)  # absent from some releases: then fp32 it is
    return bool(check and check())


def as_array(x: Tensor) -> np.ndarray:
    """A contiguous fp32 or fp64 array, without a copy where x is one."""
    x = x.detach()
    return (x if x.dtype == torch.float64 else x.float()).contiguous().numpy()
