"""The named test sets, each under one fixed protocol, so that a number of one says what it was measured on.

All but the two ``builtin`` ones are cut from what ``recipes/fetch_data.py`` fetches, from test splits that no recipe
trains on. Their crops are drawn one after the other from one generator: the same on every machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmtok.bench.records import Item
from mmtok.bench.sets import (
    BAD_FILE,
    Entry,
    LoadedSet,
    Settings,
    every_nth,
    finished,
    folder_set,
    key_of,
    labels_of,
    resampler_name,
    selection,
)
from mmtok.data.audio import read_audio, resample
from mmtok.data.captioned import caption_split, square, style_of
from mmtok.data.images import read_image
from mmtok.data.packed import image_reader, random_crop
from mmtok.data.sources import Source, find_sources

ASSETS = Path(__file__).resolve().parents[1] / "assets"
LONGER_SIDE = 384  # px to which "reduced" pictures are brought before a window is drawn
WINDOW = f"random window of at least half the picture after its longer side was brought to {LONGER_SIDE} px"
SPEECH_PROMPTS, SPEECH_RATE = 40, 16000
TRANSCRIPT = "unless to be rather cold hearted and rather selfish is to be ill disposed"  # assets/ATTRIBUTION.md


@dataclasses.dataclass(frozen=True)
class Named:
    """A set by name.

    Args:
        modality: ``image`` or ``audio``.
        about: one line for people.
        build: (name, data, settings, progress) -> the set.
    """

    modality: str
    about: str
    build: Callable[[str, Path, Settings, bool], LoadedSet]
    needs_data: bool = True
    adjustable: bool = False


def named_set(name: str, data: Path | None, settings: Settings, progress: bool = False) -> LoadedSet:
    """A set of `NAMED`; of ``settings`` a fixed one takes ``items`` only (every n-th of its items).

    Raises:
        ValueError: settings that its protocol has fixed, or nothing to read. FileNotFoundError: no data.
    """
    entry = NAMED[name]
    free = {"items", "seed", "modality"} | ({"split", "seconds", "sample_rate", "mono"} if entry.adjustable else set())
    for field in dataclasses.fields(Settings):
        if field.name not in free and getattr(settings, field.name) != field.default:
            raise ValueError(f"{name}: its protocol is fixed, {field.name} was given; leave it out or name a folder")
    if entry.needs_data and data is None:
        raise FileNotFoundError(f"{name}: it is cut from fetched data; give the data folder (--data)")
    return entry.build(name, data or ASSETS, settings, progress)


def _pictures(data: Path, splits: Sequence[str]) -> list[Source]:
    return [s for s in find_sources(data, "image") if s.split in splits]


def _crop_set(split: str, kind: str, about: str, crop: str, resize: str) -> Named:
    def build(name: str, data: Path, settings: Settings, progress: bool) -> LoadedSet:
        bad: list[dict[str, str]] = []
        cut = {"taken": _crops_as_taken, "reduced": _crops_reduced, "small": _small_crops}[kind]
        entries = list(cut(data, _pictures(data, (split,)), bad))
        kept = every_nth(entries, settings.items or len(entries) or 1)
        protocol = {
            "source": "images.jsonl",
            "split": split,
            "selection": selection(len(kept), len(entries), "in the list's order"),
            "resize": resize,
            "crop": crop,
            "background": "white or a flat colour by the hash of the file's name",
            "seed": 0,
        }
        return finished(name, "image", kept, protocol, bad, progress)

    return Named("image", about, build)


def _read(source: Source, root: Path, max_side: int, bad: list[dict[str, str]]) -> np.ndarray | None:
    """(H, W, 3) uint8; None, and a line in ``bad``, where it cannot be read: it draws nothing then."""
    try:
        return image_reader(max_side)(source.path)
    except BAD_FILE as e:
        bad.append({"item": key_of(source.path, root), "reason": " ".join(str(e).split())[:300]})
        return None


def _crops_as_taken(data: Path, sources: Sequence[Source], bad: list[dict[str, str]]) -> Iterator[Entry]:
    """128 px of each picture, from the file's own pixels; smaller pictures are enlarged as in `random_crop`."""
    rng = np.random.default_rng(0)
    for source in sources:
        if (picture := _read(source, data, 100_000, bad)) is None:
            continue
        height, width = picture.shape[:2]
        if min(height, width) < 128:
            part = _eight_bits(random_crop(picture, (128, 128), rng))
        else:
            top, left = int(rng.integers(height - 127)), int(rng.integers(width - 127))
            part = torch.from_numpy(np.array(picture[top : top + 128, left : left + 128])).permute(2, 0, 1)
        yield _kept(f"{key_of(source.path, data)}#0", part, source)


