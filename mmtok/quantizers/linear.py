"""The linear layer of a quantizer: its product is fp32, because codes hang on the last bits of what is compared."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.kernels.row_search import reduced_precision


class ExactLinear(nn.Linear):
    """nn.Linear that the global matmul precision does not reach; weights, names and start are those of nn.Linear.

    Where fp32 products may run in TF32 or bf16 (`torch.set_float32_matmul_precision`), it multiplies in fp64. So it
    does in every captured graph (torch.compile, torch.export), which would not see the setting change later. The layers
    of a quantizer are narrow: the time is small beside that of the search.
    """

    def forward(self, input: Tensor) -> Tensor:
        return exact_linear(input, self.weight, self.bias)


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + b in fp32, or in fp64 where an fp32 product may not be one."""
    kind = x.device.type
    if kind not in ("cpu", "cuda") or not (torch.compiler.is_compiling() or reduced_precision(kind)):
        return F.linear(x, weight, bias)
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double()).float()


def frozen_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """What the linear layer gives, with a gradient to x but none to the layer."""
    assert isinstance(layer, nn.Linear)
    return exact_linear(x, layer.weight.detach(), None if layer.bias is None else layer.bias.detach())


def join_linears(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """The sum of the layers' outputs, each taking its own part of x (..., widths together), as one product."""
    weights, biases = zip(*((layer.weight, layer.bias) for layer in layers), strict=True)
    return exact_linear(x, torch.cat(weights, 1), torch.stack(biases).sum(0))
