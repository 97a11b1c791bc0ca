"""Training data in one flat file: decoded once, then read at random without touching the original files again.

Batches are a pure function of (seed, index, rank): a resumed run reads what the undisturbed run would have read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmtok.data import audio as audio_io
from mmtok.data import images as image_io
from mmtok.tokens import write_atomic


@dataclasses.dataclass
class Packed:
    """``data`` is one flat array; item i lies at ``offsets[i]`` and has ``shapes[i]``; ``weights`` steer sampling."""

    data: np.ndarray
    offsets: np.ndarray
    shapes: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> np.ndarray:
        shape = self.shapes[i]
        return self.data[self.offsets[i] : self.offsets[i] + int(np.prod(shape))].reshape(shape)


def pack(
    files: Sequence[str | Path],
    folder: str | Path,
    read: Callable[[Path], np.ndarray],
    weights: Sequence[float] | np.ndarray | None = None,
) -> Packed:
    """Read every file once and keep the arrays in ``folder``; a second call with the same list opens what is there.

    What another reader of this module packed (another size, another sample rate) is packed again. Files that cannot be
    read are listed in ``<key>.failures.json`` and left out; ValueError when none can be read.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(f) for f in files]
    shares = [] if weights is None else [float(w) for w in weights]
    key = hashlib.sha256(json.dumps([paths, shares]).encode()).hexdigest()[:16]
    index, flat = folder / f"{key}.npz", folder / f"{key}.bin"
    settings = repr(read) if isinstance(read, (ImageReader, AudioReader)) else ""
    if not _is_packed(index, flat, settings):
        index.unlink(missing_ok=True)  # an older index must never stand beside the new file
        aside = folder / f".{key}.{os.getpid()}.bin"
        offsets, shapes, kept, failures, position = [], [], [], {}, 0
        dtype: np.dtype | None = None
        try:
            with aside.open("wb") as out:
                for i, path in enumerate(tqdm(paths, desc=f"packing {folder.name}", unit="file", mininterval=2)):
                    try:
                        array = read(Path(path))
                    except (ValueError, OSError) as e:
                        failures[path] = str(e)
                        continue
                    if dtype is not None and array.dtype != dtype:
                        raise TypeError(f"{path}: the reader gave {array.dtype} after {dtype}; one type a pack")
                    dtype = array.dtype
                    out.write(np.ascontiguousarray(array).tobytes())
                    offsets.append(position)
                    shapes.append(array.shape)
                    kept.append(1.0 if weights is None else float(weights[i]))
                    position += array.size
            if dtype is None:
                raise ValueError(f"none of {len(paths)} files could be read, e.g. {next(iter(failures.items()), None)}")
            write_atomic(folder / f"{key}.failures.json", json.dumps(failures, indent=1).encode())
            table = io.BytesIO()
            np.savez(table, offsets=offsets, shapes=shapes, weights=kept, dtype=dtype.str, settings=settings)
            os.replace(aside, flat)
            write_atomic(index, table.getvalue())
        finally:
            aside.unlink(missing_ok=True)
    with np.load(index) as table:
        data = np.memmap(flat, dtype=np.dtype(str(table["dtype"])), mode="r")
        return Packed(data, table["offsets"], table["shapes"], table["weights"])


def _is_packed(index: Path, flat: Path, settings: str) -> bool:
    """Whether both files are there and come from a reader with these settings ("" = unknown, which fits all)."""
    if not index.is_file() or not flat.is_file():
        return False
    with np.load(index) as table:
        found = str(table["settings"]) if "settings" in table else ""
    return "" in (found, settings) or found == settings


@dataclasses.dataclass(frozen=True)
class ImageReader:
    """See `image_reader`."""

    max_side: int

    def __call__(self, path: Path) -> np.ndarray:
        pixels = image_io.read_image(path)
        if pixels.shape[0] == 4:
            digest = hashlib.sha256(path.name.encode()).digest()
            colour = torch.tensor([1.0] * 3 if digest[0] < 128 else [c / 255 for c in digest[1:4]])
            pixels = pixels[:3] * pixels[3:] + colour[:, None, None] * (1 - pixels[3:])
        pixels = image_io.to_rgb(pixels)
        scale = self.max_side / max(pixels.shape[1:])
        if scale < 1:
            size = [max(1, round(s * scale)) for s in pixels.shape[1:]]
            pixels = torch.nn.functional.interpolate(
                pixels[None], size, mode="bicubic", align_corners=False, antialias=True
            )[0]
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def image_reader(max_side: int) -> ImageReader:
    """A reader of RGB uint8 (H, W, 3) with the longer side at most ``max_side``.

    Transparent pictures are laid over a flat colour drawn from the hash of the file's name: white for half of them.
    """
    return ImageReader(max_side)


