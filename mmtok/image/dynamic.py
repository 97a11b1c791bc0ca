"""Image tokens whose number depends on the picture: the dynamic tokenizer of LaVIT (arXiv 2309.04669).

Features of a frozen vision encoder -> a selector keeps some patches -> a merger puts the others into them -> codes ->
a decoder gives back the features of all patches. That much is LaVIT's, written from its description. The original
hands the features to a diffusion model; here a small transformer, which is ours, turns them into pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.catalogue import Taxonomy
from mmtok.layers.tail_drop import check_tail_drop, tail_mask
from mmtok.layers.text import TextFeatures
from mmtok.layers.token_merger import (
    NORM_EPS,
    FuserBlock,
    TokenMerger,
    TokenPredictor,
    hard_keep,
    key_bias,
    small_start,
)
from mmtok.layers.vision import build_vision
from mmtok.quantizers import build_quantizer, taxonomy_of
from mmtok.quantizers.base import Quantized
from mmtok.tokenizer import ImageTokenizer, Reconstruction
from mmtok.tokens import TokenSpec

SELECTION = {"method": "expected", "temperature": 1.0, "seed": 0, "ratio_over": "picture"}
METHODS = ("expected", "threshold", "gumbel")

PUBLISHED: dict[str, Any] = {  # LaVIT's sizes: encoder 1.01 B, selector 3 M, merger 398 M, feature decoder 403 M
    "vision": {"type": "timm", "name": "eva_giant_patch14_clip_224", "image_size": 224, "final_norm": False},
    "merger": (1408, 12, 16),
    "decoder": (1408, 12, 16),
    "mlp_ratio": 4.3637,
    "code_dim": 32,
    "quantizer": {"type": "vq", "codebook_size": 16384, "commitment_weight": 0.0},
    "keep_ratio": 1 / 3,
    "positions": False,
    "policy_eps": 1e-6,
    "selection": {"method": "threshold"},  # the released code draws, "gumbel"
    "pixels": None,  # a diffusion model in the original
}


class FeatureDecoder(nn.Module):
    """A padded sequence of code vectors -> features of all patches, read by one learnt query a patch.

    Args:
        code_dim: width of the code vectors.
        num_tokens: N, patches and largest number of codes.
        shape: (width, depth, heads).
        mlp_ratio: hidden width of a block over its width.
        feature_dim: width of the features.
    """

    def __init__(self, code_dim: int, num_tokens: int, shape: Sequence[int], mlp_ratio: float, feature_dim: int):
        super().__init__()
        dim, depth, num_heads = shape
        self.in_proj = nn.Linear(code_dim, dim)
        self.positions = nn.Parameter(torch.randn(num_tokens, dim) * 0.02)
        self.queries = nn.Parameter(torch.randn(num_tokens, dim) * 0.02)
        self.blocks = nn.ModuleList(FuserBlock(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, NORM_EPS)
        self.task = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, feature_dim))
        self.apply(small_start)

    def forward(self, z_q: Tensor, present: Tensor) -> Tensor:
        """z_q (B, T, d) in kept order, ``present`` (B, T) float, 0 where not to be read -> (B, N, feature_dim)."""
        T = z_q.shape[1]
        codes = self.in_proj(z_q) + self.positions[:T]
        bias = key_bias(present[:, None, None])
        x = self.queries.expand(len(z_q), -1, -1)
        for block in self.blocks:
            x = block(x, codes, None, bias)
        return self.task(self.norm(x))


class PixelDecoder(nn.Module):
    """Features of all patches -> a square picture; one learnt query for each patch of pixels.

    Args:
        feature_dim: width of the features.
        num_features: their number, in raster order.
        image_size, patch_size: of the picture in pixels.
        width, depth, num_heads, mlp_ratio: of the blocks.
    """

    def __init__(
        self,
        feature_dim: int,
        num_features: int,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"pixels: expected an image_size that {patch_size} px patches fill, got {image_size}")
        self.patch_size, self.side = patch_size, image_size // patch_size
        self.features_in = nn.Sequential(nn.LayerNorm(feature_dim, NORM_EPS), nn.Linear(feature_dim, width))
        self.feature_positions = nn.Parameter(torch.randn(num_features, width) * 0.02)
        self.queries = nn.Parameter(torch.randn(self.side**2, width) * 0.02)
        self.blocks = nn.ModuleList(FuserBlock(width, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.to_pixel = nn.Linear(width, 3 * patch_size**2)
        self.apply(small_start)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, D) -> (B, 3, image_size, image_size), nominally in [0, 1], not clipped."""
        context = self.features_in(features) + self.feature_positions
        x = self.queries.expand(len(features), -1, -1)
        for block in self.blocks:
            x = block(x, context)
        patches = self.to_pixel(self.norm(x)).float()
        side, p = self.side, self.patch_size
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=p, q=p) * 0.5 + 0.5


