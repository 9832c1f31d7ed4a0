"""The incremental reader of a migration stream: bytes in, records out, no I/O.

    +--------+---------------+----------------------------------------+-----+--------+
    | header | configuration | (command | section data footer) *      | EOF | vmdesc |
    +--------+---------------+----------------------------------------+-----+--------+

      state:  header -> configuration -> record <-> section -> footer
                                         record -> unknown (until the vmdesc)
                                         record -> vmdesc -> end

Bytes may come in any chunks; the records are the same. What is incomplete is carried over, and
only that is copied: RAM pages are views of the bytes that were fed. Nothing is allocated by a
length that the stream names before the length was bounded.

The first section that nobody described ends incremental decoding, for nothing says where it ends:
from there on bytes are kept (a bounded number), until the vmdesc is complete and splits them.
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from pyvcpu.errors import MigrationError
from pyvcpu.migration.vmstate.codec import decode_section
from pyvcpu.migration.vmstate.cursor import Cursor, NeedMore, Span
from pyvcpu.migration.vmstate.description import SUBSECTIONS, Description
from pyvcpu.migration.vmstate.fields import Values
from pyvcpu.migration.wire import checksums, split
from pyvcpu.migration.wire.command import read_command
from pyvcpu.migration.wire.configuration import CONFIGURATION, check_configuration
from pyvcpu.migration.wire.ram import RAM_VERSION, Coverage, RamDecoder
from pyvcpu.migration.wire.records import (
    MAGIC,
    STREAM_VERSION,
    Configuration,
    Eof,
    Footer,
    Header,
    Opaque,
    RamBlocks,
    RamEos,
    RamPages,
    Record,
    RecordType,
    SectionEnd,
    SectionFull,
    SectionPart,
    SectionStart,
    Vmdesc,
)
from pyvcpu.migration.wire.unknown import UnknownSections
from pyvcpu.migration.wire.vmdesc import parse_vmdesc

Data: TypeAlias = bytes | bytearray | memoryview
Lookup: TypeAlias = Callable[[str, int], Description | None]
Registry: TypeAlias = Mapping[tuple[str, int], Description] | Lookup
"""(name, instance id) -> what describes the section, None (or nothing) for what is not known."""

RAM_SECTION = "ram"


@dataclass(frozen=True)
class Limits:
    """Bounds on what a stream can make the reader keep, in bytes."""

    unknown: int = 64 << 20
    """All sections from the first unknown one on, with the vmdesc."""
    vmdesc: int = 64 << 20
    ram: int = 1 << 38
    """All RAM that the list of blocks may name, where the reader was not told what there is."""


class StreamReader:
    """Reads one stream. Use: ``for record in reader.feed(data): ...``, at the end :meth:`close`.

    ``machine``: the name that the configuration must have. ``ram_blocks``: the sizes of the blocks that may come,
    ``required_blocks``: those that must (by default all). ``require_checksums`` refuses a stream
    without ours; ``all_pages`` one that sends some of RAM's pages and not all; ``check_pages`` computes the
    checksum of each page. After an error the reader is dead: every later call raises the same error.
    """

    def __init__(
        self,
        registry: Registry | None = None,
        *,
        machine: str | None = None,
        ram_blocks: Mapping[str, int] | None = None,
        required_blocks: Iterable[str] | None = None,
        require_checksums: bool = False,
        check_pages: bool = True,
        all_pages: bool = True,
        limits: Limits = Limits(),
    ) -> None:
        self._lookup: Lookup
        if callable(registry):
            self._lookup = registry
        else:
            table = dict(registry or {})
            self._lookup = lambda name, instance_id: table.get((name, instance_id))
        self.machine, self.require_checksums, self.limits = machine, require_checksums, limits
        self._check_pages, self._all_pages = check_pages, all_pages
        self._coverage: Coverage | None = None
        self.ram = RamDecoder(ram_blocks, required_blocks, limit=limits.ram)
        self.offset = 0
        """Bytes of the records that were yielded."""
        self.crc = 0
        """CRC-32 of those bytes."""
        self._todo: deque[memoryview] = deque()  # fed, not looked at
        self._buffer, self._pos = memoryview(b""), 0  # being parsed
        self._carry = bytearray()  # the incomplete end of the last buffer; then the buffer is empty
        self._missing = self._want = 0  # bytes that the carry needs at least, and had better get
        self._out: deque[Record] = deque()
        self._state: Callable[[], None] = self._header
        self._final = False
        self._error: MigrationError | None = None
        self._started: dict[int, SectionStart] = {}
        self._open: tuple[int, str] = (0, "")  # id and name of the section whose footer is due
        self._last_part = False
        self._seen: set[tuple[str, int]] = set()
        self._sums: dict[str, tuple[int, int]] = {}
        self._pages: checksums.PageSums | None = None
        self._eof: Eof | None = None
        self._kept = UnknownSections()

    # -- for callers

    @property
    def finished(self) -> bool:
        """The vmdesc was read and is right: nothing more may come."""
        return self._state == self._end

    def feed(self, data: Data) -> Iterator[Record]:
        """The records that ``data`` completes. The bytes are taken at once, the records made as they are asked for.

        MigrationError, after all records before it. Pages are views of ``data``: do not change it while they are
        in use.
        """
        if len(data):
            self._todo.append(memoryview(data).cast("B"))
        return self._records()

    def close(self) -> None:
        """The stream has ended here. MigrationError unless it was complete; it says what was missing."""
        for _ in self._records():
            pass
        if self.finished:
            return
        left = bytes(self._buffer[self._pos :]) + bytes(self._carry)
        self._buffer, self._pos, self._carry, self._final = memoryview(left), 0, bytearray(), True
        try:
            while True:
                self._state()
        except NeedMore as need:
            rest = len(self._buffer) - self._pos
            self._error = MigrationError(
                f"the stream ends too early, in {WHAT[self._state.__name__]}",
                offset=self.offset + rest + len(self._kept),
                section=self._open[1] or self._kept.key,
                expected=f"{need.missing} more bytes" if rest else "more bytes",
                got="the end",
            )
        except MigrationError as error:
            self._error = error
        raise self._error

    def salvage(self) -> list[Record]:
        """Of a stream that ended inside sections nobody described: what a search for footers makes of it."""
        if not self._kept:
            return []
        data = memoryview(bytes(self._kept.data))
        records: list[Record] = []
        end = 0
        for raw in split.split_by_footers(data):
            records += self._raw_records(data, raw, self._kept.offset)
            end = raw.end
        if end < len(data):
            records.append(Opaque(self._kept.offset + end, len(data) - end, bytes(data[end:])))
        return records

    # -- the loop

    def _records(self) -> Iterator[Record]:
        while True:
            while self._out:
                yield self._out.popleft()
            if self._error is not None:
                raise self._error
            try:
                if self._pos == len(self._buffer) and not self._refill():
                    return
                self._state()
            except NeedMore as need:
                self._carry = bytearray(self._buffer[self._pos :])
                self._buffer, self._pos = memoryview(b""), 0
                self._missing = self._want = max(need.missing, 1)
                if self._state == self._record:
                    # A device section is decoded again at every retry: take half as much again each time.
                    self._want = max(self._want, min(len(self._carry) // 2, 1 << 16))
            except MigrationError as error:
                self._error = error

    def _refill(self) -> bool:
        """Get a buffer in which the state can go on; False when there are not enough bytes for that."""
        if not self._carry:
            if not self._todo:
                return False
            self._buffer, self._pos = self._todo.popleft(), 0
            return True
        while self._todo and self._want > 0:
            piece = self._todo[0][: self._want]
            self._carry += piece
            self._want -= len(piece)
            self._missing -= len(piece)
            if len(piece) == len(self._todo[0]):
                self._todo.popleft()
            else:
                self._todo[0] = self._todo[0][len(piece) :]
        if self._missing > 0:
            return False
        self._buffer, self._pos, self._carry = memoryview(bytes(self._carry)), 0, bytearray()
        return True

    def _need(self, size: int) -> None:
        """NeedMore unless ``size`` bytes are in the buffer."""
        missing = self._pos + size - len(self._buffer)
        if missing > 0:
            raise NeedMore(missing)

    def _emit(self, record: Record) -> None:
        """Yield ``record``, which is the next bytes of the buffer."""
        end = self._pos + record.length
        self.crc = zlib.crc32(self._buffer[self._pos : end], self.crc)
        self._pos = end
        self.offset += record.length
        self._out.append(record)

    # -- the states: each makes one record, or raises NeedMore and has changed nothing

    def _header(self) -> None:
        self._need(8)
        magic, version = struct.unpack_from(">4sI", self._buffer, self._pos)
        if magic != MAGIC:
            raise MigrationError(
                "not a migration stream", offset=0, section="header", field="magic", expected=MAGIC, got=magic
            )
        if version != STREAM_VERSION:
            raise MigrationError(
                "a stream of another version", offset=4, section="header", field="version",
                expected=STREAM_VERSION, got=version,
            )  # fmt: skip
        self._emit(Header(0, 8, version))
        self._state = self._configuration

    def _configuration(self) -> None:
        self._need(1)
        kind = self._buffer[self._pos]
        if kind != RecordType.CONFIGURATION:
            raise MigrationError(
                "the configuration is missing", offset=self.offset, section="configuration",
                expected=f"{RecordType.CONFIGURATION:#04x}", got=kind,
            )  # fmt: skip
        spans: dict[str, Span] = {}
        cursor = Cursor(
            self._buffer[self._pos + 1 :], self.offset + 1, final=self._final, section="configuration", spans=spans
        )
        values = CONFIGURATION.decode(cursor)
        name = check_configuration(values, cursor, self.machine)
        self._emit(Configuration(self.offset, 1 + cursor.pos, name, values.get(SUBSECTIONS, {}), spans))
        self._state = self._record

    def _record(self) -> None:
        self._need(1)
        kind = self._buffer[self._pos]
        if kind == RecordType.SECTION_FULL:
            self._section_full()
        elif kind == RecordType.SECTION_START:
            self._section_start()
        elif kind in (RecordType.SECTION_PART, RecordType.SECTION_END):
            self._section_part(kind)
        elif kind == RecordType.COMMAND:
            self._command()
        elif kind == RecordType.EOF:
            if self._started:
                names = ", ".join(start.name for start in self._started.values())
                raise MigrationError("the state ends before the end of a section", offset=self.offset, section=names)
            crc = zlib.crc32(self._buffer[self._pos : self._pos + 1], self.crc)
            self._eof = Eof(self.offset, 1, crc)
            self._emit(self._eof)
            self._state = self._vmdesc
        else:
            known = RecordType(kind).name if kind in RecordType._value2member_map_ else None
            raise MigrationError(
                f"a record of type {known or 'unknown'} cannot stand here", offset=self.offset,
                expected="a section (01 to 04), a command (08) or the end (00)", got=kind,
            )  # fmt: skip

    def _head(self) -> tuple[int, str, int, int, int]:
        """(section id, name, instance id, version id, length of it all) of a START or FULL section."""
        self._need(6)
        self._need(14 + self._buffer[self._pos + 5])
        head = split.section_head(self._buffer, self._pos)
        if head is None:
            end = self._pos + 6 + self._buffer[self._pos + 5]
            raise MigrationError(
                "the name of a section is not one", offset=self.offset + 6, field="name",
                expected="printable ASCII", got=bytes(self._buffer[self._pos + 6 : end]),
            )  # fmt: skip
        section_id, name, instance_id, version_id, end = head
        if (name, instance_id) in self._seen:
            raise MigrationError("a section comes twice", offset=self.offset, section=f"{name}/{instance_id}")
        return section_id, name, instance_id, version_id, end - self._pos

    def _section_full(self) -> None:
        section_id, name, instance_id, version_id, head = self._head()
        description = self._lookup(name, instance_id)
        if description is None:
            limits = self.limits
            self._kept = UnknownSections(self.offset, limit=limits.unknown, vmdesc_limit=limits.vmdesc)
            self._state = self._unknown
            return
        spans: dict[str, Span] = {}
        start = self._pos + head
        key = f"{name}/{instance_id}"
        cursor = Cursor(self._buffer[start:], self.offset + head, final=self._final, section=key, spans=spans)
        values = description.decode(cursor, version_id)
        data = bytes(self._buffer[start : start + cursor.pos])
        length = head + cursor.pos
        self._sums[key] = zlib.crc32(self._buffer[self._pos : self._pos + length]), self.offset
        self._seen.add((name, instance_id))
        self._open = section_id, key
        self._emit(SectionFull(self.offset, length, section_id, name, instance_id, version_id, data, values, spans))
        self._state = self._footer

    def _section_start(self) -> None:
        section_id, name, instance_id, version_id, head = self._head()
        key = f"{name}/{instance_id}"
        if (name, instance_id) != (RAM_SECTION, 0):
            raise MigrationError(
                "a section in several parts that nobody knows", offset=self.offset, section=key,
                expected="ram/0", got=key,
            )  # fmt: skip
        if version_id != RAM_VERSION:
            raise MigrationError(
                "RAM of another version", offset=self.offset + head - 4, section=key, field="version",
                expected=RAM_VERSION, got=version_id,
            )  # fmt: skip
        record = SectionStart(self.offset, head, section_id, name, instance_id, version_id)
        self._started[section_id] = record
        self._seen.add((name, instance_id))
        self._open, self._last_part = (section_id, key), False
        self._emit(record)
        self._state = self._ram_data

    def _section_part(self, kind: int) -> None:
        self._need(5)
        (section_id,) = struct.unpack_from(">I", self._buffer, self._pos + 1)
        start = self._started.get(section_id)
        if start is None:
            raise MigrationError(
                "a part of a section that was not started", offset=self.offset + 1, field="section id",
                expected=sorted(self._started), got=section_id,
            )  # fmt: skip
        record = SectionPart if kind == RecordType.SECTION_PART else SectionEnd
        self._open = section_id, f"{start.name}/{start.instance_id}"
        self._last_part = kind == RecordType.SECTION_END
        self._emit(record(self.offset, 5, section_id, start.name, start.instance_id))
        self._state = self._ram_data

    def _ram_data(self) -> None:
        record = self.ram.step(self._buffer, self._pos, self.offset - self._pos)
        if isinstance(record, RamBlocks):
            self._pages = checksums.PageSums(record.blocks) if self._check_pages else None
            self._coverage = Coverage(record.blocks) if self._all_pages else None
        elif isinstance(record, RamPages):
            if self._pages is not None:
                self._pages.add(record)
            if self._coverage is not None:
                self._coverage.add(record)
        elif self._last_part and self._coverage is not None:
            self._coverage.check(record.offset)
        self._emit(record)
        if isinstance(record, RamEos):
            self._state = self._footer

    def _footer(self) -> None:
        self._need(1)
        section_id, key = self._open
        if self._buffer[self._pos] != RecordType.SECTION_FOOTER:
            raise MigrationError(
                "the section's footer is missing", offset=self.offset, section=key,
                expected=f"{RecordType.SECTION_FOOTER:#04x}", got=self._buffer[self._pos],
            )  # fmt: skip
        self._need(5)
        (got,) = struct.unpack_from(">I", self._buffer, self._pos + 1)
        if got != section_id:
            raise MigrationError(
                "the footer is of another section", offset=self.offset + 1, section=key, field="section id",
                expected=section_id, got=got,
            )  # fmt: skip
        if self._last_part:
            self._started.pop(section_id, None)
        self._open, self._last_part = (0, ""), False
        self._emit(Footer(self.offset, 5, section_id))
        self._state = self._record

    def _command(self) -> None:
        self._emit(read_command(self._buffer, self._pos, self.offset, self.crc))

    def _vmdesc(self) -> None:
        self._need(1)
        if self._buffer[self._pos] != RecordType.VMDESC:
            raise MigrationError(
                "what follows the end of the state is no description", offset=self.offset, section="vmdesc",
                expected=f"{RecordType.VMDESC:#04x}", got=self._buffer[self._pos],
            )  # fmt: skip
        self._need(5)
        (length,) = struct.unpack_from(">I", self._buffer, self._pos + 1)
        if length > self.limits.vmdesc:
            raise MigrationError(
                "the description is too long", offset=self.offset + 1, section="vmdesc", field="length",
                expected=f"at most {self.limits.vmdesc:#x}", got=length,
            )  # fmt: skip
        self._need(5 + length)
        text = bytes(self._buffer[self._pos + 5 : self._pos + 5 + length])
        self._emit(self._checked(text, parse_vmdesc(text, self.offset + 5)))
        self._state = self._end

    def _checked(self, text: bytes, description: dict[str, Any]) -> Vmdesc:
        """The last record, after everything was compared with the checksums in it."""
        assert self._eof is not None
        sums = checksums.unseal(text, description)
        if sums is not None:
            checksums.verify(
                sums, crc=self._eof.crc, length=self._eof.offset + 1, sections=self._sums, pages=self._pages,
                check_pages=self._check_pages,
            )  # fmt: skip
        elif self.require_checksums:
            raise MigrationError(
                "the stream has no checksums, and they were asked for", offset=self.offset, section="vmdesc",
                field=checksums.KEY, expected="checksums", got=None,
            )  # fmt: skip
        return Vmdesc(self.offset, 5 + len(text), text, description, sums is not None)

    def _end(self) -> None:
        raise MigrationError(
            "bytes follow the end of the stream", offset=self.offset, expected="the end",
            got=bytes(self._buffer[self._pos : self._pos + 16]),
        )  # fmt: skip

    # -- sections that nobody described

    def _unknown(self) -> None:
        """Keep everything; when the vmdesc is complete, split by it."""
        self._need(1)
        found = self._kept.add(self._buffer[self._pos :])
        self._buffer, self._pos = memoryview(b""), 0
        if found is not None:
            self._split(*found)

    def _split(self, eof: int, description: dict[str, Any]) -> None:
        """The kept bytes up to ``eof`` as records; what follows is read as usual."""
        data = memoryview(bytes(self._kept.data))
        start = self._kept.offset
        raw_sections = split.split_by_vmdesc(data[:eof], description, start)
        self._buffer, self._pos, self.offset = data, 0, start
        self._kept = UnknownSections()
        for raw in raw_sections:
            while self._pos < raw.start:
                self._command()
            full, footer = self._raw_records(data, raw, start)
            if (raw.name, raw.instance_id) in self._seen:
                raise MigrationError("a section comes twice", offset=full.offset, section=full.key)
            self._seen.add((raw.name, raw.instance_id))
            self._sums[full.key] = zlib.crc32(data[raw.start : raw.data_end]), full.offset
            self._emit(full)
            self._emit(footer)
        self._state = self._record

    def _raw_records(self, data: memoryview, raw: split.RawSection, base: int) -> tuple[SectionFull, Footer]:
        """The section and its footer, decoded where it is known."""
        content = bytes(data[raw.data_start : raw.data_end])
        values: Values | None = None
        spans: dict[str, Span] = {}
        by = raw.by
        known = self._lookup(raw.name, raw.instance_id)
        if known is not None and raw.by == "vmdesc":
            values, spans = decode_section(
                known, content, version_id=raw.version_id, instance_id=raw.instance_id, base=base + raw.data_start
            )
            by = "description"
        head = base + raw.start, raw.data_end - raw.start, raw.section_id, raw.name, raw.instance_id, raw.version_id
        full = SectionFull(*head, content, values, spans, by)
        return full, Footer(base + raw.data_end, raw.end - raw.data_end, raw.section_id)


WHAT = {
    "_header": "the header",
    "_configuration": "the configuration",
    "_record": "a record or before one",
    "_ram_data": "RAM",
    "_footer": "the footer of a section",
    "_vmdesc": "the description after the state",
    "_unknown": "sections that nobody described",
}
"""What each state reads, for errors."""
