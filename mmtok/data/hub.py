"""Folders of the Hugging Face hub: a local folder is taken as it is, a repository from the cache or the network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mmtok.catalogue import Family

CARD_LICENCE = re.compile(r"^licen[sc]e:\s*(\S.*)$", re.MULTILINE)
CARD_LICENCE_NAME = re.compile(r"^license_name:\s*(\S.*)$", re.MULTILINE)


def hub_folder(repo: str, files: Sequence[str], prefix: str = "") -> Path:
    """The snapshot folder of a hub repository; its cached copy when there is no network.

    Args:
        repo: ``org/repo``.
        files: patterns of what is needed, e.g. ``("config.json", "*.safetensors")``.
        prefix: what the user wrote before the name, for the errors.

    Raises:
        ValueError: no such name, or neither cached nor reachable.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=list(files)))
    except HFValidationError as e:
        raise ValueError(f"{prefix}{repo}: expected {prefix}org/repo ({e})") from e
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        raise ValueError(
            f"{prefix}{repo} is neither in the local cache nor reachable ({type(e).__name__}); check the name and the "
            "network, or download the folder and load it by its path"
        ) from e


def folder_of(source: str, files: Sequence[str]) -> Path:
    """A local folder as it is, else the hub repository of that name, see `hub_folder`.

    Raises:
        ValueError: neither; a source that looks like a path is never looked up on the hub.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{source} is a file; expected the folder that holds {', '.join(files)}")
    if not source or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError(f"no folder at {source!r}; expected a folder, or a hub repository org/repo")
    return hub_folder(source, [*files, "README.md"])


def source_name(folder: Path) -> str:
    """A folder's name; that of the repository for a snapshot in the hub's cache, which is named by its commit."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def weights_licence(family: Family | None, folder: Path) -> str:
    """The licence that the folder's model card states, else what is known of the family's published weights."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(errors="replace")
        found = CARD_LICENCE_NAME.search(text) or CARD_LICENCE.search(text)
        if found:
            return f"{found[1].strip()} (model card)"
    if family is None:
        return "not stated"
    return f"{family.weights_licence} (as published; the folder has no card that says so)"
