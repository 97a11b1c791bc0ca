"""Pictures in and out: any path, PIL image, array or tensor becomes (C, H, W) float32 in [0, 1], and back to a file."""

from __future__ import annotations

import dataclasses
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtok.data.arrays import as_tensor
from mmtok.tokens import write_atomic

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
MAX_PIXELS = 178_000_000  # PIL refuses what is above 178.9 Mpx
ORIENTATION = 0x0112  # EXIF tag


@dataclasses.dataclass
class Picture:
    """One picture: ``pixels`` (C, H, W) float32 in [0, 1], C = 1 grey, 3 RGB or 4 RGBA; ``bit_depth`` 8 or 16."""

    pixels: Tensor
    bit_depth: int = 8


def read_image(path: str | Path) -> Tensor:
    """Read a picture as (C, H, W) float32 in [0, 1], C = 1, 3 or 4, turned upright by its EXIF tag.

    Raises FileNotFoundError when missing, ValueError when empty, corrupt, no picture, or above 178 Mpx.
    """
    return read_picture(path).pixels


def read_picture(path: str | Path) -> Picture:
    """`read_image` with the bit depth."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image file at {path}")
    return picture_from_bytes(path.read_bytes(), str(path))


def picture_from_bytes(data: bytes, name: str) -> Picture:
    """The picture in a file's bytes; errors as `read_image`, by ``name``."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ValueError(f"{name} is empty (0 bytes); expected an image file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit below has a clearer text
        try:
            with Image.open(io.BytesIO(data)) as im:
                size = f"{im.width} x {im.height} px"
                if im.width * im.height <= MAX_PIXELS:
                    return picture_from_pil(im)
        except Image.DecompressionBombError as e:  # PIL's own limit, which does not tell the sides
            size = str(e)
        except Exception as e:  # PIL's readers raise nearly anything on a broken file
            why = "of no known format" if isinstance(e, UnidentifiedImageError) else f"{type(e).__name__}: {e}"
            raise ValueError(f"{name} is not a readable image ({why}); expected PNG, JPEG, WebP, AVIF, TIFF ...") from e
    raise ValueError(f"{name}: {size} is above {MAX_PIXELS // 10**6} Mpx; shrink it")


def picture_from_pil(im: Any) -> Picture:
    """Convert a PIL image of any mode; palettes and CMYK become RGB, any transparency becomes RGBA."""
    from PIL import ImageOps

    if im.getexif().get(ORIENTATION, 1) != 1:  # or it would be copied for nothing
        im = ImageOps.exif_transpose(im)
    if im.width == 0 or im.height == 0:
        raise ValueError(f"image: expected at least 1 x 1 px, got {im.width} x {im.height}")
    if im.mode.startswith("I;16") or im.mode == "I":
        array = np.asarray(im).astype(np.float32)
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(
                f"image: expected 16-bit values 0..65535, got {array.min():.0f} .. {array.max():.0f}; rescale it"
            )
        return Picture(torch.from_numpy(array / 65535)[None], 16)
    if im.mode == "La":  # premultiplied grey converts to nothing else
        im = im.convert("LA")
    if im.mode in ("LA", "PA", "RGBa", "RGBA") or "transparency" in im.info:
        im = im.convert("RGBA")
    elif im.mode in ("1", "L"):
        im = im.convert("L")
    elif im.mode == "F":
        return Picture(_from_array(np.asarray(im))[None])
    else:
        im = im.convert("RGB")
    array = np.asarray(im)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    pixels = np.empty(array.shape, np.float32)
    np.divide(array, np.float32(255), out=pixels, dtype=np.float32)  # moved, converted and scaled in one pass
    return Picture(torch.from_numpy(pixels))


