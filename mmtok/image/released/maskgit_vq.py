"""MaskGIT-VQ, TiTok's first teacher: ``maskgit-vqgan-imagenet-f16-256.bin`` of ``fun-research/TiTok`` (Apache-2.0)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtok.image.raster2d import MASKGIT_VQ, Raster2D
from mmtok.image.released.convolutional import decoder_names, encoder_names
from mmtok.image.released.renaming import fill, rename
from mmtok.layers.conv2d import ConvShape
from mmtok.layers.vision import read_state

FAMILY = "MaskGIT-VQ"
PUBLISHED_SHAPE = ConvShape(middle_attention=False, style="maskgit")


def convert_maskgit_vq(state: Mapping[str, Tensor], shape: ConvShape = PUBLISHED_SHAPE) -> dict[str, Tensor]:
    """Published tensors -> the weights of ``Raster2D(**MASKGIT_VQ)``.

    Args:
        state: the file's tensors.
        shape: other sizes than the published ones.

    Raises:
        ValueError: missing or unexpected names.
    """
    names = encoder_names(shape) | decoder_names(shape) | {"quantizer.book.codebook": ["quantize.embedding.weight"]}
    return rename(state, names, FAMILY) | {"quantizer.book.initialized": torch.tensor(True)}


def load_maskgit_vq(source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] = MASKGIT_VQ) -> Raster2D:
    """MaskGIT-VQ with its published weights: 256 codes of 1024 for 256 x 256 px, or a grid of any size.

    Args:
        source: the file, or its tensors.
        config: of `Raster2D`, for other sizes than the published ones.

    Raises:
        ValueError: a missing file, names or shapes that do not fit.
    """
    state = read_state(source) if isinstance(source, (str, Path)) else source
    tokenizer = Raster2D(**config)
    fill(tokenizer, convert_maskgit_vq(state, tokenizer.encoder.shape), FAMILY)
    return tokenizer.eval()
