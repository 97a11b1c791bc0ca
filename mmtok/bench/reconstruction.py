"""The first part of the benchmark: every item encoded, decoded, judged, kept, and then summarised with its protocol."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mmtok.bench.contenders import ORIGINAL, Contender
from mmtok.bench.records import Item, Result, TestSet, Trial
from mmtok.bench.run_folder import RunFolder
from mmtok.bench.scorers import Measure, NotRunError, Scorer, SetScorer, UnscoredError, Value
from mmtok.bench.summary import RATES, rate_results, summarise
from mmtok.tokens import Tokens

PART = "reconstruction"


@dataclasses.dataclass(frozen=True)
class Opened:
    """A scorer that was asked for: ``scorer``, or why there is none in ``not_run``."""

    name: str
    modality: str
    scorer: Scorer | SetScorer | None
    not_run: str = ""

    def protocol(self) -> dict[str, Any]:
        """Of the scorer, as plain values."""
        if self.scorer is None:
            return {"name": self.name, "not_run": self.not_run}
        s = self.scorer
        return {"name": self.name, "backend": s.backend, "version": s.version, **({"settings": dict(s.settings)})}


def item_seed(seed: int, test_set: str, key: str) -> int:
    """What an item's random numbers begin with, whatever ran before it."""
    return int(hashlib.sha256(f"{seed} {test_set} {key}".encode()).hexdigest()[:8], 16)


def one_line(error: BaseException) -> str:
    """What went wrong in one line, with the kind of the error where it is not one of ours."""
    text = " ".join(str(error).split())[:400]
    return (
        text
        if isinstance(error, (ValueError, NotRunError)) and text
        else f"{type(error).__name__}: {text}".rstrip(": ")
    )


def pass_originals(folder: RunFolder, test_set: TestSet, opened: Sequence[Opened], progress: bool) -> None:
    """Judge the untouched items by what needs no reference, and keep their features."""
    wanted = [o for o in opened if _absolute(o) or isinstance(o.scorer, SetScorer)]
    if not wanted:
        return
    for index in _bar(test_set, ORIGINAL, progress):
        line = folder.lines.get((ORIGINAL, test_set.name, index))
        left = [o for o in wanted if not _is_done(folder, o, _absolute(o), line, ORIGINAL, test_set.name, index)]
        if line is not None and not left:
            continue
        item = test_set.items[index]
        line = dict(line) if line is not None else _line(ORIGINAL, test_set, item, index, None)
        for o in left:
            _judge(folder, o, _absolute(o), item, item.reference, line)
        folder.add_line(line)


def reconstruct(
    folder: RunFolder,
    contender: Contender,
    test_set: TestSet,
    opened: Sequence[Opened],
    seed: int,
    progress: bool,
) -> None:
    """Encode, decode and judge what is not done yet. An item that the contender refuses gets a line that says why."""
    usable = [o for o in opened if o.scorer is not None]
    label, name = contender.label, test_set.name
    for index in _bar(test_set, label, progress):
        line = folder.lines.get((label, name, index))
        left = [o for o in usable if not _is_done(folder, o, _measures(o), line, label, name, index)]
        if line is not None and not left:
            continue
        item = test_set.items[index]
        torch.manual_seed(item_seed(seed, name, item.key))
        refused = None if line is None else line.get("refused")
        x_hat, trial = None, None
        if refused is None:
            try:
                x_hat, trial = _tried(folder, contender, test_set, item, index, line is not None)
            except ImportError:
                raise  # a package that is missing refuses every item
            except Exception as e:  # other packages' codecs raise anything on a sound that they did not expect
                refused = one_line(e)
        line = dict(line) if line is not None else _line(label, test_set, item, index, trial)
        if trial is not None and contender.target_bytes is not None:
            line["above_target"] = trial.bits > 8 * contender.target_bytes
        if x_hat is not None:
            for o in left:
                _judge(folder, o, _measures(o), item, x_hat, line)
        else:
            names = [m.name for o in usable for m in _measures(o)]
            if refused is not None:
                line["refused"] = refused
                names += [m.name for m in RATES]
            reason = "it only encodes: there is no reconstruction" if refused is None else f"refused: {refused}"
            line["unscored"] = {**line["unscored"], **dict.fromkeys(names, reason)}
        folder.add_line(line)


def _tried(
    folder: RunFolder, contender: Contender, test_set: TestSet, item: Item, index: int, coded: bool
) -> tuple[Tensor | None, Trial | None]:
    """The reconstruction (None of a tokenizer that only encodes), and the trial where codes were made now."""
    tokens = folder.load_codes(contender.label, test_set.name, index) if coded else None
    if contender.tokenizer.encode_only:
        if tokens is not None:
            return None, None
        started = time.perf_counter()
        tokens = contender.encode(item)
        trial = Trial(tokens, torch.zeros(0), float(tokens.bits[0]), time.perf_counter() - started, math.nan)
    elif tokens is not None:
        return contender.decode(tokens, item), None
    else:
        trial = contender.run(item)
    folder.save_codes(contender.label, test_set.name, index, trial.tokens.to("cpu"))
    return (trial.x_hat if trial.x_hat.numel() else None), trial


