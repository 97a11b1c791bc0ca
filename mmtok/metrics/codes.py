"""How well codes use their codebooks: usage, perplexity, entropy and what adjacent levels repeat, per level.

All figures are plug-in estimates from counts, so each depends on how many codes were counted: `samples` stands beside
them, and figures from different sample counts do not compare (n codes cannot show more than n entries or log2 n bits).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from mmtok.tokens import Tokens, check_range


@dataclasses.dataclass(frozen=True)
class CodeStatistics:
    """Statistics of a batch of codes, float64 unless said.

    Args:
        samples: (Q,) int64, codes counted on each level.
        usage: (Q,) share of the K entries that occur, in (0,1].
        entropy_bits: (Q,) -sum p log2 p, in [0, log2 K].
        perplexity: (Q,) 2 ** entropy, in [1, K].
        shared_bits: (Q-1,) mutual information of levels q and q+1 at the same position, bits.
        shared_bits_chance: (Q-1,) the same after shuffling level q+1: what the finite sample alone pretends. The levels
            are redundant only by what `shared_bits` is above it.
    """

    samples: Tensor
    usage: Tensor
    entropy_bits: Tensor
    perplexity: Tensor
    shared_bits: Tensor
    shared_bits_chance: Tensor


def token_statistics(tokens: Tokens, seed: int = 0) -> CodeStatistics:
    """`code_statistics` of the valid positions of `tokens`, a strided level's repeats counted once."""
    return code_statistics(tokens.codes, tokens.spec.codebook_sizes, tokens.mask, tokens.spec.level_strides, seed)


def code_statistics(
    codes: Tensor,
    codebook_sizes: Sequence[int],
    mask: Tensor | None = None,
    level_strides: Sequence[int] | None = None,
    seed: int = 0,
) -> CodeStatistics:
    """Count codes level by level.

    Args:
        codes: (B,Q,T) int64.
        codebook_sizes: K of each level, length Q.
        mask: (B,T) bool, true = valid; None: all are.
        level_strides: level q has a new code at every ``level_strides[q]``-th position; None: at every position.
        seed: of the shuffle behind `shared_bits_chance`.

    Raises:
        ValueError: shapes that do not fit, no valid position, or (TokensError) a code out of range.
    """
    mask, strides = _checked(codes, codebook_sizes, mask, level_strides)
    counts = [_counts(_level(codes, mask, q, stride)) for q, stride in enumerate(strides)]
    entropy_bits = torch.stack([_entropy_bits(c) for c in counts])
    # The generator lives on the CPU so that a seed means the same shuffle on every device.
    generator = torch.Generator().manual_seed(seed)
    shared, chance = [], []
    for q in range(len(strides) - 1):
        stride = min(strides[q], strides[q + 1])
        first, second = _level(codes, mask, q, stride), _level(codes, mask, q + 1, stride)
        order = torch.randperm(len(second), generator=generator).to(second.device)
        shared.append(_mutual_bits(first, second))
        chance.append(_mutual_bits(first, second[order]))
    empty = torch.zeros(0, dtype=torch.float64)
    return CodeStatistics(
        samples=torch.tensor([int(c.sum()) for c in counts]),
        usage=torch.tensor([len(c) / k for c, k in zip(counts, codebook_sizes, strict=True)], dtype=torch.float64),
        entropy_bits=entropy_bits,
        perplexity=torch.exp2(entropy_bits),
        shared_bits=torch.stack(shared) if shared else empty,
        shared_bits_chance=torch.stack(chance) if chance else empty,
    )


