"""1-D binary latents for images: the autoencoder of Instella-T2I (arXiv 2506.21022), written from its description.

A few learnt latents are prepended to the image tokens and attend to them jointly; each latent becomes ``num_bits``
bits. The decoder reads the latents beside mask tokens of any grid, so one code decodes at any H x W.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.catalogue import Taxonomy
from mmtok.layers.resize import RESIZE, grid_positions, grid_sines
from mmtok.layers.tail_drop import tail_mask
from mmtok.layers.text import TextFeatures
from mmtok.layers.transformer import Block, RMSNorm, rope_tables
from mmtok.quantizers import build_quantizer, taxonomy_of
from mmtok.tokenizer import ImageTokenizer, Reconstruction
from mmtok.tokens import TokenSpec

PUBLISHED = {  # the sizes of the released Instella-T2I autoencoder, about 428 M parameters
    "num_tokens": 128,
    "num_bits": 64,
    "patch_size": 16,
    "encoder": (768, 12, 8),
    "decoder": (1024, 16, 8),
    "head_dim": 64,
    "mlp_ratio": 4.0,
    "axes_dims": (8, 28, 28),
    "rope": "mixed",
    "span": 64,
    "resize": "dc",
    "image_size": 1024,
}


class Stack(nn.Module):
    """Blocks over [latents; image tokens] that change the image grid once, after ``resize_after`` blocks."""

    def __init__(
        self,
        shape: Sequence[int],
        head_dim: int,
        mlp_ratio: float,
        axes_dims: Sequence[int],
        rope: str,
        resize: nn.Module,
        factor: float,
    ):
        super().__init__()
        dim, depth, self.resize_after = shape
        self.blocks = nn.ModuleList(Block(dim, head_dim, mlp_ratio) for _ in range(depth))
        self.resize, self.factor = resize, factor
        self.axes_dims, self.rope = tuple(axes_dims), rope

    def _tables(self, num_latents: int, height: int, width: int, span: float, device: torch.device) -> Tensor:
        latent = torch.zeros(num_latents, 3, device=device)
        latent[:, 0] = torch.arange(num_latents, device=device)
        grid = F.pad(grid_positions(height, width, span, device), (1, 0))  # axis 0 is the latents'
        return rope_tables(torch.cat([latent, grid]), self.axes_dims, self.rope)

    def forward(self, latents: Tensor, image: Tensor, height: int, width: int, span: float) -> tuple[Tensor, Tensor]:
        N = latents.shape[1]
        x = torch.cat([latents, image], 1)  # (B, N + H W, D)
        tables = self._tables(N, height, width, span, x.device)
        for i in range(len(self.blocks) + 1):
            if i == self.resize_after:
                image = self.resize(x[:, N:], height, width)
                height, width = int(height * self.factor), int(width * self.factor)
                x = torch.cat([x[:, :N], image], 1)
                tables = self._tables(N, height, width, span * self.factor, x.device)
            if i < len(self.blocks):
                x = self.blocks[i](x, tables)
        return x[:, :N], x[:, N:]


class Binary1D(ImageTokenizer):
    """Instella-T2I's binary autoencoder at any size; ``Binary1D(**PUBLISHED)`` is the published one.

    Args:
        num_tokens: latents, T of the codes.
        num_bits: bits of each latent; the codes pack them, 8 to a level unless ``quantizer`` says otherwise.
        patch_size: pixels of an image token; the grid is halved once inside, so sizes are padded (edge pixels
            repeated) to multiples of 2 * patch_size and cut again.
        encoder, decoder: (width, depth, blocks before the grid is halved or doubled); 0 and depth change it
            at the pixels' end, which is the cheapest.
        head_dim: width of an attention head, the sum of ``axes_dims`` (latent index, row, column).
        mlp_ratio: SwiGLU hidden width over the block's width.
        rope: ``rotary``, or ``mixed`` as the released weights need it (see `layers.transformer.rope_tables`).
        span: positions are rescaled to 0 .. span - 1 at the finest grid, whatever the image's size.
        resize: ``dc`` (convolution and shortcut, the released code) or ``linear`` (2 x 2 merging, the paper's text).
        absolute_positions: add fixed 2-D sines to image and mask tokens. The original has rotary positions only, so at
            the start all mask tokens are alike but for whom they attend to, and a short run stays at the mean colour.
        image_size: longer side above which pictures are reduced before encoding.
        quantizer: further arguments of `BinaryQuantizer` (kind, bits_per_code, temperature, weights of its losses); or,
            with a ``type`` of `mmtok.quantizers.QUANTIZERS`, another quantizer with its arguments (num_bits is unused
            then), for comparisons.

    ``tail_drop`` is an attribute, since only training reads it: set it to ``uniform`` or ``powers``
    (`mmtok.layers.tail_drop`) and every ``tokens.keep(num_tokens=k)`` decodes well afterwards.
    """

    type_name = "binary1d"

    def __init__(
        self,
        num_tokens: int = 64,
        num_bits: int = 64,
        patch_size: int = 8,
        encoder: Sequence[int] = (192, 4, 0),
        decoder: Sequence[int] = (192, 6, 6),
        head_dim: int = 64,
        mlp_ratio: float = 8 / 3,
        axes_dims: Sequence[int] = (8, 28, 28),
        rope: str = "rotary",
        span: int = 64,
        resize: str = "linear",
        absolute_positions: bool = False,
        image_size: int = 256,
        quantizer: Mapping[str, Any] | None = None,
    ):
        config: dict[str, Any] = {
            "num_tokens": num_tokens,
            "num_bits": num_bits,
            "patch_size": patch_size,
            "encoder": list(encoder),
            "decoder": list(decoder),
            "head_dim": head_dim,
            "mlp_ratio": mlp_ratio,
            "axes_dims": list(axes_dims),
            "rope": rope,
            "span": span,
            "resize": resize,
            "absolute_positions": absolute_positions,
            "image_size": image_size,
            "quantizer": dict(quantizer or {}),
        }
        super().__init__(config)
        if sum(axes_dims) != head_dim or any(d % 2 for d in axes_dims):
            raise ValueError(f"axes_dims: expected three even widths that sum to {head_dim}, got {tuple(axes_dims)}")
        if resize not in RESIZE:
            raise ValueError(f"resize: expected one of {sorted(RESIZE)}, got {resize!r}")
        self.num_tokens, self.patch_size, self.span, self.max_size = num_tokens, patch_size, span, image_size
        self.absolute_positions, self.tail_drop = absolute_positions, "none"
        down, up = RESIZE[resize]
        enc_dim, dec_dim = encoder[0], decoder[0]
        shared = (head_dim, mlp_ratio, axes_dims, rope)
        self.patch = nn.Conv2d(3, enc_dim, patch_size, stride=patch_size)
        self.latents = nn.Parameter(torch.randn(num_tokens, enc_dim) * 0.02)
        self.encoder = Stack(encoder, *shared, resize=down(enc_dim), factor=0.5)
        self.encoder_norm = RMSNorm(enc_dim)
        self.encoder_out = nn.Linear(enc_dim, enc_dim)
        binary = {"type": "binary", "num_bits": num_bits} if "type" not in config["quantizer"] else {}
        self.quantizer = build_quantizer({**binary, **config["quantizer"], "dim": enc_dim})
        self.decoder_in = nn.Sequential(RMSNorm(enc_dim), nn.Linear(enc_dim, dec_dim))
        self.mask_token = nn.Parameter(torch.randn(dec_dim) * 0.02)
        self.decoder = Stack(decoder, *shared, resize=up(dec_dim), factor=2)
        self.decoder_norm = RMSNorm(dec_dim)
        self.to_pixel = nn.Linear(dec_dim, 3 * patch_size**2)

    @classmethod
    def taxonomy(cls, config: Mapping[str, Any], spec: TokenSpec) -> Taxonomy:
        """Trained as Instella-T2I's autoencoder was, unless a checkpoint says otherwise."""
        word, losses = taxonomy_of({"type": "binary", **(config.get("quantizer") or {})})
        return Taxonomy(
            architecture="T/T",
            input="P",
            quantization=word,
            bitrate="F",
            objective=("GAN", "Rec", *losses, "Perc"),
            auxiliary=(),
            joint=True,
            domain="ND",
            rate=str(spec.num_tokens),
            order="1D",
        )

    def base_spec(self) -> TokenSpec:
        return TokenSpec(self.type_name, "image", self.quantizer.codebook_sizes, num_tokens=self.num_tokens)

    def latent(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], H and W multiples of 2 * patch_size -> z (B, num_tokens, D)."""
        tokens = self.patch(x * 2 - 1)  # (B, D, h, w)
        h, w = tokens.shape[-2:]
        image = rearrange(tokens, "b d h w -> b (h w) d")
        if self.absolute_positions:
            image = image + grid_sines(h, w, self.span, image.shape[-1], image.device).to(image.dtype)
        latents = self.latents.expand(len(x), -1, -1).to(image.dtype)
        z, _ = self.encoder(latents, image, h, w, self.span)
        return self.encoder_out(self.encoder_norm(z))

    def pixels(self, z_q: Tensor, height: int, width: int) -> Tensor:
        """z_q (B, T, D) -> (B, 3, H, W), not clipped; H and W multiples of 2 * patch_size."""
        h, w = height // (2 * self.patch_size), width // (2 * self.patch_size)
        latents = self.decoder_in(z_q)
        masks = self.mask_token.to(latents.dtype).expand(len(z_q), h * w, -1)
        if self.absolute_positions:
            masks = masks + grid_sines(h, w, self.span, masks.shape[-1], masks.device).to(masks.dtype)
        _, image = self.decoder(latents, masks, h, w, self.span / 2)
        patches = self.to_pixel(self.decoder_norm(image))
        x = rearrange(
            patches, "b (h w) (p q c) -> b c (h p) (w q)", h=2 * h, w=2 * w, p=self.patch_size, q=self.patch_size
        )
        return x.float() * 0.5 + 0.5

    def _pad(self, x: Tensor) -> Tensor:
        unit = 2 * self.patch_size
        return F.pad(x, (0, -x.shape[3] % unit, 0, -x.shape[2] % unit), mode="replicate")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Reconstruction:
        """(B, 3, H, W) in [0, 1] -> reconstruction of the same size; ``mask`` (B, num_tokens) keeps some latents."""
        padded = self._pad(x)
        if mask is None and self.training:
            mask = tail_mask(self.tail_drop, len(x), self.num_tokens, x.device)
        quantized = self.quantizer(self.latent(padded), mask)
        x_hat = self.pixels(quantized.z_q, *padded.shape[-2:])
        return Reconstruction(x_hat[..., : x.shape[2], : x.shape[3]], quantized)

    def encode_pixels(
        self, x: Tensor, num_codebooks: int | None, num_tokens: int | None, text: TextFeatures | None
    ) -> tuple[Tensor, Tensor]:
        codes = self.quantizer.encode(self.latent(self._pad(x)), num_codebooks)[..., :num_tokens]
        return codes, torch.full((len(x),), codes.shape[2])

    def decode_pixels(
        self,
        codes: Tensor,
        height: int,
        width: int,
        text: TextFeatures | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        unit = 2 * self.patch_size
        z_q = self.quantizer.decode(codes)
        z_q = F.pad(z_q, (0, 0, 0, self.num_tokens - z_q.shape[1]))  # tokens cut off are 0, as those that forward masks
        padded = self.pixels(z_q, -(-height // unit) * unit, -(-width // unit) * unit)
        return padded[..., :height, :width]