def _crops_reduced(data: Path, sources: Sequence[Source], bad: list[dict[str, str]]) -> Iterator[Entry]:
    return _windows(data, sources, bad, 128, 1)


def _small_crops(data: Path, sources: Sequence[Source], bad: list[dict[str, str]]) -> Iterator[Entry]:
    return _windows(data, sources, bad, 64, 4)


def _windows(
    data: Path, sources: Sequence[Source], bad: list[dict[str, str]], size: int, count: int
) -> Iterator[Entry]:
    rng = np.random.default_rng(0)
    for source in sources:
        if (picture := _read(source, data, LONGER_SIDE, bad)) is not None:
            for k in range(count):
                part = _eight_bits(random_crop(picture, (size, size), rng))
                yield _kept(f"{key_of(source.path, data)}#{k}", part, source)


def _eight_bits(x: Tensor) -> Tensor:
    return (x * 255).round().to(torch.uint8)


def _kept(key: str, pixels: Tensor, source: Source, text: str | None = None) -> Entry:
    """An item that stays in memory as (3, H, W) uint8."""
    return Entry(key, lambda: Item(key, pixels.float() / 255, text=text or source.text, labels=labels_of(source)))


def _captioned(name: str, data: Path, settings: Settings, progress: bool) -> LoadedSet:
    known = [s for s in _pictures(data, ("train", "val")) if s.text]
    rows = [s for s in known if caption_split(s.text or "") == "test"]
    return _square_set(name, data, rows, "test by the hash of the caption's words", 224, 64, settings, progress)


def _style(name: str, data: Path, settings: Settings, progress: bool) -> LoadedSet:
    return _square_set(name, data, _pictures(data, ("test_style",)), "test_style", 224, 64, settings, progress)


def _square_set(
    name: str,
    data: Path,
    sources: Sequence[Source],
    split: str,
    size: int,
    target: int,
    settings: Settings,
    progress: bool,
) -> LoadedSet:
    """Whole pictures as squares: encoded from ``size`` px, compared at ``target`` px."""
    kept = every_nth(sources, settings.items or len(sources) or 1)
    protocol = {
        "source": "images.jsonl",
        "split": split,
        "selection": selection(len(kept), len(sources), "in the list's order"),
        "resize": f"longer side {size} px (compared at {target} px), antialiased bicubic",
        "crop": "none; filled to squares with the mean colour of the edge",
        "background": "white or a flat colour by the hash of the file's name",
        "caption": "'KIND of TEXT', e.g. '3D emoji of red heart'",
    }

    def entry(source: Source) -> Entry:
        key = key_of(source.path, data)

        def make() -> Item:
            x, small = (
                torch.from_numpy(square(image_reader(side)(source.path), side)).permute(2, 0, 1).float() / 255
                for side in (size, target)
            )
            text = f"{style_of(source)} of {source.text}" if source.text else None
            return Item(key, x, text=text, labels=labels_of(source), target=small.contiguous())

        return Entry(key, make)

    return finished(name, "image", [entry(s) for s in kept], protocol, progress=progress)


def _speech(name: str, data: Path, settings: Settings, progress: bool) -> LoadedSet:
    """40 English prompts of at least 2 s, every n-th by path, and what else there is (LibriVox), 16 kHz mono."""
    sources = sorted((s for s in find_sources(data, "audio") if s.split == "test"), key=lambda s: str(s.path))
    prompts = [s for s in sources if s.package.startswith("asterisk")]
    others = [s for s in sources if not s.package.startswith("asterisk")]
    bad: list[dict[str, str]] = []
    long_enough = [s for s in prompts if _lasts(s, 2.0, data, bad)]
    prompts = every_nth(long_enough, SPEECH_PROMPTS)
    chosen = every_nth(prompts + others, settings.items or len(prompts) + len(others) or 1)

    def entry(source: Source) -> Entry:
        key = key_of(source.path, data)

        def make() -> Item:
            x, rate = read_audio(source.path)
            x = resample(x.mean(0, keepdim=True), rate, SPEECH_RATE)
            return Item(key, x, SPEECH_RATE, source.text or None, labels_of(source))

        return Entry(key, make, lambda: read_audio(source.path)[0])

    order = f"{len(prompts)} prompts of at least 2 s (every n-th by path) and {len(others)} LibriVox sentences"
    protocol = {
        "source": "speech.jsonl",
        "split": "test",
        "selection": selection(len(chosen), len(prompts) + len(others), order),
        "cut": "none",
        "resampler": resampler_name(),
        "mix": "mean of the channels",
    }
    return finished(name, "audio", [entry(s) for s in chosen], protocol, bad, progress)


