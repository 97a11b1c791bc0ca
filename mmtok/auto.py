"""Tokenizers by name: the table of types, what ships, and loading from a folder or a hub."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import importlib
import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmtok.catalogue import Family
from mmtok.data.hub import hub_folder
from mmtok.layers.shipped import unpacked
from mmtok.quantizers.codebook import Codebook
from mmtok.tokenizer import CHECKPOINT_FORMAT, TRAINING_STATE, CheckpointError, Tokenizer, fingerprint_of
from mmtok.tokens import TokenSpec

TOKENIZERS = {
    "binary1d": "mmtok.image.binary1d:Binary1D",
    "bridge": "mmtok.image.bridge:Bridge",
    "causal1d": "mmtok.image.causal1d:Causal1D",
    "dynamic": "mmtok.image.dynamic:Dynamic",
    "raster2d": "mmtok.image.raster2d:Raster2D",
    "textok": "mmtok.image.textok:TexTok",
    "titok": "mmtok.image.titok:TiTok",
    "codec": "mmtok.audio.codec:AudioCodec",
    "dac": "mmtok.audio.dac:DAC",
    "encodec": "mmtok.audio.encodec:EnCodec",
    "mimi": "mmtok.audio.mimi:Mimi",
    "xcodec": "mmtok.audio.xcodec:XCodec",
}
# Other people's tokenizers, as "module:Family"; loaded as "<family>:<folder, repository or setting>".
FAMILIES: dict[str, str] = {
    "encodec": "mmtok.wrappers.encodec:FAMILY",
    "dac": "mmtok.wrappers.dac:FAMILY",
    "snac": "mmtok.wrappers.snac:FAMILY",
    "mimi": "mmtok.wrappers.mimi:FAMILY",
    "xcodec": "mmtok.wrappers.xcodec:FAMILY",
    "xcodec2": "mmtok.wrappers.xcodec2:XCODEC2",
    "neucodec": "mmtok.wrappers.xcodec2:NEUCODEC",
    "higgs": "mmtok.wrappers.higgs:FAMILY",
    "vibevoice": "mmtok.wrappers.continuous:VIBEVOICE",
    "pockettts": "mmtok.wrappers.continuous:POCKETTTS",
    "speechtokenizer": "mmtok.wrappers.speechtokenizer:FAMILY",
    "wavtokenizer": "mmtok.wrappers.wavtokenizer:FAMILY",
    "vqmodel": "mmtok.wrappers.diffusers_vq:FAMILY",
    "emu3": "mmtok.wrappers.chat_vq:EMU3",
    "chameleon": "mmtok.wrappers.chat_vq:CHAMELEON",
    "janus": "mmtok.wrappers.chat_vq:JANUS",
    "cosmos": "mmtok.wrappers.cosmos:FAMILY",
    "titok": "mmtok.image.released.titok:TITOK",
    "jpeg": "mmtok.wrappers.classical_images:JPEG",
    "webp": "mmtok.wrappers.classical_images:WEBP",
    "avif": "mmtok.wrappers.classical_images:AVIF",
    "jpeg2000": "mmtok.wrappers.classical_images:JPEG2000",
    "opus": "mmtok.wrappers.classical_audio:OPUS",
    "mp3": "mmtok.wrappers.classical_audio:MP3_FAMILY",
    "codec2": "mmtok.wrappers.classical_audio:CODEC2",
}
HUB_PREFIX = "hf:"
FILES = ("config.json", "model.safetensors")


def shipped_folder() -> Path:
    """The folder of the checkpoints that ship: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parent
    inside = package / "checkpoints"
    return inside if inside.is_dir() else package.parent / "checkpoints"


def available(pattern: str = "*") -> list[str]:
    """Names that `load` knows, e.g. ``available("audio*")``."""
    folder = shipped_folder()
    names = sorted(p.parent.name for p in folder.glob("*/config.json")) if folder.is_dir() else []
    return [n for n in names if fnmatch.fnmatch(n, pattern)]


def families(pattern: str = "*") -> dict[str, Family]:
    """Families of other people's tokenizers, which `load` takes as ``<family>:<source>``; no package is needed yet.

    Installed packages add their own by an entry point of the group ``mmtok.families``.
    """
    return {n: family(n) for n in sorted(_family_homes()) if fnmatch.fnmatch(n, pattern)}


def _family_homes() -> dict[str, str]:
    """Name of each family -> "module:Family"; mmtok's own names cannot be taken by a package."""
    return {e.name: e.value for e in importlib.metadata.entry_points(group="mmtok.families")} | FAMILIES


