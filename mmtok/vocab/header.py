"""The header of a segment: what decode needs beside the codes, written as bytes so that `Vocab.unpack` is exact.

``header = count entry*``. An entry is one of
``0 levels`` (1 byte; when fewer than the vocab has) · ``1 length`` (varint; when the codes leave T open) ·
``code value`` (code 2 and up: the side entry ``FIELDS[code]``, one int64 as a zigzag varint) ·
``128 name_length name dtype axes size* data`` (any other side tensor, raw little-endian bytes; axes and sizes without
B). A varint has 7 bits a byte, low bits first; the high bit is set on all bytes but the last.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping

import torch
from torch import Tensor

from mmtok.tokens import TokensError

# A field's place is its code, a dtype's too: append only, or sequences written earlier change their meaning.
FIELDS = ("levels", "length", "num_samples", "sample_rate", "height", "width", "channels", "bit_depth")
LEVELS, LENGTH, NAMED = 0, 1, 128
DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16),
    *(torch.float32, torch.float64, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64),
)
Request = tuple[tuple[range, ...], int]  # the byte values that are legal now, and how many bytes of them
Header = tuple[int, int | None, dict[str, Tensor]]  # levels, length where it was written, side


def _take(count: int, *legal: range) -> Generator[Request, bytes, bytes]:
    return (yield (legal, count)) if count else b""


def _read_varint(bits: int) -> Generator[Request, bytes, int]:
    value = shift = 0
    while True:
        left = bits - shift
        byte = (yield from _take(1, range(256) if left > 7 else range(1 << left)))[0]
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value


def read_header(Q: int) -> Generator[Request, bytes, Header]:
    """Ask for the bytes of a header piece by piece, naming the legal values; bytes that are legal never fail later."""
    levels, length, side = Q, None, {}
    count = (yield from _take(1, range(256)))[0]
    for _ in range(count):
        code = (yield from _take(1, range(len(FIELDS)), range(NAMED, NAMED + 1)))[0]
        if code == LEVELS:
            levels = (yield from _take(1, range(1, Q + 1)))[0]
        elif code == LENGTH:
            length = yield from _read_varint(63)
        elif code < NAMED:
            value = yield from _read_varint(64)
            side[FIELDS[code]] = torch.tensor([(value >> 1) ^ -(value & 1)])
        else:
            size = (yield from _take(1, range(256)))[0]
            name = (yield from _take(size, range(256))).decode("utf-8", "surrogateescape")
            dtype = DTYPES[(yield from _take(1, range(len(DTYPES))))[0]]
            shape, cells = [1], 1
            for _ in range((yield from _take(1, range(8)))[0]):
                shape.append((yield from _read_varint(max(1, 48 - cells.bit_length()))))  # no shape that overflows
                cells *= max(1, shape[-1])
            data = yield from _take(math.prod(shape) * dtype.itemsize, range(2 if dtype == torch.bool else 256))
            flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
            side[name] = flat.reshape(shape)
    return levels, length, side


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def write_header(levels: int | None, length: int | None, side: Mapping[str, Tensor]) -> bytes:
    entries = [] if levels is None else [bytes([LEVELS, levels])]
    if length is not None:
        entries.append(bytes([LENGTH]) + _varint(length))
    for name, value in side.items():
        value = value.detach().cpu()
        if name in FIELDS[2:] and value.dtype == torch.int64 and value.ndim == 1:
            v = int(value)
            entries.append(bytes([FIELDS.index(name)]) + _varint(2 * v if v >= 0 else -2 * v - 1))
            continue
        raw_name = name.encode("utf-8", "surrogateescape")
        large = math.prod(max(1, n) for n in value.shape) >= 2**40
        if len(raw_name) > 255 or value.ndim > 8 or large or value.dtype not in DTYPES:
            raise TokensError(
                f"side[{name!r}]: expected a name of at most 255 bytes, at most 8 axes, under 2**40 cells and a plain "
                f"dtype, got {len(raw_name)} bytes, {tuple(value.shape)}, {value.dtype}; drop it or use header=False"
            )
        shape = b"".join(map(_varint, value.shape[1:]))
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        head = bytes([DTYPES.index(value.dtype), value.ndim - 1])
        entries.append(bytes([NAMED, len(raw_name)]) + raw_name + head + shape + data)
    if len(entries) > 255:
        raise TokensError(f"side: expected at most 253 entries in a header, got {len(side)}; drop some")
    return bytes([len(entries)]) + b"".join(entries)


def parse_header(data: bytes, Q: int) -> Header | None:
    """What `read_header` makes of exactly ``data``; None when it is not a header."""
    reader = read_header(Q)
    legal, count = next(reader)
    i = 0
    while i + count <= len(data) and all(any(b in r for r in legal) for b in set(data[i : i + count])):
        i += count
        try:
            legal, count = reader.send(data[i - count : i])
        except StopIteration as done:
            return done.value if i == len(data) else None
    return None
