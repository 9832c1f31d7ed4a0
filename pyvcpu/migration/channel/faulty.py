"""A channel that breaks on purpose, at a byte that the test chooses.

    cut      the transport dies before byte N of what is written (or read)
    corrupt  byte N goes out XORed with a mask
    delay    a pause before byte N, as a slow line would have
    chunk    transfers are split, so that records arrive in pieces

Offsets count the bytes of one direction.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from pyvcpu.errors import ChannelError
from pyvcpu.migration.channel.base import READ_SIZE, Channel, Data


@dataclass(frozen=True)
class Faults:
    """What goes wrong; offsets count bytes of one direction from the start, -1: never."""

    cut_write: int = -1
    cut_read: int = -1
    cut_at_write: int = -1
    """Die before the Nth call of write (0 is the first): a record boundary of the sessions."""
    corrupt: int = -1
    mask: int = 1
    delay: int = -1
    seconds: float = 0.0
    chunk: int = 0
    """Largest single transfer, in bytes; 0: as it comes."""


class FaultyChannel(Channel):
    """``inner`` with ``faults``. A cut closes ``inner``: the other end sees it as it would a dead process."""

    def __init__(self, inner: Channel, faults: Faults, on_cut: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.inner, self.faults, self._on_cut = inner, faults, on_cut
        self.uri, self.duplex, self.stored = f"faulty:{inner.uri}", inner.duplex, inner.stored
        self.writes = 0
        self.is_cut = False

    def _cut(self) -> None:
        self.is_cut = True
        self.inner.close()
        if self._on_cut is not None:
            self._on_cut()
        raise ChannelError(f"{self.uri}: cut at byte {self.bytes_written} written, {self.bytes_read} read")

    def write(self, data: Data) -> None:
        faults = self.faults
        if faults.cut_at_write == self.writes:
            self._cut()
        self.writes += 1
        view = memoryview(data).cast("B")
        while len(view):
            start = self.bytes_written
            room = len(view) if faults.chunk <= 0 else min(len(view), faults.chunk)
            for special in (faults.cut_write, faults.delay):
                if start < special < start + room:
                    room = special - start
            if start == faults.cut_write:
                self._cut()
            if start == faults.delay:
                time.sleep(faults.seconds)
            part = bytes(view[:room])
            if start <= faults.corrupt < start + room:
                at = faults.corrupt - start
                part = part[:at] + bytes([part[at] ^ faults.mask]) + part[at + 1 :]
            self.inner.write(part)
            self.bytes_written += room
            view = view[room:]

    def _room_to_read(self, size: int) -> int:
        if self.bytes_read == self.faults.cut_read:
            self._cut()
        if self.faults.cut_read > self.bytes_read:
            size = min(size, self.faults.cut_read - self.bytes_read)
        return size if self.faults.chunk <= 0 else min(size, self.faults.chunk)

    def read(self, size: int = READ_SIZE) -> bytes:
        data = self.inner.read(self._room_to_read(size))
        self.bytes_read += len(data)
        return data

    def read_now(self, size: int = READ_SIZE) -> bytes | None:
        data = self.inner.read_now(self._room_to_read(size))
        self.bytes_read += len(data or b"")
        return data

    def wait_readable(self, timeout: float | None = None) -> bool:
        return self.inner.wait_readable(timeout)

    def finish(self) -> None:
        self.inner.finish()

    def close(self) -> None:
        self.inner.close()
