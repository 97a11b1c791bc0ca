"""TiTok (arXiv 2406.07550) and TA-TiTok (arXiv 2501.07730): 1-D tokens by a plain vision transformer.

The encoder reads [class token, patches, latents] and keeps the latents; the decoder reads [class token, mask tokens,
latents, text] and keeps the mask tokens. TiTok learns in two stages over the codes of a frozen 2-D tokenizer, TA-TiTok
in one on pixels, with the caption in the decoder only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.catalogue import Taxonomy
from mmtok.image.pixel_teacher import PixelTeacher
from mmtok.image.raster2d import MASKGIT_VQ
from mmtok.layers.conv2d import edge_pad
from mmtok.layers.tail_drop import check_tail_drop, tail_mask
from mmtok.layers.text import TextFeatures, text_in_training
from mmtok.layers.vit import TextTokens, ViT, grid_embedding, key_mask_with_text
from mmtok.quantizers import build_quantizer, taxonomy_of
from mmtok.quantizers.base import Quantized
from mmtok.tokenizer import ImageTokenizer, Reconstruction
from mmtok.tokens import TokenSpec

SMALL, BASE, LARGE = (512, 8, 8), (768, 12, 12), (1024, 24, 16)  # width, depth, heads
EPS = 1e-5  # of the LayerNorms, torch's default


def _titok(num_tokens: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Sizes of the released TiTok: unit vectors in 4096 codes of 12 numbers, after the second stage."""
    book = {"codebook": "gradient", "kmeans_init": False, "dead_code_threshold": 0.0, "commitment_weight": 0.25}
    return {
        "num_tokens": num_tokens,
        "token_size": 12,
        "patch_size": 16,
        "encoder": shape,
        "decoder": shape,
        "image_size": 256,
        "quantizer": {"type": "vq", "codebook_size": 4096, "metric": "cosine", **book},
        "unit_latents": True,
        "legacy_reshape": True,
        "teacher": dict(MASKGIT_VQ),
        "stage": 2,
    }


def _tatitok(num_tokens: int) -> dict[str, Any]:
    """Sizes of the released TA-TiTok; its anchors that return dead codes (CVQ) are our revival here."""
    return {
        "num_tokens": num_tokens,
        "token_size": 64,
        "patch_size": 16,
        "encoder": BASE,
        "decoder": LARGE,
        "image_size": 256,
        "quantizer": {"type": "vq", "codebook_size": 8192, "codebook": "gradient", "commitment_weight": 0.25},
        "unit_latents": False,
        "text_encoder": {"type": "clip", "source": "clip-vit-large-patch14-336", "dim": 768, "max_tokens": 77},
    }


TITOK_S128, TITOK_B64, TITOK_L32 = _titok(128, SMALL), _titok(64, BASE), _titok(32, LARGE)
TATITOK_BL32, TATITOK_BL64, TATITOK_BL128 = _tatitok(32), _tatitok(64), _tatitok(128)