PIXELS = {"image_size": 64, "patch_size": 8, "width": 96, "depth": 3, "num_heads": 3, "gradient": False}


class Dynamic(ImageTokenizer):
    """LaVIT's dynamic tokenizer at any size; ``Dynamic(**PUBLISHED)`` has the published sizes.

    A picture is squeezed to the encoder's square, whatever its aspect, and decode stretches it back to the exact size.
    Its codes stand in raster order of the kept patches. Which patches were kept is not transmitted, here as in the
    original: the decoder knows the order only, so codes must tell the place themselves. At least one patch, the
    likeliest, is kept always. Any first T >= 1 of the codes decode; for good pictures of few tokens train with
    ``tail_drop``.

    The original's training code was never released; the author's advice is to train selector and merger first and to
    switch the quantizer on then: set ``tokenizer.quantize = False`` for a first run. It starts its codebook from the
    features of the first batch after it is on.

    Args:
        vision: config of `mmtok.layers.vision.build_vision`; no class token.
        merger: (width, blocks, heads). Another width than the features' puts a norm and a Linear before it.
        decoder: (width, blocks, heads) of the feature decoder.
        mlp_ratio: hidden width of all blocks over their width.
        code_dim: width of the code vectors; they are scaled to length 1 before the quantizer.
        quantizer: `build_quantizer`'s config without ``dim``; None = a VQ of 2048 codes.
        keep_ratio: rho, the share of patches to keep on average; 1 keeps all, without a selector.
        selection: how patches are chosen outside training, see `SELECTION` for the keys. ``expected``,
            the default, keeps the n likeliest patches, n = the sum of their probabilities rounded: as many as training
            keeps on average. ``threshold`` keeps p > .5: the same once the selector is sure of itself, far fewer before
            (after a short training with keep_ratio 1/3, hardly any). ``gumbel`` keeps with probability p, as the
            released code does even at inference; ``encode`` then draws the same noise for every picture from ``seed``,
            so that a picture always has the same codes (`select` takes a generator for fresh draws). Training always
            draws; ``temperature`` shapes its gradient. ``ratio_over``: ``picture`` draws each picture to keep_ratio,
            ``batch`` their mean, so that counts may differ.
        policy_eps: of the merger's softmax, 1e-6 for the released weights, see `policy_softmax`; 0 = a masked softmax.
        positions: add learnt positions to the merger's input, for encoders whose features tell no place. The original
            has none: its encoder's features have them.
        pixels: {"image_size", "patch_size", "width", "depth", "num_heads", "gradient"}, defaults in `PIXELS`; None =
            no pixel decoder, so only codes and features. ``gradient`` lets the loss of the pixels reach the codes; the
            original's never does.
        tail_drop: see `mmtok.layers.tail_drop`.
    """

    type_name = "dynamic"

    def __init__(
        self,
        vision: Mapping[str, Any],
        merger: Sequence[int] = (192, 3, 6),
        decoder: Sequence[int] = (192, 3, 6),
        mlp_ratio: float = 3.0,
        code_dim: int = 16,
        quantizer: Mapping[str, Any] | None = None,
        keep_ratio: float = 1 / 3,
        selection: Mapping[str, Any] | None = None,
        policy_eps: float = 0.0,
        positions: bool = True,
        pixels: Mapping[str, Any] | None = PIXELS,
        tail_drop: str = "none",
    ):
        config: dict[str, Any] = {
            "vision": dict(vision),
            "merger": list(merger),
            "decoder": list(decoder),
            "mlp_ratio": mlp_ratio,
            "code_dim": code_dim,
            "quantizer": {"type": "vq", "codebook_size": 2048} if quantizer is None else dict(quantizer),
            "keep_ratio": keep_ratio,
            "selection": {**SELECTION, **(selection or {})},
            "policy_eps": policy_eps,
            "positions": positions,
            "pixels": None if pixels is None else {**PIXELS, **pixels},
            "tail_drop": tail_drop,
        }
        super().__init__(config)
        check_tail_drop(tail_drop)
        self.selection = check_selection(config["selection"])
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio: expected a share in (0, 1], got {keep_ratio}")
        self.vision = build_vision(vision)
        if self.vision.class_token:
            raise ValueError("vision: expected no class token, since every feature is a patch; leave class_token out")
        self.num_tokens, D = self.vision.num_patches, self.vision.dim
        self.keep_ratio, self.tail_drop, self.quantize = keep_ratio, tail_drop, True
        width, depth, num_heads = merger
        self.predictor = TokenPredictor(D) if keep_ratio < 1 else None
        own_width = width == D
        self.features_in = nn.Identity() if own_width else nn.Sequential(nn.LayerNorm(D, NORM_EPS), nn.Linear(D, width))
        self.positions = nn.Parameter(torch.randn(self.num_tokens, width) * 0.02) if positions else None
        self.merger = TokenMerger(width, num_heads, depth, mlp_ratio, policy_eps, cross=keep_ratio < 1)
        self.to_code = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, code_dim))
        self.quantizer = build_quantizer({**config["quantizer"], "dim": code_dim})
        self.decoder = FeatureDecoder(code_dim, self.num_tokens, decoder, mlp_ratio, D)
        self.pixel_decoder: PixelDecoder | None = None
        self.pixel_gradient, self.image_size = False, self.vision.image_size
        if config["pixels"] is not None:
            sizes = {k: v for k, v in config["pixels"].items() if k != "gradient"}
            if unknown := sorted(set(sizes) - set(PIXELS)):
                raise ValueError(f"pixels: expected keys among {sorted(PIXELS)}, got {unknown}")
            self.pixel_decoder = PixelDecoder(D, self.num_tokens, **sizes, mlp_ratio=mlp_ratio)
            self.pixel_gradient, self.image_size = config["pixels"]["gradient"], sizes["image_size"]
        self.default_size = self.image_size

    @classmethod
    def taxonomy(cls, config: Mapping[str, Any], spec: TokenSpec) -> Taxonomy:
        """Trained as LaVIT's was, to give back features, unless a checkpoint says otherwise."""
        word, losses = taxonomy_of(config["quantizer"])
        chosen, pixels = config.get("keep_ratio", 1 / 3) < 1, config.get("pixels") or {}
        return Taxonomy(
            architecture="T/T",
            input="F",
            quantization=word,
            bitrate="A" if chosen else "F",
            objective=("Rec", *losses),
            auxiliary=("SD",),
            joint=bool(pixels.get("gradient")),
            domain="ND",
            rate=f"up to {spec.num_tokens}" if chosen else str(spec.num_tokens),
            order="2D",
        )

    def base_spec(self) -> TokenSpec:
        return TokenSpec(self.type_name, "image", self.quantizer.codebook_sizes, num_tokens=self.num_tokens)

    def working_size(self, height: int, width: int) -> tuple[int, int]:
        """The pixel decoder's square, whatever the picture's aspect."""
        del height, width
        return self.image_size, self.image_size

    def encode_size(self, height: int, width: int) -> tuple[int, int]:
        """The vision encoder's square."""
        del height, width
        return self.vision.image_size, self.vision.image_size

    def select(self, features: Tensor, method: str | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Which patches to keep.

        Args:
            features: (B, N, D) of the vision encoder.
            method: ``expected``, ``threshold`` or ``gumbel``, see the class; None = the config's.
            generator: of the Gumbel noise; None = torch's own.

        Returns:
            (B, N) float, 0 or 1, at least one 1 an item; with ``gumbel`` it has the gradient of the soft choice.
        """
        method = self.selection["method"] if method is None else method
        if method not in METHODS:
            raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
        if method != "gumbel":
            return self._choose(features, method, None)
        place = features.device if generator is None else generator.device
        return self._choose(features, method, torch.rand((*features.shape[:2], 2), generator=generator, device=place))

    def _select_alike(self, features: Tensor) -> Tensor:
        """`select` as encode uses it: with the same noise for every picture, so that batches change nothing."""
        method = self.selection["method"]
        if method != "gumbel":
            return self._choose(features, method, None)
        generator = torch.Generator().manual_seed(self.selection["seed"])
        return self._choose(features, method, torch.rand((1, self.num_tokens, 2), generator=generator))

    def _choose(self, features: Tensor, method: str, uniform: Tensor | None) -> Tensor:
        """(B, N) float; ``uniform``: of `hard_keep`, for ``gumbel``."""
        if self.predictor is None:
            return torch.ones_like(features[..., 0])
        log_probs = self.predictor(features)  # (B, N, 2)
        likely = log_probs[..., 0]
        if uniform is not None:
            keep = hard_keep(log_probs, self.selection["temperature"], uniform.to(features.device))
        elif method == "threshold":
            keep = (likely > log_probs[..., 1]).float()
        else:
            count = likely.exp().sum(1, keepdim=True).round()
            rank = likely.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            keep = (rank < count).float()
        none = keep.detach().sum(1, keepdim=True) == 0
        likeliest = F.one_hot(likely.argmax(1), self.num_tokens).to(keep.dtype)
        return torch.where(none, keep + likeliest, keep)  # a sum, so that the gradient lives on

    def merge(self, features: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Continuous merged features (B, R, width) of the kept patches, and `present` (B, R); see `TokenMerger`.

        LaVIT's language model reads these, not the codes, when it is to understand a picture.
        """
        x = self.features_in(features)
        return self.merger(x if self.positions is None else x + self.positions, keep)

    def latent(self, features: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, R, code_dim) of length 1 for the quantizer, and `present` (B, R)."""
        merged, present = self.merge(features, keep)
        return F.normalize(self.to_code(merged).float(), dim=-1), present

    def reconstruct_features(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Codes (B, Q, T) with ``lengths`` (B,) valid positions (None = all) -> features (B, N, D) of all patches."""
        T = codes.shape[2]
        valid = torch.full((len(codes),), T, device=codes.device) if lengths is None else lengths.to(codes.device)
        present = (torch.arange(T, device=codes.device) < valid[:, None]).float()
        return self.decoder(self.quantizer.decode(codes), present)

    def pixels(self, features: Tensor) -> Tensor:
        """Features (B, N, D) -> (B, 3, image_size, image_size), nominally in [0, 1]."""
        if self.pixel_decoder is None:
            raise ValueError(
                f"{self.name}: no pixel decoder here, pixels=None (the original takes a diffusion model), "
                "so it gives codes and features only; build it with pixels={...} and train that"
            )
        return self.pixel_decoder(features)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        features: Tensor | None = None,
        quantize: bool | None = None,
    ) -> Reconstruction:
        """Reconstruct pixels and features.

        Args:
            x: (B, 3, H, W) in [0, 1].
            mask: (B, num_tokens) bool, false at places in the kept order that decode must not see.
            features: (B, N, D) of ``vision`` for x, computed beforehand; None = computed here.
            quantize: false skips the quantizer; None = the attribute ``quantize``.

        Returns:
            x_hat like x. ``aux`` holds ``feature_loss`` = mean of 1 - cos(feature, reconstructed feature), and
            ``ratio_loss`` = mean over pictures of (keep_ratio - kept share)^2: LaVIT's L is the first plus 2 times the
            second (arXiv 2309.04669, section 3.1); ``mean_tokens``, the mean number of kept patches; and
            ``features``, the reconstructed ones (B, N, D).
        """
        target = self.vision(x) if features is None else features.float()
        if target.shape[1:] != (self.num_tokens, self.vision.dim):
            expected = f"(B, {self.num_tokens}, {self.vision.dim})"
            raise ValueError(f"features: expected {expected} of this encoder, got {tuple(target.shape)}")
        keep = self.select(target, "gumbel") if self.training else self._select_alike(target)
        z, present = self.latent(target, keep)
        read = present
        if mask is None and self.training:
            mask = tail_mask(self.tail_drop, len(z), z.shape[1], z.device)
        if mask is not None:
            read = read * mask[:, : z.shape[1]]
        valid = read > 0
        if self.quantize if quantize is None else quantize:
            quantized = self.quantizer(z, valid)
        else:
            codes = torch.zeros(len(z), self.quantizer.num_codebooks, z.shape[1], dtype=torch.int64, device=z.device)
            quantized = Quantized(torch.where(valid[..., None], z, 0.0), codes, z.new_zeros(()), {})
        restored = self.decoder(quantized.z_q, read)
        x_hat = self.pixels(restored if self.pixel_gradient else restored.detach())
        if x_hat.shape != x.shape:
            x_hat = F.interpolate(x_hat, x.shape[-2:], mode="bicubic", align_corners=False, antialias=True)
        restored = restored.float()
        share, per_picture = keep.mean(1), self.selection["ratio_over"] == "picture"
        aux = {
            "feature_loss": (1 - F.cosine_similarity(target, restored, dim=-1)).mean(),
            "ratio_loss": (self.keep_ratio - (share if per_picture else share.mean())).square().mean(),
            "mean_tokens": share.detach().mean() * self.num_tokens,
            "features": restored,
        }
        return Reconstruction(x_hat, quantized, aux)

    def encode_pixels(
        self, x: Tensor, num_codebooks: int | None, num_tokens: int | None, text: TextFeatures | None
    ) -> tuple[Tensor, Tensor]:
        features = self.vision(x)
        keep = self._select_alike(features)
        z, present = self.latent(features, keep)
        codes = self.quantizer.encode(z, num_codebooks, present > 0)[..., :num_tokens]
        return codes, (present > 0).sum(1).clamp(max=codes.shape[2])

    def decode_pixels(
        self,
        codes: Tensor,
        height: int,
        width: int,
        text: TextFeatures | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        return self.pixels(self.reconstruct_features(codes))


def check_selection(selection: Mapping[str, Any]) -> dict[str, Any]:
    """The selection's settings; ValueError for a method, key or value that does not exist."""
    if unknown := sorted(set(selection) - set(SELECTION)):
        raise ValueError(f"selection: expected keys among {sorted(SELECTION)}, got {unknown}")
    if selection["ratio_over"] not in ("picture", "batch"):
        raise ValueError(f"selection: expected ratio_over to be picture or batch, got {selection['ratio_over']!r}")
    if selection["method"] not in METHODS or selection["temperature"] <= 0:
        raise ValueError(
            f"selection: expected a method of {METHODS} and a temperature > 0, got {selection['method']!r} "
            f"and {selection['temperature']}"
        )
    return dict(selection)
