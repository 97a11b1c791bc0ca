"""Nested dropout of the last tokens in training, after which every prefix of the tokens decodes.

Rippel et al., arXiv 1402.0915; on tokens of an image: FlexTok (arXiv 2502.13967) draws powers of two, One-D-Piece
(arXiv 2501.10064) any count.
"""

from __future__ import annotations

import torch
from torch import Tensor

TAIL_DROPS = ("none", "uniform", "powers")


def check_tail_drop(kind: str) -> None:
    if kind not in TAIL_DROPS:
        raise ValueError(f"tail_drop: expected one of {TAIL_DROPS}, got {kind!r}")


def tail_mask(kind: str, batch: int, num_tokens: int, device: torch.device | None = None) -> Tensor | None:
    """(B, T) bool, true at the first k tokens of each item, k >= 1 drawn for each; None for ``none``.

    Args:
        kind: ``uniform``: k in 1..T alike; ``powers``: k a power of two up to T, or T itself.
    """
    check_tail_drop(kind)
    if kind == "none":
        return None
    if kind == "uniform":
        kept = torch.randint(1, num_tokens + 1, (batch,), device=device)
    else:
        counts = [2**i for i in range(num_tokens.bit_length()) if 2**i < num_tokens] + [num_tokens]
        kept = torch.tensor(counts, device=device)[torch.randint(len(counts), (batch,), device=device)]
    return torch.arange(num_tokens, device=device) < kept[:, None]