@dataclasses.dataclass(frozen=True)
class AudioReader:
    """See `audio_reader`."""

    sample_rate: int

    def __call__(self, path: Path) -> np.ndarray:
        samples, rate = audio_io.read_audio(path)
        mono = audio_io.resample(samples.mean(0), rate, self.sample_rate)
        return (mono.clamp(-1, 1) * 32767).round().to(torch.int16).numpy()


def audio_reader(sample_rate: int) -> AudioReader:
    """A reader of mono int16 (L,) at ``sample_rate`` Hz: channels are averaged, other rates resampled."""
    return AudioReader(sample_rate)


@dataclasses.dataclass
class ImageBatches:
    """Random crops, ``batches(index, rank) -> {"x": (B, 3, H, W)}`` in [0, 1].

    Args:
        packed: RGB pictures.
        batch_size: B of one process.
        sizes: (H, W) choices, one drawn for each batch.
        seed: of the whole run.
        enlarge: smallest crop as a share of the output; below 1 crops are enlarged.
    """

    packed: Packed
    batch_size: int
    sizes: Sequence[tuple[int, int]] = ((128, 128),)
    seed: int = 0
    enlarge: float = 0.8

    def __call__(self, index: int, rank: int = 0) -> dict[str, Tensor]:
        # The size is drawn without the rank: every process of a step works on the same shape.
        shared = np.random.default_rng([self.seed, index])
        H, W = self.sizes[int(shared.integers(len(self.sizes)))]
        rng = np.random.default_rng([self.seed, index, rank, 1])
        share = self.packed.weights / self.packed.weights.sum()
        chosen = rng.choice(len(self.packed), self.batch_size, p=share)
        return {"x": torch.stack([random_crop(self.packed[int(i)], (H, W), rng, self.enlarge) for i in chosen])}


def random_crop(picture: np.ndarray, size: tuple[int, int], rng: np.random.Generator, enlarge: float = 0.8) -> Tensor:
    """A window of the wanted aspect, log-uniform in scale, resized (antialiased) to ``size``, flipped half the time."""
    h, w = picture.shape[:2]
    H, W = size
    largest = min(h / H, w / W)
    smallest = min(enlarge, largest)
    scale = float(np.exp(rng.uniform(np.log(smallest), np.log(largest))))
    ch, cw = max(1, min(h, round(H * scale))), max(1, min(w, round(W * scale)))
    top, left = int(rng.integers(h - ch + 1)), int(rng.integers(w - cw + 1))
    x = torch.from_numpy(np.array(picture[top : top + ch, left : left + cw])).permute(2, 0, 1).float() / 255
    x = torch.nn.functional.interpolate(x[None], size, mode="bicubic", align_corners=False, antialias=True)[0]
    return (x.flip(-1) if rng.random() < 0.5 else x).clamp(0, 1)


@dataclasses.dataclass
class AudioBatches:
    """Random segments, ``batches(index, rank) -> {"x": (B, 1, L)}``; shorter clips are padded with zeros.

    Args:
        packed: mono int16 clips; they are drawn in proportion to weight times length.
        batch_size: B of one process.
        num_samples: L.
        seed: of the whole run.
        gain_db: (low, high) of a random gain in dB; the result is clipped to [-1, 1].
    """

    packed: Packed
    batch_size: int
    num_samples: int
    seed: int = 0
    gain_db: tuple[float, float] = (-9.0, 3.0)

    def __call__(self, index: int, rank: int = 0) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, index, rank, 1])
        share = self.packed.weights * self.packed.shapes[:, 0]
        x = torch.zeros(self.batch_size, 1, self.num_samples)
        for b, i in enumerate(rng.choice(len(self.packed), self.batch_size, p=share / share.sum())):
            clip = self.packed[int(i)]
            start = int(rng.integers(max(1, len(clip) - self.num_samples + 1)))
            part = torch.from_numpy(clip[start : start + self.num_samples].astype(np.float32) / 32768)
            x[b, 0, : len(part)] = part * 10 ** (rng.uniform(*self.gain_db) / 20)
        return {"x": x.clamp(-1, 1)}
