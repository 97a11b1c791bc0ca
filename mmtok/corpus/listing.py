"""The files of a source: an order that no file system decides, keys without endings, and a list that is read in ranges.

One JSON line a file, ``[path, bytes, whole, beside]``: the path below the source's root; its size, -1 for a file that
is missing; 1 where the key keeps the ending because another file has the same stem; and where its text is: null, the
sizes of sidecars (``{"txt": 12}``), or the byte at which its row of an index begins. A million files are some 50 MB.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import hashlib
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

Line = list[Any]
MISSING = -1  # size of a file that is named but not there


@dataclasses.dataclass(frozen=True)
class Listing:
    """Lines in memory while a plan is made, in the file beside it afterwards; equal where the lines are.

    Args:
        size: in bytes. sha256: of all lines. memory / path: where they are.
    """

    size: int
    sha256: str
    memory: bytes | None = dataclasses.field(default=None, compare=False, repr=False)
    path: Path | None = dataclasses.field(default=None, compare=False)

    def open(self) -> BinaryIO:
        """All lines, as a file."""
        if self.memory is not None:
            return io.BytesIO(self.memory)
        if self.path is None or not self.path.is_file() or self.path.stat().st_size != self.size:
            raise ValueError(f"expected the plan's list of files ({self.size} bytes) at {self.path}; plan again")
        return self.path.open("rb")

    def __iter__(self) -> Iterator[Line]:
        with self.open() as f:
            for line in f:
                yield json.loads(line)

    def range(self, start: int, stop: int, crc32: int) -> list[Line]:
        """The lines from byte ``start`` to ``stop``. Raises ValueError where they are not those that were planned."""
        with self.open() as f:
            f.seek(start)
            data = f.read(stop - start)
        if zlib.crc32(data) != crc32:
            raise ValueError(f"{self.path}: bytes {start} to {stop} are not what the plan wrote; plan again")
        return [json.loads(line) for line in data.split(b"\n") if line]

    def write(self, path: Path) -> None:
        """Write all lines in blocks, aside and renamed."""
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with self.open() as f, aside.open("wb") as g:
                while block := f.read(2**20):
                    g.write(block)
                g.flush()
                os.fsync(g.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


class ListingWriter:
    """Lines, one after another."""

    def __init__(self) -> None:
        self.buffer, self.hash, self.position = io.BytesIO(), hashlib.sha256(), 0

    def add(self, path: str, size: int, whole: bool = False, beside: Any = None) -> bytes:
        """Write a line and return it. Escapes keep it ASCII, so names that are no UTF-8 survive as surrogates."""
        line = json.dumps([path, size, int(whole), beside], separators=(",", ":")).encode() + b"\n"
        self.buffer.write(line)
        self.hash.update(line)
        self.position += len(line)
        return line

    def finish(self) -> Listing:
        """What was written."""
        return Listing(self.position, self.hash.hexdigest(), memory=self.buffer.getvalue())


@dataclasses.dataclass
class Folder:
    """A folder below the root: its relative path with ``/`` at the end ("" for the root) and its files by name."""

    path: str
    files: list[tuple[str, int]]
    hidden: int


def walk(root: Path) -> Iterator[Folder]:
    """Every folder under ``root``, files before sub-folders, each in the order of names: sorted by (parents, name).

    Only one folder's names are held at a time. Names that begin with a dot are left out and counted; links are
    followed. Raises ValueError where a folder cannot be read or a link leads back to a folder that holds it.
    """
    waiting = [""]
    while waiting:
        folder = Folder(waiting.pop(), [], 0)
        below = []
        try:
            with os.scandir(root / folder.path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        folder.hidden += 1
                    elif entry.is_dir():
                        if entry.is_symlink():
                            refuse_loop(Path(entry.path))
                        below.append(entry.name)
                    elif entry.is_file():
                        folder.files.append((entry.name, entry.stat().st_size))
                    elif entry.is_symlink():  # to nothing: a file that is missing, which the run will list
                        folder.files.append((entry.name, MISSING))
        except OSError as e:
            raise ValueError(f"cannot read the folder {root / folder.path} ({e}); correct its permissions") from e
        folder.files.sort()
        waiting += [f"{folder.path}{name}/" for name in sorted(below, reverse=True)]
        yield folder


def refuse_loop(link: Path) -> None:
    """Raise ValueError where a link leads to a folder that holds it, which would be read for ever."""
    there, here = os.path.realpath(link), os.path.realpath(link.parent)
    if here == there or here.startswith(there.rstrip("/") + "/"):
        raise ValueError(f"{link} is a link that leads back to {there}, which holds it; remove the link")


def unique_keys(names: Sequence[str]) -> list[str]:
    """``names`` without their endings; those that would be equal keep theirs.

    A stem may also equal a name that was kept whole (``a.jpg``, ``a.png``, ``a.jpg.png``), hence the repetition.
    """
    keys = [os.path.splitext(name)[0] for name in names]
    while True:
        counts = collections.Counter(keys)
        kept = [name if counts[key] > 1 else key for name, key in zip(names, keys, strict=True)]
        if kept == keys:
            return keys
        keys = kept


def in_order(path: str) -> tuple[list[str], str]:
    """Sort key of a relative path that gives the order of `walk`."""
    *parents, name = path.split("/")
    return parents, name


def readable_name(name: str) -> str:
    r"""``name`` as valid Unicode: bytes of a file's name that are no UTF-8 become ``\xff``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace") if not name.isascii() else name


