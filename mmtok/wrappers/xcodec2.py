"""X-Codec-2 (arXiv 2502.04128) and NeuCodec (2509.09550) as transformers runs them: one FSQ code every 20 ms."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmtok.catalogue import Family, Taxonomy
from mmtok.tokenizer import integers
from mmtok.tokens import Tokens
from mmtok.wrappers.raw_lengths import RawLengths
from mmtok.wrappers.wrapped import require, transformers_model

SEMANTIC_HOP = 320  # samples: two steps of 160 of the log-mel features that w2v-BERT reads, fixed in transformers' code

# What says, with the weights, which codes a sound has; by the names of transformers' configs.
FACTS = (
    "downsampling_ratios",
    "quantization_levels",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
)
SEMANTIC_FACTS = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "position_embeddings_type",
    "left_max_position_embeddings",
    "right_max_position_embeddings",
    "conv_depthwise_kernel_size",
    "add_adapter",
)


def open_xcodec2(source: str) -> XCodec2Wrapper:
    """A folder that `Xcodec2Model.save_pretrained` wrote, or a hub repository; raises as `transformers_model`."""
    network, folder = transformers_model(XCODEC2, "Xcodec2Model", source)
    return XCodec2Wrapper(network, folder)


def open_neucodec(source: str) -> NeuCodecWrapper:
    """A folder that `NeuCodecModel.save_pretrained` wrote, or a hub repository; raises as `transformers_model`."""
    network, folder = transformers_model(NEUCODEC, "NeuCodecModel", source)
    return NeuCodecWrapper(network, folder)


TAXONOMY = Taxonomy(
    architecture="CNN+T/CNN+T",  # encoder: convolutions beside w2v-BERT; decoder: residual convolutions and attention
    input="T+T-F",  # the waveform, and log-mel features for w2v-BERT
    quantization="FSQ",
    bitrate="F",
    objective=("GAN", "Feat", "Rec"),
    auxiliary=("SD",),
    joint=True,
    domain="S",
    rate="50",
    streamable=False,
)

XCODEC2 = Family(
    name="xcodec2",
    title="X-Codec-2: acoustic and w2v-BERT features in one FSQ of 65,536 codes, 16 kHz",
    modality="audio",
    source="folder or hub repository",
    example="xcodec2:HKUSTAudio/xcodec2-hf",
    package="transformers",
    install="pip install 'mmtok[codecs]'",
    code_licence="Apache-2.0",
    weights_licence="CC-BY-NC-4.0",
    taxonomy=TAXONOMY,
    open=open_xcodec2,
)

NEUCODEC = Family(
    name="neucodec",
    title="NeuCodec: X-Codec-2 with a decoder for 24 kHz",
    modality="audio",
    source="folder or hub repository",
    example="neucodec:neuphonic/neucodec",
    package="transformers",
    install="pip install 'mmtok[codecs]'",
    code_licence="Apache-2.0",
    weights_licence="Apache-2.0 by its card, check",
    taxonomy=TAXONOMY,
    open=open_neucodec,
)


class XCodec2Wrapper(RawLengths):
    """transformers' Xcodec2Model and its feature extractor, which makes log-mel features beside the padded sound.

    The extractor adds one zero sample to a clip and pads it to whole frames of 320 samples: there are
    ``num_samples // 320 + 1`` codes, one more than `AudioTokenizer` counts where a clip is whole frames. That is kept,
    so that every clip has exactly upstream's codes.

    Raw, a batch of clips of several lengths goes through the extractor together. Its masks keep w2v-BERT from
    attending to padding, but the convolutions beside and behind it see what lies there.

    Args:
        network: the Xcodec2Model.
        source: where it came from, for the name and the model card.

    Raises:
        ValueError: the frames of the convolutions and of the features do not fit. ImportError: no torchaudio.
    """

    family = XCODEC2
    extractor_name: ClassVar[str] = "Xcodec2FeatureExtractor"
    rate_name: ClassVar[str] = "sampling_rate"  # of the input, in upstream's config
    # w2v-BERT attends to the whole clip, and its features are normalized over it.
    encode_margin = None
    # The decoder attends to all frames (without positions: its rotary phases differ by head, not by frame), and its
    # group normalization runs over time.
    decode_margin = None

    def __init__(self, network: Any, source: str | Path):
        c = network.config
        config = {name: plain(getattr(c, name)) for name in FACTS}
        semantic = c.semantic_model_config
        config["semantic"] = {name: plain(getattr(semantic, name, None)) for name in SEMANTIC_FACTS}
        config["sample_rate"] = getattr(c, self.rate_name)
        super().__init__(network, config, source)
        self.sample_rate, self.hop_length = config["sample_rate"], math.prod(c.downsampling_ratios)
        self.codebook_sizes = (math.prod(c.quantization_levels),)
        widths = c.quantization_dim, c.hidden_size + semantic.hidden_size
        if self.hop_length != SEMANTIC_HOP or widths[0] != widths[1]:
            raise ValueError(
                f"{source}: expected {SEMANTIC_HOP} samples a frame (those of the semantic features) and "
                f"quantization_dim = {widths[1]}, got {self.hop_length} and {widths[0]}; restore its config.json"
            )
        extractor = getattr(require("transformers", self.family or XCODEC2), self.extractor_name)
        self.extractor: Any = extractor(sampling_rate=self.sample_rate, hop_length=self.hop_length)

    def network_frames(self, num_samples: int) -> int:
        return num_samples // self.hop_length + 1

    def num_frames(self, num_samples: int) -> int:
        """Codes of a clip: as upstream, which appends a sample before it rounds up to whole frames."""
        return self.network_frames(num_samples)

    def network_encode(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        del num_codebooks  # there is one
        spare = 1 if self.mitigated else 0  # the last sample of whole frames: zero, and the extractor adds it again
        network: Any = self.network
        inputs = self.features([row[0, : int(n) - spare] for row, n in zip(x, lengths, strict=True)])
        return network.encode(**{k: v.to(x.device) for k, v in inputs.items()}).audio_codes.long()

    def features(self, clips: list[Tensor]) -> dict[str, Tensor]:
        """Upstream's inputs for clips (L,): ``input_values`` and ``input_features`` with their masks, on the CPU."""
        with torch.autocast("cpu", enabled=False):  # the extractor goes through numpy, which has no bfloat16
            made = self.extractor([c.cpu() for c in clips], sampling_rate=self.sample_rate, return_tensors="pt")
        return dict(made)

    def network_decode(self, codes: Tensor) -> Tensor:
        network: Any = self.network
        return network.decode(audio_codes=codes).audio_values


