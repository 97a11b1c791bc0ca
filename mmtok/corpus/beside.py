"""What comes with a sample: texts, labels, other fields as plain JSON; and what its first bytes say it is."""

from __future__ import annotations

import base64
import datetime
import json
import math
from collections.abc import Mapping
from typing import Any

from mmtok.data.sources import SUFFIXES

TEXT_FIELDS = ("text", "caption", "transcript", "sentence")


def media_of(name: str) -> str | None:
    """``image`` or ``audio`` by a name's ending, None for all others."""
    ending = "." + name.rpartition(".")[2].lower() if "." in name else ""
    return next((modality for modality, endings in SUFFIXES.items() if ending in endings), None)


def plain(value: Any) -> Any:
    """``value`` as JSON takes it: dates as ISO text, NaN and infinity as null, unknown types as their text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def split_text(row: Mapping[str, Any], field: str | None) -> tuple[str | None, dict[str, Any]]:
    """The text of a row of JSON and all the rest; ``field`` as ``text_column`` of `PlanSettings`."""
    names = TEXT_FIELDS if field is None else (field,) if field else ()
    name = next((n for n in names if isinstance(row.get(n), str)), None)
    return None if name is None else row[name], {str(k): plain(v) for k, v in row.items() if k != name}


def text_and_extra(beside: Mapping[str, bytes], field: str | None) -> tuple[str | None, dict[str, Any]]:
    """Text and extra of the sidecars or members ``txt``, ``json`` and ``cls``; ``field`` as ``text_column``.

    Raises ValueError that names the one that cannot be read.
    """
    text, extra = None, {}
    if "json" in beside:
        try:
            value = json.loads(beside["json"])
        except (ValueError, RecursionError) as e:
            raise ValueError(f"its .json is no JSON ({e})") from e
        text, extra = split_text(value if isinstance(value, dict) else {"json": value}, field)
    if "cls" in beside:
        label = decoded(beside["cls"], "cls")
        extra["cls"] = int(label) if label.isdecimal() and label.isascii() else label
    if "txt" in beside and field is None:
        if text is not None:  # both have one: the .txt is the text, and the field stays where it was
            extra = {str(k): plain(v) for k, v in json.loads(beside["json"]).items()} | extra
        text = decoded(beside["txt"], "txt")
    return text, extra


def decoded(data: bytes, name: str) -> str:
    """UTF-8 text without the white space around it."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as e:
        raise ValueError(f"its .{name} is no UTF-8 text ({e})") from e


def media_of_bytes(data: bytes | None) -> str | None:
    """``image`` or ``audio`` by the first bytes of a file, None where they are of no format that is read here."""
    if not data:
        return None
    head = bytes(data[:12])
    if head[:4] == b"RIFF":
        return {b"WEBP": "image", b"WAVE": "audio"}.get(head[8:12])
    if head[4:8] == b"ftyp":
        return "image" if head[8:12] in (b"avif", b"avis", b"mif1", b"heic") else None
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P2", b"P3", b"P5", b"P6")):
        return "image"
    sound = (b"fLaC", b"OggS", b"ID3", b"FORM", b".snd", b"RF64")
    mp3 = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    return "audio" if mp3 or head.startswith(sound) else None
