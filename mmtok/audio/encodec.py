"""EnCodec (arXiv 2210.13438), trainable, with the places of the published weights: the mono models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.audio.pieces import pieces
from mmtok.audio.stream import StreamingTokenizer
from mmtok.catalogue import Taxonomy
from mmtok.layers.conv1d import Past
from mmtok.layers.seanet_lstm import LstmDecoder, LstmEncoder, SEANetShape
from mmtok.quantizers.rvq import ResidualVectorQuantizer
from mmtok.tokenizer import Reconstruction
from mmtok.tokens import TokenSpec

# The published mono sizes: arguments of `EnCodec`.
ENCODEC_24KHZ: dict[str, Any] = {"sample_rate": 24000, "num_codebooks": 32, "codebook_size": 1024}
ENCODEC_32KHZ: dict[str, Any] = {
    "sample_rate": 32000,
    "num_codebooks": 4,
    "codebook_size": 2048,
    "shape": {"width": 64, "strides": (4, 4, 5, 8), "causal": False, "conv_shortcut": False},
}


class EnCodec(StreamingTokenizer):
    """SEANet with an LSTM, and a plain residual quantizer of moving-average codebooks; mono.

    What happens to a sound's ends and to long sound:

    * As every tokenizer of this house it zero-pads a clip to whole frames. transformers' EnCodec takes any length and
      reflects the end to whole frames inside each layer, so the two agree on clips of whole frames; `latent` by itself
      does what transformers does at any length.
    * The causal model with weight norm (encodec_24khz) is blind to padding. Any other sees the end of the clip, so the
      rows of a batch are grouped by length and each group runs without padding.
    * Longer sound than ``chunk_seconds``: the convolutions at the sample rate run in pieces that overlap by their
      receptive field, the LSTM once over all frames, since it remembers everything. The result is that of one piece.
      A norm over time does not allow pieces, so such a model takes the clip in one.
    * The causal model with weight norm runs piece by piece (`encode_stream`, `decode_stream`). Where its beginning is
      reflected, the first `lead` frames (7 at 24 kHz, 93 ms) come at once, and the end has to be told (``final``), for
      it decides how a sound shorter than that is reflected; `streamer` needs zeros at the edges instead.

    The 48 kHz stereo model (`time_group_norm`, pieces of one second, a loudness for each) is not a tokenizer here: its
    loudness does not fit in codes. Its two networks are: `mmtok.layers.seanet_lstm` with two channels.

    Args:
        sample_rate: Hz.
        num_codebooks, codebook_size: levels Q and K entries of each.
        latent_dim: width D of the latent and of the codes.
        shape: of the networks: arguments of `mmtok.layers.seanet_lstm.SEANetShape` that differ from its defaults.
        quantizer_dropout: share of training items that use a random number of levels.
        commitment_weight: of the quantizer's loss.
        chunk_seconds: see above.

    Raises:
        ValueError: a shape that cannot be.
    """

    type_name = "encodec"

    def __init__(
        self,
        sample_rate: int = 24000,
        num_codebooks: int = 32,
        codebook_size: int = 1024,
        latent_dim: int = 128,
        shape: Mapping[str, Any] | None = None,
        quantizer_dropout: float = 1.0,
        commitment_weight: float = 1.0,
        chunk_seconds: float = 60.0,
    ):
        self_shape = SEANetShape(**(shape or {}))
        config: dict[str, Any] = {
            "sample_rate": sample_rate,
            "num_codebooks": num_codebooks,
            "codebook_size": codebook_size,
            "latent_dim": latent_dim,
            "shape": {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self_shape).items()},
            "quantizer_dropout": quantizer_dropout,
            "commitment_weight": commitment_weight,
            "chunk_seconds": chunk_seconds,
        }
        super().__init__(config)
        self.shape, self.sample_rate, self.hop_length = self_shape, sample_rate, self_shape.hop_length
        self.chunk_frames = max(1, int(chunk_seconds * sample_rate / self.hop_length))
        self.encoder = LstmEncoder(1, latent_dim, self_shape)
        self.quantizer = ResidualVectorQuantizer(
            latent_dim,
            num_codebooks,
            codebook_size,
            commitment_weight=commitment_weight,
            quantizer_dropout=quantizer_dropout,
        )
        self.decoder = LstmDecoder(1, latent_dim, self_shape)
        self.streams = self_shape.ends_stay_apart and self.lead == 1

    @classmethod
    def taxonomy(cls, config: Mapping[str, Any], spec: TokenSpec) -> Taxonomy:
        """The survey's row of EnCodec, but for the LSTM of the decoder, which it leaves out."""
        shape = SEANetShape(**(config.get("shape") or {}))
        side = "CNN+RNN" if shape.lstm_layers else "CNN"
        return Taxonomy(
            architecture=f"{side}/{side}",
            input="T",
            quantization="RVQ",
            bitrate="F",
            objective=("GAN", "Feat", "Rec", "VQ"),
            auxiliary=(),
            joint=True,
            domain="SMA",
            rate=f"{spec.frame_rate:g}",
            streamable=shape.ends_stay_apart,
        )

    def base_spec(self) -> TokenSpec:
        rate = self.sample_rate / self.hop_length
        quantizer = self.quantizer
        return TokenSpec(self.type_name, "audio", quantizer.codebook_sizes, quantizer.level_strides, frame_rate=rate)

    def latent(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, 1, L), valid up to ``lengths`` (B,) samples, multiples of the hop -> z (B, ceil(L / hop), D)."""
        T = -(-x.shape[-1] // self.hop_length)
        return self._by_length(self._latent, x, lengths, T).transpose(1, 2)

    def sound(self, z_q: Tensor, lengths: Tensor | None = None) -> Tensor:
        """z_q (B, T, D), valid up to ``lengths`` (B,) frames -> (B, 1, T * hop)."""
        return self._by_length(self._sound, z_q.transpose(1, 2), lengths, z_q.shape[1] * self.hop_length)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Reconstruction:
        """(B, 1, L), L a multiple of the hop, -> reconstruction (B, 1, L); ``mask`` (B, T) bool marks valid frames."""
        frames = None if mask is None else mask.sum(1)
        quantized = self.quantizer(self.latent(x, None if frames is None else frames * self.hop_length), mask)
        return Reconstruction(self.sound(quantized.z_q, frames), quantized)

    def encode_samples(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        return self.quantizer.encode(self.latent(x, lengths), num_codebooks)

    def decode_samples(self, codes: Tensor, lengths: Tensor) -> Tensor:
        return self.sound(self.quantizer.decode(codes), lengths)

    def _by_length(
        self, run: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, lengths: Tensor | None, size: int
    ) -> Tensor:
        """``run`` on x (B, C, positions) -> (B, C', size), where need be on the rows of each length by themselves."""
        if lengths is None or self.shape.ends_stay_apart:
            return run(x, lengths)
        found: dict[int, Tensor] = {}
        counts = lengths.tolist()
        for n in set(counts):
            rows = [i for i, m in enumerate(counts) if m == n]
            y = run(x[rows, :, : max(n, 1)], None) * (n > 0)
            found.update(zip(rows, F.pad(y, (0, size - y.shape[-1])), strict=True))
        return torch.stack([found[i] for i in range(len(counts))])

    def _pieces(self, T: int, margin: int) -> list[tuple[int, int, int, int]]:
        return pieces(T, self.chunk_frames if self.shape.norm == "weight_norm" else T, margin)

    def _latent(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, 1, L) -> (B, D, T)."""
        hop, parts = self.hop_length, []
        for start, stop, left, right in self._pieces(-(-x.shape[-1] // hop), self.encoder.margin):
            first, last = start - left, stop + right
            own = None if lengths is None else (lengths - first * hop).clamp(0, (last - first) * hop)
            h = self.encoder.long_part(x[..., first * hop : last * hop], own)
            parts.append(h[..., left : left + stop - start])
        return self.encoder.frame_part(torch.cat(parts, -1), None if lengths is None else -(-lengths // hop))

    def _sound(self, z_q: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, D, T) -> (B, 1, T * hop)."""
        hop, parts = self.hop_length, []
        h = self.decoder.frame_part(z_q, lengths)
        for start, stop, left, right in self._pieces(h.shape[-1], self.decoder.margin):
            first, last = start - left, stop + right
            own = None if lengths is None else (lengths - first).clamp(0, last - first)
            parts.append(self.decoder.long_part(h[..., first:last], own)[..., left * hop : (left + stop - start) * hop])
        return torch.cat(parts, -1)

    @property
    def lead(self) -> int:
        """Frames that a stream holds back at its beginning, on either side; then nothing is held back."""
        return max(self.encoder.lead, self.decoder.lead)

    def encode_stream(self, x: Tensor, past: Past, num_codebooks: int | None = None, final: bool = False) -> Tensor:
        """The next samples of a stream (B, 1, n * hop), n >= 0 -> the codes that are ready (B, Q, n').

        n' = n once `lead` frames have come; before, nothing is ready. ``final`` ends the stream: all that was held back
        comes. ``past`` belongs to one stream and one direction.

        Raises:
            ValueError: not a causal model with weight norm, or samples that are no whole frames.
        """
        self._check_stream()
        if x.shape[-1] % self.hop_length:
            raise ValueError(
                f"expected a multiple of {self.hop_length} samples, got {x.shape[-1]}; keep the rest for the next call"
            )
        x = held_back(self.encoder, x, past, 0 if final else self.encoder.lead * self.hop_length)
        if not x.shape[-1]:
            return torch.zeros(len(x), num_codebooks or self.quantizer.num_codebooks, 0, dtype=torch.int64).to(x.device)
        return self.quantizer.encode(self.encoder(x, past=past).transpose(1, 2), num_codebooks)

    def decode_stream(self, codes: Tensor, past: Past, final: bool = False) -> Tensor:
        """The next codes of a stream (B, Q, n), n >= 0 -> the samples that are ready (B, 1, n' * hop); else as
        `encode_stream`."""
        self._check_stream()
        codes = held_back(self.decoder, codes, past, 0 if final else self.decoder.lead)
        if not codes.shape[-1]:
            return torch.zeros(len(codes), 1, 0, device=codes.device)
        return self.decoder(self.quantizer.decode(codes).transpose(1, 2), past=past)

    def _check_stream(self) -> None:
        if not self.shape.ends_stay_apart:
            raise ValueError(self._cannot_stream("encode and decode"))

    def _cannot_stream(self, instead: str) -> str:
        if not self.shape.ends_stay_apart:
            found = f"causal={self.shape.causal} and {self.shape.norm}"
            return f"expected a causal model with weight norm, got {found}: it cannot stream; use {instead}"
        return (
            f"{self.name} reflects the beginning of a sound, so its first {self.lead} frames come at once: expected "
            f"padding='constant' for streamers; call encode_stream and decode_stream, or use {instead}"
        )


def held_back(network: LstmEncoder | LstmDecoder, x: Tensor, past: Past, needed: int) -> Tensor:
    """x (B, C, n) of a stream, with all that came before until ``needed`` positions are there; empty before that."""
    if network.first in past.kept:  # the beginning is behind us
        return x
    held = past.kept.pop(network, None)
    x = x if held is None else torch.cat([held, x], -1)
    if x.shape[-1] >= needed:
        return x
    past.kept[network] = x
    return x[..., :0]
