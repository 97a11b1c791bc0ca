"""numpy arrays of any memory order, byte order and writability as tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def as_tensor(array: np.ndarray, name: str) -> Tensor:
    """A tensor of an array in any memory order and byte order; ValueError for types that torch does not have."""
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if native.dtype.kind not in "buif" or native.dtype.itemsize > 8:
        raise ValueError(f"{name}: expected an array of integers or floats, got dtype {array.dtype}")
    return torch.from_numpy(np.require(native, requirements=["C", "W"]))  # W: torch warns of read-only memory
