"""Codes in as few bits as their codebooks need, one constant width a stream, so that any code is found without a table.

A stream is little-endian: code j of ``width`` bits fills the bits ``j * width`` and on, where bit b is bit ``b % 8`` of
byte ``b // 8``, the lowest first. Eight codes thus end at a byte, and both directions work on such blocks at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from mmtok.tokens import TokenSpec

PACKINGS = ("auto", "ints", "bits")
SPARE = 8  # zero bytes after a stream: a load of 8 bytes may begin in its last byte
SAVING = 0.1  # share that bits must save over integers to be worth the arithmetic
BLOCKS = 4096  # blocks of 8 codes handled at once: what is in between stays in the cache
FEW = 2048  # codes below which single loads are faster than blocks (measured)
PLAIN = {8: np.dtype("<u1"), 16: np.dtype("<u2"), 32: np.dtype("<u4"), 64: np.dtype("<u8")}


@dataclasses.dataclass(frozen=True)
class Group:
    """Levels that share a stream because their codes have one width.

    Args:
        levels: their numbers, ascending.
        strides: of each, as in the spec: an item of T positions has ceil(T / stride) codes of it.
        width: bits a code.
    """

    levels: tuple[int, ...]
    strides: tuple[int, ...]
    width: int

    def counts(self, lengths: np.ndarray) -> np.ndarray:
        """Codes that items of ``lengths`` (N,) positions have in this stream, (N,) int64."""
        total = np.zeros(len(lengths), np.int64)
        for stride in self.strides:
            total += -(-lengths.astype(np.int64) // stride)
        return total


def width_of(codebook_size: int) -> int:
    """Bits that every code of 0..K-1 fits, ceil(log2 K)."""
    return (codebook_size - 1).bit_length()


def choose_packing(spec: TokenSpec, packing: str = "auto") -> str:
    """``ints`` or ``bits``; ``auto`` takes bits where they save at least a tenth. A function of the spec alone."""
    if packing not in PACKINGS:
        raise ValueError(f"packing: expected one of {', '.join(PACKINGS)}, got {packing!r}")
    if packing != "auto":
        return packing
    bits, ints = (
        sum(width(k) / s for k, s in zip(spec.codebook_sizes, spec.level_strides, strict=True))
        for width in (width_of, _int_width)
    )
    return "bits" if bits <= (1 - SAVING) * ints else "ints"


def groups_of(spec: TokenSpec, packing: str) -> tuple[Group, ...]:
    """The streams of a spec, in the order of their first levels; ``packing`` is ``ints`` or ``bits``."""
    width = {"bits": width_of, "ints": _int_width}[packing]
    found: dict[int, list[int]] = {}
    for q, k in enumerate(spec.codebook_sizes):
        found.setdefault(width(k), []).append(q)
    return tuple(Group(tuple(qs), tuple(spec.level_strides[q] for q in qs), w) for w, qs in found.items())


def stream_bytes(count: int, width: int) -> int:
    """Bytes of a stream of ``count`` codes as `pack_bits` writes it."""
    return -(-count // 8) * width + SPARE


def pack_bits(codes: np.ndarray, width: int) -> np.ndarray:
    """Codes (N,), unsigned and below 2**width, as a stream (bytes,) uint8: whole blocks of 8 codes and spare bytes."""
    blocks = -(-len(codes) // 8)
    out = np.zeros(stream_bytes(len(codes), width), np.uint8)
    stream = out[: blocks * width].reshape(blocks, width)
    for a in range(0, blocks, BLOCKS):
        part = codes[a * 8 : (a + BLOCKS) * 8]
        n = -(-len(part) // 8)
        lanes = np.zeros((8, n), np.uint64)
        padded = np.zeros(n * 8, np.uint64)
        padded[: len(part)] = part
        lanes[:] = padded.reshape(n, 8).T
        for byte in range(width):
            value = np.zeros(n, np.uint64)
            # Lane k covers the bits k * width .. (k + 1) * width - 1 of a block.
            for k in range(byte * 8 // width, min(7, (byte * 8 + 7) // width) + 1):
                shift = byte * 8 - k * width
                value |= lanes[k] >> np.uint64(shift) if shift >= 0 else lanes[k] << np.uint64(-shift)
            stream[a : a + n, byte] = value & np.uint64(255)
    return out


def unpack_bits(stream: np.ndarray, width: int, start: int = 0, count: int | None = None) -> np.ndarray:
    """Codes ``start`` .. ``start + count`` of a stream of `pack_bits`, (count,) uint64.

    Args:
        stream: uint8, contiguous; may be memory-mapped: only the bytes of these codes (and up to 8 more) are read.
        width: bits a code, 1..64.
        start, count: both in codes; ``count`` must be given where the number of codes is no multiple of 8.
    """
    if count is None:
        count = (len(stream) - SPARE) * 8 // width - start
    if count < FEW:
        return _unpack_few(stream, width, start, count)
    first, last = start // 8, -(-(start + count) // 8)
    out = np.empty((last - first, 8), np.uint64)
    load = np.dtype("<u2") if width <= 9 else np.dtype("<u4") if width <= 25 else np.dtype("<u8")
    mask = load.type((1 << width) - 1)
    lanes = np.empty((8, min(BLOCKS, last - first)), load)
    for a in range(first, last, BLOCKS):
        n = min(BLOCKS, last - a)
        part = lanes[:, :n]
        for k in range(8):
            byte, shift = a * width + k * width // 8, k * width % 8
            part[k] = np.ndarray((n,), load, stream, byte, (width,))  # one unaligned load for each block
            part[k] >>= load.type(shift)
            if shift + width > 64:
                high = np.ndarray((n,), np.uint8, stream, byte + 8, (width,)).astype(np.uint64)
                part[k] |= high << np.uint64(64 - shift)
        part &= mask
        out[a - first : a - first + n] = part.T
    return out.reshape(-1)[start - first * 8 :][:count]


def _unpack_few(stream: np.ndarray, width: int, start: int, count: int) -> np.ndarray:
    bit = np.arange(start * width, (start + count) * width, width, dtype=np.int64)
    byte, shift = bit >> 3, (bit & 7).astype(np.uint64)
    loads = np.ndarray((len(stream) - 7,), np.dtype("<u8"), stream, 0, (1,))  # a load at every byte
    out = loads[byte] >> shift
    if width > 57:  # up to 7 bits lie in a ninth byte; two shifts, as one of 64 would be undefined
        out |= (stream[byte + 8].astype(np.uint64) << (np.uint64(63) - shift)) << np.uint64(1)
    out &= np.uint64((1 << width) - 1)
    return out


def item_levels(codes: np.ndarray, length: int, strides: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The levels of an item from its codes in a stream, each (T,), a strided level's codes repeated."""
    at = 0
    for stride in strides:
        n = -(-length // stride)
        level = codes[at : at + n]
        yield level if stride == 1 else np.repeat(level, stride)[:length]
        at += n


def nominal_bits(spec: TokenSpec, lengths: np.ndarray) -> float:
    """What items of ``lengths`` (N,) positions cost together: sum over levels of ceil(T / stride) * log2(K)."""
    each = zip(spec.codebook_sizes, spec.level_strides, strict=True)
    return math.fsum(int((-(-lengths.astype(np.int64) // s)).sum()) * math.log2(k) for k, s in each)


def _int_width(codebook_size: int) -> int:
    return next(w for w in PLAIN if width_of(codebook_size) <= w)
