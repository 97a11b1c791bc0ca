"""Bits <-> integer codes, and the entropies of binary codes without a table of 2^bits rows per vector.

Bit order is little-endian: bit k of a code has the weight 2^k, everywhere in mmtok.

Packing is a product with the powers of two. It is exact in fp32 up to 24 bits, and in any precision mode, since 0, 1
and 2^k are numbers of one significant bit; wider codes are packed 24 bits at a time.

Entropies (in nats) are those of the soft codes of LFQ and BSQ (arXiv 2310.05737 eq. 5, arXiv 2406.07548 eq. 8): each
bit of vector n is 1 with probability sigmoid(logits_nk), independently, so a softmax over all 2^D codes is a product of
D Bernoulli factors. The entropy of one vector is then a sum of D closed forms. The distribution averaged over vectors
is P_high' P_low / N, where P_high and P_low (N x 2^(D/2)) are the distributions of the two halves of the bits: one
matrix product gives all 2^D probabilities exactly, and nothing of size N x 2^D exists.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.kernels.dispatch import choose, installed
from mmtok.kernels.row_search import reduced_precision

MAX_PACKED_BITS = 62  # of an int64: the sign bit stays free, and 2^62 codes still have an int64 count
MAX_JOINT_BITS = 24  # 2^24 probabilities are 64 MiB, and N x 4096 halves
MAX_CODE_BITS = 20  # of one code of a quantizer, which counts the use of each of its 2^20 codes
_TINY = 1e-37  # smallest normal fp32 is 1.2e-38; a larger clamp would flatten the gradient of rare codes
_EXACT_BITS = 24  # whole numbers below 2^24 are exact in fp32
_CHUNK = 1 << 16  # bits a block of rows: 256 KiB as fp32, which stays in a core's cache


def pack_bits(bits: Tensor) -> Tensor:
    """Bits to integer codes.

    Args:
        bits: (..., D), each 0 or 1 in any type; 1 <= D <= 62.

    Returns:
        codes (...) int64, code = sum_k bit_k 2^k.

    Raises:
        ValueError: more than 62 bits, or none.
    """
    D = bits.shape[-1] if bits.ndim else 0
    if not 1 <= D <= MAX_PACKED_BITS:
        raise ValueError(
            f"bits: expected a last axis of 1..{MAX_PACKED_BITS} bits, got {D}; pack fewer bits into one code"
        )
    how = choose("pack_bits", _implementations(bits))
    if how == "triton":
        from mmtok.kernels.triton import packed_codes

        return packed_codes.pack_bits(bits.reshape(-1, D), sign=False).view(bits.shape[:-1])
    if how == "reference" or not _eager_cpu(bits):
        return _pack(bits)
    return _pack_rows(bits, D, _as_float).view(bits.shape[:-1])


def sign_pack(logits: Tensor, bits_per_code: int) -> Tensor:
    """The signs of numbers straight to codes: bit = [logit > 0], so a zero (and a NaN) gives 0.

    Args:
        logits: (..., D) floating point, D a multiple of bits_per_code. bits_per_code: 1..62.

    Returns:
        codes (..., D / bits_per_code) int64, no gradient; code q is made of the numbers q * bits_per_code and on.

    Raises:
        ValueError: bits_per_code out of range, or D is not a multiple of it.
    """
    if not 1 <= bits_per_code <= MAX_PACKED_BITS:
        raise ValueError(
            f"bits_per_code: expected 1..{MAX_PACKED_BITS}, got {bits_per_code}; split the bits into more codes"
        )
    if logits.ndim < 1 or logits.shape[-1] % bits_per_code or not logits.is_floating_point():
        raise ValueError(
            f"logits: expected floating point with a last axis that is a multiple of {bits_per_code}, "
            f"got {logits.dtype} of shape {tuple(logits.shape)}; whole codes only"
        )
    x = logits.detach().unflatten(-1, (-1, bits_per_code))  # (..., Q, bits_per_code)
    how = choose("sign_pack", _implementations(logits))
    if how == "triton":
        from mmtok.kernels.triton import packed_codes

        return packed_codes.pack_bits(x.reshape(-1, bits_per_code), sign=True).view(x.shape[:-1])
    if how == "reference" or not _eager_cpu(logits):
        return _pack(x > 0)
    return _pack_rows(x, bits_per_code, _is_positive).view(x.shape[:-1])


def unpack_bits(codes: Tensor, num_bits: int) -> Tensor:
    """codes (...) int64 -> bits (..., num_bits) bool, 1 <= num_bits <= 62; the inverse of `pack_bits`.

    Raises:
        ValueError: num_bits out of range.
    """
    if not 1 <= num_bits <= MAX_PACKED_BITS:
        raise ValueError(f"num_bits: expected 1..{MAX_PACKED_BITS}, got {num_bits}; one code holds no more")
    if choose("unpack_bits", _implementations(codes)) == "triton":
        from mmtok.kernels.triton import packed_codes

        return packed_codes.unpack_bits(codes.reshape(-1).long(), num_bits).view(*codes.shape, num_bits)
    return (codes[..., None] >> torch.arange(num_bits, device=codes.device)) & 1 > 0


def _implementations(x: Tensor) -> tuple[str, ...]:
    """Triton on CUDA, but not in a captured graph: a compiler joins the plain formula with its neighbours."""
    if x.is_cuda and not torch.compiler.is_compiling() and installed("triton"):
        return ("triton", "torch", "reference")
    return ("torch", "reference")


def _eager_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _pack(bits: Tensor) -> Tensor:
    weights = 2 ** torch.arange(bits.shape[-1], device=bits.device)  # (D,) int64
    return (bits.long() * weights).sum(-1)


def _pack_rows(values: Tensor, num_bits: int, to_bits: Any) -> Tensor:
    """values (..., num_bits) -> codes (N,): 0.0 and 1.0 by ``to_bits``, in blocks that stay in cache."""
    values = values.reshape(-1, num_bits)
    N = values.shape[0]
    codes = torch.empty(N, dtype=torch.int64)
    rows = max(1, _CHUNK // num_bits)
    bits = torch.empty(min(N, rows), num_bits)
    weights = 2.0 ** torch.arange(min(num_bits, _EXACT_BITS))
    with torch.autocast("cpu", enabled=False):
        for start in range(0, N, rows):
            block = values[start : start + rows]
            part, out = bits[: block.shape[0]], codes[start : start + rows]
            to_bits(block, part)
            out.copy_(torch.mv(part[:, :_EXACT_BITS], weights))
            for first in range(_EXACT_BITS, num_bits, _EXACT_BITS):
                upper = part[:, first : first + _EXACT_BITS]
                out += torch.mv(upper, weights[: upper.shape[1]]).long() << first
    return codes


def _as_float(bits: Tensor, out: Tensor) -> None:
    out.copy_(bits)


def _is_positive(x: Tensor, out: Tensor) -> None:
    torch.gt(x, 0, out=out)  # written as fp32 at once: one pass less than by way of bool


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
        logits: (N, D), D <= 24; the log-odds of each bit. mask: (N,) bool, false rows count for nothing.

    Returns:
        sample_entropy, codebook_entropy: scalars in nats, 0..D ln 2, with gradient; both 0 if no row counts.

    Raises:
        ValueError: not (N, D), or D > 24 (use `binary_entropy_grouped`).
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
        logits: (N, D). mask: (N,) bool. bits_per_group: 1..24; the last group may be smaller.

    Returns:
        sample_entropy, codebook_entropy: scalars in nats, 0..D ln 2, with gradient.
    """
    x, weight = _check(logits, mask)
    if not 1 <= bits_per_group <= MAX_JOINT_BITS:
        raise ValueError(f"bits_per_group: expected 1..{MAX_JOINT_BITS}, got {bits_per_group}")
    how = choose("binary_entropy_grouped", _grouped_implementations(x, bits_per_group))
    if how == "reference":
        parts = [binary_entropy_reference(group, mask) for group in logits.split(bits_per_group, 1)]
        return torch.stack([p[0] for p in parts]).sum(), torch.stack([p[1] for p in parts]).sum()
    with torch.autocast(x.device.type, enabled=False):
        if how == "triton":
            from mmtok.kernels.triton.binary_entropy import mean_code_distribution

            codebook = _entropy(mean_code_distribution(x, weight, bits_per_group))
        else:
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


