"""Pictures of every kind come in as (C, H, W) in [0, 1]; what is no picture is refused with its name."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmtok.data import images
from mmtok.data.images import from_rgb, read_image, read_picture, to_pictures, to_rgb, write_image

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def saved(folder: Path, im: Image.Image, name: str = "x.png", **options: object) -> Path:
    im.save(folder / name, **options)
    return folder / name


def test_eight_bit_modes(tmp_path: Path):
    rgb = Image.fromarray(RGB)
    grey = rgb.convert("L")
    x = read_image(saved(tmp_path, rgb))
    assert x.dtype == torch.float32 and torch.equal(x, torch.from_numpy(RGB).permute(2, 0, 1).float() / 255)
    assert torch.equal(read_image(saved(tmp_path, grey))[0], torch.from_numpy(np.array(grey)).float() / 255)
    rgba = rgb.copy()
    rgba.putalpha(grey)
    assert torch.equal(read_image(saved(tmp_path, rgba))[3], torch.from_numpy(np.array(grey)).float() / 255)
    la = grey.copy()
    la.putalpha(grey)
    x = read_image(saved(tmp_path, la))
    assert x.shape == (4, 5, 7) and torch.equal(x[0], x[1]) and torch.equal(x[0], x[3])
    one = Image.fromarray(RGB[..., 0] > 100)
    assert torch.equal(read_image(saved(tmp_path, one))[0], torch.from_numpy(RGB[..., 0] > 100).float())


def test_palettes_with_and_without_transparency(tmp_path: Path):
    palette = Image.fromarray(RGB).quantize(8)
    assert torch.equal(
        read_image(saved(tmp_path, palette)), torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1) / 255
    )
    clear = int(np.array(palette)[2, 3])
    x = read_image(saved(tmp_path, palette, transparency=clear))
    assert x.shape == (4, 5, 7) and float(x[3, 2, 3]) == 0 and set(x[3].unique().tolist()) == {0.0, 1.0}
    # grey and RGB may name one transparent colour too
    assert read_image(saved(tmp_path, Image.fromarray(RGB[..., 0]), transparency=int(RGB[0, 0, 0])))[3, 0, 0] == 0
    assert read_image(saved(tmp_path, Image.fromarray(RGB), transparency=tuple(RGB[0, 0].tolist())))[3, 0, 0] == 0


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_rare_modes(mode: str):
    wide = Image.fromarray(RGB)
    via = {"PA": "RGBA", "La": "LA", "RGBa": "RGBA"}.get(mode, "RGB")
    im = wide.quantize(8).convert("PA") if mode == "PA" else wide.convert(via).convert(mode)
    assert im.mode == mode
    x = to_pictures(im)[0][0].pixels
    assert x.shape == (4 if mode in ("PA", "La", "RGBa") else 3, 5, 7) and 0 <= float(x.min()) <= float(x.max()) <= 1


def test_cmyk_jpeg_and_animation(tmp_path: Path):
    assert read_image(saved(tmp_path, Image.new("CMYK", (4, 3), (0, 0, 0, 0)), "x.jpg")).min() > 0.98  # no ink: white
    frames = [Image.new("L", (4, 3), v) for v in (255, 0)]
    path = saved(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:])
    assert float(read_image(path).min()) == 1  # the first one


def test_sixteen_bits_go_round(tmp_path: Path):
    x = torch.linspace(0, 1, 65536)[:: 65535 // 34].reshape(1, 5, 7)
    for name in ("x.png", "x.tif"):
        write_image(tmp_path / name, x, bit_depth=16)
        picture = read_picture(tmp_path / name)
        assert picture.bit_depth == 16 and torch.allclose(picture.pixels, x, atol=0.6 / 65535)
    write_image(tmp_path / "x.png", x)
    assert read_picture(tmp_path / "x.png").bit_depth == 8
    (array,) = to_pictures((x[0].numpy() * 65535).round().astype(np.uint16))[0]
    assert array.bit_depth == 16 and torch.allclose(array.pixels, x, atol=0.6 / 65535)
    (big,) = to_pictures((x[0].numpy() * 65535).round().astype(">u2"))[0]
    assert torch.equal(big.pixels, array.pixels)


def test_32_bit_integers_and_floats(tmp_path: Path):
    wide = Image.fromarray(np.array([[0, 65535]], dtype=np.int32))
    assert wide.mode == "I" and read_image(saved(tmp_path, wide, "x.tif")).flatten().tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"x\.tif.*0\.\.65535, got 0 \.\. 70000"):
        read_image(saved(tmp_path, Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "x.tif"))
    assert read_image(saved(tmp_path, Image.fromarray(np.full((2, 3), 0.5, np.float32)), "x.tif")).shape == (1, 2, 3)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 7"):
        read_image(saved(tmp_path, Image.fromarray(np.full((2, 3), 7, np.float32)), "x.tif"))


def test_exif_turns_the_picture_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    x = read_image(saved(tmp_path, Image.fromarray(RGB), exif=exif))
    assert torch.equal(x, torch.from_numpy(np.rot90(RGB, 3).copy()).permute(2, 0, 1).float() / 255)


def test_one_pixel(tmp_path: Path):
    assert read_image(saved(tmp_path, Image.new("L", (1, 1), 51))).flatten().tolist() == pytest.approx([0.2])


def test_files_that_are_no_pictures(tmp_path: Path):
    path = tmp_path / "x.png"
    with pytest.raises(FileNotFoundError, match=r"no image file at .*x\.png"):
        read_image(path)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.png is empty"):
        read_image(path)
    path.write_text("this is text, not a picture")
    with pytest.raises(ValueError, match=r"x\.png is not a readable image"):
        read_image(path)
    saved(tmp_path, Image.fromarray(RGB.repeat(9, 0)))
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(ValueError, match=r"x\.png is not a readable image"):
        read_image(path)


@pytest.mark.filterwarnings("ignore")  # PIL warns of some of the damage
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF"])
def test_damaged_files_are_read_or_refused_by_name(tmp_path: Path, format: str):
    rng, buffer, path, refused = random.Random(1), io.BytesIO(), tmp_path / "x.png", 0
    Image.fromarray(RGB.repeat(4, 0)).save(buffer, format)
    for trial in range(25):
        data = bytearray(buffer.getvalue())
        if trial % 2:
            del data[rng.randrange(4, len(data)) :]
        for _ in range(trial % 6):
            data[rng.randrange(min(len(data), rng.choice([40, 10_000])))] = rng.randrange(256)
        path.write_bytes(data)
        message = None
        try:
            assert read_image(path).ndim == 3
        except ValueError as e:
            message = str(e)
        assert message is None or str(path) in message
        refused += message is not None
    assert refused


def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = saved(tmp_path, Image.fromarray(RGB))
    monkeypatch.setattr(images, "MAX_PIXELS", 34)
    with pytest.raises(ValueError, match=r"x\.png: 7 x 5 px is above 0 Mpx; shrink it"):
        read_image(path)
    monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # PIL refuses from twice that
    with pytest.raises(ValueError, match=r"x\.png: .*shrink it"):
        read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # where it only warns
    assert read_image(path).shape == (3, 5, 7)


def test_arrays_and_tensors():
    x = torch.rand(3, 5, 7)
    for form in (x, x.double(), x.half(), x.permute(1, 2, 0).numpy(), x.permute(1, 2, 0).numpy().astype(">f8")):
        (picture,), batch = to_pictures(form)
        assert picture.pixels.shape == (3, 5, 7) and picture.pixels.dtype == torch.float32 and not batch
        assert torch.allclose(picture.pixels, x, atol=1e-3)
    frozen = x.permute(1, 2, 0).contiguous().numpy()
    frozen.setflags(write=False)
    assert torch.equal(to_pictures(frozen)[0][0].pixels, x)  # and torch does not warn
    assert not to_pictures(torch.rand(5, 7, requires_grad=True))[0][0].pixels.requires_grad
    assert torch.equal(to_pictures(RGB)[0][0].pixels, torch.from_numpy(RGB).permute(2, 0, 1).float() / 255)
    assert torch.equal(to_pictures(RGB[:, ::-1])[0][0].pixels, to_pictures(RGB)[0][0].pixels.flip(-1))
    assert to_pictures(RGB[..., 0] > 100)[0][0].pixels.unique().tolist() == [0.0, 1.0]
    assert to_pictures(torch.tensor([[True, False]]))[0][0].pixels.tolist() == [[[1.0, 0.0]]]
    pictures, batch = to_pictures(x[None].repeat(2, 1, 1, 1))
    assert len(pictures) == 2 and batch
    pictures, batch = to_pictures([x, RGB, RGB[None], Image.fromarray(RGB)])
    assert len(pictures) == 4 and batch


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.full((3, 2, 2), float("nan")), "NaN or infinity"),
        (torch.full((3, 2, 2), float("inf")), "NaN or infinity"),
        (torch.full((3, 2, 2), 255.0), r"in \[0, 1\], got 255 .. 255; divide by 255"),
        (torch.full((3, 2, 2), -1.0), r"got -1 .. -1"),
        (torch.rand(2, 4, 4), r"expected \(C, H, W\) with C = 1, 3 or 4, got shape \(2, 4, 4\)"),
        (np.zeros((4, 4, 5), np.uint8), r"expected \(H, W, C\) with C = 1, 3 or 4"),
        (torch.rand(3), "expected .C, H, W."),
        (torch.rand(1, 1, 3, 4, 4), "expected .C, H, W."),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "expected uint8, uint16 or float.*int64"),
        (np.zeros((4, 4, 3), np.int16), "expected uint8, uint16 or float.*int16"),
        (np.zeros((4, 4, 3), object), "got dtype object"),
        (np.zeros((4, 4, 3), np.complex64), "got dtype complex64"),
        (np.array([["a", "b"]]), "got dtype"),
        (torch.rand(3, 0, 4), "at least 1 x 1 px"),
        (torch.rand(0, 3, 4, 4), "at least one image"),
        ([], "at least one image"),
        (7, "expected a path, PIL image, array, tensor or a list of them, got int"),
        ([None], "got NoneType"),
    ],
)
def test_wrong_input_is_named(x: object, words: str):
    with pytest.raises(ValueError, match=words):
        to_pictures(x)


def test_channels():
    rgba = torch.rand(4, 3, 3)
    white = to_rgb(rgba)
    assert torch.allclose(white, rgba[:3] * rgba[3] + (1 - rgba[3]))
    assert torch.equal(to_rgb(rgba[:1]), rgba[:1].repeat(3, 1, 1)) and to_rgb(rgba[:3]) is not None
    grey = from_rgb(to_rgb(rgba[:1]), 1)
    assert torch.allclose(grey, rgba[:1]) and from_rgb(white, 4)[3].min() == 1 and from_rgb(white, 3) is white


def test_written_files_come_back(tmp_path: Path):
    for C in (1, 3, 4):
        x = torch.rand(C, 6, 5)
        write_image(tmp_path / "x.png", x)
        assert torch.equal(read_image(tmp_path / "x.png"), (x * 255).round() / 255)
        for suffix in (".jpg", ".webp", ".bmp", ".tiff", ".gif", ".ppm", ".avif", ".PNG"):
            write_image(tmp_path / f"x{suffix}", x)
            assert read_image(tmp_path / f"x{suffix}").shape[1:] == (6, 5)
    write_image(tmp_path / "x.png", torch.tensor([[[-1.0, 2.0]]]))
    assert read_image(tmp_path / "x.png").tolist() == [[[0.0, 1.0]]]
    with pytest.raises(ValueError, match=r"suffix such as \.png or \.jpg, got '\.txt'"):
        write_image(tmp_path / "x.txt", torch.rand(3, 2, 2))
    with pytest.raises(ValueError, match=r"C = 1, 3 or 4, got shape \(5, 2, 2\)"):
        write_image(tmp_path / "x.png", torch.rand(5, 2, 2))
