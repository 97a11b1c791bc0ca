"""Causal 1-D codes of images: SEED's tokenizer (arXiv 2307.08041; SEED-2: 2310.01218), written from its description.

A frozen vision encoder -> a causal Q-Former whose last query is trained against captions -> vector quantization ->
the Q-Former's output again (for retrieval by codes) and one semantic image embedding, which the original hands to a
diffusion model (`image.unclip`). The pixel decoder is ours, so that the codes also decode by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.catalogue import Taxonomy
from mmtok.image.semantic_head import build_head
from mmtok.layers.qformer import QFormer
from mmtok.layers.tail_drop import check_tail_drop, tail_mask
from mmtok.layers.text import TextFeatures, build_text_encoder
from mmtok.layers.vision import build_vision
from mmtok.layers.vit import ViT, ViTBlock
from mmtok.quantizers import Codebook, build_quantizer, taxonomy_of
from mmtok.quantizers.sync import gather_rows, world_size
from mmtok.tokenizer import ImageTokenizer, Reconstruction
from mmtok.tokens import TokenSpec

_PLAIN = {"codebook": "gradient", "kmeans_init": False, "dead_code_threshold": 0.0}
# The released training weighs the two terms of VQ the wrong way round; the paper's text means the second. Its codebook
# starts from U(-1/K, 1/K), ours from N(0, 1/dim); `kmeans_init` and `dead_code_threshold` are remedies that it lacks.
LEGACY = {**_PLAIN, "commitment_weight": 1.0, "codebook_weight": 0.25}
TEXTBOOK = {**_PLAIN, "commitment_weight": 0.25, "codebook_weight": 1.0}

PUBLISHED = {  # SEED-2 as its public checkpoint has it: 986 M of vision, 105 M of Q-Former
    "num_tokens": 32,
    "causal": True,
    "vision": {
        "type": "timm",
        "name": "eva_giant_patch14_clip_224",
        "image_size": 224,
        "depth": 39,
        "class_token": True,
        "final_norm": False,
    },
    "qformer": {"dim": 768, "depth": 12, "num_heads": 12, "cross_attention_freq": 2, "mlp_ratio": 4.0, "dropout": 0.1},
    "quantizer": {"type": "vq", "dim": 32, "codebook_size": 8192, **LEGACY},
    "blocks": (4, 12, 4.0),
    "head": {"type": "B", "widths": [256, 128, 32]},
    "embedding_dim": 1024,
    "pixel_decoder": None,
    "contrastive": None,
}
LOSS_WEIGHTS = {"quantizer": 5.0, "feature_loss": 2.0, "embedding_loss": 0.5}  # of the original's second stage


class PixelDecoder(nn.Module):
    """[learnt grid; tokens] -> blocks -> the pixels of each grid cell."""

    def __init__(
        self,
        token_dim: int,
        num_tokens: int,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 2.0,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size: expected a multiple of patch_size {patch_size}, got {image_size}")
        self.patch_size, self.side = patch_size, image_size // patch_size
        self.grid = nn.Parameter(torch.randn(self.side**2, dim) * 0.02)
        self.token_positions = nn.Parameter(torch.randn(num_tokens, dim) * 0.02)
        self.token_in = nn.Linear(token_dim, dim)
        self.vit = ViT(dim, depth, num_heads, mlp_ratio)
        self.to_pixel = nn.Linear(dim, 3 * patch_size**2)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, D) -> (B, 3, image_size, image_size), not clipped."""
        tokens = self.token_in(tokens) + self.token_positions
        grid = self.grid.to(tokens.dtype).expand(len(tokens), -1, -1)
        cells = self.vit(torch.cat([grid, tokens], 1))[:, : self.side**2]
        p = self.patch_size
        x = rearrange(self.to_pixel(cells), "b (h w) (p q c) -> b c (h p) (w q)", h=self.side, p=p, q=p)
        return x.float() * 0.5 + 0.5


