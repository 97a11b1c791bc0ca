"""What the benchmark's language models read: training and held-out items, their codes, and items with a wrong half."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmtok.bench.contenders import Contender
from mmtok.bench.records import Item
from mmtok.data.audio import read_audio, resample
from mmtok.data.captioned import caption_split, square, style_of
from mmtok.data.images import read_image
from mmtok.data.packed import image_reader, random_crop
from mmtok.data.sources import MANIFESTS, Source, find_sources, held_out
from mmtok.tokens import Tokens, write_atomic

SHORTEST, LONGEST = 0.4, 4.0  # seconds of a clip
LONGER_SIDE = 384  # px of a picture before a window is drawn, as in the named sets
TEST_SHARE = 0.25  # of a folder without a list of splits
FEWEST = 20
ASSETS = Path(__file__).resolve().parents[1] / "assets"
LEVEL = 0.05  # RMS of spliced clips
FADE = 0.005  # seconds
BAD_FILE = (ValueError, OSError, RuntimeError)


class UnfitError(ValueError):
    """There is nothing to train or to test on; the text says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What items are brought to, as those of the test sets.

    Args:
        sample_rate: Hz of sounds, None keeps each one's own.
        size: (H, W) of pictures, None keeps each one's own, its longer side at most 384 px.
        squares: pictures are filled to squares, not cut.
    """

    sample_rate: int | None = None
    size: tuple[int, int] | None = None
    squares: bool = False


@dataclasses.dataclass(frozen=True)
class Entry:
    """An item before it is read."""

    key: str
    make: Callable[[Shape], Item]
    speaker: str = ""


@dataclasses.dataclass(frozen=True)
class Material:
    """Items to train on, to choose the best state by, and (sounds) to splice.

    Args:
        train, val, spare: no file is in two of them.
        about: of the protocol.
        may_test: of a test item's key: false where its file is trained on.
    """

    train: Sequence[Entry]
    val: Sequence[Entry]
    spare: Sequence[Entry]
    about: dict[str, Any]
    may_test: Callable[[str], bool]


def find_material(data: Path | None, modality: str, tested: Sequence[str], train: int, val: int) -> Material:
    """What ``data`` has.

    Args:
        data: a data folder with a list of splits, or any folder of files: then a quarter of them, by the hash of their
            paths, is tested and the rest trained on.
        modality: ``image`` or ``audio``.
        tested: keys of all test items; their files are not trained on.
        train, val: at most so many items, by the hash of their paths.

    Raises:
        UnfitError: no data folder, or fewer than 20 files to train on.
    """
    if data is None:
        raise UnfitError("no data folder to train on; give one (--data)")
    root: Path = data
    try:
        sources = find_sources(data, modality)
    except (ValueError, OSError) as e:
        raise UnfitError(f"nothing to train on: {' '.join(str(e).split())}") from e
    listed = (data / MANIFESTS[modality]).is_file()
    files = {key.partition("#")[0] for key in tested}
    if listed:
        known = [s for s in sources if s.split in ("train", "val") and _key(s, data) not in files]
        # Captioned pictures are tested by caption, across the list's splits: those are never trained on.
        known = [s for s in known if modality == "audio" or not s.text or caption_split(s.text) != "test"]
        parts = {split: [s for s in known if s.split == split] for split in ("train", "val")}
        split = f"splits train and val of {MANIFESTS[modality]}, without the test sets' files and captions"
    else:
        kept = [s for s in sources if not held_out(_key(s, data), TEST_SHARE)]
        parts = {"train": [], "val": []}
        for s in kept:
            parts["val" if held_out(f"val/{_key(s, data)}", 0.1) else "train"].append(s)
        split = f"no list of splits: {TEST_SHARE:.0%} of the files tested, by the hash of their paths, 10 % of the rest"
        split += " to choose the best state by"
    if len(parts["train"]) < FEWEST or not parts["val"]:
        raise UnfitError(
            f"too few files: expected at least {FEWEST} to train on and one to validate on, got "
            f"{len(parts['train'])} and {len(parts['val'])} under {data}; give a folder with more"
        )
    order = {name: sorted(part, key=lambda s: _digest(_key(s, root))) for name, part in parts.items()}
    spare = order["val"][val:] if modality == "audio" else []
    chosen = {"train": order["train"][:train], "val": order["val"][:val], "spare": spare}
    found = {name: [_entry(s, root, modality) for s in part] for name, part in chosen.items()}
    about = {"training_source": split, "training_selection": f"first {train} by the hash of their paths"}

    def may_test(key: str) -> bool:
        name = key.partition("#")[0]
        return listed or not (root / name).is_file() or held_out(name, TEST_SHARE)

    return Material(**found, about=about, may_test=may_test)


def smoke_material(modality: str) -> Material:
    """Pieces of the clip or the picture that ships: enough to see that everything runs."""
    if modality == "image":
        picture = read_image(ASSETS / "chelsea.jpg")
        entries = [_tile(picture, i) for i in range(8)]
    else:
        clip, rate = read_audio(ASSETS / "speech.flac")
        entries = [_piece(clip, rate, i) for i in range(10)]
    about = {"training_source": "pieces of mmtok/assets, a smoke run", "training_selection": "all"}
    return Material(entries[:4], entries[4:6], entries[6:], about, lambda key: True)


def _tile(picture: Tensor, i: int) -> Entry:
    part = picture[:, 30 * (i // 4) :, 40 * (i % 4) :]

    def make(shape: Shape) -> Item:
        x = torch.nn.functional.interpolate(part[None], shape.size or (64, 64), mode="bicubic", antialias=True)[0]
        return Item(f"smoke-{i}", _eight_bits(x), text="photo of cat")

    return Entry(f"smoke-{i}", make)


def _piece(clip: Tensor, rate: int, i: int) -> Entry:
    start = i * rate // 2

    def make(shape: Shape) -> Item:
        wanted = shape.sample_rate or rate
        return Item(f"smoke-{i}", resample(clip[:, start : start + rate // 2], rate, wanted), wanted)

    return Entry(f"smoke-{i}", make, speaker="ab"[i % 2])


def _entry(source: Source, data: Path, modality: str) -> Entry:
    key = _key(source, data)

    def sound(shape: Shape) -> Item:
        x, rate = read_audio(source.path)
        wanted = shape.sample_rate or rate
        x = resample(x[:, : round(LONGEST * rate)].mean(0, keepdim=True), rate, wanted)
        if x.shape[1] < SHORTEST * wanted:
            raise ValueError(f"{key}: shorter than {SHORTEST} s")
        return Item(key, x, wanted, source.text)

    def picture(shape: Shape) -> Item:
        side = max(shape.size) if shape.squares and shape.size else LONGER_SIDE
        pixels = image_reader(side)(source.path)
        if shape.size is None:
            x = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255
        elif shape.squares:
            x = torch.from_numpy(square(pixels, side)).permute(2, 0, 1).float() / 255
        else:
            x = _eight_bits(random_crop(pixels, shape.size, np.random.default_rng(int(_digest(key)[:8], 16))))
        return Item(key, x, text=f"{style_of(source)} of {source.text}" if source.text else None)

    return Entry(key, sound if modality == "audio" else picture, source.speaker)


def codes_of(
    contender: Contender, entries: Sequence[Entry], shape: Shape, folder: Path, progress: bool, name: str
) -> tuple[list[Tokens], dict[str, int]]:
    """The codes of entries, kept in ``folder`` for every rate of the tokenizer, and how many were left out by reason.

    Left out is what cannot be read or is too short, and what has no text for a contender that is given texts.
    """
    whole = dataclasses.replace(contender, num_codebooks=None)  # the first k levels of all are those of asking for k
    about = [contender.tokenizer.fingerprint, str(contender.target_bytes), contender.num_tokens, contender.with_text]
    about += [getattr(contender.tokenizer, "mitigated", True), dataclasses.astuple(shape), [e.key for e in entries]]
    path = folder / f"{name}-{_digest(json.dumps(about))[:16]}.safetensors"
    counts = path.with_suffix(".json")
    if not (path.is_file() and counts.is_file()):
        found, left_out = [], {}
        for entry in tqdm(entries, desc=f"codes, {name}", unit="item", disable=not progress, leave=False):
            try:
                item = entry.make(shape)
            except BAD_FILE as e:
                reason = "shorter than 0.4 s" if "shorter than" in str(e) else "not readable"
                left_out[reason] = left_out.get(reason, 0) + 1
                continue
            if contender.with_text and item.text is None:
                left_out["without text"] = left_out.get("without text", 0) + 1
                continue
            found.append(plain_tokens(whole.encode(item)))
        if not found:
            raise UnfitError(f"none of {len(entries)} {name} items can be used: {left_out}")
        folder.mkdir(parents=True, exist_ok=True)
        Tokens.concat(found).save(path)
        write_atomic(counts, json.dumps(left_out).encode())
    joined = Tokens.load(path)
    levels = contender.num_codebooks
    joined = joined if levels is None else joined.keep(num_codebooks=levels)
    return [joined[i] for i in range(len(joined))], json.loads(counts.read_text())


def plain_tokens(tokens: Tokens) -> Tokens:
    """Codes without their side entries, on the CPU: all that a model reads.

    Raises:
        UnfitError: sound of several channels, whose codes stand one channel behind the other.
    """
    if "channels" in tokens.side and tokens.spec.modality == "audio" and int(tokens.side["channels"].max()) > 1:
        raise UnfitError("sounds of several channels; test a mono mix (--mono)")
    return Tokens(tokens.codes.cpu(), tokens.lengths.cpu(), tokens.spec)


@dataclasses.dataclass(frozen=True)
class Couple:
    """Two real items and the two with each other's second half: real, real, spliced, spliced."""

    items: tuple[Item, Item, Item, Item]


