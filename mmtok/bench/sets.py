"""Test sets: the named ones, whose protocols are fixed, and any folder, file, glob or list of the user's own.

Every set is read once when it is loaded: files that cannot be read are left out and named, and a fingerprint over keys
and contents says whether two runs saw the same items.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmtok.bench.records import Item, TestSet
from mmtok.data import audio as audio_io
from mmtok.data import images as image_io
from mmtok.data.sources import MANIFESTS, SUFFIXES, Source, find_sources

ITEMS = 100  # of a folder, where no count is given
LISTS = {"images.jsonl": "image", "speech.jsonl": "audio", "music.jsonl": "audio", "sounds.jsonl": "audio"}
CROPS = ("center", "random")
RESAMPLER = f"torchaudio sinc_interp_kaiser, {audio_io.ZERO_CROSSINGS} zero crossings, rolloff {audio_io.ROLLOFF:.4f}"
# What a file that cannot be read raises; torch's own errors are RuntimeErrors.
BAD_FILE = (ValueError, OSError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is taken of a set, and how. Named sets have all of it fixed but ``items``.

    Args:
        items: at most so many, every n-th of the sorted list; None: 100 of a folder, all of a named set.
        split: of a list (``images.jsonl`` ...); None: its test splits, or everything where it has none.
        resize: pictures: px of the shorter side (antialiased bicubic), before the crop.
        crop: pictures: ``center`` or ``random`` (one window an item, drawn from ``seed`` and the item's name).
        size: px of the square crop.
        seconds: sounds: their beginning, at most so long.
        sample_rate: sounds: Hz to resample to; None keeps each one's own.
        mono: sounds: the mean of the channels.
        seed: of random crops.
        modality: ``image`` or ``audio`` where a folder holds both.

    Raises:
        ValueError: a value that is not as said, or a crop without a size.
    """

    items: int | None = None
    split: str | None = None
    resize: int | None = None
    crop: str | None = None
    size: int | None = None
    seconds: float | None = None
    sample_rate: int | None = None
    mono: bool = False
    seed: int = 0
    modality: str | None = None

    def __post_init__(self) -> None:
        for name in ("items", "resize", "size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds: expected more than 0, got {self.seconds}")
        if self.sample_rate is not None:
            audio_io.check_rate(self.sample_rate)
        if self.crop is not None and self.crop not in CROPS:
            raise ValueError(f"crop: expected one of {CROPS}, got {self.crop!r}")
        if (self.crop is None) != (self.size is None):
            raise ValueError(f"crop and size: expected both or neither, got {self.crop!r} and {self.size}")
        if self.modality not in (None, "image", "audio"):
            raise ValueError(f"modality: expected image or audio, got {self.modality!r}")


