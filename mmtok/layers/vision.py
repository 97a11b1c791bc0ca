"""Frozen vision encoders: pictures in [0,1] in, patch features out; built from a JSON-able config by `build_vision`.

An encoder whose weights come from outside the checkpoint (the shipped EfficientNet, a local file or folder) carries
``external_weights = True``: `Tokenizer.weights` leaves it out, and the config rebuilds it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mmtok.layers.shipped import shipped_weights

SHIPPED = "vision-efficientnet-lite0/model.safetensors"  # written by recipes/convert_vision.py
SHIPPED_SHA256 = "84b799ccd0761db49d95aa2e2c4ded7ac8849cbba14cf63380eaf55a7d4fc9e1"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_DEFAULTS: dict[str, dict[str, Any]] = {
    "efficientnet_lite0": {"image_size": 224},
    "timm": {
        "name": None,
        "image_size": 224,
        "depth": None,
        "class_token": False,
        "final_norm": True,
        "weights": None,
        "arguments": {},
        "mean": None,
        "std": None,
    },
    "hf": {"folder": None, "layer": None, "class_token": False},
}
_HF_CLASSES = {
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}


class VisionEncoder(nn.Module):
    """A frozen network with its own resize and normalisation; always in eval mode, without gradient, in float32.

    Args:
        network: (B,3,S,S) normalised pictures -> (B, [1 +] h w, D), the class token first where there is one.
        dim: D.
        grid: (h, w) of the patches, row by row.
        image_size: S; every picture is squeezed to S x S, bicubic with antialiasing, whatever its aspect.
        normalisation: (mean, std) of the channels for pictures in [0,1].
        class_token: whether the first feature is the class token.
        external_weights: the weights come from outside the checkpoint and are not saved with it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        dim: int,
        grid: tuple[int, int],
        image_size: int,
        normalisation: tuple[Sequence[float], Sequence[float]],
        class_token: bool,
        external_weights: bool,
    ):
        super().__init__()
        self.network = network
        self.dim, self.grid, self.image_size = dim, grid, image_size
        self.num_patches = grid[0] * grid[1]
        self.class_token, self.external_weights = class_token, external_weights
        # Not persistent: the config determines them.
        self.register_buffer("mean", torch.tensor(normalisation[0]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(normalisation[1]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> VisionEncoder:
        """Stays in eval mode: a teacher must not drop units or update statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Features of pictures of any size.

        Args:
            x: (B,3,H,W) floats, nominally in [0,1].

        Returns:
            (B, num_patches, dim) float32, one more with the class token first where `class_token`.

        Raises:
            ValueError: another shape or an integer dtype.
        """
        if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape or not x.is_floating_point():
            raise ValueError(
                f"x: expected float pictures (B,3,H,W) in [0,1], got {x.dtype} {tuple(x.shape)}; repeat a grey channel "
                "3 times, divide uint8 by 255"
            )
        # Autocast does not know the meta device, on which only shapes are computed.
        plain = torch.autocast(x.device.type, enabled=False) if x.device.type != "meta" else contextlib.nullcontext()
        with plain:
            return self.network(self._prepared(x)).float()

    def embed(self, x: Tensor) -> Tensor:
        """One global embedding a picture: the mean over the patches, (B, dim) float32; arguments as `forward`."""
        return self.forward(x)[:, int(self.class_token) :].mean(1)

    def _prepared(self, x: Tensor) -> Tensor:
        S = self.image_size
        x = x.float()
        if x.shape[-2:] != (S, S):
            x = F.interpolate(x, (S, S), mode="bicubic", align_corners=False, antialias=True)
        x = (x.clamp(0, 1) - self.mean.float()) / self.std.float()  # bicubic overshoots where a PIL resize is cut
        return x.to(next(self.network.parameters()).dtype)  # follows a model that was cast as a whole


class _ConvFeatures(nn.Module):
    """Stem and stages of a timm EfficientNet, without its head."""

    def __init__(self, model: Any):
        super().__init__()
        self.conv_stem, self.bn1, self.blocks = model.conv_stem, model.bn1, model.blocks

    @torch.no_grad()
    def fold(self) -> None:
        """Put the BatchNorms into the convolutions before them: the same function, 1.6 times as fast on a CPU."""
        _fold(self.conv_stem, self, "bn1")
        for block in self.blocks.modules():
            names = ("conv_pw", "conv_dw", "conv_pwl") if hasattr(block, "conv_pwl") else ("conv_dw", "conv_pw")
            if hasattr(block, "conv_dw"):
                for number, name in enumerate(names, 1):
                    _fold(getattr(block, name), block, f"bn{number}")
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.bn1(self.conv_stem(x.contiguous(memory_format=torch.channels_last))))
        return rearrange(x, "b d h w -> b (h w) d")


class _TimmFeatures(nn.Module):
    """Token features of a timm ViT; of its prefix tokens only the class token, or none."""

    def __init__(self, model: Any, class_token: bool, num_prefix: int):
        super().__init__()
        self.model, self.class_token, self.num_prefix = model, class_token, num_prefix

    def forward(self, x: Tensor) -> Tensor:
        return _choose(self.model.forward_features(x), self.class_token, self.num_prefix)


class _HuggingFaceFeatures(nn.Module):
    """Token features of a transformers vision model: its last hidden state, or those behind ``layer`` blocks."""

    def __init__(self, model: Any, class_token: bool, num_prefix: int, layer: int | None):
        super().__init__()
        self.model, self.class_token, self.num_prefix, self.layer = model, class_token, num_prefix, layer

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(pixel_values=x, output_hidden_states=self.layer is not None)
        states = out.last_hidden_state if self.layer is None else out.hidden_states[self.layer]
        return _choose(states, self.class_token, self.num_prefix)


def _fold(conv: Any, owner: nn.Module, norm_name: str) -> None:
    norm: Any = getattr(owner, norm_name)
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    setattr(owner, norm_name, norm.act)  # timm keeps the activation behind a BatchNorm inside it


def _choose(states: Tensor, class_token: bool, num_prefix: int) -> Tensor:
    patches = states[:, num_prefix:]
    return torch.cat([states[:, :1], patches], 1) if class_token else patches


def build_vision(config: Mapping[str, Any]) -> VisionEncoder:
    """The encoder that ``config["type"]`` names.

    * ``{"type": "efficientnet_lite0", "image_size": 224}``: EfficientNet-Lite0 with the shipped ImageNet weights,
      320 numbers at 7 x 7 (image_size / 32 in general).
    * ``{"type": "timm", "name": ..., "image_size": 224, "depth": None, "class_token": False, "final_norm": True,
      "weights": None, "arguments": {}, "mean": None, "std": None}``: any timm ViT. ``depth`` keeps the first blocks;
      ``weights`` is a local .safetensors, .pt, .pth or .bin file in any layout that timm's own loader reads, or None
      for random weights, which then belong to the checkpoint; ``arguments`` go to the timm model; ``mean`` and ``std``
      replace those that timm lists for the name (write the tag, ``...clip_224.openai``, where a name has several).
    * ``{"type": "hf", "folder": ..., "layer": None, "class_token": False}``: a transformers folder of a CLIP, ViT or
      DINOv2 vision model; ``layer`` counts blocks before the final norm, None takes ``last_hidden_state``.

    Raises:
        ValueError: unknown type or key, a name timm does not know, weights that are missing, damaged or do not fit.
        ImportError: ``hf`` without transformers.
    """
    kind = config.get("type")
    if kind not in _DEFAULTS:
        raise ValueError(f"vision: expected a type out of {sorted(_DEFAULTS)}, got {kind!r}")
    defaults = _DEFAULTS[kind]
    unknown = sorted(set(config) - set(defaults) - {"type"})
    if unknown:
        raise ValueError(f"vision type {kind!r}: expected keys out of {sorted(defaults)}, got {unknown}; remove them")
    full = {**defaults, **config}
    return {"efficientnet_lite0": _efficientnet, "timm": _timm, "hf": _hugging_face}[kind](full)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a torch file that holds nothing but tensors.

    A torch file's tensors may stand below one of the keys ``model``, ``state_dict`` or ``module``.

    Raises:
        ValueError: a missing or damaged file, or one without tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights: expected a file, {path} is none; give the path of a local file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # safetensors, pickle and zip each have errors of their own
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"weights: cannot read {path} ({reason}); expected .safetensors or a torch state dict") from e
    for key in ("model", "state_dict", "module"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"weights: {path} is no state dict; expected a mapping of names to tensors")
    return dict(state)


def _on_meta() -> bool:
    """Whether modules are being built without storage, under ``torch.device("meta")``."""
    return torch.empty(0).device.type == "meta"


def _efficientnet(config: Mapping[str, Any]) -> VisionEncoder:
    import timm

    size = config["image_size"]
    if not isinstance(size, int) or size < 32:
        raise ValueError(f"vision: expected an integer image_size of at least 32, got {size!r}")
    network = _ConvFeatures(timm.create_model("tf_efficientnet_lite0", num_classes=0))
    if not _on_meta():
        _fill(network, shipped_weights(SHIPPED, SHIPPED_SHA256, "recipes/convert_vision.py"))
    network.eval().fold()
    side = -(-size // 32)  # five halvings, rounded up
    normalisation = ([127 / 255] * 3, [128 / 255] * 3)  # (255 x - 127) / 128
    return VisionEncoder(network, 320, (side, side), size, normalisation, False, True)


def _timm(config: Mapping[str, Any]) -> VisionEncoder:
    import timm

    name, size, depth = config["name"], config["image_size"], config["depth"]
    if not isinstance(name, str) or not timm.is_model(name):
        near = timm.list_models(f"{name.split('.')[0][:8]}*")[:4] if isinstance(name, str) else []
        raise ValueError(f"vision: expected the name of a timm ViT, got {name!r}; names like it: {near}")
    if config["weights"] is not None and not Path(config["weights"]).is_file():
        raise ValueError(f"vision: weights of {name}: {config['weights']!r} is no file; give a local path or null")
    try:
        model: Any = timm.create_model(
            name, pretrained=False, num_classes=0, global_pool="", img_size=size, **config["arguments"]
        )
        h, w = model.patch_embed.grid_size
        prefix, blocks = model.num_prefix_tokens, model.blocks
    except (TypeError, AttributeError, AssertionError) as e:
        reason = " ".join(str(e).split())[:200]
        raise ValueError(
            f"vision: expected a timm ViT (vit_*, eva*) and arguments it takes, got {name} ({reason})"
        ) from e
    if config["class_token"] and getattr(model, "cls_token", None) is None:
        raise ValueError(f"vision: {name} has no class token; set class_token to false")
    if depth is not None:
        if not 1 <= depth <= len(blocks):
            raise ValueError(f"vision: depth of {name}: expected 1..{len(blocks)} blocks or null, got {depth!r}")
        model.blocks = blocks[:depth]
    if not config["final_norm"]:
        model.norm = nn.Identity()
    if config["weights"] is not None and not _on_meta():
        _fill_timm(model, read_state(config["weights"]))
    listed = model.pretrained_cfg
    normalisation = (config["mean"] or listed["mean"], config["std"] or listed["std"])
    return VisionEncoder(
        _TimmFeatures(model, config["class_token"], prefix),
        model.embed_dim,
        (h, w),
        size,
        normalisation,
        config["class_token"],
        config["weights"] is not None,
    )


def _fill_timm(model: Any, state: dict[str, Tensor]) -> None:
    """Load timm's layout or another that timm's filter knows (OpenAI CLIP, EVA, DINOv2); positions are resized."""
    convert = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, model)
    own = model.state_dict()
    left_out = ("head", "fc_norm.", "attn_pool.", "mask_token", "lm_head.", "pre_logits.")
    cut = [k for k in state if k not in own and k.startswith((*left_out, "blocks.", "norm."))]
    blocks = {int(k.split(".")[1]) for k in cut if k.startswith("blocks.")}
    if blocks and min(blocks) < len(model.blocks):  # a name inside a block that is kept: another architecture
        cut = [k for k in cut if not k.startswith("blocks.")]
    _fill(model, {k: v for k, v in state.items() if k not in cut})


def _fill(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict whose names and shapes must be the network's own, but for counters of batches."""
    own = network.state_dict()
    missing = sorted(k for k in own if k not in state and not k.endswith("num_batches_tracked"))
    unexpected = sorted(k for k in state if k not in own)
    pairs = [(k, tuple(v.shape), tuple(own[k].shape)) for k, v in state.items() if k in own]
    wrong = [f"{k} {found}, expected {shape}" for k, found, shape in pairs if found != shape]
    if missing or unexpected or wrong:
        raise ValueError(
            f"weights do not fit: missing {missing[:3]} ({len(missing)}), unexpected {unexpected[:3]} "
            f"({len(unexpected)}), other shapes {wrong[:2]} ({len(wrong)}); take the file of this architecture"
        )
    network.load_state_dict(state, strict=False)


def _hugging_face(config: Mapping[str, Any]) -> VisionEncoder:
    folder, layer = config["folder"], config["layer"]
    if not isinstance(folder, str) or not (Path(folder) / "config.json").is_file():
        raise ValueError(f"vision: expected a transformers folder with a config.json, got {folder!r}")
    try:
        import transformers
    except ImportError as e:
        raise ImportError("a vision encoder of type 'hf' needs transformers: pip install 'mmtok[text]'") from e
    settings: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if settings.model_type not in _HF_CLASSES:
        raise ValueError(f"{folder}: expected model_type out of {sorted(_HF_CLASSES)}, got {settings.model_type!r}")
    settings = getattr(settings, "vision_config", settings)
    cls = getattr(transformers, _HF_CLASSES[settings.model_type])
    if layer is not None and not 1 <= layer <= settings.num_hidden_layers:
        raise ValueError(f"vision: layer: expected 1..{settings.num_hidden_layers} or null, got {layer!r}")
    if _on_meta():
        model = cls(settings)
    else:
        try:
            model = cls.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        except Exception as e:
            raise ValueError(f"{folder}: cannot load the weights ({' '.join(str(e).split())[:200]})") from e
    size, patch = settings.image_size, settings.patch_size
    mean, std = _hf_normalisation(Path(folder), settings.model_type)
    num_prefix = 1 + getattr(settings, "num_register_tokens", 0)
    network = _HuggingFaceFeatures(model, config["class_token"], num_prefix, layer)
    grid = (size // patch, size // patch)
    return VisionEncoder(network, settings.hidden_size, grid, size, (mean, std), config["class_token"], True)


def _hf_normalisation(folder: Path, model_type: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std of the folder's preprocessor, else those that the family was published with."""
    import json

    file = folder / "preprocessor_config.json"
    listed = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    family = {"vit": ([0.5] * 3, [0.5] * 3)}
    if model_type.startswith("dinov2"):
        family[model_type] = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    mean, std = family.get(model_type, (CLIP_MEAN, CLIP_STD))
    return listed.get("image_mean", mean), listed.get("image_std", std)
