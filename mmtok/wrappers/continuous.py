"""Continuous audio tokenizers of transformers, quantized after training: a code for each number of their latents.

VibeVoice's acoustic tokenizer (arXiv 2508.19205) and the one of Pocket TTS (2509.06926) have no codes: their language
models read and write latents. Here every number of a latent becomes a code of ``bits`` bits (TokenBridge, 2503.16430).
"""

from __future__ import annotations

import abc
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtok.catalogue import Family, Taxonomy
from mmtok.data import audio as audio_io
from mmtok.quantizers.per_dimension import PerDimensionQuantizer
from mmtok.tokenizer import evaluation, integers, stack
from mmtok.tokens import Tokens, TokensError
from mmtok.wrappers.wrapped import WrappedAudio, require, transformers_model

SETTING = re.compile(r"(\d+)(?:,(\d+(?:\.\d+)?))?")
RANGE = 5.0  # standard deviations, on either side, that the cells of equal mass cover
SOURCE = "folder or hub repository, @, bits a number of the latent (1..16), optionally a comma and the latents' std"

# What VibeVoice-1.5B's own checkpoint puts before its language model: (latent - 0.0493) * 0.1963.
VIBEVOICE_MEAN, VIBEVOICE_STD = 0.0493, 1 / 0.1963
# A variational autoencoder's latents are drawn towards the unit Gaussian; Pocket TTS keeps the measured figures in the
# checkpoint of its language model, not in the tokenizer's.
POCKET_MEAN, POCKET_STD = 0.0, 1.0

VIBEVOICE_FACTS = ("hidden_act", "rms_norm_eps", "kernel_size", "downsampling_ratios", "depths")
POCKET_FACTS = (
    "sampling_rate",
    "upsampling_ratios",
    "latent_stride",
    "dilation_growth_rate",
    "use_causal_conv",
    "pad_mode",
    "trim_right_ratio",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "norm_eps",
    "rope_parameters",
    "sliding_window",
)


def open_vibevoice(source: str) -> VibeVoiceWrapper:
    """``FOLDER@BITS`` or ``FOLDER@BITS,STD``; raises as `split_source` and `transformers_model`."""
    place, bits, std = split_source(VIBEVOICE, source)
    network, folder = transformers_model(VIBEVOICE, "VibeVoiceAcousticTokenizerModel", place)
    return VibeVoiceWrapper(network, folder, bits, std)


def open_pockettts(source: str) -> PocketTTSWrapper:
    """``FOLDER@BITS`` or ``FOLDER@BITS,STD``; raises as `split_source` and `transformers_model`."""
    place, bits, std = split_source(POCKETTTS, source)
    network, folder = transformers_model(POCKETTTS, "PocketTTSAudioTokenizerModel", place)
    return PocketTTSWrapper(network, folder, bits, std)


def split_source(family: Family, source: str) -> tuple[str, int, float | None]:
    """Folder or repository, bits, and the standard deviation where the source gives one.

    Raises:
        ValueError: no bits, or none that are legal.
    """
    place, at, setting = source.rpartition("@")
    found = SETTING.fullmatch(setting) if at else None
    if found is None:
        raise ValueError(
            f"{family.name}:{source}: this tokenizer is continuous, its latents have no codes of their own; say in how "
            f"many bits mmtok shall code each number of them, e.g. {family.name}:{place or source}@6"
        )
    bits, std = int(found[1]), None if found[2] is None else float(found[2])
    if not 1 <= bits <= 16 or std == 0:
        raise ValueError(f"{family.name}:{source}: expected 1..16 bits and a standard deviation > 0, got {setting}")
    return place, bits, std


def taxonomy(rate: str, architecture: str, auxiliary: tuple[str, ...]) -> Taxonomy:
    return Taxonomy(
        architecture=architecture,
        input="T",
        quantization="PDQ",
        bitrate="F",
        objective=("GAN", "Feat", "Rec", "KL"),
        auxiliary=auxiliary,
        joint=False,  # the quantizer came after the training
        domain="S",
        rate=rate,
        streamable=True,
    )


