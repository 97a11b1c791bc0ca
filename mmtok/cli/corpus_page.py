"""The page of `mmtok corpus sample`: items decoded, their originals where there are any, their codes."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmtok.bench import report
from mmtok.cli.files import describe
from mmtok.corpus.index import Corpus
from mmtok.corpus.sample_page import Shown


@dataclasses.dataclass(frozen=True)
class PictureSection:
    """One picture (C, H, W) float in [0, 1], C = 1, 3 or 4, that has no original to stand beside."""

    title: str
    picture: np.ndarray
    note: str = ""


def _picture(section: PictureSection, number: int) -> str:
    array = report.pixels(section.picture)
    height, width = array.shape[:2]
    source = "data:image/png;base64," + base64.b64encode(report.png(array)).decode("ascii")
    caption = f"decoded, {width} x {height} px"
    style = "max-width:100%;height:auto"
    return f'<figure><img alt="{caption}" style="{style}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def write_page(path: Path, corpus: Corpus, shown: Sequence[Shown], seed: int) -> None:
    """Write the page, aside and renamed."""
    totals = corpus.about["totals"]
    rows = [
        ("corpus", str(corpus.out)),
        ("tokenizer", f"{corpus.about['tokenizer']}, fingerprint {corpus.about['fingerprint']}"),
        ("items", f"{len(shown)} of {len(corpus):,}, drawn with the seed {seed}"),
        ("an item", f"{totals['bits'] / len(corpus):,.1f} bits of codes on average"),
    ]
    sections: list[Any] = [report.TableSection("What is shown", rows)]
    for item in shown:
        sections += sections_of(item)
    renderers: Any = report.RENDERERS
    renderers.setdefault(PictureSection, _picture)
    report.write_report(path, f"{len(shown)} items of {corpus.out.resolve().name}", sections)


def sections_of(item: Shown) -> list[Any]:
    """Picture or players, what is known of the item, and its codes."""
    row, decoded = item.row, item.decoded.numpy()
    original = None if item.original is None else item.original.numpy()
    title, note = row.key, "" if original is not None else f"No original: {item.why}."
    sections: list[Any] = []
    if item.sample_rate is not None and decoded.shape[1]:
        sounds = [*([] if original is None else [("original", original)]), ("decoded", decoded)]
        sections.append(report.SoundsSection(title, sounds, item.sample_rate, note))
    elif item.sample_rate is None and original is not None:
        sections.append(report.ImageSection(title, original, decoded, note))
    elif item.sample_rate is None:
        sections.append(PictureSection(title, decoded, note))
    facts = [("item", str(item.number)), ("tokens", describe(row.tokens))]
    facts += [("text", row.text)] if row.text else []
    facts += [(str(key), value if isinstance(value, str) else json.dumps(value)) for key, value in row.extra.items()]
    sections.append(report.TableSection(f"{title}: what came with it", facts))
    codes = row.tokens.codes[0, :, : int(row.tokens.lengths[0])].numpy()
    if codes.shape[1]:
        sections.append(report.CodesSection(f"{title}: codes", codes, row.tokens.spec.codebook_sizes))
    return sections