def to_pictures(x: Any) -> tuple[list[Picture], bool]:
    """Pictures of any accepted input, and whether it was a batch (so that decode may stack them again).

    Accepts a path, a PIL image, an array (H, W), (H, W, C) or (B, H, W, C), a tensor (C, H, W), (H, W) or
    (B, C, H, W), or a list of these. Floats must lie in [0, 1]; uint8 and uint16 are scaled.
    """
    if isinstance(x, (list, tuple)):
        if not x:
            raise ValueError("expected at least one image, got an empty list")
        return [p for item in x for p in to_pictures(item)[0]], True
    if isinstance(x, (str, Path)):
        return [read_picture(x)], False
    if isinstance(x, (np.ndarray, Tensor)):
        last = isinstance(x, np.ndarray)
        if x.ndim != 4:
            return [_picture(x, channels_last=last)], False
        if not len(x):
            raise ValueError(f"expected at least one image, got an empty batch of shape {tuple(x.shape)}")
        return [_picture(item, channels_last=last) for item in x], True
    if hasattr(x, "mode") and hasattr(x, "convert"):
        return [picture_from_pil(x)], False
    raise ValueError(f"image: expected a path, PIL image, array, tensor or a list of them, got {type(x).__name__}")


def _picture(x: np.ndarray | Tensor, channels_last: bool) -> Picture:
    depth = 16 if str(x.dtype).endswith("uint16") else 8
    if x.ndim == 2:
        x = x[None]
    elif x.ndim == 3 and channels_last:
        x = x.transpose(2, 0, 1) if isinstance(x, np.ndarray) else x.permute(2, 0, 1)
    if x.ndim != 3 or x.shape[0] not in (1, 3, 4):
        order = "(H, W, C)" if channels_last else "(C, H, W)"
        raise ValueError(f"image: expected {order} with C = 1, 3 or 4, got shape {tuple(x.shape)} (as C, H, W)")
    if 0 in x.shape:
        raise ValueError(f"image: expected at least 1 x 1 px, got (C, H, W) = {tuple(x.shape)}")
    return Picture(_from_array(x), depth)


def _from_array(array: np.ndarray | Tensor) -> Tensor:
    x = as_tensor(array, "image") if isinstance(array, np.ndarray) else array.detach().cpu()
    if x.dtype == torch.uint8:
        return x.float() / 255
    if x.dtype == torch.uint16:
        return x.float() / 65535
    if x.dtype == torch.bool:
        return x.float()
    if not x.is_floating_point():
        raise ValueError(f"image: expected uint8, uint16 or float in [0, 1], got {x.dtype}")
    x = x.float()
    if not bool(torch.isfinite(x).all()):
        raise ValueError("image: expected finite values, got NaN or infinity")
    low, high = float(x.min()), float(x.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(
            f"image: expected float values in [0, 1], got {low:.3g} .. {high:.3g}; "
            "divide by 255, or map [-1, 1] by (x + 1) / 2"
        )
    return x.clamp(0, 1)


def to_rgb(pixels: Tensor) -> Tensor:
    """(C, H, W) -> (3, H, W): grey is repeated, RGBA is laid over white."""
    if pixels.shape[0] == 1:
        return pixels.expand(3, -1, -1)
    if pixels.shape[0] == 4:
        alpha = pixels[3:]
        return (pixels[:3] * alpha).add_(1 - alpha)
    return pixels


def from_rgb(rgb: Tensor, channels: int) -> Tensor:
    """(3, H, W) -> (channels, H, W): grey by ITU-R 601 luma, RGBA opaque."""
    if channels == 1:
        return (rgb * rgb.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    if channels == 4:
        return torch.cat([rgb, torch.ones_like(rgb[:1])])
    return rgb


def write_image(path: str | Path, x: Tensor, bit_depth: int = 8) -> None:
    """Write (C, H, W) float in [0, 1] by the suffix of ``path``; ``bit_depth`` 16 is for grey PNG and TIFF."""
    from PIL import Image

    path = Path(path)
    if x.ndim != 3 or x.shape[0] not in (1, 3, 4) or 0 in x.shape:
        raise ValueError(f"image: expected (C, H, W) with C = 1, 3 or 4, got shape {tuple(x.shape)}")
    x = x.detach().float().cpu().clamp(0, 1)
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise ValueError(f"{path}: expected an image suffix such as .png or .jpg, got {path.suffix!r}")
    if bit_depth == 16 and x.shape[0] == 1 and suffix in (".png", ".tif", ".tiff"):
        im = Image.fromarray((x[0] * 65535).round().numpy().astype(np.uint16))
    else:
        array = (x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        im = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
        if im.mode == "RGBA" and suffix in (".jpg", ".jpeg", ".bmp", ".ppm"):
            im = im.convert("RGB")
    buffer = io.BytesIO()
    im.save(buffer, format=Image.registered_extensions()[suffix])
    write_atomic(path, buffer.getvalue())
