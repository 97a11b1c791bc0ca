"""JPEG, WebP, AVIF and JPEG 2000 by Pillow, as files in memory and as tokenizers whose codes are the files' bytes."""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtok.catalogue import Family, Taxonomy
from mmtok.data import images as image_io
from mmtok.tokenizer import stack
from mmtok.tokens import Tokens, TokensError, TokenSpec, side_value
from mmtok.wrappers.bytes_tokenizer import BYTE, NO_WEIGHTS, BytesTokenizer, file_of, setting_of
from mmtok.wrappers.cut_pictures import (
    MAX_BYTES,
    FileError,
    Readable,
    readable_avif,
    readable_jpeg,
    readable_jpeg2000,
    readable_webp,
)

BARE_PIXELS = 2**24  # of a file that comes without its size, so that a few written bytes cannot ask for gigabytes
GREY = 128 / 255  # what JPEG's decoder takes for blocks that are missing


@dataclasses.dataclass(frozen=True)
class ImageCodec:
    """How Pillow writes one format.

    Args:
        pillow_format, pillow_feature: its names there.
        setting_name: what the setting is called, with its unit.
        settings: the legal ones.
        max_side: pixels, the format's or its writer's own limit.
        readable: looks through a file before Pillow does.
        options: of Pillow's `save`, for the smallest file.
    """

    pillow_format: str
    pillow_feature: str
    setting_name: str
    settings: range
    max_side: int
    readable: Callable[[bytes], Readable]
    options: dict[str, Any]

    def save_options(self, setting: int) -> dict[str, Any]:
        if self.pillow_format == "JPEG2000":
            return {**self.options, "quality_mode": "rates", "quality_layers": [setting]}
        return {**self.options, "quality": setting}


# Quality 0 is 1 to libjpeg, so its scale starts there, and Pillow advises against more than 95. JPEG 2000 is set by the
# compression ratio, not by decibels, because like bytes are what one compares at; it is a bare codestream, since the
# boxes of a .jp2 file cost 85 bytes more. Its lossy (9-7) wavelet is the one that other codecs are to be compared with.
IMAGE_CODECS: dict[str, ImageCodec] = {
    "jpeg": ImageCodec(
        *("JPEG", "jpg", "quality", range(1, 96), 65500, readable_jpeg),
        {"optimize": True, "subsampling": "4:2:0"},
    ),
    "webp": ImageCodec("WEBP", "webp", "quality", range(101), 16383, readable_webp, {"method": 6}),
    "avif": ImageCodec(
        *("AVIF", "avif", "quality", range(101), 32768, readable_avif),
        {"speed": 6, "subsampling": "4:2:0"},
    ),
    "jpeg2000": ImageCodec(
        *("JPEG2000", "jpg_2000", "compression ratio against 24 bits a pixel", range(1, 1001), 2**31 - 1),
        *(readable_jpeg2000, {"irreversible": True, "no_jp2": True}),
    ),
}


def encode_image(image: Tensor, codec: str, setting: int) -> bytes:
    """The file of one image.

    Args:
        image: (3,H,W) float in [0,1]; rounded to 8 bits.
        codec: key of `IMAGE_CODECS`.
        setting: on that codec's scale.

    Raises:
        ValueError: another shape, type or range, an unknown codec, a setting off the scale, a picture that the format
            cannot hold.
        ImportError: a Pillow without that codec.
    """
    entry = image_codec(codec)
    if setting not in entry.settings:
        legal = f"{entry.settings[0]}..{entry.settings[-1]}"
        raise ValueError(f"{entry.setting_name}: expected {legal} for {codec}, got {setting}")
    _require_image(image)
    if max(image.shape) > entry.max_side:
        raise ValueError(
            f"image: expected sides of at most {entry.max_side} px for {codec}, got {tuple(image.shape[1:])}; shrink it"
        )
    _require_pillow(codec)
    from PIL import Image

    pixels = (image.detach().cpu().float() * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)  # (H,W,3)
    buffer = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(pixels.numpy()))
    picture.save(buffer, entry.pillow_format, **entry.save_options(setting))
    return buffer.getvalue()


