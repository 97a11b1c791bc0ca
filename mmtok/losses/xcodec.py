"""The losses of X-Codec with the numbers of its released configuration (arXiv 2408.17175)."""

from __future__ import annotations

from typing import NamedTuple

from mmtok.losses.pqmf import SubbandSTFTLoss
from mmtok.losses.spectral import MultiScaleSTFTLoss
from mmtok.losses.spectral_discriminators import MultiFrequencyDiscriminator


class XCodecLosses(NamedTuple):
    stft: MultiScaleSTFTLoss
    subband: SubbandSTFTLoss
    discriminator: MultiFrequencyDiscriminator


def xcodec_losses(sample_rate: int = 16_000) -> XCodecLosses:
    """Full-band STFT (weight 1), sub-band STFT (weight 1), and the only discriminator (least squares, weight 1, feature
    matching 20, from step 1). The rest of its loss: the quantizer's with weight 1, the semantic one with 100; a mel
    distance (`LogMelLoss`, 45) is written there but switched off.

    Args:
        sample_rate: Hz, of the discriminator's mel scale.
    """
    stft = MultiScaleSTFTLoss((512, 1024, 2048), (480, 960, 1200), (120, 240, 300))
    return XCodecLosses(stft, SubbandSTFTLoss(), MultiFrequencyDiscriminator(sample_rate))
