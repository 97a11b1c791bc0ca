from __future__ import annotations

import pytest
import torch

from mmtok.layers.spectrum import Spectrum


@pytest.mark.parametrize("hop", [4, 80])
def test_inverts_exactly(hop):
    spectrum = Spectrum(hop)
    x = torch.randn(2, 1, 7 * hop) * 0.1
    parts = spectrum.analyse(x)
    assert parts.shape == (2, spectrum.channels, 7)
    torch.testing.assert_close(spectrum.synthesise(parts), x, atol=1e-5, rtol=0)


def test_magnitudes_are_compressed_by_the_square_root():
    spectrum = Spectrum(8)
    x = torch.randn(1, 1, 64) * 0.1
    quiet, loud = spectrum.analyse(x), spectrum.analyse(100 * x)
    torch.testing.assert_close(loud, 10 * quiet, rtol=1e-2, atol=1e-3)


def test_padding_changes_nothing():
    spectrum = Spectrum(8)
    x = torch.randn(1, 1, 5 * 8) * 0.1
    longer = torch.nn.functional.pad(x, (0, 4 * 8))
    alone, padded = spectrum.analyse(x), spectrum.analyse(longer)
    torch.testing.assert_close(padded[..., :5], alone)
    parts = torch.randn(1, spectrum.channels, 9)
    cut = spectrum.synthesise(parts[..., :5])
    batched = spectrum.synthesise(parts, torch.tensor([5]))
    torch.testing.assert_close(batched[..., : 5 * 8], cut)


def test_gradient_is_finite_on_silence():
    spectrum = Spectrum(8)
    x = torch.zeros(1, 1, 64, requires_grad=True)
    spectrum.synthesise(spectrum.analyse(x)).square().sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_odd_hop_is_refused():
    with pytest.raises(ValueError, match="even number"):
        Spectrum(5)
