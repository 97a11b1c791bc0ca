"""Codes of a chain of codebooks, each of which codes what those before it left over, and the sum that decodes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.kernels.dispatch import choose, forced, installed, over_rows
from mmtok.kernels.nearest_code import (
    check_is_finite,
    check_operands,
    implementations,
    make_search,
    nearest_code,
    nearest_code_reference,
    search_cost,
)
from mmtok.kernels.row_search import RowSearch

_RESIDUAL_BYTES = 4 << 20  # of the fp64 residual of one block of rows


def residual_codes_reference(z: Tensor, codebooks: Tensor, metric: str = "euclidean") -> Tensor:
    """r_1 = z; k_q = nearest(r_q, C_q); r_{q+1} = r_q - C_q[k_q], in fp64.

    Args:
        z: (N, D). codebooks: (Q, K, D).

    Returns:
        codes (N, Q) int64.
    """
    residual = z.detach().double()
    codes = []
    for codebook in codebooks.detach().double():
        codes.append(nearest_code_reference(residual, codebook, metric))
        residual = residual - codebook[codes[-1]]
    return torch.stack(codes, 1) if codes else z.new_empty(z.shape[0], 0, dtype=torch.int64)


def residual_codes(
    z: Tensor, codebooks: Tensor | Sequence[Tensor], metric: str = "euclidean", check_finite: bool = True
) -> Tensor:
    """Codes of every level, in exact arithmetic: the residual is kept in fp64, each choice is that of `nearest_code`.

    Args:
        z: (N, D) floating point. codebooks: (Q, K, D) on the same device, or Q of (K, D), which a CPU takes without
            stacking them: for a few rows that copy would take longest. metric, check_finite: as in `nearest_code`.

    Returns:
        codes (N, Q) int64, no gradient. The first q columns do not depend on the later levels.

    Raises:
        ValueError: as `nearest_code`, or codebooks is not (Q, K, D) with Q >= 1.
    """
    if isinstance(codebooks, Tensor) or z.device.type != "cpu" or len({c.shape for c in codebooks}) != 1:
        codebooks = codebooks if isinstance(codebooks, Tensor) else torch.stack(list(codebooks))
        check_codebooks(codebooks)
    books = [codebook.detach() for codebook in codebooks]
    check_operands(z, books[0], metric)
    if torch.compiler.is_dynamo_compiling():
        return _residual_operator(z.detach(), books, metric, check_finite)
    if torch.compiler.is_compiling() or z.device.type == "meta":
        with torch.autocast(z.device.type, enabled=False):
            residual, columns = z.detach().float(), []
            for codebook in books:
                columns.append(RowSearch(codebook, metric).nearest_captured(residual))
                residual = residual - F.embedding(columns[-1], codebook.float())
            return torch.stack(columns, 1)
    return _residual_codes(z.detach(), books, metric, check_finite)


def _residual_codes(z: Tensor, codebooks: list[Tensor], metric: str, check_finite: bool) -> Tensor:
    if check_finite:
        check_is_finite(z, "z")
        for codebook in codebooks:
            check_is_finite(codebook, "codebooks")
    implementation = choose("residual_codes", _implementations(z, codebooks))
    if implementation == "reference":
        return residual_codes_reference(z, torch.stack(codebooks), metric)
    if implementation == "triton":
        from mmtok.kernels.triton import residual_codes as triton_kernel

        return triton_kernel.residual_codes(z, torch.stack(codebooks), metric)
    if implementation == "numba":
        from mmtok.kernels.numba.nearest_code import few_codes, takes_few

        if takes_few(len(z), codebooks):
            return few_codes(z, codebooks, metric)
    (N, D), Q, K = z.shape, len(codebooks), codebooks[0].shape[0]
    codes = torch.empty(N, Q, dtype=torch.int64, device=z.device)
    rows = max(256, _RESIDUAL_BYTES // (8 * D))
    with torch.autocast(z.device.type, enabled=False):
        searches = [make_search(implementation, codebook, metric, N) for codebook in codebooks]

        def work(start: int, stop: int) -> None:
            for first in range(start, stop, rows):
                last = min(first + rows, stop)
                residual = z[first:last].double()
                for q, search in enumerate(searches):
                    code = search.nearest(residual)
                    codes[first:last, q] = code
                    if q + 1 < Q:
                        residual -= F.embedding(code, codebooks[q])

        over_rows(N, work, cost=Q * search_cost(N, K, D), device=z.device)
    return codes


_residual_operator = torch.library.custom_op("mmtok::residual_codes", _residual_codes, mutates_args=())


@_residual_operator.register_fake
def _(z: Tensor, codebooks: list[Tensor], metric: str, check_finite: bool) -> Tensor:
    return z.new_empty(z.shape[0], len(codebooks), dtype=torch.int64)


def _implementations(z: Tensor, codebooks: Sequence[Tensor]) -> tuple[str, ...]:
    if z.device.type == "cuda" and installed("triton"):
        from mmtok.kernels.triton import residual_codes as triton_kernel

        if triton_kernel.supported(z, codebooks[0]):
            return ("triton", "torch", "reference")
        return ("torch", "reference")
    return implementations(z, codebooks[0])


def factorised_codes_reference(
    z: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    codebooks: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    metric: str = "euclidean",
) -> Tensor:
    """r_1 = z; k_q = nearest(W_q r_q + b_q, C_q); r_{q+1} = r_q - V_q C_q[k_q] - a_q, in fp64.

    Args:
        z: (N, D). in_weight W: (Q, d, D). in_bias b: (Q, d). codebooks C: (Q, K, d). out_weight V: (Q, D, d).
        out_bias a: (Q, D).

    Returns:
        codes (N, Q) int64.
    """
    residual, codes = z.detach().double(), []
    for W, b, C, V, a in zip(
        *(t.detach().double() for t in (in_weight, in_bias, codebooks, out_weight, out_bias)), strict=True
    ):
        codes.append(nearest_code_reference(residual @ W.T + b, C, metric))
        residual = residual - C[codes[-1]] @ V.T - a
    return torch.stack(codes, 1)


def factorised_codes(
    z: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    codebooks: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    metric: str = "euclidean",
    check_finite: bool = True,
) -> Tensor:
    """Codes of a residual chain whose levels live in narrow spaces (arXiv 2306.06546), projecting z only once.

    W_q r_q = W_q z - sum_{p<q} (W_q V_p C_p[k_p] + W_q a_p): one product N x D x Qd, and then only the small matrices
    W_q V_p (d x d) meet the chosen codes. In fp64, so the order of the sums decides no code.

    Args:
        z: (N, D) floating point. The rest: as `factorised_codes_reference`. metric, check_finite: as `nearest_code`.

    Returns:
        codes (N, Q) int64, no gradient.

    Raises:
        ValueError: as `nearest_code`, or shapes that do not fit together.
    """
    check_codebooks(codebooks)
    (Q, _, d), D = codebooks.shape, z.shape[-1]
    weights = (in_weight, in_bias, out_weight, out_bias)
    expected = ((Q, d, D), (Q, d), (Q, D, d), (Q, D))
    if z.ndim != 2 or tuple(tuple(w.shape) for w in weights) != expected:
        raise ValueError(
            f"expected z (N, D) and in_weight, in_bias, out_weight, out_bias of shapes {expected} for codebooks "
            f"{tuple(codebooks.shape)}, got z {tuple(z.shape)} and {[tuple(w.shape) for w in weights]}"
        )
    if check_finite:
        check_is_finite(z, "z")
    if forced() == "reference":
        return factorised_codes_reference(z, in_weight, in_bias, codebooks, out_weight, out_bias, metric)
    with torch.autocast(z.device.type, enabled=False):
        W, b, C, V, a = (t.detach().double() for t in (in_weight, in_bias, codebooks, out_weight, out_bias))
        W = W.flatten(0, 1)  # (Q d, D)
        seen = W @ V.transpose(0, 1).flatten(1)  # (Q d, Q d): what level q sees of level p's code, W_q V_p
        shift = b.flatten() - (W @ (a.cumsum(0) - a).T).unflatten(0, (Q, d)).diagonal(0, 0, 2).T.flatten()  # (Q d,)
        h = F.linear(z.detach().double(), W, shift)  # (N, Q d): all levels of z itself
        chosen = torch.empty_like(h)
        columns = []
        for q in range(Q):
            own, before = slice(q * d, q * d + d), slice(0, q * d)
            y = h[:, own] - chosen[:, before] @ seen[own, before].T if q else h[:, own]
            columns.append(nearest_code(y, codebooks[q], metric, check_finite=False))
            chosen[:, own] = F.embedding(columns[-1], C[q])
        return torch.stack(columns, 1)


def residual_decode_reference(codes: Tensor, codebooks: Tensor) -> Tensor:
    """sum_q C_q[k_q]. codes (N, Q'), codebooks (Q, K, D), Q' <= Q -> (N, D)."""
    out = codebooks.new_zeros(codes.shape[0], codebooks.shape[2])
    for q in range(codes.shape[1]):
        out = out + codebooks[q][codes[:, q]]
    return out


def residual_decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """The sum of the codebook rows that the codes name: one embedding bag over the stacked codebooks.

    Args:
        codes: (N, Q') int64 with 1 <= Q' <= Q, each in 0..K-1 (not checked here). codebooks: (Q, K, D).

    Returns:
        (N, D), with a gradient to ``codebooks``.

    Raises:
        ValueError: wrong shapes, or more levels of codes than codebooks.
    """
    check_codebooks(codebooks)
    Q, K, D = codebooks.shape
    if codes.ndim != 2 or not 1 <= codes.shape[1] <= Q:
        raise ValueError(f"codes: expected shape (N, 1..{Q}), got {tuple(codes.shape)}; keep the first {Q} levels")
    implementation = choose("residual_decode", _decode_implementations(codes, codebooks))
    if implementation == "reference":
        return residual_decode_reference(codes, codebooks)
    if implementation == "triton":
        from mmtok.kernels.triton import residual_decode as triton_kernel

        return triton_kernel.residual_decode(codes, codebooks)
    rows = codes + K * torch.arange(codes.shape[1], device=codes.device)  # (N, Q')
    return F.embedding_bag(rows, codebooks.reshape(Q * K, D), mode="sum")


def _decode_implementations(codes: Tensor, codebooks: Tensor) -> Sequence[str]:
    if codes.device.type == "cuda" and installed("triton") and not torch.compiler.is_compiling():
        from mmtok.kernels.triton import residual_decode as triton_kernel

        if triton_kernel.supported(codes, codebooks):
            return ("triton", "torch", "reference")
    return ("torch", "reference")


def check_codebooks(codebooks: Tensor) -> None:
    if codebooks.ndim != 3 or codebooks.shape[0] < 1:
        raise ValueError(
            f"codebooks: expected shape (Q, K, D) with Q >= 1, got {tuple(codebooks.shape)}; "
            f"stack the levels' codebooks"
        )
