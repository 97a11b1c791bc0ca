"""One run of the benchmark: contenders on test sets, judged, summarised and kept, so that a killed one goes on.

What is done stands in the run's folder (see `mmtok.bench.records`) before the next piece begins. Numbers are computed
from what is kept there, so that a run that was killed and started again gives the numbers of one that never was.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mmtok import auto
from mmtok.bench.contenders import Contender, open_contenders, require_once
from mmtok.bench.gallery import write_gallery
from mmtok.bench.parts import Context, Job
from mmtok.bench.reconstruction import (
    PART,
    Opened,
    item_seed,
    kept_codes,
    one_line,
    original_results,
    pass_originals,
    reconstruct,
    reconstruction_results,
)
from mmtok.bench.records import Item, Result, TestSet
from mmtok.bench.run_folder import FORMAT, RunFolder, command_line, failures, read_run
from mmtok.bench.scorers import SCORERS, NotRunError, Scorer, SetScorer, open_scorer
from mmtok.bench.sets import LoadedSet, Settings, load_set

# Name -> "module:function"; the function takes a contender and a `Context` and gives the part's jobs.
PARTS: dict[str, str] = {
    "tokens": "mmtok.bench.token_part:jobs",
    "systems": "mmtok.bench.systems:jobs",
    "probes": "mmtok.bench.probes:jobs",
    "language": "mmtok.bench.language:jobs",
}
BUILTIN = {"image": "builtin-image", "audio": "builtin-audio"}
SMOKE_ITEMS = 4
PACKAGES = ("mmtok", "torch", "torchaudio", "torchvision", "torchmetrics", "numpy", "pillow", "soundfile")

__all__ = ["PART", "PARTS", "Settings", "failures", "run_bench"]


def run_bench(
    names: Sequence[str | Contender],
    sets: Sequence[str | Path | TestSet],
    out: str | Path,
    data: str | Path | None = None,
    helpers: str | Path | None = None,
    parts: Sequence[str] = (PART,),
    settings: Settings | None = None,
    scorers: Sequence[str | Scorer | SetScorer] | None = None,
    device: str = "cpu",
    seed: int = 0,
    smoke: bool = False,
    progress: bool = True,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    command: str | None = None,
) -> Path:
    """Run contenders on test sets and keep every number with its protocol in ``out``.

    A folder that holds a run goes on: what is there is not done again, and more contenders, sets, scorers or parts are
    added. What cannot be measured becomes a result with the reason in ``not_run``. What failed (a job, or a contender
    that refused a whole set) is in `failures` of the folder; a command line exits with 1 then.

    Args:
        names: contenders as in `mmtok.bench.contenders`, or ready ones.
        sets: of `mmtok.bench.sets.load_set`, or ready ones; none: what ships with mmtok.
        out: folder of the run.
        data: the folder that ``recipes/fetch_data.py`` made; named sets and probes read it.
        helpers: folder of the judges' networks; None: ``data/helpers`` where it is there.
        parts: ``reconstruction`` and names of `PARTS`.
        settings: of the sets, see `Settings`.
        scorers: names of `mmtok.bench.scorers.SCORERS`, or ready ones; None: all of the sets' modalities.
        device: of the contenders' weights.
        seed: of everything random.
        smoke: a few items and steps, to see that it runs.
        progress: show bars.
        options: part -> what it was told, e.g. ``{"language": {"steps": 300}}``.
        command: what was typed, for ``run.json``; None: this process's arguments.

    Returns:
        The folder.

    Raises:
        ValueError: unknown names, a set or contender without a counterpart, a folder whose run was made under another
            protocol or is being written to, or no item at all that any contender takes.
        FileNotFoundError: a set's files. ImportError: a contender's package.
    """
    if unknown := [p for p in parts if p != PART and p not in PARTS]:
        raise ValueError(f"parts: expected some of {[PART, *PARTS]}, got {unknown}")
    if not parts:
        raise ValueError(f"parts: expected at least one of {[PART, *PARTS]}, got none")
    options = {part: dict((options or {}).get(part, {})) for part in parts}
    data = None if data is None else Path(data)
    helpers = _helpers(data, helpers)
    contenders = _contenders(names, device, helpers)
    with RunFolder(out) as folder:
        settings = _settings(settings, contenders, smoke)
        test_sets = _test_sets(sets, contenders, data, settings, progress)
        modalities = {t.modality for t in test_sets}
        opened = _open_scorers(scorers, modalities, helpers) if PART in parts else []
        record = _record(contenders, test_sets, opened, device)
        record |= {"seed": seed, "smoke": smoke, "parts": list(parts), "options": options}
        record |= {"commands": [command or command_line()], "settings": dataclasses.asdict(settings)}
        folder.begin(record)
        run = _Run(folder, contenders, test_sets, opened, seed, progress)
        context = Context(folder.path, data, helpers, (), lambda _: [], seed, smoke, progress)
        try:
            if PART in parts:
                run.reconstruction()
            for part in [p for p in PARTS if p in parts]:
                run.part(part, dataclasses.replace(context, options=options[part]))
        finally:
            run.finish()
        if run.tried and not run.taken:
            raise ValueError(f"no contender took a single item: {run.failed[0]}; see {folder.path / 'items.jsonl'}")
    return Path(out)


@dataclasses.dataclass
class _Run:
    """One command: its results in their order, and what failed. ``tried`` and ``taken`` count items."""

    folder: RunFolder
    contenders: Sequence[Contender]
    test_sets: Sequence[TestSet]
    opened: Sequence[Opened]
    seed: int
    progress: bool
    results: list[Result] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    tried: int = 0
    taken: int = 0

    def reconstruction(self) -> None:
        for test_set in self.test_sets:
            opened = [o for o in self.opened if o.modality == test_set.modality]
            own = [c for c in self.contenders if c.modality == test_set.modality]
            pass_originals(self.folder, test_set, opened, self.progress)
            self.results += original_results(self.folder, test_set, opened, self.seed)
            for contender in own:
                reconstruct(self.folder, contender, test_set, opened, self.seed, self.progress)
                self._count(contender, test_set)
                self.results += reconstruction_results(self.folder, contender, test_set, opened, self.seed)
                self._write()
            measures = {m.name: m for o in opened if isinstance(o.scorer, Scorer) for m in o.scorer.measures}
            write_gallery(self.folder, test_set, own, measures, _seed_of(self.seed, test_set))

    def _count(self, contender: Contender, test_set: TestSet) -> None:
        lines = self.folder.lines_of(contender.label, test_set.name)
        refused = [line for line in lines if "refused" in line]
        self.tried += len(lines)
        self.taken += len(lines) - len(refused)
        if refused and len(refused) == len(lines):
            self.failed.append(
                f"{contender.label} refused all {len(lines)} items of {test_set.name}, the first: "
                f"{refused[0]['item']}: {refused[0]['refused']}"
            )

    def part(self, part: str, context: Context) -> None:
        """All jobs of a part; one that is done is not done again, one that failed is tried again."""
        module, _, function = PARTS[part].partition(":")
        for contender in self.contenders:
            own = [t for t in self.test_sets if t.modality == contender.modality]
            codes = _codes(self.folder, contender, self.seed)
            here = dataclasses.replace(context, sets=own, codes=codes)
            try:
                jobs: Sequence[Job] = getattr(importlib.import_module(module), function)(contender, here)
            except Exception as e:
                self._not_run(part, contender, part, e)
                continue
            if twice := sorted({j.key for j in jobs if [k.key for k in jobs].count(j.key) > 1}):
                raise ValueError(f"{part}: expected each job once, got {twice} more than once")
            bar = tqdm(jobs, desc=f"{contender.label} | {part}", unit="job", disable=not self.progress)
            for job in bar:
                bar.set_postfix_str(job.key)
                if (found := self.folder.jobs.get(job.key)) is None:
                    torch.manual_seed(item_seed(self.seed, part, job.key))
                    try:
                        found = list(job.run())
                    except Exception as e:
                        self._not_run(part, contender, job.key, e)
                        continue
                    if any(r.value is not None for r in found):  # without a number it is tried again next time
                        self.folder.add_job(job.key, found)
                self.results += found
                self._write()

    def _not_run(self, part: str, contender: Contender, job: str, error: Exception) -> None:
        """A result that says why. What is not installed is no failure; anything else is listed at the end."""
        reason = one_line(error)
        if not isinstance(error, (NotRunError, ImportError)):
            self.failed.append(f"{contender.label}, {job}: {reason}")
        protocol = {"contender": contender.protocol(), "job": job}
        names = (part, contender.label, "-", job)  # of no set, and the job's key stands for its metrics
        self.results.append(Result(*names, None, "1", "neither", not_run=reason, protocol=protocol))
        self._write()

    def _write(self) -> None:
        """This command's results, and behind them those that earlier ones left and that it says nothing about."""
        found = {r.key: r for r in self.results}
        for old in self.folder.old_results():
            if old.key not in found and not self._is_stale(old):
                found[old.key] = old
        self.folder.write_results(list(found.values()))

    def _is_stale(self, old: Result) -> bool:
        """A reason why something did not run, where this command has tried again."""
        if old.value is not None or old.contender not in {c.label for c in self.contenders}:
            return False
        scorers = {o.name for o in self.opened if o.scorer is not None}
        return old.metric in scorers if old.part == PART else old.metric == old.protocol.get("job")

    def finish(self) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        refused: dict[str, dict[str, list[dict[str, str]]]] = {}
        for (label, name, _), line in sorted(self.folder.lines.items()):
            if "refused" in line:
                one = {"item": line["item"], "reason": line["refused"]}
                refused.setdefault(label, {}).setdefault(name, []).append(one)
        record = {**read_run(self.folder.path), "refused": refused, "failures": self.failed, "finished": now}
        self.folder.update(record)


