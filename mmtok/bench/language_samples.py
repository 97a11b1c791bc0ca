"""What the benchmark's language models make up: drawn, decoded, judged beside real items and their reconstructions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmtok.bench.language_study import PART, Study, Trained, keys_of
from mmtok.bench.records import Item, Result, TestSet
from mmtok.bench.run_folder import file_name
from mmtok.bench.scorers import (
    SCORERS,
    Measure,
    NotRunError,
    Scorer,
    SetScorer,
    UnscoredError,
    Value,
    open_scorer,
)
from mmtok.data.audio import write_audio
from mmtok.data.images import write_image
from mmtok.tokens import Tokens, write_atomic

PROMPT, WHOLE = 1.0, 3.0  # seconds
SMOKE_PROMPT, SMOKE_WHOLE = 0.25, 0.75
COUNTS = {"audio": 24, "image": 64}
SAMPLES = Measure("lm_samples", "1", "higher", "stands for all measures of samples where there are none")
KEPT = {"audio": 3, "image": 8}  # for the report
JUDGES = ("dnsmos", "distillmos")
PICTURE_DISTANCE = "fd_efficientnet"
VERSIONS = {
    "original": "real items",
    "reconstructed": "real items, encoded and decoded",
    "continued": "the model's, behind the codes of the first second of real clips",
    "unprompted": "the model's, nothing given",
    "drawn": "the model's",
}


@dataclasses.dataclass(frozen=True)
class Version:
    """Items of one kind: ``x[n]`` of the n-th chosen item, or why there is none."""

    name: str
    x: Sequence[Tensor | UnscoredError]

    @property
    def usable(self) -> list[Tensor]:
        return [x for x in self.x if isinstance(x, Tensor)]


def sound_samples(trained: Trained, test_set: TestSet, entries: list[dict[str, Any]]) -> list[Result]:
    """2 s behind prompts of 1 s and 2 s without, their judges, distances to real clips, and the voice of the prompt.

    Every second of the clips that last 3 s is prompted with, the others are what is compared with. ``entries`` takes
    what is kept for the report.
    """
    study, smoke = trained.study, trained.study.context.smoke
    prompt, whole = (SMOKE_PROMPT, SMOKE_WHOLE) if smoke else (PROMPT, WHOLE)
    wanted = study.option("samples", COUNTS["audio"], 1)
    protocol = _protocol(trained, test_set) | {"prompt_seconds": prompt, "judged_seconds": whole - prompt}
    chosen, others, refused = _clips(trained, test_set, whole, wanted)
    if not chosen:
        reason = f"expected at least two clips of {whole:g} s that it encodes, got {refused}; test longer clips"
        return study.not_run([SAMPLES], test_set.name, reason, protocol)
    protocol |= {"samples": len(chosen), "compared_with": len(others)}
    templates = [study.contender.encode(item) for item in chosen]
    made = {
        "reconstructed": [_decoded(study, t, item) for t, item in zip(templates, chosen, strict=True)],
        "continued": _drawn(trained, chosen, templates, prompt / whole, 1),
        "unprompted": _drawn(trained, chosen, templates, 0.0, 2),
    }
    _keep_sounds(study, test_set, made, chosen, prompt, entries)
    versions = [Version("original", [_behind(item, item.x, prompt) for item in chosen])]
    for name, sounds in made.items():
        behind = [_behind(i, x, prompt) if isinstance(x, Tensor) else x for i, x in zip(chosen, sounds, strict=True)]
        versions.append(Version(name, behind))
    rates = [item.sample_rate for item in chosen]
    found: list[Result] = []
    for judge in JUDGES:  # not the originals: they are the same for every tokenizer, and judging is slow
        found += _judged(study, test_set, judge, versions[1:], chosen, protocol)
    found += _same_speaker(study, test_set, versions, chosen, prompt, protocol)
    reference = [_behind(item, item.x, prompt) for item in others]
    for name in (n for n in SCORERS if n.startswith("fad_")):
        found += _distances(study, test_set, name, versions, rates, reference, others[0].sample_rate, protocol)
    return found


def picture_samples(trained: Trained, test_set: TestSet, entries: list[dict[str, Any]]) -> list[Result]:
    """Frechet distances of drawn pictures to real ones and to their reconstructions, beside those of other real ones.

    Every second picture is the reference; the model draws as many as there are others, each with the size and the
    number of codes of one of them.
    """
    study = trained.study
    wanted = study.option("samples", COUNTS["image"], 4)
    protocol = _protocol(trained, test_set)
    usable, refused = _usable(study, [test_set.items[i] for i in range(min(len(test_set.items), 2 * wanted))])
    chosen, others = usable[0::2][: len(usable) // 2], usable[1::2]
    if study.context.smoke:
        chosen = others = usable  # a handful, and distances need four
    if not chosen:
        reason = f"expected at least two pictures that it encodes, got {refused}; test more pictures"
        return study.not_run([SAMPLES], test_set.name, reason, protocol)
    protocol |= {"samples": len(chosen), "compared_with": len(others)}
    items, templates = [i for i, _ in chosen], [t for _, t in chosen]
    drawn = Version("drawn", _drawn(trained, items, templates, 0.0, 1))
    versions = [
        Version("original", [i.reference for i in items]),
        Version("reconstructed", [_decoded(study, t, i) for i, t in chosen]),
        drawn,
    ]
    folder = study.samples_folder
    folder.mkdir(parents=True, exist_ok=True)
    for n, x in enumerate(drawn.usable[: KEPT["image"]]):
        path = folder / f"{file_name(test_set.name)}-drawn-{n}.png"
        write_image(path, x)
        entries.append(_entry(study, path.name, 0.0, f"drawn {n + 1}, {VERSIONS['drawn']}"))
    _write_index(study, entries)
    reference = [i.reference for i, _ in others]
    rates = [None] * len(items)
    found = _distances(study, test_set, PICTURE_DISTANCE, versions, rates, reference, None, protocol)
    again = [_decoded(study, t, i) for i, t in others]
    kept = [x for x in again if isinstance(x, Tensor)]
    about = protocol | {"compared_with": "reconstructions"}
    return found + _distances(study, test_set, PICTURE_DISTANCE, [drawn], rates, kept, None, about, "_to_reconstructed")


def _protocol(trained: Trained, test_set: TestSet) -> dict[str, Any]:
    about = {"drawn": "temperature 1, the whole distribution, lengths and side entries of real items, first seed"}
    return trained.study.protocol(test_set.protocol, {**trained.about, **about})


def _usable(study: Study, items: Sequence[Item]) -> tuple[list[tuple[Item, Tokens]], int]:
    """Items with their codes, and how many items of these there are."""
    found = []
    for item in items:
        try:
            found.append((item, study.contender.encode(item)))
        except ValueError:  # refused: the reconstruction part has counted it
            continue
    return found, len(found)


def _clips(trained: Trained, test_set: TestSet, whole: float, wanted: int) -> tuple[list[Item], list[Item], int]:
    """Beginnings of ``whole`` seconds of clips: to prompt with, to compare with, and how many there are."""
    found = []
    for i in range(len(keys_of(test_set))):
        item = test_set.items[i]
        length = round(whole * (item.sample_rate or 0))
        if item.x.shape[1] >= length:
            found.append(dataclasses.replace(item, x=item.x[:, :length], target=None))
        if len(found) == 2 * wanted:
            break
    if trained.study.context.smoke and len(found) == 1:
        return found, found, 1  # one clip ships
    half = len(found) // 2
    return found[0::2][:half], found[1::2], len(found)


def _drawn(
    trained: Trained, items: Sequence[Item], templates: Sequence[Tokens], share: float, salt: int
) -> list[Tensor | UnscoredError]:
    """What the first model makes behind the first ``share`` of the templates' steps, decoded with their sides."""
    study, model = trained.study, trained.models[0]
    rows = [trained.rows.split(t.codes[0, :, : int(t.lengths[0])].cpu()) for t in templates]
    found: list[Tensor | UnscoredError] = [UnscoredError("no codes")] * len(items)
    for S in sorted({r.shape[1] for r in rows}):  # one length at a time
        index = [n for n, r in enumerate(rows) if r.shape[1] == S]
        begun = torch.stack([rows[n][:, : round(share * S)] for n in index])
        codes = model.go_on(begun, S, study.context.seed * 1_000_003 + 10 * S + salt)
        for n, row in zip(index, codes, strict=True):
            t = templates[n]
            T = int(t.lengths[0])
            tokens = Tokens(trained.rows.join(row, T)[None], t.lengths.cpu(), t.spec, t.side)
            found[n] = _decoded(study, tokens.to(study.contender.tokenizer.device), items[n])
    return found


