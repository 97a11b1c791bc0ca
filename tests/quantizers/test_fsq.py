from __future__ import annotations

import pytest
import torch

from mmtok.kernels.scalar_codes import unpack_digits
from mmtok.quantizers import FiniteScalarQuantizer


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 9])
def test_every_level_is_reached_in_order_and_no_other(size):
    quantizer = FiniteScalarQuantizer(1, (size,))
    z = torch.linspace(-30, 30, 20001)[None, :, None]
    out = quantizer(z)
    assert out.codes[0, 0].unique_consecutive().tolist() == list(range(size))
    values = out.z_q[0, :, 0].unique_consecutive()
    torch.testing.assert_close(values, (torch.arange(size) - size // 2) / (size // 2))
    assert float(values.min()) == -1 and float(values.max()) <= 1


@pytest.mark.parametrize("size", [3, 4, 5, 8])
def test_zero_stays_zero_and_the_gradient_is_that_of_the_bound(size):
    quantizer = FiniteScalarQuantizer(1, (size,))
    assert float(quantizer(torch.zeros(1, 1, 1)).z_q) == 0
    z = torch.randn(1, 50, 1, requires_grad=True)
    (grad,) = torch.autograd.grad(quantizer(z).z_q.sum(), z)
    half = (size - 1) * (1 - 1e-3) / 2
    shift = torch.atanh(torch.tensor((0.5 if size % 2 == 0 else 0.0) / half))
    torch.testing.assert_close(grad, half * (1 - torch.tanh(z + shift).square()).detach() / (size // 2))


def test_code_is_the_mixed_radix_number_of_the_levels():
    quantizer = FiniteScalarQuantizer(3, (8, 5, 4))
    assert quantizer.codebook_sizes == (160,)
    codes = torch.arange(160)[None, None]
    values = quantizer.decode(codes)  # (1, 160, 3)
    digits = unpack_digits(codes[:, 0], (8, 5, 4))
    torch.testing.assert_close(values, (digits - torch.tensor([4, 2, 2])) / torch.tensor([4.0, 2, 2]))
    assert len(values[0].unique(dim=0)) == 160


def test_there_is_no_loss():
    quantizer = FiniteScalarQuantizer(6)
    z = torch.randn(2, 9, 6, requires_grad=True)
    out = quantizer(z)
    assert float(out.loss.detach()) == 0
    out.loss.backward()  # connected all the same, so that any training loop can add it
    assert z.grad is not None and float(z.grad.abs().max()) == 0


def test_levels_are_checked():
    with pytest.raises(ValueError, match="each >= 2"):
        FiniteScalarQuantizer(4, (8, 1))
    with pytest.raises(ValueError, match="at least one size"):
        FiniteScalarQuantizer(4, ())