def _bar(test_set: TestSet, label: str, progress: bool) -> tqdm[int]:
    count = range(len(test_set.items))
    return tqdm(count, desc=f"{label} | {test_set.name}", unit="item", disable=not progress, mininterval=1)


def _line(label: str, test_set: TestSet, item: Item, index: int, trial: Trial | None) -> dict[str, Any]:
    shape = item.reference.shape
    if item.sample_rate is None:
        size = {"pixels": int(shape[-1] * shape[-2])}
    else:
        size = {"seconds_of_sound": shape[-1] / item.sample_rate}
    line = {"contender": label, "set": test_set.name, "item": item.key, "index": index}
    line |= {"bits": None if trial is None else trial.bits, **size}
    if trial is not None:
        line["encode_seconds"] = trial.encode_seconds
        line |= {} if math.isnan(trial.decode_seconds) else {"decode_seconds": trial.decode_seconds}
    return line | {"values": {}, "unscored": {}}


def _measures(o: Opened) -> tuple[Measure, ...]:
    return () if o.scorer is None else tuple(o.scorer.measures)


def _absolute(o: Opened) -> tuple[Measure, ...]:
    return tuple(m for m in _measures(o) if m.absolute)


def _is_done(
    folder: RunFolder,
    o: Opened,
    measures: Sequence[Measure],
    line: Mapping[str, Any] | None,
    label: str,
    test_set: str,
    index: int,
) -> bool:
    if line is None:
        return False
    known = {*line["values"], *line["unscored"]}
    if isinstance(o.scorer, SetScorer) and folder.features_path(o.name, label, test_set, index).is_file():
        return True
    named = _measures(o) if isinstance(o.scorer, SetScorer) else measures
    return all(m.name in known for m in named)


def _judge(
    folder: RunFolder, o: Opened, measures: Sequence[Measure], item: Item, x_hat: Tensor, line: dict[str, Any]
) -> None:
    """Put the values of ``measures``, or why there are none, into ``line``; features go into a file."""
    try:
        if isinstance(o.scorer, SetScorer):
            found = o.scorer.features(x_hat, item.sample_rate)
            folder.save_features(o.name, line["contender"], line["set"], line["index"], found)
            return
        assert o.scorer is not None
        scores: Mapping[str, Value | UnscoredError] = o.scorer.scores(item, x_hat)
    except Exception as e:  # of the judges' networks too: one item must not end a run of hours
        measures = _measures(o) if isinstance(o.scorer, SetScorer) else measures
        scores = {m.name: UnscoredError(one_line(e)) for m in measures}
    for m in measures:
        value = scores.get(m.name, UnscoredError(f"{o.name} gave no value"))
        if not isinstance(value, UnscoredError) and _has_nan(value):
            value = UnscoredError("not a number")
        line["values"].pop(m.name, None)
        line["unscored"].pop(m.name, None)
        if isinstance(value, UnscoredError):
            line["unscored"][m.name] = one_line(value)
        else:
            line["values"][m.name] = [float(v) for v in value] if isinstance(value, tuple) else _plain(float(value))


def _has_nan(value: float | tuple[float, float]) -> bool:
    return any(not math.isfinite(v) for v in value) if isinstance(value, tuple) else math.isnan(value)


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else "inf" if value > 0 else "-inf"


def original_results(folder: RunFolder, test_set: TestSet, opened: Sequence[Opened], seed: int) -> list[Result]:
    """What the untouched items get: values of what needs no reference, and the distances of two halves of the set."""
    found: list[Result] = []
    lines = folder.lines_of(ORIGINAL, test_set.name)
    for o in opened:
        protocol = {"set": dict(test_set.protocol), "scorer": o.protocol(), "seed": seed}
        if isinstance(o.scorer, SetScorer):
            half, floor, why = _floor(folder, o, test_set, seed)
            protocol["halves"] = f"{half} items against {half} others of the set, drawn by the seed"
            for m in _measures(o):
                if m.direction != "neither":
                    value = floor.get(m.name)
                    reason = None if value is not None else why or f"{o.name} gave no value"
                    found.append(_distance(ORIGINAL, test_set, m, value, reason, half, protocol))
        elif measures := _absolute(o):
            about = {"contender": ORIGINAL, "test_set": test_set.name, "protocol": protocol}
            found += summarise(lines, measures, **about, seed=seed)
    return found


