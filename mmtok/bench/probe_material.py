"""Labelled sounds and pictures of probes: cut from the data folder, split, prepared once a run and kept in it.

The same items, the same split and the same order for every contender: what is drawn follows from hashes of file names,
not from a generator. Sound is mono with 16-bit values, pictures are squares with 8-bit values.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.bench.parts import Context
from mmtok.bench.records import Item
from mmtok.bench.scorers import NotRunError
from mmtok.data.audio import read_audio, resample
from mmtok.data.images import read_image, to_rgb
from mmtok.tokens import write_atomic

FOLDER = "probes"
TRAIN, TEST, OTHER = "train", "test", "other voice"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many items a class has at most in training and test, and how many it must have at least to be one."""

    train: int
    test: int
    least: int


@dataclasses.dataclass
class Task:
    """Labelled items.

    Args:
        name: key of `TASKS`. modality: ``audio`` or ``image``. classes: their names.
        keys, labels, splits, texts: of each item; splits are ``train``, ``test`` and, for words, ``other voice``.
        arrays: int16 sounds (L,) or uint8 pictures (3, H, W). sample_rate: Hz, None for pictures.
        protocol: what the numbers depend on: sources, split, counts.
        extra: what else the task needs, as plain values.
    """

    name: str
    modality: str
    classes: list[str]
    keys: list[str]
    labels: list[int]
    splits: list[str]
    texts: list[str | None]
    arrays: list[Tensor]
    sample_rate: int | None
    protocol: dict[str, Any]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> Item:
        """Item ``i`` as a contender takes it."""
        array = self.arrays[i]
        x = array.float() / 255 if self.modality == "image" else array[None].float() / 32768
        labels = {"class": self.classes[self.labels[i]]} if self.classes else {}
        return Item(self.keys[i], x, self.sample_rate, self.texts[i], labels)

    def rows(self, split: str) -> Tensor:
        return torch.tensor([i for i, s in enumerate(self.splits) if s == split], dtype=torch.int64)


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of task: how it is made, from which manifests, and with how many items a class."""

    modality: str
    about: str
    build: Callable[[Context, Sizes], Task]
    manifests: tuple[str, ...]
    whole: Sizes
    smoke: Sizes = Sizes(6, 3, 3)
    revision: int = 1

    def sizes(self, smoke: bool) -> Sizes:
        return self.smoke if smoke else self.whole


@dataclasses.dataclass
class Found:
    """One item that a task may use: ``group`` keeps what must be on one side of the split together."""

    key: str
    label: str
    group: str
    array: Callable[[], Tensor]
    text: str | None = None
    split: str | None = None


def rank_of(key: str) -> str:
    """What items are ordered by: as good as random, the same on every machine."""
    return hashlib.sha1(key.encode()).hexdigest()


def read_rows(context: Context, manifest: str) -> list[dict[str, Any]]:
    """The lines of a manifest of the data folder. Raises NotRunError with the command that makes it."""
    kind = manifest.removesuffix(".jsonl")
    folder = context.data if context.data is not None else Path("data")
    file = folder / manifest
    if context.data is None or not file.is_file():
        found = "no data folder was given" if context.data is None else f"{file} is missing"
        raise NotRunError(f"{found}; run `python recipes/fetch_data.py --out {folder} --only {kind}`, then give --data")
    try:
        return [json.loads(line) for line in file.read_text("utf-8").split("\n") if line.strip()]
    except ValueError as e:
        raise NotRunError(f"{file} is damaged ({e}); fetch the data again") from e


def prepared(name: str, family: Family, context: Context) -> Task:
    """The task, from the run's folder or made now. Raises NotRunError where its data are missing."""
    digest = hashlib.sha256(json.dumps([name, family.revision, context.smoke]).encode())
    for manifest in family.manifests:
        path = None if context.data is None else context.data / manifest
        digest.update(path.read_bytes() if path is not None and path.is_file() else b"")
    file = context.out / FOLDER / "tasks" / f"{name}-{digest.hexdigest()[:12]}.safetensors"
    key = str(file)
    if key not in _OPEN:
        if not file.is_file():
            task = family.build(context, family.sizes(context.smoke))
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, _bytes_of(task))
        while len(_OPEN) > 2:  # clips of a few tasks stay in memory, not of all
            del _OPEN[next(iter(_OPEN))]
        _OPEN[key] = _read(file)
    return _OPEN[key]


_OPEN: dict[str, Task] = {}


def _bytes_of(task: Task) -> bytes:
    from safetensors.torch import save

    about = {f.name: getattr(task, f.name) for f in dataclasses.fields(Task) if f.name != "arrays"}
    about["shapes"] = [list(a.shape) for a in task.arrays]
    flat = torch.cat([a.flatten() for a in task.arrays])
    return save({"values": flat}, metadata={"task": json.dumps(about)})


