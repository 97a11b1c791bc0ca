"""From published tensors to the state of one of our codecs: names, weight norm, and axes of size one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtok.quantizers.codebook import Codebook
from mmtok.tokenizer import TRAINING_STATE, Tokenizer

# (length of the directions, directions): torch's older and its present names
WEIGHT_NORMS = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))


def read_config(folder: str | Path, model_type: str) -> dict[str, Any]:
    """The ``config.json`` of a folder that transformers saved.

    Raises:
        ValueError: no such file, damaged, or of another model.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: expected the config.json that transformers saves, got {e}; pass its folder") from e
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != model_type:
        raise ValueError(f"{path}: expected model_type {model_type!r}, got {found!r}; use the loader of that family")
    return config


def fold_weight_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each pair of lengths g and directions v as the weight that they stand for, w = g v / |v| (arXiv 1602.07868,
    eq. 2); the norm runs over the axes where g has size one. Other tensors stay as they are.

    Raises:
        ValueError: one of a pair is missing.
    """
    found = dict(state)
    for length, direction in WEIGHT_NORMS:
        stems = {k.removesuffix(name) for k in found for name in (length, direction) if k.endswith("." + name)}
        for stem in sorted(stems):
            if stem + length not in found or stem + direction not in found:
                raise ValueError(f"weight norm: expected both {stem + length} and {direction}; restore the file")
            g, v = found.pop(stem + length).float(), found.pop(stem + direction).float()
            found[stem + "weight"] = g * (v / norm_like(v, g).clamp_min(1e-12))  # a row of zeros stays one
    return found


def norm_like(v: Tensor, g: Tensor) -> Tensor:
    """|v| over the axes where ``g`` has size one; of g's shape."""
    return torch.linalg.vector_norm(v, dim=[axis for axis, size in enumerate(g.shape) if size == 1], keepdim=True)


def rename(
    state: Mapping[str, Tensor], names: Mapping[str, str], family: str, ignored: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Published tensors under our names.

    Args:
        state: the published tensors, weight norm folded.
        names: ours -> published.
        family: what to call the weights in an error.
        ignored: endings of published names that have no place here.

    Raises:
        ValueError: a published name is missing or unexpected.
    """
    missing = sorted(set(names.values()) - set(state))
    unexpected = sorted(k for k in set(state) - set(names.values()) if not k.endswith(ignored or ("\0",)))
    if missing or unexpected:
        raise ValueError(
            f"{family}: expected {len(names)} published tensors; missing {missing[:4]} ({len(missing)}), unexpected "
            f"{unexpected[:4]} ({len(unexpected)}); pass the file of this family and the config that belongs to it"
        )
    return {ours: state[published] for ours, published in names.items()}


def fit(found: Mapping[str, Tensor], own: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Renamed plain weights as the state ``own`` has them: float32, split for weight norm, axes of size one as there.

    Raises:
        ValueError: a name of ``own`` without a tensor (training statistics apart), a tensor without a name, or a shape.
    """
    result, wrong = {}, []
    length, direction = WEIGHT_NORMS[1]
    for key, value in found.items():
        value = value.float() if value.is_floating_point() else value
        g = own.get(key.removesuffix("weight") + length) if key.endswith(".weight") else None
        parts = {key: value}
        if g is not None:
            stem = key.removesuffix("weight")
            parts = {stem + direction: value, stem + length: norm_like(value, g) if value.ndim == g.ndim else value}
        for name, tensor in parts.items():
            target = own.get(name)
            if target is None or [n for n in tensor.shape if n > 1] != [n for n in target.shape if n > 1]:
                expected = "none" if target is None else tuple(target.shape)
                wrong.append(f"{name} {tuple(tensor.shape)}, expected {expected}")
            else:
                result[name] = tensor.reshape(target.shape)
    missing = sorted(k for k in own if k not in result and not k.endswith(TRAINING_STATE))
    if missing or wrong:
        raise ValueError(
            f"{family}: the weights do not fit the config: missing {missing[:3]}, wrong {wrong[:3]}; pass the config "
            f"that belongs to the file"
        )
    return result


@torch.no_grad()
def fill(tokenizer: Tokenizer, state: Mapping[str, Tensor]) -> None:
    """Load `fit`'s result, and make codebooks fit for further training (every code counts as used once)."""
    tokenizer.load_state_dict(state, strict=False)
    for module in tokenizer.modules():
        if isinstance(module, Codebook):
            module.count_each_once()