def usage(codes: Tensor, codebook_sizes: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """Share of each level's K entries that occur, (Q,) float64 in (0,1]; arguments as in `code_statistics`."""
    mask, strides = _checked(codes, codebook_sizes, mask, None)
    counts = [_counts(_level(codes, mask, q, stride)) for q, stride in enumerate(strides)]
    return torch.tensor([len(c) / k for c, k in zip(counts, codebook_sizes, strict=True)], dtype=torch.float64)


def entropy(codes: Tensor, codebook_sizes: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """Entropy of each level's codes, (Q,) float64 bits in [0, log2 K]; arguments as in `code_statistics`."""
    mask, strides = _checked(codes, codebook_sizes, mask, None)
    return torch.stack([_entropy_bits(_counts(_level(codes, mask, q, stride))) for q, stride in enumerate(strides)])


def perplexity(codes: Tensor, codebook_sizes: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """2 ** entropy: as many equally likely codes, (Q,) float64 in [1, K]; arguments as in `code_statistics`."""
    return torch.exp2(entropy(codes, codebook_sizes, mask))


def mutual_information(first: Tensor, second: Tensor) -> Tensor:
    """Bits that one code tells about the other: I = sum p(a,b) log2(p(a,b) / p(a) p(b)), from counts.

    Args:
        first: (N,) int64.
        second: (N,) int64, code i beside ``first[i]``.

    Returns:
        Scalar float64 bits, 0 for independent codes with every pair counted alike, at most the smaller entropy.
        With N not far above K_first * K_second pairs the estimate is too high; compare it with a shuffled `second`.

    Raises:
        ValueError: not two int64 vectors of one length above 0.
    """
    for name, x in (("first", first), ("second", second)):
        if x.ndim != 1 or x.dtype != torch.int64 or x.shape != first.shape or len(x) == 0:
            raise ValueError(
                f"{name}: expected int64 of shape ({first.shape[0] if first.ndim else 0},), more than 0 codes, "
                f"got {x.dtype} {tuple(x.shape)}; flatten the valid codes of both levels in the same order"
            )
    return _mutual_bits(first, second)


def _mutual_bits(first: Tensor, second: Tensor) -> Tensor:
    a, b = (torch.unique(x, return_inverse=True)[1] for x in (first, second))  # ranks: no K x K table
    pairs = a * (int(b.max()) + 1) + b
    bits = _entropy_bits(_counts(a)) + _entropy_bits(_counts(b)) - _entropy_bits(_counts(pairs))
    return bits.clamp(min=0)  # rounding only: a plug-in estimate is never negative


def _level(codes: Tensor, mask: Tensor, q: int, stride: int) -> Tensor:
    return codes[:, q, ::stride][mask[:, ::stride]]  # (N,)


def _counts(codes: Tensor) -> Tensor:
    # unique, not bincount: a binary quantizer's K may be 2^60 and no table of that size exists.
    return torch.unique(codes, return_counts=True)[1]


def _entropy_bits(counts: Tensor) -> Tensor:
    p = counts.double().cpu() / counts.sum().cpu()
    return -(p * p.log2()).sum().clamp(max=0)  # clamp: one code gives +0, not -0


def _checked(
    codes: Tensor, codebook_sizes: Sequence[int], mask: Tensor | None, level_strides: Sequence[int] | None
) -> tuple[Tensor, tuple[int, ...]]:
    if codes.ndim != 3 or codes.dtype != torch.int64:
        raise ValueError(
            f"codes: expected int64 (B,Q,T), got {codes.dtype} {tuple(codes.shape)}; pass Tokens.codes or codes.long()"
        )
    B, Q, T = codes.shape
    strides = (1,) * Q if level_strides is None else tuple(int(s) for s in level_strides)
    for name, values in (("codebook_sizes", codebook_sizes), ("level_strides", strides)):
        if len(values) != Q or (Q and min(values) < 1):
            raise ValueError(
                f"{name}: expected {Q} values >= 1, one a level, got {tuple(values)}; take them from Tokens.spec"
            )
    valid = torch.ones(B, T, dtype=torch.bool, device=codes.device) if mask is None else mask
    if valid.shape != (B, T) or valid.dtype != torch.bool:
        raise ValueError(
            f"mask: expected bool of shape {(B, T)}, got {valid.dtype} {tuple(valid.shape)}; pass Tokens.mask"
        )
    if any(not bool(valid[:, ::s].any()) for s in set(strides)) or Q == 0:
        raise ValueError(f"codes: expected at least one valid code on each level, got none in {tuple(codes.shape)}")
    check_range(codes, codebook_sizes, valid)
    return valid, strides
