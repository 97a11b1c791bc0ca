"""Renaming published tensors: our name -> the published names whose tensors are joined under it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmtok.quantizers.codebook import Codebook
from mmtok.tokenizer import TRAINING_STATE, Tokenizer

Names = Mapping[str, Sequence[str]]


def rename(state: Mapping[str, Tensor], names: Names, family: str, ignored: Sequence[str] = ()) -> dict[str, Tensor]:
    """Published tensors under our names; several under one name are joined along their first axis.

    Args:
        state: the published tensors.
        names: our name -> published names, in the order of joining.
        family: what to call the weights in an error.
        ignored: prefixes of published names that have no place here.

    Raises:
        ValueError: a published name is missing or unexpected.
    """
    wanted = [source for sources in names.values() for source in sources]
    missing = sorted(set(wanted) - set(state))
    unexpected = sorted(k for k in set(state) - set(wanted) if not k.startswith(tuple(ignored)))
    if missing or unexpected:
        raise ValueError(
            f"{family}: expected {len(wanted)} published tensors; missing {missing[:4]} ({len(missing)}), unexpected "
            f"{unexpected[:4]} ({len(unexpected)}); pass the file of this family and the depths that it has"
        )
    joined = {}
    for ours, sources in names.items():
        parts = [state[s] for s in sources]
        joined[ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined


def with_bias(ours: str, *published: str) -> dict[str, list[str]]:
    """Weight and bias of a layer, or of several that are joined."""
    return {f"{ours}.{part}": [f"{p}.{part}" for p in published] for part in ("weight", "bias")}


@torch.no_grad()
def fill(tokenizer: Tokenizer, state: Mapping[str, Tensor], family: str, absent: Sequence[str] = ()) -> None:
    """Load renamed tensors, and make codebooks fit for further training (every code counts as used once).

    Args:
        tokenizer: gets the weights, as float32.
        state: `rename`'s result.
        family: what to call the weights in an error.
        absent: prefixes of our names that the published weights do not have.

    Raises:
        ValueError: names or shapes do not fit the tokenizer.
    """
    own = tokenizer.state_dict()
    missing = [k for k in own if k not in state and not k.startswith(tuple(absent)) and not k.endswith(TRAINING_STATE)]
    wrong = [
        f"{k} {tuple(v.shape)}, expected {tuple(own[k].shape) if k in own else 'none'}"
        for k, v in state.items()
        if k not in own or own[k].shape != v.shape
    ]
    if missing or wrong:
        raise ValueError(
            f"{family}: the weights do not fit {type(tokenizer).__name__} as configured: missing {missing[:3]}, "
            f"wrong {wrong[:3]}; build it with the published sizes"
        )
    tokenizer.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()}, strict=False)
    for module in tokenizer.modules():
        if isinstance(module, Codebook):
            module.count_each_once()
