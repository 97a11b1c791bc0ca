"""Codes of any tokenizer as rows that a language model can hold: ragged levels grouped, large codebooks in digits."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.tokens import TokenSpec

WHOLE = 2**13  # a softmax over more codes than this is cut into chunks of bits
CHUNK = 2**10


class Rows:
    """Codes (Q, T) of a spec as rows (R, S) of a model, one to one.

    A step holds ``group`` positions, the least common multiple of the levels' strides: of a level of stride s it has
    its ``group`` / s codes. Codes of a codebook above 2^13 become digits of at most 1,024 values each, the lowest
    first: for 2^b codes these are b bits cut into even parts. A codebook that has no such divisors gets a last digit
    that some codes of are impossible: they cost a little, and are brought into range where they are drawn.

    Args:
        spec: of the codes, with the levels that are there.
    """

    def __init__(self, spec: TokenSpec):
        self.spec, self.group = spec, math.lcm(*spec.level_strides)
        self.digits = [digits_of(k) for k in spec.codebook_sizes]
        self.sizes: tuple[int, ...] = ()
        for s, digits in zip(spec.level_strides, self.digits, strict=True):
            self.sizes += tuple(digits) * (self.group // s)

    @property
    def about(self) -> str:
        """One line for the protocol."""
        parts = [] if self.group == 1 else [f"{self.group} positions a step"]
        if any(len(d) > 1 for d in self.digits):
            parts.append(f"codebooks {self.spec.codebook_sizes[:3]} as digits {self.digits[0]}, exact")
        return "; ".join(parts) or "as they are"

    def split(self, codes: Tensor) -> Tensor:
        """codes (Q, T) -> rows (R, S); positions that a last group lacks are 0, and are coded like any."""
        codes = F.pad(codes, (0, -codes.shape[1] % self.group))
        found = []
        for q, (s, digits) in enumerate(zip(self.spec.level_strides, self.digits, strict=True)):
            for part in codes[q].view(-1, self.group)[:, ::s].T:  # each (S,)
                for k in digits:
                    found.append(part % k)
                    part = part // k
        return torch.stack(found)

    def join(self, rows: Tensor, length: int) -> Tensor:
        """Rows (R, S) -> codes (Q, length): the inverse of `split`; impossible digits give the nearest legal code."""
        found, r = [], 0
        for K, s, digits in zip(self.spec.codebook_sizes, self.spec.level_strides, self.digits, strict=True):
            parts = []
            for _ in range(self.group // s):
                part, weight = torch.zeros_like(rows[0]), 1
                for k in digits:
                    part, weight, r = part + rows[r] * weight, weight * k, r + 1
                parts.append(part.clamp(max=K - 1))
            found.append(torch.stack(parts, 1).repeat_interleave(s, 1).flatten())  # (S * group,)
        return torch.stack(found)[:, :length]


def digits_of(K: int) -> list[int]:
    """Sizes whose product is K, or the least above it, each at most 1,024; [K] where K is at most 8,192."""
    if K <= WHOLE:
        return [K]
    count = math.ceil(math.log2(K) / math.log2(CHUNK) - 1e-12)
    if K & (K - 1) == 0:
        bits = K.bit_length() - 1
        return [2 ** ((bits + i) // count) for i in range(count)]
    found, rest = [], K
    while rest > CHUNK:
        wanted = round(rest ** (1 / math.ceil(math.log2(rest) / math.log2(CHUNK))))
        divisors = [d for d in range(max(2, wanted // 3), min(CHUNK, wanted * 3) + 1) if rest % d == 0]
        k = min(divisors, key=lambda d: abs(d - wanted)) if divisors else min(CHUNK, wanted + 1)
        found, rest = [*found, k], -(-rest // k)
    return [*found, rest]
