"""The benchmark's part `language`: how well a small language model learns a tokenizer's codes, and what it then makes.

The third part of the survey (arXiv 2506.10274) with what is at hand: one causal transformer per tokenizer, trained from
nothing on the codes of the training split, the same updates on the same items for all. Bits are counted for a second of
sound or a picture, not for a token, so that tokenizers of other frame rates and codebooks compare; a model of a coarse
tokenizer has fewer bits to tell, so read them beside the reconstruction. Lengths are given, as nominal bits count none.

Options: ``heads`` (``flat``, ``delay``, several behind commas), ``steps``, ``width``, ``depth``, ``seeds`` (how many),
``clips``, ``pictures`` (to train on), ``samples``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmtok.bench.contenders import Contender
from mmtok.bench.language_data import (
    Couple,
    Material,
    Shape,
    UnfitError,
    picture_couples,
    plain_tokens,
    speaker_couples,
)
from mmtok.bench.language_model import HEADS, Corpus, frequency_bits, middle, summed
from mmtok.bench.language_rows import Rows
from mmtok.bench.language_samples import SAMPLES, picture_samples, sound_samples
from mmtok.bench.language_study import (
    PART,
    Study,
    TestCodes,
    Trained,
    material_of,
    shape_of,
    test_codes,
    train_models,
)
from mmtok.bench.parts import Context, Job
from mmtok.bench.records import Result, TestSet
from mmtok.bench.scorers import Measure

OPTIONS = ("heads", "steps", "width", "depth", "seeds", "clips", "pictures", "samples")
COUPLES, SPLICED_SECONDS = 32, 3.0
HALF_FROM = 1.0  # seconds: the shortest clip that is cut in halves
SPLICES = "held-out splices"
SPEAKERS = (
    ("lm_speaker_consistency", "of another speaker"),
    ("lm_splice_of_same_speaker", "of another clip of the speaker"),
)
PICTURES = ("lm_picture_consistency", "of another picture")

BITS_OF_SOUND = (
    Measure("lm_bits_per_second", "bit/s", "lower", "bits of the codes of a second of sound under the model", "ratio"),
    Measure("lm_share_of_nominal", "1", "lower", "those bits over the nominal ones", "ratio"),
    Measure("lm_order0_bits_per_second", "bit/s", "neither", "the same by the training frequencies alone", "ratio"),
    Measure("lm_nominal_bits_per_second", "bit/s", "neither", "nominal bits of the same codes", "ratio"),
    Measure("lm_second_half_bits_per_second", "bit/s", "lower", "of second halves, the first one given", "ratio"),
    Measure("lm_second_half_alone_bits_per_second", "bit/s", "neither", "of second halves, nothing given", "ratio"),
    Measure("lm_context_gain_bits_per_second", "bit/s", "higher", "what the first half saves in the second", "ratio"),
)
BITS_OF_PICTURES = (
    Measure("lm_bits_per_image", "bit", "lower", "bits of the codes of a picture under the model"),
    Measure("lm_share_of_nominal", "1", "lower", "those bits over the nominal ones", "ratio"),
    Measure("lm_order0_bits_per_image", "bit", "neither", "the same by the training frequencies alone"),
    Measure("lm_nominal_bits_per_image", "bit", "neither", "nominal bits of the same codes"),
)


def jobs(contender: Contender, context: Context) -> list[Job]:
    """One job for each head: by default ``delay`` for several levels of codes and ``flat`` for one.

    Raises:
        ValueError: an unknown option or head.
    """
    if unknown := sorted(set(context.options) - set(OPTIONS)):
        raise ValueError(f"{PART}: expected options of {OPTIONS}, got {unknown}")
    spec = contender.tokenizer.spec
    rows = Rows(spec.keep(contender.num_codebooks or spec.num_codebooks))
    default = "delay" if len(rows.sizes) > 1 else "flat"
    chosen = context.options.get("heads") or default
    heads = [h.strip() for h in chosen.split(",")] if isinstance(chosen, str) else list(chosen)
    if odd := [h for h in heads if h not in HEADS]:
        raise ValueError(f"{PART}: expected heads of {HEADS}, got {odd}")
    found = []
    for head in dict.fromkeys(heads):
        study = Study(contender, context, head, "" if head == default else f"[{head}]")
        found.append(Job(f"{PART}/{head}/{contender.label}", functools.partial(run_study, study)))
    return found


def run_study(study: Study) -> list[Result]:
    """All results of one contender and head: a model for each shape of items that the run's test sets have."""
    groups: dict[Shape, list[TestSet]] = {}
    for test_set in study.context.sets:
        groups.setdefault(shape_of(test_set), []).append(test_set)
    audio = study.contender.modality == "audio"
    measures = BITS_OF_SOUND if audio else BITS_OF_PICTURES
    found: list[Result] = []
    entries: list[dict[str, Any]] = []
    for number, (shape, sets) in enumerate(groups.items()):
        try:
            material = material_of(study)
            trained = train_models(study, shape, material)
        except UnfitError as e:
            others = [SAMPLES] if audio else [SAMPLES, *_consistency_measures(*PICTURES)]
            for test_set in sets:
                protocol = study.protocol(test_set.protocol, {})
                found += study.not_run([*measures, *others], test_set.name, str(e), protocol)
            if audio and number == 0:
                spliced = [m for names in SPEAKERS for m in _consistency_measures(*names)]
                found += study.not_run(spliced, SPLICES, str(e), study.protocol({}, {}))
            continue
        for test_set in sets:
            found += bits_results(trained, test_set, material)
            samples = (sound_samples if audio else picture_samples)(trained, test_set, entries)
            found += samples
            if not audio:
                found += picture_consistency(trained, test_set)
        if audio and number == 0:
            found += speaker_consistency(trained, material)
    return found


