"""The image tokenizers inside transformers' chat models: Emu3's, Chameleon's and Janus's VQ networks.

A folder may hold the VQ network alone, or the whole chat model; then only the tensors below its ``vqmodel.`` are read.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.catalogue import Family, Taxonomy
from mmtok.data.hub import folder_of
from mmtok.wrappers.raw_cells import RawCells, read_json
from mmtok.wrappers.wrapped import require, transformers_model

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the second since transformers 5
VQ_KEY = re.compile(r"^(?:model\.)?vqmodel\.")
EMU3_LARGEST = 720  # pixels of the longer side: the area that Emu3 generates is 720 x 720


@dataclasses.dataclass(frozen=True)
class PixelRange:
    """What the network sees of pixels in [0, 1]: (pixels * scale - mean) / std, a channel each."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def forth(self, x: Tensor) -> Tensor:
        return (x * self.scale - self._planes(self.mean, x)) / self._planes(self.std, x)

    def back(self, x: Tensor) -> Tensor:
        return (x * self._planes(self.std, x) + self._planes(self.mean, x)) / self.scale

    @staticmethod
    def _planes(values: Sequence[float], x: Tensor) -> Tensor:
        return torch.tensor(values, dtype=x.dtype, device=x.device)[:, None, None]


SIGNED = PixelRange(1.0, (0.5,) * 3, (0.5,) * 3)  # [-1, 1]
CHAMELEON_PIXELS = PixelRange(255 * 0.0078, (1.0,) * 3, (1.0,) * 3)  # [-1, 0.989]: its rescale_factor is 0.0078


def open_emu3(source: str) -> Emu3Wrapper:
    """Emu3VQVAE alone or inside Emu3; raises as `open_vq`."""
    return Emu3Wrapper(*open_vq(EMU3, "Emu3VQVAE", "emu3", source, SIGNED))


def open_chameleon(source: str) -> ChameleonWrapper:
    """ChameleonVQVAE alone or inside Chameleon; raises as `open_vq`."""
    return ChameleonWrapper(*open_vq(CHAMELEON, "ChameleonVQVAE", "chameleon", source, CHAMELEON_PIXELS))


def open_janus(source: str) -> JanusWrapper:
    """JanusVQVAE alone or inside Janus; raises as `open_vq`."""
    return JanusWrapper(*open_vq(JANUS, "JanusVQVAE", "janus", source, SIGNED))


VQGAN = Taxonomy(
    architecture="CNN/CNN",
    input="P",
    quantization="SVQ",
    bitrate="F",
    objective=("GAN", "Perc", "Rec", "VQ"),
    auxiliary=(),
    joint=True,
    domain="N",
    rate="1024 at 512 px",
    order="2D",
)
EMU3 = Family(
    name="emu3",
    title="Emu3's VQ tokenizer of pictures and video",
    modality="image",
    source="folder or hub repository, of the VQ network or of Emu3",
    example="emu3:Emu3-community/Emu3-Chat-hf",
    package="transformers",
    install="pip install 'mmtok[codecs]'",
    code_licence="Apache-2.0",
    weights_licence="Apache-2.0",
    taxonomy=dataclasses.replace(VQGAN, rate="4096 at 512 px"),
    open=open_emu3,
)
CHAMELEON = Family(
    name="chameleon",
    title="Chameleon's VQ tokenizer (encoder only)",
    modality="image",
    source="folder or hub repository, of the VQ network or of Chameleon",
    example="chameleon:facebook/chameleon-7b",
    package="transformers",
    install="pip install 'mmtok[codecs]'",
    code_licence="Apache-2.0",
    weights_licence="Chameleon Research License (non-commercial research)",
    taxonomy=VQGAN,
    open=open_chameleon,
)
JANUS = Family(
    name="janus",
    title="Janus's VQ tokenizer for generation",
    modality="image",
    source="folder or hub repository, of the VQ network or of Janus",
    example="janus:deepseek-community/Janus-Pro-1B",
    package="transformers",
    install="pip install 'mmtok[codecs]'",
    code_licence="Apache-2.0",
    weights_licence="DeepSeek Model License",
    taxonomy=dataclasses.replace(VQGAN, rate="576 at 384 px"),
    open=open_janus,
)


