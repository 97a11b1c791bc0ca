"""The tokenizer of Higgs Audio v2 as transformers' HiggsAudioV2TokenizerModel runs it: ``higgs:<folder or repo>``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmtok.catalogue import Family, Taxonomy
from mmtok.wrappers.wrapped import transformers_model
from mmtok.wrappers.xcodec import XCodecWrapper


def open_higgs(source: str) -> HiggsWrapper:
    """A folder that `HiggsAudioV2TokenizerModel.save_pretrained` wrote, or a hub repository.

    Raises as `transformers_model`.
    """
    network, folder = transformers_model(FAMILY, "HiggsAudioV2TokenizerModel", source)
    return HiggsWrapper(network, folder)


FAMILY = Family(
    name="higgs",
    title="Higgs Audio v2: X-Codec at 24 kHz and 25 Hz, with small projected codebooks",
    modality="audio",
    source="folder or hub repository",
    example="higgs:bosonai/higgs-audio-v2-tokenizer",
    package="transformers",
    install="pip install 'mmtok[codecs]'",
    code_licence="Apache-2.0",
    weights_licence="Boson Higgs Audio 2 licence, with commercial terms of its own: check the card",
    taxonomy=Taxonomy(
        architecture="CNN+T/CNN",
        input="T",
        quantization="RVQ",
        bitrate="F",
        objective=("GAN", "Feat", "Rec", "VQ"),
        auxiliary=("SD",),
        joint=True,
        domain="SMA",
        rate="25",
        streamable=False,
    ),
    open=open_higgs,
)

PAD = 160  # samples at HuBERT's rate that transformers puts on either side of a clip


class HiggsWrapper(XCodecWrapper):
    """transformers' HiggsAudioV2TokenizerModel: X-Codec's networks, whose HuBERT hears a resampled copy of the sound.

    Of HuBERT's 50 frames a second every second one is kept. Levels are residual, each with projections of its own to a
    narrow codebook; 0.5, 1, 1.5 and 2 kbit/s are 2, 4, 6 and 8 levels, and other numbers are encoded as more and cut.

    HuBERT is given no mask, attends to the whole clip and normalizes its first layer over time: raw, a shorter clip of
    a batch has other codes throughout. Raw, the acoustic encoder's input also shifts by half a frame where a clip's
    length gives HuBERT another number of frames than it.

    Args:
        network: the HiggsAudioV2TokenizerModel.
        source: where it came from, for the name and the model card.

    Raises:
        ValueError: sizes that transformers can save but not run, or whose frames and hops do not fit.
    """

    family = FAMILY

    def __init__(self, network: Any, source: str | Path):
        super().__init__(network, source)
        c = network.config
        self.config |= {name: getattr(c, name) for name in ("semantic_sample_rate", "downsample_factor")}

    def network_frames(self, num_samples: int) -> int:
        c: Any = self.network.config
        length = -(-num_samples * c.semantic_sample_rate // c.sample_rate) + 2 * PAD
        teacher = c.semantic_model_config
        for kernel, stride in zip(teacher.conv_kernel, teacher.conv_stride, strict=True):
            length = (length - kernel) // stride + 1
        length = -(-length // c.semantic_downsample_factor)
        for stride in c.strides:
            kernel = 3 if stride == 1 else 2 * stride
            length = (length + 2 * ((kernel - 1) // 2) - kernel) // stride + 1
        return length
