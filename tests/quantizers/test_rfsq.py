from __future__ import annotations

import itertools

import pytest
import torch

from mmtok.quantizers import ResidualFiniteScalarQuantizer


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_error_falls_by_the_size_with_every_level(size):
    """|u - sum of k levels| <= size^-k, reached nearly everywhere, so that the mean falls by the same factor."""
    quantizer = ResidualFiniteScalarQuantizer(1, 4, (size,))
    u = torch.linspace(-0.999, 0.999, 20001, dtype=torch.float64)
    z = torch.atanh(u).float()[None, :, None]
    errors = [(quantizer.decode(quantizer.encode(z, k))[0, :, 0].double() - u).abs() for k in range(1, 5)]
    for k, error in enumerate(errors, 1):
        assert float(error.max()) <= size**-k + 1e-6
    for coarse, fine in itertools.pairwise(errors):
        assert float(coarse.mean() / fine.mean()) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_levels_together_are_one_uniform_grid(size):
    quantizer = ResidualFiniteScalarQuantizer(1, 3, (size,))
    codes = torch.cartesian_prod(*[torch.arange(size)] * 3).T[None]  # (1, 3, size^3)
    values = quantizer.decode(codes)[0, :, 0]
    expected = (2 * torch.arange(size**3) + 1) / size**3 - 1
    torch.testing.assert_close(values, expected)  # the first level is the most significant digit
    assert torch.equal(quantizer.encode(torch.atanh(values)[None, :, None]), codes)


def test_digits_of_a_level_make_its_code():
    quantizer = ResidualFiniteScalarQuantizer(2, 2, (5, 3))
    assert quantizer.codebook_sizes == (15, 15)
    z = torch.atanh(torch.tensor([[[-0.9, 0.9], [0.0, 0.0]]]))
    assert quantizer.encode(z)[0, 0].tolist() == [0 + 5 * 2, 2 + 5 * 1]
    torch.testing.assert_close(quantizer.decode(quantizer.encode(z, 1)), torch.tensor([[[-0.8, 2 / 3], [0.0, 0.0]]]))


def test_far_values_stay_in_range():
    quantizer = ResidualFiniteScalarQuantizer(1, 5, (8,)).eval()
    z = torch.tensor([[[-1e4], [1e4], [-20.0], [20.0]]])
    out = quantizer(z)
    assert out.codes[0].T.tolist() == [[0] * 5, [7] * 5, [0] * 5, [7] * 5]
    torch.testing.assert_close(out.z_q, torch.sign(z), atol=2 * 8**-5, rtol=0)


@pytest.mark.parametrize("levels", [1, 3])
def test_the_gradient_is_that_of_the_bound_whatever_the_levels(levels):
    quantizer = ResidualFiniteScalarQuantizer(2, 3, (4, 3))
    z = torch.randn(2, 7, 2, requires_grad=True)
    weight = torch.randn(2, 7, 2)
    out = quantizer(z, num_codebooks=levels)
    assert float(out.loss.detach()) == 0
    for z_q in (out.z_q, out.z_q_first):
        (grad,) = torch.autograd.grad((z_q * weight).sum(), z, retain_graph=True)
        torch.testing.assert_close(grad, weight * (1 - torch.tanh(z.detach()).square()))


def test_dropped_levels_contribute_nothing_per_item():
    torch.manual_seed(0)
    quantizer = ResidualFiniteScalarQuantizer(2, 3, (4, 3), quantizer_dropout=1.0)
    z = torch.randn(60, 5, 2)
    out = quantizer(z)
    full = quantizer.encode(z)
    used = [int((codes == whole).all(1).sum()) for codes, whole in zip(out.codes, full, strict=True)]
    assert set(used) == {1, 2, 3}
    for n, codes, whole, z_q in zip(used, out.codes, full, out.z_q, strict=True):
        assert bool((codes[n:] == 0).all())
        assert torch.equal(z_q, quantizer.decode(whole[None, :n])[0])
    assert torch.equal(quantizer(z, num_codebooks=3).codes, full)  # a number that is named is kept
    assert torch.equal(quantizer.eval()(z).codes, full)


def test_constructor_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"quantizer_dropout: expected a share in \[0, 1\], got 2"):
        ResidualFiniteScalarQuantizer(4, 2, quantizer_dropout=2.0)
    with pytest.raises(ValueError, match="each >= 2"):
        ResidualFiniteScalarQuantizer(4, 2, (8, 1))
    with pytest.raises(ValueError, match="num_codebooks: expected at least 1, got 0"):
        ResidualFiniteScalarQuantizer(4, 0)
    with pytest.raises(ValueError, match="num_codebooks: expected at most 7 for levels of 8, got 8"):
        ResidualFiniteScalarQuantizer(4, 8)
    assert ResidualFiniteScalarQuantizer(4, 7).num_codebooks == 7
