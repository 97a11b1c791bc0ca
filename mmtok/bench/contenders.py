"""What is compared: a tokenizer at one of its rates, ours, another package's or a classical codec, by one spelling.

``NAME`` is anything that `mmtok.load` takes; behind a ``#`` stand options:

* ``audio-codec-16k-4kbps#levels=2`` the first 2 levels; ``#levels=2,4,8`` is three contenders;
* ``image-textok-64px-16x10#tokens=8`` the first 8 tokens;
* ``image-textok-64px-16x10#text`` the items' captions are given to encode and decode;
* ``jpeg#bytes=512`` (``webp``, ``avif``, ``jpeg2000``) a classical image codec at its best setting within 512 bytes an
  item, found for each item; ``#bytes=512,768`` is two contenders;
* ``dac:FOLDER#raw`` without mmtok's mitigations. Several: ``NAME#text&tokens=8``.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtok import auto
from mmtok.bench.classical import fit_image
from mmtok.bench.records import Item, Trial
from mmtok.data import images as image_io
from mmtok.data.audio import fit_length
from mmtok.tokenizer import Tokenizer
from mmtok.tokens import Tokens
from mmtok.wrappers.bytes_tokenizer import BytesTokenizer
from mmtok.wrappers.classical_images import IMAGE_CODECS, ClassicalImage, image_codec

OPTIONS = "levels=2,4, tokens=8, bytes=512, text, raw"
ORIGINAL = "original"  # the label of the untouched items
COUNTED = ("levels", "tokens", "bytes")
FLAGS = ("text", "raw")
# What writes the files inside Pillow, and its key there.
LIBRARIES = {
    "jpeg": ("libjpeg-turbo", "libjpeg_turbo"),
    "webp": ("libwebp", "webp"),
    "avif": ("libavif", "avif"),
    "jpeg2000": ("OpenJPEG", "jpg_2000"),
}


class FittedImage(ClassicalImage):
    """A classical image codec at its best setting within a number of bytes, searched for each picture.

    A picture whose smallest file is larger costs that file: compare ``lengths`` with ``target_bytes``. The setting that
    was found stands in ``side``.

    Args:
        codec: ``jpeg``, ``webp``, ``avif`` or ``jpeg2000``.
        target_bytes: of the whole file, header included.

    Raises:
        ValueError: an unknown codec, or a target below 1. ImportError: a Pillow without that codec.
    """

    def __init__(self, codec: str, target_bytes: int):
        if target_bytes < 1:
            raise ValueError(f"{codec}#bytes: expected at least 1, got {target_bytes}")
        super().__init__(codec, image_codec(codec).settings[0])
        self.target_bytes = target_bytes
        self.config = {"family": codec, "bytes": target_bytes}
        self.name = f"{codec}#bytes={target_bytes}"

    def encode(
        self,
        x: Any,
        sample_rate: int | None = None,
        text: Any = None,
        num_codebooks: int | None = None,
        num_tokens: int | None = None,
    ) -> Tokens:
        """As `ClassicalImage.encode`, with the search; it takes about ten times as long."""
        if sample_rate is not None:
            raise ValueError(f"{self.name}: sample_rate is for audio; leave it out for images")
        self._check_conditions(text)
        self._check_counts(num_codebooks, num_tokens)
        pictures, _ = image_io.to_pictures(x)
        found = [fit_image(image_io.to_rgb(p.pixels), self.codec, self.target_bytes) for p in pictures]
        side = {
            "height": [p.pixels.shape[1] for p in pictures],
            "width": [p.pixels.shape[2] for p in pictures],
            "channels": [p.pixels.shape[0] for p in pictures],
            "bit_depth": [p.bit_depth for p in pictures],
            "setting": [setting for setting, _ in found],
        }
        return self.tokens_of([data for _, data in found], side, num_tokens)


@dataclasses.dataclass(frozen=True)
class Contender:
    """A tokenizer with the arguments of its calls.

    Args:
        label: its name in results, e.g. ``audio-codec-16k-4kbps#levels=4``.
        tokenizer: loaded, in eval mode.
        num_codebooks, num_tokens: arguments of ``encode``, None = all.
        with_text: give each item's text to ``encode`` and ``decode``.
        source: what `open_contenders` takes for the same in another process; None: the label.
    """

    label: str
    tokenizer: Tokenizer
    num_codebooks: int | None = None
    num_tokens: int | None = None
    with_text: bool = False
    source: str | None = None

    def __post_init__(self) -> None:
        if not self.label or self.label == ORIGINAL:
            raise ValueError(
                f"label: expected a name that is not {ORIGINAL!r} (the untouched items), got {self.label!r}"
            )

    @property
    def modality(self) -> str:
        return self.tokenizer.spec.modality

    @property
    def target_bytes(self) -> int | None:
        """What an item may cost where the setting is searched for each item, else None."""
        return self.tokenizer.target_bytes if isinstance(self.tokenizer, FittedImage) else None

    def encode(self, item: Item) -> Tokens:
        """The codes of one item, a batch of one.

        Raises:
            ValueError: an item without text for a contender that is given texts, or what the tokenizer refuses.
        """
        return self.tokenizer.encode(
            item.x,
            sample_rate=item.sample_rate,
            text=self._text(item),
            num_codebooks=self.num_codebooks,
            num_tokens=self.num_tokens,
        )

    def decode(self, tokens: Tokens, item: Item) -> Tensor:
        """What the codes of ``item`` decode to, in the shape of its ``reference``, float32 on the CPU.

        A package's own (``raw``) sound of another length is cut, or padded with zeros at its end, to the item's.

        Raises:
            ValueError: what the tokenizer refuses, or a reconstruction of another shape.
        """
        size = None if item.target is None else (item.target.shape[-2], item.target.shape[-1])
        generator = torch.Generator(device=self.tokenizer.device).manual_seed(0)
        x_hat = self.tokenizer.decode(tokens, text=self._text(item), size=size, generator=generator)[0]
        x_hat, wanted = x_hat.detach().float().cpu(), item.reference.shape
        if self.modality == "audio" and not self._mitigated:
            x_hat = fit_length(x_hat, wanted[-1])
        if x_hat.shape != wanted:
            raise ValueError(f"{self.label}: expected a reconstruction of {tuple(wanted)}, got {tuple(x_hat.shape)}")
        # Files have 8 bits, so pictures are compared as files: classical codecs return nothing finer.
        return (x_hat.clamp(0, 1) * 255).round() / 255 if self.modality == "image" else x_hat

    def run(self, item: Item) -> Trial:
        """Encode and decode one item."""
        started = time.perf_counter()
        tokens = self.encode(item)
        self._wait()
        encoded = time.perf_counter()
        x_hat = self.decode(tokens, item)
        decoded = time.perf_counter()
        return Trial(tokens, x_hat, float(tokens.bits[0]), encoded - started, decoded - encoded)

    def protocol(self) -> dict[str, Any]:
        """What its results depend on, as plain values, with the rate resolved.

        ``tokenizer, fingerprint``; ``package, package_version`` that compute it (``mmtok`` for our own); ``torch,
        device, dtype``; ``num_codebooks, codebook_sizes`` of the levels that are kept, ``bits_per_position``;
        ``num_tokens`` and ``bits_per_image`` of pictures (the most, where the length is dynamic), ``bitrate_bps`` of
        one channel of sound, ``target_bytes`` or ``setting`` of classical codecs; ``text``, ``mitigated``.
        """
        tok = self.tokenizer
        spec = tok.spec.keep(self.num_codebooks or tok.spec.num_codebooks)
        family = getattr(tok, "family", None)
        package = "mmtok" if family is None else family.package
        weight = next(tok.parameters(), None)
        files = isinstance(tok, BytesTokenizer)
        tokens = self.num_tokens or (None if files else spec.num_tokens)
        found = {
            "tokenizer": tok.name,
            "fingerprint": tok.fingerprint,
            "package": package,
            "package_version": auto.installed_version(package) or "unknown",
            "torch": str(torch.__version__),
            "device": _device_name(tok.device),
            "dtype": "uint8" if weight is None else str(weight.dtype).removeprefix("torch."),
            "num_codebooks": spec.num_codebooks,
            "codebook_sizes": _short(spec.codebook_sizes),
            "bits_per_position": spec.bits_per_position,
            "num_tokens": tokens,
            "bits_per_image": tokens * spec.bits_per_position if tokens and self.modality == "image" else None,
            "bitrate_bps": spec.bitrate_bps,
            "text": self.with_text,
            "mitigated": self._mitigated,
            "length": None if self._mitigated else "cut or padded with zeros to the item's",
        }
        if isinstance(tok, ClassicalImage):
            from PIL import features

            library = LIBRARIES[tok.codec]
            found["library"] = f"{library[0]} {features.version(library[1])}"
        if self.target_bytes is not None:
            found |= {
                "target_bytes": self.target_bytes,
                "setting": "the largest file within target_bytes, by bisection",
            }
        elif files:
            found["setting"] = str(tok.setting)  # pyright: ignore[reportAttributeAccessIssue]
        return {k: v for k, v in found.items() if v is not None}

    @property
    def _mitigated(self) -> bool:
        return bool(getattr(self.tokenizer, "mitigated", True))

    def _text(self, item: Item) -> list[str] | None:
        if not self.with_text:
            return None
        if item.text is None:
            raise ValueError(f"{self.label}: expected items with a text, {item.key} has none; leave #text out")
        return [item.text]

    def _wait(self) -> None:
        if self.tokenizer.device.type == "cuda":
            torch.cuda.synchronize(self.tokenizer.device)


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _short(sizes: Sequence[int]) -> list[int] | str:
    """One number for levels that are all alike: ``8 x 1024``."""
    return f"{len(sizes)} x {sizes[0]}" if len(sizes) > 1 and len(set(sizes)) == 1 else list(sizes)


def open_contenders(names: Sequence[str], device: str = "cpu", helpers: Path | None = None) -> list[Contender]:
    """Load what ``names`` spell; a tokenizer of several rates is loaded once.

    Args:
        names: see the module's text.
        device: where the weights go.
        helpers: folder of helper networks; its ``minilm`` reads the texts where a tokenizer names that encoder.

    Raises:
        ValueError: an unknown name or option, a contender twice. ImportError: a package that is not installed.
    """
    loaded: dict[str, Tokenizer] = {}
    found: list[Contender] = []
    for spelled in names:
        name, _, options = spelled.partition("#")
        wanted = _options(spelled, options)
        if "bytes" in wanted:
            found += [_fitted(spelled, name, count, wanted) for count in wanted["bytes"]]
            continue
        key = name + ("#raw" if "raw" in wanted else "")
        if key not in loaded:
            loaded[key] = _loaded(name, device, "raw" in wanted)
        tokenizer = loaded[key]
        encoder: Mapping[str, Any] = tokenizer.config.get("text_encoder") or {}
        if (
            "text" in wanted
            and helpers is not None
            and (helpers / "minilm").is_dir()
            and encoder.get("type") == "minilm"
        ):
            tokenizer.use_text_encoder(helpers / "minilm")
        for levels in wanted.get("levels", [None]):
            for count in wanted.get("tokens", [None]):
                found.append(_contender(name, tokenizer, levels, count, wanted))
    if not found:
        raise ValueError("expected at least one contender: a name of mmtok list, a folder, family:source")
    require_once([c.label for c in found])
    return found


def require_once(labels: Sequence[str]) -> None:
    """Raise ValueError for a contender that is there twice."""
    if twice := sorted({x for x in labels if labels.count(x) > 1}):
        raise ValueError(f"contenders: expected each once, got {twice} more than once")


def _options(spelled: str, text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "#" in spelled and not text:
        raise ValueError(f"{spelled}: expected options like {OPTIONS} behind the #, got none")
    for option in text.split("&") if text else []:
        key, equals, value = option.partition("=")
        flag = key in FLAGS
        if flag == bool(equals) or key not in (*COUNTED, *FLAGS) or key in found:
            raise ValueError(f"{spelled}: expected options like {OPTIONS} behind the #, got {option!r}")
        try:
            found[key] = True if flag else [int(v) for v in value.split(",")]
        except ValueError as e:
            raise ValueError(f"{spelled}: expected whole numbers behind {key}=, got {value!r}") from e
        if not flag and min(found[key]) < 1:
            raise ValueError(f"{spelled}: expected {key} of 1 or more, got {value!r}")
    return found


def _loaded(name: str, device: str, raw: bool) -> Tokenizer:
    if name in IMAGE_CODECS:
        raise ValueError(f"{name}: expected a setting ({name}:50) or bytes an item ({name}#bytes=512), got neither")
    tokenizer: Any = auto.load(name, device)
    if raw and not hasattr(tokenizer, "raw"):
        raise ValueError(f"{name}#raw: it has no mitigations to leave out; raw is for family:source")
    return (tokenizer.raw() if raw else tokenizer).eval()


def _fitted(spelled: str, name: str, target_bytes: int, wanted: Mapping[str, Any]) -> Contender:
    if name not in IMAGE_CODECS:
        raise ValueError(
            f"{spelled}: bytes= is for {', '.join(IMAGE_CODECS)} without a setting; other rates are levels= and tokens="
        )
    if others := sorted(set(wanted) - {"bytes"}):
        raise ValueError(f"{spelled}: bytes= stands alone, got {others} too")
    return Contender(f"{name}#bytes={target_bytes}", FittedImage(name, target_bytes).eval())


def _contender(
    name: str, tokenizer: Tokenizer, levels: int | None, count: int | None, wanted: Mapping[str, Any]
) -> Contender:
    options = [f"levels={levels}"] if levels else []
    options += [f"tokens={count}"] if count else []
    options += [flag for flag in FLAGS if flag in wanted]
    label = name + ("#" + "&".join(options) if options else "")
    spec = tokenizer.spec
    if levels and levels > spec.num_codebooks:
        raise ValueError(f"{label}: expected 1..{spec.num_codebooks} levels, got {levels}")
    if count and spec.num_tokens is None:
        raise ValueError(f"{label}: tokens= would cut the sound short; choose a lower rate by levels=")
    if count and spec.num_tokens is not None and count > spec.num_tokens:
        raise ValueError(f"{label}: expected 1..{spec.num_tokens} tokens, got {count}")
    if "text" in wanted and "text" not in spec.conditions:
        raise ValueError(f"{label}: it takes no text; its conditions are {list(spec.conditions)}")
    return Contender(label, tokenizer, levels, count, "text" in wanted)
