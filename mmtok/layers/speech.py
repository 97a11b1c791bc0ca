"""Frozen speech teachers: sound in, features of 50 Hz out; built from a JSON-able config by `build_speech`.

A HuBERT (arXiv 2106.07447), WavLM (2110.13900) or wav2vec 2.0 (2006.11477) of transformers gives the mean over all its
hidden states, as X-Codec takes them (2408.17175, section 3.2); `mmtok.layers.whisper` has the teacher that ships.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.layers.text import quiet
from mmtok.layers.whisper import WhisperEncoder, build_whisper

# Teachers of the published X-Codec checkpoints, by the names that their configs use.
PUBLISHED = {
    "hubert_base": "facebook/hubert-base-ls960",
    "wavlm_base_plus": "microsoft/wavlm-base-plus",
    "hubert_base_general": "ZhenYe234/hubert_base_general_audio",
}
MODEL_TYPES = ("hubert", "wavlm", "wav2vec2")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "hf": {"folder": None, "sha256": None, "padding": None, "sample_rate": 16000},
    "hf_config": {"config": None, "padding": None, "sample_rate": 16000},
}
_INDEX = {"model.safetensors": "model.safetensors.index.json", "pytorch_model.bin": "pytorch_model.bin.index.json"}
_UNUSED = ("masked_spec_embed",)  # read by SpecAugment only, and some published files lack it


class SpeechEncoder(nn.Module):
    """A frozen speech network; always in eval mode, without gradient, in float32 under any autocast.

    It attends over the whole sound (``window_frames`` is None): every clip must be run alone and at once, or its
    features depend on the padding beside it.

    Args:
        network: a transformers model whose output has ``hidden_states``.
        config: what `build_speech` rebuilds it from, with every key; kept as ``config``.
        external_weights: the weights come from outside the checkpoint and are not saved with it.
    """

    window_frames: int | None = None

    def __init__(self, network: Any, config: Mapping[str, Any], external_weights: bool):
        super().__init__()
        settings = network.config
        self.network = network
        self.config, self.external_weights = dict(config), external_weights
        self.dim: int = settings.hidden_size
        self.sample_rate: int = config["sample_rate"]
        self.hop_length, self.field = receptive_field(settings.conv_kernel, settings.conv_stride)
        self.padding: int = self.hop_length // 2 if config["padding"] is None else config["padding"]
        if 2 * self.padding < self.field - self.hop_length:
            raise ValueError(
                f"speech: padding: expected at least {-(-(self.field - self.hop_length) // 2)} samples, so that one "
                f"hop of {self.hop_length} gives a frame, got {self.padding}"
            )
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> SpeechEncoder:
        """Stays in eval mode: dropout, layerdrop and SpecAugment would otherwise be in the targets."""
        del mode
        return super().train(False)

    def num_frames(self, num_samples: int) -> int:
        """Frames of a sound of ``num_samples``: one for each hop, unless the padding is another than the default."""
        return max(0, (num_samples + 2 * self.padding - self.field) // self.hop_length + 1) if num_samples else 0

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Mean over all hidden states (the projected features and every layer).

        Args:
            x: (B, 1, L) sound of `sample_rate` Hz, not normalised, L a multiple of the hop.

        Returns:
            (B, `num_frames` (L), dim) float32.

        Raises:
            ValueError: another shape or length.
        """
        if x.ndim != 3 or x.shape[1] != 1 or x.shape[2] % self.hop_length or not x.is_floating_point():
            raise ValueError(
                f"x: expected float sound (B, 1, L) with L a multiple of {self.hop_length}, got {x.dtype} "
                f"{tuple(x.shape)}; pad it with zeros on the right"
            )
        if x.shape[2] == 0:
            return x.new_zeros(x.shape[0], 0, self.dim, dtype=torch.float32)
        # Autocast does not know the meta device, on which only shapes are computed.
        plain = torch.autocast(x.device.type, enabled=False) if x.device.type != "meta" else contextlib.nullcontext()
        with plain:
            sound = F.pad(x[:, 0].float(), (self.padding, self.padding))  # (B, L + 2 * padding)
            sound = sound.to(next(self.network.parameters()).dtype)  # follows a model that was cast as a whole
            states = self.network(sound, output_hidden_states=True).hidden_states
            return torch.stack(states, 1).float().mean(1)


