"""Mimi: ``kyutai/mimi`` as transformers' MimiModel saves it, and kyutai's own file (code MIT, weights CC-BY-4.0)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtok.audio.mimi import Mimi
from mmtok.audio.released.renaming import fit, read_config, rename
from mmtok.layers.vision import read_state

FAMILY = "Mimi"
HEAD = "semantic_head."  # serves training alone and was not published
USAGE_FLOOR = 1e-5  # a code is its running sum divided by its running count, and by no less than this
# What every published Mimi has, and what this one is built of; by the keys of transformers' MimiConfig.
FIXED = {
    "audio_channels": 1,
    "kernel_size": 7,
    "last_kernel_size": 3,
    "residual_kernel_size": 3,
    "num_residual_layers": 1,
    "compress": 2,
    "use_causal_conv": True,
    "pad_mode": "constant",
    "trim_right_ratio": 1.0,
    "use_conv_shortcut": False,
    "num_semantic_quantizers": 1,
    "hidden_act": "gelu",
    "norm_eps": 1e-5,
    "attention_bias": False,
}
# transformers' names -> those of its saved files, which leave out the two halves
FLAT = (
    (re.compile(r"^(encoder|decoder)\.\1_seanet\."), r"\1."),
    (re.compile(r"^(encoder|decoder)\.(\1_transformer|downsample|upsample)\."), r"\2."),
)
# kyutai's names -> those of transformers' saved files, in this order
ORIGINAL = (
    ("quantizer.rvq_first.vq.", "quantizer.semantic_residual_vector_quantizer."),
    ("quantizer.rvq_first.", "quantizer.semantic_residual_vector_quantizer."),
    ("quantizer.rvq_rest.vq.", "quantizer.acoustic_residual_vector_quantizer."),
    ("quantizer.rvq_rest.", "quantizer.acoustic_residual_vector_quantizer."),
    ("._codebook._initialized", ".codebook.initialized"),
    ("._codebook.embedding_sum", ".codebook.embed_sum"),
    ("._codebook.", ".codebook."),
    ("_transformer.transformer.", "_transformer."),
    ("coder.model.", "coder.layers."),
    (".conv.conv.conv.", ".conv."),
    (".convtr.convtr.convtr.", ".conv."),
    (".conv.conv.", ".conv."),
    (".convtr.convtr.", ".conv."),
    (".linear1.", ".mlp.fc1."),
    (".linear2.", ".mlp.fc2."),
    (".self_attn.out_proj.", ".self_attn.o_proj."),
    (".norm1.", ".input_layernorm."),
    (".norm2.", ".post_attention_layernorm."),
    (".layer_scale_1.", ".self_attn_layer_scale."),
    (".layer_scale_2.", ".mlp_layer_scale."),
)


def mimi_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Mimi` from transformers' ``config.json``.

    Raises:
        ValueError: a missing field, or a variant that `Mimi` does not build.
    """
    try:
        dim, heads = config["hidden_size"], config["num_attention_heads"]
        arguments = {
            "sample_rate": config["sampling_rate"],
            "strides": list(config["upsampling_ratios"])[::-1],
            "width": config["num_filters"],
            "dim": dim,
            "depth": config["num_hidden_layers"],
            "num_heads": heads,
            "mlp_dim": config["intermediate_size"],
            "context": config["sliding_window"],
            "num_codebooks": config["num_quantizers"],
            "codebook_size": config["codebook_size"],
            "codebook_dim": config["codebook_dim"],
        }
    except KeyError as e:
        raise ValueError(f"Mimi: the config lacks {e}; restore the config.json of the released folder") from e
    rope = config.get("rope_parameters") or {}
    wanted = FIXED | {
        "upsample_groups": dim,
        "num_key_value_heads": heads,
        "head_dim": dim // heads,
        "vector_quantization_hidden_dimension": arguments["codebook_dim"],
        "rope_theta": 10000.0,
        "rope_type": "default",
    }
    found = {**wanted, **{k: v for k, v in {**config, **rope}.items() if v is not None}}
    other = {k: found[k] for k, v in wanted.items() if found[k] != v}
    if other or arguments["codebook_dim"] == dim:
        expected = {k: wanted[k] for k in other} or f"codebook_dim other than hidden_size {dim}"
        raise ValueError(
            f"Mimi: expected {expected}, got {other or arguments['codebook_dim']}; this variant is not built here, "
            f"transformers' own MimiModel reads it"
        )
    return arguments


def stack_names(part: str, depth: int, num_strides: int) -> dict[str, str]:
    """Names of the convolutions and the transformer of ``encoder`` or ``decoder``: ours -> the published."""
    convs, step = {f"{part}.first.conv": f"{part}.layers.0"}, 1
    for i in range(num_strides):
        # The published list counts activations too: unit, ELU, down in the encoder; ELU, up, unit in the decoder.
        unit, resample, name = (step, step + 2, "downs") if part == "encoder" else (step + 2, step + 1, "ups")
        convs[f"{part}.units.{i}.conv1.conv"] = f"{part}.layers.{unit}.block.1"
        convs[f"{part}.units.{i}.conv2.conv"] = f"{part}.layers.{unit}.block.3"
        convs[f"{part}.{name}.{i}.conv"] = f"{part}.layers.{resample}"
        step += 3
    convs[f"{part}.last.conv"] = f"{part}.layers.{step + 1}"
    names = {f"{ours}.{x}": f"{theirs}.conv.{x}" for ours, theirs in convs.items() for x in ("weight", "bias")}
    for i in range(depth):
        ours, theirs = f"{part}_transformer.blocks.{i}", f"{part}_transformer.layers.{i}"
        for x in ("weight", "bias"):
            names[f"{ours}.norm1.{x}"] = f"{theirs}.input_layernorm.{x}"
            names[f"{ours}.norm2.{x}"] = f"{theirs}.post_attention_layernorm.{x}"
        names |= {f"{ours}.attn.qkv.weight.{x}": f"{theirs}.self_attn.{x}_proj.weight" for x in "qkv"}
        names[f"{ours}.attn.proj.weight"] = f"{theirs}.self_attn.o_proj.weight"
        names |= {f"{ours}.{x}.weight": f"{theirs}.mlp.{x}.weight" for x in ("fc1", "fc2")}
        names[f"{ours}.scale1"] = f"{theirs}.self_attn_layer_scale.scale"
        names[f"{ours}.scale2"] = f"{theirs}.mlp_layer_scale.scale"
    return names