class LatentEncoder(nn.Module):
    """[class token, patches, latents] -> the latents (B, num_tokens, token_size).

    Args:
        shape: (width, depth, heads). grid: rows and columns of patches that the positions are learnt on.
        legacy_reshape: read the (N, width) latents as (width, N) without transposing before the last layer, as the
            first released weights (L32, B64, S128) were trained.
    """

    def __init__(
        self,
        shape: Sequence[int],
        grid: tuple[int, int],
        num_tokens: int,
        token_size: int,
        patch_size: int,
        legacy_reshape: bool,
    ):
        super().__init__()
        width = shape[0]
        scale = width**-0.5
        self.grid, self.num_tokens, self.patch_size, self.legacy_reshape = grid, num_tokens, patch_size, legacy_reshape
        self.patch = nn.Linear(3 * patch_size**2, width)
        self.class_token = nn.Parameter(scale * torch.randn(1, width))
        self.positions = nn.Parameter(scale * torch.randn(1 + grid[0] * grid[1], width))  # the class token's first
        self.latent_tokens = nn.Parameter(scale * torch.randn(num_tokens, width))
        self.latent_positions = nn.Parameter(scale * torch.randn(num_tokens, width))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.vit = ViT(*shape, eps=EPS)
        self.out = nn.Linear(width, token_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], H and W multiples of patch_size."""
        B, p = len(x), self.patch_size
        h, w = x.shape[2] // p, x.shape[3] // p
        patches = self.patch(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))
        patches = patches + grid_embedding(self.positions[1:], self.grid, h, w).to(patches.dtype)
        first = (self.class_token + self.positions[:1]).to(patches.dtype).expand(B, -1, -1)
        latents = (self.latent_tokens + self.latent_positions).to(patches.dtype).expand(B, -1, -1)
        tokens = self.norm(torch.cat([first, patches, latents], 1))
        y = self.vit(tokens, keep=slice(1 + h * w, 1 + h * w + self.num_tokens))  # (B, N, width)
        if self.legacy_reshape:
            y = y.reshape(B, y.shape[2], y.shape[1]).transpose(1, 2)
        return self.out(y)


class MaskDecoder(nn.Module):
    """[class token, mask tokens, latents, text] -> the mask tokens (B, h * w, width).

    Args:
        shape: (width, depth, heads). grid: as `LatentEncoder`. text_shape: width and largest count of text tokens.
    """

    def __init__(
        self,
        shape: Sequence[int],
        grid: tuple[int, int],
        num_tokens: int,
        token_size: int,
        text_shape: tuple[int, int] | None,
    ):
        super().__init__()
        width = shape[0]
        scale = width**-0.5
        self.grid, self.num_tokens = grid, num_tokens
        self.embed = nn.Linear(token_size, width)
        self.class_token = nn.Parameter(scale * torch.randn(1, width))
        self.mask_token = nn.Parameter(scale * torch.randn(1, width))
        self.positions = nn.Parameter(scale * torch.randn(1 + grid[0] * grid[1], width))
        self.latent_positions = nn.Parameter(scale * torch.randn(num_tokens, width))
        self.text = None if text_shape is None else TextTokens(text_shape[0], width, text_shape[1])
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.vit = ViT(*shape, eps=EPS)

    def forward(
        self, z_q: Tensor, height: int, width: int, text: TextFeatures | None = None, dropped: Tensor | None = None
    ) -> Tensor:
        """z_q (B, T, token_size), T <= num_tokens, missing ones are 0; ``height`` and ``width`` of the grid."""
        B = len(z_q)
        latents = self.embed(F.pad(z_q, (0, 0, 0, self.num_tokens - z_q.shape[1])))
        latents = latents + self.latent_positions.to(latents.dtype)
        masks = self.mask_token + grid_embedding(self.positions[1:], self.grid, height, width)
        masks = torch.cat([self.class_token + self.positions[:1], masks]).to(latents.dtype)
        tokens, key_mask = torch.cat([masks.expand(B, -1, -1), latents], 1), None
        if self.text is not None:
            states, mask = (None, None) if text is None else (text.states, text.mask)
            extra, mask = self.text(B, states, mask, dropped)
            key_mask = key_mask_with_text(tokens.shape[1], mask)
            tokens = torch.cat([tokens, extra.to(tokens.dtype)], 1)
        return self.vit(self.norm(tokens), key_mask, slice(1, 1 + height * width))


class TiTok(ImageTokenizer):
    """TiTok, and TA-TiTok with ``text_encoder``; ``TiTok(**TITOK_L32)``, ``TiTok(**TATITOK_BL32)`` are published sizes.

    Without ``teacher`` it learns in one stage, on pixels. With it, stage 1 minimises ``aux["proxy_loss"]`` (nats a
    cell: cross-entropy with the teacher's codes; ``x_hat`` is the teacher's decode of the prediction and carries no
    gradient), and after `start_stage2` encoder and quantizer stand still while the decoder and the teacher's pixel
    decoder learn from ``x_hat``. Weights of the teacher come by ``tokenizer.teacher.adopt(raster2d)``.

    Pictures of any H x W: the edge is repeated up to multiples of ``patch_size`` and cut again, learnt positions are
    interpolated, pictures above ``image_size`` are reduced.

    Args:
        num_tokens: T of the codes. token_size: numbers of a token, the codes' width. patch_size: pixels.
        encoder, decoder: (width, depth, heads).
        image_size: pixels of the longer side above which pictures are reduced; the positions' own grid is its square.
        quantizer: config of `build_quantizer` without ``dim``.
        unit_latents: scale latents to length 1 before the quantizer, as published with a cosine codebook. The original
            scales the codes too; ours are means of unit vectors, so that the loss brings them close to length 1.
        legacy_reshape: see `LatentEncoder`.
        teacher: config of a `Raster2D` whose cells are the patches; None = an RGB head instead.
        stage: 1 or 2, of a training with a teacher.
        text_encoder: the frozen text encoder whose features the decoder reads; None = no text. The released TA-TiTok
            reads all 77 states of CLIP, those of padding too: pass them as a tensor (B, 77, 768), without a mask.
        text_drop: share of captions replaced by a learnt null token in training; a call without text sees it too.
        tail_drop: see `mmtok.layers.tail_drop`.
    """

    type_name = "titok"

    def __init__(
        self,
        num_tokens: int = 16,
        token_size: int = 12,
        patch_size: int = 8,
        encoder: Sequence[int] = (192, 4, 4),
        decoder: Sequence[int] = (192, 4, 4),
        image_size: int = 64,
        quantizer: Mapping[str, Any] | None = None,
        unit_latents: bool = True,
        legacy_reshape: bool = False,
        teacher: Mapping[str, Any] | None = None,
        stage: int = 1,
        text_encoder: Mapping[str, Any] | None = None,
        text_drop: float = 0.1,
        tail_drop: str = "none",
    ):
        chosen = dict(quantizer or {"type": "vq", "codebook_size": 1024, "metric": "cosine"})
        config: dict[str, Any] = {
            "num_tokens": num_tokens,
            "token_size": token_size,
            "patch_size": patch_size,
            "encoder": list(encoder),
            "decoder": list(decoder),
            "image_size": image_size,
            "quantizer": chosen,
            "unit_latents": unit_latents,
            "legacy_reshape": legacy_reshape,
            "teacher": None if teacher is None else dict(teacher),
            "stage": stage,
            "text_encoder": None if text_encoder is None else dict(text_encoder),
            "text_drop": text_drop,
            "tail_drop": tail_drop,
        }
        super().__init__(config)
        check_tail_drop(tail_drop)
        if stage not in ((1,) if teacher is None else (1, 2)):
            raise ValueError(f"stage: expected 1, or 2 with a teacher, got {stage}")
        if not 0 <= text_drop <= 1:
            raise ValueError(f"text_drop: expected a share in 0..1, got {text_drop}")
        if image_size % patch_size:
            raise ValueError(f"image_size: expected a multiple of patch_size {patch_size}, got {image_size}")
        self.num_tokens, self.patch_size = num_tokens, patch_size
        self.max_size = self.default_size = image_size
        self.unit_latents, self.text_drop, self.tail_drop = unit_latents, text_drop, tail_drop
        grid = (image_size // patch_size, image_size // patch_size)
        text_shape = None if text_encoder is None else (text_encoder["dim"], text_encoder["max_tokens"])
        self.encoder = LatentEncoder(encoder, grid, num_tokens, token_size, patch_size, legacy_reshape)
        self.quantizer = build_quantizer({**chosen, "dim": token_size})
        self.decoder = MaskDecoder(decoder, grid, num_tokens, token_size, text_shape)
        width = decoder[0]
        self.teacher = None if teacher is None else PixelTeacher(teacher, stage)
        if self.teacher is None:
            self.head = nn.Linear(width, 3 * patch_size**2)
            self.smooth = nn.Conv2d(3, 3, 3, padding=1)
        else:
            if self.teacher.factor != patch_size:
                raise ValueError(f"teacher: expected cells of {patch_size} px (patch_size), got {self.teacher.factor}")
            self.head = nn.Sequential(
                nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, len(self.teacher.codebook))
            )
        self._freeze()

    @property
    def stage(self) -> int:
        return self.config["stage"]

    def start_stage2(self) -> None:
        """From codes to pixels: freeze encoder and quantizer, free the decoders, forget the teacher's encoder.

        Raises:
            ValueError: without a teacher, or in stage 2 already.
        """
        if self.teacher is None or self.stage != 1:
            raise ValueError(f"start_stage2: expected a teacher and stage 1, got {self.teacher and self.stage}")
        self.config["stage"] = 2
        self.teacher.reader = None
        self._freeze()
        self.train(self.training)

    def _freeze(self) -> None:
        if self.teacher is not None:
            second = self.stage == 2
            self.teacher.requires_grad_(second)
            self.encoder.requires_grad_(not second)
            self.quantizer.requires_grad_(not second)

    def train(self, mode: bool = True) -> TiTok:
        """As `torch.nn.Module.train`; what is frozen stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            for module in (self.encoder, self.quantizer) if self.stage == 2 else (self.teacher,):
                module.eval()
        return self

    @classmethod
    def taxonomy(cls, config: Mapping[str, Any], spec: TokenSpec) -> Taxonomy:
        """Trained as TiTok was, or TA-TiTok if it reads text, unless a checkpoint says otherwise."""
        word, losses = taxonomy_of(config["quantizer"])
        text, stages = config.get("text_encoder") is not None, config.get("teacher") is not None
        prefix = config.get("tail_drop", "none") != "none"  # then a few first tokens are a picture by themselves
        return Taxonomy(
            architecture="T/T",
            input="P",
            quantization=word,
            bitrate="F",
            objective=("GAN", "Rec", *losses, "Perc"),
            auxiliary=("TC",) if text else (),
            joint=not stages,  # in the second stage the decoder alone learns
            domain="ND" if text else "N",
            rate=str(spec.num_tokens),
            order="1D causal" if prefix else "1D",
        )

    def base_spec(self) -> TokenSpec:
        conditions = () if self.decoder.text is None else ("text",)
        sizes, strides = self.quantizer.codebook_sizes, self.quantizer.level_strides
        return TokenSpec(self.type_name, "image", sizes, strides, num_tokens=self.num_tokens, conditions=conditions)

    def latent(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], H and W multiples of patch_size -> z (B, num_tokens, token_size)."""
        z = self.encoder(x)
        return F.normalize(z.float(), dim=-1) if self.unit_latents else z

    def quantize(self, x: Tensor, mask: Tensor | None) -> Quantized:
        """What the decoder learns from: without gradient and loss in stage 2."""
        if self.stage == 1:
            return self.quantizer(self.latent(x), mask)
        with torch.no_grad():
            found = self.quantizer(self.latent(x), mask)
        return dataclasses.replace(found, loss=torch.zeros_like(found.loss))

    def cells(
        self, z_q: Tensor, height: int, width: int, text: TextFeatures | None = None, dropped: Tensor | None = None
    ) -> Tensor:
        """z_q (B, T, token_size) -> (B, h * w, C): the patches' pixels, or logits over the teacher's codes."""
        h, w = height // self.patch_size, width // self.patch_size
        return self.head(self.decoder(z_q, h, w, text, dropped))

    def pixels(self, cells: Tensor, height: int, width: int) -> Tensor:
        """What `cells` gives -> (B, 3, height, width), not clipped; both multiples of patch_size."""
        if self.teacher is not None:
            return self.teacher(cells, height, width)
        p = self.patch_size
        x = rearrange(cells, "b (h w) (p q c) -> b c (h p) (w q)", h=height // p, p=p, q=p)
        return self.smooth(x).float()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Reconstruction:
        """Reconstruct (B, 3, H, W) in [0, 1]; ``aux["proxy_loss"]`` in stage 1 with a teacher.

        Args:
            mask: (B, num_tokens) bool keeps some tokens, the others are 0; in training the tail drop's by default.
            text: (B, S, D) features of the captions; None = no text. text_mask: (B, S) bool, true at real tokens.
        """
        features, dropped = None, None
        if text is not None and self.decoder.text is not None:
            features, dropped = text_in_training(text, text_mask, self.text_drop if self.training else 0.0)
        if mask is None and self.training:
            mask = tail_mask(self.tail_drop, len(x), self.num_tokens, x.device)
        padded = edge_pad(x, self.patch_size)
        size = padded.shape[2], padded.shape[3]
        quantized = self.quantize(padded, mask)
        cells = self.cells(quantized.z_q, *size, features, dropped)
        aux: dict[str, Tensor] = {}
        if self.teacher is not None and self.stage == 1:
            aux["proxy_loss"] = F.cross_entropy(cells.float().transpose(1, 2), self.teacher.codes(padded))
            with torch.no_grad():
                x_hat = self.pixels(cells, *size)
        else:
            x_hat = self.pixels(cells, *size)
        return Reconstruction(x_hat[..., : x.shape[2], : x.shape[3]], quantized, aux)

    def encode_pixels(
        self, x: Tensor, num_codebooks: int | None, num_tokens: int | None, text: TextFeatures | None
    ) -> tuple[Tensor, Tensor]:
        z = self.latent(edge_pad(x, self.patch_size))
        codes = self.quantizer.encode(z, num_codebooks)[..., :num_tokens]
        return codes, torch.full((len(x),), codes.shape[2])

    def decode_pixels(
        self,
        codes: Tensor,
        height: int,
        width: int,
        text: TextFeatures | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        p = self.patch_size
        size = -(-height // p) * p, -(-width // p) * p
        cells = self.cells(self.quantizer.decode(codes), *size, text)
        return self.pixels(cells, *size)[..., :height, :width]
