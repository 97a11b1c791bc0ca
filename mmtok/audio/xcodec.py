"""X-Codec (arXiv 2408.17175): a residual-quantized codec whose codes carry a speech teacher's features as well.

    sound ------------> convolutions -> (B,T,A) --+                          +-> Linear -> convolutions -> sound
    sound -> teacher -> convolutions -> (B,T,S) --+-> Linear -> RVQ -> z_q --+-> Linear -> convolutions -> features
No level is "the semantic one": each codes both. The semantic decoder is a regression that only training runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmtok.audio.pieces import PiecewiseCodec, receptive_frames
from mmtok.catalogue import Taxonomy
from mmtok.layers.conv1d import zero_past
from mmtok.layers.seanet import Decoder, Encoder
from mmtok.layers.semantic_conv import SemanticDecoder, SemanticEncoder, SemanticShape
from mmtok.layers.spectrum import Spectrum
from mmtok.layers.speech import GivenTeacher, SpeechEncoder, build_speech
from mmtok.quantizers import build_quantizer, taxonomy_of
from mmtok.quantizers.base import masked_mean
from mmtok.tokenizer import Reconstruction
from mmtok.tokens import TokenSpec

# How the residual quantizer learns: as the authors released it, and without its faults (see quantizers/rvq_legacy.py).
PRESETS: dict[str, dict[str, Any]] = {
    "faithful": {"type": "rvq_legacy", "commitment_weight": 1.0},
    "fixed": {"type": "rvq", "commitment_weight": 1.0, "quantizer_dropout": 0.5},
}
RELEASED = {"num_codebooks": 8, "codebook_size": 1024}


class XCodec(PiecewiseCodec):
    """X-Codec; the arguments' defaults are the published sizes, without a teacher.

    Args:
        sample_rate: Hz, of the teacher too.
        strides: of the acoustic encoder, in order; their product is the hop, which must be the teacher's
            (times the strides of ``semantic_conv``).
        decoder_strides: of the acoustic decoder; None for the same order, as released (not mirrored).
        encoder_width: channels at the sample rate; decoder_width: channels at the frame rate; acoustic_dim: A.
        dilations, kernel_size: of the acoustic residual units.
        semantic: the frozen teacher, see `mmtok.layers.speech.build_speech`; None builds the codec without the semantic
            branch, the paper's acoustic baseline.
        semantic_decoder: False leaves out the regression of the teacher's features, which only training and probes
            read; see `without_semantic_decoder`.
        semantic_conv: numbers of the convolutions around its features, see `SemanticShape`.
        quantizer: {"type", "num_codebooks", "codebook_size", ...} of a quantizer; without ``dim`` its width is A + S.
            None for the preset ``fixed`` at 8 levels of 1024; see `quantizer_preset`.
        front: ``samples`` as published, or ``stft`` as in `mmtok.audio.codec.AudioCodec`: cheaper to train.
        chunk_seconds: longer sound goes through the convolutions in pieces that overlap by the receptive field, with
            the same result.
    """

    type_name = "xcodec"

    def __init__(
        self,
        sample_rate: int = 16000,
        strides: Sequence[int] = (8, 5, 4, 2),
        decoder_strides: Sequence[int] | None = None,
        encoder_width: int = 64,
        decoder_width: int = 1024,
        acoustic_dim: int = 256,
        dilations: Sequence[int] = (1, 3, 9),
        kernel_size: int = 7,
        semantic: Mapping[str, Any] | None = None,
        semantic_conv: Mapping[str, Any] | None = None,
        semantic_decoder: bool = True,
        quantizer: Mapping[str, Any] | None = None,
        front: str = "samples",
        chunk_seconds: float = 60.0,
    ):
        config: dict[str, Any] = {
            "sample_rate": sample_rate,
            "strides": list(strides),
            "decoder_strides": None if decoder_strides is None else list(decoder_strides),
            "encoder_width": encoder_width,
            "decoder_width": decoder_width,
            "acoustic_dim": acoustic_dim,
            "dilations": list(dilations),
            "kernel_size": kernel_size,
            "semantic": None if semantic is None else dict(semantic),
            "semantic_conv": None if semantic_conv is None else dict(semantic_conv),
            "semantic_decoder": semantic_decoder,
            "quantizer": None if quantizer is None else dict(quantizer),
            "front": front,
            "chunk_seconds": chunk_seconds,
        }
        super().__init__(config)
        self.sample_rate, self.hop_length = sample_rate, math.prod(strides)
        self.chunk_frames = max(1, int(chunk_seconds * sample_rate / self.hop_length))
        up = tuple(strides) if decoder_strides is None else tuple(decoder_strides)
        if front not in ("samples", "stft"):
            raise ValueError(f"front: expected 'samples' or 'stft', got {front!r}")
        if math.prod(up) != self.hop_length:
            raise ValueError(f"decoder_strides: expected a product of {self.hop_length}, got {up}")
        self.spectrum, channels, down = None, 1, tuple(strides)
        if front == "stft":
            self.spectrum = Spectrum(strides[0])
            channels, down, up = self.spectrum.channels, tuple(strides[1:]), tuple(strides[:0:-1])
        blocks = (tuple(dilations), kernel_size)
        self.encoder = Encoder(channels, encoder_width, down, acoustic_dim, *blocks)
        self.decoder = Decoder(channels, decoder_width, up, acoustic_dim, *blocks)
        self.margin = max(receptive_frames(s, dilations, kernel_size) for s in (down, up[::-1]))
        self.margin += 0 if self.spectrum is None else 4

        # Features of T frames are T * feature_stride + feature_surplus; the surplus is 0 unless the teacher is padded
        # by more than half of its own hop on either side, as transformers does where the codec's hop is longer.
        self.feature_stride, self.feature_surplus = 1, 0
        self.teacher = None if semantic is None else build_speech(semantic)
        joined = acoustic_dim
        if self.teacher is not None:
            shape = SemanticShape.of(semantic_conv)
            self.feature_stride = math.prod(shape.strides)
            hop = self.teacher.hop_length * self.feature_stride
            if (self.teacher.sample_rate, hop) != (sample_rate, self.hop_length):
                raise ValueError(
                    f"semantic: expected a teacher of {sample_rate} Hz with a hop of {self.hop_length} after the "
                    f"strides of semantic_conv, got {self.teacher.sample_rate} Hz with {hop}; choose strides of that "
                    "product"
                )
            if isinstance(self.teacher, SpeechEncoder):
                config["semantic"] = self.teacher.config  # with the checksum of the weights that were found
                self.feature_surplus = self.teacher.num_frames(self.hop_length) - self.feature_stride
            if shape.frames(2 * self.feature_stride + self.feature_surplus) != 2:
                raise ValueError(
                    f"semantic: expected one frame for each hop after the strides {tuple(shape.strides)}, but the "
                    f"teacher's padding gives it {self.feature_surplus} frames more; choose another padding"
                )
            self.semantic_encoder = SemanticEncoder(self.teacher.dim, shape)
            self.semantic_decoder = SemanticDecoder(self.teacher.dim, shape) if semantic_decoder else None
            self.margin = max(self.margin, shape.reach)
            joined += self.semantic_encoder.out_dim
        numbers = {"dim": joined, **(quantizer_preset("fixed") if quantizer is None else quantizer)}
        self.quantizer = build_quantizer(numbers)
        dim = self.quantizer.dim
        self.join = nn.Linear(joined, dim)
        self.to_acoustic = nn.Linear(dim, acoustic_dim)
        self.to_semantic = None
        if self.teacher is not None and semantic_decoder:
            self.to_semantic = nn.Linear(dim, self.teacher.dim)

    @classmethod
    def taxonomy(cls, config: Mapping[str, Any], spec: TokenSpec) -> Taxonomy:
        """The survey's row of X-Codec, with what it leaves out: the teacher's transformer, and feature matching."""
        teacher = config.get("semantic") or {}
        word, losses = taxonomy_of(config.get("quantizer") or quantizer_preset("fixed"))
        return Taxonomy(
            architecture="CNN/CNN" if teacher.get("type", "given") == "given" else "CNN+T/CNN",
            input="T-F" if config.get("front") == "stft" else "T",
            quantization=word,
            bitrate="F",
            objective=("GAN", "Feat", "Rec", *losses),
            auxiliary=("SD",) if teacher else (),
            joint=True,
            domain="SMA",
            rate=f"{spec.frame_rate:g}",
            streamable=False,
        )

    def use_teacher(self, teacher: nn.Module) -> None:
        """Bring the teacher of a codec with ``semantic={"type": "given", "dim": D}``: a frozen module that takes sound
        (B, 1, L) at the codec's rate to features (B, L / hop, D). It is not saved; give it again after loading.

        Raises:
            ValueError: this codec has no such place.
        """
        if not isinstance(self.teacher, GivenTeacher):
            raise ValueError(f'{self.name}: expected a codec with semantic={{"type": "given", "dim": ...}}')
        self.teacher.network = teacher.requires_grad_(False).eval()

    def teacher_features(self, x: Tensor, frames: Sequence[int]) -> Tensor:
        """The teacher's features of (B, 1, L), item b valid up to ``frames[b]`` frames: (B, L / hop, S), 0 past them.

        Items of one length go through the teacher together: its attention and norms would see the padding. With strides
        in ``semantic_conv`` they have the teacher's own frame rate.
        """
        assert self.teacher is not None
        count = x.shape[-1] // self.hop_length * self.feature_stride + self.feature_surplus
        out = x.new_zeros(x.shape[0], count, self.teacher.dim, dtype=torch.float32)
        for n in sorted(set(frames) - {0}):
            rows = [b for b, found in enumerate(frames) if found == n]
            stop = n * self.feature_stride + self.feature_surplus
            out[rows, :stop] = self.teacher(x[rows, :, : n * self.hop_length])
        return out

    def latent(self, x: Tensor, lengths: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """(B, 1, L) valid up to ``lengths`` (B,) samples, and the teacher's features (B, T, S) of it -> z (B, T, D)."""
        x = zero_past(x, lengths)
        frames = None
        if lengths is not None:
            frames = lengths // self.hop_length * self.feature_stride + self.feature_surplus
        if self.spectrum is not None:
            x = self.spectrum.analyse(x)
            lengths = None if lengths is None else lengths // self.spectrum.hop_length
        z = self.encoder(x, lengths).transpose(1, 2)
        if features is not None:
            semantic = self.semantic_encoder(features.transpose(1, 2), frames).transpose(1, 2)
            z = torch.cat([z, semantic.to(z.dtype)], 2)
        return self.join(z)

    def sound(self, z_q: Tensor, lengths: Tensor | None = None) -> Tensor:
        """z_q (B, T, D), valid up to ``lengths`` (B,) frames -> (B, 1, T * hop)."""
        y = self.decoder(zero_past(self.to_acoustic(z_q).transpose(1, 2), lengths), lengths)
        if self.spectrum is None:
            return y
        inner = self.hop_length // self.spectrum.hop_length
        return self.spectrum.synthesise(y, None if lengths is None else lengths * inner)

    def semantic_features(self, z_q: Tensor, lengths: Tensor | None = None) -> Tensor:
        """What the codes say about the teacher's features: z_q (B, T, D) -> (B, T, S), for probes and training."""
        if self.to_semantic is None or self.semantic_decoder is None:
            raise ValueError(f"{self.name} was built without a semantic decoder; it has no semantic features")
        return self.semantic_decoder(self.to_semantic(z_q).transpose(1, 2), lengths).transpose(1, 2)

    def without_semantic_decoder(self) -> XCodec:
        """A copy for use alone, with the same codes and sound: what decode never reads is left out."""
        lean = XCodec(**{**self.config, "semantic_decoder": False})
        lean.load_state_dict({k: v for k, v in self.state_dict().items() if k in lean.state_dict()})
        lean.name = self.name
        return lean.to(self.device).train(self.training)  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor, mask: Tensor | None = None, features: Tensor | None = None) -> Reconstruction:
        """(B, 1, L), L a multiple of the hop, -> reconstruction (B, 1, L).

        Args:
            mask: (B, T) bool, true where a frame is valid.
            features: (B, T, S) the teacher's, where they were computed before.

        Returns:
            ``aux["semantic"]`` is the mean squared error of the semantic decoder (weight 100 as released), where there
            is one.
        """
        lengths = None if mask is None else mask.sum(1)
        if self.teacher is not None and features is None:
            T = x.shape[-1] // self.hop_length
            features = self.teacher_features(x, [T] * len(x) if lengths is None else lengths.tolist())
        z = self.latent(x, None if lengths is None else lengths * self.hop_length, features)
        quantized = self.quantizer(z, mask)
        z_q = quantized.z_q
        aux = {}
        if features is not None and self.to_semantic is not None:
            found = self.semantic_features(z_q, lengths).float()
            valid = mask if mask is None else mask.repeat_interleave(self.feature_stride, 1)
            aux["semantic"] = masked_mean((found - features[:, : found.shape[1]]).square(), valid)
        return Reconstruction(self.sound(z_q, lengths), quantized, aux)

    def whole_features(self, x: Tensor, lengths: Tensor) -> Tensor | None:
        return None if self.teacher is None else self.teacher_features(x, (lengths // self.hop_length).tolist())

    def piece_latent(self, x: Tensor, lengths: Tensor, features: Tensor | None, first: int) -> Tensor:
        if features is not None:
            count = x.shape[-1] // self.hop_length * self.feature_stride + self.feature_surplus
            features = features[:, first * self.feature_stride :][:, :count]
        return self.latent(x, lengths, features)


def quantizer_preset(name: str, numbers: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The quantizer of a preset, ``faithful`` or ``fixed``: the released 8 levels of 1024, but for what is given."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {name!r}")
    return {**RELEASED, **PRESETS[name], **(numbers or {})}