def decode_image(data: bytes, codec: str, size: tuple[int, int] | None = None) -> Tensor:
    """The picture of a file, or of the beginning of one.

    What was cut off is grey (JPEG), coarse (JPEG 2000) or arbitrary (WebP); AVIF decodes whole files only.

    Args:
        data: what `encode_image` wrote, any prefix of it, or anything else: nothing is allocated before the size that
            the file declares is known to be right.
        codec: key of `IMAGE_CODECS`.
        size: (H, W) that the picture has; None: what the file says, up to 2^24 pixels.

    Returns:
        (3,H,W) float32 in [0,1].

    Raises:
        ValueError: an unknown codec, or bytes that are no such picture.
        ImportError: a Pillow without that codec.
    """
    entry = image_codec(codec)
    _require_pillow(codec)
    found = entry.readable(data)
    if found.size is None and size is None:
        raise FileError(f"the size of the picture is not among its first {len(data)} bytes; give more of them")
    height, width = size or found.size or (0, 0)
    if found.size not in (None, (height, width)):
        raise FileError(f"expected a picture of {height} x {width} px, the file says {found.size}")
    if size is None and not 0 < height * width <= BARE_PIXELS:
        raise FileError(f"expected 1..{BARE_PIXELS} px where the size does not stand beside the file, got {found.size}")
    if found.data is None:
        return torch.full((3, height, width), GREY)
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size was checked
            with Image.open(io.BytesIO(found.data), formats=[entry.pillow_format]) as picture:
                if picture.size != (width, height):
                    raise FileError(f"expected {height} x {width} px, got {picture.height} x {picture.width}")
                pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)  # (H,W,3)
    except FileError:
        raise
    except Exception as e:  # Pillow's readers raise nearly anything on broken files
        raise FileError(f"no readable {codec} file ({type(e).__name__}: {e})") from e
    return torch.from_numpy(pixels / 255.0).permute(2, 0, 1).contiguous()


def image_codec(codec: str) -> ImageCodec:
    if codec not in IMAGE_CODECS:
        raise ValueError(f"codec: expected one of {sorted(IMAGE_CODECS)}, got {codec!r}")
    return IMAGE_CODECS[codec]


def _require_pillow(codec: str) -> None:
    from PIL import features

    if not features.check(IMAGE_CODECS[codec].pillow_feature):
        raise ImportError(f"this Pillow was built without {codec}; install the wheel: pip install 'pillow>=11.3'")


def _require_image(image: Tensor) -> None:
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape or not image.is_floating_point():
        raise ValueError(
            f"image: expected float (3,H,W) in [0,1], got {image.dtype} {tuple(image.shape)}; "
            "convert to RGB and divide uint8 by 255"
        )
    if not bool(torch.isfinite(image).all()) or float(image.min()) < -1e-4 or float(image.max()) > 1 + 1e-4:
        raise ValueError(
            f"image: expected finite values in [0,1], got {float(image.min()):.4g}..{float(image.max()):.4g}; "
            "rescale it"
        )


