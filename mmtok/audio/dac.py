"""DAC, the Descript Audio Codec (arXiv 2306.06546), trainable, with the places of the published weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.audio.pieces import PiecewiseCodec, receptive_frames
from mmtok.catalogue import Taxonomy
from mmtok.layers.conv1d import Past, zero_past
from mmtok.layers.seanet import Decoder, Encoder
from mmtok.quantizers.rvq import ResidualVectorQuantizer
from mmtok.tokenizer import Reconstruction
from mmtok.tokens import TokenSpec

DILATIONS, KERNEL_SIZE = (1, 3, 9), 7

# The published sizes: arguments of `DAC`. The other arguments are the defaults.
DAC_16KHZ: dict[str, Any] = {"sample_rate": 16000, "strides": (2, 4, 5, 8), "num_codebooks": 12}
DAC_24KHZ: dict[str, Any] = {"sample_rate": 24000, "strides": (2, 4, 5, 8), "num_codebooks": 32}
DAC_44KHZ: dict[str, Any] = {"sample_rate": 44100, "strides": (2, 4, 8, 8), "num_codebooks": 9}


class DACDecoder(Decoder):
    """The decoder with DAC's ends: a transposed convolution of odd stride s gives s * L - 1 samples, not s * L.

    (B, in_dim, T) -> (B, channels, T * hop) of which the last ``missing`` samples of each item are 0: what the layers
    leave out grows with the strides behind them.
    """

    @property
    def missing(self) -> int:
        """Samples that an item of any length lacks (8 for strides 8, 5, 4, 2; 0 if all are even)."""
        lacks = 0
        for stride in self.strides:
            lacks = lacks * stride + stride % 2
        return lacks

    def forward(self, z: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        if past is not None:
            raise ValueError("past: DAC looks ahead, so it cannot run as a stream; take a causal codec")
        if lengths is None:
            lengths = torch.full((z.shape[0],), z.shape[-1], device=z.device)
        x = self.first(z, lengths)
        for block, stride in zip(self.blocks, self.strides, strict=True):
            x = block.up(block.snake(x), lengths)  # pyright: ignore[reportCallIssue]
            lengths = lengths * stride - stride % 2  # the layers behind see a zero in place of the sample
            for unit in block.units:  # pyright: ignore[reportGeneralTypeIssues]
                x = unit(x, lengths)
        return zero_past(self.last(self.snake(x), lengths), lengths)


class DAC(PiecewiseCodec):
    """Mono codec of Snake convolutions with factorised residual codes, chosen by cosine. Not causal.

    With odd strides the released decoders return fewer samples than they were given (T * hop - 8 at 16 and 24 kHz), and
    sound that many samples early (y[n] ~ x[n + 8], measured on the released weights; arXiv 2306.06546 and its losses do
    not pin the delay). ``align`` puts the missing samples before the sound, so it comes at its place; else they stand
    after it, as released. Both are zeros and both return exactly T * hop samples.

    Args:
        sample_rate: Hz.
        strides: down-sampling factors of the encoder, in order, each at least 2; the decoder mirrors them.
        encoder_width: channels at the sample rate in the encoder; they double at each stride.
        decoder_width: channels at the frame rate in the decoder; they halve at each stride.
        latent_dim: width D of the latent; None = that of the encoder's last block.
        num_codebooks, codebook_size, codebook_dim: levels Q, entries K, and the width in which a code is chosen.
        quantizer_dropout: share of training items that use a random number of levels (DAC: 0.5).
        commitment_weight, codebook_weight: of the quantizer's two losses.
        dead_code_threshold: share of the mean use below which a code is revived in training; DAC never does (0).
        align: where the missing samples go, see above.
        chunk_seconds: longer sound is processed in pieces that overlap by the receptive field, with the same result.

    Attributes:
        delay_samples: how late the decoded sound is with the released weights: 0, or -8 (early) without ``align``.

    Raises:
        ValueError: a stride below 2.
    """

    type_name = "dac"

    def __init__(
        self,
        sample_rate: int = 44100,
        strides: Sequence[int] = (2, 4, 8, 8),
        encoder_width: int = 64,
        decoder_width: int = 1536,
        latent_dim: int | None = None,
        num_codebooks: int = 9,
        codebook_size: int = 1024,
        codebook_dim: int = 8,
        quantizer_dropout: float = 0.5,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        dead_code_threshold: float = 0.0,
        align: bool = True,
        chunk_seconds: float = 60.0,
    ):
        strides = tuple(strides)
        if not strides or min(strides) < 2:
            raise ValueError(f"strides: expected one or more, each at least 2, got {strides}")
        D = latent_dim or encoder_width * 2 ** len(strides)
        config: dict[str, Any] = {
            "sample_rate": sample_rate,
            "strides": list(strides),
            "encoder_width": encoder_width,
            "decoder_width": decoder_width,
            "latent_dim": D,
            "num_codebooks": num_codebooks,
            "codebook_size": codebook_size,
            "codebook_dim": codebook_dim,
            "quantizer_dropout": quantizer_dropout,
            "commitment_weight": commitment_weight,
            "codebook_weight": codebook_weight,
            "dead_code_threshold": dead_code_threshold,
            "align": align,
            "chunk_seconds": chunk_seconds,
        }
        super().__init__(config)
        self.sample_rate, self.hop_length = sample_rate, math.prod(strides)
        self.chunk_frames = max(1, int(chunk_seconds * sample_rate / self.hop_length))
        self.encoder = Encoder(1, encoder_width, strides, D, DILATIONS, KERNEL_SIZE)
        self.quantizer = ResidualVectorQuantizer(
            D,
            num_codebooks,
            codebook_size,
            codebook_dim=codebook_dim,
            metric="cosine",
            codebook="gradient",
            commitment_weight=commitment_weight,
            codebook_weight=codebook_weight,
            kmeans_init=False,
            dead_code_threshold=dead_code_threshold,
            quantizer_dropout=quantizer_dropout,
        )
        self.decoder = DACDecoder(1, decoder_width, strides[::-1], D, DILATIONS, KERNEL_SIZE)
        self.margin = receptive_frames(strides, DILATIONS, KERNEL_SIZE)
        self.align = align
        self.delay_samples = 0 if align else -self.decoder.missing

    @classmethod
    def taxonomy(cls, config: Mapping[str, Any], spec: TokenSpec) -> Taxonomy:
        """The survey's row of DAC."""
        del config
        return Taxonomy(
            architecture="CNN/CNN",
            input="T",
            quantization="RVQ",
            bitrate="F",
            objective=("GAN", "Feat", "Rec", "VQ"),
            auxiliary=(),
            joint=True,
            domain="SMA",
            rate=f"{spec.frame_rate:g}",
            streamable=False,
        )

    def latent(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, 1, L), L a multiple of the hop, valid up to ``lengths`` (B,) samples -> z (B, T, D)."""
        return self.encoder(zero_past(x, lengths), lengths).transpose(1, 2)

    def sound(self, z_q: Tensor, lengths: Tensor | None = None) -> Tensor:
        """z_q (B, T, D), valid up to ``lengths`` (B,) frames -> (B, 1, T * hop) in [-1, 1], as ``align`` says."""
        return self._placed(self._released(z_q, lengths))

    def _released(self, z_q: Tensor, lengths: Tensor | None) -> Tensor:
        """What the released decoder returns, followed by the missing samples as zeros."""
        return torch.tanh(self.decoder(z_q.transpose(1, 2), lengths))  # tanh keeps the zeros

    def _placed(self, y: Tensor) -> Tensor:
        missing = self.decoder.missing if self.align else 0
        return F.pad(y, (missing, -missing))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Reconstruction:
        """(B, 1, L), L a multiple of the hop, -> reconstruction (B, 1, L); ``mask`` (B, T) bool marks valid frames."""
        frames = None if mask is None else mask.sum(1)
        quantized = self.quantizer(self.latent(x, None if frames is None else frames * self.hop_length), mask)
        return Reconstruction(self.sound(quantized.z_q, frames), quantized)

    def piece_sound(self, z_q: Tensor, lengths: Tensor) -> Tensor:
        return self._released(z_q, lengths)

    def decode_samples(self, codes: Tensor, lengths: Tensor) -> Tensor:
        return self._placed(super().decode_samples(codes, lengths))
