"""Items of a corpus drawn at random, decoded, with the originals beside them where the source is still there."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mmtok import auto
from mmtok.corpus.decode_ahead import picture_of, sound_of
from mmtok.corpus.index import Corpus
from mmtok.corpus.plan import load_plan
from mmtok.corpus.records import PLAN, Failure, Row, Sample
from mmtok.corpus.run import RUN
from mmtok.corpus.sources import read_samples
from mmtok.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Shown:
    """One item to look at or listen to.

    Args:
        number: in the corpus. row: codes, text and extra values.
        decoded: (C, H, W) in [0, 1] or (C, L) in [-1, 1]. sample_rate: of sound in Hz, None for pictures.
        original: of the shape of ``decoded``; None where there is none, and then ``why`` says why.
    """

    number: int
    row: Row
    decoded: Tensor
    sample_rate: int | None
    original: Tensor | None
    why: str = ""


def draw(items: int, count: int, seed: int) -> list[int]:
    """``count`` different numbers below ``items`` (all, if there are fewer), ascending; the same for the same seed.

    Raises:
        ValueError: ``count`` is below 1, or there is no item.
    """
    if count < 1:
        raise ValueError(f"items: expected at least 1 to show, got {count}")
    if items < 1:
        raise ValueError("the corpus holds no item to show: nothing is done yet, or all of it failed (failures.jsonl)")
    return sorted(random.Random(seed).sample(range(items), min(items, count)))


def tokenizer_of_corpus(corpus: Corpus, name: str | None = None, device: str = "cpu") -> Tokenizer:
    """The tokenizer that made a corpus.

    Args:
        corpus: finished or not.
        name: where it is, for one that is found by its folder; None: the name that the corpus carries.
        device: e.g. ``cpu``.

    Raises:
        ValueError: it cannot be found, or ``name`` is another one by its fingerprint.
    """
    about = corpus.about
    wanted = name or str(about["tokenizer"])
    try:
        found = auto.load(wanted, device=device)
    except (ValueError, OSError, ImportError) as e:
        if name is not None:
            raise
        raise ValueError(f"{corpus.out}: give its tokenizer {wanted!r} by --tokenizer DIR; by its name: {e}") from e
    if found.fingerprint != about["fingerprint"]:
        raise ValueError(
            f"{corpus.out} was made by {about['tokenizer']} with the fingerprint {about['fingerprint']}, but the "
            f"tokenizer {wanted!r} has {found.fingerprint}; give the one that made it by --tokenizer"
        )
    return found


def sample_items(corpus: Corpus, numbers: Sequence[int], tokenizer: Tokenizer, originals: bool = True) -> list[Shown]:
    """Decode items, and read what they were made of.

    Args:
        corpus: whose items. numbers: of them. tokenizer: that made them.
        originals: read the source; a tar is read from its front up to the item.

    Raises:
        ValueError: damaged codes, or another tokenizer's (TokensError).
    """
    sources = read_originals(corpus, numbers) if originals else dict.fromkeys(numbers, "not asked for")
    conditioned = _texts_were_given(corpus.out)
    shown = []
    for number in numbers:
        row = corpus[number]
        text = [row.text] if conditioned and row.text is not None else None
        decoded = tokenizer.decode(row.tokens.to(tokenizer.device), text=text)[0].cpu()
        rate = None
        if row.tokens.spec.modality == "audio":
            stored = row.tokens.side.get("sample_rate")
            rate = int(getattr(tokenizer, "sample_rate", 0) if stored is None else stored[0])
        source = sources[number]
        original, why = (None, source) if isinstance(source, str) else (source, "")
        if original is not None and rate is not None:  # of sound cut by num_tokens only the beginning is there
            original = original[:, : decoded.shape[1]]
        if original is not None and original.shape != decoded.shape:
            why = f"it has the shape {tuple(original.shape)} now: the source has changed since it was tokenized"
            original = None
        shown.append(Shown(number, row, decoded, rate, original, why))
    return shown


def _texts_were_given(out: Path) -> bool:
    """Whether the run gave texts to its tokenizer, so that decoding needs them too."""
    try:
        return bool(json.loads((out / RUN).read_bytes())["settings"]["text"])
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{out / RUN} is damaged ({e!r}); restore it") from e


def read_originals(corpus: Corpus, numbers: Sequence[int]) -> dict[int, Tensor | str]:
    """Number -> picture (C, H, W) or sound (C, L) of the source, or why there is none; no sample is an error."""
    try:
        plan = load_plan(corpus.out / PLAN)
    except (ValueError, OSError) as e:
        return dict.fromkeys(numbers, str(e))
    shards: dict[int, dict[str, int]] = {}
    for number in numbers:
        shards.setdefault(corpus.locate(number)[0], {})[corpus.key(number)] = number
    found: dict[int, Tensor | str] = {}
    for shard, wanted in shards.items():
        reason = f"it is not in {plan.root} any more"
        try:
            for sample in read_samples(plan, plan.shards[shard]):
                if (number := wanted.pop(sample.key, None)) is not None:
                    found[number] = _media(sample, plan.modality)
                if not wanted:
                    break
        except (ValueError, OSError, ImportError) as e:
            reason = str(e)
        found |= dict.fromkeys(wanted.values(), reason)
    return found


def _media(sample: Sample | Failure, modality: str) -> Tensor | str:
    if isinstance(sample, Failure):
        return sample.reason
    try:
        return picture_of(sample).pixels if modality == "image" else sound_of(sample).samples
    except (ValueError, OSError) as e:
        return str(e)
