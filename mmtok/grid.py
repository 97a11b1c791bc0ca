"""Image tokenizers whose codes are the cells of a 2-D grid in raster order: what ours and other people's share."""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
from torch import Tensor

from mmtok.data.images import MAX_PIXELS
from mmtok.layers.text import TextFeatures
from mmtok.tokenizer import ImageTokenizer, stack
from mmtok.tokens import Tokens, TokensError, TokenSpec


class GridTokenizer(ImageTokenizer, abc.ABC):
    """An image tokenizer whose position t is the cell (t // w, t % w) of a grid of ``factor`` x ``factor`` pixels.

    A picture is padded to whole cells by repeating its edge pixels, and cut again; T = ceil(H / f) * ceil(W / f).
    Fewer tokens than cells are a prefix, more are an error. So that a prefix can be told from another grid, ``size=``
    resizes the decoded picture and leaves its grid as it is. A subclass calls `set_sizes`, sets ``codebook_sizes`` and
    writes `grid_codes` and `grid_pixels`.
    """

    factor: int

    @property
    @abc.abstractmethod
    def codebook_sizes(self) -> tuple[int, ...]:
        """K of each level."""

    @abc.abstractmethod
    def grid_codes(self, x: Tensor, num_codebooks: int | None) -> Tensor:
        """(B, 3, H, W) in [0, 1], of any size -> codes (B, Q, T), T = `grid` (H, W), in raster order."""

    @abc.abstractmethod
    def grid_pixels(self, codes: Tensor, rows: int, columns: int) -> Tensor:
        """Codes (B, Q, T) of the first T cells -> (B, 3, rows * factor, columns * factor)."""

    def set_sizes(self, factor: int, image_size: int) -> None:
        if image_size < 1:
            raise ValueError(f"image_size: expected at least 1 px, got {image_size}")
        self.factor, self.max_size, self.default_size = factor, image_size, image_size

    def base_spec(self) -> TokenSpec:
        largest = self.grid(self.max_size, self.max_size)
        return TokenSpec(self.type_name, "image", self.codebook_sizes, num_tokens=largest[0] * largest[1])

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of cells of a picture."""
        return -(-height // self.factor), -(-width // self.factor)

    def size_without_side(self, num_tokens: int) -> tuple[int, int]:
        """The smallest square of whole cells that has room for them: codes without a size are taken for a square."""
        side = math.isqrt(max(num_tokens - 1, 0)) + 1 if num_tokens else self.grid(self.max_size, self.max_size)[0]
        return side * self.factor, side * self.factor

    def encode_pixels(
        self, x: Tensor, num_codebooks: int | None, num_tokens: int | None, text: TextFeatures | None
    ) -> tuple[Tensor, Tensor]:
        codes = self.grid_codes(x, num_codebooks)[..., :num_tokens]
        return codes, torch.full((len(x),), codes.shape[2])

    def decode_pixels(
        self,
        codes: Tensor,
        height: int,
        width: int,
        text: TextFeatures | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        rows, columns = self.grid(height, width)
        if codes.shape[2] > rows * columns:
            raise TokensError(
                f"expected at most {rows * columns} tokens, {rows} x {columns} cells of {self.factor} px for a picture "
                f"of {height} x {width}, got {codes.shape[2]}; they belong to a picture of another size"
            )
        return self.grid_pixels(codes, rows, columns)[..., :height, :width]

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens,
        text: Any = None,
        size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | list[Tensor]:
        """As `ImageTokenizer.decode`. ``size`` resizes the picture that the codes describe (antialiased bicubic)."""
        if size is None or not {"height", "width"} <= tokens.side.keys():
            return super().decode(tokens, text, size, generator)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size: expected (height, width) of at least 1, got {size}")
        if size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"expected at most {MAX_PIXELS} px, got {size[0]} x {size[1]}; pass a smaller size=")
        pictures = super().decode(tokens, text, None, generator)
        return stack([self._resize(p[None], (size[0], size[1]))[0] for p in pictures]) if len(pictures) else pictures