def _read(file: Path) -> Task:
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as f:
        about = json.loads(f.metadata()["task"])
        flat = f.get_tensor("values")
    shapes = about.pop("shapes")
    parts = flat.split([int(torch.tensor(s).prod()) for s in shapes])
    return Task(arrays=[p.view(s) for p, s in zip(parts, shapes, strict=True)], **about)


# ---- material ----


def sound_of(path: Path, rate: int) -> Tensor:
    """(L,) float mono at ``rate``."""
    x, own = read_audio(path)
    return resample(x.mean(0, keepdim=True), own, rate)[0]


def int16_of(x: Tensor) -> Tensor:
    return (x.clamp(-1, 1) * 32767).round().to(torch.int16)


def levelled(x: Tensor, level: float = 0.05) -> Tensor:
    """Sound at a root mean square of ``level``, or less where it would clip: loudness gives no class away."""
    gain = level / float(x.square().mean().sqrt().clamp_min(1e-4))
    return x * min(gain, 1 / float(x.abs().max().clamp_min(1e-4)))


def square_picture(path: Path, size: int) -> Tensor:
    """(3, size, size) uint8: the longer side at ``size``, on white, the rest filled with the edge's mean colour."""
    x = to_rgb(read_image(path))[None]
    scale = size / max(x.shape[-2:])
    h, w = (max(1, round(s * scale)) for s in x.shape[-2:])
    x = F.interpolate(x, (h, w), mode="bicubic", align_corners=False, antialias=True)[0].clamp(0, 1)
    edge = torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1).mean(1)
    out = edge[:, None, None].expand(3, size, size).clone()
    top, left = (size - h) // 2, (size - w) // 2
    out[:, top : top + h, left : left + w] = x
    return (out * 255).round().to(torch.uint8)


def divided(items: Iterable[Found], sizes: Sizes, split: str) -> dict[str, list[Found]]:
    """Class -> its items with their ``split`` set: whole groups go to the test until it has its share.

    Groups come in the order of their hashes. Items whose split is set already keep it. Classes with fewer than
    ``least`` training items or less than a third of that in the test are left out.
    """
    classes: dict[str, list[Found]] = collections.defaultdict(list)
    for item in items:
        classes[item.label].append(item)
    found = {}
    for name, members in sorted(classes.items()):
        members.sort(key=lambda m: rank_of(m.key))
        groups: dict[str, list[Found]] = collections.defaultdict(list)
        for m in members:
            groups[m.group].append(m)
        share = sizes.test / (sizes.train + sizes.test)
        in_test, total = 0, sum(m.split is None for m in members)
        for group in sorted(groups, key=rank_of):
            free = [m for m in groups[group] if m.split is None]
            fits = in_test + len(free) <= max(1.15 * share * total, sizes.least // 3)
            side = split if fits and in_test < share * total else TRAIN
            for m in free:
                m.split = side
            in_test += len(free) * (side == split)
        kept: list[Found] = []
        for side in (TRAIN, TEST, OTHER):
            kept += [m for m in members if m.split == side][: sizes.train if side == TRAIN else sizes.test]
        counts = collections.Counter(m.split for m in kept)
        if counts[TRAIN] >= sizes.least and counts[split] >= max(1, sizes.least // 3):
            found[name] = kept
    return found


def task_of(
    name: str, modality: str, classes: Mapping[str, Sequence[Found]], rate: int | None, protocol: dict[str, Any]
) -> Task:
    """The task of these classes. Raises NotRunError for fewer than two."""
    if len(classes) < 2:
        raise NotRunError(
            f"{name}: expected at least two classes with enough items in the data folder, got {list(classes)}; "
            f"fetch the data again, with all of its sets"
        )
    names = sorted(classes)
    items = [(label, m) for label in names for m in classes[label]]
    counts = collections.Counter(m.split for _, m in items)
    tested = collections.Counter(label for label, m in items if m.split == TEST)
    protocol |= {
        "classes": names,
        "chance_percent": 100 / len(names),
        "majority_percent": 100 * max(tested.values(), default=0) / max(1, sum(tested.values())),
        **{f"{split.replace(' ', '_')}_items": count for split, count in sorted(counts.items()) if split},
    }
    return Task(
        name,
        modality,
        names,
        [m.key for _, m in items],
        [names.index(label) for label, _ in items],
        [m.split or TRAIN for _, m in items],
        [m.text for _, m in items],
        [m.array() for _, m in items],
        rate,
        protocol,
    )
