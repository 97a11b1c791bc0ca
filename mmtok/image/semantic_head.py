"""Decoded tokens -> one semantic image embedding: the two heads of SEED-2, on which its code and weights disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmtok.layers.qformer import QFormer


class TokenMLP(nn.Module):
    """Head "B", of the released weights: an MLP on each token, all tokens side by side, one Linear."""

    def __init__(self, dim: int, num_tokens: int, widths: Sequence[int], embedding_dim: int):
        super().__init__()
        sizes = [dim, *widths]
        layers: list[nn.Module] = []
        for narrow, wide in zip(sizes[1:], sizes[:-1], strict=True):
            layers += [nn.Linear(wide, narrow, bias=False), nn.ReLU()]
        self.down = nn.Sequential(*layers[:-1])
        self.proj = nn.Linear(num_tokens * sizes[-1], embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.down(x).flatten(1))


class ReverseQFormer(nn.Module):
    """Head "A", of the training code: a bidirectional Q-Former with one query reads the tokens."""

    def __init__(self, dim: int, depth: int, num_heads: int, mlp_ratio: float, dropout: float, embedding_dim: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, dim) * 0.02)
        self.qformer = QFormer(dim, depth, num_heads, dim, causal=False, mlp_ratio=mlp_ratio, dropout=dropout)
        self.proj = nn.Linear(dim, embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.qformer(self.query.expand(len(x), -1, -1), x)[:, 0])


def build_head(
    head: Mapping[str, Any], dim: int, num_tokens: int, embedding_dim: int, qformer: Mapping[str, Any]
) -> nn.Module:
    """The module from tokens (B, T, D) to the semantic embedding; "A" takes what it does not name from ``qformer``."""
    options = dict(head)
    kind = options.pop("type", None)
    known = {"A": {"depth"}, "B": {"widths"}}
    if kind not in known or set(options) != known[kind]:
        raise ValueError(f'head: expected {{"type": "A", "depth"}} or {{"type": "B", "widths"}}, got {dict(head)}')
    if kind == "B":
        return TokenMLP(dim, num_tokens, options["widths"], embedding_dim)
    ratio, dropout = qformer.get("mlp_ratio", 4.0), qformer.get("dropout", 0.1)
    return ReverseQFormer(dim, options["depth"], qformer["num_heads"], ratio, dropout, embedding_dim)
