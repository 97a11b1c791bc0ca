"""Codes of a chain of codebooks in one search launch: the residual never leaves the registers.

The kernels, and why the codes are those of exact arithmetic, are in `mmtok.kernels.triton.code_search`.
"""

from __future__ import annotations

from torch import Tensor

from mmtok.kernels.triton.nearest_code import all_plans, search, search_variants
from mmtok.kernels.triton.nearest_code import supported as supported
from mmtok.kernels.triton.variant import Variant


def residual_codes(z: Tensor, codebooks: Tensor, metric: str = "euclidean", precision: str = "auto") -> Tensor:
    """r_1 = z; k_q = nearest(r_q, C_q); r_{q+1} = r_q - C_q[k_q], as in exact arithmetic.

    With the cosine a code is chosen by direction alone, and the residual keeps its length.

    Args:
        z: (N, D) finite. codebooks: (Q, K, D) on the same device. metric, precision: as in `nearest_code`.

    Returns:
        codes (N, Q) int64.

    Raises:
        ValueError: the precision is unknown or has no kernel at this width.
    """
    return search(z, codebooks, metric, precision)


# The kernels before and after the search are those of `nearest_code`, and listed there.
VARIANTS: list[Variant] = search_variants("residual_codes", all_plans(2), 2)