def _seed_of(seed: int, test_set: TestSet) -> Callable[[Item], int]:
    return lambda item: item_seed(seed, test_set.name, item.key)


def _codes(folder: RunFolder, contender: Contender, seed: int) -> Callable[[TestSet], list[Any]]:
    return lambda test_set: kept_codes(folder, contender, test_set, seed)


def _helpers(data: Path | None, helpers: str | Path | None) -> Path | None:
    if helpers is not None:
        if not Path(helpers).is_dir():
            raise FileNotFoundError(
                f"helpers: no folder at {helpers}; `python recipes/fetch_data.py --helpers` makes it"
            )
        return Path(helpers)
    inside = None if data is None else data / "helpers"
    return inside if inside is not None and inside.is_dir() else None


def _contenders(names: Sequence[str | Contender], device: str, helpers: Path | None) -> list[Contender]:
    spelled = [n for n in names if isinstance(n, str)]
    ready = [n for n in names if isinstance(n, Contender)]
    found = (open_contenders(spelled, device, helpers) if spelled or not ready else []) + ready
    require_once([c.label for c in found])
    return found


def _settings(settings: Settings | None, contenders: Sequence[Contender], smoke: bool) -> Settings:
    settings = settings or Settings()
    modalities = {c.modality for c in contenders}
    if settings.modality is None and len(modalities) == 1:  # a folder of both has one kind that these can take
        settings = dataclasses.replace(settings, modality=next(iter(modalities)))
    if smoke:
        settings = dataclasses.replace(settings, items=min(settings.items or SMOKE_ITEMS, SMOKE_ITEMS))
    return settings


