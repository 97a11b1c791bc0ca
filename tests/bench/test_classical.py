"""The search for a classical codec's best setting: byte targets are kept, and what is out of reach is not hidden."""

import pytest
import torch

from mmtok.bench.classical import fit_image
from mmtok.wrappers.classical_images import encode_image, image_codec

CODECS = ("jpeg", "webp", "avif", "jpeg2000")


def picture(height: int = 64, width: int = 48) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    waves = 0.5 + 0.4 * torch.sin(25 * x * y + 9 * x)
    return torch.stack([x, waves, ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).float()])


@pytest.mark.parametrize("codec", CODECS)
def test_the_largest_file_within_the_target_is_found(codec):
    x = picture(32, 32)
    scale = image_codec(codec).settings
    # A few settings stand for all: none of them may fit the target and yet be larger than what was found.
    sizes = [len(encode_image(x, codec, scale[i])) for i in range(0, len(scale), max(1, len(scale) // 11))]
    target = sorted(sizes)[len(sizes) // 2] + 3
    setting, data = fit_image(x, codec, target)
    assert len(data) <= target and data == encode_image(x, codec, setting)
    assert len(data) >= 0.97 * max(size for size in sizes if size <= target)


@pytest.mark.parametrize("codec", CODECS)
def test_an_unreachable_target_gives_the_smallest_file(codec):
    x = picture()
    smallest = image_codec(codec).settings[-1 if codec == "jpeg2000" else 0]
    setting, data = fit_image(x, codec, 10)
    assert len(data) > 10 and setting == smallest and data == encode_image(x, codec, smallest)


@pytest.mark.parametrize("codec", CODECS)
def test_more_bytes_give_a_larger_file(codec):
    small, large = (len(fit_image(picture(), codec, target)[1]) for target in (900, 3000))
    assert small <= 900 < large <= 3000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_image(picture(), "jpeg", 0), "target_bytes: expected at least 1"),
        (lambda: fit_image(picture(), "png", 50), "codec: expected one of"),
        (lambda: fit_image(picture() * 255, "jpeg", 512), r"finite values in \[0,1\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