def _decoded(study: Study, tokens: Tokens, item: Item) -> Tensor | UnscoredError:
    try:
        return study.contender.decode(tokens, item)
    except (ValueError, RuntimeError) as e:  # bytes that are no file, say
        return UnscoredError(f"what was drawn does not decode: {' '.join(str(e).split())[:80]}")


def _behind(item: Item, x: Tensor, prompt: float) -> Tensor:
    return x[:, round(prompt * (item.sample_rate or 0)) :]


def _opened(study: Study, name: str) -> Scorer | SetScorer | str:
    try:
        return open_scorer(name, study.context.helpers)
    except NotRunError as e:
        return str(e)


def _judged(
    study: Study,
    test_set: TestSet,
    name: str,
    versions: Sequence[Version],
    items: Sequence[Item],
    protocol: Mapping[str, Any],
) -> list[Result]:
    """The absolute measures of a scorer of each version."""
    scorer = _opened(study, name)
    if not isinstance(scorer, Scorer):
        measures = [Measure(f"lm_{v.name}_{name}", "MOS", "higher", VERSIONS[v.name]) for v in versions]
        return study.not_run(measures, test_set.name, str(scorer), protocol)
    kept = [m for m in scorer.measures if m.absolute]
    found: list[Result] = []
    for version in versions:

        def scores(item: Item, x: Tensor) -> Mapping[str, Value | UnscoredError]:
            return scorer.scores(dataclasses.replace(item, x=x), x)

        found += _scored(study, test_set, version, items, kept, scores, {**protocol, **_about(scorer)})
    return found


