"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages of a module's parameters; buffers (codebooks that average themselves) are taken as they are.

    The decay starts low, min(decay, (1 + n) / (10 + n)), so that a short run does not keep its random start.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.average = {k: p.detach().clone() for k, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        names, now = zip(*module.named_parameters(), strict=True)
        torch._foreach_lerp_([self.average[k] for k in names], [p.detach() for p in now], 1 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """The averages in place of the weights inside the block.

        Whatever the block does to weights and buffers is undone: saving in fp16 rounds a model in place, which must
        not reach codebooks that are still learning.
        """
        tensors = [*module.named_parameters(), *module.named_buffers()]
        kept: dict[str, Tensor] = {k: t.detach().clone() for k, t in tensors}
        with torch.no_grad():
            for k, p in module.named_parameters():
                p.copy_(self.average[k])
        try:
            yield
        finally:
            with torch.no_grad():
                for k, t in tensors:
                    t.copy_(kept[k])