def speaker_couples(spare: Sequence[Entry], shape: Shape, seconds: float, count: int, same: bool) -> list[Couple]:
    """Couples of clips of two speakers, or of two clips of one speaker (``same``), no clip in two couples.

    Clips are cut to ``seconds`` (the shorter one of a couple, at least half of it), brought to one loudness and faded
    over 5 ms at the join.

    Raises:
        UnfitError: no speakers are known, or fewer than two couples.
    """
    if not any(e.speaker for e in spare):
        raise UnfitError(
            "no speakers are known of the held-out clips; give a data folder whose speech.jsonl names them"
        )
    waiting: list[tuple[str, Item]] = []
    found: list[Couple] = []
    for entry in spare:
        if len(found) == count:
            break
        try:
            item = entry.make(shape)
        except BAD_FILE:
            continue
        assert item.sample_rate is not None
        loudness = item.x.square().mean().sqrt()
        if not entry.speaker or item.x.shape[1] < seconds / 2 * item.sample_rate or loudness < 1e-4:
            continue
        item = dataclasses.replace(item, x=(item.x * LEVEL / loudness).clamp(-1, 1))
        partner = next(
            (w for w in waiting if (w[0] == entry.speaker) == same and w[1].sample_rate == item.sample_rate), None
        )
        if partner is None:
            waiting.append((entry.speaker, item))
        else:
            waiting.remove(partner)
            found.append(_spliced_sounds(partner[1], item, seconds))
    if len(found) < 2:
        raise UnfitError(f"fewer than two couples of held-out clips of at least {seconds / 2:g} s; give more clips")
    return found


