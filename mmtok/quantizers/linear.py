"""The linear layer of a quantizer: its product is fp32, because codes hang on the last bits of what is compared."""

from __future__ import annotations

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
        kind = input.device.type
        if kind not in ("cpu", "cuda") or not (torch.compiler.is_compiling() or reduced_precision(kind)):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.double()
        return F.linear(input.double(), self.weight.double(), bias).float()
