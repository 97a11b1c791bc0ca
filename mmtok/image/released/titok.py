"""TiTok and TA-TiTok: ``yucornetto/tokenizer_titok_*`` and ``fun-research/TiTok``, ``TA-TiTok`` (Apache-2.0)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.catalogue import Family, Taxonomy
from mmtok.data.hub import folder_of, source_name, weights_licence
from mmtok.image.raster2d import MASKGIT_VQ
from mmtok.image.released.convolutional import decoder_names
from mmtok.image.released.renaming import fill, rename, with_bias
from mmtok.image.titok import TATITOK_BL32, TITOK_L32, TiTok
from mmtok.layers.conv2d import ConvShape
from mmtok.layers.vision import read_state

FAMILY = "TiTok"
IGNORED = ("quantize.embed_prob",)  # a statistic of the training of TA-TiTok
KEPT_4D = "smooth.weight"  # the only convolution whose kernel is one here too
HEAD_WIDTH = 64  # of every published size: 512 / 8, 768 / 12, 1024 / 16
WEIGHTS = "model.safetensors"


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


def titok_config(state: Mapping[str, Tensor], said: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config of `TiTok` that published tensors were trained with: TITOK_L32 for those of TiTok-L-32, and so on.

    Sizes are read off the tensors. Whether latents and codes have length 1, they do not show: that is what ``said``
    says, else as in every publication with such a decoder.

    Args:
        state: the published tensors.
        said: ``model.vq_model`` of the published config.json: ``use_l2_norm``, ``is_legacy``, ``quantize_mode``.

    Raises:
        ValueError: other tensors, continuous latents, weights of the first stage, a config that contradicts them.
    """
    said = said or {}
    if said.get("quantize_mode", "vq") != "vq" or "quantize.embedding.weight" not in state:
        mode = said.get("quantize_mode", "no codebook")
        raise ValueError(f"{FAMILY}: expected weights with a codebook (quantize_mode vq), got {mode}; it has no codes")
    reads_text = "decoder.text_guidance_proj.weight" in state
    names = ["latent_tokens", "encoder.patch_embed.weight", "encoder.positional_embedding"]
    names += ["encoder.class_embedding", "decoder.class_embedding"]
    names += ["decoder.text_guidance_positional_embedding"] if reads_text else []
    if missing := [n for n in names if n not in state]:
        raise ValueError(f"{FAMILY}: expected published tensors, missing {missing}; pass the folder of a tokenizer")
    proxy = "decoder.ffn.2.weight" in state  # predicts codes of MaskGIT-VQ: the first, legacy kind of decoder
    if proxy and "pixel_quantize.embedding.weight" not in state:
        raise ValueError(f"{FAMILY}: these weights are of stage 1, without a decoder to pixels; pass those of stage 2")
    if said.get("is_legacy", proxy) != proxy:
        raise ValueError(f"{FAMILY}: config.json says is_legacy {not proxy}, the weights' decoder says {proxy}")
    (K, token_size), patch = state["quantize.embedding.weight"].shape, state[names[1]].shape[-1]
    base = TITOK_L32 if said.get("use_l2_norm", proxy) else TATITOK_BL32
    config: dict[str, Any] = {
        "num_tokens": state["latent_tokens"].shape[0],
        "token_size": token_size,
        "patch_size": patch,
        "encoder": _shape(state, "encoder"),
        "decoder": _shape(state, "decoder"),
        "image_size": math.isqrt(state[names[2]].shape[0] - 1) * patch,
        "quantizer": {**base["quantizer"], "codebook_size": K},
        "unit_latents": base["unit_latents"],
    }
    if proxy:
        config |= {"legacy_reshape": True, "teacher": dict(MASKGIT_VQ), "stage": 2}
    if reads_text:
        dim, length = (state[f"decoder.text_guidance_{x}"].shape for x in ("proj.weight", "positional_embedding"))
        config["text_encoder"] = {**TATITOK_BL32["text_encoder"], "dim": dim[1], "max_tokens": length[0]}
    return config


def _shape(state: Mapping[str, Tensor], part: str) -> tuple[int, int, int]:
    """Width, depth and heads of the encoder or decoder."""
    width = state[f"{part}.class_embedding"].shape[-1]
    depth = sum(k.startswith(f"{part}.transformer.") and k.endswith(".ln_1.weight") for k in state)
    return width, depth, max(1, width // HEAD_WIDTH)


def open_titok(source: str) -> TiTok:
    """A folder or hub repository of `PyTorchModelHubMixin`: model.safetensors, and config.json where there is one.

    Raises:
        ValueError: no such folder, damaged or missing weights, another model's, or mmtok's own checkpoint.
    """
    folder = folder_of(source, ("config.json", WEIGHTS))
    said: Any = {}
    if (folder / "config.json").is_file():
        try:
            said = json.loads((folder / "config.json").read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise ValueError(f"{folder}/config.json is damaged ({e}); restore the file") from e
        if isinstance(said, dict) and str(said.get("format", "")).startswith("mmtok-"):
            raise ValueError(f"{folder} is a checkpoint of mmtok; load it by its path: mmtok.load({str(folder)!r})")
        try:
            said = said["model"]["vq_model"]
        except (KeyError, TypeError) as e:
            raise ValueError(f"{folder}/config.json: expected model.vq_model of TiTok's training config") from e
    state = read_state(folder / WEIGHTS)
    tokenizer = load_titok(state, titok_config(state, said))
    tokenizer.name = f"{TITOK.name}:{source_name(folder)}"
    tokenizer.licences = {"code": TITOK.code_licence, "weights": weights_licence(TITOK, folder)}
    return tokenizer


TITOK = Family(
    name="titok",
    title="TiTok and TA-TiTok (which also reads a caption), run by mmtok",
    modality="image",
    source="folder or hub repository with config.json and model.safetensors",
    example="titok:yucornetto/tokenizer_titok_l32_imagenet",
    package="mmtok",
    install="pip install mmtok",
    code_licence="Apache-2.0",
    weights_licence="Apache-2.0",
    taxonomy=Taxonomy(
        architecture="T+Q/T+CNN",
        input="P",
        quantization="SVQ",
        bitrate="F",
        objective=("GAN", "Perc", "Rec", "VQ"),
        auxiliary=(),
        joint=True,
        domain="N",
        rate="32, 64 or 128",
        order="1D",
    ),
    open=open_titok,
)
