"""TexTok (arXiv 2412.05796): a 1-D tokenizer that reads a caption; its tokens carry what the caption leaves out.

A few learnt latents attend to the patches and to the caption's tokens; the decoder reads learnt patch tokens, the
latents and the caption. The paper is continuous (8 numbers a token, no quantizer); the codes by any quantizer are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.catalogue import Taxonomy
from mmtok.layers.conv2d import edge_pad
from mmtok.layers.resize import grid_sines
from mmtok.layers.tail_drop import check_tail_drop, tail_mask
from mmtok.layers.text import TextFeatures, text_in_training
from mmtok.layers.vit import TextTokens, ViT, grid_embedding, key_mask_with_text
from mmtok.quantizers import build_quantizer, taxonomy_of
from mmtok.quantizers.base import Quantized
from mmtok.tokenizer import ImageTokenizer, Reconstruction
from mmtok.tokens import TokenSpec

PLACES = ("encoder", "decoder")
MINILM = {"type": "minilm", "source": "package", "dim": 384, "max_tokens": 32}
PUBLISHED = {  # ViT-B/8 at 256 px, T5-XL captions; about 176 M parameters without T5; num_tokens 32 to 256
    "num_tokens": 128,
    "latent_dim": 8,
    "patch_size": 8,
    "encoder": (768, 12, 12),
    "decoder": (768, 12, 12),
    "image_size": 256,
    "text_encoder": {"type": "t5", "source": "t5-v1_1-xl", "dim": 2048, "max_tokens": 128},
    "quantizer": None,
}


class TexTok(ImageTokenizer):
    """TexTok with any number of tokens and any quantizer; ``TexTok(**PUBLISHED)`` is the paper's, continuous.

    Pictures of any H x W: the edge is repeated up to multiples of ``patch_size`` and cut again, the learnt positions
    are interpolated, and pictures above ``image_size`` are reduced. Padding of a text changes nothing. The text is part
    of what decode needs: without it (or with another one) the picture differs.

    Args:
        num_tokens: N, T of the codes.
        latent_dim: numbers of a token before the quantizer, 8 in the paper.
        patch_size: pixels.
        encoder, decoder: (width, depth, heads).
        mlp_ratio: hidden width of the MLPs over the width.
        image_size: pixels of the longer side above which pictures are reduced; the positions' own grid is its square.
        text_in: where the caption is read: any of ``encoder`` and ``decoder``, or none of them.
        text_encoder: the frozen text encoder (`mmtok.layers.text.build_text_encoder`), by default the MiniLM package;
            the paper has T5-XL. Its ``dim`` and ``max_tokens`` shape the network.
        text_drop: share of captions replaced by a learnt null token in training, in the encoder and the decoder alike;
            a call without text sees the same token. The paper has none: its captions are always there.
        quantizer: config of `build_quantizer` without ``dim``; None = the paper's continuous tokens: `forward` and
            `latents` work, there are no codes.
        continuous: train without the quantizer, which then serves encode and decode only, as ``per_dimension`` after
            the training (TokenBridge) does.
        tail_drop: see `mmtok.layers.tail_drop`.
    """

    type_name = "textok"

    def __init__(
        self,
        num_tokens: int = 16,
        latent_dim: int = 8,
        patch_size: int = 8,
        encoder: Sequence[int] = (192, 4, 4),
        decoder: Sequence[int] = (192, 4, 4),
        mlp_ratio: float = 4.0,
        image_size: int = 64,
        text_in: Sequence[str] = PLACES,
        text_encoder: Mapping[str, Any] | None = None,
        text_drop: float = 0.1,
        quantizer: Mapping[str, Any] | None = None,
        continuous: bool = False,
        tail_drop: str = "none",
    ):
        text_encoder = dict(text_encoder or MINILM)
        config: dict[str, Any] = {
            "num_tokens": num_tokens,
            "latent_dim": latent_dim,
            "patch_size": patch_size,
            "encoder": list(encoder),
            "decoder": list(decoder),
            "mlp_ratio": mlp_ratio,
            "image_size": image_size,
            "text_in": list(text_in),
            "text_encoder": text_encoder,
            "text_drop": text_drop,
            "quantizer": None if quantizer is None else dict(quantizer),
            "continuous": continuous,
            "tail_drop": tail_drop,
        }
        super().__init__(config)
        check_tail_drop(tail_drop)
        if set(text_in) - set(PLACES) or len(set(text_in)) != len(text_in):
            raise ValueError(f"text_in: expected distinct places among {PLACES}, got {tuple(text_in)}")
        if not 0 <= text_drop <= 1:
            raise ValueError(f"text_drop: expected a share in 0..1, got {text_drop}")
        if image_size % patch_size:
            raise ValueError(f"image_size: expected a multiple of patch_size {patch_size}, got {image_size}")
        self.num_tokens, self.patch_size = num_tokens, patch_size
        self.max_size = self.default_size = image_size
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.text_drop, self.tail_drop = text_drop, tail_drop
        self.continuous = continuous or quantizer is None
        self.has_text = len(text_in) > 0
        enc_dim, dec_dim = encoder[0], decoder[0]
        text_shape = (text_encoder["dim"], text_encoder["max_tokens"])
        self.patch = nn.Linear(3 * patch_size**2, enc_dim)
        # Positions start as sines: equal to a table of noise in what can be learnt, but neighbours are alike from the
        # first step, and a short training reaches structure instead of the mean colour.
        self.patch_positions = nn.Parameter(grid_sines(*self.grid, max(2, self.grid[0]), enc_dim) * 0.5)
        self.latent_tokens = nn.Parameter(torch.randn(num_tokens, enc_dim) * 0.02)
        self.encoder_text = text_tokens("encoder" in text_in, enc_dim, text_shape)
        self.encoder = ViT(*encoder, mlp_ratio=mlp_ratio)
        self.to_latent = nn.Linear(enc_dim, latent_dim)
        self.quantizer = None if quantizer is None else build_quantizer({**quantizer, "dim": latent_dim})
        self.from_latent = nn.Linear(latent_dim, dec_dim)
        self.latent_positions = nn.Parameter(torch.randn(num_tokens, dec_dim) * 0.5)
        self.patch_tokens = nn.Parameter(grid_sines(*self.grid, max(2, self.grid[0]), dec_dim) * 0.5)
        self.decoder_text = text_tokens("decoder" in text_in, dec_dim, text_shape)
        self.decoder = ViT(*decoder, mlp_ratio=mlp_ratio)
        self.to_pixel = nn.Linear(dec_dim, 3 * patch_size**2)

    @classmethod
    def taxonomy(cls, config: Mapping[str, Any], spec: TokenSpec) -> Taxonomy:
        """Trained as TexTok was, unless a checkpoint says otherwise; the quantizer may come after the training."""
        word, losses = taxonomy_of(config["quantizer"])
        after = config.get("continuous", False)
        prefix = config.get("tail_drop", "none") != "none"  # then a few first tokens are a picture by themselves
        return Taxonomy(
            architecture="T/T",
            input="P",
            quantization=word,
            bitrate="F",
            objective=("GAN", "Rec", *(() if after else losses), "Perc"),
            auxiliary=("TC",) if config.get("text_in", PLACES) else (),
            joint=not after,
            domain="N",
            rate=str(spec.num_tokens),
            order="1D causal" if prefix else "1D",
        )

    def base_spec(self) -> TokenSpec:
        if self.quantizer is None:
            raise ValueError(
                "TexTok with quantizer=None is the paper's continuous tokenizer and has no codes: call forward() or "
                'latents(), or build it with a quantizer, e.g. quantizer={"type": "fsq", "levels": [8, 8, 8, 4]}'
            )
        conditions = ("text",) if self.has_text else ()
        sizes, strides = self.quantizer.codebook_sizes, self.quantizer.level_strides
        return TokenSpec(self.type_name, "image", sizes, strides, num_tokens=self.num_tokens, conditions=conditions)

    def latents(self, x: Tensor, text: TextFeatures | None = None, dropped: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) in [0, 1] of any size -> (B, num_tokens, latent_dim), before any quantizer.

        Args:
            text: features of the captions; unused where ``text_in`` leaves out the encoder.
            dropped: (B,) bool, items that see the null token instead of their caption.
        """
        x = edge_pad(x, self.patch_size)
        p = self.patch_size
        h, w = x.shape[2] // p, x.shape[3] // p
        image = self.patch(rearrange(x * 2 - 1, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p))
        image = image + grid_embedding(self.patch_positions, self.grid, h, w).to(image.dtype)
        parts = [image, self.latent_tokens.to(image.dtype).expand(len(x), -1, -1)]
        tokens, mask = joined(parts, self.encoder_text, text, dropped)
        return self.to_latent(self.encoder(tokens, mask, slice(h * w, h * w + self.num_tokens)))

    def pixels(
        self, z_q: Tensor, height: int, width: int, text: TextFeatures | None = None, dropped: Tensor | None = None
    ) -> Tensor:
        """z_q (B, T, latent_dim), T <= num_tokens -> (B, 3, height, width), not clipped; missing tokens are 0."""
        p = self.patch_size
        h, w = -(-height // p), -(-width // p)
        latents = self.from_latent(F.pad(z_q, (0, 0, 0, self.num_tokens - z_q.shape[1])))
        latents = latents + self.latent_positions.to(latents.dtype)
        image = grid_embedding(self.patch_tokens, self.grid, h, w).to(latents.dtype).expand(len(z_q), -1, -1)
        tokens, mask = joined([image, latents], self.decoder_text, text, dropped)
        patches = self.to_pixel(self.decoder(tokens, mask, slice(0, h * w)))
        x = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=p, q=p)
        return x[..., :height, :width].float() * 0.5 + 0.5

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Reconstruction:
        """Reconstruct (B, 3, H, W) in [0, 1].

        Args:
            mask: (B, num_tokens) bool keeps some tokens, the others are 0; in training the tail drop's by default.
            text: (B, S, D) features of the captions; None = no text. text_mask: (B, S) bool, true at real tokens.
        """
        features, dropped = None, None
        if text is not None and self.has_text:
            features, dropped = text_in_training(text, text_mask, self.text_drop if self.training else 0.0)
        if mask is None and self.training:
            mask = tail_mask(self.tail_drop, len(x), self.num_tokens, x.device)
        z = self.latents(x, features, dropped)
        quantized = not_quantized(z, mask) if self.continuous or self.quantizer is None else self.quantizer(z, mask)
        x_hat = self.pixels(quantized.z_q, x.shape[2], x.shape[3], features, dropped)
        return Reconstruction(x_hat, quantized)

    def encode_pixels(
        self, x: Tensor, num_codebooks: int | None, num_tokens: int | None, text: TextFeatures | None
    ) -> tuple[Tensor, Tensor]:
        assert self.quantizer is not None  # base_spec has raised before
        codes = self.quantizer.encode(self.latents(x, text), num_codebooks)[..., :num_tokens]
        return codes, torch.full((len(x),), codes.shape[2])

    def decode_pixels(
        self,
        codes: Tensor,
        height: int,
        width: int,
        text: TextFeatures | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        assert self.quantizer is not None
        return self.pixels(self.quantizer.decode(codes), height, width, text)


def text_tokens(wanted: bool, dim: int, text_shape: tuple[int, int]) -> TextTokens | None:
    return TextTokens(text_shape[0], dim, text_shape[1]) if wanted else None


def joined(
    parts: list[Tensor], place: TextTokens | None, text: TextFeatures | None, dropped: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """``parts`` (B, T, D) and the text's tokens in a row, and the key mask; without a place for text only the parts."""
    if place is None:
        return torch.cat(parts, 1), None
    states, mask = (None, None) if text is None else (text.states, text.mask)
    tokens, mask = place(len(parts[0]), states, mask, dropped)
    row = torch.cat([*parts, tokens.to(parts[0].dtype)], 1)
    return row, key_mask_with_text(row.shape[1] - tokens.shape[1], mask)


def not_quantized(z: Tensor, mask: Tensor | None) -> Quantized:
    """Continuous tokens in the place of quantized ones: no codes, no loss."""
    z = z.float() if mask is None else torch.where(mask[..., None], z.float(), 0.0)
    codes = torch.zeros(z.shape[0], 0, z.shape[1], dtype=torch.int64, device=z.device)
    return Quantized(z, codes, z.new_zeros(()), {})
