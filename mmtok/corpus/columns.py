"""The columns of a table: which holds the pictures or sounds, which the text, and the samples of its rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmtok.corpus.beside import TEXT_FIELDS, media_of_bytes, plain
from mmtok.corpus.records import Failure, PlanSettings, Sample

READ_ERRORS = (OSError, ValueError, LookupError, RuntimeError, TypeError, NotImplementedError, MemoryError)


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as t

    return t.is_binary(kind) or t.is_large_binary(kind) or t.is_binary_view(kind)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as t

    return t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind)


def holds_bytes(kind: Any) -> bool:
    """Whether a column can be a picture or sound: binary, or the Hugging Face struct {bytes, path}."""
    import pyarrow.types as t

    return _is_bytes(kind) or (
        t.is_struct(kind)
        and any(f.name == "bytes" and _is_bytes(f.type) for f in (kind.field(i) for i in range(kind.num_fields)))
    )


def _is_plain(kind: Any) -> bool:
    """Whether a column can be kept beside the codes as JSON: no binary in it, at any depth."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _is_plain(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    below = [kind.field(i).type for i in range(kind.num_fields)]
    fixed = pa.types.is_fixed_size_binary(kind)
    return not _is_bytes(kind) and not fixed and all(_is_plain(k) for k in below)


def choose_columns(
    schema: Any, settings: PlanSettings, first: Callable[[str], bytes | None], where: str
) -> tuple[PlanSettings, dict[str, Any]]:
    """``settings`` with modality and columns filled in from an Arrow schema, and what is told of the choice.

    ``first``: the first bytes that a column holds, which decide where several columns could be meant.
    Raises ValueError that lists the columns where a named one is missing or none, or several, can be meant.
    """
    has = ", ".join(f"{f.name} ({f.type})" for f in schema)
    fields = {f.name: f.type for f in schema}
    options = ("key_column", "text_column", "bytes_column")
    for option, name in ((o, getattr(settings, o)) for o in options):
        if name and name not in fields:
            raise ValueError(f"{option}: {where} has no column {name!r}; it has {has}")
    if settings.bytes_column and not holds_bytes(fields[settings.bytes_column]):
        raise ValueError(f"bytes_column: expected bytes or a struct with bytes, {settings.bytes_column!r}: {has}")
    if settings.text_column and not _is_text(fields[settings.text_column]):
        raise ValueError(f"text_column: expected a column of strings, {settings.text_column!r} is none: {has}")
    can = [settings.bytes_column] if settings.bytes_column else [n for n, k in fields.items() if holds_bytes(k)]
    if not can:
        raise ValueError(
            f"{where}: expected a column of bytes, or a struct with bytes, of pictures or sounds; got {has}"
        )
    kinds = {name: media_of_bytes(first(name)) for name in can}
    modality = settings.modality
    if modality is None:
        there = {k for k in kinds.values() if k}
        if len(there) != 1:
            what = (
                "pictures and sounds" if there else f"nothing that is known as a picture or sound in {', '.join(can)}"
            )
            raise ValueError(f"{where} begins with {what}: choose the modality, image or audio, or bytes_column")
        modality = there.pop()
    fit = [n for n in can if kinds[n] == modality] or [n for n in can if kinds[n] is None]
    if not fit:
        raise ValueError(f"{where}: expected {modality} in a column, but {', '.join(can)} begins with another modality")
    if len(fit) > 1 and modality in fit:
        fit = [modality]
    if len(fit) > 1:
        raise ValueError(f"{where}: {', '.join(fit)} may all be meant; choose one with bytes_column")
    text = settings.text_column
    if text is None:
        text = next((n for n in TEXT_FIELDS if n in fields and _is_text(fields[n])), "")
    chosen = dataclasses.replace(settings, modality=modality, bytes_column=fit[0], text_column=text)
    guessed = [o for o in options if getattr(settings, o) is None and getattr(chosen, o)]
    extra = extra_columns(schema, chosen)
    used = {fit[0], text, settings.key_column}
    dropped = [n for n in fields if n not in used and n not in extra]
    return chosen, {"guessed": guessed, "extra": extra, "left_out": {f"column {n} (bytes)": 1 for n in dropped}}


def extra_columns(schema: Any, settings: PlanSettings) -> list[str]:
    """Columns that are kept beside the codes."""
    used = (settings.bytes_column, settings.text_column, settings.key_column)
    return [f.name for f in schema if f.name not in used and _is_plain(f.type)]


def used_columns(schema: Any, settings: PlanSettings) -> list[str]:
    """Columns that are read."""
    named = [n for n in (settings.bytes_column, settings.text_column, settings.key_column) if n]
    return [*dict.fromkeys(named), *extra_columns(schema, settings)]


def _bytes_of(cell: Any) -> bytes | None:
    return cell.get("bytes") if isinstance(cell, Mapping) else cell


def first_bytes(rows: Any, column: str) -> bytes | None:
    """Of the rows of an Arrow table or batch."""
    cells = rows.column(column).to_pylist() if rows is not None else []
    return next((data for cell in cells if (data := _bytes_of(cell))), None)


def _sample(row: Mapping[str, Any], key: str, settings: PlanSettings, number: int) -> Sample | Failure:
    """One row; ``key`` is what it has without a key column."""
    column = settings.bytes_column or ""
    if settings.key_column:
        if row[settings.key_column] in (None, ""):
            return Failure(key, f"no key: the column {settings.key_column} is empty there", number)
        key = str(row[settings.key_column])
    cell = row[column]
    data = _bytes_of(cell)
    path = cell.get("path") if isinstance(cell, Mapping) else None
    if not data:
        named = f" (its path is {path!r}; only bytes within the table are read)" if path else ""
        return Failure(key, f"{'null' if data is None else '0 bytes'} in the column {column}{named}", number)
    known = (column, settings.text_column, settings.key_column)
    extra = {name: plain(value) for name, value in row.items() if name not in known}
    if isinstance(path, str):
        extra.setdefault("path", path)
    return Sample(key, data=data, text=row[settings.text_column] if settings.text_column else None, extra=extra)


def samples_of(rows: Any, name: str, first: int, settings: PlanSettings, number: int) -> Iterator[Sample | Failure]:
    """All rows of an Arrow table or batch, the first of which is number ``first`` of the file or split ``name``."""
    for i in range(rows.num_rows):
        key = f"{name}#{first + i}"
        try:  # one by one: text that is no UTF-8 spoils its own row only
            row = rows.slice(i, 1).to_pylist()[0]
            item = _sample(row, key, settings, number)
        except READ_ERRORS as e:
            item = Failure(key, f"the row cannot be read: {short(e)}", number)
        yield item


def short(e: BaseException) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())[:300]