def _lasts(source: Source, seconds: float, root: Path, bad: list[dict[str, str]]) -> bool:
    import soundfile

    try:
        found = soundfile.info(str(source.path))
    except (soundfile.LibsndfileError, OSError) as e:
        bad.append({"item": key_of(source.path, root), "reason": " ".join(str(e).split())[:300]})
        return False
    return found.frames >= seconds * found.samplerate


def _listed(manifest: str, seconds: float) -> Callable[[str, Path, Settings, bool], LoadedSet]:
    def build(name: str, data: Path, settings: Settings, progress: bool) -> LoadedSet:
        settings = dataclasses.replace(settings, seconds=settings.seconds or seconds)
        wanted = settings.split or "test"
        found = find_sources(data, "audio", manifest)
        sources = [s for s in found if s.split == wanted]
        if not sources:
            raise ValueError(f"{name}: expected one of {sorted({s.split for s in found})} as split, got {wanted!r}")
        return folder_set(name, "audio", data, sources, wanted, manifest, settings, progress)

    return build


def _builtin_image(name: str, data: Path, settings: Settings, progress: bool) -> LoadedSet:
    """The photograph that ships, cut into the six whole tiles of 128 px that it holds."""
    pixels = _eight_bits(read_image(ASSETS / "chelsea.jpg"))
    source = Source(ASSETS / "chelsea.jpg", "test", "photo", "photo of cat", "scikit-image", "CC0-1.0")
    entries = [
        _kept(f"chelsea.jpg#{row}-{column}", pixels[:, top : top + 128, left : left + 128].clone(), source)
        for row, top in enumerate(range(0, pixels.shape[1] - 127, 128))
        for column, left in enumerate(range(0, pixels.shape[2] - 127, 128))
    ]
    kept = every_nth(entries, settings.items or len(entries))
    protocol = {
        "source": "mmtok/assets/chelsea.jpg",
        "split": "test",
        "selection": selection(len(kept), len(entries), "row by row"),
        "resize": "none",
        "crop": "tiles of 128 px",
    }
    return finished(name, "image", kept, protocol, progress=progress)


def _builtin_audio(name: str, data: Path, settings: Settings, progress: bool) -> LoadedSet:
    path = ASSETS / "speech.flac"
    labels = {"language": "en", "package": "pocketsphinx-testdata", "licence": "public domain"}

    def make() -> Item:
        x, rate = read_audio(path)
        return Item("speech.flac", x, rate, TRANSCRIPT, labels)

    protocol = {
        "source": "mmtok/assets/speech.flac",
        "split": "test",
        "selection": "all",
        "cut": "none",
        "resampler": "none",
        "mix": "none",
    }
    return finished(name, "audio", [Entry("speech.flac", make)], protocol, progress=progress)


NAMED: dict[str, Named] = {
    "builtin-image": Named("image", "six 128 px tiles of the photograph that ships", _builtin_image, False),
    "builtin-audio": Named("audio", "the spoken sentence that ships, 5.3 s at 16 kHz", _builtin_audio, False),
    "photos": _crop_set(
        "test_photo", "taken", "a 128 px crop of each test photograph, as taken", "random 128 px", "none"
    ),
    "photos-reduced": _crop_set(
        "test_photo", "reduced", "a 128 px window of at least half of each test photograph", f"128 px: {WINDOW}", WINDOW
    ),
    "crops-64": _crop_set(
        "test_photo", "small", "four 64 px windows of each test photograph", "64 px, four a picture", WINDOW
    ),
    "captioned": Named("image", "captioned pictures of unseen captions, 224 px squares compared at 64 px", _captioned),
    "toon": _crop_set("test_toon", "reduced", "a 128 px window of each test stamp", f"128 px: {WINDOW}", WINDOW),
    "style": Named("image", "emoji of another style (Noto), 224 px squares compared at 64 px", _style),
    "speech": Named("audio", "40 English prompts and 5 LibriVox sentences of unheard voices, 16 kHz mono", _speech),
    "music": Named(
        "audio", "100 test tracks of music.jsonl, first 10 s, own rates", _listed("music.jsonl", 10.0), adjustable=True
    ),
    "sounds": Named(
        "audio",
        "100 test sounds of sounds.jsonl, at most 10 s, own rates",
        _listed("sounds.jsonl", 10.0),
        adjustable=True,
    ),
}
