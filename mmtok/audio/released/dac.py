"""DAC: ``descript/dac_*`` as transformers' DacModel saves it, and the original .pth files (MIT)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtok.audio.dac import DAC, DILATIONS
from mmtok.audio.released.renaming import fill, fit, fold_weight_norm, read_config, rename
from mmtok.layers.vision import read_state

FAMILY = "DAC"
# The layers of a residual unit: our name -> the name in transformers, the place in the original's list
UNIT = {"snake1": ("snake1", 0), "conv1.conv": ("conv1", 1), "snake2": ("snake2", 2), "conv2.conv": ("conv2", 3)}
# The layer that changes the rate: our name, its name in transformers; in the original's block the places of the Snake
# before it, of itself, and of the first residual unit
CHANGE = {"encoder": ("down.conv", "conv1", 3, 4, 0), "decoder": ("up.conv", "conv_t1", 0, 1, 2)}


def module_names(num_strides: int, num_codebooks: int, original: bool) -> dict[str, str]:
    """Our modules -> the published ones, of transformers' or of the original's files."""
    names = {}
    for part, layers in (("encoder", "block"), ("decoder", "model")):
        for i in range(num_strides):
            ours, theirs = f"{part}.blocks.{i}", f"{part}.block.{i}"
            change, change_name, snake_at, change_at, units_at = CHANGE[part]
            at = f"{part}.{layers}.{i + 1}.block"
            names[f"{ours}.snake"] = f"{at}.{snake_at}" if original else f"{theirs}.snake1"
            names[f"{ours}.{change}"] = f"{at}.{change_at}" if original else f"{theirs}.{change_name}"
            for j in range(len(DILATIONS)):
                for module, (name, place) in UNIT.items():
                    published = f"{at}.{units_at + j}.block.{place}" if original else f"{theirs}.res_unit{j + 1}.{name}"
                    names[f"{ours}.units.{j}.{module}"] = published
        for module, name, place in (
            ("first.conv", "conv1", 0),
            ("snake", "snake1", num_strides + 1),
            ("last.conv", "conv2", num_strides + 2),
        ):
            names[f"{part}.{module}"] = f"{part}.{layers}.{place}" if original else f"{part}.{name}"
    for q in range(num_codebooks):
        level = f"quantizer.quantizers.{q}"
        names[f"quantizer.books.{q}"] = f"{level}.codebook"
        names[f"quantizer.project_in.{q}"] = f"{level}.in_proj"
        names[f"quantizer.project_out.{q}"] = f"{level}.out_proj"
    return names


def published_names(tokenizer: DAC, original: bool) -> dict[str, str]:
    """Our tensors -> the published ones, weight norm folded in both."""
    names = {}
    modules = module_names(len(tokenizer.config["strides"]), tokenizer.config["num_codebooks"], original)
    for ours, theirs in modules.items():
        if "snake" in ours:
            names[f"{ours}.alpha"] = f"{theirs}.alpha"
        elif ".books." in ours:
            names[f"{ours}.codebook"] = f"{theirs}.weight"
        else:
            names |= {f"{ours}.{x}": f"{theirs}.{x}" for x in ("weight", "bias")}
    return names


def _convert(state: Mapping[str, Tensor], tokenizer: DAC, original: bool) -> dict[str, Tensor]:
    found = rename(fold_weight_norm(state), published_names(tokenizer, original), FAMILY)
    trained = {f"quantizer.books.{q}.initialized": torch.tensor(True) for q in range(tokenizer.config["num_codebooks"])}
    return fit(found | trained, tokenizer.state_dict(), FAMILY)


def convert_dac(state: Mapping[str, Tensor], tokenizer: DAC) -> dict[str, Tensor]:
    """Tensors of a DacModel -> the state of ``tokenizer``, which may be on the meta device.

    Raises:
        ValueError: missing or unexpected names, or shapes that do not fit.
    """
    return _convert(state, tokenizer, original=False)


def convert_dac_original(state: Mapping[str, Tensor], tokenizer: DAC) -> dict[str, Tensor]:
    """Tensors of the original's ``state_dict`` (descript-audio-codec 1.0.0) -> the state of ``tokenizer``.

    Raises:
        ValueError: as `convert_dac`.
    """
    return _convert(state, tokenizer, original=True)


def dac_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `DAC` from transformers' ``config.json``.

    Raises:
        ValueError: a missing field, or a decoder that does not mirror the encoder.
    """
    try:
        strides = tuple(config["downsampling_ratios"])
        arguments = {
            "sample_rate": config["sampling_rate"],
            "strides": strides,
            "encoder_width": config["encoder_hidden_size"],
            "decoder_width": config["decoder_hidden_size"],
            "latent_dim": config.get("hidden_size"),
            "num_codebooks": config["n_codebooks"],
            "codebook_size": config["codebook_size"],
            "codebook_dim": config["codebook_dim"],
            "quantizer_dropout": float(config.get("quantizer_dropout", 0.0)),
            "commitment_weight": config.get("commitment_loss_weight", 0.25),
            "codebook_weight": config.get("codebook_loss_weight", 1.0),
        }
    except KeyError as e:
        raise ValueError(f"DAC: the config lacks {e}; restore the config.json of the released folder") from e
    return _mirrored(arguments, tuple(config.get("upsampling_ratios", strides[::-1])))