def published_names(tokenizer: Mimi) -> dict[str, str]:
    """Our names -> those of transformers' saved files; ``qkv.weight`` still in its three parts."""
    config = tokenizer.config
    sizes = (config["depth"], len(config["strides"]))
    names = stack_names("encoder", *sizes) | stack_names("decoder", *sizes)
    names |= {"down.conv.weight": "downsample.conv.weight", "up.weight": "upsample.conv.weight"}
    for branch, levels in (("semantic", 1), ("acoustic", config["num_codebooks"] - 1)):
        theirs = f"quantizer.{branch}_residual_vector_quantizer"
        names[f"quantizer.{branch}_in.weight"] = f"{theirs}.input_proj.weight"
        names[f"quantizer.{branch}_out.weight"] = f"{theirs}.output_proj.weight"
        for q in range(levels):
            ours, book = f"quantizer.{branch}.books.{q}", f"{theirs}.layers.{q}.codebook"
            names[f"{ours}.codebook_sum"] = f"{book}.embed_sum"
            names[f"{ours}.cluster_size"] = f"{book}.cluster_usage"
            names[f"{ours}.initialized"] = f"{book}.initialized"
    return names


def convert_mimi(state: Mapping[str, Tensor], tokenizer: Mimi) -> dict[str, Tensor]:
    """Tensors of a MimiModel, as saved or as its ``state_dict()`` -> the state of ``tokenizer``.

    ``tokenizer`` says what parts there are; it may be on the meta device. The codebooks' running sums and counts go
    along, so that training goes on from them.

    Raises:
        ValueError: missing or unexpected names, or shapes that do not fit.
    """
    flat = {}
    for key, value in state.items():
        for pattern, name in FLAT:
            key = pattern.sub(name, key)
        flat[key] = value
    found = rename(flat, published_names(tokenizer), FAMILY)
    for key in [k for k in found if k.endswith(".qkv.weight.q")]:
        whole = key.removesuffix(".q")
        found[whole] = torch.cat([found.pop(f"{whole}.{x}") for x in "qkv"])
    for key in [k for k in found if k.endswith(".codebook_sum")]:
        book = key.removesuffix("_sum")
        usage = found[key.replace("codebook_sum", "cluster_size")].float()
        found[book] = found[key].float() / usage.clamp_min(USAGE_FLOOR)[:, None]
        started = key.replace("codebook_sum", "initialized")
        found[started] = found[started].bool().all()
    own = {k: v for k, v in tokenizer.state_dict().items() if not k.startswith(HEAD)}
    return fit(found, own, FAMILY)


def convert_mimi_original(state: Mapping[str, Tensor], tokenizer: Mimi) -> dict[str, Tensor]:
    """Tensors of kyutai's own file -> the state of ``tokenizer``; see `convert_mimi`.

    Their attention turns neighbouring channels (2 i, 2 i + 1) of a head together, ours i and i + d / 2: the rows of
    queries and keys are put in that order.
    """
    heads, renamed = tokenizer.config["num_heads"], {}
    for key, value in state.items():
        for theirs, ours in ORIGINAL:
            key = key.replace(theirs, ours)
        if not key.endswith(".in_proj_weight"):
            renamed[key] = value
            continue
        for name, rows in zip("qkv", value.chunk(3), strict=True):  # (D, D) each
            if name != "v":
                rows = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            renamed[key.replace("in_proj_weight", f"{name}_proj.weight")] = rows
    return convert_mimi(renamed, tokenizer)


def load_mimi(source: str | Path, config: Mapping[str, Any] | None = None) -> Mimi:
    """A Mimi with its published weights, in evaluation mode.

    Args:
        source: a folder of ``MimiModel.save_pretrained``, or a file of weights under either family of names.
        config: of `Mimi`, for a file; None: the published sizes. A folder brings its own.

    Raises:
        ValueError: a missing or damaged file, a variant that is not built here, names or shapes that do not fit.
    """
    file = Path(source)
    if file.is_dir():
        if config is not None:
            raise ValueError("config: expected none for a folder, which has its own; pass the file inside instead")
        config, file = mimi_config(read_config(file, "mimi")), file / "model.safetensors"
    tokenizer = Mimi(**(config or {}))
    state = read_state(file)
    original = any(key.startswith("quantizer.rvq_first.") for key in state)
    found = (convert_mimi_original if original else convert_mimi)(state, tokenizer)
    head = {k: v for k, v in tokenizer.state_dict().items() if k.startswith(HEAD)}
    tokenizer.load_state_dict(found | head)
    return tokenizer.eval()
