"""The golden streams: real QEMU's bytes, and the sections in them found without any reader of ours."""

from __future__ import annotations

import json
import lzma
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

GOLDEN = Path(__file__).parent / "golden"
NAMES = tuple(sorted(path.name.removesuffix(".mig.xz") for path in GOLDEN.glob("*.mig.xz")))


class Section(NamedTuple):
    """A FULL section's data (without footer), where it starts in the stream, its version."""

    offset: int
    data: bytes
    version_id: int


@lru_cache(maxsize=2)
def stream(name: str) -> bytes:
    """A golden stream, uncompressed."""
    return lzma.decompress((GOLDEN / f"{name}.mig.xz").read_bytes())


@cache
def section(name: str, section_name: str, instance_id: int = 0) -> Section | None:
    """A section of a golden stream: from its header to the footer with its id; None if it has none."""
    data = stream(name)
    encoded = section_name.encode()
    header = bytes([len(encoded)]) + encoded + instance_id.to_bytes(4, "big")
    at = -1
    while True:
        at = data.find(header, at + 1)
        if at < 0:
            return None
        if data[at - 5] == 4:  # QEMU_VM_SECTION_FULL
            break
    start = at + len(header) + 4
    version_id = int.from_bytes(data[start - 4 : start], "big")
    end = data.index(b"\x7e" + data[at - 4 : at], start)
    return Section(start, data[start:end], version_id)


@cache
def devices(name: str) -> dict[str, str]:
    """The vmdesc of a golden stream: "name/instance" -> the JSON text of its entry."""
    data = stream(name)
    at = data.rindex(b'"page_size"')
    decoder = json.JSONDecoder()
    while True:
        at = data.rindex(b"{", 0, at)
        size = int.from_bytes(data[at - 4 : at], "big")
        if data[at - 5] == 6 and at + size <= len(data):  # QEMU_VM_VMDESCRIPTION
            break
    vmdesc: dict[str, Any] = decoder.decode(data[at : at + size].decode())
    return {f"{d['name']}/{d['instance_id']}": json.dumps(d) for d in vmdesc["devices"]}