def first_differences(old: Listing, new: Listing, at_most: int = 3) -> str:
    """What differs between two lists of files, in words: how many, and the first of them."""
    told, count = [], 0
    for path, a, b in merged(iter(old), iter(new)):
        if a == b:
            continue
        count += 1
        if len(told) < at_most:
            told.append(f"{readable_name(path)} {difference(a, b)}")
    more = f" and {count - len(told)} more" if count > len(told) else ""
    return ", ".join(told) + more


def difference(a: Line | None, b: Line | None) -> str:
    """Between two lines of one file."""
    if b is None:
        return "is gone"
    if a is None:
        return "is new"
    if MISSING in (a[1], b[1]) and a[1] != b[1]:
        return "is missing now" if b[1] == MISSING else "was missing and is there now"
    return f"has {b[1]} bytes, had {a[1]}" if a[1] != b[1] else "has another text or key"


def merged(a: Iterator[Line], b: Iterator[Line]) -> Iterator[tuple[str, Line | None, Line | None]]:
    """Lines of two ordered lists side by side, None where one lacks the file; holds two lines at a time."""
    x, y = next(a, None), next(b, None)
    while x is not None or y is not None:
        i = None if x is None else in_order(x[0])
        j = None if y is None else in_order(y[0])
        take_x, take_y = i is not None and (j is None or i <= j), j is not None and (i is None or j <= i)
        path = x[0] if take_x and x is not None else y[0] if y is not None else ""
        yield path, x if take_x else None, y if take_y else None
        x = next(a, None) if take_x else x
        y = next(b, None) if take_y else y


BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(pattern: str) -> list[str]:
    """``a-{000..002}.tar`` or ``{a,b}.tar`` as a list; digits keep the width of the first number, as in a shell."""
    match = next((m for m in BRACES.finditer(pattern) if "," in m[1] or RANGE.fullmatch(m[1])), None)
    if match is None:
        return [pattern]
    numbers = RANGE.fullmatch(match[1])
    if numbers is None:
        choices = match[1].split(",")
    else:
        first, last = int(numbers[1]), int(numbers[2])
        width = max(len(n) for n in numbers.groups()) if any(n[0] == "0" for n in numbers.groups()) else 0
        step = 1 if first <= last else -1
        choices = [f"{n:0{width}d}" for n in range(first, last + step, step)]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return list(itertools.chain.from_iterable(expand_braces(head + choice + tail) for choice in choices))


def find_files(pattern: str) -> tuple[Path, list[tuple[str, int]]]:
    """The files that a path, a glob or braces name: the folder before the first wildcard, and (path below it, bytes).

    Raises ValueError where nothing fits, or a file that braces name is not there.
    """
    if os.path.isfile(pattern):
        root, names = Path(pattern).parent, [pattern]
    else:
        fixed = re.split(r"[*?\[{]", pattern, maxsplit=1)[0]
        root, names = Path(os.path.dirname(fixed)), []
        for one in expand_braces(pattern):
            names += sorted(n for n in glob.glob(one, recursive=True) if os.path.isfile(n)) or [one]
    absent = [name for name in names if not os.path.isfile(name)]
    if absent:
        shown = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
        raise ValueError(
            f"expected a folder, file, glob or braces such as train-{{0000..0012}}.tar: no file at {shown}"
        )
    below = {Path(os.path.relpath(name, root)).as_posix(): os.path.getsize(name) for name in names}
    return root, sorted(below.items(), key=lambda item: in_order(item[0]))


def file_names(paths: Sequence[str], stem: Callable[[str], str]) -> list[str]:
    """A name for every file of a source, of which keys begin: the path without its ending.

    Two of one name keep their endings, and so do all if one is the folder of another (``a.tar`` with ``b/c`` in it and
    ``a/b.tar`` with ``c`` would both give ``a/b/c``).
    """
    names = [stem(path) for path in paths]
    counts = collections.Counter(names)
    names = [path if counts[name] > 1 else name for path, name in zip(paths, names, strict=True)]
    known = set(names)
    nested = any("/".join(name.split("/")[:n]) in known for name in names for n in range(1, name.count("/") + 1))
    return list(paths) if nested or len(known) < len(names) else names
