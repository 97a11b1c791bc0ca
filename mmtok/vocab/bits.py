"""Codes of binary tokenizers as bits, and as ids of another number of bits than the tokenizer's own codes have.

A level of 2^b codes holds b bits. Bit order is that of all of mmtok (`mmtok.kernels.binary_codes`): little-endian, so
bit k of a code has the weight 2^k, and in a vector of bits those of level 0 come first: bit k of level q stands at
b_0 + ... + b_(q-1) + k. `BinaryQuantizer.bits` gives the same vector.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from mmtok.kernels.binary_codes import MAX_PACKED_BITS, pack_bits, unpack_bits
from mmtok.tokens import Tokens, TokensError, TokenSpec


def bits_of_levels(spec: TokenSpec) -> tuple[int, ...]:
    """b of each level of 2^b codes. ValueError where a level has another number of codes."""
    if odd := [k for k in spec.codebook_sizes if k & (k - 1) or k.bit_length() > MAX_PACKED_BITS + 1]:
        raise ValueError(
            f"expected levels of 2^b codes, as binary tokenizers have, got a level of {odd[0]} in {spec.name!r}; "
            f"pack its codes as they are"
        )
    return tuple(k.bit_length() - 1 for k in spec.codebook_sizes)


def to_bits(tokens: Tokens) -> Tensor:
    """(B, T, D) bool: the D bits of each position, in the order above; false at and past an item's length.

    Raises ValueError where a level has no 2^b codes, and TokensError for codes out of range.
    """
    widths = bits_of_levels(tokens.spec)
    tokens.check(tokens.spec)
    codes = torch.where(tokens.mask[:, None], tokens.codes, 0)  # (B, Q, T)
    return torch.cat([unpack_bits(codes[:, q], b) for q, b in enumerate(widths)], 2)


def from_bits(
    bits: Tensor, spec: TokenSpec, lengths: Tensor | None = None, side: Mapping[str, Tensor] | None = None
) -> Tokens:
    """The inverse of `to_bits`.

    Args:
        bits: (B, T, D'), bool or 0 and 1, the bits of all levels or of the first ones.
        spec: of the tokenizer.
        lengths: (B,) int64, valid positions; None = T.
        side: as in `Tokens`.

    Raises ValueError for other shapes and values, and where a level has no 2^b codes.
    """
    totals = list(itertools.accumulate(bits_of_levels(spec)))
    if bits.ndim != 3 or bits.shape[2] not in totals:
        raise ValueError(
            f"bits: expected shape (B, T, D) with D one of {totals} (whole levels of {spec.name!r}), got "
            f"{tuple(bits.shape)}"
        )
    if bits.dtype != torch.bool and not bool(((bits == 0) | (bits == 1)).all()):
        raise ValueError(f"bits: expected bool or 0 and 1, got other {bits.dtype} values; decide them first (x > 0)")
    spec = spec.keep(totals.index(bits.shape[2]) + 1)
    codes = _codes(bits, bits_of_levels(spec))
    lengths = torch.full((len(bits),), bits.shape[1], device=bits.device) if lengths is None else lengths
    codes = torch.where(torch.arange(bits.shape[1], device=bits.device) < lengths[:, None, None], codes, 0)
    return Tokens(codes, lengths, spec, dict(side or {}))


class BitSplit:
    """The codes of a binary tokenizer as ids of ``bits_per_id`` bits each, several smaller ones or fewer larger ones.

    The D bits of a position, in the order of `to_bits`, are cut every ``bits_per_id`` bits; a last id has what is left.
    An id may thus hold bits of two levels. Build a `Vocab` over ``split.spec`` and pack ``split.split(tokens)``; what
    `Vocab.unpack` gives goes through ``split.join`` to the tokenizer.

    Args:
        spec: of a tokenizer whose levels have 2^b codes and one stride.
        bits_per_id: 1..D; a `Vocab` takes up to 20.

    ``spec`` (of the ids) has a fingerprint of its own, the same for the same tokenizer and ``bits_per_id``: neither
    reads the codes of the other by mistake.
    """

    def __init__(self, spec: TokenSpec, bits_per_id: int) -> None:
        self.source, self.bits_per_id = spec, bits_per_id
        self.source_bits = bits_of_levels(spec)
        D = sum(self.source_bits)
        if not 1 <= bits_per_id <= min(D, MAX_PACKED_BITS):
            raise ValueError(
                f"bits_per_id: expected 1..{min(D, MAX_PACKED_BITS)} ({D} bits a position), got {bits_per_id}"
            )
        if len(set(spec.level_strides)) > 1:
            raise ValueError(f"expected levels of one stride, got the strides {spec.level_strides} of {spec.name!r}")
        self.bits = (bits_per_id,) * (D // bits_per_id) + ((D % bits_per_id,) if D % bits_per_id else ())
        self.spec = dataclasses.replace(
            spec,
            name=f"{spec.name}-{bits_per_id}bit",
            codebook_sizes=tuple(2**b for b in self.bits),
            level_strides=spec.level_strides[:1] * len(self.bits),
            fingerprint=hashlib.sha256(f"{spec.fingerprint} in ids of {bits_per_id} bits".encode()).hexdigest()[:16],
        )

    def __repr__(self) -> str:
        return f"BitSplit({self.source.name!r}, {sum(self.source_bits)} bits as {len(self.bits)} x {self.bits_per_id})"

    def split(self, tokens: Tokens) -> Tokens:
        """Codes of the tokenizer (B, Q, T) -> ids (B, Q', T) of ``spec``, also of first levels that fill whole ids.

        Raises TokensError for tokens of another tokenizer, and for first levels that end within an id.
        """
        return self._regroup(tokens, self.source, self.spec)

    def join(self, tokens: Tokens) -> Tokens:
        """The inverse of `split`: ids (B, Q', T) -> codes (B, Q, T), also of first ids that fill whole levels.

        Raises TokensError for tokens of another spec, and for first ids that end within a level.
        """
        return self._regroup(tokens, self.spec, self.source)

    def _regroup(self, tokens: Tokens, old: TokenSpec, new: TokenSpec) -> Tokens:
        tokens.check(old)
        have = sum(bits_of_levels(tokens.spec))
        totals = list(itertools.accumulate(bits_of_levels(new)))
        if have not in totals:
            ends = [n for n, total in enumerate(itertools.accumulate(bits_of_levels(old)), 1) if total in totals]
            raise TokensError(
                f"the first {tokens.spec.num_codebooks} levels of {old.name!r} have {have} bits, which end within a "
                f"level of {new.name!r}; keep(n) with n one of {ends}"
            )
        return from_bits(to_bits(tokens), new, tokens.lengths, tokens.side)


def _codes(bits: Tensor, widths: tuple[int, ...]) -> Tensor:
    """bits (B, T, sum of widths) -> codes (B, Q, T) int64."""
    if len(set(widths)) == 1:
        return pack_bits(bits.unflatten(2, (len(widths), widths[0]))).transpose(1, 2).contiguous()
    return torch.stack([pack_bits(part) for part in bits.split(widths, 2)], 1)
