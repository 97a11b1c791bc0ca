"""What stands beside the codes of a shard, as columns: byte strings of any length, and the items' side values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtok.tokens import smallest_uint

INTEGERS = (torch.int16, torch.int32, torch.int64)


def json_bytes(value: Any) -> bytes:
    """A value as one line of JSON in UTF-8, without spaces; the same value gives the same bytes.

    Raises ValueError for what JSON does not have: NaN, infinite numbers, objects.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, as in file names that are no UTF-8
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")
    except TypeError as e:
        raise ValueError(f"expected plain JSON values, got {e}") from e


def utf8(text: str) -> bytes:
    """UTF-8, half surrogate pairs included: a file name of any bytes comes back as it was."""
    return text.encode("utf-8", "surrogatepass")


def running(lengths: np.ndarray) -> np.ndarray:
    """Where each piece begins and the last one ends, (N + 1,) int64."""
    out = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=out[1:])
    return out


def narrow(values: np.ndarray) -> np.ndarray:
    """Integers in the smallest unsigned type that has them all; as they are where one is negative."""
    if values.size and int(values.min()) < 0:
        return values
    return values.astype(smallest_uint(int(values.max(initial=0))))


def bytes_columns(name: str, values: Sequence[bytes]) -> dict[str, Tensor]:
    """Byte strings as ``NAME.bytes`` and ``NAME.lengths``."""
    lengths = narrow(np.array([len(v) for v in values], np.int64))
    data = np.frombuffer(b"".join(values), np.uint8).copy()
    return {f"{name}.bytes": torch.from_numpy(data), f"{name}.lengths": torch.from_numpy(lengths)}


class BytesColumn:
    """Byte strings as `bytes_columns` lays them. ValueError where the two do not fit."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str, count: int):
        lengths = tensors[f"{name}.lengths"].numpy()
        self.data, self.ends = tensors[f"{name}.bytes"].numpy(), running(lengths)
        if len(lengths) != count or self.data.shape != (self.ends[-1],) or self.data.dtype != np.uint8:
            found = f"{self.data.shape} of {len(lengths)}"
            raise ValueError(f"{name}: expected {self.ends[-1]} bytes of {count} items, got {found}")

    def __getitem__(self, i: int) -> bytes:
        return self.data[self.ends[i] : self.ends[i + 1]].tobytes()


def side_columns(rows: Sequence[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Side values (1, ...) of each item as tensors ``side.NAME``, with what the metadata must say of them.

    One row an item where all have one shape. Otherwise all values in a row, and in ``side_shape.NAME`` the shape of
    each, zeros where the item has none. Integers take the smallest type; the metadata keep their own.

    Raises:
        ValueError: items whose values have different types or numbers of axes.
    """
    tensors: dict[str, Tensor] = {}
    notes: dict[str, Any] = {}
    for name in sorted(set().union(*rows)):
        found = [row[name].detach().cpu() for row in rows if name in row]
        kinds = sorted({(_dtype_name(v), v.ndim) for v in found})
        if len(kinds) > 1:
            raise ValueError(f"side[{name!r}]: expected one type and number of axes in all items, got {kinds}")
        if len(found) == len(rows) and len({v.shape for v in found}) == 1:
            data, layout = torch.cat(found), "each"
        else:
            data, layout = torch.cat([v.flatten() for v in found]), "ragged"
            none = (0,) * found[0].ndim
            shapes = np.array([tuple(row[name].shape) if name in row else none for row in rows], np.int64)
            tensors[f"side_shape.{name}"] = torch.from_numpy(narrow(shapes))
        if data.dtype in INTEGERS:
            data = torch.from_numpy(narrow(data.numpy()))
        tensors[f"side.{name}"] = data.contiguous()
        notes[name] = {"dtype": kinds[0][0], "layout": layout}
    return tensors, notes


class SideColumn:
    """Side values as `side_columns` lays them; ``note`` is what the metadata say. ValueError where they do not fit."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str, note: Mapping[str, Any], count: int):
        self.dtype: torch.dtype = getattr(torch, note["dtype"])
        self.data = tensors[f"side.{name}"]
        self.kind = _numpy_dtype(self.dtype)
        # Numpy is many times faster than torch at cutting out one number.
        self.array: np.ndarray | None = None if self.kind is None else self.data.numpy()
        self.shapes: np.ndarray | None = None
        if note["layout"] == "ragged":
            self.shapes = tensors[f"side_shape.{name}"].numpy().astype(np.int64)  # (N, axes)
            self.starts = running(self.shapes.prod(1))
            fits = len(self.shapes) == count and self.data.shape == (self.starts[-1],)
        else:
            fits = len(self.data) == count
        if not fits:
            raise ValueError(f"side[{name!r}]: got {tuple(self.data.shape)} values for {count} items")

    def __getitem__(self, i: int) -> Tensor | None:
        """The value (1, ...) of item ``i``, None where it has none; never a view of the file."""
        shape: Sequence[int] | None = None
        start, stop = i, i + 1
        if self.shapes is not None:
            shape = tuple(self.shapes[i].tolist())
            if shape[0] == 0:
                return None
            start, stop = int(self.starts[i]), int(self.starts[i + 1])
        if self.array is not None:
            value = torch.from_numpy(self.array[start:stop].astype(self.kind))
        else:
            value = self.data[start:stop].to(self.dtype, copy=True)
        return value if shape is None else value.reshape(shape)

    def all(self) -> Tensor | None:
        """(N, ...) of all items, None where their shapes differ."""
        return self.data.to(self.dtype, copy=True) if self.shapes is None else None


def _numpy_dtype(dtype: torch.dtype) -> np.dtype | None:
    """Numpy's name of a type, None where it has none (bfloat16, float8)."""
    try:
        return torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError:
        return None


def _dtype_name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
