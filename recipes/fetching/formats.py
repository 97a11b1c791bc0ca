"""Readers for what the packages hold: archive members, Qt resource files, Debian copyright files, Lua dialogues.

Standard library only; sound needs PyAV and images need Pillow, both imported where they are used.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from .clients import FetchError


def safe_name(name: str) -> str:
    """A member name without a leading `./`; ValueError when it would leave the folder it is unpacked into."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or not parts:
        raise ValueError(f"unsafe member name {name!r}")
    return str(PurePosixPath(*parts))


def tar_members(tar: tarfile.TarFile, keep: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        # Links are skipped: in these packages they are second names of a picture that is there anyway.
        if member.isfile() and keep(name := safe_name(member.name)):
            handle = tar.extractfile(member)
            if handle is not None:
                yield name, handle.read()


def members(path: Path, keep: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every regular file in a .deb, .whl or .tgz whose name `keep` accepts; FetchError if broken."""
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if not info.is_dir() and keep(name := safe_name(info.filename)):
                        yield name, archive.read(info)
        elif path.suffix == ".tgz":
            with tarfile.open(path, "r:gz") as tar:
                yield from tar_members(tar, keep)
        elif path.suffix == ".deb":
            yield from deb_members(path, keep)
        else:
            raise FetchError(f"cannot unpack {path.name}: expected .deb, .whl or .tgz")
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, ValueError) as error:
        raise FetchError(f"{path.name} is damaged ({error}): delete it and run again") from error


def deb_members(path: Path, keep: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    if shutil.which("dpkg-deb") is None:
        raise FetchError("`dpkg-deb` is not on this machine: install dpkg, or leave apt packages out with --only")
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                yield from tar_members(tar, keep)
            while process.stdout.read(1 << 20):  # the padding after the last member; closing early would break the pipe
                pass
        finally:
            process.stdout.close()
    if process.returncode:
        raise FetchError(f"dpkg-deb could not read {path.name}: delete it and run again")


def rcc_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(path, content) of every file in a Qt binary resource, format 1 to 3.

    Layout: magic `qres`, then big-endian version and the offsets of the tree, the data and the names. A tree node is a
    name offset (u32) and flags (u16: 1 zlib, 2 folder, 4 zstd); a folder adds its child count and first child, a file
    adds country, language (u16 each) and its data offset; from version 2 on each node ends with a u64 time.
    Raises ValueError for other data and for zstd members, which no Qt 5 package has.
    """
    if data[:4] != b"qres":
        raise ValueError("not a Qt resource file: the magic is missing")
    version, tree, blobs, names = struct.unpack_from(">4I", data, 4)
    if not 1 <= version <= 3:
        raise ValueError(f"Qt resource format {version} is unknown, expected 1 to 3")
    size = 14 if version == 1 else 22

    def name_at(offset: int) -> str:
        (length,) = struct.unpack_from(">H", data, names + offset)
        start = names + offset + 6  # the length, then a u32 hash
        return data[start : start + 2 * length].decode("utf-16-be")

    stack = [(0, "")]
    while stack:
        index, parent = stack.pop()
        node = tree + index * size
        name, flags = struct.unpack_from(">IH", data, node)
        path = f"{parent}/{name_at(name)}".lstrip("/") if index else ""
        if flags & 2:
            count, first = struct.unpack_from(">II", data, node + 6)
            stack.extend((child, path) for child in range(first, first + count))
            continue
        (offset,) = struct.unpack_from(">I", data, node + 10)
        (length,) = struct.unpack_from(">I", data, blobs + offset)
        content = data[blobs + offset + 4 : blobs + offset + 4 + length]
        if flags & 4:
            raise ValueError(f"{path} is packed with zstd")
        yield safe_name(path), zlib.decompress(content[4:]) if flags & 1 else content  # 4 bytes: the unpacked size


def copyright_rules(text: str) -> list[tuple[str, str]]:
    """(glob, licence) pairs of a machine-readable Debian copyright file, in file order; empty for a free-form one."""
    rules = []
    for paragraph in re.split(r"\n\s*\n", text):
        files = re.search(r"^Files:((?:.*\n)(?:[ \t]+.*\n)*)", paragraph + "\n", re.M)
        licence = re.search(r"^License:[ \t]*(\S.*)", paragraph, re.M)
        if files and licence:
            rules += [(glob, licence[1].strip()) for glob in files[1].replace(",", " ").split()]
    return rules


def licence_of(rules: list[tuple[str, str]], path: str, default: str) -> str:
    """The licence that the last matching rule gives (the Debian rule), else `default`.

    Image endings are not compared: packages convert pictures at build time and list them by their source's ending.
    """
    stem = PICTURE_ENDING.sub("", path)
    matching = (licence for glob, licence in reversed(rules) if fnmatch.fnmatchcase(stem, PICTURE_ENDING.sub("", glob)))
    return next(matching, default)


PICTURE_ENDING = re.compile(r"\.(jpe?g|png|webp|gif)$")
LUA_CALL = re.compile(r'^[ \t]*dialog(Id|Str)\(\s*((?:"(?:[^"\\]|\\.)*"\s*,?\s*)+)\)', re.M)
LUA_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


def lua_dialogue(text: str) -> dict[str, tuple[str, str, str | None]]:
    """line name -> (font, English text, translated text or None) of a Fillets dialogue script."""
    lines: dict[str, tuple[str, str, str | None]] = {}
    current = None
    for kind, arguments in LUA_CALL.findall(text):
        strings = [re.sub(r"\\(.)", r"\1", piece) for piece in LUA_STRING.findall(arguments)]
        if kind == "Id" and len(strings) == 3:
            current = strings[0]
            lines[current] = (strings[1], strings[2], None)
        elif kind == "Str" and current:
            font, english, _ = lines[current]
            lines[current] = (font, english, strings[0].strip() or None)
            current = None
    return lines


def prompt_list(text: str) -> dict[str, str | None]:
    """prompt name -> words of an Asterisk prompt list (`name: words`), None where it is a tone and not speech."""
    prompts: dict[str, str | None] = {}
    for line in text.lstrip("\ufeff").splitlines():
        name, colon, words = line.partition(":")
        if colon and not line.startswith(";"):
            spoken = re.sub(r"\[[^\]]*\]", " ", words)  # notes on tones and noises stand in square brackets
            prompts[name.strip()] = " ".join(spoken.split()) or None
    return prompts


def read_sound(path: Path):
    """(samples (L,) float32 in [-1, 1], sample rate in Hz); channels are averaged. OSError if it is unreadable."""
    import soundfile

    if path.suffix != ".g722":
        try:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise OSError(str(error)) from error
        return samples.mean(1), rate
    import av
    import numpy as np

    # A raw G.722 file has no header, so the format has to be named.
    with av.open(str(path), format="g722") as container:
        stream = container.streams.audio[0]
        frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(stream)]
        rate = stream.rate
    samples = np.concatenate(frames) if frames else np.zeros(0, np.int16)
    return samples.astype(np.float32) / 32768.0, rate