def bits_results(trained: Trained, test_set: TestSet, material: Material) -> list[Result]:
    """Bits a second or a picture; for sounds also what the first half saves in the second."""
    study, rows = trained.study, trained.rows
    audio = test_set.modality == "audio"
    measures = BITS_OF_SOUND if audio else BITS_OF_PICTURES
    protocol = study.protocol(test_set.protocol, trained.about)
    try:
        tested = test_codes(study, test_set, material, rows.group)
    except UnfitError as e:
        return study.not_run(measures, test_set.name, str(e), protocol)
    protocol |= {"tested_items": len(tested.tokens), "lengths": "given, not counted"}
    corpus = trained.corpus(tested.tokens)
    each = trained.step_bits(corpus)
    bits = torch.stack([summed(b) for b in each])  # (seeds, N)
    order0 = summed(frequency_bits(trained.train, corpus, rows.sizes))
    nominal = [float(t.bits[0]) for t in tested.tokens]
    if len(each) > 1:
        protocol["total_bits_by_seed"] = [round(float(b.sum()), 2) for b in bits]
    lines = []
    for n, key in enumerate(tested.keys):
        mine, base = float(bits[:, n].mean()), float(order0[n])
        if audio:
            s = tested.seconds[n]
            values = {"lm_bits_per_second": [mine, s], "lm_order0_bits_per_second": [base, s]}
            values |= {"lm_nominal_bits_per_second": [nominal[n], s]}
        else:
            values = {"lm_bits_per_image": mine, "lm_order0_bits_per_image": base}
            values |= {"lm_nominal_bits_per_image": nominal[n]}
        lines.append({"item": key, "values": {**values, "lm_share_of_nominal": [mine, nominal[n]]}, "unscored": {}})
    if audio:
        protocol["halves"] = f"clips of at least {HALF_FROM:g} s; delayed levels see the half they are late for"
        _add_halves(trained, tested, corpus, each, lines)
    return study.results(lines, measures, test_set.name, protocol)


def _add_halves(
    trained: Trained, tested: TestCodes, corpus: Corpus, each: Sequence[Tensor], lines: list[dict[str, Any]]
) -> None:
    """Bits of second halves, with and without the first, into the lines of clips that are long enough."""
    long = [n for n, s in enumerate(tested.seconds) if s >= HALF_FROM and int(corpus.lengths[n]) > 1]
    names = [m.name for m in BITS_OF_SOUND if "half" in m.name or "context" in m.name]
    for n in set(range(len(lines))) - set(long):
        lines[n]["unscored"] = dict.fromkeys(names, f"shorter than {HALF_FROM:g} s")
    if not long:
        return
    first = middle(corpus.lengths)
    behind = Corpus.of([corpus.codes[n, :, int(first[n]) : int(corpus.lengths[n])] for n in long])
    given = torch.stack([summed(b, first)[long] for b in each]).mean(0)
    alone = torch.stack([summed(b) for b in trained.step_bits(behind)]).mean(0)
    for place, n in enumerate(long):
        s = tested.seconds[n] * float(1 - first[n] / corpus.lengths[n])
        g, a = float(given[place]), float(alone[place])
        for name, value in zip(names, (g, a, a - g), strict=True):
            lines[n]["values"][name] = [value, s]


