"""The pictures of the claim recipes: crops of everything, and captioned pictures as squares split by caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmtok.data.captioned import caption_split, square, style_of
from mmtok.data.packed import Packed, image_reader, pack, random_crop
from mmtok.data.sources import Source, find_sources

ASSETS = Path(__file__).resolve().parents[2] / "mmtok" / "assets"


def sampling_weights(sources: Sequence[Source]) -> list[float]:
    """Photographs are half of all crops where there are any, whatever their count."""
    photos = sum(s.kind == "photo" for s in sources)
    if not photos or photos == len(sources):
        return [1.0] * len(sources)
    return [0.5 / photos if s.kind == "photo" else 0.5 / (len(sources) - photos) for s in sources]


def packed_training_pictures(data: Path, cache: Path) -> Packed:
    """All pictures of the training split, longer side at most 384 px."""
    sources = [s for s in find_sources(data, "image") if s.split == "train"]
    return pack([s.path for s in sources], cache, image_reader(384), sampling_weights(sources))


def held_out_crops(data: Path, cache: Path, split: str, size: int, per_picture: int) -> Tensor:
    """(n, 3, size, size) fixed crops of a split of the manifest, 8-bit values, drawn with seed 0."""
    sources = [s for s in find_sources(data, "image") if s.split == split]
    packed, rng = pack([s.path for s in sources], cache, image_reader(384)), np.random.default_rng(0)
    crops = [random_crop(packed[i], (size, size), rng) for i in range(len(packed)) for _ in range(per_picture)]
    return (torch.stack(crops) * 255).round() / 255


@dataclass
class Captioned:
    """Captioned pictures as squares.

    Args:
        pixels: (N, S, S, 3) uint8.
        texts: N captions.
        paths: N files.
        splits: N times ``train``, ``val`` or ``test``; pictures with one caption are in one split.
        styles: N times what kind of picture it is.
    """

    pixels: np.ndarray
    texts: list[str]
    paths: list[Path]
    splits: list[str]
    styles: list[str]

    def captions(self) -> list[str]:
        """The captions with what kind of picture it is in front: "3D emoji of red heart"."""
        return [f"{style} of {text}" for style, text in zip(self.styles, self.texts, strict=True)]

    def rows(self, split: str) -> np.ndarray:
        return np.flatnonzero(np.array(self.splits) == split)

    def images(self, rows: np.ndarray, size: int) -> Tensor:
        """(n, 3, size, size) in [0, 1]: the middle of the chosen squares."""
        margin = (self.pixels.shape[1] - size) // 2
        part = self.pixels[rows][:, margin : margin + size, margin : margin + size]
        return torch.from_numpy(np.ascontiguousarray(part)).permute(0, 3, 1, 2).float() / 255


def captioned_pictures(data: Path, cache: Path, size: int) -> Captioned:
    """Every picture of the train and val splits of the manifest that has a caption, as a square of ``size`` px.

    Test packages of the manifest stay out: they are other tests' material. Transparent pictures lie on white or a flat
    colour (`image_reader`); others than squares are padded with the mean colour of their edge. Kept in ``cache``.
    """
    chosen = [s for s in find_sources(data, "image") if s.text and s.split in ("train", "val")]
    packed = pack([s.path for s in chosen], cache / f"{size}px", image_reader(size))  # a folder holds one size
    if len(packed) != len(chosen):
        raise ValueError(f"expected {len(chosen)} readable pictures, got {len(packed)}; see {cache}/*.failures.json")
    squares = [square(packed[i], size) for i in tqdm(range(len(packed)), desc="squares", mininterval=2)]
    texts = [s.text or "" for s in chosen]
    splits, styles = [caption_split(t) for t in texts], [style_of(s) for s in chosen]
    return Captioned(np.stack(squares), texts, [s.path for s in chosen], splits, styles)


@dataclass
class SquareBatches:
    """Random windows of captioned squares, flipped half the time, with further tensors of each picture.

    Args:
        captioned: the pictures. rows: those to draw from. batch_size: B. size: px of a window, at most the square's.
        seed: of the whole run; batches are a function of (seed, index, rank).
        extra: name -> tensor whose first axis is all pictures, e.g. ``text`` (N, S, D); handed over row by row.
        move: random windows and flips; False gives the middle, unflipped, as cached features need it.
    """

    captioned: Captioned
    rows: np.ndarray
    batch_size: int
    size: int
    seed: int = 0
    extra: dict[str, Tensor] | None = None
    move: bool = True

    def __call__(self, index: int, rank: int = 0) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, index, rank, 1])
        chosen = self.rows[rng.integers(len(self.rows), size=self.batch_size)]
        margin = self.captioned.pixels.shape[1] - self.size
        if self.move:
            views = []
            for i in chosen:
                top, left = (int(v) for v in rng.integers(margin + 1, size=2))
                view = self.captioned.pixels[i, top : top + self.size, left : left + self.size]
                views.append(view[:, ::-1] if rng.random() < 0.5 else view)
            x = torch.from_numpy(np.ascontiguousarray(np.stack(views))).permute(0, 3, 1, 2).float() / 255
        else:
            x = self.captioned.images(chosen, self.size)
        picked = torch.from_numpy(chosen)
        more = {name: values[picked] for name, values in (self.extra or {}).items()}
        return {"x": x, **{k: v.float() if v.is_floating_point() else v for k, v in more.items()}}
