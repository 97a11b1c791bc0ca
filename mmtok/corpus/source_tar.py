"""Tar shards as a source, with WebDataset's naming: a sample is the run of members of one key.

A member's key is its path up to the first dot of the base name, the rest its extension (lower case). Names without a
key or extension and ``__names__`` of meta data are no members, as in WebDataset.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import itertools
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmtok.corpus.beside import media_of, text_and_extra
from mmtok.corpus.listing import ListingWriter, file_names, readable_name
from mmtok.corpus.records import Failure, InputShard, Plan, PlanSettings, Sample

MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
META = re.compile(r"__[^/]*__(/|$)")
TEXTS = ("txt", "json", "cls")
SNIFFED = 200  # members of a tar that are looked at when a plan is made
READ_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError)


class BrokenTarError(Exception):
    """A tar that cannot be read on; the message tells where it broke.

    ``key``: of the sample that the broken member belongs to, "" behind the end mark, None where that is unknown.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class _Unpacked:
    """A gzip that gives what it has: where it is cut, a longer read would raise and lose the bytes before."""

    def __init__(self, stream: gzip.GzipFile) -> None:
        self.stream = stream

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes, none at the end."""
        return self.stream.read1(size)


class _Header(tarfile.TarInfo):
    """Tells its archive how it ends: tarfile itself takes a cut between members, or a damaged header, for the end."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> tarfile.TarInfo:
        archive = tarfile
        try:
            return super().fromtarfile(archive)
        except Exception as e:
            if isinstance(archive, _Archive):
                archive.end = type(e).__name__
            raise


class _Archive(tarfile.TarFile):
    """A tar that knows how it ended: ``EOFHeaderError`` is the mark at the end of a whole one."""

    tarinfo = _Header
    members: list[tarfile.TarInfo]
    end = ""


ENDS = {
    "EOFHeaderError": "",
    "EmptyHeaderError": "the file ends without an end mark",
    "TruncatedHeaderError": "the file ends within a header",
    "InvalidHeaderError": "a header is damaged",
}


def split_name(name: str) -> tuple[str, str] | None:
    """``a/b.left.PNG`` -> (``a/b``, ``left.png``); None for what is no member of a sample."""
    match = None if META.match(name) else MEMBER.fullmatch(name)
    return None if match is None else (match[1], match[2].lower())


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, str, bytes | None]]:
    """(key, extension, bytes of a wanted one) of every member, front to back. Raises `BrokenTarError` at a break."""
    last = None
    with contextlib.ExitStack() as stack:
        try:
            stream: Any = stack.enter_context(path.open("rb"))
            packed = stream.read(2) == b"\x1f\x8b"
            stream.seek(0)
            if packed:
                stream = _Unpacked(stack.enter_context(gzip.GzipFile(fileobj=stream)))
            where = " of what it unpacks to" if packed else f" of {path.stat().st_size}"
            tar = stack.enter_context(_Archive.open(fileobj=stream, mode="r|"))
        except READ_ERRORS as e:
            raise BrokenTarError(f"{path.name} cannot be read as a tar ({e})") from e
        while True:
            data, split, at = None, None, tar.offset
            try:
                info = tar.next()
                tar.members = []  # else it keeps every header
                if info is None:
                    break
                split = split_name(info.name) if info.isreg() else None
                if split is not None and wanted(split[1]):
                    file = tar.extractfile(info)
                    data = b"" if file is None else file.read()
            except READ_ERRORS as e:
                key = None if split is None else _key(split[0])
                raise BrokenTarError(_where(path, at, where, last, str(e)), key) from e
            last = info.name
            if split is not None:
                yield _key(split[0]), readable_name(split[1]), data
        why = ENDS.get(tar.end, tar.end)
        if why:
            raise BrokenTarError(_where(path, tar.offset, where, last, why))
        try:  # to the end of the file: a gzip's checksum stands there, and joined tars hide behind the first one's mark
            rest = iter(lambda: tar.fileobj.read(2**16) if tar.fileobj else b"", b"")
            if any(block.strip(b"\0") for block in rest):
                more = "more data behind the end mark (joined tars?) is not read"
                raise BrokenTarError(_where(path, tar.offset, where, last, more), "")
        except READ_ERRORS as e:
            raise BrokenTarError(_where(path, tar.offset, where, last, str(e)), "") from e


def _key(prefix: str) -> str:
    """``./a/b``, as ``tar -c .`` names members, -> ``a/b``."""
    return readable_name(prefix).removeprefix("./")


def _where(path: Path, at: int, of: str, last: str | None, why: str) -> str:
    after = "before its first member" if last is None else f"after member {readable_name(last)}"
    return f"{path.name} breaks at byte {at}{of}, {after}: {why or 'unreadable'}"


def stem(path: str) -> str:
    """``a/b.tar.gz`` -> ``a/b``."""
    return re.sub(r"\.(tar|tar\.gz|tgz)$", "", path, flags=re.IGNORECASE)


