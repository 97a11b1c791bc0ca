"""Frozen helper networks that ship among the checkpoints: where they lie, that they are whole, and their 8-bit form."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

SHORTEST_ROW = 16


def shipped_file(name: str) -> Path:
    """A file of the folder of checkpoints: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "checkpoints"
    return (inside if inside.is_dir() else package.parent / "checkpoints") / name


def shipped_weights(name: str, sha256: str, recipe: str) -> dict[str, Tensor]:
    """The tensors of the shipped file ``name``, checked against ``sha256``; ``recipe`` is what writes it.

    Raises:
        ValueError: the file is missing or damaged.
    """
    path = shipped_file(name)
    if not path.is_file():
        raise ValueError(f"{path} is missing: reinstall mmtok, or run `python {recipe}`")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path}: expected sha256 {sha256[:16]}..., got {found[:16]}...: the file is damaged; reinstall "
            f"mmtok, or run `python {recipe}`"
        )
    from safetensors.torch import load

    return load(data)


def packed(state: Mapping[str, Tensor], small: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Matrices and kernels as int8 with one float32 step a row (``NAME:step``); what is small as ``small``.

    Small are vectors, and rows of fewer than `SHORTEST_ROW` numbers, whose steps would outweigh what 8 bits save.
    """
    result = {}
    for name, value in state.items():
        if value.ndim < 2 or value[0].numel() < SHORTEST_ROW:
            result[name] = value.to(small).contiguous()
            continue
        step = value.flatten(1).abs().amax(1).clamp_min(1e-12) / 127
        result[name] = (value / _by_row(step, value)).round().to(torch.int8).contiguous()
        result[f"{name}:step"] = step
    return result


def unpacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `packed`, int8 as float32; everything else as it is."""
    result = {}
    for name, value in state.items():
        if not name.endswith(":step"):
            step = state.get(f"{name}:step")
            result[name] = value if step is None else value.float() * _by_row(step, value)
    return result


def _by_row(step: Tensor, value: Tensor) -> Tensor:
    return step.view(-1, *[1] * (value.ndim - 1))
