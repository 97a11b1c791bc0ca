"""Image networks that round a picture down to whole cells when nobody pads it: what their raw mode shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtok.wrappers.wrapped import WrappedGrid


class RawCells(WrappedGrid):
    """A grid whose network drops the pixels past the last whole cell of a side, or fails on a side below one cell.

    Raw, the picture that comes back lacks those pixels, and is not stretched to hide that.
    """

    @property
    def upstream(self) -> Any:
        """The package's model, with methods that `torch.nn.Module` does not declare."""
        return self.network

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights; float32 where it has none."""
        return next((p.dtype for p in self.network.parameters()), torch.float32)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of cells of a picture: rounded up, or raw down."""
        return super().grid(height, width) if self.mitigated else (height // self.factor, width // self.factor)

    def _resize(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        lacking = [wanted - found for wanted, found in zip(size, x.shape[-2:], strict=True)]
        cut = not self.mitigated and all(0 <= n < self.factor for n in lacking)
        return x if cut else super()._resize(x, size)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, ending in ``remedy``, when there is none or it is damaged."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; {remedy}")
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is damaged ({e}); restore the file") from e
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}; restore the file")
    return found