def _same_speaker(
    study: Study,
    test_set: TestSet,
    versions: Sequence[Version],
    items: Sequence[Item],
    prompt: float,
    protocol: Mapping[str, Any],
) -> list[Result]:
    """How like the prompt's voice that of the last second is."""
    kept = [Version(v.name, v.x) for v in versions if v.name != "unprompted"]
    scorer = _opened(study, "speaker")
    if not isinstance(scorer, Scorer):
        measures = [Measure(f"lm_{v.name}_speaker_similarity", "1", "higher", VERSIONS[v.name]) for v in kept]
        return study.not_run(measures, test_set.name, str(scorer), protocol)

    def scores(item: Item, x: Tensor) -> Mapping[str, Value | UnscoredError]:
        length = round(prompt * (item.sample_rate or 0))
        return scorer.scores(dataclasses.replace(item, x=item.x[:, :length]), x[:, -length:])

    about = {**protocol, **_about(scorer), "compared": f"the last {prompt:g} s with the first {prompt:g} s of the clip"}
    return [r for v in kept for r in _scored(study, test_set, v, items, scorer.measures, scores, about)]


def _scored(
    study: Study,
    test_set: TestSet,
    version: Version,
    items: Sequence[Item],
    measures: Sequence[Measure],
    scores: Callable[[Item, Tensor], Mapping[str, Value | UnscoredError]],
    protocol: Mapping[str, Any],
) -> list[Result]:
    lines = []
    for item, x in zip(items, version.x, strict=True):
        values = dict.fromkeys((m.name for m in measures), x) if isinstance(x, UnscoredError) else scores(item, x)
        good = {f"lm_{version.name}_{k}": v for k, v in values.items() if not isinstance(v, UnscoredError)}
        bad = {f"lm_{version.name}_{k}": str(v) for k, v in values.items() if isinstance(v, UnscoredError)}
        lines.append({"item": item.key, "values": good, "unscored": bad})
    renamed = [dataclasses.replace(m, name=f"lm_{version.name}_{m.name}") for m in measures]
    return study.results(lines, renamed, test_set.name, {**protocol, "judged": VERSIONS[version.name]})


