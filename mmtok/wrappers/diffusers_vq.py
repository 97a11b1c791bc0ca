"""diffusers' VQModel: the VQGAN of latent diffusion, Kandinsky's MoVQ, aMUSEd's; upstream gives no ids, this does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtok.catalogue import Family, Taxonomy
from mmtok.data.hub import folder_of
from mmtok.wrappers.raw_cells import RawCells, read_json
from mmtok.wrappers.wrapped import require

CLASS = "VQModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"
LARGEST = 512  # pixels of the longer side; the published models were trained at 256 to 768
PIXELS = {"signed": (2.0, -1.0), "unit": (1.0, 0.0)}  # network's range = pixels in [0, 1] * scale + shift
FACTS = (
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "act_fn",
    "latent_channels",
    "num_vq_embeddings",
    "norm_num_groups",
    "vq_embed_dim",
    "norm_type",
    "mid_block_add_attention",
)


def open_vqmodel(source: str) -> VQModelWrapper:
    """A folder that `VQModel.save_pretrained` wrote, a pipeline's folder that holds one, or either on the hub.

    Raises:
        ValueError: no such folder, another class, damaged or missing weights. ImportError: no diffusers.
    """
    folder = folder_of(source, ("config.json", "model_index.json"))
    if not (folder / "config.json").is_file() and (folder / "model_index.json").is_file():
        parts = read_json(folder / "model_index.json", "restore the file")
        named = [k for k, v in parts.items() if isinstance(v, list) and v[1:] == [CLASS]]
        if len(named) != 1:
            raise ValueError(f"{folder}: expected a pipeline with one {CLASS}, got {named}; pass a folder of {CLASS}")
        card_folder, folder = folder, folder_of(source, (f"{named[0]}/config.json", f"{named[0]}/{WEIGHTS}")) / named[0]
    else:
        card_folder = folder = folder_of(source, ("config.json", WEIGHTS))
    config = read_json(folder / "config.json", f"expected a folder that diffusers' {CLASS} has saved")
    if config.get("_class_name") != CLASS:
        raise ValueError(f"{folder}: expected a config of {CLASS}, got {config.get('_class_name')!r}; pass its folder")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"{folder} has no {WEIGHTS}; save it anew with {CLASS}.save_pretrained(safe_serialization=True)"
        )
    cls: Any = require("diffusers", FAMILY).VQModel
    try:
        network, info = cls.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as e:  # diffusers, accelerate and safetensors raise errors of their own
        reason = " ".join(str(e).split())[:300]
        raise ValueError(f"{folder} is no readable folder of diffusers' {CLASS}: {reason}") from e
    absent = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if absent:
        raise ValueError(f"{folder}: weights are missing or do not fit: {absent[:3]}; restore the folder")
    return VQModelWrapper(network, card_folder)


FAMILY = Family(
    name="vqmodel",
    title="diffusers' VQModel: VQGAN, MoVQ and their kin",
    modality="image",
    source="folder or hub repository of a VQModel, or of a pipeline with one",
    example="vqmodel:CompVis/ldm-super-resolution-4x-openimages",
    package="diffusers",
    install="pip install 'mmtok[codecs]'",
    code_licence="Apache-2.0",
    weights_licence="differs from model to model: check the card",
    taxonomy=Taxonomy(
        architecture="CNN/CNN",
        input="P",
        quantization="SVQ",
        bitrate="F",
        objective=("GAN", "Perc", "Rec", "VQ"),
        auxiliary=(),
        joint=True,
        domain="N",
        rate="256 (f16), 1024 (f8), 4096 (f4) at 256 px",
        order="2D",
    ),
    open=open_vqmodel,
)


class VQModelWrapper(RawCells):
    """diffusers' VQModel. ``encode`` there ends at latents; the codes are those its ``quantize`` picks for them.

    Decoding looks the codes up as `VQModel.decode` does with ``force_not_quantize``: in its own ``get_codebook_entry``
    where the config says ``lookup_from_codebook`` (aMUSEd), else the vectors are passed, then ``post_quant_conv``.
    ``scaling_factor`` belongs to diffusion on the latents and plays no part.

    It is fully convolutional but for attention in the middle, so that a code depends on the whole picture; pictures
    with a longer side above 512 px (or ``sample_size``, where that is larger) are reduced.

    Args:
        network: the VQModel, of three channels in and out.
        source: where it came from, for the name and the model card.
        pixels: the range that the network sees, ``signed`` [-1, 1] or ``unit`` [0, 1]. No file says it. None = as
            diffusers' pipelines: unit with ``lookup_from_codebook`` (aMUSEd's does not normalise), else signed.

    Raises:
        ValueError: another number of channels, an unknown range.
    """

    family = FAMILY

    def __init__(self, network: nn.Module, source: str | Path, pixels: str | None = None):
        upstream: Any = network
        config = upstream.config
        if (config.in_channels, config.out_channels) != (3, 3):
            found = f"{config.in_channels} in, {config.out_channels} out"
            raise ValueError(f"{source}: expected a {CLASS} of 3 channels in and out (RGB), got {found}")
        pixels = pixels or ("unit" if config.lookup_from_codebook else "signed")
        if pixels not in PIXELS:
            raise ValueError(f"pixels: expected one of {sorted(PIXELS)}, got {pixels!r}")
        facts = {k: list(v) if isinstance(v := config[k], (list, tuple)) else v for k in FACTS}
        super().__init__(network, facts | {"pixels": pixels}, source)
        self.scale, self.shift = PIXELS[pixels]
        self.sizes = (upstream.quantize.n_e,)
        self.set_sizes(2 ** (len(config.block_out_channels) - 1), max(LARGEST, int(config.sample_size)))

    def network_encode(self, x: Tensor) -> Tensor:
        z = self.upstream.encode((x * self.scale + self.shift).to(self.dtype)).latents
        found = self.upstream.quantize(z)[2][2]  # (B * h * w,), raster order
        return found.reshape(len(x), 1, -1).long()

    def network_decode(self, codes: Tensor, rows: int, columns: int) -> Tensor:
        book = self.upstream.quantize.embedding
        shape = (len(codes), rows, columns, book.embedding_dim)
        if self.upstream.config.lookup_from_codebook:
            x = self.upstream.decode(codes.flatten(), force_not_quantize=True, shape=shape).sample
        else:
            z_q = book(codes.flatten()).view(shape).permute(0, 3, 1, 2).contiguous()
            x = self.upstream.decode(z_q, force_not_quantize=True).sample
        return (x.float() - self.shift) / self.scale
