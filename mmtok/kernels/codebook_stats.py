"""How often each code was used, the sum of the vectors that used it, and what the counts say about a codebook."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.kernels.dispatch import choose, installed


def codebook_stats_reference(
    z: Tensor, codes: Tensor, codebook_size: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """counts = sum_n onehot(k_n), sums = onehot(k)' z, by the one-hot matrix in fp64; returned in fp32.

    Args and returns: as `codebook_stats`.
    """
    onehot = F.one_hot(codes, codebook_size).double()  # (N, K)
    x = z.detach().double()
    if mask is not None:
        onehot = onehot * mask[:, None]
        x = torch.where(mask[:, None], x, 0.0)
    return onehot.sum(0).float(), (onehot.T @ x).float()


def codebook_stats(z: Tensor, codes: Tensor, codebook_size: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Counts and vector sums of each code, without a one-hot matrix.

    Summation is in fp32 and in a fixed order on a CPU and, by the Triton kernel, on CUDA: repeated runs agree bitwise.
    Only CUDA without triton adds atomically, where `torch.use_deterministic_algorithms` fixes the order.

    Args:
        z: (N, D). codes: (N,) int64 in 0..K-1. codebook_size: K. mask: (N,) bool, false rows count for nothing.

    Returns:
        counts (K,) fp32, sums (K, D) fp32; no gradient.

    Raises:
        ValueError: shapes do not fit together.
    """
    if z.ndim != 2 or codes.shape != z.shape[:1] or (mask is not None and mask.shape != codes.shape):
        raise ValueError(
            f"expected z (N, D), codes (N,) and mask (N,), got {tuple(z.shape)}, {tuple(codes.shape)} and "
            f"{None if mask is None else tuple(mask.shape)}; flatten batch and positions together"
        )
    how = choose("codebook_stats", _implementations(z))
    if how == "reference":
        return codebook_stats_reference(z, codes, codebook_size, mask)
    if how == "triton":
        from mmtok.kernels.triton import codebook_stats as on_triton

        return on_triton.codebook_stats(z, codes, codebook_size, mask)
    x = z.detach().float()
    ones = torch.ones_like(codes, dtype=torch.float32)
    if mask is not None:
        x, ones = torch.where(mask[:, None], x, 0.0), mask.float()
    counts = x.new_zeros(codebook_size).scatter_add_(0, codes, ones)
    # scatter_add over an expanded index: the sums of index_add, sooner (recipes/bench_kernels.py, statistics).
    sums = x.new_zeros(codebook_size, x.shape[1]).scatter_add_(0, codes[:, None].expand_as(x), x)
    return counts, sums


def _implementations(z: Tensor) -> tuple[str, ...]:
    if z.is_cuda and (torch.compiler.is_compiling() or installed("triton")):
        return ("triton", "torch", "reference")
    return ("torch", "reference")


def usage_perplexity(counts: Tensor, dead_below: float = 0.1) -> dict[str, Tensor]:
    """What counts (..., K) say about each codebook.

    Args:
        counts: (..., K), how often each code was used.
        dead_below: a code is dead when it is used less than this share of the mean use.

    Returns:
        ``usage``: share of codes used at all; ``perplexity``: exp of the entropy of use, 1..K (0 when nothing was
        counted); ``dead_share``: share of dead codes. Each of shape (...), fp32.
    """
    counts = counts.float()
    total = counts.sum(-1, keepdim=True)
    p = counts / total.clamp_min(_TINY)
    entropy = torch.special.entr(p).sum(-1)
    return {
        "usage": (counts > 0).float().mean(-1),
        "perplexity": torch.where(total[..., 0] > 0, entropy.exp(), 0.0),
        "dead_share": (counts < dead_below * counts.mean(-1, keepdim=True)).float().mean(-1),
    }


_TINY = 1e-30