def _distances(
    study: Study,
    test_set: TestSet,
    name: str,
    versions: Sequence[Version],
    rates: Sequence[int | None],
    reference: Sequence[Tensor],
    reference_rate: int | None,
    protocol: Mapping[str, Any],
    suffix: str = "",
) -> list[Result]:
    """Distances of each version to the reference; that of ``original`` is the floor: other real items, as many."""
    scorer = _opened(study, name)
    if not isinstance(scorer, SetScorer):
        measures = [Measure(f"lm_{v.name}{suffix}_{name}", "1", "lower", VERSIONS[v.name]) for v in versions]
        return study.not_run(measures, test_set.name, str(scorer), protocol)
    kept = [m for m in scorer.measures if "floor" not in m.name]  # the version `original` is the floor here
    found: list[Result] = []
    try:
        real = _features(scorer, reference, [reference_rate] * len(reference))
    except UnscoredError as e:
        real = e
    for version in versions:
        about = {**protocol, **_about(scorer), "judged": VERSIONS[version.name]}
        about["counts"] = [len(reference), len(version.usable)]
        renamed = [dataclasses.replace(m, name=f"lm_{version.name}{suffix}_{m.name}") for m in kept]
        try:
            if isinstance(real, UnscoredError):
                raise real
            lost = [x for x in version.x if isinstance(x, UnscoredError)]
            if lost:
                raise lost[0]
            values = scorer.distance(real, _features(scorer, version.usable, rates))
        except UnscoredError as e:
            found += study.not_run(renamed, test_set.name, str(e), about)
            continue
        label, N = study.contender.label, len(version.usable)
        found += [
            Result(PART, label, test_set.name, r.name + study.suffix, values[m.name], r.unit, r.direction,
                   count=N, protocol=about)
            for m, r in zip(kept, renamed, strict=True)
        ]  # fmt: skip
    return found


def _features(scorer: SetScorer, xs: Sequence[Tensor], rates: Sequence[int | None]) -> Tensor:
    if not xs:
        raise UnscoredError("nothing to compare")
    return torch.cat([scorer.features(x, rate) for x, rate in zip(xs, rates, strict=True)])


def _about(scorer: Scorer | SetScorer) -> dict[str, Any]:
    return {"scorer": scorer.name, "backend": scorer.backend, "version": scorer.version, **scorer.settings}


def _keep_sounds(
    study: Study,
    test_set: TestSet,
    made: Mapping[str, Sequence[Tensor | UnscoredError]],
    items: Sequence[Item],
    prompt: float,
    entries: list[dict[str, Any]],
) -> None:
    """The first sounds of each version with their prompts, as files."""
    study.samples_folder.mkdir(parents=True, exist_ok=True)
    for name, sounds in made.items():
        for n, (item, x) in enumerate(zip(items[: KEPT["audio"]], sounds, strict=False)):
            if isinstance(x, Tensor):
                path = study.samples_folder / f"{file_name(test_set.name)}-{name}-{n}.wav"
                write_audio(path, x, item.sample_rate or 0)
                given = prompt if name == "continued" else 0.0
                words = f": {item.text}" if item.text and name != "unprompted" else ""
                entries.append(_entry(study, path.name, given, f"{name} {n + 1}, {VERSIONS[name]}{words}"))
    _write_index(study, entries)


def _entry(study: Study, path: str, prompt: float, text: str) -> dict[str, Any]:
    return {"contender": study.contender.label, "path": path, "prompt_seconds": prompt, "text": text}


def _write_index(study: Study, entries: Sequence[Mapping[str, Any]]) -> None:
    text = json.dumps(list(entries), ensure_ascii=False, indent=1) + "\n"
    write_atomic(study.samples_folder / "index.json", text.encode())
