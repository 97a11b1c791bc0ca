"""`check`: the laws that every tokenizer should obey, measured as miss rates on real sound and pictures.

A miss rate is the share of what was compared that differs: codes for most laws, cases (sizes, inputs, refusals) for
the rest. A law that is kept has the miss rate 0; some figures are reported without a verdict, because no tokenizer can
promise them (another dtype, encoding a reconstruction again).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from mmtok.bench.law_measures import MEASURES, Finding
from mmtok.bench.law_probes import Subject
from mmtok.tokenizer import Tokenizer

OK, BROKEN, REPORTED, NOT_APPLICABLE = "ok", "broken", "reported", "not applicable"
ONLY_REPORTED = ("dtype", "device", "idempotence", "naive cut")

DECODING = ("idempotence", "exact size", "delay", "foreign ids")

ABOUT = {
    "variety": "codes differ between inputs: where they do not, the other laws say nothing",
    "padding": "an item has the codes that it has alone, whatever else is in its batch",
    "batch size": "n items of one shape have the codes of n single ones",
    "batch shape": "an item keeps its codes at any place in batches of other sizes",
    "chunking": "sound in pieces (streamed, or in the tokenizer's own pieces) has the codes and samples of the whole",
    "naive cut": "sound cut in two and encoded apart, as one would without knowing the receptive field",
    "levels": "encode without a rate gives every level of the spec, not a hidden default",
    "prefix": "the first k levels, or tokens, of all are those of asking for k; every prefix decodes",
    "round trip": "codes survive a file and the ids of a language model, and decode to the same",
    "range": "every code lies in its level's range",
    "foreign ids": "ids of another tokenizer and ids out of range are refused",
    "determinism": "twice the same input gives the same codes, twice the same codes the same output",
    "input types": "integers, floats, arrays and tensors of the same values have the same codes",
    "dtype": "codes under bfloat16 autocast against float32",
    "device": "codes on CUDA against the CPU",
    "idempotence": "codes of the reconstruction against the codes it was decoded from",
    "exact size": "decode gives back the size, length and channels that went in",
    "odd sizes": "one pixel, one sample, one more than a frame: encoded and decoded at their size",
    "extreme inputs": "silence, full scale, flat colours give finite output; NaN, infinity and nothing are refused",
    "delay": "the reconstruction is not late or early",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One law: ``miss_rate`` over ``compared`` codes or cases, and the verdict ``status``.

    ``status`` is ``ok``, ``broken``, ``reported`` (a figure without a verdict) or ``not applicable`` (``note`` says
    why; ``miss_rate`` is None).
    """

    law: str
    status: str
    miss_rate: float | None
    compared: int
    note: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check` found: ``rows`` in the order of `ABOUT`; ``report["padding"]`` is one of them."""

    name: str
    fingerprint: str
    settings: dict[str, Any]
    rows: list[Row]

    @property
    def ok(self) -> bool:
        """Whether no law is broken."""
        return not any(row.status == BROKEN for row in self.rows)

    def __getitem__(self, law: str) -> Row:
        for row in self.rows:
            if row.law == law:
                return row
        raise KeyError(f"{law!r} was not measured; there are {[row.law for row in self.rows]}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ok": self.ok}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> str:
        """The rows as aligned text."""
        cells = [("law", "miss rate", "compared", "verdict", "note")]
        for row in self.rows:
            rate = "-" if row.miss_rate is None else f"{row.miss_rate:.2%}"
            cells.append((row.law, rate, str(row.compared), row.status, row.note))
        widths = [max(len(c[i]) for c in cells) for i in range(4)]
        lines = ["  ".join([*(f"{v:<{w}}" for v, w in zip(c, widths, strict=False)), c[4]]).rstrip() for c in cells]
        broken = [row.law for row in self.rows if row.status == BROKEN]
        verdict = "all laws hold" if self.ok else f"broken: {', '.join(broken)}"
        return "\n".join([*lines, f"{self.name}: {verdict}"])


def check(
    tokenizer: Tokenizer | str,
    only: Sequence[str] | None = None,
    items: Sequence[Any] | None = None,
    sample_rate: int | None = None,
    seconds: float = 1.0,
    tolerance: float = 0.0,
    seed: int = 0,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Report:
    """Measure the laws on a tokenizer.

    Args:
        tokenizer: a `Tokenizer`, or what `mmtok.load` takes.
        only: names of laws (keys of `ABOUT`); None = all.
        items: pictures or sounds to measure on, three at least; None = the photograph and the sentence that come with
            mmtok, cut to several sizes, and noise.
        sample_rate: Hz, for arrays of sound in ``items``.
        seconds: of the longest sound taken; sound in ``items`` is cut to it.
        tolerance: miss rate up to which a law counts as kept.
        seed: of noise and of the places of cuts.
        progress: wraps the loop over laws, e.g. ``tqdm``.

    Raises:
        ValueError: an unknown law or name, fewer than three items, items that are no pictures or sounds.
    """
    if isinstance(tokenizer, str):
        from mmtok.auto import load

        tokenizer = load(tokenizer)
    names = list(ABOUT) if only is None else list(only)
    if unknown := [n for n in names if n not in ABOUT]:
        raise ValueError(f"laws: expected names of {list(ABOUT)}, got {unknown}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: expected a miss rate of 0 up to 1, got {tolerance}")
    subject = Subject(tokenizer, items, sample_rate, seconds, seed)
    settings = {
        "seconds": seconds,
        "tolerance": tolerance,
        "seed": seed,
        "items": "built in" if items is None else len(items),
        "mitigated": getattr(tokenizer, "mitigated", True),
        "device": str(tokenizer.device),
        "torch": torch.__version__,
    }
    rows = [_judged(name, _measured(name, subject), tolerance) for name in progress(names)]
    name = tokenizer.name if settings["mitigated"] else f"{tokenizer.name} (raw)"
    return Report(name, tokenizer.fingerprint, settings, rows)


def _measured(name: str, subject: Subject) -> Finding:
    if subject.tokenizer.encode_only and name in DECODING:
        return Finding().skip("it only encodes")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(subject.seed)
        try:
            return MEASURES[name](subject)
        except (ValueError, RuntimeError, IndexError, TypeError, AssertionError, ImportError) as e:
            finding = Finding()  # the tokenizer failed on an ordinary input: the law is not kept
            finding.case(False, f"{type(e).__name__}: {' '.join(str(e).split())[:200]}")
            return finding


def _judged(name: str, finding: Finding, tolerance: float) -> Row:
    note = "; ".join(dict.fromkeys(finding.notes))
    if finding.compared == 0:
        return Row(name, NOT_APPLICABLE, None, 0, note)
    rate = finding.missed / finding.compared
    status = REPORTED if name in ONLY_REPORTED else OK if rate <= tolerance else BROKEN
    return Row(name, status, rate, finding.compared, note)