@dataclasses.dataclass(frozen=True)
class LoadedSet(TestSet):
    """A `TestSet` with ``bad_files``: ``{"item", "reason"}`` of what could not be read and is left out."""

    bad_files: Sequence[Mapping[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Entry:
    """One item before it is read.

    Args:
        key: of the item. make: reads it.
        whole: what the fingerprint takes, where that is not the item's ``x``: sound before it was resampled, since
            resampling differs in its last bits between machines.
    """

    key: str
    make: Callable[[], Item]
    whole: Callable[[], Tensor] | None = None


class Items(Sequence[Item]):
    """Items that are read when they are asked for."""

    def __init__(self, entries: Sequence[Entry]):
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, i: int) -> Item: ...

    @overload
    def __getitem__(self, i: slice) -> Items: ...

    def __getitem__(self, i: int | slice) -> Item | Items:
        return Items(self.entries[i]) if isinstance(i, slice) else self.entries[i].make()


def load_set(
    spec: str | Path, data: str | Path | None = None, settings: Settings | None = None, progress: bool = False
) -> LoadedSet:
    """A test set by its name or place.

    Args:
        spec: a key of `mmtok.bench.named_sets.NAMED`; or a folder, a file, a glob, a list (``DIR/images.jsonl``) of the
            user's own. A folder that holds a list is read by it: splits, texts, speakers, licences; any other gives all
            its pictures or sounds, with texts from ``.txt`` files of the same name where there are such.
        data: the folder that ``recipes/fetch_data.py`` made, for named sets.
        settings: what to take of it.
        progress: show a bar.

    Raises:
        ValueError: an unknown name, a set without a readable item, settings that do not fit.
        FileNotFoundError: a named set without its data.
    """
    from mmtok.bench.named_sets import NAMED, named_set

    settings = settings or Settings()
    if str(spec) in NAMED:
        return named_set(str(spec), None if data is None else Path(data), settings, progress)
    modality, root, sources, source = _own_sources(str(spec), settings)
    sources, split = _of_split(sources, source, settings)
    name = root.resolve().name if Path(spec).is_dir() or glob.has_magic(str(spec)) else Path(spec).stem
    return folder_set(name or "files", modality, root, sources, split, source, settings, progress)


def folder_set(
    name: str,
    modality: str,
    root: Path,
    sources: Sequence[Source],
    split: str,
    source: str,
    settings: Settings,
    progress: bool = False,
) -> LoadedSet:
    """Whole files by ``settings``; keys are relative to ``root``, ``source`` and ``split`` go into the protocol."""
    sources = sorted(sources, key=lambda s: s.path.as_posix())
    chosen = every_nth(sources, settings.items or ITEMS)
    entries = [_entry(s, root, modality, settings) for s in chosen]
    protocol: dict[str, Any] = {
        "source": source,
        "split": split,
        "selection": selection(len(chosen), len(sources), "files sorted by path"),
    }
    if modality == "image":
        resize = "none" if settings.resize is None else f"shorter side {settings.resize} px, antialiased bicubic"
        crop = f"{settings.crop} {settings.size} px" if settings.crop else "none"
        protocol |= {"resize": resize, "crop": crop, "background": "white", "seed": settings.seed}
    else:
        protocol |= {
            "cut": "none" if settings.seconds is None else f"first {settings.seconds:g} s",
            "resampler": "none" if settings.sample_rate is None else resampler_name(),
            "mix": "mean of the channels" if settings.mono else "none",
        }
    return finished(name, modality, entries, protocol, progress=progress)


def finished(
    name: str,
    modality: str,
    entries: Iterable[Entry],
    protocol: Mapping[str, Any],
    bad_files: Sequence[Mapping[str, str]] = (),
    progress: bool = False,
) -> LoadedSet:
    """Read every entry once: what cannot be read is left out and named; sizes and fingerprint go into the protocol.

    Raises:
        ValueError: no item can be read.
    """
    digest, bad, good, seen = hashlib.sha256(), list(bad_files), [], _Seen()
    for entry in tqdm(list(entries), desc=f"reading {name}", unit="item", disable=not progress, leave=False):
        try:
            item = entry.make()
            content = item.x if entry.whole is None else entry.whole()
        except BAD_FILE as e:
            bad.append({"item": entry.key, "reason": " ".join(str(e).split())[:300] or type(e).__name__})
            continue
        if modality == "image":
            content = (content * 255).round().to(torch.uint8)
        digest.update(f"{entry.key} {tuple(content.shape)} {item.sample_rate} {item.text}\n".encode())
        digest.update(content.contiguous().numpy().tobytes())
        if item.target is not None:
            digest.update((item.target * 255).round().to(torch.uint8).contiguous().numpy().tobytes())
        seen.add(item)
        good.append(entry)
    if not good:
        first = f"; the first: {bad[0]['item']}: {bad[0]['reason']}" if bad else ""
        raise ValueError(f"{name}: expected at least one readable item, got none of {len(bad)} files{first}")
    full = {"set": name, **protocol, "count": len(good), "left_out": len(bad), **seen.protocol(modality)}
    full |= {"fingerprint": digest.hexdigest()[:16]}
    return LoadedSet(name, modality, Items(good), full, bad)


class _Seen:
    """Sizes, rates, channels and licences of the items that were read."""

    def __init__(self) -> None:
        self.sizes: set[tuple[int, ...]] = set()
        self.targets: set[tuple[int, ...]] = set()
        self.rates: set[int] = set()
        self.licences: set[str] = set()
        self.total_seconds = 0.0
        self.texts = 0

    def add(self, item: Item) -> None:
        self.sizes.add(tuple(item.x.shape))
        if item.target is not None:
            self.targets.add(tuple(item.target.shape))
        self.licences.add(item.labels.get("licence") or "not stated")
        self.texts += item.text is not None
        if item.sample_rate is not None:
            self.rates.add(item.sample_rate)
            self.total_seconds += item.x.shape[-1] / item.sample_rate

    def protocol(self, modality: str) -> dict[str, Any]:
        found: dict[str, Any] = {"texts": self.texts, "licences": sorted(self.licences)}
        if modality == "image":
            found["size"] = _sizes(self.sizes)
            return found | ({"target_size": _sizes(self.targets)} if self.targets else {})
        channels = sorted({size[0] for size in self.sizes})
        return found | {
            "sample_rate": one_or_list(sorted(self.rates)),
            "channels": one_or_list(channels),
            "seconds": round(self.total_seconds, 3),
        }


def _sizes(sizes: set[tuple[int, ...]]) -> str:
    """``128 x 128``, or the smallest and the largest by area."""
    order = sorted(sizes, key=lambda s: (s[-2] * s[-1], s))
    texts = [f"{s[-2]} x {s[-1]}" for s in (order[0], order[-1])]
    return texts[0] if len(order) == 1 else " to ".join(texts)


def one_or_list(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else list(values)


def every_nth(values: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of the values, evenly from the first on."""
    return list(values[:: max(1, len(values) // count)][:count])


def selection(count: int, total: int, order: str) -> str:
    """How ``count`` of ``total`` were chosen, in words."""
    return f"all, {order}" if count == total else f"every {max(1, total // count)}. of {total}, {order}, first {count}"


def resampler_name() -> str:
    from importlib.metadata import version

    return f"{RESAMPLER} (torchaudio {version('torchaudio')})"


def key_of(path: Path, root: Path) -> str:
    """The path below ``root`` with forward slashes; the whole path where it lies elsewhere."""
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return path.as_posix()


def labels_of(source: Source) -> dict[str, str]:
    fields = ("speaker", "language", "kind", "package", "licence")
    return {f: getattr(source, f) for f in fields if getattr(source, f)}


def _own_sources(spec: str, settings: Settings) -> tuple[str, Path, list[Source], str]:
    """Modality, what keys are relative to, files, and where they come from in words."""
    path = Path(spec).expanduser()
    if path.is_dir():
        lists = [n for n in LISTS if (path / n).is_file() and settings.modality in (None, LISTS[n])]
        if len(lists) > 1:
            choice = ", ".join(str(path / n) for n in lists)
            raise ValueError(f"{spec}: expected one list in that folder, got {len(lists)}; name one of {choice}")
        if lists:
            return _own_sources(str(path / lists[0]), settings)
        files, root = sorted(p for p in path.rglob("*") if p.is_file() and _is_seen(p, path)), path
    elif path.is_file() and path.suffix == ".jsonl":
        modality = LISTS.get(path.name) or settings.modality
        if modality is None:
            raise ValueError(f"{spec}: expected a list named {', '.join(LISTS)}, or modality= in the settings")
        return modality, path.parent, find_sources(path.parent, modality, path.name), path.name
    elif path.is_file():
        files, root = [path], path.parent
    elif glob.has_magic(spec):
        files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        fixed = [part for part in path.parts[:-1] if not glob.has_magic(part)]
        root = Path(*fixed) if fixed else Path()
    else:
        from mmtok.bench.named_sets import NAMED

        raise ValueError(f"{spec}: expected one of {list(NAMED)}, or a folder, file or glob; there is no such file")
    of_kind = {m: [p for p in files if p.suffix.lower() in SUFFIXES[m]] for m in MANIFESTS}
    kinds = [m for m in MANIFESTS if of_kind[m] and settings.modality in (None, m)]
    if len(kinds) != 1:
        counts = f"{len(of_kind['image'])} pictures and {len(of_kind['audio'])} sounds"
        remedy = (
            "name one kind by a glob such as DIR/**/*.png"
            if kinds
            else f"expected {', '.join(sum(SUFFIXES.values(), ()))}"
        )
        raise ValueError(f"{spec}: expected files of one kind, got {counts}; {remedy}")
    return kinds[0], root, [Source(p, "", text=_sidecar(p)) for p in of_kind[kinds[0]]], spec


def _is_seen(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


def _sidecar(path: Path) -> str | None:
    """The text beside a file: ``a.txt`` of ``a.wav``."""
    beside = path.with_suffix(".txt")
    try:
        text = " ".join(beside.read_text(encoding="utf-8").split()) if beside.is_file() else ""
    except UnicodeDecodeError as e:
        raise ValueError(f"{beside}: expected UTF-8 text ({e}); store it so") from e
    return text or None


def _of_split(sources: Sequence[Source], source: str, settings: Settings) -> tuple[list[Source], str]:
    """The sources of the wanted split, and its name."""
    splits = sorted({s.split for s in sources if s.split})
    if settings.split is None:
        tests = [s for s in splits if s == "test" or s.startswith("test_")]
        return [s for s in sources if not tests or s.split in tests], ", ".join(tests) or "none"
    if settings.split not in splits:
        got = f"expected one of {splits}" if splits else "it has no splits; leave split out"
        raise ValueError(f"{source}: no split {settings.split!r}: {got}")
    return [s for s in sources if s.split == settings.split], settings.split


def _entry(source: Source, root: Path, modality: str, settings: Settings) -> Entry:
    key = key_of(source.path, root)
    if modality == "image":
        return Entry(key, lambda: _picture(source, key, settings))
    return Entry(key, lambda: _sound(source, key, settings), lambda: _beginning(source.path, settings.seconds)[0])


def _picture(source: Source, key: str, settings: Settings) -> Item:
    x = image_io.to_rgb(image_io.read_image(source.path))
    if settings.resize is not None:
        scale = settings.resize / min(x.shape[1:])
        size = [max(1, round(s * scale)) for s in x.shape[1:]]
        x = torch.nn.functional.interpolate(x[None], size, mode="bicubic", align_corners=False, antialias=True)[0]
    x = (x.clamp(0, 1) * 255).round() / 255
    if settings.crop is not None and settings.size is not None:
        h, w, side = x.shape[1], x.shape[2], settings.size
        if min(h, w) < side:
            raise ValueError(f"expected at least {side} x {side} px for the crop, got {h} x {w}; give resize too")
        top, left = (h - side) // 2, (w - side) // 2
        if settings.crop == "random":
            rng = np.random.default_rng([settings.seed, *hashlib.sha256(key.encode()).digest()])
            top, left = int(rng.integers(h - side + 1)), int(rng.integers(w - side + 1))
        x = x[:, top : top + side, left : left + side].contiguous()
    return Item(key, x, text=source.text or None, labels=labels_of(source))


def _sound(source: Source, key: str, settings: Settings) -> Item:
    x, rate = _beginning(source.path, settings.seconds)
    x = x.mean(0, keepdim=True) if settings.mono else x
    wanted = settings.sample_rate or rate
    return Item(key, audio_io.resample(x, rate, wanted), wanted, source.text or None, labels_of(source))


def _beginning(path: Path, seconds: float | None) -> tuple[Tensor, int]:
    x, rate = audio_io.read_audio(path)
    return (x if seconds is None else x[:, : max(1, round(seconds * rate))]), rate
