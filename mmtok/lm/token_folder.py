"""`TokenFolder`: stored Tokens and the texts that go with them, as documents of a language model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from mmtok.tokens import Tokens, TokensError
from mmtok.vocab import Vocab

SUFFIX = ".safetensors"
SLOT = re.compile(r"<(image|audio)>|\{([A-Za-z_]\w*)\}")
Record = Mapping[str, Any]


class TokenFolder(Dataset):
    """Documents from a folder of token files, as ``mmtok encode corpus/ -o folder/`` writes them.

        TokenFolder("tokens/", vocab, "{text}<image>")                       # a.safetensors with a.txt beside it
        TokenFolder("tokens/", vocab, "<audio>{text}", "speech.jsonl")       # one line a file, with "path" and "text"

    Args:
        folder: of the token files, one item each; searched with all folders in it.
        vocab: packs the segments.
        template: text as it stands, ``{field}`` of a record, and ``<image>`` / ``<audio>`` for its Tokens. Two
            templates (caption to picture and back) are two TokenFolders, joined by `torch.utils.data.ConcatDataset`.
        records: a ``.jsonl`` file or a list of dicts. A record names its token file by ``image`` or ``audio``, or by
            ``path``, relative to ``folder``; a name with another suffix (``a.png``) means the file that encode made of
            it. None: every token file is a record, whose ``text`` is the ``.txt`` of the same name, stripped.
        select: keeps the records for which it is true.
        change: by modality, what to do with Tokens before they are packed: ``{"audio": bpe.as_tokens}``.
        header: as in `Vocab.pack`; False = codes only.
        missing: what becomes of a record without its token file, text or field: ``refuse``, or ``skip`` (listed in
            ``skipped``).

    ``len``, ``[i]`` (a list of ids) and iteration are those of a list; files are read when an item is.
    """

    def __init__(
        self,
        folder: str | Path,
        vocab: Vocab,
        template: str,
        records: str | Path | Sequence[Record] | None = None,
        select: Callable[[Record], bool] | None = None,
        change: Mapping[str, Callable[[Tokens], Tokens]] | None = None,
        header: bool = True,
        missing: str = "refuse",
    ) -> None:
        self.folder, self.vocab, self.template, self.header = Path(folder), vocab, template, header
        self.change = dict(change or {})
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}; `mmtok encode corpus/ -o {folder}` writes one")
        if missing not in ("refuse", "skip"):
            raise ValueError(f"missing: expected 'refuse' or 'skip', got {missing!r}")
        self._slots = _parse(template)
        wanted = {modality for modality, field, _ in self._slots if modality}
        if not wanted or not wanted <= set(vocab.blocks):
            raise ValueError(
                f"template: expected at least one of {[f'<{m}>' for m in vocab.blocks]} (what the vocab has), got "
                f"{template!r}"
            )
        found = self._beside() if records is None else _read_records(records)
        self.records: list[Record] = []
        self.skipped: list[str] = []
        for n, record in enumerate(found):
            if select is not None and not select(record):
                continue
            problem = self._problem(record)
            if problem and missing == "refuse":
                raise ValueError(f"record {n}: {problem}; missing='skip' leaves such records out")
            if problem:
                self.skipped.append(f"record {n}: {problem}")
            else:
                self.records.append(record)

    def _beside(self) -> Iterator[Record]:
        """A record for every token file, with the text beside it where there is one."""
        for here, folders, names in os.walk(self.folder):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            for name in sorted(names):
                if name.startswith(".") or not name.endswith(SUFFIX):
                    continue
                path = Path(here, name)
                record = {"path": path.relative_to(self.folder).as_posix()}
                text = path.with_suffix(".txt")
                yield record | ({"text": text.read_text("utf-8").strip()} if text.is_file() else {})

    def _problem(self, record: Record) -> str | None:
        """Why a record gives no document, or None."""
        for modality, field, _ in self._slots:
            if field and not isinstance(record.get(field), (str, list)):
                return f"expected a text (or a list of ids) as {field!r}, got {record.get(field)!r} in {dict(record)}"
            if modality and self._file(record, modality) is None:
                return f"no token file for <{modality}> in {self.folder}, looked for {_name(record, modality)!r}"
        return None

    def _file(self, record: Record, modality: str) -> Path | None:
        name = _name(record, modality)
        if not isinstance(name, str):
            return None
        path = self.folder / name
        tried = [path] if path.suffix == SUFFIX else [path.with_name(path.name + SUFFIX), path.with_suffix(SUFFIX)]
        return next((p for p in tried if p.is_file()), None)

    def __len__(self) -> int:
        return len(self.records)

    def parts(self, i: int) -> list[str | Sequence[int] | Tokens]:
        """The segments of document ``i``, as `Vocab.pack` takes them."""
        record, out = self.records[i], []
        for modality, field, text in self._slots:
            out.append(self._tokens(record, modality) if modality else record[field] if field else text)
        return out

    def _tokens(self, record: Record, modality: str) -> Tokens:
        path = self._file(record, modality)
        if path is None:
            raise FileNotFoundError(f"the token file of {dict(record)} in {self.folder} is gone")
        tokens = Tokens.load(path)
        if tokens.spec.modality != modality or len(tokens) != 1:
            raise TokensError(
                f"{path}: expected one {modality} for <{modality}>, got {len(tokens)} of {tokens.spec.modality}; name "
                "the right file, and save tokens[i] for each item of a batch"
            )
        return self.change[modality](tokens) if modality in self.change else tokens

    def __getitem__(self, i: int) -> list[int]:
        """The ids of document ``i``. TokensError, naming the file, for Tokens that are not of the vocab."""
        try:
            return self.vocab.pack(self.parts(i), header=self.header)
        except TokensError as e:
            raise TokensError(f"document {i} ({dict(self.records[i])}): {e}") from e

    def __iter__(self) -> Iterator[list[int]]:
        return (self[i] for i in range(len(self)))


def _name(record: Record, modality: str) -> Any:
    return record.get(modality, record.get("path"))


def _parse(template: str) -> list[tuple[str, str, str]]:
    """(modality, field, text) for each part of a template, one of the three filled."""
    out, at = [], 0
    for found in SLOT.finditer(template):
        out += [("", "", template[at : found.start()])] if found.start() > at else []
        out.append((found[1] or "", found[2] or "", ""))
        at = found.end()
    return out + ([("", "", template[at:])] if at < len(template) else [])


def _read_records(records: str | Path | Sequence[Record]) -> Sequence[Record]:
    if not isinstance(records, (str, Path)):
        return records
    out = []
    for n, line in enumerate(Path(records).read_text("utf-8").split("\n")):
        if not line.strip():
            continue
        try:
            out.append(json.loads(line))
        except ValueError as e:
            raise ValueError(f"{records}, line {n + 1}: expected a JSON object, got {line[:60]!r}") from e
        if not isinstance(out[-1], dict):
            raise ValueError(f"{records}, line {n + 1}: expected a JSON object, got {line[:60]!r}")
    return out
