"""A residual-vector-quantized codec of DAC / SEANet blocks (arXiv 2306.06546, 2210.13438), causal or centred."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mmtok.audio.pieces import PiecewiseCodec
from mmtok.audio.stream import StreamingTokenizer
from mmtok.catalogue import Taxonomy
from mmtok.layers.conv1d import Past, zero_past
from mmtok.layers.receptive import positions_read
from mmtok.layers.seanet import Decoder, Encoder
from mmtok.layers.spectrum import Spectrum
from mmtok.quantizers.rvq import ResidualVectorQuantizer
from mmtok.tokenizer import Reconstruction
from mmtok.tokens import TokenSpec


class AudioCodec(PiecewiseCodec, StreamingTokenizer):
    """Convolutional encoder, residual vector quantizer, convolutional decoder; mono.

    Args:
        sample_rate: Hz.
        strides: down-sampling factors of the encoder, in order; the decoder mirrors them. Their product is the hop.
        encoder_width: channels at the sample rate in the encoder; they double at each stride.
        decoder_width: channels at the frame rate in the decoder; they halve at each stride.
        latent_dim: width D of the latent that is quantized.
        num_codebooks, codebook_size: levels Q and K entries of each.
        codebook_dim: width of the codebooks when they are projected (DAC uses 8), None for D.
        quantizer_dropout: share of training items that use a random number of levels.
        dilations: residual units before each stride.
        kernel_size: of the residual units.
        causal: no convolution looks ahead, so that it can stream.
        front: ``samples`` as in DAC and SEANet, or ``stft``: the first stride is the hop of a Fourier transform and the
            blocks work on its real and imaginary parts. Few blocks then run at a high rate, which makes it
            cheaper to train (recipes/LOG.md). Its window costs a causal model a look-ahead of 1.5 of those hops in the
            encoder, and as much in the decoder; a stream waits for them.
        chunk_seconds: longer sound is processed in pieces that overlap by the receptive field, with the same result.
    """

    type_name = "codec"

    def __init__(
        self,
        sample_rate: int = 16000,
        strides: Sequence[int] = (8, 5, 4, 2),
        encoder_width: int = 16,
        decoder_width: int = 384,
        latent_dim: int = 128,
        num_codebooks: int = 8,
        codebook_size: int = 1024,
        codebook_dim: int | None = None,
        quantizer_dropout: float = 0.0,
        dilations: Sequence[int] = (1, 3, 9),
        kernel_size: int = 7,
        causal: bool = False,
        front: str = "samples",
        chunk_seconds: float = 60.0,
    ):
        config: dict[str, Any] = {
            "sample_rate": sample_rate,
            "strides": list(strides),
            "encoder_width": encoder_width,
            "decoder_width": decoder_width,
            "latent_dim": latent_dim,
            "num_codebooks": num_codebooks,
            "codebook_size": codebook_size,
            "codebook_dim": codebook_dim,
            "quantizer_dropout": quantizer_dropout,
            "dilations": list(dilations),
            "kernel_size": kernel_size,
            "causal": causal,
            "front": front,
            "chunk_seconds": chunk_seconds,
        }
        super().__init__(config)
        self.sample_rate, self.hop_length = sample_rate, math.prod(strides)
        self.chunk_frames = max(1, int(chunk_seconds * sample_rate / self.hop_length))
        if front not in ("samples", "stft"):
            raise ValueError(f"front: expected 'samples' or 'stft', got {front!r}")
        self.spectrum = Spectrum(strides[0]) if front == "stft" else None
        channels, inner = (1, tuple(strides)) if self.spectrum is None else (self.spectrum.channels, tuple(strides[1:]))
        blocks = (tuple(dilations), kernel_size, causal)
        self.encoder = Encoder(channels, encoder_width, inner, latent_dim, *blocks)
        self.quantizer = ResidualVectorQuantizer(
            latent_dim,
            num_codebooks,
            codebook_size,
            codebook_dim=codebook_dim,
            quantizer_dropout=quantizer_dropout,
            commitment_weight=1.0,
        )
        self.decoder = Decoder(channels, decoder_width, inner[::-1], latent_dim, *blocks)
        self.encoder_field, self.decoder_field = self._fields()
        frames = (math.ceil(reach / self.hop_length) for reach in self.encoder_field)
        self.margin = max(*frames, *self.decoder_field)
        self.streams, self.stream_frames = causal, self.chunk_frames
        edge = 0 if self.spectrum is None else self.spectrum.edge
        self.encode_lookahead = self.decode_lookahead = edge

    @classmethod
    def taxonomy(cls, config: Mapping[str, Any], spec: TokenSpec) -> Taxonomy:
        """Trained as DAC was, unless a checkpoint says otherwise."""
        return Taxonomy(
            architecture="CNN/CNN",
            input="T-F" if config.get("front") == "stft" else "T",
            quantization="RVQ",
            bitrate="F",
            objective=("GAN", "Feat", "Rec", "VQ"),
            auxiliary=(),
            joint=True,
            domain="SMA",
            rate=f"{spec.frame_rate:g}",
            streamable=bool(config.get("causal")),
        )

    def _fields(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """How many samples before and past its own hop a frame's codes depend on; and on how many frames before and
        past its own the sound of a frame does."""
        hop = self.hop_length
        first, last = positions_read(self.encoder, 0, 0)
        start, stop = 0, hop - 1
        if self.spectrum is not None:
            first, last = self.spectrum.samples_read(first, last)
            start, stop = self.spectrum.frames_read(start, stop)
        earliest, latest = positions_read(self.decoder, start, stop)
        return (-first, last - (hop - 1)), (-earliest, latest)

    def timing(self) -> dict[str, Any]:
        """As `AudioTokenizer.timing`, with the exact receptive fields: what is read before and past a frame itself."""
        fields = {"encoder_samples": list(self.encoder_field), "decoder_frames": list(self.decoder_field)}
        return super().timing() | {"receptive_field": fields}

    def latent(self, x: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        """(B, 1, L), valid up to ``lengths`` (B,) samples -> z (B, T, D)."""
        x = zero_past(x, lengths)
        if self.spectrum is not None:
            x = self.spectrum.analyse(x, past)
            lengths = None if lengths is None else lengths // self.spectrum.hop_length
        return self.encoder(x, lengths, past).transpose(1, 2)

    def sound(self, z_q: Tensor, lengths: Tensor | None = None, past: Past | None = None) -> Tensor:
        """z_q (B, T, D), valid up to ``lengths`` (B,) frames -> (B, 1, T * hop)."""
        y = self.decoder(zero_past(z_q.transpose(1, 2), lengths), lengths, past)
        if self.spectrum is None:
            return y
        inner = self.hop_length // self.spectrum.hop_length
        return self.spectrum.synthesise(y, None if lengths is None else lengths * inner, past)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Reconstruction:
        """(B, 1, L), L a multiple of the hop, -> reconstruction (B, 1, L); ``mask`` (B, T) bool marks valid frames."""
        frames = None if mask is None else mask.sum(1)
        quantized = self.quantizer(self.latent(x, None if frames is None else frames * self.hop_length), mask)
        return Reconstruction(self.sound(quantized.z_q, frames), quantized)

    def encode_stream(self, x: Tensor, past: Past, num_codebooks: int | None = None) -> Tensor:
        return self.quantizer.encode(self.latent(x, past=past), num_codebooks)

    def decode_stream(self, codes: Tensor, past: Past) -> Tensor:
        return self.sound(self.quantizer.decode(codes), past=past)

    def decode_rest(self, past: Past) -> Tensor:
        return super().decode_rest(past) if self.spectrum is None else self.spectrum.synthesise_rest(past)