class NeuCodecWrapper(XCodec2Wrapper):
    """transformers' NeuCodecModel: hears 16 kHz, speaks 24 kHz.

    ``sample_rate`` and ``hop_length`` are those of the input, as everywhere. `decode` works at ``output_rate`` and
    resamples from there, once, to the rate that ``side`` names; so a clip of 24 kHz comes back with all that the
    decoder made of it. Codes without ``side`` come back at ``sample_rate``, which cuts the band above 8 kHz away: set
    ``tokens.side["sample_rate"]`` to 24000 for each item to keep it.

    Upstream's features miss the last frame of a clip, and with it go up to 320 samples of sound. Mitigated, each clip
    is padded to whole frames and the extractor's own padding makes the frame that gets lost.
    """

    family = NEUCODEC
    extractor_name = "NeuCodecFeatureExtractor"
    rate_name = "input_sampling_rate"

    def __init__(self, network: Any, source: str | Path):
        super().__init__(network, source)
        self.output_rate, self.output_hop = network.config.output_sampling_rate, network.config.hop_length
        if self.output_hop * self.sample_rate != self.hop_length * self.output_rate:
            raise ValueError(
                f"{source}: expected an output rate that is a whole number of samples a frame, got {self.output_rate} "
                f"Hz for {self.hop_length} samples at {self.sample_rate} Hz; restore its config.json"
            )
        self.config["output_rate"] = self.output_rate

    def network_frames(self, num_samples: int) -> int:
        return num_samples // self.hop_length

    def num_frames(self, num_samples: int) -> int:
        """Codes of a clip: whole frames, rounded up; raw as upstream, rounded down."""
        return -(-num_samples // self.hop_length) if self.mitigated else self.network_frames(num_samples)

    def network_encode(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        del num_codebooks
        network: Any = self.network
        inputs = self.features([row[0, : int(n)] for row, n in zip(x, lengths, strict=True)])
        return network.encode(**{k: v.to(x.device) for k, v in inputs.items()}).audio_codes.long()

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens,
        text: Any = None,
        size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | list[Tensor]:
        """As `AudioTokenizer.decode`, resampled from the decoder's own rate."""
        tokens.check(self.spec)
        if "sample_rate" not in tokens.side:
            rate = integers([self.sample_rate] * len(tokens)).to(tokens.codes.device)
            tokens = Tokens(tokens.codes, tokens.lengths, tokens.spec, tokens.side | {"sample_rate": rate})
        speaker = copy.copy(self)
        speaker.sample_rate, speaker.hop_length = self.output_rate, self.output_hop
        return super(NeuCodecWrapper, speaker).decode(tokens, text, size, generator)

    def timing(self) -> dict[str, Any]:
        """As `WrappedAudio.timing`, with the rate of the decoder's own output."""
        return super().timing() | {"output_rate": self.output_rate}


def plain(value: Any) -> Any:
    """Tuples as lists, as they are in JSON: a config means the same before and after it was saved."""
    return list(value) if isinstance(value, tuple) else value
