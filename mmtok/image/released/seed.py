"""SEED's published tokenizer: ``seed_quantizer.pt`` of ``AILab-CVC/seed-tokenizer-2`` (Apache-2.0), a flat state dict.

Its authors load it without looking at what is missing; here every name must be accounted for. It has no projections to
a common space with text (they are of stage 1 only) and no pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtok.image.causal1d import PUBLISHED, Causal1D
from mmtok.image.released.renaming import fill, rename, with_bias
from mmtok.layers.vision import read_state

FAMILY = "SEED"
VISION = "vision.network.model."
ABSENT = ("vision_proj.", "text_proj.", "temperature", "pixel_decoder.")  # ours that the published file may lack
TEXT = "(embeddings\\.(word|position)_embeddings|encoder\\.layer\\.\\d+\\.(intermediate|output))\\."


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    """Layers below a published prefix, by the largest number: a gap then shows as missing names."""
    found = [int(m[1]) for k in state if (m := re.match(re.escape(prefix) + r"(\d+)\.", k))]
    return 1 + max(found, default=-1)


def vision_names(depth: int) -> dict[str, list[str]]:
    """EVA's vision encoder: timm has the published names."""
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    parts = ["attn.q_bias", "attn.v_bias", "attn.qkv.weight"]
    parts += [f"{p}.{t}" for p in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2") for t in ("weight", "bias")]
    names += [f"blocks.{i}.{part}" for i in range(depth) for part in parts]
    return {VISION + name: [f"visual_encoder.{name}"] for name in names}


def qformer_names(ours: str, published: str, depth: int, freq: int, text: bool) -> dict[str, list[str]]:
    """A Q-Former; ours joins the key and the value of an attention."""
    names = with_bias(f"{ours}.norm", f"{published}.embeddings.LayerNorm")
    for i in range(depth):
        our, their = f"{ours}.layers.{i}", f"{published}.encoder.layer.{i}"
        attentions = {"attention": "attention"} | ({} if i % freq else {"cross": "crossattention"})
        for a, b in attentions.items():
            names |= with_bias(f"{our}.{a}.q", f"{their}.{b}.self.query")
            names |= with_bias(f"{our}.{a}.kv", f"{their}.{b}.self.key", f"{their}.{b}.self.value")
            names |= with_bias(f"{our}.{a}.out", f"{their}.{b}.output.dense")
            names |= with_bias(f"{our}.{a}.norm", f"{their}.{b}.output.LayerNorm")
        for a, b in ({"query_mlp": "_query"} | ({"text_mlp": ""} if text else {})).items():
            names |= with_bias(f"{our}.{a}.up", f"{their}.intermediate{b}.dense")
            names |= with_bias(f"{our}.{a}.out", f"{their}.output{b}.dense")
            names |= with_bias(f"{our}.{a}.norm", f"{their}.output{b}.LayerNorm")
    if text:
        names[f"{ours}.words.weight"] = [f"{published}.embeddings.word_embeddings.weight"]
        names[f"{ours}.word_positions"] = [f"{published}.embeddings.position_embeddings.weight"]
    return names


def branch_names(name: str, suffix: str, depth: int) -> dict[str, list[str]]:
    """One branch of ViT blocks behind the codes, and its positions."""
    names = {f"{name}_positions": [f"pos_embed{suffix}"]}
    for i in range(depth):
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            names |= with_bias(f"{name}_blocks.{i}.{part}", f"blocks{suffix}.{i}.{part}")
    return names


def convert_seed(state: Mapping[str, Tensor], cross_attention_freq: int = 2, text: bool = False) -> dict[str, Tensor]:
    """Published tensors under the names of `Causal1D`; depths, and head "A" or "B", are read from the names.

    Args:
        state: of ``seed_quantizer.pt``, or of a stage-1 training with its projections.
        cross_attention_freq: every which layer of the Q-Former has cross-attention.
        text: take the text branch too; otherwise it may be there or not.

    Raises:
        ValueError: a name is missing or unexpected.
    """
    names = vision_names(_depth(state, "visual_encoder.blocks.")) | with_bias("ln_vision", "ln_vision")
    depth = _depth(state, "Qformer.bert.encoder.layer.")
    names |= {"queries": ["query_tokens"], "quantizer.book.codebook": ["quantize.embedding.weight"]}
    names |= qformer_names("qformer", "Qformer.bert", depth, cross_attention_freq, text)
    for ours, published in {"encode_task": "encode_task_layer", "decode_task": "decode_task_layer"}.items():
        names |= with_bias(f"{ours}.0", f"{published}.0") | with_bias(f"{ours}.2", f"{published}.2")
    names |= branch_names("feature", "", _depth(state, "blocks."))
    names |= branch_names("image", "_image", _depth(state, "blocks_image."))
    names |= with_bias("head.proj", "distill_image_proj")
    reverse = "Reverse_Qformer.bert"
    reverse_depth = _depth(state, f"{reverse}.encoder.layer.")
    if reverse_depth:
        names |= {"head.query": ["reverse_tokens"]}
        names |= qformer_names("head.qformer", reverse, reverse_depth, cross_attention_freq, False)
    else:
        names |= {f"head.down.{i}.weight": [f"image_down.{i}.weight"] for i in (0, 2, 4)}
    if "vision_proj.weight" in state:
        names |= with_bias("vision_proj", "vision_proj") | with_bias("text_proj", "text_proj")
        names |= {"temperature": ["temp"]}
    unread = ["Qformer.cls.", "Reverse_Qformer.cls."]
    unread += [f"{q}.bert.embeddings.position_ids" for q in ("Qformer", "Reverse_Qformer")]
    unread += [k for k in state if re.match(r"Reverse_Qformer\.bert\." + TEXT, k)]
    unread += [] if text else [k for k in state if re.match(r"Qformer\.bert\." + TEXT, k)]
    ours = rename(state, names, FAMILY, unread)
    for name in ("queries", "head.query", "feature_positions", "image_positions"):
        if name in ours:
            ours[name] = ours[name].flatten(0, 1)  # (1, T, D) -> (T, D)
    ours["quantizer.book.initialized"] = torch.tensor(True)
    return ours


def load_seed(source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Causal1D:
    """SEED-2 with its published weights, in evaluation mode.

    Args:
        source: the file ``seed_quantizer.pt``, or its state dict.
        config: arguments of `Causal1D` in place of `PUBLISHED`, e.g. with head "A", a text branch or a pixel decoder to
            train; what the file does not have then keeps its random start.

    Raises:
        ValueError: a damaged file, or names or shapes that do not fit the config.
    """
    state = source if isinstance(source, Mapping) else read_state(source)
    tokenizer = Causal1D(**dict(PUBLISHED if config is None else config))
    qformer = tokenizer.config["qformer"]
    ours = convert_seed(state, qformer.get("cross_attention_freq", 2), text=qformer.get("text_vocab", 0) > 0)
    if tokenizer.vision_proj is None:  # a stage-1 file's projections have no place then
        ours = {k: v for k, v in ours.items() if not k.startswith(ABSENT)}
    fill(tokenizer, ours, FAMILY, ABSENT)
    tokenizer.eval()
    return tokenizer
