"""Image metrics against closed forms, and every input they refuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.metrics.image import ms_ssim, psnr, ssim


def pictures(size: int = 24, items: int = 2) -> torch.Tensor:
    return torch.rand(items, 3, size, size, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25


@settings(deadline=None, max_examples=20)
@given(st.floats(0.001, 0.25), st.integers(1, 3))
def test_psnr_of_a_known_error(offset, items):
    x = pictures(8, items)
    sign = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0)
    expected = -20 * torch.log10(torch.tensor(offset, dtype=torch.float64))  # MSE = offset^2
    torch.testing.assert_close(psnr(x, x + sign * offset), expected.expand(items), atol=2e-3, rtol=0)


def test_psnr_is_per_item_and_infinite_for_equal_images():
    x = pictures()
    y = x.clone()
    y[1] += 0.1
    value = psnr(x, y)
    assert value.dtype == torch.float64 and torch.isinf(value[0])
    assert value[1] == pytest.approx(20.0, abs=1e-3)


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    x = pictures(32)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    little, much = (ssim(x, (x + s * noise).clamp(0, 1)) for s in (0.02, 0.2))
    torch.testing.assert_close(ssim(x, x), torch.ones(2, dtype=torch.float64))
    assert bool((much < little).all()) and bool((little < 1).all())


def test_ssim_of_flat_images_is_the_luminance_term():
    a, b, c1 = 0.3, 0.6, 0.01**2  # variances are 0: only (2ab + C1) / (a^2 + b^2 + C1) is left
    x, y = torch.full((1, 3, 16, 16), a), torch.full((1, 3, 16, 16), b)
    assert float(ssim(x, y)) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=5e-4)


def test_ms_ssim_is_one_for_equal_images_and_keeps_the_batch_axis():
    x = pictures(176, 1)
    torch.testing.assert_close(ms_ssim(x, x), torch.ones(1, dtype=torch.float64))
    assert 0 <= float(ms_ssim(x, pictures(176, 2)[1:])) < 0.5


def test_values_do_not_depend_on_the_rest_of_the_batch():
    x, y = pictures(20, 3), pictures(20, 6)[3:]
    for metric in (psnr, ssim):
        singles = torch.cat([metric(x[i : i + 1], y[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(metric(x, y), singles)


@pytest.mark.parametrize(
    ("metric", "change", "message"),
    [
        (psnr, lambda x: x[:, :, :-1], "expected the reference's shape"),
        (psnr, lambda x: x + 1, r"expected values in \[0,1\]"),
        (ssim, lambda x: x - 1, r"expected values in \[0,1\]"),
        (psnr, lambda x: torch.where(x > 0.5, torch.nan, x), "NaN or infinity"),
        (ms_ssim, lambda x: x, "at least 176 x 176 px, got 24 x 24"),
        (psnr, lambda x: (x * 255).byte(), "divide uint8 images by 255"),
    ],
)
def test_bad_estimates_are_named(metric, change, message):
    x = pictures()
    with pytest.raises(ValueError, match=message):
        metric(x, change(x))


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match="at least 11 x 11 px"):
        ssim(pictures(10), pictures(10))
    with pytest.raises(ValueError, match=r"image\[None\]"):
        psnr(pictures()[0], pictures()[0])
