"""Two ends in one process: for tests, snapshots to bytes, and two machines side by side."""

from __future__ import annotations

import threading
import time
from collections import deque

from pyvcpu.errors import ChannelError
from pyvcpu.migration.channel.base import READ_SIZE, Channel, Data, closed_error


class _Pipe:
    """One direction: a queue of byte strings, bounded when ``capacity`` is given."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.changed = threading.Condition()
        self.chunks: deque[bytes | memoryview] = deque()
        self.size = 0
        self.ended = False  # the writer is done
        self.dropped = False  # the reader is gone


class MemoryChannel(Channel):
    """One end of :func:`memory_pair`."""

    duplex = True

    def __init__(self, uri: str, incoming: _Pipe, outgoing: _Pipe) -> None:
        super().__init__()
        self.uri = uri
        self._in, self._out = incoming, outgoing
        self._closed = False

    def write(self, data: Data) -> None:
        pipe = self._out
        view = memoryview(data).cast("B")
        while len(view):
            with pipe.changed:
                while True:
                    if self._closed:
                        raise closed_error(self.uri)
                    if pipe.ended:
                        raise ChannelError(f"{self.uri}: write after the end of the stream")
                    if pipe.dropped:
                        raise ChannelError(f"{self.uri}: the other end is closed")
                    room = len(view) if pipe.capacity is None else pipe.capacity - pipe.size
                    if room > 0:
                        break
                    pipe.changed.wait()
                part = bytes(view[:room])
                pipe.chunks.append(part)
                pipe.size += len(part)
                self.bytes_written += len(part)
                pipe.changed.notify_all()
            view = view[room:]

    def read(self, size: int = READ_SIZE) -> bytes:
        while True:
            data = self.read_now(size)
            if data is not None:
                return data
            self.wait_readable()

    def read_now(self, size: int = READ_SIZE) -> bytes | None:
        pipe = self._in
        with pipe.changed:
            if self._closed:
                raise closed_error(self.uri)
            if not pipe.chunks:
                return b"" if pipe.ended else None
            first = pipe.chunks.popleft()
            if len(first) > size:
                rest = memoryview(first)  # a view: what is left of a large chunk is not copied for each read
                pipe.chunks.appendleft(rest[size:])
                first = rest[:size]
            data = bytes(first)
            pipe.size -= len(data)
            self.bytes_read += len(data)
            pipe.changed.notify_all()
            return data

    def wait_readable(self, timeout: float | None = None) -> bool:
        pipe = self._in
        end = None if timeout is None else time.monotonic() + timeout
        with pipe.changed:
            while not self._closed and not pipe.chunks and not pipe.ended:
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    return False
                pipe.changed.wait(left)
            if self._closed:
                raise closed_error(self.uri)
            return True

    def finish(self) -> None:
        if self._closed:
            raise closed_error(self.uri)
        with self._out.changed:
            self._out.ended = True
            self._out.changed.notify_all()

    def close(self) -> None:
        self._closed = True
        with self._in.changed:
            self._in.dropped = True
            self._in.chunks.clear()
            self._in.size = 0
            self._in.changed.notify_all()
        with self._out.changed:
            self._out.ended = True
            self._out.changed.notify_all()


def memory_pair(capacity: int | None = None, name: str = "memory") -> tuple[MemoryChannel, MemoryChannel]:
    """Two connected ends. ``capacity`` bounds the bytes in flight each way; None: a write never blocks."""
    there, back = _Pipe(capacity), _Pipe(capacity)
    return MemoryChannel(f"{name}:a", back, there), MemoryChannel(f"{name}:b", there, back)


class BytesWriter(MemoryChannel):
    """One-way: collects what is written; :meth:`getvalue` returns it."""

    duplex = False
    stored = True

    def __init__(self) -> None:
        super().__init__("memory:bytes", _Pipe(None), _Pipe(None))

    def getvalue(self) -> bytes:
        return b"".join(self._out.chunks)


class BytesReader(MemoryChannel):
    """One-way: ``data``, then the end of the stream."""

    duplex = False
    stored = True

    def __init__(self, data: Data) -> None:
        incoming = _Pipe(None)
        if len(data):
            incoming.chunks.append(bytes(data))
            incoming.size = len(data)
        incoming.ended = True
        super().__init__("memory:bytes", incoming, _Pipe(None))
