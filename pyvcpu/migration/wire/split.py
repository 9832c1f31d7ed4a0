"""Sections that nobody described, split by what the stream says of itself.

    FULL  data ?  footer  FULL  data ?  footer ... 00  06 length {"devices": [...]}
    |<-------------- buffered ------------->|       |<-- says how long each data is -->|

A section carries no length. The vmdesc at the end names every field of every FULL section with its
size, so the buffered bytes are split by it, and every head and footer must then be where it says.
Of a stream that ended before its vmdesc, footers are all there is: a guess, and marked as one.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyvcpu.errors import MigrationError
from pyvcpu.migration.wire.records import RecordType

MAX_CANDIDATES = 64
"""Places that look like the start of a vmdesc and are none; more are an attack."""

MAX_DEPTH = 32

CANDIDATE = 8
"""Bytes from EOF to the first two of the JSON."""

_OPENING = re.compile(rb"\{[\s\"]")


@dataclass(frozen=True)
class RawSection:
    """A FULL section cut out of buffered bytes; positions count from their start."""

    start: int
    data_start: int
    data_end: int
    end: int
    section_id: int
    name: str
    instance_id: int
    version_id: int
    by: str = "vmdesc"


def parse_vmdesc(text: bytes, offset: int) -> dict[str, Any]:
    """The JSON of a vmdesc that is byte ``offset`` of the stream; an empty one is allowed. MigrationError."""
    if not text:
        return {}
    try:
        description = json.loads(text)
        if not isinstance(description, dict):
            raise TypeError
    except (ValueError, TypeError, RecursionError):
        raise MigrationError(
            "the description at the end of the stream is not a JSON object",
            offset=offset,
            section="vmdesc",
            expected="JSON",
            got=text[:60],
        ) from None
    return description


def try_vmdesc(text: bytes | bytearray) -> dict[str, Any] | None:
    """The JSON where this is a vmdesc that lists devices, else None."""
    if text[-1] != ord("}"):
        return None
    try:
        description = json.loads(text)
    except (ValueError, RecursionError):
        return None
    listed = isinstance(description, dict) and isinstance(description.get("devices"), list)
    return description if listed else None


def section_size(device: Any) -> int:
    """Bytes of data of a section with this entry in the vmdesc's "devices". MigrationError where it does not say."""
    return _size(device, 0)


def _size(structure: Any, depth: int) -> int:
    try:
        total = 0
        for field in structure["fields"]:
            total += _count(field["size"]) * _count(field.get("array_len", 1))
        for subsection in structure.get("subsections", ()):
            total += 2 + len(subsection["vmsd_name"]) + 4
            if depth < MAX_DEPTH:
                total += _size(subsection, depth + 1)
        return total
    except (KeyError, TypeError, AttributeError):
        raise MigrationError("the vmdesc does not say how long a section is", section="vmdesc") from None


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 32:
        raise MigrationError("a size in the vmdesc is impossible", section="vmdesc", expected="a u32", got=value)
    return value


def section_head(data: memoryview, pos: int) -> tuple[int, str, int, int, int] | None:
    """(section id, name, instance id, version id, end) of the head of a START or FULL section at ``pos``."""
    if pos + 6 > len(data):
        return None
    section_id, length = struct.unpack_from(">IB", data, pos + 1)
    end = pos + 6 + length + 8
    if not length or end > len(data):
        return None
    raw = bytes(data[pos + 6 : pos + 6 + length])
    if not raw.isascii() or not raw.decode("ascii").isprintable():
        return None
    instance_id, version_id = struct.unpack_from(">II", data, end - 8)
    return section_id, raw.decode("ascii"), instance_id, version_id, end


def split_by_vmdesc(data: memoryview, description: dict[str, Any], base: int) -> list[RawSection]:
    """``data``: whole FULL sections and commands, from byte ``base`` of the stream on.

    MigrationError where they do not fit; commands are for the caller to look at.
    """
    devices = description.get("devices")
    if not isinstance(devices, list):
        raise MigrationError("the vmdesc lists no devices", section="vmdesc", field="devices", expected="a list")
    found: list[RawSection] = []
    pos, index = 0, 0
    while pos < len(data):
        if data[pos] == RecordType.COMMAND and pos + 5 <= len(data):
            pos += 5 + int.from_bytes(data[pos + 3 : pos + 5], "big")
            continue
        head = section_head(data, pos) if data[pos] == RecordType.SECTION_FULL else None
        if head is None:
            raise MigrationError(
                "no section begins where the vmdesc says",
                offset=base + pos,
                expected=f"{RecordType.SECTION_FULL:#04x}",
                got=data[pos],
            )
        section_id, name, instance_id, version_id, start = head
        key = f"{name}/{instance_id}"
        while index < len(devices) and not _is(devices[index], name, instance_id):
            index += 1
        if index == len(devices):
            raise MigrationError("nobody knows this section, the vmdesc neither", offset=base + pos, section=key)
        end = start + section_size(devices[index])
        index += 1
        footer = struct.pack(">BI", RecordType.SECTION_FOOTER, section_id)
        if bytes(data[end : end + 5]) != footer:
            raise MigrationError(
                "the section's footer is not where the vmdesc says",
                offset=base + end,
                section=key,
                expected=footer,
                got=bytes(data[end : end + 5]),
            )
        found.append(RawSection(pos, start, end, end + 5, section_id, name, instance_id, version_id))
        pos = end + 5
    return found


def _is(device: Any, name: str, instance_id: int) -> bool:
    return isinstance(device, dict) and (device.get("name"), device.get("instance_id")) == (name, instance_id)


def split_by_footers(data: memoryview) -> list[RawSection]:
    """As many sections as a search for footers finds, from the first byte on: guesses."""
    raw = bytes(data)
    found: list[RawSection] = []
    pos = 0
    while pos < len(raw) and raw[pos] == RecordType.SECTION_FULL:
        head = section_head(data, pos)
        if head is None:
            break
        section_id, name, instance_id, version_id, start = head
        end = raw.find(struct.pack(">BI", RecordType.SECTION_FOOTER, section_id), start)
        if end < 0:
            break
        found.append(RawSection(pos, start, end, end + 5, section_id, name, instance_id, version_id, "footer"))
        pos = end + 5
    return found


def vmdesc_candidates(data: bytes | bytearray, start: int) -> Iterator[tuple[int, int]]:
    """(position of EOF, length of the JSON) of everything from ``start`` on that looks like EOF and vmdesc."""
    pos = data.find(b"\x00\x06", start)
    while pos >= 0:
        if pos + CANDIDATE <= len(data):
            length = int.from_bytes(data[pos + 2 : pos + 6], "big")
            if length > 2 and _OPENING.match(data, pos + 6):
                yield pos, length
        pos = data.find(b"\x00\x06", pos + 1)
