"""Codes are those of fp32 whatever the matmul precision and autocast, also where Linears lead to the codebook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from mmtok.quantizers import Quantizer, build_quantizer
from mmtok.quantizers.linear import ExactLinear

DIM = 256  # wide enough that oneDNN takes bf16 products where it may
FAMILY = {
    "vq": {"type": "vq", "codebook_dim": 8},
    "rvq": {"type": "rvq", "num_codebooks": 3, "codebook_dim": 8},
    "rvq-wide": {"type": "rvq", "num_codebooks": 3},
    "grouped": {"type": "grouped_rvq", "num_codebooks": 4, "codebook_dim": 8},
    "split": {"type": "split_rvq", "num_codebooks": 3, "inner_dim": 16},
    "strided": {"type": "strided_rvq", "level_strides": [2, 1]},
}


@contextmanager
def low_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def make(name: str) -> Quantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer({"dim": DIM, "codebook_size": 64, "kmeans_init": False} | FAMILY[name])
    return quantizer.eval()


@pytest.mark.parametrize("name", FAMILY)
def test_codes_do_not_follow_the_global_matmul_precision(name):
    quantizer = make(name)
    z = torch.randn(4, 200, DIM)
    expected = quantizer(z)
    decoded = quantizer.decode(expected.codes)
    with low_precision():
        out = quantizer(z)
        assert torch.equal(out.codes, expected.codes)
        assert torch.equal(quantizer.encode(z), expected.codes)
        torch.testing.assert_close(quantizer.decode(expected.codes), decoded, atol=1e-5, rtol=1e-5)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                assert torch.equal(quantizer.encode(z), expected.codes)
                assert torch.equal(quantizer(z).codes, expected.codes)


def test_exact_linear_is_a_linear_in_value_and_gradient():
    torch.manual_seed(0)
    plain = nn.Linear(DIM, 16)
    exact = ExactLinear(DIM, 16)
    exact.load_state_dict(plain.state_dict())
    x = torch.randn(800, DIM)
    weight = torch.randn(800, 16)

    def run(layer: nn.Module) -> list[torch.Tensor]:
        z = x.clone().requires_grad_()
        out = layer(z)
        return [out, *torch.autograd.grad((out * weight).sum(), [z, *layer.parameters()])]

    expected = run(plain)
    assert all(torch.equal(a, b) for a, b in zip(run(exact), expected, strict=True))
    with low_precision():
        for ours, theirs in zip(run(exact), expected, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    compiled = torch.compile(exact, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected[0], atol=1e-5, rtol=1e-5)
