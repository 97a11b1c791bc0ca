"""Codes of a chain of codebooks, each of which codes what those before it left over, and the sum that decodes them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.kernels.dispatch import choose
from mmtok.kernels.nearest_code import Scorer, check_is_finite, check_operands, nearest_code_reference


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


def residual_codes(z: Tensor, codebooks: Tensor, metric: str = "euclidean", check_finite: bool = True) -> Tensor:
    """Codes of every level by blocks of rows, so that a block's residual and scores stay in cache through all levels.

    Args:
        z: (N, D) floating point. codebooks: (Q, K, D) on the same device. metric, check_finite: as in `nearest_code`.

    Returns:
        codes (N, Q) int64, no gradient. The first q columns do not depend on the later levels.

    Raises:
        ValueError: as `nearest_code`, or codebooks is not (Q, K, D) with Q >= 1.
    """
    check_codebooks(codebooks)
    check_operands(z, codebooks[0], metric)
    if check_finite:
        check_is_finite(z, "z")
    if choose("residual_codes", ("torch", "reference")) == "reference":
        return residual_codes_reference(z, codebooks, metric)
    codebooks = codebooks.detach().float()
    with torch.autocast(z.device.type, enabled=False):
        scorers = [Scorer(codebook, metric) for codebook in codebooks]
        if torch.compiler.is_compiling():
            residual, columns = z.detach().float(), []
            for codebook, scorer in zip(codebooks, scorers, strict=True):
                columns.append(scorer.nearest_captured(residual))
                residual = residual - F.embedding(columns[-1], codebook)
            return torch.stack(columns, 1)
        codes = torch.empty(z.shape[0], len(scorers), dtype=torch.int64, device=z.device)
        scores = scorers[0].buffer(z.shape[0])
        for start in range(0, z.shape[0], len(scores)):
            residual = z.detach()[start : start + len(scores)].float()
            for q, scorer in enumerate(scorers):
                code = scorer.nearest(residual, scores)
                codes[start : start + len(scores), q] = code
                residual = residual - codebooks[q][code]
        return codes


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
    if choose("residual_decode", ("torch", "reference")) == "reference":
        return residual_decode_reference(codes, codebooks)
    rows = codes + K * torch.arange(codes.shape[1], device=codes.device)  # (N, Q')
    return F.embedding_bag(rows, codebooks.reshape(Q * K, D), mode="sum")


def check_codebooks(codebooks: Tensor) -> None:
    if codebooks.ndim != 3 or codebooks.shape[0] < 1:
        raise ValueError(
            f"codebooks: expected shape (Q, K, D) with Q >= 1, got {tuple(codebooks.shape)}; "
            f"stack the levels' codebooks"
        )