class Causal1D(ImageTokenizer):
    """SEED at any size; ``Causal1D(**PUBLISHED)`` is SEED-2. A picture is read as a square, whatever its aspect.

    Stage 1 trains the Q-Former by ``aux["contrastive_loss"]`` alone; then `start_stage2` freezes it and the rest learns
    by the quantizer's loss, ``feature_loss``, ``embedding_loss`` (`LOSS_WEIGHTS`: the original's balance) and pixels.
    All of them at once work too. `forward` always runs everything; weights of 0 leave a part untrained.

    Args:
        num_tokens: queries, T of the codes.
        causal: query i attends to queries up to i: a code never depends on later queries.
        vision: of `layers.vision.build_vision`; frozen.
        qformer: of `layers.qformer.QFormer` without feature_dim and causal; ``text_vocab`` gives it a text branch.
        quantizer: of `build_quantizer`; its ``dim`` is the width of the codes. See `LEGACY` and `TEXTBOOK`.
        blocks: (depth, num_heads, mlp_ratio) of both branches behind the codes.
        head: {"type": "B", "widths": ...} or {"type": "A", "depth": ...}; see `semantic_head.build_head`.
        embedding_dim: width of the semantic embedding; None = the vision encoder's, which then is its default target.
        pixel_decoder: {"dim", "depth", "num_heads", "patch_size", "mlp_ratio"} of `PixelDecoder`; None = no pixels:
            decode raises, and forward's ``x_hat`` is (B, 3, 0, 0).
        image_size: side of the square that the pixel decoder makes.
        contrastive: {"dim": of the common space, "text_dim": of given sentence embeddings; unused with a text branch};
            None = no projections, as in the released weights.
        text_encoder: of `layers.text.build_text_encoder`, for strings given to `embed_text`.
        tail_drop: see `mmtok.layers.tail_drop`.
    """

    type_name = "causal1d"

    def __init__(
        self,
        num_tokens: int = 16,
        causal: bool = True,
        vision: Mapping[str, Any] | None = None,
        qformer: Mapping[str, Any] | None = None,
        quantizer: Mapping[str, Any] | None = None,
        blocks: Sequence[float] = (1, 4, 2.0),
        head: Mapping[str, Any] | None = None,
        embedding_dim: int | None = None,
        pixel_decoder: Mapping[str, Any] | None = None,
        image_size: int = 64,
        contrastive: Mapping[str, Any] | None = None,
        text_encoder: Mapping[str, Any] | None = None,
        tail_drop: str = "none",
    ):
        vision = dict(vision or {"type": "efficientnet_lite0", "image_size": 224})
        qformer = dict(qformer or {"dim": 192, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0, "dropout": 0.0})
        head = dict(head or {"type": "B", "widths": [64, 32]})
        config: dict[str, Any] = {
            "num_tokens": num_tokens,
            "causal": causal,
            "vision": vision,
            "qformer": qformer,
            "quantizer": dict(quantizer or {"type": "vq", "dim": 16, "codebook_size": 1024}),
            "blocks": list(blocks),
            "head": head,
            "embedding_dim": embedding_dim,
            "pixel_decoder": None if pixel_decoder is None else dict(pixel_decoder),
            "image_size": image_size,
            "contrastive": None if contrastive is None else dict(contrastive),
            "text_encoder": None if text_encoder is None else dict(text_encoder),
            "tail_drop": tail_drop,
        }
        super().__init__(config)
        check_tail_drop(tail_drop)
        self.num_tokens, self.image_size, self.tail_drop = num_tokens, image_size, tail_drop
        self.default_size = image_size
        self.stage2 = False
        D, (depth, num_heads, mlp_ratio) = qformer["dim"], blocks
        self.vision = build_vision(vision)
        self.ln_vision = nn.LayerNorm(self.vision.dim)
        self.queries = nn.Parameter(torch.randn(num_tokens, D) * 0.02)
        self.qformer = QFormer(**qformer, feature_dim=self.vision.dim, causal=causal)
        self.quantizer = build_quantizer(config["quantizer"])
        d = self.quantizer.dim
        self.encode_task = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, d))
        self.decode_task = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, D))
        for name in ("feature", "image"):
            self.register_parameter(f"{name}_positions", nn.Parameter(torch.randn(num_tokens, D) * 0.02))
            stack = nn.ModuleList(ViTBlock(D, int(num_heads), mlp_ratio, eps=1e-6) for _ in range(int(depth)))
            self.add_module(f"{name}_blocks", stack)
        self.embedding_dim = embedding_dim or self.vision.dim
        self.head = build_head(head, D, num_tokens, self.embedding_dim, qformer)
        self.pixel_decoder = None if pixel_decoder is None else PixelDecoder(D, num_tokens, image_size, **pixel_decoder)
        self.vision_proj: nn.Linear | None = None
        if contrastive is not None:
            self.vision_proj = nn.Linear(D, contrastive["dim"])
            self.text_dim = D if self.qformer.text_vocab else contrastive["text_dim"]
            self.text_proj = nn.Linear(self.text_dim, contrastive["dim"])
            self.temperature = nn.Parameter(torch.tensor(0.07))

    @classmethod
    def taxonomy(cls, config: Mapping[str, Any], spec: TokenSpec) -> Taxonomy:
        """Trained as SEED was, in two stages and to give back features, unless a checkpoint says otherwise."""
        word, losses = taxonomy_of(config["quantizer"])
        left_to_right = config.get("causal", True) or config.get("tail_drop", "none") != "none"
        return Taxonomy(
            architecture="Q/T",
            input="F",
            quantization=word,
            bitrate="F",
            objective=("Rec", *losses, "Con"),
            auxiliary=("SD",),
            joint=False,
            domain="ND",
            rate=str(spec.num_tokens),
            order="1D causal" if left_to_right else "1D",
        )

    def base_spec(self) -> TokenSpec:
        sizes, strides = self.quantizer.codebook_sizes, self.quantizer.level_strides
        return TokenSpec(self.type_name, "image", sizes, level_strides=strides, num_tokens=self.num_tokens)

    def start_stage2(self) -> None:
        """Freeze the Q-Former and all else that stage 1 trains, and keep its dropout off, as the original does.

        Codebooks that start from k-means start again, from the latents of the Q-Former that is now trained.
        """
        stage1 = [self.qformer, self.ln_vision]
        if self.vision_proj is not None:
            stage1 += [self.vision_proj, self.text_proj]
            self.temperature.requires_grad_(False)
        for module in stage1:
            module.requires_grad_(False)
        self.queries.requires_grad_(False)
        for book in self.quantizer.modules():
            if isinstance(book, Codebook) and book.kmeans_init:
                book.initialized.fill_(False)
                book.load_state_dict(book.state_dict())  # makes the codebook look at the flag again
        self.stage2 = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Causal1D:
        super().train(mode)
        if self.stage2:
            self.qformer.eval()
        return self

    def query(self, x: Tensor | None, features: Tensor | None = None) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1], or the vision encoder's features of them -> Q-Former output (B, T, D)."""
        if features is None and x is None:
            raise ValueError("expected pictures x or features, got neither")
        read: Tensor = self.vision(x) if features is None else features.float()
        return self.qformer(self.queries.expand(len(read), -1, -1), self.ln_vision(read))

    def decoded(self, z_q: Tensor) -> Tensor:
        """z_q (B, T', d) -> (B, num_tokens, D); tokens cut off are 0, as those that a mask drops in training."""
        return self.decode_task(F.pad(z_q, (0, 0, 0, self.num_tokens - z_q.shape[1])))

    def _branch(self, name: str, up: Tensor) -> Tensor:
        x = up + getattr(self, f"{name}_positions")
        for block in getattr(self, f"{name}_blocks"):
            x = block(x)
        return x

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        features: Tensor | None = None,
        embedding: Tensor | None = None,
        text_embedding: Tensor | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Reconstruction:
        """(B, 3, H, W) in [0, 1] -> reconstruction of the same size, and named losses in ``aux``.

        ``feature_loss``: 1 - cosine to the Q-Former's output, which it does not move. ``embedding_loss``: mean squared
        error of the semantic embedding. ``contrastive_loss``: where a text is given.

        Args:
            mask: (B, num_tokens) bool keeps some tokens. features: (B, N, F) of ``vision`` for these pictures.
            embedding: (B, embedding_dim) target, e.g. CLIP's. None = the mean over the patches of ``features``,
                normalised to mean 0 and variance 1 over its numbers, so that the loss of knowing nothing is 1; where
                ``embedding_dim`` is not the vision encoder's, there is no ``embedding_loss`` then.
            text_embedding: (B, text_dim) of the captions; or, with a text branch, text_ids and text_mask (B, S).
        """
        read: Tensor = self.vision(x) if features is None else features.float()
        h = self.query(None, read)  # (B, T, D)
        if mask is None and self.training:
            mask = tail_mask(self.tail_drop, len(x), self.num_tokens, x.device)
        quantized = self.quantizer(self.encode_task(h), mask)
        up = self.decoded(quantized.z_q)
        aux = {"feature_loss": 1 - F.cosine_similarity(self._branch("feature", up).float(), h.detach(), -1).mean()}
        if embedding is None and self.embedding_dim == self.vision.dim:
            mean = read[:, int(self.vision.class_token) :].mean(1)
            embedding = F.layer_norm(mean, mean.shape[1:])
        if embedding is not None:
            if embedding.shape != (len(x), self.embedding_dim):
                raise ValueError(f"embedding: expected ({len(x)}, {self.embedding_dim}), got {tuple(embedding.shape)}")
            predicted = self.head(self._branch("image", up)).float()
            aux["embedding_loss"] = F.mse_loss(predicted, embedding.float())
        if text_embedding is not None or text_ids is not None:
            text = self._text(text_embedding, text_ids, text_mask)
            aux["contrastive_loss"] = contrastive_loss(self._projected(h), text, self.temperature)
        if self.pixel_decoder is None:
            return Reconstruction(x.new_zeros(len(x), 3, 0, 0), quantized, aux)
        x_hat = self.pixel_decoder(up)
        if x_hat.shape != x.shape:
            x_hat = F.interpolate(x_hat, x.shape[-2:], mode="bicubic", align_corners=False, antialias=True)
        return Reconstruction(x_hat, quantized, aux)

    def _projected(self, h: Tensor) -> Tensor:
        if self.vision_proj is None:
            raise ValueError("this tokenizer has no common space with text; build it with contrastive={'dim': ...}")
        return F.normalize(self.vision_proj(h[:, -1]).float(), dim=-1)

    def _text(self, embedding: Tensor | None, ids: Tensor | None, mask: Tensor | None) -> Tensor:
        if self.vision_proj is None:
            raise ValueError("this tokenizer has no common space with text; build it with contrastive={'dim': ...}")
        if self.qformer.text_vocab:
            if ids is None:
                raise ValueError("text: expected text_ids for this Q-Former's text branch, got a sentence embedding")
            mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
            return F.normalize(self.text_proj(self.qformer.text(ids, mask)[:, 0]).float(), dim=-1)
        if embedding is None or embedding.shape[-1] != self.text_dim:
            got = "none (there is no text branch for ids)" if embedding is None else tuple(embedding.shape)
            raise ValueError(f"text: expected sentence embeddings (B, {self.text_dim}), got {got}")
        return F.normalize(self.text_proj(embedding.float()).float(), dim=-1)

    def embed(self, x: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """The causal embedding: pictures, or features of them -> unit vectors (B, contrastive dim)."""
        return self._projected(self.query(x, features))

    def embed_codes(self, codes: Tensor) -> Tensor:
        """The same from the codes (B, Q, T'), any prefix: what the paper's retrieval by codes compares with texts."""
        return self._projected(self._branch("feature", self.decoded(self.quantizer.decode(codes))))

    def embed_text(
        self,
        text: Sequence[str] | Tensor | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Strings, or sentence embeddings (B, text_dim), or word ids of the text branch -> unit vectors (B, dim)."""
        if text is not None and not isinstance(text, Tensor):
            if self.config["text_encoder"] is None:
                raise ValueError("text: this tokenizer names no text encoder; pass sentence embeddings (B, text_dim)")
            if self._text_encoder is None:
                self._text_encoder = build_text_encoder(self.config["text_encoder"])
            text = self._text_encoder.embed(text).to(self.device)
        return self._text(text, text_ids, text_mask)

    def image_embedding(self, codes: Tensor) -> Tensor:
        """Codes (B, Q, T'), any prefix -> the semantic image embedding (B, embedding_dim)."""
        return self.head(self._branch("image", self.decoded(self.quantizer.decode(codes)))).float()

    def encode_size(self, height: int, width: int) -> tuple[int, int]:
        return self.vision.image_size, self.vision.image_size

    def working_size(self, height: int, width: int) -> tuple[int, int]:
        return self.image_size, self.image_size

    def encode_pixels(
        self, x: Tensor, num_codebooks: int | None, num_tokens: int | None, text: TextFeatures | None
    ) -> tuple[Tensor, Tensor]:
        codes = self.quantizer.encode(self.encode_task(self.query(x)), num_codebooks)[..., :num_tokens]
        return codes, torch.full((len(x),), codes.shape[2])

    def decode_pixels(
        self, codes: Tensor, height: int, width: int, text: TextFeatures | None, generator: torch.Generator | None
    ) -> Tensor:
        if self.pixel_decoder is None:
            raise ValueError(
                f"{self.name} has no pixel decoder: its codes decode to a semantic embedding. Make pictures with "
                f"mmtok.image.unclip.unclip_pictures and a diffusion model, or train one with pixel_decoder={{...}}"
            )
        return self.pixel_decoder(self.decoded(self.quantizer.decode(codes)))


def with_all_ranks(rows: Tensor) -> Tensor:
    """rows (N_rank, D) of every rank, in their order; the own ones carry the gradient, times the number of ranks.

    A loss over the joined rows then has on each rank its gradient through that rank's rows alone, and the mean over
    the ranks, which data-parallel training takes, is the gradient of one process with the joined batch.
    """
    ranks = world_size()
    if ranks == 1:
        return rows
    counts = gather_rows(torch.tensor([[len(rows)]], device=rows.device)).flatten().tolist()
    start = sum(counts[: dist.get_rank()])
    everyone = gather_rows(rows.detach())
    own = rows.detach() + ranks * (rows - rows.detach())
    return torch.cat([everyone[:start], own, everyone[start + len(rows) :]])


def contrastive_loss(image: Tensor, text: Tensor, temperature: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """InfoNCE in both directions over the batches of all ranks (arXiv 2301.12597, section 3.1), fp32.

    Args:
        image, text: (N, D) unit vectors, pair by pair. temperature: scalar, held in [0.001, 0.5].
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text = with_all_ranks(image.float()), with_all_ranks(text.float())
        similarity = image @ text.T / temperature.float().clamp(0.001, 0.5)
        pairs = torch.arange(len(image), device=image.device)
        rows = F.cross_entropy(similarity, pairs, label_smoothing=label_smoothing)
        columns = F.cross_entropy(similarity.T, pairs, label_smoothing=label_smoothing)
    return (rows + columns) / 2
