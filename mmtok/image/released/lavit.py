"""LaVIT's published tokenizer: ``visual_tokenizer/`` of ``rain1011/LaVIT-7B-v2`` (LaVIT Community Licence).

Three files hold it: ``tokenizer_encoder.bin`` (selector, merger, codebook), ``tokenizer_decoder.bin`` (codes to
features) and ``eva_vitg_psz14.bin`` (the vision encoder). The diffusion model that makes pixels is not read: give a
``pixels`` config to train a decoder of our own. The merger that LaVIT's language model reads for understanding is
another one (``language_model/visual_weight.bin``), not that of the codes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtok.image.dynamic import PUBLISHED, Dynamic
from mmtok.image.released.renaming import fill, rename, with_bias
from mmtok.layers.vision import read_state

FAMILY = "LaVIT"
FILES = ("tokenizer_encoder.bin", "tokenizer_decoder.bin", "eva_vitg_psz14.bin")
DEPTHS = (12, 12, 40)  # blocks of merger, feature decoder and vision encoder
VISION = "vision.network.model."
# Towards the language model, towards the diffusion models, and CLIP's projection.
IGNORED = ("encoder.vit_proj.", "decoder.unet_proj", "decoder.unet_attnpool.", "vision.head.", "vision.norm.")


def block_names(ours: str, published: str, own_attention: str, cross_attention: str) -> dict[str, list[str]]:
    """Names of one block; ours joins the key and the value of the cross-attention."""
    names = {}
    for i in (0, 1, 2):
        names |= with_bias(f"{ours}.norm{i}", f"{published}.norm{i}")
    own, cross = f"{published}.{own_attention}", f"{published}.{cross_attention}"
    names |= with_bias(f"{ours}.self_attn.qkv", f"{own}.qkv")
    names |= with_bias(f"{ours}.self_attn.proj", f"{own}.proj")
    names |= with_bias(f"{ours}.cross_attn.query", f"{cross}.query")
    names |= with_bias(f"{ours}.cross_attn.key_value", f"{cross}.key", f"{cross}.value")
    names |= with_bias(f"{ours}.cross_attn.proj", f"{cross}.proj")
    names |= with_bias(f"{ours}.mlp.0", f"{published}.mlp.fc1")
    names |= with_bias(f"{ours}.mlp.2", f"{published}.mlp.fc2")
    return names


def encoder_names(depth: int) -> dict[str, list[str]]:
    """Selector, merger and codebook: ours -> ``tokenizer_encoder.bin``."""
    names = with_bias("predictor.first.0", "token_predictor.in_conv.0")
    names |= with_bias("predictor.first.1", "token_predictor.in_conv.1")
    for i in (0, 2, 4):
        names |= with_bias(f"predictor.last.{i}", f"token_predictor.out_conv.{i}")
    for i in range(depth):
        blocks = f"merger.blocks.{i}", f"causal_encoder.blocks.{i}"
        names |= block_names(*blocks, "token_causal_attn", "token_cross_attn")
    names |= with_bias("merger.context_norm", "causal_encoder.ln_vision") | with_bias(
        "merger.norm", "causal_encoder.norm"
    )
    for i in (0, 2):
        names |= with_bias(f"to_code.{i}", f"encode_task_layer.{i}")
    return names | {"quantizer.book.codebook": ["quantize.embedding.weight"]}


def decoder_names(depth: int) -> dict[str, list[str]]:
    """Feature decoder: ours -> ``tokenizer_decoder.bin``."""
    names = with_bias("decoder.in_proj", "in_proj") | with_bias("decoder.norm", "norm")
    names |= {"decoder.positions": ["pos_embed"], "decoder.queries": ["query_embed"]}
    for i in range(depth):
        names |= block_names(f"decoder.blocks.{i}", f"blocks.{i}", "self_attn", "cross_attn")
    for i in (0, 2):
        names |= with_bias(f"decoder.task.{i}", f"decode_task_layer.{i}")
    return names


def vision_names(depth: int) -> dict[str, list[str]]:
    """EVA-CLIP-g as timm names it: ours -> ``eva_vitg_psz14.bin``; the final norm is not used."""
    names = [*with_bias("patch_embed.proj", ""), "cls_token", "pos_embed"]
    for i in range(depth):
        for layer in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            names += with_bias(f"blocks.{i}.{layer}", "")
        names += [f"blocks.{i}.attn.{part}" for part in ("qkv.weight", "q_bias", "v_bias")]
    return {f"{VISION}{name}": [name] for name in names}


def convert_lavit(
    encoder: Mapping[str, Tensor],
    decoder: Mapping[str, Tensor],
    vision: Mapping[str, Tensor],
    depths: Sequence[int] = DEPTHS,
) -> dict[str, Tensor]:
    """Published tensors of the three files -> the state of ``Dynamic(**PUBLISHED)``, without a pixel decoder.

    Args:
        encoder: of ``tokenizer_encoder.bin``; vision weights in it (``encoder.``) are passed over.
        decoder: of ``tokenizer_decoder.bin`` or ``highres_tokenizer_decoder.bin``; projections to the diffusion model
            are passed over.
        vision: of ``eva_vitg_psz14.bin``.
        depths: blocks of merger, feature decoder and vision encoder.

    Raises:
        ValueError: missing or unexpected names.
    """
    parts = (
        ("encoder.", encoder, encoder_names),
        ("decoder.", decoder, decoder_names),
        ("vision.", vision, vision_names),
    )
    state: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    for (prefix, tensors, table), depth in zip(parts, depths, strict=True):
        state |= {prefix + k: v for k, v in tensors.items()}  # the files share names such as norm.weight
        names |= {ours: [prefix + s for s in sources] for ours, sources in table(depth).items()}
    found = rename(state, names, FAMILY, (*IGNORED, "encoder.encoder."))
    for name in ("decoder.positions", "decoder.queries"):
        found[name] = found[name][0]
    found["quantizer.book.initialized"] = torch.tensor(True)
    return found


def load_lavit(
    source: str | Path | Sequence[Mapping[str, Tensor]],
    config: Mapping[str, Any] = PUBLISHED,
    pixels: Mapping[str, Any] | None = None,
) -> Dynamic:
    """LaVIT's tokenizer with its published weights: codes, merged features, reconstructed features.

    Args:
        source: the folder ``visual_tokenizer``, or the tensors of its three files in the order of `FILES`.
        config: sizes other than the published ones.
        pixels: config of a pixel decoder, which starts untrained; None = none, so that ``decode`` is refused.

    Raises:
        ValueError: a missing file, names or shapes that do not fit.
    """
    if isinstance(source, (str, Path)):
        source = [read_state(Path(source) / name) for name in FILES]
    if len(source) != len(FILES):
        raise ValueError(f"source: expected the tensors of {', '.join(FILES)}, got {len(source)} mappings")
    encoder, decoder, vision = source
    settings: dict[str, Any] = copy.deepcopy(dict(config))
    tokenizer = Dynamic(**{**settings, "pixels": pixels})
    network: Any = tokenizer.vision.network
    depths = (settings["merger"][1], settings["decoder"][1], len(network.model.blocks))
    fill(tokenizer, convert_lavit(encoder, decoder, vision, depths), FAMILY, ("pixel_decoder.",))
    return tokenizer.eval()