def _spliced_sounds(a: Item, b: Item, seconds: float) -> Couple:
    rate = a.sample_rate or 0
    length = min(a.x.shape[1], b.x.shape[1], round(seconds * rate))
    x, y = a.x[:, :length], b.x[:, :length]
    ramp = ((torch.arange(length) - length // 2) / (FADE * rate) + 0.5).clamp(0, 1)

    def item(key: str, samples: Tensor) -> Item:
        return Item(key, samples, rate)

    mixed = (item(f"{a.key}|{b.key}", x * (1 - ramp) + y * ramp), item(f"{b.key}|{a.key}", y * (1 - ramp) + x * ramp))
    return Couple((item(a.key, x), item(b.key, y), *mixed))


def picture_couples(items: Sequence[Item], count: int) -> list[Couple]:
    """Couples of test pictures of one size, the i-th with one half a set further on.

    Raises:
        UnfitError: fewer than two couples.
    """
    half, found = len(items) // 2, []
    for a, b in zip(items[:half], items[half:], strict=False):
        if len(found) < count and a.x.shape == b.x.shape and a.x.shape[1] > 1:
            cut = a.x.shape[1] // 2
            ab, ba = (Item(f"{p.key}|{q.key}", torch.cat([p.x[:, :cut], q.x[:, cut:]], 1)) for p, q in ((a, b), (b, a)))
            found.append(Couple((Item(a.key, a.x), Item(b.key, b.x), ab, ba)))
    if len(found) < 2:
        raise UnfitError(f"fewer than two couples of one size among {len(items)} pictures; test more pictures")
    return found


def _eight_bits(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round() / 255


def _key(source: Source, data: Path) -> str:
    return source.path.relative_to(data).as_posix()


def _digest(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()
