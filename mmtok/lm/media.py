"""Pictures and sounds of any kind -> Tokens for the places of a text; and Tokens -> what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmtok.data.audio import Sound
from mmtok.data.images import Picture
from mmtok.tokenizer import Tokenizer
from mmtok.tokens import Tokens
from mmtok.vocab import Vocab


def tokens_for(
    given: Any, modality: str, counts: list[int], vocab: Vocab, tokenizer: Tokenizer | None, rate: int | None
) -> list[Tokens]:
    """Tokens of one item for each of ``sum(counts)`` places, in reading order; raw input is encoded together.

    Args:
        given: None, one thing, a list of things for all texts, or a list with one list (or None) a text. A thing is
            Tokens (several items count as so many things), or what ``tokenizer.encode`` takes for one item.
        modality: ``image`` or ``audio``.
        counts: places in each text.
        vocab: whose levels are asked of the tokenizer.
        tokenizer: None = Tokens only.
        rate: Hz of sounds that are arrays.

    Raises:
        ValueError: another number of things than places, raw input without a tokenizer, or input it refuses.
    """
    listed = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    nested = bool(listed) and all(g is None or isinstance(g, (list, tuple)) for g in listed)
    groups = [[y for x in g or () for y in _items(x)] for g in (listed if nested else [listed])]
    flat, found = [x for g in groups for x in g], [len(g) for g in groups]
    if found != (counts if nested else [sum(counts)]):
        wanted, got = (counts, found) if nested else (sum(counts), sum(found))
        raise ValueError(f"{modality}: expected one for each place <{modality}> of the text, {wanted}, got {got}")
    raw = [n for n, x in enumerate(flat) if not isinstance(x, Tokens)]
    if raw and tokenizer is None:
        raise ValueError(
            f"{modality}: expected Tokens, since this processor has no {modality} tokenizer, got "
            f"{type(flat[raw[0]]).__name__}; build it with {modality}=tok"
        )
    paths = [n for n in raw if isinstance(flat[n], (str, Path))]  # they know their own rate
    for part, known in ((paths, None), ([n for n in raw if n not in paths], rate)):
        if part and tokenizer is not None:
            encoded = _encode([flat[n] for n in part], modality, vocab, tokenizer, known)
            for n, tokens in zip(part, encoded, strict=True):
                flat[n] = tokens
    return flat


def _encode(items: list[Any], modality: str, vocab: Vocab, tokenizer: Tokenizer, rate: int | None) -> list[Tokens]:
    Q = vocab.blocks[modality].spec.num_codebooks
    levels = Q if tokenizer.spec.num_codebooks > Q else None
    tokens = tokenizer.encode(items, sample_rate=rate if modality == "audio" else None, num_codebooks=levels)
    if len(tokens) != len(items):
        raise ValueError(f"{modality}: expected single ones, got {len(items)} that hold {len(tokens)}; unstack them")
    return _items(tokens)


def _items(x: Any) -> list[Any]:
    """A batch of Tokens as its items; anything else as it is."""
    return [x[i] for i in range(len(x))] if isinstance(x, Tokens) else [x]


def shown(tokenizer: Tokenizer, tokens: Tokens) -> Picture | Sound:
    out = tokenizer.decode(tokens)[0]
    if tokens.spec.modality == "image":
        depth = tokens.side.get("bit_depth")
        return Picture(out, 16 if depth is not None and depth.tolist() == [16] else 8)
    rate: Any = getattr(tokenizer, "sample_rate", 0)
    return Sound(out, int(tokens.side["sample_rate"]) if "sample_rate" in tokens.side else rate)
