"""The stream's description of itself: JSON of a foreign hand, read as a claim.

    06  u32 length  {"page_size": 4096, "devices": [
                        {"name", "instance_id", "vmsd_name", "version",
                         "fields": [{"name", "type", "size" [, "array_len" | "index"] [, "struct": {"fields", ...}]}],
                         "subsections": [{"vmsd_name", "version", "fields", "subsections"}]}]}

The length bounds the text, but not what becomes of it: 60 MiB of ``[],`` are 2 GB of lists. So the values
are counted before they are made, and a size is one only where it is a number that a field can have.
"""

from __future__ import annotations

import json
from typing import Any

from pyvcpu.errors import MigrationError
from pyvcpu.migration.wire.records import RecordType

MAX_VALUES = 1 << 18
"""Values in a vmdesc. QEMU's pc has 6,718; ours hold their checksums in few long strings."""

MAX_DEPTH = 32


def parse_vmdesc(text: bytes, offset: int) -> dict[str, Any]:
    """The JSON of a vmdesc that is byte ``offset`` of the stream; an empty one is allowed. MigrationError."""
    if not text:
        return {}
    values = count_values(text)
    if values > MAX_VALUES:
        raise MigrationError(
            "the description at the end of the stream has too many values", offset=offset, section="vmdesc",
            expected=f"at most {MAX_VALUES}", got=str(values),
        )  # fmt: skip
    description = _load(text)
    if description is None:
        raise MigrationError(
            "the description at the end of the stream is not a JSON object",
            offset=offset,
            section="vmdesc",
            expected="JSON",
            got=text[:60],
        )
    return description


def try_vmdesc(text: bytes | bytearray) -> dict[str, Any] | None:
    """The JSON where this is a vmdesc that lists devices, else None."""
    if text[-1] != ord("}") or count_values(text) > MAX_VALUES:
        return None
    description = _load(text)
    return description if description is not None and isinstance(description.get("devices"), list) else None


def count_values(text: bytes | bytearray) -> int:
    """An upper bound of the values in it: each but the first follows a comma or an opening bracket."""
    return text.count(b",") + text.count(b"[") + text.count(b"{") + 1


def _load(text: bytes | bytearray) -> dict[str, Any] | None:
    try:
        # As text: given bytes, json would take UTF-16 too, where counting and sealing look for other bytes.
        description = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return description if isinstance(description, dict) else None


def devices_of(description: dict[str, Any]) -> list[dict[str, Any]]:
    """What it says of sections: the entries that name one, in order; none where it lists nothing."""
    devices = description.get("devices")
    if not isinstance(devices, list):
        return []
    return [
        device
        for device in devices
        if isinstance(device, dict)
        and isinstance(device.get("name"), str)
        and isinstance(device.get("instance_id"), int)
    ]


def section_size(structure: Any) -> int:
    """Bytes of data by an entry of "devices", or by a structure in one. MigrationError where it does not say."""
    return _size(structure, 0)


def _size(structure: Any, depth: int) -> int:
    try:
        if depth > MAX_DEPTH:
            raise TypeError
        total = sum(field_size(entry) for entry in _list(structure["fields"]))
        for subsection in _list(structure.get("subsections", [])):
            total += len(subsection_head(subsection)) + _size(subsection, depth + 1)
        return total
    except (KeyError, TypeError, AttributeError):
        raise MigrationError("the vmdesc does not say how long a section is", section="vmdesc") from None


def field_size(entry: dict[str, Any]) -> int:
    """Bytes of a field with all its elements."""
    return _count(entry["size"]) * _count(entry.get("array_len", 1))


def subsection_head(subsection: dict[str, Any]) -> bytes:
    """What stands before the data of a subsection: 05, name (u8 length), version u32."""
    name = subsection["vmsd_name"]
    if not isinstance(name, str) or not name.isascii() or len(name) > 255:
        raise TypeError
    version = _count(subsection.get("version", 0))
    return bytes((RecordType.SUBSECTION, len(name))) + name.encode("ascii") + version.to_bytes(4, "big")


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 32:
        raise MigrationError("a size in the vmdesc is impossible", section="vmdesc", expected="a u32", got=value)
    return value
