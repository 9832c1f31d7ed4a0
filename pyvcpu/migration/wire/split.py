"""Sections that nobody described, split by what the stream says of itself.

    FULL  data ?  footer  FULL  data ?  footer ... 00  06 length {"devices": [...]}
    |<-------------- buffered ------------->|       |<-- says how long each data is -->|

A section carries no length. The vmdesc at the end names every field of every FULL section with its
size, so the buffered bytes are split by it, and every head and footer must then be where it says.
Of a stream that ended before its vmdesc, footers are all there is: a guess, and marked as one.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyvcpu.errors import MigrationError
from pyvcpu.migration.wire.records import RecordType
from pyvcpu.migration.wire.vmdesc import section_size

MAX_CANDIDATES = 64
"""Places that look like the start of a vmdesc and are none; more are an attack."""

CANDIDATE = 8
"""Bytes from EOF to the first two of the JSON."""

_CANDIDATE = re.compile(rb"\x00\x06(?=(.{4})\{[\s\"])", re.DOTALL)


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
        try:
            end = start + section_size(devices[index])
        except MigrationError as error:
            error.offset, error.field = base + pos, key
            raise
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
    for found in _CANDIDATE.finditer(data, start):
        length = int.from_bytes(found[1], "big")
        if length > 2:
            yield found.start(), length
