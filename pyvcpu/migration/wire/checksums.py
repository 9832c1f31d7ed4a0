"""Checksums over a stream, carried where QEMU does not look: a key of the vmdesc JSON.

    {"configuration": ..., "page_size": 4096, "devices": [...],
     "pyvcpu": {"version": 1,
                "stream": CRC-32 of all bytes from the header up to and with EOF,
                "length": their number,
                "sections": {"name/instance": CRC-32 of the FULL section from its type byte to the footer},
                "pages": {"block": base64(zlib(u32 little-endian for each page: CRC-32 of what
                                            was sent last, 0 if never))},
                "crc": "CRC-32 in hex of all bytes of this JSON before the key crc"}}

"stream" finds any damage; the others say where it is. "crc" protects the JSON itself, so a stream
with damaged checksums is not taken for one without any. QEMU ignores all of it.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pyvcpu.errors import MigrationError
from pyvcpu.migration.wire.records import PAGE_SIZE, RamPages

CHECKSUMS_VERSION = 1
KEY = "pyvcpu"

_TAIL = re.compile(rb', "crc": "([0-9a-f]{8})"\}\}\Z')

FILL_CRC = [zlib.crc32(bytes((fill,)) * PAGE_SIZE) for fill in range(256)]
"""The CRC-32 of a page of each byte."""


class PageSums:
    """The CRC-32 of every page of every block as it was sent last."""

    def __init__(self, blocks: Sequence[tuple[str, int]]) -> None:
        self._sums: dict[str, npt.NDArray[np.uint32]] = {
            name: np.zeros(size // PAGE_SIZE, np.uint32) for name, size in blocks
        }
        self._fill = np.array(FILL_CRC, np.uint32)

    def add(self, batch: RamPages) -> None:
        """Pages were sent: a later one counts instead of an earlier one."""
        if batch.data is not None:
            sums = np.fromiter(map(zlib.crc32, batch.data), np.uint32, len(batch))
        else:
            sums = self._fill[batch.fill]
        # Not one assignment: of equal indexes in one, the last need not win.
        target, numbers = self._sums[batch.block], batch.addresses // PAGE_SIZE
        if len(numbers) > 1 and not (np.diff(numbers) > 0).all():
            for number, value in zip(numbers.tolist(), sums.tolist(), strict=True):
                target[number] = value
        else:
            target[numbers] = sums

    def to_json(self) -> dict[str, str]:
        return {
            # The sums of different pages do not compress: one pass at level 1 is what it is worth.
            name: base64.b64encode(zlib.compress(sums.astype("<u4").tobytes(), 1)).decode("ascii")
            for name, sums in self._sums.items()
        }

    def verify(self, expected: Mapping[str, str]) -> None:
        """MigrationError naming the first page that differs."""
        if list(expected) != list(self._sums):
            raise _damaged("pages", "the checksums are of other RAM blocks", list(self._sums), list(expected))
        for name, sums in self._sums.items():
            theirs = _unpack(expected[name], len(sums) * 4, f"pages/{name}")
            wrong = np.flatnonzero(theirs != sums)
            if len(wrong):
                page = int(wrong[0])
                raise MigrationError(
                    f"{len(wrong)} pages of RAM are not as they were sent, or were lost",
                    section="ram/0",
                    field=f"{name}[{page * PAGE_SIZE:#x}]",
                    expected=f"CRC-32 {int(theirs[page]):08x}",
                    got=f"{int(sums[page]):08x}",
                )


def _unpack(text: object, size: int, path: str) -> npt.NDArray[np.uint32]:
    """The sums out of their JSON form; never more than ``size`` bytes are made of it."""
    try:
        packed = base64.b64decode(text, validate=True)  # type: ignore[arg-type]
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(packed, size + 1)
        if len(data) != size or not unpacker.eof:
            raise ValueError
    except (TypeError, ValueError, zlib.error, binascii.Error):
        raise _damaged(path, "the page checksums cannot be read", f"{size} bytes", None) from None
    return np.frombuffer(data, "<u4")


def _damaged(path: str, message: str, expected: object, got: object) -> MigrationError:
    return MigrationError(message, section="vmdesc", field=f"{KEY}/{path}", expected=expected, got=got)


def seal(description: dict[str, Any], checksums: dict[str, Any]) -> bytes:
    """The JSON of ``description`` with ``checksums`` as its last key and the CRC-32 of it all in that."""
    body = json.dumps({**description, KEY: checksums}).encode("utf-8")
    assert body.endswith(b"}}")
    body = body[:-2]
    return body + b', "crc": "%08x"}}' % zlib.crc32(body)


def unseal(text: bytes, description: Mapping[str, Any]) -> dict[str, Any] | None:
    """The checksums in a vmdesc (``text``, parsed as ``description``); None without any.

    MigrationError where they are there but damaged.
    """
    if KEY not in description and f'"{KEY}"'.encode() not in text and not _TAIL.search(text):
        return None
    tail = _TAIL.search(text)
    if tail is None:
        raise _damaged("crc", "the checksums are not sealed", "a CRC-32 at the end of the JSON", None)
    actual = zlib.crc32(text[: tail.start()])
    if actual != int(tail[1], 16):
        raise _damaged("crc", "the checksums themselves are damaged", f"{actual:08x}", tail[1].decode())
    checksums = description.get(KEY)
    if not isinstance(checksums, dict) or checksums.get("version") != CHECKSUMS_VERSION:
        raise _damaged("version", "checksums of another version", CHECKSUMS_VERSION, checksums)
    for key, kind in (("stream", int), ("length", int), ("sections", dict), ("pages", dict)):
        if not isinstance(checksums.get(key), kind):
            raise _damaged(key, "a checksum is missing", kind.__name__, checksums.get(key))
    return checksums


def verify(
    checksums: Mapping[str, Any],
    *,
    crc: int,
    length: int,
    sections: Mapping[str, tuple[int, int]],
    pages: PageSums | None,
    check_pages: bool = True,
) -> None:
    """MigrationError unless everything read is what was sent.

    ``sections`` maps "name/instance" to (CRC-32, offset) of what was read. The parts are compared before the
    whole, because they say where the damage is.
    """
    expected = checksums["sections"]
    for key, (actual, offset) in sections.items():
        if expected.get(key) != actual:
            raise MigrationError(
                "the section's checksum is wrong", section=key, offset=offset, expected=expected.get(key), got=actual
            )
    for key in expected:
        if key not in sections:
            raise MigrationError("a section that was sent is missing", section=key, expected=key, got=sorted(sections))
    if pages is not None and checksums["pages"]:
        pages.verify(checksums["pages"])
    elif checksums["pages"] and check_pages:
        raise MigrationError(
            "RAM was sent and is missing", section="ram/0", expected=list(checksums["pages"]), got="none"
        )
    if (length, crc) != (checksums["length"], checksums["stream"]):
        raise MigrationError(
            "the checksum of the whole stream is wrong",
            offset=length,
            expected=f"CRC-32 {checksums['stream']:08x} of {checksums['length']} bytes",
            got=f"{crc:08x} of {length} bytes",
        )
