"""Mimi (arXiv 2410.00037) as transformers' MimiModel runs it: ``mimi:<folder or repository>``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from mmtok.catalogue import Family, Taxonomy
from mmtok.wrappers.raw_lengths import RawLengths
from mmtok.wrappers.wrapped import transformers_model

# What says, with the weights, which codes a sound has; by the names of transformers' MimiConfig.
FACTS = (
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
    "num_quantizers",
    "num_semantic_quantizers",
    "codebook_size",
)


def open_mimi(source: str) -> MimiWrapper:
    """A folder that `MimiModel.save_pretrained` wrote, or a hub repository; raises as `transformers_model`."""
    network, folder = transformers_model(FAMILY, "MimiModel", source)
    return MimiWrapper(network, folder)


FAMILY = Family(
    name="mimi",
    title="Mimi: streaming speech codec, one semantic level beside acoustic ones",
    modality="audio",
    source="folder or hub repository",
    example="mimi:kyutai/mimi",
    package="transformers",
    install="pip install 'mmtok[codecs]'",
    code_licence="Apache-2.0",
    weights_licence="CC-BY-4.0",
    taxonomy=Taxonomy(
        architecture="CNN+T/CNN+T",
        input="T",
        quantization="RVQ",
        bitrate="F",
        objective=("GAN", "Feat", "Rec", "VQ"),
        auxiliary=("SD",),
        joint=True,
        domain="S",
        rate="12.5",
        streamable=True,
    ),
    open=open_mimi,
)


class MimiWrapper(RawLengths):
    """transformers' MimiModel.

    Levels are one semantic quantizer (or as many as the config says) and the residual levels of the acoustic one, which
    quantizes the same latent, not what the semantic level left over; so levels 1.. refine each other and any prefix
    decodes. Clips are padded with zeros to whole frames of 1920 samples (of the published model). transformers, given
    a clip that ends within a frame, pads the hidden layers instead, so its own last code of such a clip is another.

    Raw, a batch goes in with its padding mask, which transformers ignores (huggingface/transformers#43377): as
    everything is causal, it is the last frame of a shorter clip that takes the padding for sound, and no other.

    Args:
        network: the MimiModel, mono, with encoder and decoder.
        source: where it came from, for the name and the model card.

    Raises:
        ValueError: a stereo network, one without its encoder or decoder, or one that transformers cannot run.
    """

    family = FAMILY
    # Attention reaches `sliding_window` steps back in each layer (80 s in all, as published), and a piece's frames have
    # other rotary phases than in the whole, so codes of pieces agree only up to rounding: sound is never cut.
    encode_margin = None
    decode_margin = None

    def __init__(self, network: Any, source: str | Path):
        c = network.config
        absent = [half for half in ("encoder", "decoder") if getattr(network, half) is None]
        if c.audio_channels != 1 or absent:
            found = f"no {absent[0]}" if absent else f"{c.audio_channels} channels"
            raise ValueError(f"{source}: expected a mono Mimi with encoder and decoder, got {found}; load another")
        super().__init__(network, {name: getattr(c, name) for name in FACTS}, source)
        self.sample_rate = c.sampling_rate
        self.hop_length = math.prod(c.upsampling_ratios) * c.latent_stride
        self.codebook_sizes = (c.codebook_size,) * c.num_quantizers
        self.fewest = c.num_semantic_quantizers  # transformers refuses to encode with fewer levels
        self.check_runs()

    def network_frames(self, num_samples: int) -> int:
        return -(-num_samples // self.hop_length)  # each convolution makes up for a cut stride, so none is lost

    def network_encode(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        network: Any = self.network
        if self.mitigated:
            levels = max(num_codebooks or 0, self.fewest)
            return network.encode(x, num_quantizers=levels).audio_codes[:, :num_codebooks]
        mask = torch.arange(x.shape[-1], device=x.device) < lengths[:, None]
        return network.encode(x, padding_mask=mask[:, None], num_quantizers=num_codebooks).audio_codes

    def network_decode(self, codes: Tensor) -> Tensor:
        network: Any = self.network
        return network.decode(codes).audio_values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As `torch.nn.Module._apply` (`to`, `double`): transformers keeps codebooks that it has once worked out, and
        would go on with them where and as they were."""
        moved: nn.Module = super()._apply(fn, recurse)
        for module in moved.modules():
            if isinstance(getattr(module, "_embed", None), Tensor):
                module._embed = None  # pyright: ignore[reportArgumentType]
        return self
