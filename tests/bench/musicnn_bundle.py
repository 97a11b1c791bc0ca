"""A TensorFlow 1 checkpoint written by hand, and a narrow network of musicnn's shape."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np


def varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def proto(*fields: tuple[int, int | bytes]) -> bytes:
    return b"".join(
        varint(i << 3) + varint(v) if isinstance(v, int) else varint(i << 3 | 2) + varint(len(v)) + v for i, v in fields
    )


def table_block(rows: list[tuple[bytes, bytes]]) -> bytes:
    """Keys share what they can with the one before; whole keys every third row, listed at the end."""
    body, restarts, before = b"", [], b""
    for i, (key, value) in enumerate(rows):
        shared = 0
        if i % 3 == 0:
            restarts.append(len(body))
        else:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        body += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    return body + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def write_bundle(prefix: str, tensors: dict[str, np.ndarray]) -> None:
    """As TensorFlow lays a checkpoint out: an index of two data blocks, and the tensors behind each other."""
    data, rows = b"", [(b"", proto((1, 1)))]
    for name in sorted(tensors):
        array = tensors[name]
        shape = proto(*[(2, proto((1, n))) for n in array.shape])
        kind = {"float32": 1, "int64": 9}[array.dtype.name]
        fields = [(1, kind), (2, shape), (4, len(data)), (5, array.nbytes)]
        entry = proto(*[f for f in fields if f[1] != 0]) + varint(6 << 3 | 5) + b"crc!"
        rows.append((name.encode(), entry))
        data += array.astype(array.dtype.newbyteorder("<")).tobytes()
    index, handles = b"", []
    half = len(rows) // 2
    for part in (rows[:half], rows[half:]):
        block = table_block(part)
        handles.append((part[-1][0], varint(len(index)) + varint(len(block))))
        index += block + b"\0crc!"
    places = []
    for block in (table_block([]), table_block(handles)):
        places.append(varint(len(index)) + varint(len(block)))
        index += block + b"\0crc!"
    footer = b"".join(places).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    Path(prefix + ".index").write_bytes(index + footer)
    Path(prefix + ".data-00000-of-00001").write_bytes(data)


def tagger_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """A narrow network of musicnn's shape: 3, 3, 2, 2, 2 filters in front, 4 behind, 6 features, 3 tags."""
    rng = np.random.default_rng(seed)
    kernels = [(7, 38, 1, 3), (7, 67, 1, 3), (128, 1, 1, 2), (64, 1, 1, 2), (32, 1, 1, 2)]
    kernels += [(7, 12, 1, 4), (7, 4, 1, 4), (7, 4, 1, 4)]
    widths = [1, 3, 3, 2, 2, 2, 4, 4, 4, 2 * (12 + 3 * 4), 6]
    found = {}
    for i, shape in enumerate(kernels):
        name = f"conv2d_{i}" if i else "conv2d"
        found[f"{name}/kernel"] = rng.standard_normal(shape) / math.sqrt(math.prod(shape[:3]))
        found[f"{name}/bias"] = rng.standard_normal(shape[3]) / 4
    for i, width in enumerate(widths):
        name = f"batch_normalization_{i}" if i else "batch_normalization"
        for part in ("gamma", "beta", "moving_mean", "moving_variance"):
            low = 0.5 if part in ("gamma", "moving_variance") else -0.5
            found[f"{name}/{part}"] = low + rng.random(width)
    for name, shape in (("dense", (48, 6)), ("dense_1", (6, 3))):
        found[f"{name}/kernel"], found[f"{name}/bias"] = rng.standard_normal(shape) / 4, rng.standard_normal(shape[1])
    return {k: v.astype("f4") for k, v in found.items()}
