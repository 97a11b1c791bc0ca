"""WavTokenizer (arXiv 2408.16532) through its authors' code: one book of 4096 codes at 40 or 75 Hz, 24 kHz sound."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtok.catalogue import Family, Taxonomy
from mmtok.data.hub import folder_of
from mmtok.wrappers.speechtokenizer import read_state, refuse_untrained
from mmtok.wrappers.wrapped import WrappedAudio, require

# Modules that may hold the class: of the forks that pip installs, of a clone of the authors' repository, and of the
# copy inside OuteTTS 0.2 (which puts its own `decoder` on the path).
PLACES = ("wavtokenizer.decoder.pretrained", "decoder.pretrained", "outetts.wav_tokenizer.decoder")
# part of the network: its module beside the class, its name. Class paths in a config are compared, never followed.
PARTS = {
    "feature_extractor": ("feature_extractors", "EncodecFeatures"),
    "backbone": ("models", "VocosBackbone"),
    "head": ("heads", "ISTFTHead"),
}
RELEASED_BANDWIDTH_ID = 0


def open_wavtokenizer(source: str) -> WavTokenizer:
    """Load a folder that holds one config (.yaml) and one checkpoint (.ckpt, or .safetensors with the same names).

    The config is the one of the repository's ``configs`` folder that has the checkpoint's frame rate. The embedding of
    the decoder's norms is chosen by ``bandwidth_id`` at the top level of the yaml; without it 0 is taken, which is what
    the authors validate and decode with (training draws one of 4 that all mean the same bitrate).

    Raises:
        ValueError: no such folder, files missing, several or damaged, weights that do not fit the config.
        ImportError: the class is nowhere to be imported from.
    """
    folder = folder_of(source, ("*.yaml", "*.ckpt", "*.safetensors"))
    path = _only(folder, (".yaml", ".yml"), "config; copy the one of the model's frame rate from the code's configs")
    weights = _only(folder, (".ckpt", ".safetensors"), "checkpoint; keep one in a folder of its own, with its config")
    config = _read_yaml(path)
    state = read_state(weights)
    network = build(_parts_of(config, path), path)
    state = state.get("state_dict", state)
    try:
        network.load_state_dict({k: v for k, v in state.items() if k.split(".")[0] in PARTS})
    except (RuntimeError, AttributeError, TypeError) as e:
        reason = " ".join(str(e).split())[:300]
        raise ValueError(f"{weights} does not fit {path.name} ({reason}); take the config of this checkpoint") from e
    return WavTokenizer(network, config.get("bandwidth_id", RELEASED_BANDWIDTH_ID), folder)


FAMILY = Family(
    name="wavtokenizer",
    title="WavTokenizer: one codebook, EnCodec's encoder and a Vocos decoder with attention",
    modality="audio",
    source="folder with one .yaml config and one .ckpt",
    example="wavtokenizer:/models/wavtokenizer_large_unify_40",
    package="WavTokenizer (a repository)",
    install=(
        'git clone https://github.com/jishengpeng/WavTokenizer && export PYTHONPATH="$PWD/WavTokenizer:$PYTHONPATH" '
        "&& pip install torchaudio scipy einops pyyaml huggingface_hub"
    ),
    code_licence="MIT",
    weights_licence="MIT according to the code's repository; check the card",
    # The survey's row. The encoder's recurrence is an LSTM; the decoder has one attention layer before its ConvNeXt.
    taxonomy=Taxonomy(
        architecture="CNN+T/CNN+T",
        input="T",
        quantization="SVQ",
        bitrate="F",
        objective=("GAN", "Feat", "Rec", "VQ"),
        auxiliary=(),
        joint=True,
        domain="SMA",
        rate="40, 75",
        streamable=False,
    ),
    open=open_wavtokenizer,
)


class WavTokenizer(WrappedAudio):
    """The repository's ``WavTokenizer`` network.

    The authors run one clip at a time (their issue 3). Clips of one length may share a batch, for nothing in the
    network crosses items. Padded ones may not: the encoder looks ahead, so a clip's last codes change, and the
    decoder's attention and group norms read the padding, so all of its sound does.

    Args:
        network: ``decoder.pretrained.WavTokenizer``.
        bandwidth_id: which embedding the norms of the decoder take; 0 as released.
        source: where the weights came from.

    Raises:
        ValueError: ``bandwidth_id`` out of range, encoder and decoder of different hops, a codebook never trained.
    """

    family = FAMILY
    # Encoder: an LSTM, so a frame depends on all before it. Decoder: attention over the clip, and group norms whose
    # statistics are taken over time.
    encode_margin = None
    decode_margin = None

    def __init__(self, network: nn.Module, bandwidth_id: int, source: str | Path):
        parts: Any = network
        codec, backbone = parts.feature_extractor.encodec, parts.backbone
        hop, head_hop = int(codec.encoder.hop_length), int(parts.head.istft.hop_length)
        if hop != head_hop:
            raise ValueError(
                f"wavtokenizer: the encoder takes {hop} samples a frame, the decoder gives {head_hop}; take the "
                "config of this checkpoint"
            )
        embeddings = int(backbone.norm.scale.num_embeddings) if backbone.adanorm else 1
        if type(bandwidth_id) is not int or not 0 <= bandwidth_id < embeddings:
            raise ValueError(f"bandwidth_id: expected 0..{embeddings - 1} (0 as released), got {bandwidth_id!r}")
        refuse_untrained(parts.feature_extractor, FAMILY)
        size, rate = int(codec.quantizer.bins), int(codec.sample_rate)
        config = {
            "bandwidth_id": bandwidth_id,
            "codebook_size": size,
            "hop_length": hop,
            "padding": str(parts.head.istft.padding),
            "sample_rate": rate,
        }
        super().__init__(network, config, source)
        self.sample_rate = rate
        self.hop_length = hop
        self.codebook_sizes = (size,)  # upstream's encode_infer reads the first book, however many there are
        self.bandwidth_id = bandwidth_id

    def network_encode(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        del lengths, num_codebooks  # no mask, and one level is all there is
        network: Any = self.network
        _, codes = network.encode_infer(x[:, 0], bandwidth_id=self._condition(x.device))
        return codes.transpose(0, 1).clone()  # a copy, for upstream's tensors may not leave inference mode

    def network_decode(self, codes: Tensor) -> Tensor:
        network: Any = self.network
        features = network.codes_to_features(codes.transpose(0, 1))
        return network.decode(features, bandwidth_id=self._condition(codes.device))[:, None].clone()

    def _condition(self, device: torch.device) -> Tensor:
        return torch.tensor([self.bandwidth_id], device=device)


def upstream_class() -> Any:
    """The class ``WavTokenizer`` from the first of `PLACES` that has it. Raises ImportError that says what to do."""
    reasons = []
    for place in PLACES:
        try:
            return importlib.import_module(place).WavTokenizer
        except (
            ImportError,
            AttributeError,
            OSError,
            RuntimeError,
        ) as e:  # absent, another `decoder`, broken torchaudio
            reasons.append(f"{place}: {' '.join(str(e).split())[:100]}")
    raise ImportError(
        f"wavtokenizer needs the authors' code, which is no package: {FAMILY.install} (or pip install outetts==0.2.3, "
        f"which holds a copy); tried {'; '.join(reasons)}"
    )


def build(arguments: dict[str, dict[str, Any]], path: Path) -> nn.Module:
    """An untrained network of upstream's classes from the arguments of each of its `PARTS`.

    Raises:
        ValueError: arguments that the classes of the config file ``path`` do not take. ImportError: no upstream code.
    """
    cls = upstream_class()
    package = cls.__module__.rpartition(".")[0]
    try:
        classes = {k: getattr(importlib.import_module(f"{package}.{m}"), n) for k, (m, n) in PARTS.items()}
    except AttributeError as e:
        raise ImportError(f"{package} is another version of the code than {FAMILY.name} knows ({e})") from e
    try:
        with contextlib.redirect_stdout(sys.stderr):  # some versions print there, where our commands print results
            return cls(**{k: classes[k](**arguments[k]) for k in PARTS})
    except (TypeError, ValueError, RuntimeError, AssertionError, ArithmeticError) as e:
        reason = " ".join(str(e).split())[:300]
        raise ValueError(f"{path} makes no WavTokenizer ({reason}); restore the file") from e


def _parts_of(config: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    try:
        sections = {k: config["model"]["init_args"][k] for k in PARTS}
        classes = {k: str(s["class_path"]).rpartition(".")[2] for k, s in sections.items()}
        arguments = {k: dict(s["init_args"]) for k, s in sections.items()}
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(
            f"{path} is no config of a WavTokenizer ({e!r}); expected class_path and init_args of "
            f"{', '.join(PARTS)} in model.init_args"
        ) from e
    wanted = {k: name for k, (_, name) in PARTS.items()}
    if classes != wanted:
        raise ValueError(f"{path}: expected the classes {wanted}, got {classes}; other ones are not supported")
    return arguments


def _read_yaml(path: Path) -> dict[str, Any]:
    yaml = require("yaml", FAMILY)
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is no yaml ({' '.join(str(e).split())[:200]}); restore the file") from e
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(config).__name__}; restore the file")
    return config


def _only(folder: Path, suffixes: tuple[str, ...], what: str) -> Path:
    found = sorted(p for p in folder.iterdir() if p.suffix in suffixes)
    if len(found) != 1:
        kinds = " or ".join(suffixes)
        raise ValueError(f"{folder}: expected one {kinds} file, got {[p.name for p in found]}: the {what}")
    return found[0]