class GivenTeacher(nn.Module):
    """The place of a teacher that the program brings itself, see `mmtok.audio.xcodec.XCodec.use_teacher`.

    Args:
        dim, sample_rate, hop_length: of the features to come.
    """

    external_weights, window_frames = True, None

    def __init__(self, dim: int, sample_rate: int = 16000, hop_length: int = 320):
        super().__init__()
        if min(dim, sample_rate, hop_length) < 1:
            raise ValueError(
                f"speech: expected positive dim, sample_rate, hop_length, got {(dim, sample_rate, hop_length)}"
            )
        self.dim, self.sample_rate, self.hop_length = dim, sample_rate, hop_length
        self.network: nn.Module | None = None

    def train(self, mode: bool = True) -> GivenTeacher:
        """Stays in evaluation mode, as every teacher."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, L) -> (B, L / hop, dim) float32.

        Raises:
            ValueError: no network was given, or one of another shape.
        """
        if self.network is None:
            raise ValueError("this codec's teacher is the program's own: expected codec.use_teacher(module) first")
        found = self.network(x)
        expected = (x.shape[0], x.shape[2] // self.hop_length, self.dim)
        if not isinstance(found, Tensor) or tuple(found.shape) != expected:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"teacher: expected features (B, T, D) = {expected} of sound {tuple(x.shape)}, got {shape}"
            )
        return found.float()


def receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """(samples between two frames, samples that one frame sees) of a stack of unpadded convolutions."""
    field, step = 1, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        field += (kernel - 1) * step
        step *= stride
    return math.prod(strides), field


def build_speech(config: Mapping[str, Any]) -> SpeechEncoder | WhisperEncoder | GivenTeacher:
    """The teacher that ``config["type"]`` names.

    * ``{"type": "hf", "folder": ..., "sha256": None}``: a HuBERT, WavLM or wav2vec 2.0 in a local transformers folder,
      or by a name of `PUBLISHED` out of transformers' cache. Its weights stay where they are; ``sha256`` is that of the
      weight files, checked where it is given and else filled in: store the ``config`` of what is returned.
    * ``{"type": "hf_config", "config": {...}}``: such a network of the sizes in ``config`` (what its transformers
      config's ``to_dict()`` gives), with random weights that belong to the checkpoint.
    * ``{"type": "given", "dim": D}``: a module that the program brings; not saved with the codec.
    * ``{"type": "whisper", ...}``: see `mmtok.layers.whisper.build_whisper`.

    The first two also take ``padding``, zeros on either side of the sound (None: half a hop, so that every hop gives
    one frame), and ``sample_rate`` in Hz (16000): of the codec around it; the network hears its samples as they are.

    Raises:
        ValueError: unknown type or key; a folder that is missing, damaged, of another kind of model or whose weights
            are not those of ``sha256``. ImportError: transformers is not installed.
    """
    kind = config.get("type")
    if kind == "whisper":
        return build_whisper(config)
    if kind == "given":
        known = ("type", "dim", "sample_rate", "hop_length")
        if "dim" not in config or not set(config) <= set(known):
            raise ValueError(f"speech type 'given': expected dim, and keys out of {list(known)}, got {sorted(config)}")
        return GivenTeacher(**{k: config[k] for k in known[1:] if k in config})
    if kind not in _DEFAULTS:
        raise ValueError(f"speech: expected a type out of {sorted([*_DEFAULTS, 'given', 'whisper'])}, got {kind!r}")
    defaults = _DEFAULTS[kind]
    unknown = sorted(set(config) - set(defaults) - {"type"})
    if unknown:
        raise ValueError(f"speech type {kind!r}: expected keys out of {sorted(defaults)}, got {unknown}; remove them")
    full = {"type": kind, **defaults, **config}
    padding = full["padding"]
    if padding is not None and (not isinstance(padding, int) or padding < 0):
        raise ValueError(f"speech: padding: expected samples, 0 or more, or null, got {padding!r}")
    if not isinstance(full["sample_rate"], int) or full["sample_rate"] < 1:
        raise ValueError(f"speech: sample_rate: expected Hz, 1 or more, got {full['sample_rate']!r}")
    return _from_folder(full) if kind == "hf" else _from_config(full)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as e:
        raise ImportError("a HuBERT or WavLM teacher needs transformers: pip install 'mmtok[text]'") from e
    return transformers


