"""The writer of a migration stream: what to send, in order; no I/O.

    header  configuration  (command | section footer)*  EOF  vmdesc

Methods return the bytes to send, sections a list of buffers that need no joining
(``channel.write_many``). Every byte is summed up as it is made, so whatever a method returns must be
sent, in order. RAM data goes through the decoder of the reader: that gives the checksum of each page,
and bytes that a reader would refuse are never sent.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any, TypeAlias

from pyvcpu.errors import MigrationError
from pyvcpu.migration.vmstate.codec import describe_section, save_section
from pyvcpu.migration.vmstate.cursor import NeedMore
from pyvcpu.migration.vmstate.description import SUBSECTIONS, SaveContext, SectionEntry
from pyvcpu.migration.vmstate.fields import Values, Vmdesc
from pyvcpu.migration.wire import checksums
from pyvcpu.migration.wire.configuration import CONFIGURATION
from pyvcpu.migration.wire.ram import RamDecoder
from pyvcpu.migration.wire.records import (
    COMMAND_LENGTHS,
    MAGIC,
    PAGE_SIZE,
    STREAM_VERSION,
    CommandType,
    RamBlocks,
    RamEos,
    RamPages,
    RecordType,
)

Data: TypeAlias = bytes | bytearray | memoryview


class StreamWriter:
    """Writes one stream. ``check_pages``: a checksum for each page of RAM (costs one more pass over the data)."""

    def __init__(self, *, check_pages: bool = True) -> None:
        self.offset = 0
        """Bytes made so far."""
        self.crc = 0
        """CRC-32 of those bytes."""
        self.devices: list[Vmdesc] = []
        """The entries of the vmdesc so far."""
        self._configuration: Vmdesc | None = None
        self._names: dict[int, str] = {}  # sections in parts, by id
        # Not 0: QEMU looks PART up among all its devices, and those that no stream has named yet have id 0.
        self._next_id = 2
        self._sums: dict[str, int] = {}
        self._check_pages = check_pages
        self._ram = RamDecoder()
        self._carry = bytearray()
        self._pages: checksums.PageSums | None = None
        self._sealed = (0, 0)  # crc and length at EOF

    def _made(self, data: Data) -> Data:
        self.crc = zlib.crc32(data, self.crc)
        self.offset += len(data)
        return data

    def _small(self, data: bytes) -> bytes:
        self._made(data)
        return data

    # -- the envelope

    def header(self) -> bytes:
        return self._small(struct.pack(">4sI", MAGIC, STREAM_VERSION))

    def configuration(self, machine: str, subsections: dict[str, Values] | None = None) -> bytes:
        """The machine's name; ``subsections`` maps "configuration/..." to values."""
        name = machine.encode("ascii")
        values: Values = {"len": len(name), "name": name}
        if subsections:
            values[SUBSECTIONS] = subsections
        self._configuration = CONFIGURATION.describe(values)
        return self._small(bytes((RecordType.CONFIGURATION,)) + CONFIGURATION.encode(values))

    def command(self, command: int, payload: bytes = b"") -> bytes:
        """A command of a precopy stream."""
        assert len(payload) == COMMAND_LENGTHS[CommandType(command)]
        return self._small(struct.pack(">BHH", RecordType.COMMAND, command, len(payload)) + payload)

    def open_return_path(self) -> bytes:
        return self.command(CommandType.OPEN_RETURN_PATH)

    def ping(self, value: int | None = None) -> bytes:
        """PING with ``value``, or with the CRC-32 of everything before it (``writer.crc`` before the call)."""
        return self.command(CommandType.PING, struct.pack(">I", self.crc if value is None else value))

    def switchover_start(self) -> bytes:
        """Only for a destination that wants it (``TargetProfile.switchover_start``)."""
        return self.command(CommandType.SWITCHOVER_START)

    # -- sections

    def section_id(self) -> int:
        """An id that no section has yet."""
        while self._next_id in self._names:
            self._next_id += 1
        self._next_id += 1
        return self._next_id - 1

    def section_start(
        self,
        name: str,
        instance_id: int,
        version_id: int,
        data: Data | Sequence[Data],
        *,
        section_id: int | None = None,
    ) -> list[Data]:
        """The first part of a section in several parts; its id is ``writer.id_of(name)`` from then on."""
        number = self.section_id() if section_id is None else section_id
        self._names[number] = name
        head = _head(RecordType.SECTION_START, number, name, instance_id, version_id)
        return self._section(head, number, data, ram=name == "ram")

    def section_part(self, section_id: int, data: Data | Sequence[Data]) -> list[Data]:
        return self._part(RecordType.SECTION_PART, section_id, data)

    def section_end(self, section_id: int, data: Data | Sequence[Data]) -> list[Data]:
        return self._part(RecordType.SECTION_END, section_id, data)

    def id_of(self, name: str) -> int:
        """The id of a section that was started."""
        return next(number for number, started in self._names.items() if started == name)

    def section_full(
        self,
        name: str,
        instance_id: int,
        version_id: int,
        data: bytes,
        description: Vmdesc | None = None,
        *,
        section_id: int | None = None,
    ) -> bytes:
        """A whole section. ``description`` is its vmdesc ({"vmsd_name", "version", "fields", ...}).

        Without one it is described as QEMU does what it cannot describe: as one buffer.
        """
        number = self.section_id() if section_id is None else section_id
        if description is None:
            description = {"size": len(data), "fields": [{"name": "data", "size": len(data), "type": "buffer"}]}
        self.devices.append({"name": name, "instance_id": instance_id, **description})
        record = _head(RecordType.SECTION_FULL, number, name, instance_id, version_id) + data
        self._sums[f"{name}/{instance_id}"] = zlib.crc32(record)
        return self._small(record + _footer(number))

    def section(self, entry: SectionEntry, ctx: SaveContext) -> bytes:
        """The whole section of a device, described by its description. MigrationError where it cannot be saved."""
        data, values = save_section(entry, ctx)
        described = describe_section(entry, values)
        return self.section_full(
            entry.description.name, entry.instance_id, entry.description.version_id, data, described
        )

    def _part(self, kind: RecordType, section_id: int, data: Data | Sequence[Data]) -> list[Data]:
        head = struct.pack(">BI", kind, section_id)
        return self._section(head, section_id, data, ram=self._names[section_id] == "ram")

    def _section(self, head: bytes, section_id: int, data: Data | Sequence[Data], *, ram: bool) -> list[Data]:
        chunks = [data] if isinstance(data, bytes | bytearray | memoryview) else list(data)
        out: list[Data] = [self._made(head)]
        for chunk in chunks:
            if ram:
                self._sum_up(memoryview(chunk).cast("B"))
            out.append(self._made(chunk))
        out.append(self._made(_footer(section_id)))
        return out

    # -- RAM

    def _sum_up(self, data: memoryview) -> None:
        """Decode RAM data that is about to be sent, for the checksums of its pages."""
        base = self.offset - len(self._carry)
        pos = 0
        while pos < len(data):
            if self._carry:
                try:
                    used = self._step(memoryview(bytes(self._carry)), 0, base)
                    del self._carry[:used]
                    base += used
                    continue
                except NeedMore as need:
                    piece = data[pos : pos + need.missing]
                    self._carry += piece
                    pos += len(piece)
            else:
                try:
                    pos += self._step(data, pos, base)
                except NeedMore:
                    self._carry += data[pos:]
                    pos = len(data)
        while self._carry:
            try:
                used = self._step(memoryview(bytes(self._carry)), 0, base)
            except NeedMore:
                return
            del self._carry[:used]
            base += used

    def _step(self, data: memoryview, pos: int, base: int) -> int:
        record = self._ram.step(data, pos, base)
        if self._check_pages and isinstance(record, RamPages):
            assert self._pages is not None
            self._pages.add(record)
        elif self._check_pages and isinstance(record, RamBlocks):
            self._pages = checksums.PageSums(record.blocks)
        elif isinstance(record, RamEos) and pos + record.length < len(data):
            raise MigrationError("data after the end of a part of RAM", offset=base + pos, section="ram/0")
        return record.length

    # -- the end

    def eof(self) -> bytes:
        """The end of the state: the hand-over."""
        data = self._small(bytes((RecordType.EOF,)))
        self._sealed = self.crc, self.offset
        return data

    def vmdesc(self, *, with_checksums: bool = True, extra: dict[str, Any] | None = None) -> bytes:
        """The stream's description of itself, after :meth:`eof`.

        ``extra`` goes beside the checksums, under their seal: what a pyvcpu wants to know and QEMU has no field for.
        """
        description: dict[str, Any] = {}
        if self._configuration is not None:
            description["configuration"] = self._configuration
        description |= {"page_size": PAGE_SIZE, "devices": self.devices}
        if with_checksums:
            crc, length = self._sealed
            text = checksums.seal(
                description,
                {
                    **(extra or {}),
                    "version": checksums.CHECKSUMS_VERSION,
                    "stream": crc,
                    "length": length,
                    "sections": self._sums,
                    "pages": self._pages.to_json() if self._pages is not None else {},
                },
            )
        else:
            text = json.dumps(description).encode("utf-8")
        return self._small(struct.pack(">BI", RecordType.VMDESC, len(text)) + text)


def _head(kind: RecordType, section_id: int, name: str, instance_id: int, version_id: int) -> bytes:
    raw = name.encode("ascii")
    return struct.pack(">BIB", kind, section_id, len(raw)) + raw + struct.pack(">II", instance_id, version_id)


def _footer(section_id: int) -> bytes:
    return struct.pack(">BI", RecordType.SECTION_FOOTER, section_id)
