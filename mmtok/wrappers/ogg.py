"""Ogg files (RFC 3533) of one stream: their packets, also of a file that was cut, and the same bytes every time."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

SERIAL = 1  # of the stream; writers draw one, so that files can be joined
HEAD = struct.Struct("<4sBBqIIIB")  # magic, version, flags, granule, serial, sequence, checksum, segments
POLYNOMIAL = 0x04C11DB7


def _remainders() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1 ^ (POLYNOMIAL if value & 0x80000000 else 0)) & 0xFFFFFFFF
        table.append(value)
    return table


REMAINDERS = _remainders()


def checksum(page: bytes) -> int:
    """CRC-32 of a page whose checksum field counts as zero, high bits first."""
    value = 0
    for byte in page[:22] + bytes(4) + page[26:]:
        value = (value << 8 & 0xFFFFFFFF) ^ REMAINDERS[value >> 24 ^ byte]
    return value


@dataclasses.dataclass(frozen=True)
class Page:
    """One page: ``granule`` is the position of its end, ``segments`` the lengths of the pieces of ``body``."""

    granule: int
    serial: int
    segments: bytes
    body: bytes
    begin: int
    end: int
    whole: bool


def pages(data: bytes) -> Iterator[Page]:
    """The pages of a file; the last one may lack its end.

    Raises:
        ValueError: something that is no page, or a whole page that was changed.
    """
    at = 0
    while at < len(data):
        if data[at : at + 4] != b"OggS"[: len(data) - at]:
            raise ValueError(f"no Ogg page at byte {at}")
        body = at + HEAD.size
        if body > len(data):
            return
        _, _, _, granule, serial, _, expected, count = HEAD.unpack_from(data, at)
        segments = data[body : body + count]
        end = body + count + sum(segments)
        whole = len(segments) == count and end <= len(data)
        if whole and checksum(data[at:end]) != expected:
            raise ValueError(f"the Ogg page at byte {at} was changed: its checksum differs")
        if len(segments) == count:
            yield Page(granule, serial, segments, data[body + count : end], at, end, whole)
        at = end if whole else len(data)


def packets(data: bytes) -> tuple[list[bytes], int | None]:
    """The whole packets of a file that may have been cut, and its last position; None where the end is missing.

    Raises:
        ValueError: as `pages`, or several streams.
    """
    found: list[bytes] = []
    begun = b""
    granule, serial, last = None, None, 0
    for page in pages(data):
        if serial not in (None, page.serial):
            raise ValueError("expected an Ogg file of one stream, got several")
        serial, at = page.serial, 0
        for length in page.segments:
            if at + length > len(page.body):
                return found, None
            begun += page.body[at : at + length]
            at += length
            if length < 255:  # the end of a packet
                found.append(begun)
                begun = b""
        last = page.end if page.whole else 0
        granule = page.granule if data[page.begin + 5] & 4 else None  # the flag of the last page
    return found, granule if last == len(data) else None


def with_serial(data: bytes, serial: int = SERIAL) -> bytes:
    """The same file with a serial number that was not drawn. Raises ValueError as `pages`."""
    out = bytearray()
    for page in pages(data):
        part = bytearray(data[page.begin : page.end])
        part[14:18] = struct.pack("<I", serial)
        part[22:26] = struct.pack("<I", checksum(bytes(part)))
        out += part
    return bytes(out)
