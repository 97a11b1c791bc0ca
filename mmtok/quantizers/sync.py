"""The three collectives that keep codebooks equal on every rank; in one process each of them does nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """x added up over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def from_rank_zero(x: Tensor) -> Tensor:
    """Rank 0's x on every rank, in place."""
    if world_size() > 1:
        dist.broadcast(x, src=0)
    return x


def gather_rows(x: Tensor) -> Tensor:
    """x (N_rank, D) of every rank -> (sum of N_rank, D) on every rank, in the order of the ranks; N may differ."""
    if world_size() == 1:
        return x
    sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([x.shape[0]], device=x.device))
    longest = max(int(n) for n in sizes)
    padded = torch.cat([x, x.new_zeros(longest - x.shape[0], x.shape[1])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, sizes, strict=True)])
