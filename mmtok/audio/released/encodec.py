"""EnCodec: ``facebook/encodec_*`` as transformers' EncodecModel saves it (check the licence of each: some CC-BY-NC)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtok.audio.encodec import EnCodec
from mmtok.audio.released.renaming import fill, fit, fold_weight_norm, read_config, rename
from mmtok.layers.seanet_lstm import SEANetShape
from mmtok.layers.vision import read_state

FAMILY = "EnCodec"
IGNORED = (".inited", ".cluster_size", ".embed_avg")  # the codebooks' training state: `fill` starts it anew


def stack_names(part: str, shape: SEANetShape) -> dict[str, str]:
    """Our convolutions of ``encoder`` or ``decoder`` -> theirs, which stand in one list with LSTM and activations."""
    names, at = {f"{part}.first": f"{part}.layers.0"}, 1 if part == "encoder" else 2
    for i in range(len(shape.strides)):
        # units, ELU, convolution in the encoder; ELU, convolution, units in the decoder
        change = at + shape.residual_layers + 1 if part == "encoder" else at + 1
        units = at if part == "encoder" else at + 2
        names[f"{part}.stages.{i}.change"] = f"{part}.layers.{change}"
        for j in range(shape.residual_layers):
            ours, theirs = f"{part}.stages.{i}.units.{j}", f"{part}.layers.{units + j}"
            names |= {f"{ours}.conv1": f"{theirs}.block.1", f"{ours}.conv2": f"{theirs}.block.3"}
            if shape.conv_shortcut:
                names[f"{ours}.shortcut"] = f"{theirs}.shortcut"
        at += shape.residual_layers + 2
    return names | {f"{part}.last": f"{part}.layers.{at + 2 if part == 'encoder' else at + 1}"}


def network_names(shape: SEANetShape) -> dict[str, str]:
    """Our tensors of both networks -> theirs, weight norm folded in both."""
    parts = ("conv",) if shape.norm == "weight_norm" else ("conv", "norm")
    convs = stack_names("encoder", shape) | stack_names("decoder", shape)
    names = {
        f"{ours}.{part}.{x}": f"{theirs}.{part}.{x}"
        for ours, theirs in convs.items()
        for part in parts
        for x in ("weight", "bias")
    }
    unit_layers = shape.residual_layers + 2
    for part, at in (("encoder", 1 + unit_layers * len(shape.strides)), ("decoder", 1)):
        for layer in range(shape.lstm_layers):
            for x in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                names[f"{part}.lstm.lstm.{x}_l{layer}"] = f"{part}.layers.{at}.lstm.{x}_l{layer}"
    return names


def convert_encodec_networks(
    state: Mapping[str, Tensor], networks: nn.ModuleDict, shape: SEANetShape
) -> dict[str, Tensor]:
    """Tensors of an EncodecModel -> the state of ``networks``, {"encoder": LstmEncoder, "decoder": LstmDecoder}, of any
    number of channels and either norm; the quantizer's tensors are left aside.

    Raises:
        ValueError: missing or unexpected names, or shapes that do not fit.
    """
    own = {k: v for k, v in state.items() if not k.startswith("quantizer.")}
    return fit(rename(fold_weight_norm(own), network_names(shape), FAMILY), networks.state_dict(), FAMILY)


def convert_encodec(state: Mapping[str, Tensor], tokenizer: EnCodec) -> dict[str, Tensor]:
    """Tensors of an EncodecModel -> the state of ``tokenizer``, which may be on the meta device.

    Raises:
        ValueError: missing or unexpected names, or shapes that do not fit.
    """
    names, trained = network_names(tokenizer.shape), {}
    for q in range(tokenizer.config["num_codebooks"]):
        names[f"quantizer.books.{q}.codebook"] = f"quantizer.layers.{q}.codebook.embed"
        trained[f"quantizer.books.{q}.initialized"] = torch.tensor(True)
    found = rename(fold_weight_norm(state), names, FAMILY, IGNORED)
    return fit(found | trained, tokenizer.state_dict(), FAMILY)


def encodec_shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `SEANetShape` from transformers' ``config.json``.

    Raises:
        ValueError: a missing field, or a trimming of transposed convolutions that no published model has.
    """
    if config.get("trim_right_ratio", 1.0) != 1.0:
        raise ValueError(f"EnCodec: expected trim_right_ratio 1, got {config['trim_right_ratio']}; use transformers")
    try:
        return {
            "width": config["num_filters"],
            "strides": tuple(config["upsampling_ratios"])[::-1],
            "kernel_size": config["kernel_size"],
            "last_kernel_size": config["last_kernel_size"],
            "residual_kernel_size": config["residual_kernel_size"],
            "residual_layers": config["num_residual_layers"],
            "dilation_growth": config["dilation_growth_rate"],
            "compress": config["compress"],
            "conv_shortcut": config["use_conv_shortcut"],
            "lstm_layers": config["num_lstm_layers"],
            "causal": config["use_causal_conv"],
            "norm": config["norm_type"],
            "padding": config["pad_mode"],
        }
    except KeyError as e:
        raise ValueError(f"EnCodec: the config lacks {e}; restore the config.json of the released folder") from e


def encodec_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `EnCodec` from transformers' ``config.json``.

    Raises:
        ValueError: a missing field, or a model that is more than codes: stereo, with loudness, or in fixed pieces.
    """
    shape = encodec_shape(config)
    plain = {"audio_channels": 1, "normalize": False, "chunk_length_s": None}
    other = {k: config.get(k, v) for k, v in plain.items() if config.get(k, v) != v}
    if other:
        raise ValueError(
            f"EnCodec: expected { ({k: plain[k] for k in other}) }, got {other}: its sound is more than codes "
            f"(channels, loudness, pieces); its networks alone load by convert_encodec_networks"
        )
    if config.get("codebook_dim") not in (None, config["hidden_size"]):
        raise ValueError(
            f"EnCodec: expected codebook_dim {config['hidden_size']} (hidden_size), got {config['codebook_dim']}"
        )
    return {
        "sample_rate": config["sampling_rate"],
        "num_codebooks": num_codebooks(config),
        "codebook_size": config["codebook_size"],
        "latent_dim": config["hidden_size"],
        "shape": shape,
    }


def num_codebooks(config: Mapping[str, Any]) -> int:
    """Levels of the highest target rate, in whole frames a second and whole bits a level, as transformers counts."""
    hop = math.prod(config["upsampling_ratios"])
    frame_rate = -(-config["sampling_rate"] // hop)
    return int(1000 * config["target_bandwidths"][-1] // (frame_rate * (config["codebook_size"] - 1).bit_length()))


def load_encodec(folder: str | Path) -> EnCodec:
    """An EnCodec from a folder of ``EncodecModel.save_pretrained``, in evaluation mode.

    Args:
        folder: with config.json and model.safetensors; a mono model such as encodec_24khz or encodec_32khz.

    Raises:
        ValueError: a missing or damaged file, a stereo model, names or shapes that do not fit.
    """
    tokenizer = EnCodec(**encodec_config(read_config(folder, "encodec")))
    fill(tokenizer, convert_encodec(read_state(Path(folder) / "model.safetensors"), tokenizer))
    return tokenizer.eval()
