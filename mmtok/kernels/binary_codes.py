"""Bits <-> integer codes, and the entropies of binary codes without a table of 2^bits rows per vector.

Bit order is little-endian: bit k of a code has the weight 2^k, everywhere in mmtok.

Entropies (in nats) are those of the soft codes of LFQ and BSQ (arXiv 2310.05737 eq. 5, arXiv 2406.07548 eq. 8): each
bit of vector n is 1 with probability sigmoid(logits_nk), independently, so a softmax over all 2^D codes is a product of
D Bernoulli factors. The entropy of one vector is then a sum of D closed forms. The distribution averaged over vectors
is P_high' P_low / N, where P_high and P_low (N x 2^(D/2)) are the distributions of the two halves of the bits: one
matrix product gives all 2^D probabilities exactly, and nothing of size N x 2^D exists.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.kernels.dispatch import choose

MAX_JOINT_BITS = 20  # 2^20 probabilities = 4 MiB, and N x 1024 halves
_TINY = 1e-37  # smallest normal fp32 is 1.2e-38; a larger clamp would flatten the gradient of rare codes


def pack_bits(bits: Tensor) -> Tensor:
    """bits (..., D), 0/1 or bool -> codes (...) int64, code = sum_k bit_k 2^k; D <= 62."""
    D = bits.shape[-1]
    if not 1 <= D <= 62:
        raise ValueError(f"bits: expected a last axis of 1..62 bits, got {D}; pack fewer bits into one code")
    choose("pack_bits", ("torch", "reference"))  # one implementation: the equation
    weights = 2 ** torch.arange(D, device=bits.device)  # (D,) int64
    return (bits.long() * weights).sum(-1)


def unpack_bits(codes: Tensor, num_bits: int) -> Tensor:
    """codes (...) int64 -> bits (..., num_bits) bool; the inverse of `pack_bits`."""
    choose("unpack_bits", ("torch", "reference"))
    return (codes[..., None] >> torch.arange(num_bits, device=codes.device)) & 1 > 0


def binary_entropy_reference(logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Both entropies from the full table p_nk = prod_d sigmoid(+-logits_nd) over all k < 2^D, in fp64.

    Args:
        logits: (N, D). mask: (N,) bool.

    Returns:
        sample_entropy = mean_n H(p_n), codebook_entropy = H(mean_n p_n); scalars, nats.
    """
    x = logits.double() if mask is None else logits[mask].double()
    table = unpack_bits(torch.arange(2 ** x.shape[1], device=x.device), x.shape[1]).double()  # (2^D, D)
    log_p = F.logsigmoid(x) @ table.T + F.logsigmoid(-x) @ (1 - table).T  # (N, 2^D)
    p = log_p.exp()
    return -(p * log_p).sum(1).mean(), torch.special.entr(p.mean(0)).sum()


def binary_entropy(logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean entropy of the vectors' soft codes, and the exact entropy of their average over all 2^D codes.

    Args:
        logits: (N, D), D <= 20; the log-odds of each bit. mask: (N,) bool, false rows count for nothing.

    Returns:
        sample_entropy, codebook_entropy: scalars in nats, 0..D ln 2, with gradient; both 0 if no row counts.

    Raises:
        ValueError: not (N, D), or D > 20 (use `binary_entropy_grouped`).
    """
    x, weight = _check(logits, mask)
    D = x.shape[1]
    if D > MAX_JOINT_BITS:
        raise ValueError(
            f"logits: expected at most {MAX_JOINT_BITS} bits for the joint entropy, got {D}; "
            f"use binary_entropy_grouped(logits, bits_per_group=...), an upper bound"
        )
    if choose("binary_entropy", ("torch", "reference")) == "reference":
        return binary_entropy_reference(logits, mask)
    with torch.autocast(x.device.type, enabled=False):
        return (_bit_entropy(x) * weight[:, None]).sum(), _joint_entropy(x, weight)


def binary_entropy_grouped(
    logits: Tensor, mask: Tensor | None = None, bits_per_group: int = 9
) -> tuple[Tensor, Tensor]:
    """As `binary_entropy` for any D, with the codebook entropy summed over groups of consecutive bits.

    The sum of the groups' entropies is not the joint entropy but an upper bound: what bits of different groups have in
    common is not counted. The sample entropy is exact. With one group the two functions agree.

    Args:
        logits: (N, D). mask: (N,) bool. bits_per_group: 1..20; the last group may be smaller.

    Returns:
        sample_entropy, codebook_entropy: scalars in nats, 0..D ln 2, with gradient.
    """
    x, weight = _check(logits, mask)
    if not 1 <= bits_per_group <= MAX_JOINT_BITS:
        raise ValueError(f"bits_per_group: expected 1..{MAX_JOINT_BITS}, got {bits_per_group}")
    if choose("binary_entropy_grouped", ("torch", "reference")) == "reference":
        parts = [binary_entropy_reference(group, mask) for group in logits.split(bits_per_group, 1)]
        return torch.stack([p[0] for p in parts]).sum(), torch.stack([p[1] for p in parts]).sum()
    with torch.autocast(x.device.type, enabled=False):
        codebook = torch.stack([_joint_entropy(group, weight) for group in x.split(bits_per_group, 1)]).sum()
        return (_bit_entropy(x) * weight[:, None]).sum(), codebook


def _check(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """fp32 logits with 0 in rows that do not count, and the weight (N,) of each row, summing to 1 (or 0)."""
    if logits.ndim != 2 or logits.shape[1] < 1 or (mask is not None and mask.shape != logits.shape[:1]):
        raise ValueError(
            f"expected logits (N, D) and mask (N,), got {tuple(logits.shape)} and "
            f"{None if mask is None else tuple(mask.shape)}; flatten batch and positions together"
        )
    x = logits.float()
    if mask is None:
        return x, x.new_full((x.shape[0],), 1.0 / max(1, x.shape[0]))
    return torch.where(mask[:, None], x, 0.0), mask.float() / mask.sum().clamp_min(1)


def _bit_entropy(x: Tensor) -> Tensor:
    """H(sigmoid(x)) elementwise = softplus(-|x|) + |x| sigmoid(-|x|), which does not cancel for large |x|."""
    a = x.abs()
    return F.softplus(-a) + a * torch.sigmoid(-a)


def _distribution(x: Tensor) -> Tensor:
    """x (N, d) -> the probabilities (N, 2^d) of all codes of d independent bits."""
    p = x.new_ones(x.shape[0], 1)
    for k in range(x.shape[1]):
        one, zero = torch.sigmoid(x[:, k, None]), torch.sigmoid(-x[:, k, None])
        p = torch.cat([p * zero, p * one], 1)  # bit k is the new highest bit
    return p


def _joint_entropy(x: Tensor, weight: Tensor) -> Tensor:
    half = (x.shape[1] + 1) // 2
    low, high = _distribution(x[:, :half]), _distribution(x[:, half:])
    p = (high * weight[:, None]).T @ low  # (2^(D-half), 2^half)
    # Only the logarithm is clamped: p log p stays right, and at p = 0 the gradient is finite.
    return -(p * p.clamp_min(_TINY).log()).sum()