def _test_sets(
    sets: Sequence[str | Path | TestSet],
    contenders: Sequence[Contender],
    data: Path | None,
    settings: Settings,
    progress: bool,
) -> list[TestSet]:
    modalities = sorted({c.modality for c in contenders})
    wanted = sets or [BUILTIN[m] for m in modalities]
    found = [s if isinstance(s, TestSet) else load_set(s, data, settings, progress) for s in wanted]
    names = [t.name for t in found]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"sets: expected names that differ, got {twice} more than once; rename a folder")
    for t in found:
        if t.modality not in modalities:
            raise ValueError(f"{t.name} is a set of {t.modality} items and no contender takes those; leave it out")
    for c in contenders:
        if c.modality not in {t.modality for t in found}:
            raise ValueError(
                f"{c.label} takes {c.modality} items, got sets {names}; add one, e.g. {BUILTIN[c.modality]}"
            )
    return found


def _open_scorers(
    scorers: Sequence[str | Scorer | SetScorer] | None, modalities: set[str], helpers: Path | None
) -> list[Opened]:
    """Each scorer of the modalities, opened, or with the reason why it could not be."""
    found = []
    for one in SCORERS if scorers is None else scorers:
        if not isinstance(one, str):
            found.append(Opened(one.name, one.modality, one))
            continue
        modality = "audio" if "audio" in SCORERS.get(one, "").partition(":")[0] else "image"
        if one in SCORERS and modality not in modalities:
            continue
        try:
            scorer = open_scorer(one, helpers)
            found.append(Opened(one, scorer.modality, scorer))
        except NotRunError as e:
            found.append(Opened(one, modality, None, one_line(e)))
    names = [o.name for o in found]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"scorers: expected each once, got {twice} more than once")
    return [o for o in found if o.modality in modalities]


def _record(
    contenders: Sequence[Contender], test_sets: Sequence[TestSet], opened: Sequence[Opened], device: str
) -> dict[str, Any]:
    """What ``run.json`` says of a command, but for its settings."""
    versions = {p: v for p in PACKAGES if (v := auto.installed_version(p)) is not None}
    machine = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "system": platform.platform(),
    }
    bad = {t.name: list(t.bad_files) for t in test_sets if isinstance(t, LoadedSet) and t.bad_files}
    return {
        "format": FORMAT,
        "title": "mmtok benchmark: " + ", ".join(t.name for t in test_sets),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "sets": {t.name: {"modality": t.modality, **t.protocol} for t in test_sets},
        "bad_files": bad,
        "contenders": {c.label: {"modality": c.modality, **c.protocol()} for c in contenders},
        "scorers": {o.name: o.protocol() for o in opened},
        "versions": {"python": platform.python_version(), **versions},
        "machines": [machine],
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())