def _from_config(full: dict[str, Any]) -> SpeechEncoder:
    transformers = _transformers()
    settings = dict(full["config"]) if isinstance(full["config"], Mapping) else {}
    model_type = settings.pop("model_type", None)
    if model_type not in MODEL_TYPES:
        raise ValueError(f"speech: config: expected a model_type out of {list(MODEL_TYPES)}, got {model_type!r}")
    settings.pop("dtype", None)  # of the file that it came from; ours is float32
    try:
        with quiet(transformers):
            network = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(model_type, **settings))
    except Exception as e:  # transformers checks with errors of many kinds
        raise ValueError(f"speech: config: no {model_type} can be built of it ({_reason(e)})") from e
    return SpeechEncoder(network.float(), full, external_weights=False)


def _from_folder(full: dict[str, Any]) -> SpeechEncoder:
    transformers = _transformers()
    folder = _resolved(full["folder"])
    try:
        settings: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as e:
        raise ValueError(f"speech: cannot read {folder / 'config.json'} ({_reason(e)}); restore the folder") from e
    if settings.model_type not in MODEL_TYPES:
        raise ValueError(f"{folder}: expected a model_type out of {list(MODEL_TYPES)}, got {settings.model_type!r}")
    if torch.empty(0).device.type == "meta":
        with quiet(transformers):
            network = transformers.AutoModel.from_config(settings)
        return SpeechEncoder(network, full, external_weights=True)
    found = _digest(folder)
    if full["sha256"] not in (None, found):
        raise ValueError(
            f"{folder}: expected weights of sha256 {str(full['sha256'])[:16]}..., got {found[:16]}...: they are not "
            "those that this config was made with; restore them, or set sha256 to null to start anew with these"
        )
    try:
        with quiet(transformers):
            network, info = transformers.AutoModel.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except Exception as e:  # safetensors, pickle, json and transformers each have errors of their own
        raise ValueError(f"{folder}: cannot load the weights ({_reason(e)}); restore the folder") from e
    absent = sorted(k for k in info["missing_keys"] if k not in _UNUSED)
    if absent:  # transformers has filled them with random numbers
        raise ValueError(f"{folder}: lacks weights of a {settings.model_type}: {absent[:3]} ({len(absent)})")
    return SpeechEncoder(network, {**full, "sha256": found}, external_weights=True)


def _resolved(source: Any) -> Path:
    """A local folder, or the folder of transformers' cache that holds a published teacher."""
    if source in PUBLISHED:
        from transformers.utils import cached_file

        repo = PUBLISHED[source]
        try:
            return Path(str(cached_file(repo, "config.json", local_files_only=True))).parent
        except OSError as e:
            raise ValueError(
                f"speech: {repo} is not in transformers' cache; run `hf download {repo}`, or give a local folder"
            ) from e
    if not isinstance(source, str) or not (Path(source) / "config.json").is_file():
        raise ValueError(
            f"speech: folder: expected a transformers folder with a config.json, or a name out of {sorted(PUBLISHED)}, "
            f"got {source!r}"
        )
    return Path(source)


def _digest(folder: Path) -> str:
    """sha256 over the files that transformers reads the weights from."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with open(path, "rb") as f:
            while part := f.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a transformers folder: one, or those that an index lists; safetensors before pickles.

    Raises:
        ValueError: there are none, or an index that is damaged or lists absent files.
    """
    for single, index in _INDEX.items():
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            try:
                names = sorted(set(json.loads((folder / index).read_text("utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"{folder / index}: expected an index with a weight_map; restore the folder") from e
            if absent := [name for name in names if not (folder / name).is_file()]:
                raise ValueError(f"{folder}: {index} lists files that are absent: {absent[:3]}; restore the folder")
            return [folder / name for name in names]
    raise ValueError(f"{folder}: expected weights in one of {sorted(_INDEX)}, found none; restore the folder")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
