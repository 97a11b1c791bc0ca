"""Counting the middles below each number, column by column, in vectors."""

from __future__ import annotations

import numpy as np

from mmtok.kernels.numba.compiling import compiled


@compiled()
def count_below(x, middles, codes):
    """codes (N, D) int64: how many of middles (K - 1, D) lie below x (N, D), column by column."""
    width = x.shape[1]
    count = np.empty(width, np.int32)
    for n in range(x.shape[0]):
        count[:] = 0
        for j in range(middles.shape[0]):
            for d in range(width):
                count[d] += np.int32(middles[j, d] < x[n, d])
        for d in range(width):
            codes[n, d] = count[d]
