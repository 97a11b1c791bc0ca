"""Where training files come from: a manifest that `recipes/fetch_data.py` wrote, or any folder of files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from mmtok.data.audio import AUDIO_SUFFIXES
from mmtok.data.images import IMAGE_SUFFIXES

MANIFESTS = {"image": "images.jsonl", "audio": "speech.jsonl"}
SUFFIXES = {"image": IMAGE_SUFFIXES, "audio": AUDIO_SUFFIXES}


@dataclasses.dataclass(frozen=True)
class Source:
    """One file with what is known about it."""

    path: Path
    split: str
    kind: str = ""
    text: str | None = None
    package: str = ""
    licence: str = ""
    speaker: str = ""
    language: str = ""


def find_sources(data: str | Path, modality: str, manifest: str | None = None) -> list[Source]:
    """All files of a modality under ``data``, sorted.

    With a manifest (``images.jsonl`` / ``speech.jsonl``) its rows; else every file with a fitting suffix, 5 % of them
    held out as ``val`` by the hash of the relative path, so that a file never changes sides. A ``manifest`` that is
    named (``music.jsonl``) must be there.

    Raises FileNotFoundError or ValueError when there is nothing to read.
    """
    data = Path(data)
    if not data.is_dir():
        raise FileNotFoundError(f"--data: no folder at {data}; run `python recipes/fetch_data.py --out {data}` first")
    listed = data / (manifest or MANIFESTS[modality])
    if manifest is not None and not listed.is_file():
        raise FileNotFoundError(f"no list of files at {listed}; `python recipes/fetch_data.py --out {data}` writes it")
    if listed.is_file():
        lines = enumerate(listed.read_text(encoding="utf-8").split("\n"), 1)  # splitlines would cut at U+2028 too
        found = [_source(data, line, f"{listed}, line {n}") for n, line in lines if line.strip()]
    else:
        files = sorted(p for p in data.rglob("*") if p.suffix.lower() in SUFFIXES[modality] and p.is_file())
        found = [Source(p, "val" if held_out(p.relative_to(data).as_posix()) else "train") for p in files]
    if not found:
        raise ValueError(f"--data: no {modality} files ({', '.join(SUFFIXES[modality])}) under {data}")
    return found


def _source(data: Path, line: str, where: str) -> Source:
    """One row of a manifest."""
    try:
        row = json.loads(line)
        keys = ("split", "kind", "text", "package", "licence", "speaker", "language")
        return Source(data / row["path"], **{k: row[k] for k in keys if row.get(k) is not None})
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{where}: expected a JSON object with path and split ({e!r}); fetch the data again") from e


def held_out(name: str, share: float = 0.05) -> bool:
    """True for about ``share`` of all names, always the same ones."""
    return int(hashlib.sha1(name.encode()).hexdigest()[:8], 16) / 2**32 < share
