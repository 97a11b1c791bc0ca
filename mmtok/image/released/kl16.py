"""MAR's KL-16, the autoencoder of TokenBridge and xAR: ``kl16.ckpt`` of LTH14/mar (MIT), tensors below ``model``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmtok.image.bridge import PUBLISHED, Bridge
from mmtok.image.released.convolutional import decoder_names, encoder_names
from mmtok.image.released.renaming import fill, rename, with_bias
from mmtok.layers.conv2d import ConvShape
from mmtok.layers.vision import read_state

FAMILY = "KL-16"
IGNORED = ("loss.",)  # networks of its training
PUBLISHED_SHAPE = ConvShape(attention=(4,))


def convert_kl16(state: Mapping[str, Tensor], shape: ConvShape = PUBLISHED_SHAPE) -> dict[str, Tensor]:
    """Published tensors -> the weights of ``Bridge(**PUBLISHED)``, without its scale and its quantizer's table.

    Args:
        state: what stands below ``model``.
        shape: other sizes than the published ones.

    Raises:
        ValueError: missing or unexpected names.
    """
    names = encoder_names(shape) | decoder_names(shape)
    names |= with_bias("to_moments", "quant_conv") | with_bias("from_latent", "post_quant_conv")
    found = rename(state, names, FAMILY, IGNORED)
    linear = ("qkv.weight", "proj.weight", "to_moments.weight", "from_latent.weight")  # published as 1 x 1 convolutions
    return {k: v.flatten(1) if k.endswith(linear) else v for k, v in found.items()}


def load_kl16(
    source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] = PUBLISHED, posterior: str = "mode"
) -> Bridge:
    """KL-16 with its published weights, scale 0.2325 and TokenBridge's 64 cells; 66 M parameters.

    Args:
        source: ``kl16.ckpt``, or its tensors.
        config: of `Bridge`, for other sizes than the published ones.
        posterior: ``sample`` quantizes a sample of the posterior, as the original; see `Bridge`.

    Raises:
        ValueError: a missing file, names or shapes that do not fit.
    """
    state = read_state(source) if isinstance(source, (str, Path)) else source
    tokenizer = Bridge(**{**config, "posterior": posterior})
    fill(tokenizer, convert_kl16(state, tokenizer.encoder.shape), FAMILY, ("scale", "quantizer."))
    return tokenizer.eval()
