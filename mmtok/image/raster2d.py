"""A convolutional autoencoder with a code for every cell of a grid, in raster order: VQGAN (arXiv 2012.09841).

The 2-D tokenizer that the 1-D ones are compared with, and the teacher of TiTok's first stage (MaskGIT-VQ). What any
grid of codes needs (padding, the grid behind a number of tokens) is in `mmtok.grid`, and `LatentGrid` is what `bridge`
shares.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.catalogue import Taxonomy
from mmtok.grid import GridTokenizer
from mmtok.layers.conv2d import ConvDecoder, ConvEncoder, ConvShape, edge_pad
from mmtok.quantizers import Quantizer, build_quantizer, taxonomy_of
from mmtok.tokenizer import Reconstruction
from mmtok.tokens import TokenSpec

PIXELS = ("signed", "unit")

MASKGIT_VQ = {  # the sizes of maskgit-vqgan-imagenet-f16-256, which TiTok's first stage learns from
    "width": 128,
    "multipliers": (1, 1, 2, 2, 4),
    "blocks": 2,
    "middle_attention": False,
    "patch": 1,
    "style": "maskgit",
    "pixels": "unit",
    "quantizer": {
        "type": "vq",
        "dim": 256,
        "codebook_size": 1024,
        "codebook": "gradient",
        "kmeans_init": False,
        "dead_code_threshold": 0.0,
    },
}


class LatentGrid(GridTokenizer, abc.ABC):
    """A grid of codes with a quantizer of ours between an encoder and a decoder.

    A subclass sets ``quantizer`` and writes `latent` and `pixels`. Cells that a prefix lacks decode as vectors of 0.
    """

    quantizer: Quantizer

    @abc.abstractmethod
    def latent(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], H and W multiples of ``factor`` -> z (B, T, D), what the quantizer takes."""

    @abc.abstractmethod
    def pixels(self, z_q: Tensor, height: int, width: int) -> Tensor:
        """z_q (B, T, D) -> (B, 3, height, width), not clipped; both multiples of ``factor``."""

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return self.quantizer.codebook_sizes

    def grid_codes(self, x: Tensor, num_codebooks: int | None) -> Tensor:
        return self.quantizer.encode(self.latent(edge_pad(x, self.factor)), num_codebooks)

    def grid_pixels(self, codes: Tensor, rows: int, columns: int) -> Tensor:
        z_q = F.pad(self.quantizer.decode(codes), (0, 0, 0, rows * columns - codes.shape[2]))
        return self.pixels(z_q, rows * self.factor, columns * self.factor)


class Raster2D(LatentGrid):
    """Convolutional encoder, any quantizer, convolutional decoder; ``Raster2D(**MASKGIT_VQ)`` is MaskGIT-VQ.

    Args:
        width, multipliers, blocks, attention, decoder_attention, middle_attention, patch, style: see
            `mmtok.layers.conv2d.ConvShape`; a cell has patch * 2 ** (len(multipliers) - 1) pixels of a side.
        latent_dim: channels between encoder and decoder, with a Linear to the quantizer's width and one back; None =
            the quantizer's width, without them.
        quantizer: a config of `mmtok.quantizers.build_quantizer`, with its ``dim``.
        pixels: the range that the networks see: ``signed`` [-1, 1], or ``unit`` [0, 1] as MaskGIT-VQ.
        image_size: longer side above which pictures are reduced before encoding; also sets ``spec.num_tokens``, the
            largest count, ceil(image_size / f) ** 2.
    """

    type_name = "raster2d"

    def __init__(
        self,
        width: int = 48,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 1,
        attention: Sequence[int] = (),
        decoder_attention: Sequence[int] = (),
        middle_attention: bool = True,
        patch: int = 2,
        style: str = "ldm",
        latent_dim: int | None = None,
        quantizer: Mapping[str, Any] | None = None,
        pixels: str = "signed",
        image_size: int = 256,
    ):
        shape = ConvShape(
            width,
            tuple(multipliers),
            blocks,
            tuple(attention),
            tuple(decoder_attention),
            middle_attention,
            patch,
            style,
        )
        chosen = dict(quantizer or {"type": "vq", "dim": 16, "codebook_size": 1024})
        super().__init__(
            shape.to_dict()
            | {"latent_dim": latent_dim, "quantizer": chosen, "pixels": pixels, "image_size": image_size}
        )
        if pixels not in PIXELS:
            raise ValueError(f"pixels: expected one of {PIXELS}, got {pixels!r}")
        self.pixel_range = pixels
        self.set_sizes(shape.factor, image_size)
        self.quantizer = build_quantizer(chosen)
        dim = self.quantizer.dim
        channels = dim if latent_dim is None else latent_dim
        self.encoder = ConvEncoder(shape, channels)
        self.to_quantizer = nn.Identity() if latent_dim is None else nn.Linear(channels, dim)
        self.from_quantizer = nn.Identity() if latent_dim is None else nn.Linear(dim, channels)
        self.decoder = ConvDecoder(shape, channels)

    @classmethod
    def taxonomy(cls, config: Mapping[str, Any], spec: TokenSpec) -> Taxonomy:
        """Trained as VQGAN was, unless a checkpoint says otherwise."""
        word, losses = taxonomy_of(config["quantizer"])
        return Taxonomy(
            architecture="CNN/CNN",
            input="P",
            quantization=word,
            bitrate="F",
            objective=("GAN", "Rec", *losses, "Perc"),
            auxiliary=(),
            joint=True,
            domain="N",
            rate=f"up to {spec.num_tokens}",
            order="2D",
        )

    def latent(self, x: Tensor) -> Tensor:
        return self.to_quantizer(self.encoder(x * 2 - 1 if self.pixel_range == "signed" else x))

    def pixels(self, z_q: Tensor, height: int, width: int) -> Tensor:
        x = self.decoder(self.from_quantizer(z_q), height // self.factor, width // self.factor).float()
        return x * 0.5 + 0.5 if self.pixel_range == "signed" else x

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Reconstruction:
        """(B, 3, H, W) in [0, 1] -> reconstruction of the same size; ``mask`` (B, T) keeps some cells' codes."""
        padded = edge_pad(x, self.factor)
        quantized = self.quantizer(self.latent(padded), mask)
        x_hat = self.pixels(quantized.z_q, *padded.shape[-2:])
        return Reconstruction(x_hat[..., : x.shape[2], : x.shape[3]], quantized)
