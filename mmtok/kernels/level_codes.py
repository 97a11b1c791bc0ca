"""The nearest of K sorted levels to each number, every column with levels of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from mmtok.kernels.dispatch import choose, installed, over_rows

_COUNTED_LEVELS = 128  # up to here, comparing with every level in vectors is faster than bisection


def level_codes_reference(x: Tensor, levels: Tensor) -> Tensor:
    """argmin_k |x_nd - levels_dk| in fp64, the lower code on ties. x (N, D), levels (D, K) -> codes (N, D) int64."""
    return (x.detach().double()[..., None] - levels.double()).abs().min(-1).indices


def level_codes(x: Tensor, levels: Tensor) -> Tensor:
    """How many of the middles between neighbouring levels lie below each number: that is the nearest level.

    Args:
        x: (N, D) floating point. levels: (D, K) fp32, ascending in each row.

    Returns:
        codes (N, D) int64 in 0..K-1, no gradient; on ties the lower one. A middle is rounded to fp32, so within that of
        a middle either neighbour may be chosen.

    Raises:
        ValueError: shapes do not fit together.
    """
    if x.ndim != 2 or levels.ndim != 2 or x.shape[1] != levels.shape[0] or levels.shape[1] < 1:
        raise ValueError(f"expected x (N, D) and levels (D, K), got {tuple(x.shape)} and {tuple(levels.shape)}")
    x, levels = x.detach().float(), levels.detach().float()
    middles = (levels[:, 1:] + levels[:, :-1]) / 2  # (D, K - 1)
    implementation = choose("level_codes", _implementations(x, levels))
    if implementation == "reference":
        return level_codes_reference(x, levels)
    if implementation == "torch":  # also where the number of rows is not known yet
        return torch.searchsorted(middles, x.T.contiguous()).T  # middle < x strictly: a tie goes to the lower code
    from mmtok.kernels.numba.level_codes import count_below

    codes = torch.empty(x.shape, dtype=torch.int64)
    rows, columns, out = x.contiguous().numpy(), middles.T.contiguous().numpy(), codes.numpy()

    def work(start: int, stop: int) -> None:
        count_below(rows[start:stop], columns, out[start:stop])

    over_rows(x.shape[0], work, cost=x.numel() * float(levels.shape[1]), device=x.device)
    return codes


def _implementations(x: Tensor, levels: Tensor) -> tuple[str, ...]:
    usable = x.device.type == "cpu" and levels.shape[1] <= _COUNTED_LEVELS and not torch.compiler.is_compiling()
    return ("numba", "torch", "reference") if usable and installed("numba") else ("torch", "reference")
