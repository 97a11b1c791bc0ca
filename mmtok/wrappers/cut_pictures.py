"""Picture files that may have been cut: the size they declare, before anything is allocated, and what can be read."""

from __future__ import annotations

import dataclasses
import struct

MAX_BYTES = 2**24  # of one file: the largest count of tokens; a sharper or larger picture is refused


class FileError(ValueError):
    """Bytes that are no picture of the format, or too few of them."""


@dataclasses.dataclass(frozen=True)
class Readable:
    """What can be read of a file that may have been cut.

    Args:
        size: (H, W) as the file declares; None where it was cut before.
        data: the file, completed where its end is missing; None where not a pixel of it is left.
    """

    size: tuple[int, int] | None
    data: bytes | None


def readable_jpeg(data: bytes) -> Readable:
    """A JPEG file, with the end marker where its end is missing: the decoder makes grey of the blocks before it."""
    _require_start(data, b"\xff\xd8\xff", "JPEG")
    size, at = None, 2
    while at + 4 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if data[at] != 0xFF or length < 2:
            raise FileError(f"no marker at byte {at}")
        if len(body) < length - 2:
            break
        if marker in (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)) and length >= 7:
            size = struct.unpack(">HH", body[1:5])
        at += 2 + length
        if marker == 0xDA:  # what follows is the scan
            if at >= len(data):
                break
            return Readable(size, data if data.endswith(b"\xff\xd9") else data + b"\xff\xd9")
    return Readable(size, None)


def readable_webp(data: bytes) -> Readable:
    """A lossy WebP file, with zeros where its end is missing: the blocks that were cut off come out arbitrary."""
    _require_start(data[:4], b"RIFF", "WebP")
    _require_start(data[8:16], b"WEBPVP8 ", "lossy WebP without extensions")
    if len(data) < 30:
        return Readable(None, None)
    whole = 8 + int.from_bytes(data[4:8], "little")
    if data[23:26] != b"\x9d\x01\x2a" or not 30 <= whole <= MAX_BYTES:
        raise FileError("expected a key frame of lossy WebP")
    width, height = (v & 0x3FFF for v in struct.unpack("<HH", data[26:30]))
    if len(data) == 30 or len(data) >= whole:
        return Readable((height, width), None if len(data) == 30 else data)
    # Zeros last less long than what they stand for, so both partitions are made longer: a symbol of zeros takes 7 bits
    # at most, and a block of 16 x 16 pixels has under 64 of them.
    spare = 64 * -(-width // 16) * -(-height // 16)
    tag = int.from_bytes(data[20:23], "little")  # five flags, then the length of the first partition
    first = tag >> 5
    if len(data) < 30 + first:
        first = min(first + spare, 2**19 - 1)
    rest = data[23:].ljust(max(whole - 23, 7 + first), b"\0")
    frame = (first << 5 | tag & 31).to_bytes(3, "little") + rest + bytes(spare)
    frame += bytes(len(frame) % 2)
    chunk = b"WEBPVP8 " + len(frame).to_bytes(4, "little") + frame
    return Readable((height, width), b"RIFF" + len(chunk).to_bytes(4, "little") + chunk)


def readable_avif(data: bytes) -> Readable:
    """An AVIF file, whole: of a part its decoder makes nothing, or nothing that is sure."""
    at = 0
    _require_start(data[4:12], b"ftypavif", "AVIF")
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        at += length
        if length < 8 or at > len(data):
            raise FileError("an AVIF file decodes whole only, and its end is missing")
    place = data.find(b"ispe")
    if place < 0 or data.find(b"mdat") < 0 or len(data) < place + 16:
        raise FileError("an AVIF file decodes whole only, and its end is missing")
    width, height = struct.unpack(">II", data[place + 8 : place + 16])
    return Readable((height, width), data)


def readable_jpeg2000(data: bytes) -> Readable:
    """A JPEG 2000 codestream of one tile, with zeros where its end is missing: decoders take them for empty packets."""
    _require_start(data, b"\xff\x4f\xff\x51\x00\x2f\x00\x00", "JPEG 2000 codestream")
    if len(data) < 51:
        return Readable(None, None)
    width, height = struct.unpack(">II", data[8:16])
    # One tile from the origin, three components of 8 bits: anything else could make the decoder allocate at will.
    if data[16:51] != struct.pack(">6IH", 0, 0, width, height, 0, 0, 3) + bytes([7, 1, 1] * 3):
        raise FileError("expected a codestream of one tile with three components of 8 bits")
    size, at = (height, width), 51
    while at + 4 <= len(data):
        marker, length = struct.unpack(">HH", data[at : at + 4])
        if marker >> 8 != 0xFF or length < 2:
            raise FileError(f"no marker at byte {at}")
        if marker == 0xFF52 and len(data) > at + 4 and data[at + 4] != 0:  # Scod
            raise FileError("expected a codestream without precincts")
        if marker == 0xFF90:  # start of the tile
            end = at + int.from_bytes(data[at + 6 : at + 10], "big")
            begin = data.find(b"\xff\x93", at)
            if begin < 0 or begin + 2 >= len(data):
                break
            if not begin + 2 <= end <= MAX_BYTES:
                raise FileError(f"expected a tile of at most {MAX_BYTES} bytes, got one of {end - at}")
            if len(data) < end:  # a packet whose header was cut may ask for more than was there: there is twice as much
                length = (2 * end - at).to_bytes(4, "big")
                data = (data[: at + 6] + length + data[at + 10 :]).ljust(2 * end, b"\0")
                end = len(data)
            return Readable(size, data[:end] + b"\xff\xd9")
        at += 2 + length
    return Readable(size, None)


def _require_start(data: bytes, start: bytes, what: str) -> None:
    if data[: len(start)] != start[: len(data)]:
        raise FileError(f"no {what} file: it begins with {data[: len(start)]!r}")
