"""What a migration stream is made of. All integers are big-endian.

    header          "QEVM"  u32 version = 3
    configuration   07  u32 length  machine name  subsection*
    section start   01  section id u32  name (u8 length)  instance id u32  version id u32  data   footer
    section part    02  section id u32  data                                                      footer
    section end     03  section id u32  data                                                      footer
    section full    04  as start: a section that is sent once, at the end                         footer
    footer          7e  section id u32
    command         08  command u16  length u16  payload
    eof             00
    vmdesc          06  u32 length  JSON

Every byte of a stream belongs to exactly one record: ``offset`` and ``length`` of the records, in order,
tile it. Only the batches of RAM pages depend on how the bytes were chunked; :func:`pages` undoes that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pyvcpu.migration.vmstate.cursor import Span
from pyvcpu.migration.vmstate.fields import Values

MAGIC = b"QEVM"
STREAM_VERSION = 3
PAGE_SIZE = 4096


class RecordType(IntEnum):
    """The byte at the start of a record (QEMU_VM_*)."""

    EOF = 0x00
    SECTION_START = 0x01
    SECTION_PART = 0x02
    SECTION_END = 0x03
    SECTION_FULL = 0x04
    SUBSECTION = 0x05
    VMDESC = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    SECTION_FOOTER = 0x7E


class CommandType(IntEnum):
    """The numbers of commands (MIG_CMD_*)."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


COMMAND_LENGTHS = {CommandType.OPEN_RETURN_PATH: 0, CommandType.PING: 4, CommandType.SWITCHOVER_START: 0}
"""The commands of a precopy stream and the length of their payload."""


class RamFlag(IntEnum):
    """The low bits of the u64 before each piece of RAM data (RAM_SAVE_FLAG_*)."""

    ZERO = 0x02
    MEM_SIZE = 0x04
    PAGE = 0x08
    EOS = 0x10
    CONTINUE = 0x20
    XBZRLE = 0x40
    HOOK = 0x80
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200


@dataclass(frozen=True, slots=True)
class Header:
    offset: int
    length: int
    version: int = STREAM_VERSION


@dataclass(frozen=True, slots=True)
class Configuration:
    """``subsections`` maps "configuration/..." to its values; ``spans`` says where each field lies."""

    offset: int
    length: int
    name: str
    subsections: dict[str, Values] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class SectionStart:
    """The head of a section that comes in several parts: its data follows as records of its own."""

    offset: int
    length: int
    section_id: int
    name: str
    instance_id: int
    version_id: int


@dataclass(frozen=True, slots=True)
class SectionPart:
    """The head of a further part; ``name`` is from the start."""

    offset: int
    length: int
    section_id: int
    name: str
    instance_id: int


@dataclass(frozen=True, slots=True)
class SectionEnd:
    """The head of the last part."""

    offset: int
    length: int
    section_id: int
    name: str
    instance_id: int


@dataclass(frozen=True, slots=True)
class SectionFull:
    """A whole section. ``values`` is None where nobody described it: then ``data`` is all there is.

    ``data`` (without head and footer) begins at ``data_offset``. ``by`` says how its end was found:
    "description", "vmdesc" (the stream's own), or "footer", which is a ``guess``.
    """

    offset: int
    length: int
    section_id: int
    name: str
    instance_id: int
    version_id: int
    data: bytes
    values: Values | None
    spans: dict[str, Span] = field(default_factory=dict, compare=False)
    by: str = "description"

    @property
    def key(self) -> str:
        """ "name/instance", as in errors."""
        return f"{self.name}/{self.instance_id}"

    @property
    def data_offset(self) -> int:
        return self.offset + self.length - len(self.data)

    @property
    def guess(self) -> bool:
        return self.by == "footer"


@dataclass(frozen=True, slots=True)
class Footer:
    offset: int
    length: int
    section_id: int


@dataclass(frozen=True, slots=True)
class Command:
    """``crc`` is the CRC-32 of all bytes of the stream before this record."""

    offset: int
    length: int
    command: CommandType
    payload: bytes
    crc: int = 0

    @property
    def value(self) -> int:
        """The payload as a number (PING)."""
        return int.from_bytes(self.payload, "big")


@dataclass(frozen=True, slots=True)
class RamBlocks:
    """The list of RAM blocks: (name, size in bytes), in the order of the stream."""

    offset: int
    length: int
    blocks: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class RamPages:
    """Pages of one block in the order of the stream: whole (``data``) or filled with one byte (``fill``).

    ``addresses`` (n,) int64: bytes from the start of the block, page aligned, each inside the block.
    ``data`` (n, 4096) uint8: a view of the bytes fed in, good until their owner changes them. ``fill`` (n,) uint8.
    """

    offset: int
    length: int
    block: str
    addresses: npt.NDArray[np.int64]
    data: npt.NDArray[np.uint8] | None = None
    fill: npt.NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.addresses)


@dataclass(frozen=True, slots=True)
class RamEos:
    """The end of one part of RAM."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Opaque:
    """Data of a stream that ended early, which could not be split into sections."""

    offset: int
    length: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Eof:
    """The end of the state; ``crc`` is the CRC-32 of all bytes up to and with it."""

    offset: int
    length: int
    crc: int = 0


@dataclass(frozen=True, slots=True)
class Vmdesc:
    """The stream's description of itself. ``checked`` says that checksums were there and are right."""

    offset: int
    length: int
    json: bytes
    description: dict[str, Any] = field(default_factory=dict, compare=False)
    checked: bool = False


Record: TypeAlias = (
    Header
    | Configuration
    | SectionStart
    | SectionPart
    | SectionEnd
    | SectionFull
    | Footer
    | Command
    | RamBlocks
    | RamPages
    | RamEos
    | Opaque
    | Eof
    | Vmdesc
)


@dataclass(frozen=True, slots=True)
class Page:
    """One page out of a batch. ``data`` is None for a page filled with ``fill``."""

    block: str
    address: int
    data: bytes | None
    fill: int | None


def pages(records: Iterable[Record]) -> Iterator[Record | Page]:
    """The records with every batch of pages taken apart: what is independent of chunking."""
    for record in records:
        if not isinstance(record, RamPages):
            yield record
            continue
        for index, address in enumerate(record.addresses.tolist()):
            if record.data is not None:
                yield Page(record.block, address, record.data[index].tobytes(), None)
            else:
                assert record.fill is not None
                yield Page(record.block, address, None, int(record.fill[index]))
