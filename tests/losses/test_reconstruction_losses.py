from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.losses import reconstruction
from mmtok.losses.reconstruction import charbonnier, l1, l2, masked_mean, smooth_l1

ALL = [l1, l2, smooth_l1, charbonnier]


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 1, 33)])
def test_equal_inputs_give_zero(loss, shape):
    x = torch.rand(shape)
    assert loss(x, x.clone()).item() == 0


def test_hand_computed_values():
    x_hat, x = torch.tensor([[[0.0, 3.0]]]), torch.tensor([[[0.5, 1.0]]])
    assert l1(x_hat, x).item() == pytest.approx((0.5 + 2) / 2)
    assert l2(x_hat, x).item() == pytest.approx((0.25 + 4) / 2)
    assert smooth_l1(x_hat, x).item() == pytest.approx((0.125 + 1.5) / 2)
    assert smooth_l1(x_hat, x, delta=0.25).item() == pytest.approx((0.375 + 1.875) / 2)
    assert charbonnier(x_hat, x, eps=1.0).item() == pytest.approx((math.sqrt(1.25) + math.sqrt(5)) / 2 - 1)


@pytest.mark.parametrize("loss", ALL)
def test_mask_hides_even_nan_in_value_and_gradient(loss):
    x, x_hat = torch.rand(2, 3, 4, 6), torch.rand(2, 3, 4, 6)
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[0, :3, :2] = True
    mask[1, :, 4:] = True
    expected = loss(x_hat.movedim(1, -1)[mask].T[None], x.movedim(1, -1)[mask].T[None])
    x_hat = x_hat.masked_fill(~mask[:, None], math.nan).requires_grad_()
    value = loss(x_hat, x, mask)
    value.backward()
    assert value.item() == pytest.approx(expected.item())
    assert x_hat.grad.isfinite().all()
    assert (x_hat.grad[mask[:, None].expand_as(x)] != 0).all() and (x_hat.grad[~mask[:, None].expand_as(x)] == 0).all()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_padding_changes_nothing(lengths):
    x = torch.randn(len(lengths), 2, 9)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    joined = [row[:, :n].flatten() for row, n in zip(x, lengths, strict=True)]
    expected = torch.cat(joined).mean() if sum(lengths) else torch.zeros(())
    torch.testing.assert_close(masked_mean(x, mask), expected)
    torch.testing.assert_close(masked_mean(x, mask[:, None]), expected)


@pytest.mark.parametrize("loss", ALL)
def test_bf16_inputs_are_read_in_float32(loss):
    x, x_hat = torch.rand(2, 1, 500).bfloat16(), torch.rand(2, 1, 500).bfloat16()
    assert loss(x_hat, x).dtype == torch.float32
    torch.testing.assert_close(loss(x_hat, x), loss(x_hat.float(), x.float()), rtol=0, atol=0)


@pytest.mark.parametrize("loss", ALL)
def test_bad_input_is_refused(loss):
    x = torch.rand(2, 3, 4, 6)
    with pytest.raises(ValueError, match="x_hat: expected the shape of x"):
        loss(x[:, :1], x)
    with pytest.raises(ValueError, match="expected bool"):
        loss(x, x, torch.ones(2, 4, 6))
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 4, 6\)"):
        loss(x, x, torch.ones(2, 4, 5, dtype=torch.bool))


def test_widths_must_be_positive():
    x = torch.rand(1, 1, 4)
    with pytest.raises(ValueError, match="delta"):
        reconstruction.smooth_l1(x, x, delta=0.0)
    with pytest.raises(ValueError, match="eps"):
        reconstruction.charbonnier(x, x, eps=0.0)
