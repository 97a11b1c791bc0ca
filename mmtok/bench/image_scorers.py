"""Judges of pictures: signal metrics, shift-tolerant LPIPS, semantic similarity, and distances between feature sets.

Every function at the end is an entry of `mmtok.bench.scorers.SCORERS`. Networks run in float32 on the CPU, one picture
at a time, and resize what they read themselves, always in the way that their ``settings`` state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmtok.bench.records import Item
from mmtok.bench.scorers import Measure, NotRunError, Scorer, SetScorer, UnscoredError, Value
from mmtok.metrics import image
from mmtok.metrics.frechet import frechet_distance, frechet_floor

FETCH = "run `python recipes/fetch_data.py --out data --helpers` and give the folder data/helpers as helpers"
PACKAGE = "`pip install --no-deps stlpips-pytorch==0.0.2`"
NPM = "`npm pack nsfwjs@4.3.0`, unpacked to nsfwjs in such a folder"
FEWEST = 4  # items of a set: `frechet_floor` takes two random halves of two


class ImageSignal(Scorer):
    """PSNR, SSIM and MS-SSIM of `mmtok.metrics.image`; what is smaller than a metric's window has no value."""

    name: ClassVar[str] = "image_signal"
    modality: ClassVar[str] = "image"

    def __init__(self) -> None:
        self.backend, self.version = "torchmetrics", version("torchmetrics")
        self.measures = (
            Measure("psnr", "dB", "higher", "peak signal-to-noise ratio over all channels, infinite if equal"),
            Measure("ssim", "1", "higher", "structural similarity, 11 px Gaussian window, mean over the RGB channels"),
            Measure("ms_ssim", "1", "higher", "SSIM at five scales; only pictures of 176 x 176 px and more have one"),
        )
        self.settings = {
            "resize": "none, read at the pictures' own size",
            "colour": "RGB in [0,1], channels averaged",
            "data_range": 1.0,
            "ssim_window": f"Gaussian {image.SSIM_WINDOW} px, sigma 1.5, k1 0.01, k2 0.03, edges reflected",
            "ms_ssim_scales": image.MS_SSIM_SCALES,
            "ms_ssim_negative_terms": "set to 0",
        }

    def scores(self, item: Item, x_hat: Tensor) -> dict[str, Value | UnscoredError]:
        """See `Scorer.scores`. Raises ValueError where ``x_hat`` has another shape or range than a picture."""
        x, x_hat = _pair(item, x_hat)
        found: dict[str, Value | UnscoredError] = {}
        for name, function in (("psnr", image.psnr), ("ssim", image.ssim), ("ms_ssim", image.ms_ssim)):
            found[name] = _or_why(function, x, x_hat)
        return found


class ShiftTolerantLpips(Scorer):
    """ST-LPIPS (arXiv 2207.13686) on one network or several.

    Args:
        networks: measure -> (distance of (1,3,H,W) pictures, its network's name). version: of the weights.
    """

    name: ClassVar[str] = "lpips"
    modality: ClassVar[str] = "image"

    def __init__(self, networks: Mapping[str, tuple[Callable[[Tensor, Tensor], Tensor], str]], version: str):
        self._networks = dict(networks)
        self.backend, self.version = "ST-LPIPS of stlpips-pytorch, by mmtok.losses.perceptual", version
        self.measures = tuple(
            Measure(
                measure,
                "1",
                "lower",
                f"shift-tolerant LPIPS on {network}: anti-aliased features, heads of their own; it compares with no "
                "LPIPS of other papers",
            )
            for measure, (_, network) in networks.items()
        )
        self.settings = {
            "resize": "none, read at the pictures' own size",
            "layers": "the five outputs of the network's stages, unit length along channels, weighted by its heads",
            "variant": "vST0.0 shift_tolerant",
            "dtype": "float32",
        }

    def scores(self, item: Item, x_hat: Tensor) -> dict[str, Value | UnscoredError]:
        """See `Scorer.scores`. Raises ValueError where ``x_hat`` has another shape or range than a picture."""
        x, x_hat = _pair(item, x_hat)
        with torch.no_grad():
            return {name: _or_why(distance, x_hat, x) for name, (distance, _) in self._networks.items()}