class ChatVQ(RawCells, abc.ABC):
    """A VQ network of a chat model. One level; codes are the VQ network's own, in raster order.

    A language model around it reads ids of its own text vocabulary instead, or not, see each class. Convolutions are
    normalised over the whole picture and attention runs in the middle, so that a code depends on all of it.

    Args:
        network: transformers' network.
        source: where it came from, for the name and the model card.
        pixels: what the network sees.

    Raises:
        ValueError: another number of channels than three.
    """

    facts: ClassVar[tuple[str, ...]] = ()
    default_pixels: ClassVar[PixelRange] = SIGNED

    def __init__(self, network: nn.Module, source: str | Path, pixels: PixelRange | None = None):
        upstream: Any = network
        shared = (
            "embed_dim",
            "latent_channels",
            "in_channels",
            "base_channels",
            "channel_multiplier",
            "num_res_blocks",
        )
        config = upstream.config
        if config.in_channels != 3:
            raise ValueError(f"{source}: expected a network of 3 channels (RGB), got {config.in_channels}")
        pixels = pixels or self.default_pixels
        facts = {
            k: list(v) if isinstance(v := getattr(config, k), (list, tuple)) else v for k in (*shared, *self.facts)
        }
        super().__init__(network, facts | {"pixels": _plain(pixels)}, source)
        self.pixels = pixels
        self.sizes = (upstream.quantize.embedding.num_embeddings,)
        factor = 2 ** (len(config.channel_multiplier) - 1)
        self.set_sizes(factor, self.largest(config, factor))

    @abc.abstractmethod
    def largest(self, config: Any, factor: int) -> int:
        """Pixels of the longer side above which pictures are reduced."""

    def seen(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> what the network takes."""
        return self.pixels.forth(x).to(self.dtype)


class Emu3Wrapper(ChatVQ):
    """transformers' Emu3VQVAE: cells of 8 px, 32,768 codes.

    A picture is a video of ``temporal_downsample_factor`` equal frames, which give one frame of codes; of the frames
    that these decode to, the first is the picture.

    The language model of `Emu3Model` reads the code c as the id of its token ``<|visual token c|>`` (six digits), with
    ``<|extra_200|>`` after every row. Its processor pads pictures of a batch with zeros to one size, which changes the
    codes, and enlarges pictures below 512 x 512; neither happens here. Pictures with a longer side above 720 px (the
    area that Emu3 generates) are reduced.
    """

    family = EMU3
    facts = ("temporal_downsample_factor", "attn_resolutions", "num_attention_heads")

    def largest(self, config: Any, factor: int) -> int:
        return EMU3_LARGEST

    def network_encode(self, x: Tensor) -> Tensor:
        sizes = torch.tensor([list(x.shape[2:])] * len(x))
        found = self.upstream.encode(self.seen(x), sizes).image_tokens  # a list of (h, w)
        return torch.stack(found).flatten(1)[:, None].long()

    def network_decode(self, codes: Tensor, rows: int, columns: int) -> Tensor:
        return self.pixels.back(self.upstream.decode(codes[:, 0].unflatten(1, (rows, columns))).float())


class ChameleonWrapper(ChatVQ):
    """transformers' ChameleonVQVAE: cells of 16 px, 8,192 codes of pictures of 512 px. It encodes only.

    The language model of `ChameleonModel` reads each code as the id of a token ``IMGIMG...`` of its text vocabulary
    (digits of the code spelt as letters A to J); `ChameleonImageVocabularyMapping` of transformers converts. Pictures
    with a longer side above ``resolution`` are reduced.
    """

    encode_only = True
    family = CHAMELEON
    facts = ("resolution", "attn_resolutions", "attn_type")
    default_pixels = CHAMELEON_PIXELS

    def largest(self, config: Any, factor: int) -> int:
        return int(config.resolution)

    def network_encode(self, x: Tensor) -> Tensor:
        return self.upstream.encode(self.seen(x)).image_tokens.reshape(len(x), 1, -1).long()

    def network_decode(self, codes: Tensor, rows: int, columns: int) -> Tensor:
        raise ValueError(
            f"{self.name} only encodes: transformers' ChameleonVQVAE has no decoder, and its folders lack the weights "
            "of one; decode these codes with the vqgan.ckpt of Meta's own release, or load a tokenizer with a decoder, "
            "such as janus:FOLDER or emu3:FOLDER"
        )


class JanusWrapper(ChatVQ):
    """transformers' JanusVQVAE: cells of 16 px, 16,384 codes of pictures of 384 px.

    Janus's language model predicts the codes themselves through a head of their own: no vocabulary lies between.
    Pictures with a longer side above ``num_patches`` cells are reduced. transformers' decode takes a square of exactly
    ``num_patches`` ** 2 codes, as the raw mode does; mitigated, its parts are run on a grid of any shape.

    DeepSeek's network scales latents and codes to length 1 before it looks for the nearest. transformers does so with
    the codes that it decodes, but not when it encodes, so its codes of a picture are not those that Janus learnt from.
    Codes here are transformers' unless ``cosine``: this wraps its class, and whoever compares with it finds the same.

    Args:
        network, source, pixels: as `ChatVQ`.
        cosine: choose codes as DeepSeek's network does: `JanusWrapper(tokenizer.network, folder, cosine=True)`.
    """

    family = JANUS

    def __init__(self, network: nn.Module, source: str | Path, pixels: PixelRange | None = None, cosine: bool = False):
        super().__init__(network, source, pixels)
        self.cosine = cosine
        self.config["cosine"] = cosine

    def largest(self, config: Any, factor: int) -> int:
        return int(config.num_patches) * factor

    def network_encode(self, x: Tensor) -> Tensor:
        upstream = self.upstream
        if not self.cosine:
            return upstream.encode(self.seen(x)).image_tokens.reshape(len(x), 1, -1).long()
        z = upstream.quant_conv(upstream.encoder(self.seen(x))).float()  # (B, D, h, w)
        book = F.normalize(upstream.quantize.embedding.weight.float(), dim=-1)
        return (F.normalize(z.flatten(2).transpose(1, 2), dim=-1) @ book.T).argmax(-1)[:, None]

    def network_decode(self, codes: Tensor, rows: int, columns: int) -> Tensor:
        upstream = self.upstream
        if not self.mitigated:
            return self.pixels.back(upstream.decode(codes[:, 0]).float())
        z_q = F.normalize(upstream.quantize.embedding(codes[:, 0]), dim=-1)  # (B, T, D)
        z_q = z_q.transpose(1, 2).unflatten(2, (rows, columns))
        return self.pixels.back(upstream.decoder(upstream.post_quant_conv(z_q)).float())


def open_vq(
    family: Family, class_name: str, chat_type: str, source: str, pixels: PixelRange
) -> tuple[nn.Module, Path, PixelRange]:
    """The VQ network of a folder or hub repository, alone or in its chat model, the folder, and what it sees.

    Pixels are scaled as the folder's image processor says, else by ``pixels``, which the published models use (and not
    the defaults of transformers' classes: those of Emu3 and Janus are CLIP's).

    Raises:
        ValueError: no such folder, another type of model, damaged, missing or foreign weights.
        ImportError: transformers is not installed.
    """
    folder = folder_of(source, ("config.json", INDEX, *PROCESSORS))
    config = read_json(folder / "config.json", f"expected a folder of transformers' {class_name} or of {chat_type}")
    cls: Any = getattr(require("transformers", family), class_name)
    own_type = cls.config_class.model_type
    found = config.get("model_type")
    if found == own_type:
        network, folder = transformers_model(family, class_name, source)
    elif found == chat_type:
        network = vq_of_chat_model(cls, config, folder, source)
    else:
        raise ValueError(f"{folder}: expected a model of type {own_type!r} or {chat_type!r}, got {found!r}")
    return network, folder, pixel_range(folder, pixels)


def vq_of_chat_model(cls: Any, config: dict[str, Any], folder: Path, source: str) -> nn.Module:
    """The VQ network of class ``cls`` in a chat model's folder; no other tensor of it is read or downloaded.

    Raises:
        ValueError: damaged, missing or foreign weights.
    """
    from safetensors import SafetensorError, safe_open

    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX, "restore the file").get("weight_map", {})
        files = sorted({str(v) for k, v in places.items() if VQ_KEY.match(k)})
    else:
        files = [SINGLE]
    folder = folder_of(source, files)
    state: dict[str, Tensor] = {}
    try:
        for name in files:
            with safe_open(str(folder / name), framework="pt") as f:
                keys = [k for k in f.keys() if VQ_KEY.match(k)]  # noqa: SIM118 - safe_open is no mapping
                state |= {VQ_KEY.sub("", k): f.get_tensor(k).float() for k in keys}
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{folder}: its weights cannot be read ({e}); restore {', '.join(files)}") from e
    try:
        with torch.device("meta"):
            network: nn.Module = cls(cls.config_class(**config.get("vq_config", {})))
    except Exception as e:  # transformers checks configs with errors of its own
        raise ValueError(f"{folder}/config.json: vq_config does not fit {cls.__name__} ({e})") from e
    wrong = [k for k, v in network.state_dict().items() if k not in state or state[k].shape != v.shape]
    if wrong:
        raise ValueError(f"{folder}: tensors vqmodel.* of {cls.__name__} are missing or do not fit: {wrong[:3]}")
    network.load_state_dict(state, strict=False, assign=True)  # old files may hold parts that the class has no more
    return network


def pixel_range(folder: Path, default: PixelRange) -> PixelRange:
    """What a folder's image processor makes of pixels; ``default`` where it has none.

    Raises:
        ValueError: the processor's file is damaged.
    """
    for name in PROCESSORS:
        if not (folder / name).is_file():
            continue
        found = read_json(folder / name, "restore the file")
        found = found.get("image_processor", found)
        try:
            if {"image_mean", "image_std", "rescale_factor"} & found.keys():
                return _said(found, default)
        except (AttributeError, TypeError, ValueError) as e:
            raise ValueError(f"{folder / name} is damaged ({e}); restore the file") from e
    return default


def _said(processor: dict[str, Any], default: PixelRange) -> PixelRange:
    """The processor rescales bytes and then normalises, unless it is told to leave either out."""
    scale, mean, std = 255.0, (0.0,) * 3, (1.0,) * 3
    if processor.get("do_rescale", True):
        scale *= float(processor.get("rescale_factor", default.scale / 255))
    if processor.get("do_normalize", True):
        mean, std = _three(processor.get("image_mean", default.mean)), _three(processor.get("image_std", default.std))
    if scale <= 0 or min(std) <= 0:
        raise ValueError(f"expected a positive scale and deviations, got {scale} and {std}")
    return PixelRange(scale, mean, std)


def _three(values: Any) -> tuple[float, ...]:
    found = tuple(float(v) for v in values) if isinstance(values, (list, tuple)) else (float(values),) * 3
    if len(found) != 3:
        raise ValueError(f"expected a value for each of 3 channels, got {len(found)}")
    return found


def _plain(pixels: PixelRange) -> dict[str, Any]:
    return {"scale": pixels.scale, "mean": list(pixels.mean), "std": list(pixels.std)}
