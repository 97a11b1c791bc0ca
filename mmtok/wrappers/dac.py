"""DAC (arXiv 2306.06546) as transformers' DacModel runs it: ``dac:<folder or repository>``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmtok.catalogue import Family, Taxonomy
from mmtok.wrappers.wrapped import WrappedAudio, transformers_model

# What says, with the weights, which codes a sound has; by the names of transformers' DacConfig.
FACTS = ("sampling_rate", "downsampling_ratios", "upsampling_ratios", "codebook_size", "codebook_dim")


def open_dac(source: str) -> DACWrapper:
    """A folder that `DacModel.save_pretrained` wrote, or a hub repository; raises as `transformers_model`."""
    network, folder = transformers_model(FAMILY, "DacModel", source)
    return DACWrapper(network, folder)


FAMILY = Family(
    name="dac",
    title="DAC: Snake convolutions and residual codes chosen by cosine",
    modality="audio",
    source="folder or hub repository",
    example="dac:descript/dac_16khz",
    package="transformers",
    install="pip install 'mmtok[codecs]'",
    code_licence="Apache-2.0",
    weights_licence="MIT",
    taxonomy=Taxonomy(
        architecture="CNN/CNN",
        input="T",
        quantization="RVQ",
        bitrate="F",
        objective=("GAN", "Feat", "Rec", "VQ"),
        auxiliary=(),
        joint=True,
        domain="SMA",
        rate="50, 75, 86",
        streamable=False,
    ),
    open=open_dac,
)


class DACWrapper(WrappedAudio):
    """transformers' DacModel.

    DacModel takes no padding mask and does not pad to whole frames itself; its decoder returns (B, L) without the
    channel, and with an odd stride fewer than T * hop samples. All of that is evened out here. It ignores
    ``n_quantizers`` in training mode; encode always runs in evaluation mode.

    The released 16 and 24 kHz weights (strides 2, 4, 5, 8) decode 8 samples early: `odd_stride_samples`, one position
    of the layers of stride 5. That was measured, and is no matter of the layers' geometry: at an odd stride the encoder
    reads half a position early and the decoder writes half a position early, which cancels. So other weights with odd
    strides may have another delay; set ``delay_samples`` to theirs (0 if there is none).

    Args:
        network: the DacModel.
        source: where it came from, for the name and the model card.

    Raises:
        ValueError: strides below 2, or encoder and decoder of different hops.
    """

    family = FAMILY

    def __init__(self, network: Any, source: str | Path):
        c = network.config
        config = {name: getattr(c, name) for name in FACTS}
        config |= {k: list(v) for k, v in config.items() if isinstance(v, tuple)}
        super().__init__(network, config, source)
        down, up = tuple(c.downsampling_ratios), tuple(c.upsampling_ratios)
        if not down or min(down + up) < 2 or math.prod(down) != math.prod(up):
            raise ValueError(
                f"{self.name}: expected strides of at least 2 with one product, got {down} in the encoder and {up} in "
                "the decoder; restore the folder's config.json"
            )
        self.sample_rate, self.hop_length = int(c.sampling_rate), math.prod(down)
        self.codebook_sizes = (c.codebook_size,) * len(network.quantizer.quantizers)
        shift = odd_stride_samples(up)
        self.delay_samples = -shift
        # Convolutions alone, so a frame depends on what the layers read for it: exact for the encoder; the decoder's
        # bound leaves room for a delay of either sign.
        first, last = inputs_read(network.encoder.modules(), 0, 0)
        self.encode_margin = max(-(first // self.hop_length), last // self.hop_length)
        first, last = inputs_read(network.decoder.modules(), -shift, self.hop_length - 1 + shift)
        self.decode_margin = max(-first, last)

    def network_encode(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        del lengths  # DacModel takes no mask
        network: Any = self.network
        return network.encode(x, n_quantizers=num_codebooks).audio_codes

    def network_decode(self, codes: Tensor) -> Tensor:
        network: Any = self.network
        return network.decode(audio_codes=codes).audio_values[:, None]


def odd_stride_samples(strides: Sequence[int]) -> int:
    """Samples that a decoder of these strides, in its order, returns too few: 8 for (8, 5, 4, 2), 0 if all are even.

    Each transposed convolution of an odd stride gives one position less than stride times its input.
    """
    samples = 0
    for stride in strides:
        samples = samples * stride + stride % 2
    return samples


def inputs_read(layers: Iterable[nn.Module], first: int, last: int) -> tuple[int, int]:
    """First and last input position (negative before 0) that the outputs ``first`` .. ``last`` depend on.

    Counts torch's 1-D convolutions among ``layers``, which must come in the order in which they run, with skips that
    only pass positions straight on. Other layers are taken to work on single positions.
    """
    for layer in reversed([m for m in layers if isinstance(m, (nn.Conv1d, nn.ConvTranspose1d))]):
        stride, padding = layer.stride[0], int(layer.padding[0])
        span = (layer.kernel_size[0] - 1) * layer.dilation[0]
        if isinstance(layer, nn.Conv1d):
            first, last = first * stride - padding, last * stride - padding + span
        else:  # the output n has input i when n + padding - i * stride is in 0 .. span
            first, last = -((span - padding - first) // stride), (last + padding) // stride
    return first, last
