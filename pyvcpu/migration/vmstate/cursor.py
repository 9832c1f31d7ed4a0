"""A place in a stream, from which descriptions read.

    base                     pos                              len(data)
     |<------- read -------->|<---------- remaining --------->|
     +-----------------------+--------------------------------+ - - - - - -
     | bytes already decoded | bytes that have arrived        | not here yet
     +-----------------------+--------------------------------+ - - - - - -

A cursor never waits. Where a field is longer than what has arrived it raises
:class:`NeedMore`, and the incremental reader tries again from the start of the section when
more bytes are in: decoding is pure, so nothing is lost. With ``final=True`` there is nothing to
wait for and the same case is a :class:`~pyvcpu.errors.MigrationError`.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from pyvcpu.errors import MigrationError


class NeedMore(Exception):
    """At least ``missing`` more bytes are needed; the incremental reader never lets this out."""

    def __init__(self, missing: int) -> None:
        self.missing = missing
        super().__init__(f"{missing} more bytes needed")


class Span(NamedTuple):
    """Where a field lies: ``offset`` from the start of the stream, ``size`` bytes, ``items`` of equal size."""

    offset: int
    size: int
    items: int = 1


class Cursor:
    """Reads big-endian values from ``data``, which starts at byte ``base`` of the stream.

    ``section`` ("name/instance") and the field path are put into every error. ``spans``, when
    given, collects the :class:`Span` of every field read, by field path.
    """

    __slots__ = ("_data", "_path", "base", "final", "pos", "section", "spans")

    def __init__(
        self,
        data: bytes | bytearray | memoryview,
        base: int = 0,
        *,
        final: bool = False,
        section: str | None = None,
        spans: dict[str, Span] | None = None,
    ) -> None:
        self._data = memoryview(data)
        self._path: list[str] = []
        self.base, self.final, self.section, self.spans = base, final, section, spans
        self.pos = 0

    @property
    def offset(self) -> int:
        """Bytes from the start of the stream to the next byte to be read."""
        return self.base + self.pos

    @property
    def remaining(self) -> int:
        """Bytes that have arrived and were not read."""
        return len(self._data) - self.pos

    # -- the field path, for errors and spans

    def push(self, name: str) -> None:
        self._path.append(name)

    def pop(self) -> None:
        self._path.pop()

    @property
    def path(self) -> str:
        """The path of the field being read, as ``segs[1]/base``."""
        return "/".join(self._path)

    def record(self, start: int, items: int = 1) -> None:
        """Note that the current field lies from absolute offset ``start`` to here."""
        if self.spans is not None:
            self.spans[self.path] = Span(start, self.offset - start, items)

    def error(
        self, message: str, *, expected: object = None, got: object = None, offset: int | None = None
    ) -> MigrationError:
        """An error that knows where it is (the caller raises it)."""
        return MigrationError(
            message,
            offset=self.offset if offset is None else offset,
            section=self.section,
            field=self.path or None,
            expected=expected,
            got=got,
        )

    # -- reading

    def need(self, size: int) -> None:
        """Make sure that ``size`` bytes can be read: NeedMore or MigrationError otherwise."""
        missing = size - self.remaining
        if missing <= 0:
            return
        if self.final:
            raise self.error("the stream ends inside a field", expected=f"{size} bytes", got=f"{self.remaining} bytes")
        raise NeedMore(missing)

    def take(self, size: int) -> memoryview:
        """The next ``size`` bytes, not copied."""
        self.need(size)
        start, self.pos = self.pos, self.pos + size
        return self._data[start : self.pos]

    def peek(self, size: int) -> memoryview:
        """Up to ``size`` bytes from here on, as many as have arrived; nothing is consumed."""
        return self._data[self.pos : self.pos + size]

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The next values of a fixed layout."""
        self.need(layout.size)
        values = layout.unpack_from(self._data, self.pos)
        self.pos += layout.size
        return values

    def u8(self) -> int:
        return int(self.take(1)[0])

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "big")