class SemanticSimilarity(Scorer):
    """Cosine of a frozen classifier's mean features: no text, no captions and no faces are needed.

    Args:
        embed: (1,3,H,W) in [0,1] -> (1, D) features.
        backend, version, settings: of the network, see `Scorer`.
    """

    name: ClassVar[str] = "image_semantic"
    modality: ClassVar[str] = "image"

    def __init__(self, embed: Callable[[Tensor], Tensor], backend: str, version: str, settings: Mapping[str, Any]):
        self._embed = embed
        self.backend, self.version, self.settings = backend, version, dict(settings)
        self.measures = (
            Measure(
                "semantic_similarity",
                "1",
                "higher",
                f"cosine of the mean features of {backend}: 1 for equal pictures; blind to where things stand, and it "
                "sees drawings, text and faces through the classes of ImageNet",
            ),
        )

    def scores(self, item: Item, x_hat: Tensor) -> dict[str, Value | UnscoredError]:
        """See `Scorer.scores`. Raises ValueError where ``x_hat`` has another shape or range than a picture."""
        x, x_hat = _pair(item, x_hat)
        with torch.no_grad():
            a, b = (self._embed(p)[0].double().cpu() for p in (x, x_hat))
        lengths = float(a.norm() * b.norm())
        if not 0 < lengths < float("inf"):
            return {"semantic_similarity": UnscoredError("the features have no direction: all 0, or not finite")}
        # Rounding only: of equal vectors it can be 1 + 2e-16.
        return {"semantic_similarity": min(1.0, float(a @ b) / lengths)}


class FeatureDistance(SetScorer):
    """Frechet and kernel distance between two sets of pictures, on features that are named in the measures.

    Args:
        embed: (1,3,H,W) in [0,1] -> (1, D) features.
        features: their name, e.g. ``efficientnet-lite0``.
        version, settings: of the network, see `SetScorer`.
    """

    modality: ClassVar[str] = "image"

    def __init__(self, embed: Callable[[Tensor], Tensor], features: str, version: str, settings: Mapping[str, Any]):
        self._embed = embed
        self.backend, self.version = f"{features}, by mmtok.metrics.frechet", version
        self.measures = (
            Measure(
                f"fd[{features}]",
                "1",
                "lower",
                f"squared Frechet distance of {features} features; compares with no published FID, and only between "
                "sets of like size: it is biased upwards where items are few, most where they are no reconstructions",
            ),
            Measure(
                f"kid[{features}]",
                "1",
                "lower",
                f"squared kernel distance (KID) of {features} features without bias, so it may be a little below 0; "
                "not times 1000; compares with no published KID",
            ),
            Measure(
                f"fd_floor[{features}]",
                "1",
                "neither",
                f"fd[{features}] between two random halves of the originals: what other pictures of the same kind "
                "show at half the items",
            ),
        )
        self.settings = {
            **settings,
            "fd": "moments of the whole sets, covariance over N - 1, float64",
            "kid": "kernel (x.y / D + 1)^3, whole sets, no subsets; pairs of one index left out where N = M, float64",
            "fd_floor": "halves by seed 0",
        }

    def features(self, x: Tensor, sample_rate: int | None) -> Tensor:
        """(1, D) float32 of a picture (3, H, W) in [0,1]. Raises ValueError for another shape or range."""
        with torch.no_grad():
            return self._embed(_picture(x, "x")[None]).float().cpu()

    def distance(self, reference: Tensor, estimate: Tensor) -> dict[str, float]:
        """See `SetScorer.distance`. Raises UnscoredError for fewer than 4 items, ValueError for other features."""
        count = min(len(reference), len(estimate))
        if count < FEWEST:
            raise UnscoredError(f"distances of feature sets need at least {FEWEST} items, got {count}; take more items")
        fd, kid, floor = (m.name for m in self.measures)
        return {
            fd: frechet_distance(reference, estimate),
            kid: kernel_distance(reference, estimate),
            floor: frechet_floor(reference),
        }


