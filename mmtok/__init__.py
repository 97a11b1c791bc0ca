"""Discrete tokenizers for images and sound behind one interface.

``load(name)`` gives a tokenizer; ``encode`` turns anything into `Tokens`, ``decode`` gives it back at its exact size;
`Vocab` packs tokens and text into the ids of a language model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Tokens": "mmtok.tokens",
    "TokenSpec": "mmtok.tokens",
    "TokensError": "mmtok.tokens",
    "Vocab": "mmtok.vocab",
    "Tokenizer": "mmtok.tokenizer",
    "CheckpointError": "mmtok.tokenizer",
    "load": "mmtok.auto",
    "available": "mmtok.auto",
    "card": "mmtok.auto",
    "families": "mmtok.auto",
    "check": "mmtok.bench.laws",
    "extend": "mmtok.lm.extend",
    "MultimodalProcessor": "mmtok.lm.processor",
}
__all__ = [
    "CheckpointError",
    "MultimodalProcessor",
    "TokenSpec",
    "Tokenizer",
    "Tokens",
    "TokensError",
    "Vocab",
    "available",
    "card",
    "check",
    "extend",
    "families",
    "load",
]

if TYPE_CHECKING:
    from mmtok.auto import available, card, families, load
    from mmtok.bench.laws import check
    from mmtok.lm.extend import extend
    from mmtok.lm.processor import MultimodalProcessor
    from mmtok.tokenizer import CheckpointError, Tokenizer
    from mmtok.tokens import Tokens, TokensError, TokenSpec
    from mmtok.vocab import Vocab


def __getattr__(name: str) -> Any:
    """Public names are imported at their first use, so that ``import mmtok`` costs nothing."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mmtok' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
