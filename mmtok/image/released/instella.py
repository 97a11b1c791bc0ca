"""Instella-T2I's published autoencoder: ``bae/model.safetensors`` of ``amd/Instella-T2I`` (research-only licence)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmtok.image.binary1d import PUBLISHED, Binary1D
from mmtok.image.released.renaming import fill, rename, with_bias
from mmtok.layers.vision import read_state

FAMILY = "Instella-T2I"
IGNORED = ("decoder.repa_proj.",)  # a head for training only


def stack_names(ours: str, depth: int, resize: str) -> dict[str, list[str]]:
    """Names of a stack of blocks and of its change of grid; ours joins q, k, v, and gate and value of the MLP."""
    names = with_bias(f"{ours}.resize.conv", f"{ours}.{resize}.0.conv")
    for i in range(depth):
        block, published = f"{ours}.blocks.{i}", f"{ours}.transformer_blocks.{i}"
        names |= {
            f"{block}.norm1.weight": [f"{published}.input_layernorm.weight"],
            f"{block}.attn.qkv.weight": [f"{published}.attn.{x}_proj.weight" for x in "qkv"],
            f"{block}.attn.q_norm.weight": [f"{published}.attn.norm_q.weight"],
            f"{block}.attn.k_norm.weight": [f"{published}.attn.norm_k.weight"],
            f"{block}.attn.proj.weight": [f"{published}.attn.o_proj.weight"],
            f"{block}.norm2.weight": [f"{published}.post_attention_layernorm.weight"],
            f"{block}.mlp.w13.weight": [f"{published}.mlp.{x}_proj.weight" for x in ("gate", "up")],
            f"{block}.mlp.w2.weight": [f"{published}.mlp.down_proj.weight"],
        }
    return names


def published_names(encoder_depth: int, decoder_depth: int) -> dict[str, list[str]]:
    """Our names -> the published ones."""
    names = with_bias("patch", "encoder.patch_embedder")
    names |= {"latents": ["encoder.latent_tokens"], "mask_token": ["decoder.mask_tokens"]}
    names |= stack_names("encoder", encoder_depth, "down_layers") | stack_names("decoder", decoder_depth, "up_layers")
    names |= {"encoder_norm.weight": ["encoder.norm_out.weight"], "decoder_norm.weight": ["decoder.norm_out.weight"]}
    names |= with_bias("encoder_out", "encoder.proj_out") | with_bias("to_pixel", "to_pixel")
    names |= with_bias("quantizer.project_in", "quantizer.proj.0") | {"quantizer.embed": ["quantizer.embed"]}
    return (
        names
        | {"decoder_in.0.weight": ["decoder.input_layer.0.weight"]}
        | with_bias("decoder_in.1", "decoder.input_layer.1")
    )


def convert_instella(
    state: Mapping[str, Tensor], encoder_depth: int = 12, decoder_depth: int = 16
) -> dict[str, Tensor]:
    """Published tensors -> the state of ``Binary1D(**PUBLISHED)``.

    Args:
        state: of ``bae/model.safetensors``.
        encoder_depth, decoder_depth: blocks.

    Raises:
        ValueError: missing or unexpected names.
    """
    found = rename(state, published_names(encoder_depth, decoder_depth), FAMILY, IGNORED)
    found["latents"] = found["latents"][0]  # (1, 128, 768)
    found["mask_token"] = found["mask_token"][0, 0]  # (1, 1, 1024)
    return found


def load_instella(source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] = PUBLISHED) -> Binary1D:
    """Instella-T2I's autoencoder with its published weights; 428 M parameters.

    The released generators' positions span 0 .. 63 at every size (``set_scale(1024)``), as `PUBLISHED` has it, and
    rotary tables are the mixed ones.

    Args:
        source: ``model.safetensors``, or its tensors.
        config: sizes other than the published ones.

    Raises:
        ValueError: a missing file, names or shapes that do not fit.
    """
    state = read_state(source) if isinstance(source, (str, Path)) else source
    tokenizer = Binary1D(**config)
    fill(tokenizer, convert_instella(state, config["encoder"][1], config["decoder"][1]), FAMILY)
    return tokenizer.eval()