def speaker_consistency(trained: Trained, material: Material) -> list[Result]:
    """How often a real clip is likelier than one whose second half is another speaker's (SALMon, arXiv 2409.07437).

    Each of two clips is compared with its own first half behind which the other's second half stands: a model without
    memory is right once in every couple, so chance is exactly 50 %. The same with another clip of the same speaker
    says how much of it is the join and not the speaker.
    """
    study, smoke = trained.study, trained.study.context.smoke
    found: list[Result] = []
    for same, names in zip((False, True), SPEAKERS, strict=True):
        measures = _consistency_measures(*names)
        protocol = study.protocol({}, trained.about) | {
            "source": "clips of the validation split that the model did not see",
            "clips": f"{SPLICED_SECONDS / 2:g} to {SPLICED_SECONDS:g} s, RMS 0.05, 5 ms fade at the join",
            "compared": "mean bits of a step; the speakers of this data differ in language and room too",
        }
        try:
            if study.contender.with_text:
                raise UnfitError("a spliced clip has no transcript; leave #text out")
            seconds = 0.5 if smoke else SPLICED_SECONDS
            couples = speaker_couples(material.spare, trained.shape, seconds, COUPLES, same)
            found += _consistency(trained, couples, measures, SPLICES, protocol)
        except UnfitError as e:
            found += study.not_run(measures, SPLICES, str(e), protocol)
    return found


def picture_consistency(trained: Trained, test_set: TestSet) -> list[Result]:
    """How often a real picture is likelier than one whose lower half is another's; chance is exactly 50 %."""
    study = trained.study
    measures = _consistency_measures(*PICTURES)
    protocol = study.protocol(test_set.protocol, trained.about) | {"compared": "mean bits of a step"}
    try:
        if study.contender.with_text:
            raise UnfitError("a spliced picture has no caption; leave #text out")
        items = [test_set.items[i] for i in range(min(len(test_set.items), 2 * COUPLES))]
        couples = picture_couples(items, COUPLES)
    except UnfitError as e:
        return study.not_run(measures, test_set.name, str(e), protocol)
    return _consistency(trained, couples, measures, test_set.name, protocol)


def _consistency_measures(name: str, what: str) -> tuple[Measure, Measure]:
    about = f"real items likelier than the same with the second half {what}; chance 50"
    both = f"couples of real items likelier together than with second halves {what} exchanged; chance 50"
    return Measure(name, "%", "higher", about), Measure(f"{name}_of_couples", "%", "higher", both)


def _consistency(
    trained: Trained,
    couples: Sequence[Couple],
    measures: Sequence[Measure],
    test_set: str,
    protocol: Mapping[str, Any],
) -> list[Result]:
    encode = trained.study.contender.encode
    corpus = trained.corpus([plain_tokens(encode(item)) for couple in couples for item in couple.items])
    lengths = corpus.lengths.double().clamp(min=1)
    # A spliced item may have another number of codes; per step no length is likelier than another.
    bits = torch.stack([summed(b) / lengths for b in trained.step_bits(corpus)]).view(-1, len(couples), 4)
    single = (_wins(bits[..., 0], bits[..., 2]) + _wins(bits[..., 1], bits[..., 3])) / 2
    both = _wins(bits[..., 0] + bits[..., 1], bits[..., 2] + bits[..., 3])
    shares = [100 * x.mean(0) for x in (single, both)]  # means over seeds, (couples,)
    lines = [
        {
            "item": couple.items[2].key,
            "values": {m.name: float(share[n]) for m, share in zip(measures, shares, strict=True)},
        }
        for n, couple in enumerate(couples)
    ]
    return trained.study.results(lines, measures, test_set, {**protocol, "comparisons": 2 * len(couples)})


def _wins(real: Tensor, other: Tensor) -> Tensor:
    """1 where the real one has fewer bits, one half where both have the same."""
    return (real < other).double() + 0.5 * (real == other).double()
