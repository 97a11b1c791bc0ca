from __future__ import annotations

import math

import pytest
import torch

from mmtok.quantizers import PerDimensionQuantizer
from mmtok.quantizers.per_dimension import gaussian_centroids


def test_centroids_are_the_conditional_means_of_equal_masses():
    """Against numerical integration over each cell of the cut Gaussian."""
    centroids = gaussian_centroids(8, 3.0)
    x = torch.linspace(-3, 3, 600001, dtype=torch.float64)
    density = (-0.5 * x.square()).exp()
    cell = (torch.special.ndtr(x) * 8).floor().long()
    mass = torch.zeros(8, dtype=torch.float64).scatter_add_(0, cell, density)
    first = torch.zeros(8, dtype=torch.float64).scatter_add_(0, cell, density * x)
    torch.testing.assert_close(centroids, first / mass, atol=1e-5, rtol=0)
    torch.testing.assert_close(mass[1:-1], mass[1].expand(6), rtol=1e-4, atol=0)  # the two outer ones lose their tails


def test_numbers_of_tokenbridge():
    """Its defaults: 64 codes, +-5 mapped to +-3; the outermost centroid decodes to 4.06."""
    quantizer = PerDimensionQuantizer(16)
    assert quantizer.codebook_sizes == (64,) * 16
    last = quantizer.decode(torch.full((1, 16, 1), 63))
    torch.testing.assert_close(last, torch.full((1, 1, 16), 4.06), atol=0.005, rtol=0)
    edge = torch.special.ndtri(torch.tensor(63 / 64, dtype=torch.float64))
    pdf = [math.exp(-0.5 * a * a) / math.sqrt(2 * math.pi) for a in (float(edge), 3.0)]
    mass = 1 / 64 - float(torch.special.ndtr(torch.tensor(-3.0, dtype=torch.float64)))
    torch.testing.assert_close(last[0, 0], torch.full((16,), (pdf[0] - pdf[1]) / mass * 5 / 3))
    assert torch.equal(quantizer.centroids, -quantizer.centroids.flip(1))


@pytest.mark.parametrize(
    ("bits", "entropy", "error"),
    [(2, 1.69, 0.158), (3, 2.70, 0.0403), (4, 3.72, 0.0103), (5, 4.72, 0.0026), (6, 5.72, 0.00066)],
)
def test_entropy_and_error_on_standard_latents(bits, entropy, error):
    """The simulated figures of the fact sheet for N(0, 1) latents under the defaults."""
    z = torch.randn(1, 50000, 4, generator=torch.Generator().manual_seed(0))
    out = PerDimensionQuantizer(4, bits).eval()(z)
    measured = out.stats["perplexity"].log2().mean()
    assert float(measured) == pytest.approx(entropy, abs=0.01)
    assert float((out.z_q - z).square().mean()) == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("bits", [1, 3, 6, 10])
def test_bisection_equals_argmin(bits):
    quantizer = PerDimensionQuantizer(3, bits)
    quantizer.fit(torch.randn(3000, 3, generator=torch.Generator().manual_seed(1)).exp())
    z = torch.randn(2, 400, 3, generator=torch.Generator().manual_seed(2)).exp()
    x = ((z - quantizer.mean) / quantizer.std).double()
    codes = (x[..., None] - quantizer.centroids.double()).abs().argmin(-1).transpose(1, 2)
    assert torch.equal(quantizer.encode(z), codes)


def test_a_tie_goes_to_the_lower_code():
    quantizer = PerDimensionQuantizer(2, 2)
    quantizer.centroids.copy_(torch.tensor([[-2.0, -1.0, 1.0, 2.0]]).expand(2, 4))
    z = torch.tensor([[[-1.5, 0.0], [1.5, 1e-6]]])
    assert quantizer.encode(z)[0].T.tolist() == [[0, 1], [2, 2]]


def test_far_values_take_the_outer_codes():
    quantizer = PerDimensionQuantizer(1, 4)
    assert quantizer.encode(torch.tensor([[[-1e30], [1e30]]])).flatten().tolist() == [0, 15]
    narrow = gaussian_centroids(64, 0.5)  # most cells lie outside +-0.5
    assert float(narrow.abs().max()) <= 0.5 and bool((narrow.diff() >= 0).all()) and bool(torch.isfinite(narrow).all())


def test_mean_and_std_are_those_of_the_numbers():
    torch.manual_seed(0)
    z = torch.randn(1, 300, 2) * torch.tensor([10.0, 0.1]) + torch.tensor([100.0, -3.0])
    quantizer = PerDimensionQuantizer(2, 5, value_range=3.0)
    quantizer.set_statistics(torch.tensor([100.0, -3.0]), [10.0, 0.1])
    plain = PerDimensionQuantizer(2, 5, value_range=3.0)
    standard = (z - quantizer.mean) / quantizer.std
    assert torch.equal(quantizer.encode(z), plain.encode(standard))
    error = (quantizer.decode(quantizer.encode(z)) - z).square().mean((0, 1)) / quantizer.std.square()
    assert float(error.max()) < 0.05
    prefix = quantizer.decode(quantizer.encode(z, 1))
    assert bool((prefix[..., 1] == -3.0).all())  # a missing dimension is its mean


def test_fit_takes_the_quantiles_of_each_dimension():
    g = torch.Generator().manual_seed(0)
    data = torch.stack([torch.rand(8000, generator=g), torch.randn(8000, generator=g).exp()], 1)
    quantizer = PerDimensionQuantizer(2, 3)
    quantizer.fit(data.split(1000))
    values = quantizer.decode(torch.arange(8).expand(1, 2, 8))[0]  # (8, 2)
    torch.testing.assert_close(values[:, 0], (torch.arange(8) + 0.5) / 8, atol=0.02, rtol=0)
    lognormal = data[:, 1].sort().values.view(8, 1000).mean(1)
    torch.testing.assert_close(values[:, 1], lognormal, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(quantizer.mean, data.mean(0))
    gaussian = PerDimensionQuantizer(2, 3, value_range=3.0)
    gaussian.set_statistics(data.mean(0), data.std(0))
    errors = [(q.decode(q.encode(data[None]))[0] - data).square().mean(0) for q in (quantizer, gaussian)]
    assert bool((errors[0] < errors[1]).all())


def test_fit_with_few_rows_or_a_sample():
    data = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    data[:, 1] = 4.0  # a constant dimension
    quantizer = PerDimensionQuantizer(2, 4)
    quantizer.fit(data, max_rows=100)
    out = quantizer.decode(quantizer.encode(data[None]))[0]
    torch.testing.assert_close(out[:, 1], data[:, 1])
    assert float((out[:, 0] - data[:, 0]).square().mean()) < 0.05
    with pytest.raises(ValueError, match="at least 16 rows, one for each code, got 9; take fewer bits"):
        quantizer.fit(data[:9])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"bits in 1\.\.16, got 4 and 17"):
        PerDimensionQuantizer(4, 17)
    with pytest.raises(ValueError, match="value_range and gaussian_range > 0"):
        PerDimensionQuantizer(4, value_range=0.0)
    quantizer = PerDimensionQuantizer(2)
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(2,\) and \(3,\)"):
        quantizer.set_statistics([0.0, 0.0], [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="std > 0"):
        quantizer.set_statistics([0.0, 0.0], [1.0, float("inf")])
    with pytest.raises(ValueError, match=r"shape \(N, 2\)"):
        quantizer.fit(torch.randn(4, 3))
