"""The head over dimensions of TokenBridge's generator: ``checkpoint-last.pth`` of ``Epiphqny/TokenBridge`` (MIT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmtok.image.dimension_head import PUBLISHED, DimensionHead
from mmtok.image.released.renaming import rename, with_bias

FAMILY = "TokenBridge head"
IGNORED = (  # the generator around it, and tables that follow from the number of cells
    *("class_emb.", "fake_latent", "z_proj", "encoder_", "decoder_", "mask_token", "output_pos_embed"),
    *("reconstruction_values", "boundaries", "channel_mask"),
)


def published_names(num_dimensions: int, depth: int) -> dict[str, list[str]]:
    """Our names -> the published ones."""
    names = with_bias("condition", "condition_proj") | with_bias("norm", "channel_norm")
    names |= with_bias("last_modulation", "channel_final.adaLN_modulation.1")
    names |= {"positions": ["channel_embed"], "steps": ["timesteps_embeddings"]}
    for i in range(num_dimensions):
        names |= with_bias(f"heads.{i}", f"channel_heads.{i}")
        if i < num_dimensions - 1:
            names[f"tables.{i}.weight"] = [f"token_embeddings.{i}.weight"]
    for i in range(depth):
        ours, published = f"blocks.{i}", f"channel_blocks.{i}"
        for part in ("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.proj", "norm2"):
            names |= with_bias(f"{ours}.{part}", f"{published}.{part}")
        names |= with_bias(f"{ours}.mlp.0", f"{published}.mlp.fc1") | with_bias(f"{ours}.mlp.3", f"{published}.mlp.fc2")
        names |= with_bias(f"{ours}.modulation", f"{published}.adaLN_modulation.1")
    return names


def load_dimension_head(state: Mapping[str, Tensor], config: Mapping[str, Any] = PUBLISHED) -> DimensionHead:
    """The head with its published weights; its order is not among them and comes from ``config``.

    Args:
        state: what stands below ``model_ema`` (or ``model``) in the checkpoint; the generator's own weights are left.
        config: of `DimensionHead`; for TokenBridge-H condition_dim is 1280 and depth 6.

    Raises:
        ValueError: names or shapes that do not fit.
    """
    head = DimensionHead(**config)
    found = rename(state, published_names(head.num_dimensions, len(head.blocks)), FAMILY, IGNORED)
    found["positions"], found["steps"] = found["positions"][0], found["steps"][0]  # (1, D, dim)
    own = head.state_dict()
    sizes = {k: (tuple(v.shape), tuple(own[k].shape)) for k, v in found.items()}
    wrong = [f"{k}: expected {want}, got {got}" for k, (got, want) in sizes.items() if got != want]
    if wrong:
        raise ValueError(f"{FAMILY}: wrong {wrong[:3]}; give the sizes of this checkpoint in config")
    with torch.no_grad():
        head.load_state_dict({**own, **{k: v.float() for k, v in found.items()}})
    return head.eval()
