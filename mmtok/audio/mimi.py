"""Mimi (arXiv 2410.00037, section 3.3): a causal codec of 12.5 frames a second whose first level carries meaning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.audio.stream import StreamingTokenizer
from mmtok.catalogue import Taxonomy
from mmtok.layers.conv1d import Past
from mmtok.layers.seanet_elu import EluDecoder, EluEncoder, FrameDown, FrameUp
from mmtok.layers.stream_transformer import StreamTransformer
from mmtok.quantizers.base import masked_mean
from mmtok.quantizers.split import SplitResidualVectorQuantizer
from mmtok.tokenizer import Reconstruction
from mmtok.tokens import TokenSpec

FRAME_STRIDE = 2  # of the learnt resampling between the transformers and the quantizer


class Mimi(StreamingTokenizer):
    """Causal convolutions, a causal transformer and a stride of 2 on either side of a split residual quantizer; mono.

    All of it is causal with a bounded memory, so it streams: `encode_stream` and `decode_stream` go on where the call
    before ended, and long sound is processed through the same state, piece by piece. In a batch nothing after an item's
    end reaches its frames. The defaults are the published sizes (kyutai/mimi, 79.3 M parameters, hop 1920).

    A clip is zero-padded to whole frames, as kyutai's package does. transformers pads at every layer instead: for a
    clip that is no multiple of the hop its last frame may have other codes, all before are the same.

    Args:
        sample_rate: Hz.
        strides: of the convolutional encoder, in order; the decoder mirrors them. The hop is twice their product.
        width: channels at the sample rate; they double at each stride.
        dim: D of the transformers and of the latent.
        depth, num_heads, mlp_dim: layers of each transformer, their heads and the width of their MLP.
        context: positions, two a frame, that a layer of the transformers sees.
        num_codebooks: Q, the semantic level and the acoustic ones together; Moshi uses 8 of 32.
        codebook_size: K. codebook_dim: width of the codes, below D: the quantizer projects.
        quantizer_dropout: share of training items that use a random number of levels.
        semantic_dim: width of the features that the first level is trained to predict; None: no such head.
        chunk_seconds: how much sound is worked on at once, which bounds memory and changes nothing else.
    """

    type_name = "mimi"

    def __init__(
        self,
        sample_rate: int = 24000,
        strides: Sequence[int] = (4, 5, 6, 8),
        width: int = 64,
        dim: int = 512,
        depth: int = 8,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        context: int = 250,
        num_codebooks: int = 32,
        codebook_size: int = 2048,
        codebook_dim: int = 256,
        quantizer_dropout: float = 0.0,
        semantic_dim: int | None = None,
        chunk_seconds: float = 10.0,
    ):
        config: dict[str, Any] = {
            "sample_rate": sample_rate,
            "strides": list(strides),
            "width": width,
            "dim": dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_dim": mlp_dim,
            "context": context,
            "num_codebooks": num_codebooks,
            "codebook_size": codebook_size,
            "codebook_dim": codebook_dim,
            "quantizer_dropout": quantizer_dropout,
            "semantic_dim": semantic_dim,
            "chunk_seconds": chunk_seconds,
        }
        super().__init__(config)
        strides = tuple(strides)
        self.sample_rate, self.hop_length = sample_rate, FRAME_STRIDE * math.prod(strides)
        self.stream_frames = max(1, int(chunk_seconds * sample_rate / self.hop_length))
        shape = (dim, depth, num_heads, mlp_dim, context)
        self.encoder = EluEncoder(width, strides, dim)
        self.encoder_transformer = StreamTransformer(*shape)
        self.down = FrameDown(dim, FRAME_STRIDE)
        self.quantizer = SplitResidualVectorQuantizer(
            dim, num_codebooks, codebook_size, codebook_dim, quantizer_dropout=quantizer_dropout
        )
        self.up = FrameUp(dim, FRAME_STRIDE)
        self.decoder_transformer = StreamTransformer(*shape)
        self.decoder = EluDecoder(width, strides[::-1], dim)
        self.semantic_head = None if semantic_dim is None else nn.Linear(dim, semantic_dim)

    @classmethod
    def taxonomy(cls, config: Mapping[str, Any], spec: TokenSpec) -> Taxonomy:
        """The survey's row of Mimi."""
        del config
        return Taxonomy(
            architecture="CNN+T/CNN+T",
            input="T",
            quantization="RVQ",
            bitrate="F",
            objective=("GAN", "Feat", "Rec", "VQ"),
            auxiliary=("SD",),
            joint=True,
            domain="S",
            rate=f"{spec.frame_rate:g}",
            streamable=True,
        )

    def base_spec(self) -> TokenSpec:
        rate = self.sample_rate / self.hop_length
        quantizer = self.quantizer
        return TokenSpec(self.type_name, "audio", quantizer.codebook_sizes, quantizer.level_strides, frame_rate=rate)

    def latent(self, x: Tensor, past: Past | None = None) -> Tensor:
        """(B, 1, T * hop) -> z (B, T, D)."""
        h = self.encoder_transformer(self.encoder(x, past).transpose(1, 2), past)  # (B, 2 T, D)
        return self.down(h.transpose(1, 2), past=past).transpose(1, 2)

    def sound(self, z_q: Tensor, past: Past | None = None) -> Tensor:
        """z_q (B, T, D) -> (B, 1, T * hop)."""
        h = self.decoder_transformer(self.up(z_q.transpose(1, 2), past).transpose(1, 2), past)  # (B, 2 T, D)
        return self.decoder(h.transpose(1, 2), past)

    def forward(self, x: Tensor, mask: Tensor | None = None, semantic_target: Tensor | None = None) -> Reconstruction:
        """Reconstruct; with ``semantic_target`` ``aux["semantic"]`` is the distillation loss of the first level.

        The loss is the mean over valid frames of 1 - cos(head(z_q of level 1), target) (section 3.3.1). The paper's
        targets are WavLM's 50 Hz features, averaged over 8 of them at a step of 4, looking to both sides.

        Args:
            x: (B, 1, L), L a multiple of the hop.
            mask: (B, T) bool, true where a frame is valid.
            semantic_target: (B, T, semantic_dim) features of a frozen teacher.

        Raises:
            ValueError: a target of another shape, or without ``semantic_dim``.
        """
        quantized = self.quantizer(self.latent(x), mask)
        aux = {}
        if semantic_target is not None:
            aux["semantic"] = self._distillation(quantized.z_q_first, semantic_target, mask)
        return Reconstruction(self.sound(quantized.z_q), quantized, aux)

    def _distillation(self, z_q_first: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        """Cosine distance of the first level's z_q (B, T, D), through the head, to ``target`` (B, T, semantic_dim)."""
        if self.semantic_head is None:
            raise ValueError("semantic_target: expected none, since there is no head for it; build with semantic_dim=")
        expected = (*z_q_first.shape[:2], self.semantic_head.out_features)
        if tuple(target.shape) != expected:
            raise ValueError(
                f"semantic_target: expected shape {expected} (B, T, semantic_dim), got {tuple(target.shape)}; "
                f"pool the teacher's features to one vector for each {self.hop_length} samples"
            )
        distance = 1 - F.cosine_similarity(self.semantic_head(z_q_first).float(), target.detach().float(), dim=-1)
        return masked_mean(distance[..., None], mask)

    @torch.no_grad()
    def encode_stream(self, x: Tensor, past: Past, num_codebooks: int | None = None) -> Tensor:
        """The codes (B, Q, n) of the next n frames (B, 1, n * hop) of the streams whose state is ``past``.

        Encoder and decoder may share one `Past`. Its size is bounded by the context and the convolutions' kernels.

        Raises:
            ValueError: no whole frames, or another number of streams than before.
        """
        hop, L = self.hop_length, x.shape[-1]
        if x.ndim != 3 or x.shape[1] != 1 or L % hop:
            raise ValueError(
                f"x: expected (B, 1, n * {hop}) samples, got {tuple(x.shape)}; keep what is left of a frame until the "
                f"rest of it is there, or fill it up with zeros at the end"
            )
        self._check_streams(past, self.down, x.shape[0])
        if L == 0:
            Q = self.quantizer.num_codebooks if num_codebooks is None else num_codebooks
            return torch.zeros(x.shape[0], Q, 0, dtype=torch.int64, device=x.device)
        return self.quantizer.encode(self.latent(x, past), num_codebooks)

    @torch.no_grad()
    def decode_stream(self, codes: Tensor, past: Past) -> Tensor:
        """The samples (B, 1, n * hop) of the next n frames of codes (B, Q, n); see `encode_stream`."""
        self._check_streams(past, self.up, codes.shape[0])
        if codes.shape[-1] == 0:
            return torch.zeros(codes.shape[0], 1, 0, device=codes.device)
        return self.sound(self.quantizer.decode(codes), past)

    def _check_streams(self, past: Past, layer: nn.Module, B: int) -> None:
        if layer in past.kept and past.kept[layer].shape[0] != B:
            before = past.kept[layer].shape[0]
            raise ValueError(f"expected {before} streams, as in the call before, got {B}; start new ones with Past()")

    def encode_samples(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        del lengths  # causal: what lies behind an item's end reaches none of its frames
        past, parts = Past(), x.split(self.stream_frames * self.hop_length, -1)
        return torch.cat([self.encode_stream(part, past, num_codebooks) for part in parts], 2)

    def decode_samples(self, codes: Tensor, lengths: Tensor) -> Tensor:
        del lengths
        past, parts = Past(), codes.split(self.stream_frames, -1)
        return torch.cat([self.decode_stream(part, past) for part in parts], -1)