def family(name: str) -> Family:
    """One entry of `families`. Raises KeyError when there is none."""
    module, _, entry = _family_homes()[name].partition(":")
    return getattr(importlib.import_module(module), entry)


def card(name: str) -> dict[str, Any]:
    """What is known of a tokenizer, as plain values.

    * A shipped name or a checkpoint folder: spec, bits, size, taxonomy, model card; nothing is loaded. ``about`` is
      what the checkpoint says of its training; where it says nothing, the taxonomy is that of the published system.
    * ``<family>:<source>``: that tokenizer is loaded; spec, licences, package, the family's taxonomy, timing of sound.
    * A family: how to install it, what stands after the colon, licences, taxonomy of its published models.

    Raises:
        ValueError: unknown name. CheckpointError: damaged folder. ImportError: the family's package is not installed.
    """
    prefix, colon, _ = str(name).partition(":")
    if prefix in _family_homes() and (colon or not Path(name).is_dir()):
        return _source_card(name, family(prefix)) if colon else family_card(family(prefix))
    folder = _folder(name)
    config = _read_config(folder)
    spec = TokenSpec.from_dict(config["spec"])
    readme = folder / "README.md"
    weights = folder / "model.safetensors"
    return {
        "name": spec.name,
        "type": config["type"],
        **_spec_facts(spec),
        "config": config["config"],
        "about": config["about"],
        "taxonomy": _taxonomy_cells(folder, config, spec),
        "folder": str(folder),
        "checkpoint_bytes": weights.stat().st_size if weights.is_file() else None,
        "readme": readme.read_text() if readme.is_file() else "",
    }


def family_card(entry: Family) -> dict[str, Any]:
    """The card of a family of other people's tokenizers; its package is looked for, not imported."""
    return {
        "name": entry.name,
        "family": True,
        "title": entry.title,
        "modality": entry.modality,
        "source": entry.source,
        "example": entry.example,
        "package": entry.package,
        "installed": installed_version(entry.package),
        "install": entry.install,
        "licences": {"code": entry.code_licence, "weights": entry.weights_licence},
        "taxonomy": entry.taxonomy.cells(),
    }


def installed_version(package: str) -> str | None:
    """The version of a distribution, module or program; ``yes`` where it is there without one, None where it is not.

    Nothing is imported.
    """
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        module = package.partition(".")[0]
        if not module.isidentifier() or importlib.util.find_spec(module) is None:
            return "yes" if shutil.which(package) else None
        names = importlib.metadata.packages_distributions().get(module)
        return importlib.metadata.version(names[0]) if names else "yes"


def _source_card(name: str, entry: Family) -> dict[str, Any]:
    tokenizer: Any = load(name)
    known = family_card(entry)
    facts = {
        "name": name,
        "type": tokenizer.type_name,
        "of_family": entry.name,
        **_spec_facts(tokenizer.spec),
        "config": tokenizer.config,
        "package": entry.package,
        "installed": known["installed"],
        "licences": tokenizer.licences or known["licences"],  # a folder's model card overrules the family
        "taxonomy": known["taxonomy"],
    }
    return facts | ({"timing": tokenizer.timing()} if entry.modality == "audio" else {})


def _spec_facts(spec: TokenSpec) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "modality": spec.modality,
        "codebook_sizes": list(spec.codebook_sizes),
        "num_codebooks": spec.num_codebooks,
        "bits_per_position": spec.bits_per_position,
        "conditions": list(spec.conditions),
        "fingerprint": spec.fingerprint,
    }
    if spec.num_tokens is None:
        return facts | {"frame_rate": spec.frame_rate, "bitrate_bps": spec.bitrate_bps}
    bits = spec.bits_per_position * spec.num_tokens
    return facts | {"num_tokens": spec.num_tokens, "bits_per_image": bits, "bytes_per_image": bits / 8}


def _taxonomy_cells(folder: Path, config: dict[str, Any], spec: TokenSpec) -> dict[str, str] | None:
    """The columns of a checkpoint; None for a type that is not known or says nothing."""
    module, _, class_name = TOKENIZERS.get(config["type"], "").partition(":")
    if not module:
        return None
    try:
        found = getattr(importlib.import_module(module), class_name).taxonomy(config["config"], spec)
        return None if found is None else dataclasses.replace(found, **config["about"]).cells()
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"{folder}/config.json: config or about do not fit {class_name} ({e!r}); restore the file"
        ) from e


