"""The bytes from the first unknown section on, and the search for the vmdesc that ends them.

    FULL data ? ... FULL data ?  00 06 length {"..."}
    ^ offset        (unbounded)  ^ a candidate: EOF, vmdesc, an opening brace

Data may look like a candidate, so one counts only when it is complete and is JSON that lists devices.
Every byte is searched once; bytes and candidates are bounded.
"""

from __future__ import annotations

from typing import Any

from pyvcpu.errors import MigrationError
from pyvcpu.migration.wire import split
from pyvcpu.migration.wire.vmdesc import try_vmdesc


class UnknownSections:
    """Bytes are kept from byte ``offset`` of the stream on, ``limit`` of them at most."""

    def __init__(self, offset: int = 0, *, limit: int = 0, vmdesc_limit: int = 0) -> None:
        self.offset, self.limit, self.vmdesc_limit = offset, limit, vmdesc_limit
        self.data = bytearray()
        self._scanned, self._tried = 0, 0
        self._candidates: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.data)

    @property
    def key(self) -> str | None:
        """The first section, "name/instance"."""
        head = split.section_head(memoryview(bytes(self.data[:300])), 0) if self.data else None
        return f"{head[1]}/{head[2]}" if head else None

    def add(self, piece: memoryview) -> tuple[int, dict[str, Any]] | None:
        """Keep ``piece``. Once the vmdesc is complete: where EOF is, and the vmdesc. MigrationError."""
        self.data += piece
        for at, length in split.vmdesc_candidates(self.data, self._scanned):
            if length <= self.vmdesc_limit and at + 6 + length <= self.limit:
                self._candidates.append((at, length))
                self._bound(len(self._candidates))
        # A pattern that is cut off here is looked for again with the next bytes.
        self._scanned = max(self._scanned, len(self.data) - split.CANDIDATE + 1)
        for at, length in list(self._candidates):
            end = at + 6 + length
            if end > len(self.data):
                continue
            self._candidates.remove((at, length))
            description = try_vmdesc(self.data[at + 6 : end])
            if description is not None:
                return at, description
            self._tried += 1
            self._bound(self._tried)
        if len(self.data) > self.limit:
            raise self._error("the sections from the first unknown one on are too long")
        return None

    def _bound(self, count: int) -> None:
        if count > split.MAX_CANDIDATES:
            raise self._error("too many places look like the stream's description of itself")

    def _error(self, message: str) -> MigrationError:
        return MigrationError(
            message,
            offset=self.offset,
            section=self.key,
            expected=f"at most {self.limit:#x} bytes until the end of the stream",
            got="more",
        )