VIBEVOICE = Family(
    name="vibevoice",
    title="VibeVoice's continuous acoustic tokenizer; the codes are mmtok's, one a number of its latents",
    modality="audio",
    source=SOURCE,
    example="vibevoice:bezzam/VibeVoice-AcousticTokenizer@6",
    package="transformers",
    install="pip install 'mmtok[codecs]'",
    code_licence="Apache-2.0",
    weights_licence="MIT by its card, check",
    taxonomy=taxonomy("7.5", "CNN/CNN", ()),
    open=open_vibevoice,
)

POCKETTTS = Family(
    name="pockettts",
    title="Pocket TTS's continuous audio tokenizer; the codes are mmtok's, one a number of its latents",
    modality="audio",
    source=SOURCE,
    example="pockettts:eustlb/pocket-tts-audio-tokenizer@6",
    package="transformers",
    install="pip install 'mmtok[codecs]'",
    code_licence="Apache-2.0",
    weights_licence="check the card; that of Pocket TTS says CC-BY-4.0",
    taxonomy=taxonomy("12.5", "CNN+T/CNN+T", ("SD",)),
    open=open_pockettts,
)


class Continuous(WrappedAudio, abc.ABC):
    """A codec of continuous latents (B, T, D) whose D levels are the codes of `PerDimensionQuantizer`.

    The table is not measured: K = 2^bits cells of equal mass of a Gaussian with the given ``mean`` and ``std``, cut at
    5 standard deviations. Latents that spread more lose their extremes, latents that spread less waste cells;
    `latent_statistics` measures the spread on the user's sound, for ``@BITS,STD``. A dimension that a prefix of the
    levels lacks decodes as ``mean``. Dimensions are in the model's order, not in that of importance.

    Args:
        network: upstream's model.
        facts: of its config.
        source: where it came from, for the name and the model card.
        dim: D.
        bits: of each code, 1..16.
        mean, std: of the latents, one value for all dimensions.
    """

    def __init__(
        self, network: Any, facts: dict[str, Any], source: str | Path, dim: int, bits: int, mean: float, std: float
    ):
        facts = {k: list(v) if isinstance(v, tuple) else v for k, v in facts.items()}
        super().__init__(network, facts | {"bits": bits, "mean": mean, "std": std, "range": RANGE}, source)
        self.name = f"{self.name}@{bits}"
        self.quantizer = PerDimensionQuantizer(dim, bits, RANGE, RANGE)
        self.quantizer.set_statistics([mean] * dim, [std] * dim)
        self.quantizer.requires_grad_(False)
        self.codebook_sizes = self.quantizer.codebook_sizes

    @abc.abstractmethod
    def network_latents(self, x: Tensor) -> Tensor:
        """(B, 1, L), L whole frames -> latents (B, T, D)."""

    @abc.abstractmethod
    def network_sound(self, z: Tensor) -> Tensor:
        """Latents (B, T, D) -> sound (B, 1, L)."""

    def heard(self, x: Any, sample_rate: int | None) -> tuple[list[Tensor], list[float]]:
        """Clips (C, L) at the model's rate as its encoder is to hear them, and the factor that each was multiplied by.

        ``x`` and ``sample_rate`` are those of `encode`.
        """
        sounds, _ = audio_io.to_sounds(x, sample_rate)
        return [audio_io.resample(s.samples, s.sample_rate, self.sample_rate) for s in sounds], [1.0] * len(sounds)

    @torch.no_grad()
    def latent_statistics(self, x: Any, sample_rate: int | None = None) -> tuple[float, float]:
        """Mean and standard deviation of all numbers of the latents of ``x``, which is as for `encode`."""
        parts: list[Tensor] = []
        with evaluation(self):
            for clip in self.heard(x, sample_rate)[0]:
                whole = audio_io.fit_length(clip, self.num_frames(clip.shape[1]) * self.hop_length)
                parts.append(self.network_latents(whole[:, None].to(self.device)).double().flatten())
        numbers = torch.cat(parts)
        return float(numbers.mean()), float(numbers.std(correction=0))

    def network_encode(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        del lengths  # neither model's encoder takes a mask
        return self.quantizer.encode(self.network_latents(x), num_codebooks)

    def network_decode(self, codes: Tensor) -> Tensor:
        return self.network_sound(self.quantizer.decode(codes))


class VibeVoiceWrapper(Continuous):
    """transformers' VibeVoiceAcousticTokenizerModel and the loudness that its feature extractor demands.

    The extractor brings every clip to -25 dBFS. The factor travels in ``side["gain"]`` (B,), and decode divides by it;
    codes without ``side`` come back at -25 dBFS. A clip of several channels has one factor.

    Upstream's encode adds random noise to the latents unless told otherwise, and keeps the loudness to itself: both
    are as upstream has them in raw mode, and mended otherwise.

    Args:
        network: the VibeVoiceAcousticTokenizerModel.
        source: its folder; preprocessor_config.json in there, if any, says rate and loudness.
        bits: of each code.
        std: of the latents; None = 5.09, that of the published VibeVoice-1.5B, around its mean.

    Raises:
        ValueError: several channels, or a preprocessor_config.json that transformers cannot read.
    """

    family = VIBEVOICE
    encode_margin: int | None
    decode_margin: int | None

    def __init__(self, network: Any, source: str | Path, bits: int, std: float | None = None):
        c = network.config
        if c.channels != 1:
            raise ValueError(f"{source}: expected a mono tokenizer, got {c.channels} channels; load another")
        loudness = loudness_of(Path(source))
        facts = {name: getattr(c, name) for name in VIBEVOICE_FACTS} | loudness
        mean = VIBEVOICE_MEAN if std is None else 0.0
        super().__init__(network, facts, source, c.hidden_size, bits, mean, std or VIBEVOICE_STD)
        self.sample_rate, self.hop_length = loudness["sample_rate"], c.hop_length
        self.loudness = loudness
        # Causal convolutions and normalization over channels only: bounded, and nothing on the right.
        self.encode_margin = encoder_reach(c.kernel_size, c.downsampling_ratios, c.depths)
        self.decode_margin = decoder_reach(c.kernel_size, c.downsampling_ratios, c.depths)

    def network_latents(self, x: Tensor) -> Tensor:
        network: Any = self.network
        return (network.encode(x, sample=False) if self.mitigated else network.encode(x)).latents

    def network_sound(self, z: Tensor) -> Tensor:
        network: Any = self.network
        return network.decode(z).audio

    def heard(self, x: Any, sample_rate: int | None) -> tuple[list[Tensor], list[float]]:
        clips, gains = super().heard(x, sample_rate)
        if not self.loudness["normalize_audio"]:
            return clips, gains
        eps, loud = self.loudness["eps"], []
        for i, clip in enumerate(clips):
            gain = 10 ** (self.loudness["target_dB_FS"] / 20) / (clip.square().mean().sqrt() + eps)
            scaled = clip * gain
            peak = scaled.abs().max()
            if peak > 1:  # as upstream: no clipping
                scaled, gain = scaled / (peak + eps), gain / (peak + eps)
            loud.append(scaled)
            gains[i] = float(gain)
        return loud, gains

    @torch.no_grad()
    def encode(
        self,
        x: Any,
        sample_rate: int | None = None,
        text: Any = None,
        num_codebooks: int | None = None,
        num_tokens: int | None = None,
    ) -> Tokens:
        """As `AudioTokenizer.encode`, of the clip at -25 dBFS; ``side["gain"]`` is what it was multiplied by."""
        sounds, _ = audio_io.to_sounds(x, sample_rate)
        clips, gains = self.heard(x, sample_rate)
        tokens = super().encode(clips, self.sample_rate, text, num_codebooks, num_tokens)
        device = tokens.codes.device
        tokens.side["num_samples"] = integers([s.samples.shape[1] for s in sounds]).to(device)
        tokens.side["sample_rate"] = integers([s.sample_rate for s in sounds]).to(device)
        if self.mitigated:
            tokens.side["gain"] = torch.tensor(gains, device=device)
        return tokens

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens,
        text: Any = None,
        size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | list[Tensor]:
        """As `AudioTokenizer.decode`, at the loudness that went in."""
        sound = super().decode(tokens, text, size, generator)
        gains = tokens.side.get("gain")
        if not self.mitigated or gains is None or not len(tokens):
            return sound
        if gains.shape != (len(tokens),) or not bool((torch.isfinite(gains) & (gains > 0)).all()):
            raise TokensError("side['gain']: expected one finite number > 0 for each item; leave it out for -25 dBFS")
        return stack([y / float(g) for y, g in zip(sound, gains, strict=True)])


class PocketTTSWrapper(Continuous):
    """transformers' PocketTTSAudioTokenizerModel: Mimi's networks around a latent of 32 numbers, 12.5 times a second.

    Args:
        network: the PocketTTSAudioTokenizerModel.
        source: where it came from, for the name and the model card.
        bits: of each code.
        std: of the latents; None = 1, the unit Gaussian that a variational autoencoder is drawn towards.

    Raises:
        ValueError: a checkpoint of only the encoder or only the decoder.
    """

    family = POCKETTTS
    # Attention has a window, but a piece's frames have other rotary phases than in the whole: codes would agree only
    # up to rounding. Sound is never cut.
    encode_margin = None
    decode_margin = None

    def __init__(self, network: Any, source: str | Path, bits: int, std: float | None = None):
        c = network.config
        if absent := [half for half in ("encoder", "decoder") if getattr(network, half) is None]:
            raise ValueError(f"{source}: expected encoder and decoder, got a checkpoint without {absent[0]}")
        facts = {name: getattr(c, name) for name in POCKET_FACTS}
        super().__init__(network, facts, source, c.latent_dim, bits, POCKET_MEAN, std or POCKET_STD)
        self.sample_rate, self.hop_length = c.sampling_rate, c.frame_size

    def network_latents(self, x: Tensor) -> Tensor:
        network: Any = self.network
        return network.encode(x).latents

    def network_sound(self, z: Tensor) -> Tensor:
        network: Any = self.network
        return network.decode(z).audio_values


def loudness_of(folder: Path) -> dict[str, Any]:
    """What VibeVoice's feature extractor does to sound: that of the folder, else the class's defaults."""
    cls = require("transformers", VIBEVOICE).VibeVoiceAcousticTokenizerFeatureExtractor
    try:
        stored = (folder / "preprocessor_config.json").is_file()
        made: Any = cls.from_pretrained(str(folder), local_files_only=True) if stored else cls()
    except (OSError, ValueError, TypeError) as e:
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"{folder}/preprocessor_config.json is not readable ({reason}); restore the file") from e
    facts = {name: getattr(made, name) for name in ("normalize_audio", "target_dB_FS", "eps")}
    return facts | {"sample_rate": made.sampling_rate}


def encoder_reach(kernel: int, ratios: list[int], depths: list[int]) -> int:
    """Frames before its own that a latent of VibeVoice's causal encoder depends on at most.

    Counted from the latent back to the sound: a block's depthwise convolution reads ``kernel`` - 1 steps back, a stage
    of stride r (its kernel is 2 r) another r of the finer steps.
    """
    reach, hop = kernel - 1, 1
    for depth, ratio in zip(reversed(depths[1:]), reversed(ratios), strict=True):
        reach = (reach + depth * (kernel - 1)) * ratio + ratio
        hop *= ratio
    reach += (depths[0] + 1) * (kernel - 1)
    return -(-reach // hop)


def decoder_reach(kernel: int, ratios: list[int], depths: list[int]) -> int:
    """Frames before its own that a frame of VibeVoice's causal decoder depends on at most; as `encoder_reach`.

    A transposed stage (kernel 2 r) reads its own coarse step and the one before.
    """
    reach = kernel - 1
    for depth, ratio in zip(depths, ratios, strict=False):
        reach += depth * (kernel - 1)
        reach = -(-reach // ratio) + 1
    return reach + (depths[-1] + 1) * (kernel - 1)