def _grouped_implementations(x: Tensor, bits_per_group: int) -> tuple[str, ...]:
    if x.is_cuda and (torch.compiler.is_compiling() or installed("triton")):
        from mmtok.kernels.triton.binary_entropy import supported

        if supported(x, bits_per_group):
            return ("triton", "torch", "reference")
    return ("torch", "reference")


def _entropy(p: Tensor) -> Tensor:
    # Only the logarithm is clamped: p log p stays right, and at p = 0 the gradient is finite.
    return -(p * p.clamp_min(_TINY).log()).sum()


def _joint_entropy(x: Tensor, weight: Tensor) -> Tensor:
    half = (x.shape[1] + 1) // 2
    high = _distribution(x[:, half:]) * weight[:, None]  # (N, 2^(D - half))
    low = _distribution(x[:, :half])  # (N, 2^half)
    if torch.compiler.is_compiling():  # the fp64 product's own gradient is as safe, and a graph needs no saved tensors
        return _entropy(_full_product(high.T, low))
    return cast("Tensor", _EntropyOfProduct.apply(high, low))


class _EntropyOfProduct(torch.autograd.Function):
    """H(high' low) of high (N, 2^h), whose rows sum to the rows' weights, and low (N, 2^l), whose rows sum to 1.

    Written out so that the backward products too escape the global precision, and so that only the probabilities are
    kept, not also their logarithms.
    """

    @staticmethod
    def forward(ctx: Any, high: Tensor, low: Tensor) -> Tensor:
        p = _full_product(high.T, low)  # (2^h, 2^l)
        entropy = _entropy(p)
        ctx.save_for_backward(high, low, p, entropy)
        return entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        high, low, p, entropy = ctx.saved_tensors
        # dH/dp = -log p - 1. A constant instead of the 1 changes no logit's gradient, since every row's distribution
        # sums to a constant; H centres the table, which leaves less to cancel.
        table = p.clamp_min(_TINY).log_().add_(entropy).mul_(-grad)
        return _full_product(low, table.T), _full_product(high, table)


def _full_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as precise as fp32 whatever the global precision and autocast; a captured graph outlives both settings."""
    with torch.autocast(a.device.type, enabled=False):
        if torch.compiler.is_compiling() or reduced_precision(a.device.type):
            return (a.double() @ b.double()).float()
        return a @ b
