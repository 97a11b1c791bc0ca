"""One contender's language models in the benchmark: their recipe, their training, and the codes they are tested on."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtok import auto
from mmtok.bench.contenders import Contender
from mmtok.bench.language_data import (
    LONGEST,
    Material,
    Shape,
    UnfitError,
    codes_of,
    find_material,
    plain_tokens,
    smoke_material,
)
from mmtok.bench.language_model import LM, Corpus, Recipe, train_lm
from mmtok.bench.language_rows import Rows
from mmtok.bench.parts import Context
from mmtok.bench.records import ITEMS, Result, TestSet, read_lines
from mmtok.bench.run_folder import file_name
from mmtok.bench.scorers import Measure
from mmtok.bench.sets import Items
from mmtok.bench.summary import summarise
from mmtok.tokens import Tokens, write_atomic

PART = "language"
LONGEST_ROW = 1024  # backbone steps of a training item, on average; more takes too long on a CPU
STEPS = {"audio": 100, "image": 200}
VALIDATION = 80


@dataclasses.dataclass(frozen=True)
class Study:
    """One contender and head; ``suffix`` of its metrics' names, so that a run can hold several heads."""

    contender: Contender
    context: Context
    head: str
    suffix: str

    @property
    def folder(self) -> Path:
        return self.context.out / PART

    @property
    def samples_folder(self) -> Path:
        return self.folder / file_name(self.contender.label + self.suffix)

    def option(self, name: str, default: int, smoke: int) -> int:
        return settings_of(self.context.options, name, smoke if self.context.smoke else default)

    def recipe(self) -> Recipe:
        modality = self.contender.modality
        return Recipe(
            self.head,
            self.option("width", 192, 32),
            self.option("depth", 4, 1),
            self.option("steps", STEPS[modality], 3),
            positions=modality == "image",
        )

    def protocol(self, set_protocol: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
        own = {"set": dict(set_protocol)} if set_protocol else {}
        found = {**own, "contender": self.contender.protocol(), **self.recipe().protocol(), **more}
        found |= {"backend": "mmtok.lm", "version": auto.installed_version("mmtok"), "torch": str(torch.__version__)}
        return found | ({"smoke": True} if self.context.smoke else {})

    def results(
        self,
        lines: Sequence[Mapping[str, Any]],
        measures: Sequence[Measure],
        test_set: str,
        protocol: Mapping[str, Any],
    ) -> list[Result]:
        """Means with bootstrap intervals over the ``values`` of lines, under this study's names."""
        own = [{"contender": self.contender.label, "set": test_set, "index": i, **line} for i, line in enumerate(lines)]
        label, seed = self.contender.label, self.context.seed
        found = summarise(own, measures, contender=label, test_set=test_set, protocol=protocol, seed=seed, part=PART)
        return [dataclasses.replace(r, metric=r.metric + self.suffix) for r in found]

    def not_run(
        self, measures: Sequence[Measure], test_set: str, reason: str, protocol: Mapping[str, Any]
    ) -> list[Result]:
        return [
            Result(
                PART,
                self.contender.label,
                test_set,
                m.name + self.suffix,
                None,
                m.unit,
                m.direction,
                not_run=" ".join(reason.split()),
                protocol=protocol,
            )
            for m in measures
        ]


@dataclasses.dataclass(frozen=True)
class Trained:
    """Models of one study (one a seed), with what they were trained on."""

    study: Study
    shape: Shape
    rows: Rows
    train: Corpus
    models: Sequence[LM]
    about: Mapping[str, Any]

    def step_bits(self, corpus: Corpus) -> list[Tensor]:
        """Of each model (N, S)."""
        return [model.step_bits(corpus) for model in self.models]

    def corpus(self, tokens: Sequence[Tokens]) -> Corpus:
        return Corpus.of([self.rows.split(t.codes[0, :, : int(t.lengths[0])]) for t in tokens])


def shape_of(test_set: TestSet) -> Shape:
    """What a set's items are like, by its protocol; several sizes or rates: each its own."""
    protocol = test_set.protocol
    if test_set.modality == "audio":
        rate = protocol.get("sample_rate")
        return Shape(sample_rate=rate if isinstance(rate, int) else None)
    size = re.fullmatch(r"(\d+) x (\d+)", str(protocol.get("size", "")))
    if size is None:
        return Shape()
    H, W = int(size[1]), int(size[2])
    return Shape(size=(H, W), squares=H == W and "filled to squares" in str(protocol.get("crop", "")))


def material_of(study: Study) -> Material:
    context, modality = study.context, study.contender.modality
    if context.smoke:
        return smoke_material(modality)
    tested = [key for test_set in context.sets for key in keys_of(test_set)]
    items = study.option("clips", 600, 4) if modality == "audio" else study.option("pictures", 1000, 4)
    return find_material(context.data, modality, tested, items, VALIDATION)


def train_models(study: Study, shape: Shape, material: Material) -> Trained:
    """Codes of the training and validation items, and a model for each seed.

    Raises:
        UnfitError: no usable items, or items of too many positions.
    """
    context, recipe = study.context, study.recipe()
    started = time.monotonic()
    parts = {"train": material.train, "val": material.val}
    codes = {
        name: codes_of(study.contender, part, shape, study.folder, context.progress, name)
        for name, part in parts.items()
    }
    rows = Rows(codes["train"][0][0].spec)
    train, val = (Corpus.of([rows.split(t.codes[0, :, : int(t.lengths[0])]) for t in codes[name][0]]) for name in parts)
    steps = float(train.lengths.double().mean()) * (len(rows.sizes) if study.head == "flat" else 1)
    if steps > LONGEST_ROW:
        raise UnfitError(
            f"an item has {steps:,.0f} positions on average, expected at most {LONGEST_ROW:,}; try heads=delay, fewer "
            f"levels or a lower rate"
        )
    seeds = [context.seed + i for i in range(study.option("seeds", 1, 1))]
    encoded = time.monotonic()
    device = study.contender.tokenizer.device
    models = [train_lm(train, val, rows.sizes, recipe, seed, device, context.progress) for seed in seeds]
    about = {**material.about, "training_items": len(train), "validation_items": len(val)}
    about |= {"left_out_of_training": codes["train"][1]} if codes["train"][1] else {}
    about |= {"parameters": models[0].parameters, "seeds": seeds, "best_steps": [m.best_step for m in models]}
    about |= {"rows": rows.about, "levels_of_rows": len(rows.sizes), "evaluation_dtype": "float32"}
    if rows.spec.frame_rate is not None:
        about["training_seconds_of_sound"] = round(float(train.lengths.sum()) * rows.group / rows.spec.frame_rate, 1)
        about["longest_clip_seconds"] = LONGEST
    # Not in the protocol: the same run again takes another time.
    clock = {"encode": round(encoded - started, 1), "train": round(time.monotonic() - encoded, 1)}
    write_atomic(study.folder / f"{study.samples_folder.name}.seconds.json", json.dumps(clock).encode())
    return Trained(study, shape, rows, train, models, about)


@dataclasses.dataclass(frozen=True)
class TestCodes:
    """A set's codes, without side entries, cut to 4 s of sound, of those items that may be tested.

    Args:
        tokens: one item each. whole: as they were made, with side entries. indices: into the set's items. keys: theirs.
        seconds: of sound that the codes stand for, 0 for pictures.
    """

    __test__ = False  # pytest: not a class of tests

    tokens: Sequence[Tokens]
    whole: Sequence[Tokens]
    indices: Sequence[int]
    keys: Sequence[str]
    seconds: Sequence[float]


def test_codes(study: Study, test_set: TestSet, material: Material | None, group: int) -> TestCodes:
    """Codes of the items that were not refused and not trained on.

    Raises:
        UnfitError: none of them is left.
    """
    lines = read_lines(study.context.out / ITEMS)
    own = [n for n in lines if n.get("contender") == study.contender.label and n.get("set") == test_set.name]
    refused = {int(line["index"]) for line in own if "refused" in line}
    items = [(i, key) for i, key in enumerate(keys_of(test_set)) if i not in refused]
    made = study.context.codes(test_set)
    if len(made) != len(items):
        raise UnfitError(f"expected codes of {len(items)} items, got {len(made)}; run the same command again")
    found: list[tuple[Tokens, Tokens, int, str, float]] = []
    for (i, key), whole in zip(items, made, strict=True):
        tokens, seconds = plain_tokens(whole), 0.0
        if material is not None and not material.may_test(key):
            continue
        if test_set.modality == "audio":
            T = int(tokens.lengths[0])
            seconds = _seconds(whole)
            if seconds > LONGEST:
                kept = max(group, round(T * LONGEST / seconds) // group * group)
                tokens, seconds = tokens.keep(num_tokens=kept), seconds * kept / T
        found.append((tokens, whole, i, key, seconds))
    if not found:
        raise UnfitError("no item of the set is left to test: all of their files are trained on; test other files")
    return TestCodes(*(list(column) for column in zip(*found, strict=True)))


def keys_of(test_set: TestSet) -> list[str]:
    items = test_set.items
    return [e.key for e in items.entries] if isinstance(items, Items) else [item.key for item in items]


def _seconds(tokens: Tokens) -> float:
    side = tokens.side
    if "num_samples" in side and "sample_rate" in side:
        return float(side["num_samples"][0]) / float(side["sample_rate"][0])
    return float(tokens.lengths[0]) / (tokens.spec.frame_rate or 1.0)


def settings_of(options: Mapping[str, Any], name: str, default: int) -> int:
    """A whole number above 0 from a command's options."""
    value = options.get(name, default)
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ValueError(f"language: expected a whole number above 0 for {name}, got {value!r}")
    return number