def plan_tars(
    root: Path, files: Sequence[tuple[str, int]], settings: PlanSettings
) -> tuple[ListingWriter, list[InputShard], str, dict[str, Any]]:
    """One shard a tar, the modality, and what was found in the first ones.

    Raises ValueError where the first tars hold nothing of the modality, or both and none was chosen.
    """
    names = file_names([path for path, _ in files], stem)
    listing, shards = ListingWriter(), []
    for number, ((path, size), name) in enumerate(zip(files, names, strict=True)):
        listing.add(path, size)
        part = {"file": path, "name": readable_name(name)}
        shards.append(InputShard(number, [part], None, max(0, size)))
    seen: dict[str, list[str]] = {}
    for shard in shards[:3]:
        with contextlib.suppress(BrokenTarError):  # the run will tell
            some = itertools.islice(members(root / shard.parts[0]["file"], lambda _: False), SNIFFED)
            for key, extension, _ in some:
                seen.setdefault(extension, []).append(f"{shard.parts[0]['name']}/{key}")
        if any(media_of("." + extension) for extension in seen):
            break
    kinds = {media_of("." + e) for e in seen if _takes(e, media_of("." + e), settings.extension)} - {None}
    looked = f"looked at the first tar of {len(files)}: {', '.join(sorted(seen)) or 'no readable member'}"
    if settings.modality is None and len(kinds) > 1:
        raise ValueError(f"the tars under {root} hold pictures and sounds ({looked}): choose the modality")
    modality = settings.modality or next(iter(kinds), None)
    if modality is None or (seen and modality not in kinds):
        wanted = settings.modality or "image or audio"
        raise ValueError(f"expected {wanted} members in the tars under {root}; {looked}; choose another source")
    keys = next((seen[e] for e in seen if media_of("." + e) == modality), [])
    texts = [f".{e}" for e in TEXTS if e in seen]
    return listing, shards, modality, {"examples": keys[:3], "texts": texts, "members": sorted(seen)}


def _takes(extension: str, modality: str | None, only: str | None) -> bool:
    """Whether a member is a sample's picture or sound."""
    if modality is None or media_of("." + extension) != modality:
        return False
    return only is None or extension == only.lower().lstrip(".")


@dataclasses.dataclass
class _Group:
    """The run of members of one key."""

    key: str
    found: dict[str, bytes | None] = dataclasses.field(default_factory=dict)
    doubled: list[str] = dataclasses.field(default_factory=list)

    def add(self, extension: str, data: bytes | None) -> None:
        if extension in self.found:
            self.doubled.append(extension)
        else:
            self.found[extension] = data


def read(plan: Plan, shard: InputShard) -> Iterator[Sample | Failure]:
    """Samples of a tar; at a break the run of members that was being read is lost, since part of it may be missing."""
    settings = PlanSettings(**plan.settings)
    for part in shard.parts:
        path, name = Path(plan.root) / part["file"], part["name"]
        group: _Group | None = None
        try:
            for key, extension, data in members(
                path, lambda e: e in TEXTS or _takes(e, plan.modality, settings.extension)
            ):
                if group is not None and group.key != key:
                    yield from _samples(group, name, plan.modality, settings, shard.number)
                if group is None or group.key != key:
                    group = _Group(key)
                group.add(extension, data)
        except BrokenTarError as e:
            lost = "" if group is None else group.key
            if group is not None and e.key is not None and e.key != group.key:  # the next sample is what broke
                yield from _samples(group, name, plan.modality, settings, shard.number)
                lost = e.key
            lost = f"; {lost} and all that follows is lost" if lost else ""
            yield Failure(name, f"{e}{lost}", shard.number)
        else:
            if group is not None:
                yield from _samples(group, name, plan.modality, settings, shard.number)


def _samples(
    group: _Group, name: str, modality: str, settings: PlanSettings, number: int
) -> Iterator[Sample | Failure]:
    """The sample of a run of members; several pictures or sounds of one key are several, which keep their endings."""
    key = f"{name}/{group.key}"
    for extension in group.doubled:
        yield Failure(key, f"duplicate key: a second member .{extension}; the first stays", number)
    media = [e for e in group.found if _takes(e, modality, settings.extension)]
    if not media:
        wanted = f".{settings.extension.lstrip('.')}" if settings.extension else modality
        yield Failure(key, f"no {wanted} member, only {', '.join('.' + e for e in group.found)}", number)
        return
    beside = {e: data for e in TEXTS if (data := group.found.get(e)) is not None}
    for extension in media:
        own = key if len(media) == 1 else f"{key}.{extension}"
        try:
            text, extra = text_and_extra(beside, settings.text_column)
        except ValueError as e:
            yield Failure(own, str(e), number)
        else:
            yield Sample(own, data=group.found[extension], text=text, extra=extra)