class InceptionDistance(FeatureDistance):
    """`FeatureDistance` on `mmtok.bench.inception`."""

    name: ClassVar[str] = "fd_inception"


class EfficientNetDistance(FeatureDistance):
    """`FeatureDistance` on the shipped EfficientNet-Lite0."""

    name: ClassVar[str] = "fd_efficientnet"


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy under k(x, y) = (x.y / D + 1)^3, which is KID (arXiv 1801.01401 eq. 4).

    mean k(a_i, a_j) + mean k(b_i, b_j) over i != j, less 2 mean k(a_i, b_j): unbiased, so that it can be negative, and
    its expectation does not depend on N and M. Equation 4 takes the last mean over all i and j, as for N != M here.
    Where N = M, i = j is left out of it too (the U-statistic of Gretton et al., JMLR 13 (2012), eq. 4): sets of
    reconstructions are paired, k(a_i, b_i) is larger than k of strangers, and with it a perfect copy would come out
    below 0 instead of at 0. For unpaired sets of one size both have the same expectation.

    Args:
        a: (N, D) features, N at least 2.
        b: (M, D) features, M at least 2; where M = N, row i may belong to row i of ``a``.

    Returns:
        The distance, computed in float64 on the CPU.

    Raises:
        ValueError: other shapes, or values that are not finite.
    """
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2 or len(x) < 2 or x.shape[1] < 1 or not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}: expected finite features (N,D) of at least 2 items, got shape {tuple(x.shape)}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features: expected one width, got {a.shape[1]} and {b.shape[1]}; take them of one network")
    a, b = (x.detach().double().cpu() for x in (a, b))
    within = _others(_kernel(a, a)) + _others(_kernel(b, b))
    across = _kernel(a, b)
    return float(within - 2 * (_others(across) if len(a) == len(b) else across.mean()))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3  # (N, M)


def _others(k: Tensor) -> Tensor:
    """Mean of a square matrix without its diagonal."""
    return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))


def image_signal(helpers: Path | None = None) -> Scorer:
    """PSNR, SSIM and MS-SSIM: `ImageSignal`."""
    return ImageSignal()


def lpips(helpers: Path | None = None) -> Scorer:
    """`ShiftTolerantLpips` on AlexNet, the metric, and VGG16, from ``helpers/stlpips`` or the installed package.

    Raises:
        NotRunError: neither is there, or the weights are damaged.
    """
    from mmtok.losses.perceptual import load_stlpips

    folder = None if helpers is None or not (helpers / "stlpips").is_dir() else helpers / "stlpips"
    try:
        alex, vgg = load_stlpips(folder, "alex"), load_stlpips(folder, "vgg")
    except Exception as e:  # not there, or damaged, for which pickle and zip have errors of their own
        raise NotRunError(f"ST-LPIPS: {FETCH}, or {PACKAGE} ({' '.join(str(e).split())[:200]})") from e
    networks = {"st_lpips_alex": (alex.distance, "AlexNet"), "st_lpips_vgg": (vgg.distance, "VGG16")}
    return ShiftTolerantLpips(networks, f"weights {weights_digest(alex, vgg)}")


def image_semantic(helpers: Path | None = None) -> Scorer:
    """`SemanticSimilarity` on the shipped EfficientNet-Lite0.

    Raises:
        NotRunError: the shipped weights are missing or damaged.
    """
    embed, features, version, settings = _efficientnet()
    return SemanticSimilarity(embed, features, version, settings)


def fd_efficientnet(helpers: Path | None = None) -> SetScorer:
    """`FeatureDistance` on the shipped EfficientNet-Lite0, 320 numbers a picture.

    Raises:
        NotRunError: the shipped weights are missing or damaged.
    """
    return EfficientNetDistance(*_efficientnet())


def fd_inception(helpers: Path | None = None) -> SetScorer:
    """`FeatureDistance` on the InceptionV3 of nsfwjs in ``helpers/nsfwjs``, 2,048 numbers a picture.

    Raises:
        NotRunError: it is not there, or damaged.
    """
    from mmtok.bench.inception import IMAGE_SIZE, OUTPUT, load_inception

    if helpers is None or not (helpers / "nsfwjs").is_dir():
        place = "no folder of helpers was given" if helpers is None else f"{helpers / 'nsfwjs'} is missing"
        raise NotRunError(f"InceptionV3 of nsfwjs 4.3.0: {place}; {FETCH}, or {NPM}")
    try:
        network = load_inception(helpers / "nsfwjs")
    except (OSError, ValueError) as e:
        raise NotRunError(f"InceptionV3 of nsfwjs 4.3.0: {' '.join(str(e).split())[:300]}; {FETCH}, or {NPM}") from e
    settings = {
        "resize": f"squeezed to {IMAGE_SIZE} x {IMAGE_SIZE}, bicubic with antialiasing, cut to [0,1]",
        "layer": f"{OUTPUT}, mean over positions",
        "width": 2048,
        "dtype": "float32",
    }
    return InceptionDistance(network, "nsfwjs-inceptionv3", f"weights {weights_digest(network)}", settings)


def _efficientnet() -> tuple[Callable[[Tensor], Tensor], str, str, dict[str, Any]]:
    """What makes features, their name, version and settings."""
    from mmtok.layers.vision import SHIPPED_SHA256, build_vision

    try:
        network = build_vision({"type": "efficientnet_lite0"})
    except ValueError as e:
        raise NotRunError(f"EfficientNet-Lite0 of mmtok: {e}") from e
    size, weights = network.image_size, f"weights sha256:{SHIPPED_SHA256[:16]}, timm {version('timm')}"
    settings = {
        "resize": f"squeezed to {size} x {size}, bicubic with antialiasing, cut to [0,1]",
        "layer": "output of the last block (before the head), mean over positions",
        "width": network.dim,
        "dtype": "float32",
    }
    return network.embed, "efficientnet-lite0", weights, settings


def weights_digest(*networks: nn.Module) -> str:
    """``sha256:`` and 16 digits over names, shapes and values of all parameters and buffers, as they were loaded."""
    digest = hashlib.sha256()
    for network in networks:
        for name, value in sorted(network.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def _pair(item: Item, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    """(1,3,H,W) each."""
    x, x_hat = _picture(item.reference, f"{item.key}: reference"), _picture(x_hat, f"{item.key}: x_hat")
    if x.shape != x_hat.shape:
        raise ValueError(
            f"{item.key}: x_hat: expected the reference's shape {tuple(x.shape)}, got {tuple(x_hat.shape)}; decode to "
            "that size"
        )
    return x[None], x_hat[None]


def _picture(x: Tensor, name: str) -> Tensor:
    if x.ndim != 3 or x.shape[0] != 3 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(
            f"{name}: expected a float picture (3,H,W) in [0,1], got {x.dtype} {tuple(x.shape)}; repeat a grey channel "
            "3 times, divide uint8 by 255"
        )
    if not bool(torch.isfinite(x).all()) or float(x.min()) < -1e-4 or float(x.max()) > 1 + 1e-4:
        raise ValueError(f"{name}: expected finite values in [0,1], got others; clamp the picture")
    return x.detach().float().cpu()


def _or_why(measure: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float | UnscoredError:
    """The value of one pair; `_pair` has checked everything but its size, so an error can only be about that."""
    try:
        return float(measure(a, b))
    except ValueError as e:
        return UnscoredError(str(e))