def load(name: str | Path, device: str | torch.device = "cpu") -> Tokenizer:
    """Load a tokenizer, ready for encode and decode.

    Args:
        name: a shipped name (`available`), a checkpoint folder, ``hf:org/repo`` on the Hugging Face hub (the local
            cache is used when the hub cannot be reached), or ``<family>:<source>`` for another package's tokenizer
            (`families`), e.g. ``encodec:facebook/encodec_24khz``, ``dac:/models/dac_44khz`` or ``jpeg:50``.
        device: where the weights go.

    Raises:
        ValueError: unknown name or type. CheckpointError: a file is missing, damaged, or was changed.
        ImportError: the package of a family is not installed.
    """
    prefix, colon, source = str(name).partition(":")
    if colon and prefix in _family_homes():
        return family(prefix).open(source).to(device).eval()
    folder = _folder(name)
    config = _read_config(folder)
    if config["type"] not in TOKENIZERS:
        raise ValueError(f"{folder}: unknown type {config['type']!r}; expected one of {sorted(TOKENIZERS)}")
    module, _, class_name = TOKENIZERS[config["type"]].partition(":")
    cls = getattr(importlib.import_module(module), class_name)
    weights = _read_weights(folder)
    spec = TokenSpec.from_dict(config["spec"])
    found = fingerprint_of(config["type"], config["config"], weights)
    if found != spec.fingerprint:  # before anything is built from a config that was changed
        raise CheckpointError(
            f"{folder}: expected fingerprint {spec.fingerprint}, got {found}: weights or config were changed after "
            "they were saved; restore the files, or save the tokenizer again with tokenizer.save(folder)"
        )
    try:
        tokenizer: Tokenizer = cls(**config["config"])
        missing, unexpected = tokenizer.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}, strict=False
        )
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as e:  # another version of the class wrote it
        reason = " ".join(str(e).split())[:300]  # torch lists every tensor on a line of its own
        raise CheckpointError(
            f"{folder}: config or weights do not fit {class_name}: {reason}; restore the files"
        ) from e
    external = tokenizer.external_prefixes()
    absent = [k for k in missing if not k.endswith(TRAINING_STATE) and not k.startswith(external)]
    if absent or unexpected:
        raise CheckpointError(f"{folder}: missing weights {absent[:3]}, unexpected {unexpected[:3]}; restore the files")
    revive_training_state(tokenizer, missing)
    tokenizer.name = spec.name
    tokenizer.about = config["about"]
    return tokenizer.to(device).eval()


@torch.no_grad()
def revive_training_state(tokenizer: Tokenizer, missing: Sequence[str]) -> None:
    """Make codebooks trainable again whose statistics (``missing`` keys) a checkpoint does not carry."""
    for name, book in tokenizer.named_modules():
        if isinstance(book, Codebook) and f"{name}.cluster_size" in missing:
            book.count_each_once()


def _folder(name: str | Path) -> Path:
    text = str(name)
    if text.startswith(HUB_PREFIX):
        return hub_folder(text.removeprefix(HUB_PREFIX), [*FILES, "README.md"], HUB_PREFIX)
    if text in available():
        return shipped_folder() / text
    if Path(text).is_dir():
        return Path(text)
    near = difflib.get_close_matches(text, available(), n=1, cutoff=0.5)
    prefix, colon, source = text.partition(":")
    close = difflib.get_close_matches(prefix.lower(), _family_homes(), n=1, cutoff=0.7) if colon else []
    near = [f"{close[0]}:{source}"] if close else near
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"unknown tokenizer {text!r}: {hint}expected one of {available()}, a checkpoint folder, hf:org/repo, or a "
        f"family and its source, such as encodec:FOLDER ({', '.join(sorted(_family_homes()))})"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    for file in FILES:
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} is no checkpoint: {file} is missing; expected {' and '.join(FILES)}")
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["format"] != CHECKPOINT_FORMAT:
            raise CheckpointError(f"{folder}: expected format {CHECKPOINT_FORMAT!r}, got {config['format']!r}")
        if not isinstance(config["type"], str) or not isinstance(config["config"], dict):
            raise TypeError("expected type to be a string and config an object")
        TokenSpec.from_dict(config["spec"])
        about = config.get("about", {})
        if not isinstance(about, dict):
            raise TypeError("expected about to be an object")
        return {k: config[k] for k in ("format", "type", "config", "spec")} | {"about": about}
    except CheckpointError:
        raise
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{folder}/config.json is damaged ({e!r}); restore the file") from e


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return unpacked(load_file(folder / "model.safetensors"))
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{folder}/model.safetensors is damaged ({e}); restore the file") from e
