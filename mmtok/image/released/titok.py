"""TiTok and TA-TiTok: ``yucornetto/tokenizer_titok_*`` and ``fun-research/TiTok``, ``TA-TiTok`` (Apache-2.0)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.image.released.convolutional import decoder_names
from mmtok.image.released.renaming import fill, rename, with_bias
from mmtok.image.titok import TiTok
from mmtok.layers.conv2d import ConvShape
from mmtok.layers.vision import read_state

FAMILY = "TiTok"
IGNORED = ("quantize.embed_prob",)  # a statistic of the training of TA-TiTok
KEPT_4D = "smooth.weight"  # the only convolution whose kernel is one here too


def stack_names(part: str, depth: int) -> dict[str, list[str]]:
    """Names that encoder and decoder share."""
    names = {f"{part}.class_token": [f"{part}.class_embedding"], f"{part}.positions": [f"{part}.positional_embedding"]}
    names[f"{part}.latent_positions"] = [f"{part}.latent_token_positional_embedding"]
    names |= with_bias(f"{part}.norm", f"{part}.ln_pre") | with_bias(f"{part}.vit.norm", f"{part}.ln_post")
    for i in range(depth):
        ours, published = f"{part}.vit.blocks.{i}", f"{part}.transformer.{i}"
        names |= with_bias(f"{ours}.norm1", f"{published}.ln_1") | with_bias(f"{ours}.norm2", f"{published}.ln_2")
        names |= {f"{ours}.attn.qkv.{x}": [f"{published}.attn.in_proj_{x}"] for x in ("weight", "bias")}
        names |= with_bias(f"{ours}.attn.proj", f"{published}.attn.out_proj")
        names |= with_bias(f"{ours}.mlp.fc1", f"{published}.mlp.c_fc")
        names |= with_bias(f"{ours}.mlp.fc2", f"{published}.mlp.c_proj")
    return names


def published_names(tokenizer: TiTok) -> dict[str, list[str]]:
    """Our names -> the published ones, for the parts that ``tokenizer`` has."""
    names = stack_names("encoder", len(tokenizer.encoder.vit.blocks))
    names |= stack_names("decoder", len(tokenizer.decoder.vit.blocks))
    names |= with_bias("encoder.patch", "encoder.patch_embed") | with_bias("encoder.out", "encoder.conv_out")
    names |= {"encoder.latent_tokens": ["latent_tokens"], "decoder.mask_token": ["decoder.mask_token"]}
    names |= {"quantizer.book.codebook": ["quantize.embedding.weight"]} | with_bias(
        "decoder.embed", "decoder.decoder_embed"
    )
    if tokenizer.decoder.text is not None:
        names |= with_bias("decoder.text.proj", "decoder.text_guidance_proj")
        names["decoder.text.positions"] = ["decoder.text_guidance_positional_embedding"]
    if tokenizer.teacher is None:
        return names | with_bias("head", "decoder.ffn.0") | with_bias("smooth", "decoder.conv_out")
    names |= with_bias("head.0", "decoder.ffn.0") | with_bias("head.2", "decoder.ffn.2")
    names["teacher.codebook"] = ["pixel_quantize.embedding.weight"]
    shape: ConvShape = tokenizer.teacher.decoder.shape
    return names | {f"teacher.{k}": [f"pixel_{s}" for s in v] for k, v in decoder_names(shape).items()}


def convert_titok(state: Mapping[str, Tensor], tokenizer: TiTok) -> dict[str, Tensor]:
    """Published tensors -> the state of ``tokenizer``, which says what parts there are (it may be on the meta device).

    Codes of a cosine codebook are scaled to length 1, as the original does at every use. The null token of the text,
    which the original does not have, becomes 0.

    Raises:
        ValueError: missing or unexpected names.
    """
    found = rename(state, published_names(tokenizer), FAMILY, IGNORED)
    found["decoder.mask_token"] = found["decoder.mask_token"].flatten(0, 1)  # (1, 1, width)
    for key, value in found.items():
        if value.ndim == 4 and not key.startswith("teacher.") and key != KEPT_4D:
            found[key] = value.flatten(1)  # convolutions of 1 x 1 and of whole patches are Linears here
    if tokenizer.unit_latents:
        found["quantizer.book.codebook"] = F.normalize(found["quantizer.book.codebook"].float(), dim=-1)
    if tokenizer.decoder.text is not None:
        found["decoder.text.null"] = torch.zeros(found["decoder.positions"].shape[1])
    return found | {"quantizer.book.initialized": torch.tensor(True)}


def load_titok(source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any]) -> TiTok:
    """A TiTok or TA-TiTok with its published weights.

    Args:
        source: the file (.safetensors, .bin, .pt), or its tensors.
        config: of `TiTok`: TITOK_L32, TITOK_B64, TITOK_S128, TATITOK_BL32, TATITOK_BL64 or TATITOK_BL128.

    Raises:
        ValueError: a missing file, names or shapes that do not fit.
    """
    tokenizer = TiTok(**config)
    if tokenizer.teacher is not None and tokenizer.stage != 2:
        raise ValueError("TiTok: the published weights are of stage 2; pass a config with stage=2")
    state = read_state(source) if isinstance(source, (str, Path)) else source
    fill(tokenizer, convert_titok(state, tokenizer), FAMILY)
    return tokenizer.eval()
