"""Files as tokens: what classical codecs have in common behind the tokenizers' interface, bytes in place of codes."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from mmtok.catalogue import Family
from mmtok.tokenizer import Tokenizer, integers
from mmtok.tokens import Tokens

BYTE = 256  # K: a code is one byte
NO_WEIGHTS = "none: no weights"


class BytesTokenizer(Tokenizer):
    """A classical codec at one setting: codes (B, 1, T) are the bytes of a file or stream, K = 256.

    There is nothing to learn and nothing on a GPU: items are coded one by one, so that a batch cannot change them.
    What the bytes mean follows from the family and the setting alone, and with them from the fingerprint.

    Attributes:
        family: the entry of `mmtok list`.
        setting: the number after the colon.
        licences: of the ``code``; there are no ``weights``.
    """

    type_name = "wrapper:bytes"

    def __init__(self, family: Family, setting: int):
        super().__init__({"family": family.name, "setting": setting})
        self.family = family
        self.setting = setting
        self.name = f"{family.name}:{setting}"
        self.licences = {"code": family.code_licence, "weights": NO_WEIGHTS}

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Always refused: a name says everything."""
        del folder, dtype
        raise ValueError(f"{self.name} has no weights to save; load it anywhere by mmtok.load({self.name!r})")

    def tokens_of(self, files: Sequence[bytes], side: dict[str, list[int]], num_tokens: int | None) -> Tokens:
        """One item a file, with what decode needs beside it; with ``num_tokens`` only its beginning."""
        rows = [torch.frombuffer(bytearray(f), dtype=torch.uint8).to(torch.int64) for f in files]
        codes = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)[:, None]  # (B, 1, T)
        lengths = integers([len(f) for f in files])
        tokens = Tokens(codes, lengths, self.spec, {key: integers(values) for key, values in side.items()})
        return tokens if num_tokens is None else tokens.keep(num_tokens=num_tokens)

    def checked(self, tokens: Tokens, text: Any) -> Tokens:
        """``tokens`` on the CPU, if this tokenizer reads them and no text was given. Raises TokensError, ValueError."""
        self._check_conditions(text)
        tokens.check(self.spec)
        return tokens.to("cpu")


def file_of(item: Tokens) -> bytes:
    """The valid bytes of the only item."""
    return item.codes[0, 0].to(torch.uint8).numpy().tobytes()


def setting_of(family: Family, source: str, legal: Collection[int]) -> int:
    """The number after the colon. Raises ValueError naming the legal ones where it is missing or another."""
    text = source.strip()
    value = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None
    if value is None or value not in legal:
        raise ValueError(
            f"{family.name}: expected {family.source} after the colon, e.g. {family.example!r}, got {source!r}"
        )
    return value
