"""The code nearest to each vector: the argmin of exact arithmetic, without ever writing the N x K matrix of distances.

Since |x - c|^2 = |x|^2 + 2 (|c|^2 / 2 - x.c), the nearest code is the least of s = |c|^2 / 2 - x.c. Both x and c are
first shifted by the codebook's mean, which changes no distance and removes the cancellation that a common offset causes
(at mean 100, deviation 0.1 it decides 59 % of the codes wrongly). Scores are then taken in fp32, whatever the autocast
and the global matmul precision. A row keeps its code when its best two scores differ by more than a proved bound on
their error; the others (0.01 to 1 % of real data) are searched again in fp64. So every implementation, batch size,
thread count and device gives the same codes, those of fp64, and the lowest code on ties.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmtok.kernels.dispatch import choose, installed, over_rows
from mmtok.kernels.row_search import RowSearch, unit

METRICS = ("euclidean", "cosine")


def nearest_code_reference(z: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
    """argmin_k |z_n - c_k|^2 in fp64, or argmax_k of the cosine (0 for a zero vector); the lowest code on ties.

    Args:
        z: (N, D). codebook: (K, D). metric: ``euclidean`` or ``cosine``.

    Returns:
        codes (N,) int64.
    """
    x, c = z.detach().double(), codebook.detach().double()
    if metric == "cosine":
        x, c = unit(x), unit(c)
    codes = x.new_empty(x.shape[0], dtype=torch.int64)
    for n in range(x.shape[0]):
        distance = -(x[n] * c).sum(1) if metric == "cosine" else (x[n] - c).square().sum(1)  # (K,)
        codes[n] = distance.min(0).indices
    return codes


def nearest_code(z: Tensor, codebook: Tensor, metric: str = "euclidean", check_finite: bool = True) -> Tensor:
    """The code whose codebook row is nearest to each row of z in exact arithmetic.

    ``torch.compile`` keeps the call as one operator with the same codes, and so does ``torch.export(strict=True)``.
    ``torch.export`` as such takes a form of plain torch ops, which runs where mmtok is not installed, with fp32-grade
    scores but no second look in fp64: of two codes whose distances differ by less than 1e-6 it may take the other.

    Args:
        z: (N, D) floating point. codebook: (K, D), on the same device.
        metric: ``euclidean``, or ``cosine`` (the direction decides; a zero vector has cosine 0 with everything).
        check_finite: refuse NaN and infinity; costs one pass, and one synchronisation on an accelerator.

    Returns:
        codes (N,) int64, no gradient. On exact ties the lowest code.

    Raises:
        ValueError: shapes, types or devices do not fit, z or codebook is not finite, or the metric is unknown.
    """
    check_operands(z, codebook, metric)
    if torch.compiler.is_dynamo_compiling():  # is_exporting() is true here as well, in torch 2.11
        return _operator(z.detach(), codebook.detach(), metric, check_finite)
    if torch.compiler.is_compiling() or z.device.type == "meta":
        with torch.autocast(z.device.type, enabled=False):
            return RowSearch(codebook, metric).nearest_captured(z.detach())
    return _nearest_code(z, codebook, metric, check_finite)


def _nearest_code(z: Tensor, codebook: Tensor, metric: str, check_finite: bool) -> Tensor:
    if check_finite:
        check_is_finite(z, "z")
        check_is_finite(codebook, "codebook")
    implementation = choose("nearest_code", implementations(z, codebook))
    if implementation == "reference":
        return nearest_code_reference(z, codebook, metric)
    z, codebook = z.detach(), codebook.detach()
    if implementation == "triton":
        from mmtok.kernels.triton import nearest_code as triton_kernel

        return triton_kernel.nearest_code(z, codebook, metric)
    if implementation == "numba":
        from mmtok.kernels.numba.nearest_code import few_codes, takes_few

        if takes_few(len(z), [codebook]):
            return few_codes(z, [codebook], metric)[:, 0].contiguous()
    codes = torch.empty(z.shape[0], dtype=torch.int64, device=z.device)
    with torch.autocast(z.device.type, enabled=False):
        search = make_search(implementation, codebook, metric, z.shape[0])

        def work(start: int, stop: int) -> None:
            codes[start:stop] = search.nearest(z[start:stop])

        over_rows(z.shape[0], work, cost=search_cost(len(z), *codebook.shape), device=z.device)
    return codes


_operator = torch.library.custom_op("mmtok::nearest_code", _nearest_code, mutates_args=())


@_operator.register_fake
def _(z: Tensor, codebook: Tensor, metric: str, check_finite: bool) -> Tensor:
    return z.new_empty(z.shape[0], dtype=torch.int64)


def implementations(z: Tensor, codebook: Tensor) -> tuple[str, ...]:
    """What can search these rows, the fastest first."""
    if z.device.type == "cpu" and installed("numba"):
        return ("numba", "torch", "reference")
    if z.device.type == "cuda" and installed("triton"):
        from mmtok.kernels.triton import nearest_code as triton_kernel

        if triton_kernel.supported(z, codebook):
            return ("triton", "torch", "reference")
    return ("torch", "reference")


def make_search(implementation: str, codebook: Tensor, metric: str, num_rows: int) -> Any:
    """An object whose ``nearest(x (n, D))`` gives codes (n,), from several threads at once."""
    if implementation == "numba":
        from mmtok.kernels.numba.nearest_code import CompiledSearch

        return CompiledSearch(codebook, metric, num_rows)
    return RowSearch(codebook, metric)


def search_cost(num_rows: int, codebook_size: int, width: int) -> float:
    """Multiply-adds of a search; finding the least score counts as 16 of them."""
    return float(num_rows) * codebook_size * (width + 16)


def check_operands(z: Tensor, codebook: Tensor, metric: str) -> None:
    """Raise ValueError unless z (N, D) and codebook (K, D) can be compared under ``metric``."""
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    if z.ndim != 2 or not z.is_floating_point():
        raise ValueError(
            f"z: expected a floating point tensor of shape (N, D), got {z.dtype} of shape {tuple(z.shape)}; "
            f"flatten all but the last axis"
        )
    if codebook.ndim != 2 or codebook.shape[0] < 1 or not codebook.is_floating_point():
        raise ValueError(
            f"codebook: expected a floating point tensor of shape (K, D) with K >= 1, "
            f"got {codebook.dtype} of shape {tuple(codebook.shape)}; one codebook at a time"
        )
    if z.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"z: expected width D = {codebook.shape[1]} as in the codebook, got {z.shape[1]}; "
            f"project z to that width first"
        )
    if z.device != codebook.device:
        raise ValueError(f"z is on {z.device}, the codebook on {codebook.device}; move one of them with .to(device)")


def check_is_finite(z: Tensor, name: str) -> None:
    """Raise ValueError if ``z`` holds NaN or infinity. Not checked while a graph is captured."""
    if torch.compiler.is_compiling() or z.device.type == "meta":
        return
    # The sum of finite values is finite but for overflow, and needs no N x D temporary; only a bad sum is looked into.
    if not bool(torch.isfinite(z.detach().sum(dtype=torch.float32))):
        bad = int((~torch.isfinite(z)).sum())
        if bad:
            raise ValueError(
                f"{name}: expected finite values, got {bad} NaN or infinite ones of {z.numel()}; "
                f"look for a diverged training or a division by zero upstream"
            )
