"""The benchmark's part `tokens`: what codes cost, how they use their codebooks, and what they survive.

Three jobs a set: the codes that the reconstruction part made are counted, some items are encoded again from their own
reconstructions, and some are encoded under circumstances that should change nothing. Codecs whose codes are the bytes
of a file have no codebook: what would be said of one is not run, with the reason.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mmtok.bench.contenders import Contender
from mmtok.bench.entropy_coding import ESTIMATOR, LevelBits, adaptive_bits, level_bits, mixture_bits
from mmtok.bench.generations import GENERATIONS, fidelity, generation_values
from mmtok.bench.laws import NOT_APPLICABLE, check
from mmtok.bench.parts import Context, Job
from mmtok.bench.records import Item, Result, TestSet
from mmtok.bench.scorers import Measure
from mmtok.bench.summary import summarise
from mmtok.metrics.codes import CodeStatistics, token_statistics
from mmtok.tokenizer import Tokenizer
from mmtok.tokens import Tokens
from mmtok.wrappers.bytes_tokenizer import BYTE, BytesTokenizer

PART = "tokens"
LAWS = ("padding", "batch size", "batch shape", "chunking", "dtype", "determinism")
LAW_SHARES = (1.0, 0.61, 0.37, 1.0)  # how much of each item: clips of several lengths share the batches
NO_CODEBOOK = "its codes are the bytes of a file, which has no codebook; a learned tokenizer has this figure"
CODERS = ("entropy_coded", "order0", "order1_previous", "order1_level")
ABOUT_CODERS = {
    "entropy_coded": "Bayesian mixture of the three below, each level with weights of its own",
    "order0": "adaptive, by how often each code of the level came",
    "order1_previous": "adaptive, behind the code before it of the same level",
    "order1_level": "adaptive, behind the code of the level before at the same position; the first level at order 0",
}


def jobs(contender: Contender, context: Context) -> list[Job]:
    """The jobs of one contender: of each set ``codes``, ``generations`` and ``laws``."""
    found = []
    for test_set in context.sets:
        for name, run in (("codes", code_results), ("generations", generation_results), ("laws", law_results)):
            key = f"{PART}/{name}/{test_set.name}/{contender.label}"
            found.append(Job(key, functools.partial(run, contender, test_set, context)))
    return found


def codes_are_bytes(tokenizer: Tokenizer) -> bool:
    """Whether the codes are the bytes of a file: classical codecs, and what chooses a setting of one."""
    if isinstance(tokenizer, BytesTokenizer):
        return True
    return tokenizer.spec.codebook_sizes == (BYTE,) and not any(True for _ in tokenizer.parameters())


@dataclasses.dataclass(frozen=True)
class _Stage:
    """What the results of one job share."""

    contender: Contender
    test_set: TestSet
    context: Context

    def protocol(self, **more: Any) -> dict[str, Any]:
        smoke = {"smoke": True} if self.context.smoke else {}
        whole = {"set": dict(self.test_set.protocol), "contender": self.contender.protocol()}
        return {**whole, "seed": self.context.seed, **smoke, **more}

    def result(self, metric: str, value: float, unit: str, direction: str, count: int, **more: Any) -> Result:
        names = (PART, self.contender.label, self.test_set.name, metric)
        return Result(*names, float(value), unit, direction, count=count, protocol=self.protocol(**more))

    def not_run(self, metric: str, unit: str, direction: str, why: str) -> Result:
        names = (PART, self.contender.label, self.test_set.name, metric)
        return Result(*names, None, unit, direction, not_run=why, protocol=self.protocol())

    def summary(self, rows: Sequence[dict[str, Any]], measures: Sequence[Measure], **more: Any) -> list[Result]:
        """Results of items with a 95 % bootstrap interval; each row has the ``values`` of an item, and ``unscored``."""
        label, name = self.contender.label, self.test_set.name
        lines = [{"contender": label, "set": name, "item": f"{i:06d}", "index": i} | row for i, row in enumerate(rows)]
        protocol, seed = self.protocol(**more), self.context.seed
        return summarise(lines, measures, contender=label, test_set=name, protocol=protocol, seed=seed, part=PART)


def spread(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of ``count`` places, evenly over all of them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, wanted))})


def code_results(contender: Contender, test_set: TestSet, context: Context) -> list[Result]:
    """Bits, lengths, and the use of codebooks, over the codes of all items."""
    stage = _Stage(contender, test_set, context)
    kept = context.codes(test_set)
    codes = [Tokens(t.codes, t.lengths, t.spec) for t in kept]  # side entries may differ from item to item
    levels = level_bits(codes)
    if len(kept) == len(test_set.items):
        amounts = [_amount(test_set.items[i]) for i in range(len(kept))]
    else:  # items were refused, so that places in the set say nothing
        amounts = [_amount_kept(t) for t in kept]
    found = _rates(stage, codes, amounts)
    found += _lengths(stage, codes, amounts)
    found += _entropy_coded(stage, codes, levels, sum(amounts))
    if codes_are_bytes(contender.tokenizer):
        return found + _no_codebook(stage)
    return found + _codebook_use(stage, token_statistics(Tokens.concat(codes), context.seed), codes)


def _amount(item: Item) -> float:
    """Seconds of a sound, pixels of a picture as it is given back."""
    if item.sample_rate is not None:
        return item.x.shape[-1] / item.sample_rate
    return float(item.reference.shape[-2] * item.reference.shape[-1])


def _amount_kept(tokens: Tokens) -> float:
    """The same of the item that ``tokens`` stand for, as they say."""
    side = {key: float(value[0]) for key, value in tokens.side.items() if value.shape == (1,)}
    missing = [
        k for k in (("height", "width") if "height" in side else ("num_samples", "sample_rate")) if k not in side
    ]
    if missing:
        raise ValueError(f"side: expected {missing} beside the codes, to price them by size, got {sorted(side)}")
    return side["height"] * side["width"] if "height" in side else side["num_samples"] / side["sample_rate"]


def _per(stage: _Stage, name: str = "") -> tuple[str, str]:
    """Name and unit of bits by time or by area."""
    audio = stage.contender.modality == "audio"
    prefix = f"{name}_" if name else ""
    return (f"{prefix}bitrate_bps", "bit/s") if audio else (f"{prefix}bpp", "bit/pixel")


def _rates(stage: _Stage, codes: Sequence[Tokens], amounts: Sequence[float]) -> list[Result]:
    """Nominal bits, tokens and positions, with intervals over items."""
    rate, unit = _per(stage)
    measures = [
        Measure("bits_per_item", "bit", "lower", "nominal bits: log2 K for each code"),
        Measure(rate, unit, "lower", "nominal bits over the set's seconds or pixels", "ratio"),
        Measure("tokens_per_item", "token", "lower", "codes of all levels, a repeated one once"),
        Measure("positions_per_item", "position", "lower", "places of the sequence, each with a code of every level"),
    ]
    if stage.contender.modality == "audio":
        measures += [
            Measure("tokens_per_second", "token/s", "lower", "codes of all levels a second", "ratio"),
            Measure("positions_per_second", "Hz", "lower", "positions a second", "ratio"),
        ]
    rows = []
    for item, amount in zip(codes, amounts, strict=True):
        bits, tokens, positions = float(item.bits[0]), float(_count(item)), float(item.lengths[0])
        values: dict[str, Any] = {"bits_per_item": bits, "tokens_per_item": tokens, "positions_per_item": positions}
        values |= {rate: (bits, amount), "tokens_per_second": (tokens, amount)}
        rows.append({"values": values | {"positions_per_second": (positions, amount)}})
    return stage.summary(rows, measures, coder="nominal")


def _count(item: Tokens) -> int:
    return sum(-(-int(item.lengths[0]) // stride) for stride in item.spec.level_strides)


def _lengths(stage: _Stage, codes: Sequence[Tokens], amounts: Sequence[float]) -> list[Result]:
    """The distribution of lengths, and what it costs to send them where the codes themselves do not end them."""
    lengths = [int(t.lengths[0]) for t in codes]
    found = [
        stage.result(f"positions_p{percent:02d}", np.percentile(lengths, percent), "position", "neither", len(lengths))
        for percent in (5, 95)
    ]
    longest = stage.contender.tokenizer.spec.num_tokens
    if longest is None or codes_are_bytes(stage.contender.tokenizer) or len(set(lengths)) == 1:
        return found  # a sound's length says it, a file has its own end, or all are alike
    bits = mixture_bits(adaptive_bits(lengths, longest, amounts))
    about = "the number of positions, by itself and behind the picture's area, mixed; not in the other bits"
    length_bits = stage.result(
        "length_bits_per_item", bits / len(lengths), "bit", "lower", len(lengths), coder=about, estimator=ESTIMATOR
    )
    return [*found, length_bits]


def _entropy_coded(stage: _Stage, codes: Sequence[Tokens], levels: Sequence[LevelBits], amount: float) -> list[Result]:
    samples = sum(level.samples for level in levels)
    nominal = sum(level.nominal for level in levels)
    found: list[Result] = []
    for coder in CODERS:
        metrics = [(f"{coder}_bits_per_item", "bit", len(codes)), (*_per(stage, coder), amount)]
        if coder == "order1_level" and len(levels) == 1:
            why = "it has one level, so there is none before it; order1_previous has a context"
            found += [stage.not_run(name, unit, "lower", why) for name, unit, _ in metrics]
            continue
        parts = [level.mixture if coder == "entropy_coded" else getattr(level, coder) for level in levels]
        bits = sum(level.order0 if p is None else p for p, level in zip(parts, levels, strict=True))
        about = {
            "coder": ABOUT_CODERS[coder],
            "estimator": ESTIMATOR,
            "order": "items in the set's order; what one taught is known to the next",
            "share_of_nominal": bits / nominal if nominal else 0.0,
        }
        found += [stage.result(name, bits / n, unit, "lower", samples, **about) for name, unit, n in metrics]
        found += [
            stage.result(f"{coder}_bits_per_code[{q}]", p / level.samples, "bit", "lower", level.samples, **about)
            for q, (p, level) in enumerate(zip(parts, levels, strict=True))
            if p is not None and level.samples
        ]
    return found


def _codebook_use(stage: _Stage, use: CodeStatistics, codes: Sequence[Tokens]) -> list[Result]:
    found: list[Result] = []
    sizes = codes[0].spec.codebook_sizes
    for q, size in enumerate(sizes):
        samples, share = int(use.samples[q]), float(use.usage[q])
        # n codes cannot show more than n entries: figures of different samples do not compare.
        about = {"samples": samples, "codebook_size": size, "most_possible": min(samples, size) / size}
        found += [
            stage.result(f"usage[{q}]", 100 * share, "%", "higher", samples, **about),
            stage.result(f"dead_share[{q}]", 100 * (1 - share), "%", "lower", samples, **about),
            stage.result(f"perplexity[{q}]", float(use.perplexity[q]), "codes", "higher", samples, **about),
            stage.result(f"entropy[{q}]", float(use.entropy_bits[q]), "bit", "higher", samples, **about),
        ]
    plug_in = float((use.entropy_bits * use.samples).sum())
    count, amount = int(use.samples.sum()), {"coder": "plug-in entropy of each level's codes: a floor, not a code"}
    found.append(stage.result("plug_in_bits_per_item", plug_in / len(codes), "bit", "lower", count, **amount))
    if len(sizes) == 1:
        why = "it has one level; redundancy is between two"
        return [*found, *(stage.not_run(f"{name}[0]", "bit", "lower", why) for name in SHARED)]
    for q, (bits, chance) in enumerate(zip(use.shared_bits.tolist(), use.shared_bits_chance.tolist(), strict=True)):
        n = int(use.samples[q : q + 2].min())
        about = {"levels": [q, q + 1], "estimator": "plug-in mutual information at the same position, one shuffle"}
        values = dict(zip(SHARED, (bits, chance, bits - chance), strict=True))
        found += [stage.result(f"{name}[{q}]", v, "bit", "lower", n, **about) for name, v in values.items()]
    return found


SHARED = ("shared_bits", "shared_bits_chance", "redundancy")


def _no_codebook(stage: _Stage) -> list[Result]:
    names = [("usage[0]", "%", "higher"), ("dead_share[0]", "%", "lower"), ("perplexity[0]", "codes", "higher")]
    names += [("entropy[0]", "bit", "higher"), *((f"{name}[0]", "bit", "lower") for name in SHARED)]
    return [stage.not_run(*name, NO_CODEBOOK) for name in names]


def generation_results(contender: Contender, test_set: TestSet, context: Context) -> list[Result]:
    """How far codes come back from their own reconstruction, and what five generations lose."""
    stage = _Stage(contender, test_set, context)
    measures = _generation_measures(contender)
    if contender.tokenizer.encode_only:
        why = "it only encodes: there is no reconstruction to encode again"
        return [stage.not_run(m.name, m.unit, m.direction, why) for m in measures]
    count = len(test_set.items)
    default = 2 if context.smoke else 16 if contender.modality == "image" else 8
    chosen = spread(count, int(context.options.get("generation_items", default)))
    rows = [_generations_of(contender, test_set.items[i], measures) for i in chosen]
    about = {"items": f"{len(rows)} of {count}, evenly spread", "generations": GENERATIONS}
    if not codes_are_bytes(contender.tokenizer):
        return stage.summary(rows, measures, **about)
    own = [m for m in measures if not m.name.startswith("idempotence")]
    none = [m for m in measures if m not in own]
    return [stage.not_run(m.name, m.unit, m.direction, NO_CODEBOOK) for m in none] + stage.summary(rows, own, **about)


def _generations_of(contender: Contender, item: Item, measures: Sequence[Measure]) -> dict[str, Any]:
    try:
        return generation_values(contender, item)
    except ValueError as e:  # an item, or its reconstruction, that the tokenizer refuses
        return {"values": {}, "unscored": dict.fromkeys([m.name for m in measures], " ".join(str(e).split()))}


def _generation_measures(contender: Contender) -> list[Measure]:
    levels = contender.num_codebooks or contender.tokenizer.spec.num_codebooks
    found = [Measure("idempotence", "%", "higher", "codes of the reconstruction that are those it came from", "ratio")]
    if levels > 1:
        found += [Measure(f"idempotence[{q}]", "%", "higher", "of one level", "ratio") for q in range(levels)]
    for name in fidelity(contender):
        for generation in range(2, GENERATIONS + 1):
            about = f"generation {generation} against the first reconstruction"
            found.append(Measure(f"generation{generation}_{name}", "dB", "higher", about))
        about = f"fidelity to the original: generation 1 minus generation {GENERATIONS}"
        found.append(Measure(f"generation_loss_{name}", "dB", "lower", about))
    if contender.modality == "audio":
        about = f"how late generation {GENERATIONS} is against the first, negative: early"
        found.append(Measure(f"generation{GENERATIONS}_delay", "samples", "neither", about, "median"))
    return found


class _AtRate:
    """A contender's tokenizer as the laws take it: what is not asked for is what the contender asks for."""

    def __init__(self, contender: Contender, text: str | None):
        object.__setattr__(self, "_kept", (contender, text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kept[0].tokenizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._kept[0].tokenizer, name, value)

    def encode(
        self,
        x: Any,
        sample_rate: int | None = None,
        text: Any = None,
        num_codebooks: int | None = None,
        num_tokens: int | None = None,
    ) -> Tokens:
        contender, caption = self._kept
        if contender.modality == "image":  # a stream does not know where a sound is cut
            num_tokens = num_tokens or contender.num_tokens
        num_codebooks = num_codebooks or contender.num_codebooks
        return contender.tokenizer.encode(x, sample_rate, text or caption, num_codebooks, num_tokens)

    def decode(self, tokens: Tokens, text: Any = None, size: Any = None, generator: Any = None) -> Any:
        contender, caption = self._kept
        return contender.tokenizer.decode(tokens, text or caption, size, generator)

    def streamer(self, num_codebooks: int | None = None) -> Any:
        contender: Any = self._kept[0]
        return contender.tokenizer.streamer(num_codebooks or contender.num_codebooks)


def law_results(contender: Contender, test_set: TestSet, context: Context) -> list[Result]:
    """Miss rates in percent: codes that change though nothing should change them, by `mmtok.bench.laws`."""
    stage = _Stage(contender, test_set, context)
    names = {law: f"{law.replace(' ', '_')}_miss_rate" for law in LAWS}
    count = len(test_set.items)
    if count < 3:
        why = f"batches need three items, the set {test_set.name} has {count}; take a larger set"
        return [stage.not_run(name, "%", "lower", why) for name in names.values()]
    items = [test_set.items[i] for i in spread(count, len(LAW_SHARES))]
    rates = {item.sample_rate for item in items}
    if len(rates) > 1:
        why = f"the items have rates {sorted(map(str, rates))}, a batch has one; take a set of one rate"
        return [stage.not_run(name, "%", "lower", why) for name in names.values()]
    seconds = float(context.options.get("law_seconds", 0.5 if context.smoke else 2.0))
    inputs = [_cut(item, share, seconds) for item, share in zip(items, LAW_SHARES, strict=False)]
    tokenizer: Any = _AtRate(contender, items[0].text if contender.with_text else None)
    own = [law for law in LAWS if not (law in ("chunking", "dtype") and codes_are_bytes(contender.tokenizer))]
    report = check(tokenizer, own, inputs, rates.pop(), seconds, seed=context.seed)
    about = {"backend": "mmtok.bench.laws", "items": f"{len(inputs)} of {count}, cut to {list(LAW_SHARES)}"}
    about |= {"seconds": seconds} if contender.modality == "audio" else {}
    about |= {"text": "the first item's for all"} if contender.with_text else {}
    found = []
    for law in LAWS:
        if law not in own:
            why = {"chunking": "its codes are the bytes of one file", "dtype": "no network computes them"}[law]
            found.append(stage.not_run(names[law], "%", "lower", why))
            continue
        row = report[law]
        if row.status == NOT_APPLICABLE or row.miss_rate is None:
            found.append(stage.not_run(names[law], "%", "lower", row.note or "the law does not apply"))
            continue
        more = about | ({"note": row.note} if row.note else {}) | ({"autocast": "bfloat16"} if law == "dtype" else {})
        found.append(stage.result(names[law], 100 * row.miss_rate, "%", "lower", row.compared, **more))
    return found


def _cut(item: Item, share: float, seconds: float) -> Tensor:
    """The beginning of a sound, or of a picture's lines and columns; clips of one set may all be of one size."""
    if item.sample_rate is not None:
        most = min(item.x.shape[-1], round(seconds * item.sample_rate))
        return item.x[:, : max(1, round(most * share))]
    height, width = item.x.shape[-2:]
    return item.x[:, : max(1, round(height * share)), : max(1, round(width * math.sqrt(share)))]
