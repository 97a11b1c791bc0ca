"""Perceptual distance of images on a frozen network's features (LPIPS), and the ST-LPIPS networks that pip fetches."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtok.losses.reconstruction import check_pair

_FETCH = "pip install --no-deps stlpips-pytorch==0.0.2"

_Op = tuple[str, str, int]  # (kind, key in the file, number)


def _convs(padding: int, *keys: str) -> tuple[_Op, ...]:
    """Convolutions with a ReLU after each."""
    return tuple(op for key in keys for op in (("conv", key, padding), ("relu", "", 0)))


# One entry a stage: ("conv", key, padding) convolves, ("max", "", size) pools at stride 1, ("blur", key, 2) blurs and
# halves. The output of each stage is one feature map.
_STAGES: dict[str, tuple[tuple[_Op, ...], ...]] = {
    "vgg": (
        _convs(1, "slice1.0", "slice1.2"),
        (("max", "", 2), ("blur", "slice2.5", 2), *_convs(1, "slice2.6", "slice2.8")),
        (("max", "", 2), ("blur", "slice3.11", 2), *_convs(1, "slice3.12", "slice3.14", "slice3.16")),
        (("max", "", 2), ("blur", "slice4.19", 2), *_convs(1, "slice4.20", "slice4.22", "slice4.24")),
        (("max", "", 2), ("blur", "slice5.27", 2), *_convs(1, "slice5.28", "slice5.30", "slice5.32")),
    ),
    "alex": (
        (("conv", "slice1.0", 2), ("blur", "slice1.1", 2), ("relu", "", 0)),
        (("max", "", 3), ("blur", "slice2.4", 2), *_convs(2, "slice2.5")),
        (("max", "", 3), ("blur", "slice3.8", 2), *_convs(1, "slice3.9")),
        _convs(1, "slice4.11"),
        _convs(1, "slice5.13"),
    ),
}
# The smallest side for which every blur can reflect two pixels at its edge.
_SMALLEST = {"vgg": 18, "alex": 21}


class PerceptualLoss(nn.Module):
    """LPIPS (arXiv 1801.03924 eq. 1) on a network that is passed in.

    d(x, x_hat) = sum over layers l of the mean over positions of w_l . (y_l - y_hat_l)^2, where y_l are the network's
    features with unit length along channels. The network is frozen and stays in eval mode; gradients flow through it to
    the images. Everything runs in float32, whatever the autocast.

    Args:
        network: takes images (B,3,H,W) in [0,1] (it normalises them itself) and returns a list of feature maps
            (B,C_l,H_l,W_l).
        layer_weights: w_l, one tensor (C_l,) for each feature map; None: w_l = 1 (the sum over channels).
        eps: length below which a feature vector counts as zero.
    """

    def __init__(self, network: nn.Module, layer_weights: Sequence[Tensor] | None = None, eps: float = 1e-10) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.eps = eps
        self.num_layers = None if layer_weights is None else len(layer_weights)
        for index, weight in enumerate(layer_weights or ()):
            self.register_buffer(f"layer_weight_{index}", weight.detach().float().reshape(-1).clone())

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stay in eval mode: a measuring instrument must not drop units or update statistics."""
        return super().train(False)

    def distance(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Distance of each pair of images.

        Args:
            x_hat: reconstruction (B,3,H,W), nominally in [0,1].
            x: real images, same shape.

        Returns:
            (B,) float32, 0 for equal images.

        Raises:
            ValueError: shapes that differ, or a network that does not fit the layer weights.
        """
        check_pair(x_hat, x)
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"x: expected images (B,3,H,W), got shape {tuple(x.shape)}; repeat a grey channel 3 times")
        with torch.autocast(device_type=x.device.type, enabled=False):
            fake = self.network(x_hat.float())
            # The real side needs no graph unless someone asks for it: half of the memory of this loss.
            with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
                real = self.network(x.float())
            if self.num_layers not in (None, len(real)):
                raise ValueError(f"network: expected {self.num_layers} feature maps (one a weight), got {len(real)}")
            total = x.new_zeros(x.shape[0], dtype=torch.float32)
            for index, (f, r) in enumerate(zip(fake, real, strict=True)):
                squared = (self._unit(f.float()) - self._unit(r.float())).square()  # (B, C_l, H_l, W_l)
                if self.num_layers is not None:
                    weight: Tensor = getattr(self, f"layer_weight_{index}")
                    if weight.shape[0] != squared.shape[1]:
                        raise ValueError(
                            f"network: layer {index} has {squared.shape[1]} channels, its weight {weight.shape[0]}"
                        )
                    squared = squared * weight.float()[:, None, None]
                total = total + squared.sum(dim=1).mean(dim=(1, 2))
        return total

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Mean of `distance` over the batch, scalar float32; same arguments and errors."""
        return self.distance(x_hat, x).mean()

    def _unit(self, features: Tensor) -> Tensor:
        # eps stands inside the root: where ReLU left nothing, the plain norm has a NaN gradient.
        return features * (features.square().sum(dim=1, keepdim=True) + self.eps**2).rsqrt()


class AntialiasedFeatures(nn.Module):
    """The shift-tolerant VGG16 or AlexNet of ST-LPIPS (arXiv 2207.13686): strides became max-pool 1 + blur + halve.

    Widths and kernel sizes are read from the weights.

    Args:
        state: tensors under the names of the published files (``net.slice1.0.weight``, ``scaling_layer.shift``, ...).
        net: ``vgg`` or ``alex``.

    Raises:
        ValueError: another `net`, or names that are missing.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, state: Mapping[str, Tensor], net: str = "vgg") -> None:
        super().__init__()
        _check_net(net)
        self.net = net
        self.register_buffer("shift", _take(state, "scaling_layer.shift").reshape(1, 3, 1, 1))
        self.register_buffer("scale", _take(state, "scaling_layer.scale").reshape(1, 3, 1, 1))
        self.stages = nn.ModuleList()
        for stage in _STAGES[net]:
            layers: list[nn.Module] = []
            for kind, key, number in stage:
                if kind == "conv":
                    weight = _take(state, f"net.{key}.weight")
                    conv = nn.Conv2d(
                        weight.shape[1], weight.shape[0], (weight.shape[2], weight.shape[3]), padding=number
                    )
                    conv.load_state_dict({"weight": weight, "bias": _take(state, f"net.{key}.bias")})
                    layers.append(conv)
                elif kind == "blur":
                    layers.append(_BlurHalve(_take(state, f"net.{key}.filt")))
                elif kind == "max":
                    layers.append(nn.MaxPool2d(number, stride=1))
                else:
                    layers.append(nn.ReLU())
            self.stages.append(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of images (B,3,H,W) in [0,1]: five maps (B,C_l,H_l,W_l), after a ReLU each.

        Raises:
            ValueError: an image with a side below 18 (vgg) or 21 (alex) pixels.
        """
        smallest = _SMALLEST[self.net]
        if min(x.shape[-2:]) < smallest:
            raise ValueError(
                f"x: expected at least {smallest} x {smallest} pixels for {self.net!r}, "
                f"got {x.shape[-2]} x {x.shape[-1]}; resize the images or switch the perceptual loss off"
            )
        x = (2 * x - 1 - self.shift) / self.scale  # the weights were fitted to images in [-1,1]
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class _BlurHalve(nn.Module):
    """Depthwise low-pass filter with stride 2, edges reflected by two pixels."""

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.register_buffer("kernel", kernel.clone())  # (C, 1, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        kernel: Tensor = self.kernel  # pyright: ignore[reportAssignmentType]
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


def load_stlpips(path: str | Path | None = None, net: str = "vgg") -> PerceptualLoss:
    """ST-LPIPS (arXiv 2207.13686) with the weights of the PyPI package ``stlpips-pytorch`` 0.0.2 (BSD-2).

    The package is only read, never imported (it would ask for packages that are not needed).

    Args:
        path: the weights (.pth), or the package's folder (unpacked wheel or installed), or a folder that holds it;
            None: the installed package.
        net: ``vgg`` (14.7 M parameters) or ``alex`` (2.5 M).

    Raises:
        ImportError: `path` is None and the package is not installed.
        FileNotFoundError: no weights under `path`.
        ValueError: another `net`, or a file with other contents.
    """
    _check_net(net)
    if path is None:
        spec = importlib.util.find_spec("stlpips_pytorch")
        if spec is None or spec.origin is None:
            raise ImportError(f"load_stlpips needs the weights of the package stlpips-pytorch: {_FETCH}")
        path = Path(spec.origin).parent
    file = _find_weights(Path(path), net)
    state = torch.load(file, map_location="cpu", weights_only=True)
    network = AntialiasedFeatures(state, net)
    return PerceptualLoss(network, [_take(state, f"lin{i}.model.1.weight") for i in range(len(_STAGES[net]))])


def _find_weights(path: Path, net: str) -> Path:
    inside = Path("weights", "vST0.0", f"{net}_shift_tolerant.pth")
    for candidate in (path, path / inside, path / "stlpips_pytorch" / inside):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"path: expected the weights or a folder that holds {inside}, got {path}; fetch: {_FETCH}")


def _check_net(net: str) -> None:
    if net not in _STAGES:
        raise ValueError(f"net: expected one of {sorted(_STAGES)}, got {net!r}")


def _take(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(
            f"weights: expected a tensor named {name!r}, got {len(state)} others; is it another net's file?"
        )
    return state[name]