class ClassicalImage(BytesTokenizer):
    """Pictures as the bytes of a JPEG, WebP, AVIF or JPEG 2000 file; any H x W that the format holds.

    Every picture is coded as RGB with 8 bits, as other image tokenizers see it: grey is repeated and comes back grey,
    RGBA is laid over white and comes back opaque. The number of tokens is the length of the file, 2^24 at most.
    """

    modality = "image"

    def __init__(self, codec: str, setting: int):
        super().__init__(FAMILIES[codec], setting)
        _require_pillow(codec)
        self.codec = codec

    def base_spec(self) -> TokenSpec:
        return TokenSpec(self.name, "image", (BYTE,), num_tokens=MAX_BYTES)

    def encode(
        self,
        x: Any,
        sample_rate: int | None = None,
        text: Any = None,
        num_codebooks: int | None = None,
        num_tokens: int | None = None,
    ) -> Tokens:
        """Encode a path, PIL image, array, tensor or a list of them; see `mmtok.data.images.to_pictures`.

        With ``num_tokens`` only the first bytes, which AVIF cannot decode. Raises ValueError naming expected and got
        for a wrong shape, dtype, range or NaN, and for a picture whose file is above 2^24 bytes.
        """
        if sample_rate is not None:
            raise ValueError(f"{self.name}: sample_rate is for audio; leave it out for images")
        self._check_conditions(text)
        self._check_counts(num_codebooks, num_tokens)
        pictures, _ = image_io.to_pictures(x)
        files = [encode_image(image_io.to_rgb(p.pixels), self.codec, self.setting) for p in pictures]
        if max(map(len, files)) > MAX_BYTES:
            raise ValueError(
                f"{self.name}: expected files of at most {MAX_BYTES} bytes, got {max(map(len, files))}; "
                "shrink the picture or choose a coarser setting"
            )
        side = {
            "height": [p.pixels.shape[1] for p in pictures],
            "width": [p.pixels.shape[2] for p in pictures],
            "channels": [p.pixels.shape[0] for p in pictures],
            "bit_depth": [p.bit_depth for p in pictures],
        }
        return self.tokens_of(files, side, num_tokens)

    def decode(
        self,
        tokens: Tokens,
        text: Any = None,
        size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | list[Tensor]:
        """Pictures in [0, 1] with the input's height, width and channels: (B, C, H, W), or a list when they differ.

        Args:
            size: (H, W) to scale the decoded pictures to.
            generator: unused; nothing is drawn.

        Raises:
            TokensError: bytes that are no such file, of another size than stands beside them, or cut where the format
                does not allow it.
        """
        del generator
        tokens = self.checked(tokens, text)
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size: expected (height, width) of at least 1, got {size}")
        if size is not None and size[0] * size[1] > image_io.MAX_PIXELS:
            raise ValueError(f"size: expected at most {image_io.MAX_PIXELS} px, got {size[0]} x {size[1]}")
        if len(tokens) and int(tokens.lengths.max()) > MAX_BYTES:
            raise TokensError(f"lengths: expected at most {MAX_BYTES} tokens an image, got {int(tokens.lengths.max())}")
        out = [self._picture(tokens[i], size) for i in range(len(tokens))]
        return stack(out) if out else torch.zeros(0, 3, 1, 1)

    def _picture(self, item: Tokens, size: tuple[int, int] | None) -> Tensor:
        sides = range(1, image_io.MAX_PIXELS + 1)
        height, width = (side_value(item, key, 0, sides) for key in ("height", "width"))
        channels = side_value(item, "channels", 3, (1, 3, 4))
        if height * width > image_io.MAX_PIXELS:
            raise TokensError(f"side: expected at most {image_io.MAX_PIXELS} px, got {height} x {width}")
        try:
            rgb = decode_image(file_of(item), self.codec, (height, width) if height and width else None)
        except ValueError as e:
            raise TokensError(f"{self.name}: {e}; the codes were cut or changed since they were encoded") from e
        if size is not None and tuple(rgb.shape[1:]) != tuple(size):
            scaled = torch.nn.functional.interpolate(
                rgb[None], size, mode="bicubic", align_corners=False, antialias=True
            )
            rgb = scaled[0].clamp(0, 1)
        return image_io.from_rgb(rgb, channels)


def _family(codec: str, title: str, architecture: str, quality: int, debian: str) -> Family:
    entry = IMAGE_CODECS[codec]

    def open_setting(source: str) -> ClassicalImage:
        return ClassicalImage(codec, setting_of(FAMILIES[codec], source, entry.settings))

    return Family(
        name=codec,
        title=title,
        modality="image",
        source=f"{entry.setting_name} {entry.settings[0]}..{entry.settings[-1]}",
        example=f"{codec}:{quality}",
        package="pillow",
        install=f"comes with mmtok: pip install mmtok; programs of the same codec: apt install {debian}",
        code_licence="MIT-CMU",
        weights_licence=NO_WEIGHTS,
        taxonomy=Taxonomy(
            architecture=architecture,
            input="P",
            quantization="SQ",
            bitrate="A",
            objective=(),
            auxiliary=(),
            joint=False,
            domain="ND",
            rate="bytes of the file, 8 bits each",
            order="file",
        ),
        open=open_setting,
    )


JPEG = _family("jpeg", "JPEG, 4:2:0, optimal Huffman codes (libjpeg-turbo)", "DCT/DCT", 50, "libjpeg-turbo-progs")
WEBP = _family("webp", "WebP, lossy (libwebp)", "DCT/DCT", 50, "webp")
AVIF = _family("avif", "AVIF, 4:2:0: a key frame of AV1 (libavif)", "DCT/DCT", 50, "libavif-bin")
JPEG2000 = _family("jpeg2000", "JPEG 2000, lossy wavelet (OpenJPEG)", "DWT/DWT", 40, "libopenjp2-tools")
FAMILIES = {entry.name: entry for entry in (JPEG, WEBP, AVIF, JPEG2000)}