def reconstruction_results(
    folder: RunFolder, contender: Contender, test_set: TestSet, opened: Sequence[Opened], seed: int
) -> list[Result]:
    """All numbers of a contender on a set, from the lines and features that are kept."""
    lines = folder.lines_of(contender.label, test_set.name)
    own = contender.protocol()
    if contender.target_bytes is not None:
        own["above_target"] = sum(bool(line.get("above_target")) for line in lines)
    base = {"set": dict(test_set.protocol), "contender": own, "seed": seed}
    about = {"contender": contender.label, "test_set": test_set.name}
    found = rate_results(lines, **about, protocol=base, seed=seed)
    for o in opened:
        protocol = {**base, "scorer": o.protocol()}
        if o.scorer is None:
            # Its measures are not known without it, so the scorer's name stands for them.
            names = {"metric": o.name, "unit": "1", "direction": "neither", "protocol": protocol}
            found.append(Result(PART, **about, value=None, not_run=o.not_run, **names))
        elif isinstance(o.scorer, SetScorer):
            found += _distances(folder, o, contender.label, test_set, protocol, seed)
        else:
            found += summarise(lines, o.scorer.measures, **about, protocol=protocol, seed=seed)
    return found


def _distances(
    folder: RunFolder, o: Opened, label: str, test_set: TestSet, protocol: Mapping[str, Any], seed: int
) -> list[Result]:
    """A contender's distances from the originals of the same items, beside those of two halves of the originals."""
    assert isinstance(o.scorer, SetScorer)
    pairs, missing = [], 0
    for index in range(len(test_set.items)):
        both = [folder.load_features(o.name, c, test_set.name, index) for c in (ORIGINAL, label)]
        if both[0] is None or both[1] is None:
            missing += 1
        else:
            pairs.append((both[0], both[1]))
    half, floor, _ = _floor(folder, o, test_set, seed)
    full = {**protocol, "summary": "set", "floor": {**floor, "items_a_half": half}}
    full |= {"unscored": {"no features": missing}} if missing else {}
    values: Mapping[str, float] = {}
    reason = f"{o.name} gave no value"
    if not pairs:
        reason = "no item has features; see items.jsonl"
    else:
        try:
            values = o.scorer.distance(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))
        except Exception as e:
            reason = one_line(e)
    return [
        _distance(label, test_set, m, values.get(m.name), None if m.name in values else reason, len(pairs), full)
        for m in o.scorer.measures
    ]


def _floor(folder: RunFolder, o: Opened, test_set: TestSet, seed: int) -> tuple[int, dict[str, float], str]:
    """Items of a half, the distances of two halves of the originals, and why there are none."""
    assert isinstance(o.scorer, SetScorer)
    kept = [folder.load_features(o.name, ORIGINAL, test_set.name, i) for i in range(len(test_set.items))]
    found = [f for f in kept if f is not None]
    half = len(found) // 2
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    if half < 1:
        return 0, {}, f"two halves of the set need at least 2 items with features, got {len(found)}; take more items"
    first, second = ([found[i] for i in part] for part in (order[:half], order[half : 2 * half]))
    try:
        values = o.scorer.distance(torch.cat(first), torch.cat(second))
    except Exception as e:
        return half, {}, one_line(e)
    judging = {m.name for m in o.scorer.measures if m.direction != "neither"}
    return half, {name: float(v) for name, v in values.items() if name in judging}, ""


def _distance(
    label: str,
    test_set: TestSet,
    measure: Measure,
    value: float | None,
    reason: str | None,
    count: int,
    protocol: Mapping[str, Any],
) -> Result:
    if value is not None and not math.isfinite(value):
        value, reason = None, f"{value}, which is no distance"
    return Result(
        PART,
        label,
        test_set.name,
        measure.name,
        None if value is None else float(value),
        measure.unit,
        measure.direction,
        count=0 if value is None else count,
        not_run=reason,
        protocol=protocol,
    )


def kept_codes(folder: RunFolder, contender: Contender, test_set: TestSet, seed: int) -> list[Tokens]:
    """A contender's tokens of each item of a set, in order; made and kept where they are not there yet.

    Items that it refuses are left out.
    """
    found = []
    for index in range(len(test_set.items)):
        line = folder.lines.get((contender.label, test_set.name, index))
        if line is not None and "refused" in line:
            continue
        tokens = folder.load_codes(contender.label, test_set.name, index)
        if tokens is None:
            item = test_set.items[index]
            try:
                with torch.random.fork_rng(devices=[]):  # a job that asks for codes draws on as if they had been there
                    torch.manual_seed(item_seed(seed, test_set.name, item.key))
                    tokens = contender.encode(item).to("cpu")
            except ValueError:
                continue
            folder.save_codes(contender.label, test_set.name, index, tokens)
        found.append(tokens)
    return found
