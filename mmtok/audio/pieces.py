"""Long sound through a codec of convolutions in overlapping pieces, with the result of the whole: no seams."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmtok.layers.receptive import pieces
from mmtok.quantizers.base import Quantizer
from mmtok.tokenizer import AudioTokenizer
from mmtok.tokens import TokenSpec


class PiecewiseCodec(AudioTokenizer, abc.ABC):
    """An encoder and a decoder that see a bounded number of frames, and a quantizer of single frames between them.

    A subclass writes ``latent`` and ``sound``, or what it does instead on a piece, and sets

        quantizer: of z (B, T, D).
        chunk_frames: frames of a piece, which bounds the memory that long sound takes.
        margin: frames on either side of a frame that encoder and decoder see at most.
    """

    quantizer: Quantizer
    chunk_frames: int
    margin: int

    def base_spec(self) -> TokenSpec:
        rate = self.sample_rate / self.hop_length
        quantizer = self.quantizer
        return TokenSpec(self.type_name, "audio", quantizer.codebook_sizes, quantizer.level_strides, frame_rate=rate)

    @abc.abstractmethod
    def latent(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, 1, L), valid up to ``lengths`` (B,) samples -> z (B, T, D)."""

    @abc.abstractmethod
    def sound(self, z_q: Tensor, lengths: Tensor | None = None) -> Tensor:
        """z_q (B, T, D), valid up to ``lengths`` (B,) frames -> (B, 1, T * hop)."""

    def whole_features(self, x: Tensor, lengths: Tensor) -> Tensor | None:
        """What the encoder needs of the whole sound beside the piece, see `piece_latent`."""
        del x, lengths
        return None

    def piece_latent(self, x: Tensor, lengths: Tensor, features: Tensor | None, first: int) -> Tensor:
        """`latent` of a piece that begins with frame ``first``; ``features`` are `whole_features`."""
        del features, first
        return self.latent(x, lengths)

    def piece_sound(self, z_q: Tensor, lengths: Tensor) -> Tensor:
        """`sound` of a piece."""
        return self.sound(z_q, lengths)

    def encode_samples(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        hop, features, parts = self.hop_length, self.whole_features(x, lengths), []
        for start, stop, left, right in pieces(x.shape[-1] // hop, self.chunk_frames, self.margin):
            first, last = start - left, stop + right
            own = (lengths - first * hop).clamp(0, (last - first) * hop)
            z = self.piece_latent(x[..., first * hop : last * hop], own, features, first)
            parts.append(self.quantizer.encode(z[:, left : left + stop - start], num_codebooks))
        return torch.cat(parts, 2)

    def decode_samples(self, codes: Tensor, lengths: Tensor) -> Tensor:
        hop, parts = self.hop_length, []
        for start, stop, left, right in pieces(codes.shape[2], self.chunk_frames, self.margin):
            first, last = start - left, stop + right
            z_q = self.quantizer.decode(codes[..., first:last])
            y = self.piece_sound(z_q, (lengths - first).clamp(0, last - first))
            parts.append(y[..., left * hop : (left + stop - start) * hop])
        return torch.cat(parts, -1)


def receptive_frames(strides: Sequence[int], dilations: Sequence[int], kernel_size: int) -> int:
    """An upper bound in frames of how far either side of a frame the encoder or the decoder looks."""
    units = sum(d * (kernel_size - 1) for d in dilations)
    samples, step = float(kernel_size - 1), 1
    for stride in strides:
        samples += units * step + 2 * stride * step
        step *= stride
    return math.ceil((samples + max(kernel_size, 3) * step) / step) + 1