def original_config(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `DAC` from ``metadata.kwargs`` of an original file.

    Raises:
        ValueError: as `dac_config`.
    """
    try:
        arguments = {
            "sample_rate": kwargs["sample_rate"],
            "strides": tuple(kwargs["encoder_rates"]),
            "encoder_width": kwargs["encoder_dim"],
            "decoder_width": kwargs["decoder_dim"],
            "latent_dim": kwargs.get("latent_dim"),
            "num_codebooks": kwargs["n_codebooks"],
            "codebook_size": kwargs["codebook_size"],
            "codebook_dim": kwargs["codebook_dim"],
            "quantizer_dropout": float(kwargs.get("quantizer_dropout", 0.0)),
        }
        return _mirrored(arguments, tuple(kwargs["decoder_rates"]))
    except KeyError as e:
        raise ValueError(f"DAC: metadata.kwargs lacks {e}; restore the original file") from e


def _mirrored(arguments: dict[str, Any], decoder_strides: tuple[int, ...]) -> dict[str, Any]:
    if decoder_strides != arguments["strides"][::-1]:
        raise ValueError(
            f"DAC: expected decoder strides that mirror the encoder's {arguments['strides']}, got {decoder_strides}; "
            f"such a model is no DAC, transformers' own class reads it"
        )
    return arguments


def load_dac(folder: str | Path, align: bool = True) -> DAC:
    """A DAC from a folder of ``DacModel.save_pretrained``, in evaluation mode.

    Args:
        folder: with config.json and model.safetensors.
        align: see `DAC`.

    Raises:
        ValueError: a missing or damaged file, names or shapes that do not fit.
    """
    tokenizer = DAC(**dac_config(read_config(folder, "dac")), align=align)
    fill(tokenizer, convert_dac(read_state(Path(folder) / "model.safetensors"), tokenizer))
    return tokenizer.eval()


def load_dac_original(path: str | Path, align: bool = True) -> DAC:
    """A DAC from an original .pth file: {"state_dict", "metadata": {"kwargs"}}, read without running code from it.

    Raises:
        ValueError: as `load_dac`; also a file that holds more than tensors and plain values.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        state, kwargs = stored["state_dict"], stored["metadata"]["kwargs"]
    except Exception as e:  # pickle and zip each have errors of their own
        reason = " ".join(str(e).split())[:200]
        raise ValueError(
            f"DAC: expected a file with state_dict and metadata.kwargs, cannot read {path} ({reason}); take the "
            f"released weights in transformers' form (load_dac)"
        ) from e
    tokenizer = DAC(**original_config(kwargs), align=align)
    fill(tokenizer, convert_dac_original(state, tokenizer))
    return tokenizer.eval()
