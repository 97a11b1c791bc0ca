"""The resumable state of a run in one safetensors file: weights, averages, optimizers, step. No pickle."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from mmtok.tokens import write_atomic

FORMAT = "mmtok-training-1"


def save_state(
    path: Path,
    step: int,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    average: dict[str, Tensor],
    identity: dict,
) -> None:
    """Write the state after ``step`` finished steps; ``identity`` (configs) must be equal to resume."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {f"average.{k}": v for k, v in average.items()}
    for name, module in modules.items():
        tensors |= {f"module.{name}.{k}": v for k, v in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{name}.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
    metadata = {"format": FORMAT, "step": str(step), "identity": json.dumps(identity, sort_keys=True, default=str)}
    # clone: tied or sliced tensors share memory, which safetensors refuses
    write_atomic(path, save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, metadata))


def load_state(
    path: Path,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    average: dict[str, Tensor],
    identity: dict,
) -> int:
    """Put a saved state back and return the number of finished steps; ValueError when it is of another run."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - safe_open is no mapping
    except SafetensorError as e:
        raise ValueError(f"{path} is damaged ({e}); delete it to start again") from e
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected format {FORMAT!r}, got {metadata.get('format')!r}; delete it to start again"
        )
    if (mine := json.dumps(identity, sort_keys=True, default=str)) != metadata.get("identity"):
        raise ValueError(
            f"{path} belongs to a run with other settings; use another --out, or delete it to start again.\n"
            f"  stored:   {metadata.get('identity')}\n  this run: {mine}"
        )
    _check_networks(path, tensors, modules, average)
    for name, module in modules.items():
        prefix = f"module.{name}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    for name, optimizer in optimizers.items():
        prefix = f"optimizer.{name}."
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(prefix):
                i, field = key.removeprefix(prefix).split(".")
                state.setdefault(int(i), {})[field] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for key, value in average.items():
        value.copy_(tensors[f"average.{key}"])
    return int(metadata["step"])


def _check_networks(
    path: Path, tensors: dict[str, Tensor], modules: dict[str, nn.Module], average: dict[str, Tensor]
) -> None:
    """Raise ValueError, before anything is put back, unless the file holds the tensors of exactly these networks."""
    wanted = {f"average.{k}": v.shape for k, v in average.items()}
    for name, module in modules.items():
        wanted |= {f"module.{name}.{k}": v.shape for k, v in module.state_dict().items()}
    stored = {k: v.shape for k, v in tensors.items() if not k.startswith("optimizer.")}
    differing = sorted(k for k in wanted.keys() | stored.keys() if wanted.get(k) != stored.get(k))
    if differing:
        sizes = [str(tuple(d[differing[0]])) if differing[0] in d else "no such tensor" for d in (wanted, stored)]
        raise ValueError(
            f"{path} was written with other networks ({len(differing)} tensors differ, e.g. {differing[0]}: expected "
            f"{sizes[0]}, got {sizes[1]}); use another --out, or delete it to start again"
        )
