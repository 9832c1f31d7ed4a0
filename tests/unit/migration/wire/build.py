"""Streams to read: our own, small and with everything in them, made of a golden stream's sections."""

from __future__ import annotations

import struct
from functools import cache
from typing import Any

from pyvcpu.apic.vmstate import APIC
from pyvcpu.cpu.vmstate import CPU, CPU_COMMON
from pyvcpu.devices.vmstate import SERIAL
from pyvcpu.machine.vmstate import GLOBALSTATE, KVM_TPR_OPT, TIMER
from pyvcpu.migration.vmstate.codec import decode_section
from pyvcpu.migration.wire.reader import StreamReader
from pyvcpu.migration.wire.records import Eof, Record, SectionFull
from pyvcpu.migration.wire.writer import StreamWriter
from tests import streams

DESCRIPTIONS = (TIMER, CPU_COMMON, CPU, KVM_TPR_OPT, APIC, GLOBALSTATE)
REGISTRY = {(d.name, 0): d for d in (*DESCRIPTIONS, SERIAL)}
BLOCKS = {"a": 3 * 4096, "rom": 4096}


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def block_list(blocks: dict[str, int] = BLOCKS) -> bytes:
    data = u64(sum(blocks.values()) | 4)
    for name, size in blocks.items():
        data += bytes((len(name),)) + name.encode() + u64(size)
    return data + u64(0x10)


def page(address: int, data: bytes, block: str | None = None) -> bytes:
    """A whole page; with ``block`` its name, without it CONTINUE."""
    if block is None:
        return u64(address | 0x28) + data
    return u64(address | 0x08) + bytes((len(block),)) + block.encode() + data


def filled(address: int, fill: int, block: str | None = None) -> bytes:
    if block is None:
        return u64(address | 0x22) + bytes((fill,))
    return u64(address | 0x02) + bytes((len(block),)) + block.encode() + bytes((fill,))


EOS = u64(0x10)
CONTENT = bytes(range(256)) * 16
PART = page(0, CONTENT, "a") + page(4096, CONTENT[::-1]) + filled(8192, 0) + filled(0, 7, "rom") + EOS
LAST = page(0, CONTENT, "rom") + filled(0, 0, "a") + EOS


@cache
def sections(name: str = "none-7.2-counter-tcg") -> tuple[tuple[Any, dict[str, Any]], ...]:
    """(description, values) of the sections of a golden stream that we describe."""
    found = []
    for description in DESCRIPTIONS:
        section = streams.section(name, description.name)
        assert section is not None
        values, _ = decode_section(description, section.data, version_id=section.version_id)
        found.append((description, values))
    return tuple(found)


def own_stream(
    *, ram: bool = True, with_checksums: bool = True, check_pages: bool = True, unknown: tuple[str, bytes] | None = None
) -> bytes:
    """A whole stream of ours; ``unknown`` (name, data) is a section that nobody describes, before all others."""
    writer = StreamWriter(check_pages=check_pages)
    out: list[Any] = [writer.header(), writer.configuration("none"), writer.open_return_path(), writer.ping(1)]
    if ram:
        out += writer.section_start("ram", 0, 4, block_list())
        number = writer.id_of("ram")
        out += writer.section_part(number, PART)
        out += writer.section_end(number, LAST)
    if unknown is not None:
        out.append(writer.section_full(unknown[0], 0, 1, unknown[1]))
    for description, values in sections():
        out.append(
            writer.section_full(
                description.name, 0, description.version_id, description.encode(values), description.describe(values)
            )
        )
    out += [writer.ping(), writer.eof(), writer.vmdesc(with_checksums=with_checksums)]
    return b"".join(out)


def device_bytes(stream: bytes) -> tuple[int, int]:
    """From the first FULL section to behind EOF."""
    records = read(stream)
    first = next(record.offset for record in records if isinstance(record, SectionFull))
    return first, next(record.offset + 1 for record in records if isinstance(record, Eof))


def data_of(stream: bytes, key: str) -> int:
    """Where the data of the section "name/instance" begins."""
    return next(r.data_offset for r in read(stream) if isinstance(r, SectionFull) and r.key == key)


def read(data: bytes, chunk: int | None = None, **options: Any) -> list[Record]:
    """All records; the stream must be whole."""
    reader = StreamReader(options.pop("registry", REGISTRY), **options)
    records: list[Record] = []
    for at in range(0, len(data), chunk or len(data)):
        records += reader.feed(data[at : at + (chunk or len(data))])
    reader.close()
    return records
