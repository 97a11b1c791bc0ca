"""X-Codec (arXiv 2408.17175) as transformers' XcodecModel runs it: ``xcodec:<folder or repository>``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from mmtok.catalogue import Family, Taxonomy
from mmtok.wrappers.raw_lengths import RawLengths
from mmtok.wrappers.wrapped import transformers_model

# What says, with the weights, which codes a sound has; by the names of transformers' three configs.
FACTS = ("sample_rate", "kernel_size", "strides", "unit_kernel_size", "block_dilations", "codebook_size")
ACOUSTIC_FACTS = ("downsampling_ratios", "upsampling_ratios")
SEMANTIC_FACTS = (
    "model_type",
    "conv_stride",
    "conv_kernel",
    "num_attention_heads",
    "num_conv_pos_embedding_groups",
    "feat_extract_norm",
    "feat_extract_activation",
    "hidden_act",
    "layer_norm_eps",
    "do_stable_layer_norm",
)


def open_xcodec(source: str) -> XCodecWrapper:
    """A folder that `XcodecModel.save_pretrained` wrote, or a hub repository; raises as `transformers_model`."""
    network, folder = transformers_model(FAMILY, "XcodecModel", source)
    return XCodecWrapper(network, folder)


FAMILY = Family(
    name="xcodec",
    title="X-Codec: acoustic and HuBERT or WavLM features in one residual quantizer",
    modality="audio",
    source="folder or hub repository",
    example="xcodec:hf-audio/xcodec-hubert-librispeech",
    package="transformers",
    install="pip install 'mmtok[codecs]'",
    code_licence="Apache-2.0",
    weights_licence=(
        "check the card; that of hf-audio/xcodec-wavlm-more-data says CC-BY-4.0, the authors' repository states none"
    ),
    taxonomy=Taxonomy(
        architecture="CNN+T/CNN",  # the survey says CNN/CNN: it leaves out HuBERT, whose features are coded too
        input="T",
        quantization="RVQ",
        bitrate="F",
        objective=("GAN", "Feat", "Rec", "VQ"),  # the survey leaves out feature matching, which the training code has
        auxiliary=("SD",),
        joint=True,
        domain="SMA",
        rate="50",
        streamable=False,
    ),
    open=open_xcodec,
)


class XCodecWrapper(RawLengths):
    """transformers' XcodecModel.

    transformers takes a rate of ``target_bandwidths`` in kbit/s: 0.5, 1, 1.5, 2 and 4 are 1, 2, 3, 4 and 8 levels.
    Here ``num_codebooks`` is any number of levels; 5 to 7 are encoded as 8 and cut.

    Clips are padded with zeros to whole frames (320 samples of the published models), as the released feature extractor
    does. Raw, they are not: a clip of a few samples more than whole frames comes back that much shorter, and where
    HuBERT finds a frame more than the acoustic encoder, transformers shifts the latter's input by half a hop. Raw, a
    batch is also padded with zeros to its longest clip, to which HuBERT attends: it is given no mask.

    Args:
        network: the XcodecModel.
        source: where it came from, for the name and the model card.

    Raises:
        ValueError: sizes that transformers can save but not run, or whose frames and hops do not fit.
    """

    family = FAMILY
    # HuBERT attends to the whole clip and normalizes its first layer over time: each code depends on all samples.
    encode_margin = None
    # The decoder is convolutions alone; all of them, laid end to end, reach no further than `_decoder_reach` says.
    decode_margin: int | None

    def __init__(self, network: Any, source: str | Path):
        c = network.config
        acoustic, semantic = c.acoustic_model_config, c.semantic_model_config
        config = {name: getattr(c, name) for name in FACTS}
        config["acoustic"] = {name: getattr(acoustic, name) for name in ACOUSTIC_FACTS}
        config["semantic"] = {name: getattr(semantic, name, None) for name in SEMANTIC_FACTS}
        super().__init__(network, config, source)
        self.sample_rate, self.hop_length = c.sample_rate, c.hop_length
        stored = len(network.quantizer.quantizers)
        # By level count; what the config's largest rate does not reach, transformers cannot encode.
        self.rates = {
            min(stored, network.quantizer.get_num_quantizers_for_bandwidth(rate)): rate for rate in c.target_bandwidths
        }
        self.codebook_sizes = (c.codebook_size,) * max(self.rates)
        self.decode_margin = _decoder_reach(acoustic.upsampling_ratios)
        self.check_runs()

    def network_frames(self, num_samples: int) -> int:
        c: Any = self.network.config
        length = num_samples + 2 * (self.hop_length // 2)
        teacher = c.semantic_model_config
        for kernel, stride in zip(teacher.conv_kernel, teacher.conv_stride, strict=True):
            length = (length - kernel) // stride + 1
        for stride in c.strides:
            kernel = 3 if stride == 1 else 2 * stride
            length = (length + 2 * ((kernel - 1) // 2) - kernel) // stride + 1
        return length

    def network_encode(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        del lengths  # XcodecModel takes no mask
        network: Any = self.network
        rate = None  # transformers' own default, the last of its rates
        if num_codebooks is not None:
            rate = self.rates[min(levels for levels in self.rates if levels >= num_codebooks)]
        return network.encode(x, bandwidth=rate).audio_codes[:, :num_codebooks]

    def network_decode(self, codes: Tensor) -> Tensor:
        network: Any = self.network
        return network.decode(codes).audio_values


def _decoder_reach(ratios: list[int]) -> int:
    """Frames on either side that a sample of the acoustic decoder depends on at most.

    In frames: the first convolution reaches 3; a stage of rate r, one step being `step` frames, 1 step of its input;
    then three residual units of kernel 7 and dilations 1, 3, 9 reach 3 * 13 of its output; the last convolution 3.
    """
    reach, step = 3.0, 1.0
    for ratio in ratios:
        reach, step = reach + step, step / ratio
        reach += 39 * step
    return math.ceil(reach + 3 * step)
