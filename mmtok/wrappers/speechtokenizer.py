"""SpeechTokenizer (arXiv 2308.16692) through its authors' package: 8 levels of 1024 codes at 50 Hz, 16 kHz speech."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mmtok.catalogue import Family, Taxonomy
from mmtok.data.hub import folder_of
from mmtok.wrappers.wrapped import WrappedAudio

# What of config.json shapes the network; the rest of the released file is about training.
CONFIG_KEYS = (
    "activation",
    "bidirectional",
    "codebook_size",
    "dilation_base",
    "dimension",
    "lstm_layers",
    "n_filters",
    "n_q",
    "n_residual_layers",
    "residual_kernel_size",
    "sample_rate",
    "semantic_dimension",
    "strides",
)
USUAL_WEIGHTS = "SpeechTokenizer.pt"


def open_speechtokenizer(source: str) -> SpeechTokenizer:
    """Load a folder with config.json and the weights (SpeechTokenizer.pt, or one other .pt or .safetensors file).

    Both may lie one folder down, as they do in the hub repository.

    Raises:
        ValueError: no such folder, a file that is missing or damaged, weights that do not fit the config.
        ImportError: the package is not installed.
    """
    root = folder_of(source, ("*config.json", "*.pt", "*.safetensors"))
    folder = _config_folder(root)
    config = _read_config(folder / "config.json")
    state = read_state(_weights_file(folder))
    package = model_module()
    try:
        network = package.SpeechTokenizer(config)
        network.load_state_dict(state)
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError, ArithmeticError) as e:
        reason = " ".join(str(e).split())[:300]
        raise ValueError(
            f"{folder}: config.json and the weights make no SpeechTokenizer ({reason}); restore both"
        ) from e
    return SpeechTokenizer(network, config, root)


FAMILY = Family(
    name="speechtokenizer",
    title="SpeechTokenizer: RVQ whose first level is taught by HuBERT",
    modality="audio",
    source="folder with config.json and SpeechTokenizer.pt, or hub repository",
    example="speechtokenizer:fnlp/SpeechTokenizer",
    package="speechtokenizer",
    install="pip install 'mmtok[codecs]'",
    code_licence="Apache-2.0",
    weights_licence="check the card (fnlp/SpeechTokenizer)",
    # The survey's row. The released decoder has a (causal) LSTM too.
    taxonomy=Taxonomy(
        architecture="CNN+RNN/CNN",
        input="T",
        quantization="RVQ",
        bitrate="F",
        objective=("GAN", "Rec", "Feat", "VQ"),
        auxiliary=("SD",),
        joint=True,
        domain="S",
        rate="50",
        streamable=False,
    ),
    open=open_speechtokenizer,
)


class SpeechTokenizer(WrappedAudio):
    """The package's ``SpeechTokenizer`` network.

    Upstream's codes are (Q, B, T); with as many clips as levels nothing tells the two axes apart. Here they are
    (B, Q, T).

    Args:
        network: ``speechtokenizer.model.SpeechTokenizer``.
        config: what it was built from: upstream's config.json.
        source: where the weights came from.

    Raises:
        ValueError: a config that lacks something, or codebooks that were never trained.
    """

    family = FAMILY
    # The LSTM at the end of the encoder reads in both directions, and the decoder begins with another: every frame
    # depends on the whole clip.
    encode_margin = None
    decode_margin = None

    def __init__(self, network: nn.Module, config: Mapping[str, Any], source: str | Path):
        if absent := [k for k in CONFIG_KEYS if k not in config]:
            raise ValueError(f"config of a SpeechTokenizer: expected {', '.join(CONFIG_KEYS)}; {absent} are missing")
        refuse_untrained(network, FAMILY)
        super().__init__(network, {k: config[k] for k in CONFIG_KEYS}, source)
        self.sample_rate = int(config["sample_rate"])
        self.hop_length = int(torch.tensor(config["strides"]).prod())
        self.codebook_sizes = (int(config["codebook_size"]),) * int(config["n_q"])

    def network_encode(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        del lengths  # upstream takes no mask
        network: Any = self.network
        return network.encode(x, num_codebooks).transpose(0, 1)

    def network_decode(self, codes: Tensor) -> Tensor:
        network: Any = self.network
        return network.decode(codes.transpose(0, 1))


def model_module() -> ModuleType:
    """``speechtokenizer.model`` without the package's trainer.

    The package imports its trainer first of all, and that needs beartype, tensorboard and more which it does not
    declare; the network needs torch and einops. So the package is entered past its ``__init__``, unless it is already
    imported. A later ``import speechtokenizer`` runs as if this had not happened, and finds the same class.

    Raises:
        ImportError: the package or einops is not installed, naming the command.
    """
    name = FAMILY.package
    try:
        if sys.modules.get(name) is not None:
            return importlib.import_module(f"{name}.model")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        hollow = ModuleType(name)
        hollow.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = hollow
        try:
            return importlib.import_module(f"{name}.model")
        finally:
            del sys.modules[name]
    except ImportError as e:
        raise ImportError(f"{FAMILY.name} needs the package {name} ({e}): {FAMILY.install}") from e


def read_state(path: Path) -> dict[str, Any]:
    """What a .safetensors file or a torch file of tensors and plain values holds; code in it is never run.

    Raises:
        ValueError: a damaged file, or one that holds more than that.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # zip, pickle and safetensors raise errors of their own
        reason = " ".join(str(e).split())[:200]
        raise ValueError(
            f"cannot read {path} ({reason}); expected tensors and plain values: restore the file, or save the tensors "
            "alone where you trust it"
        ) from e
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a mapping of names to tensors, got {type(state).__name__}")
    return state


def refuse_untrained(network: nn.Module, family: Family) -> None:
    """Raise ValueError when a codebook still waits for k-means, which upstream would run on the first clip it sees."""
    waiting = [k for k, v in network.named_buffers() if k.endswith("_codebook.inited") and not bool(v.all())]
    if waiting:
        raise ValueError(
            f"{family.name}: {len(waiting)} codebooks were never trained ({waiting[0]} is 0), so codes mean nothing; "
            "take a trained checkpoint"
        )


def _config_folder(root: Path) -> Path:
    if (root / "config.json").is_file():
        return root
    inside = sorted(p.parent for p in root.glob("*/config.json"))
    if len(inside) == 1:
        return inside[0]
    found = f"there are several: load one of {[str(p) for p in inside]}" if inside else "restore or download it"
    raise ValueError(f"{root} has no config.json of a SpeechTokenizer; {found}")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
        absent = [k for k in CONFIG_KEYS if k not in config]
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path} is no JSON object ({e}); restore the file") from e
    if absent:
        raise ValueError(f"{path} is no config of a SpeechTokenizer: {', '.join(absent)} missing; restore the file")
    return config


def _weights_file(folder: Path) -> Path:
    if (folder / USUAL_WEIGHTS).is_file():
        return folder / USUAL_WEIGHTS
    found = sorted(p for p in folder.iterdir() if p.suffix in (".pt", ".safetensors"))
    if len(found) != 1:
        names = [p.name for p in found]
        raise ValueError(f"{folder}: expected {USUAL_WEIGHTS}, or one .pt or .safetensors file, got {names}")
    return found[0]
