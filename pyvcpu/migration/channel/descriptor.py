"""Channels over file descriptors: what sockets, pipes and files share.

Descriptors are non-blocking, and every wait is a ``poll`` of the descriptor and of an eventfd.
``close`` from another thread signals the eventfd; the descriptors themselves are released by
the last thread to leave, so that a number is never reused under a running system call.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from pyvcpu.errors import ChannelError
from pyvcpu.migration.channel.base import READ_SIZE, Channel, Data, closed_error

IOV_MAX = 512
"""Buffers per writev: below the kernel's 1024."""


class Waker:
    """An eventfd that ends every wait of its owner, for good, and the count of threads inside."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._inside = 0
        self.closed = False
        self._released = False

    def __enter__(self) -> None:
        with self._lock:
            if self.closed:
                raise closed_error(self.what)
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            last = self.closed and self._inside == 0
        if last:
            self._release_once()

    def wait(self, fd: int, events: int, timeout: float | None = None) -> bool:
        """Wait for ``events`` on ``fd``; False after ``timeout`` seconds; ChannelError when closed meanwhile."""
        poller = select.poll()
        poller.register(fd, events)
        poller.register(self._fd, select.POLLIN)
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if end is None else max(0.0, end - time.monotonic()) * 1000
            ready = poller.poll(left)
            if self.closed:
                raise closed_error(self.what)
            if any(number == fd for number, _ in ready):
                return True
            if not ready and end is not None and time.monotonic() >= end:
                return False

    def close(self) -> bool:
        """Wake everyone. True for the first caller."""
        with self._lock:
            if self.closed:
                return False
            self.closed = True
            idle = self._inside == 0
            os.eventfd_write(self._fd, 1)
        if idle:
            self._release_once()
        return True

    def _release_once(self) -> None:
        with self._lock:
            if self._released:
                return
            self._released = True
        self.release()
        os.close(self._fd)

    def release(self) -> None:
        """Close the owner's descriptors: runs once, when no thread is inside. Set by the owner."""


class DescriptorChannel(Channel):
    """Reads ``read_fd`` and writes ``write_fd`` (-1: not in this direction); owns both."""

    def __init__(self, uri: str, read_fd: int, write_fd: int) -> None:
        super().__init__()
        self.uri = uri
        self._read_fd, self._write_fd = read_fd, write_fd
        self._waker = Waker(uri)
        self._waker.release = self._release  # type: ignore[method-assign]
        for fd in {read_fd, write_fd} - {-1}:
            os.set_blocking(fd, False)

    # -- writing

    def write(self, data: Data) -> None:
        self.write_many((data,))

    def write_many(self, chunks: Sequence[Data]) -> None:
        with self._waker:
            views = [memoryview(chunk).cast("B") for chunk in chunks if len(chunk)]
            at = 0
            while at < len(views):
                try:
                    sent = self._send(views[at : at + IOV_MAX])
                except BlockingIOError:
                    self._waker.wait(self._write_fd, select.POLLOUT)
                    continue
                except OSError as error:
                    raise ChannelError(f"{self.uri}: write failed: {error.strerror or error}") from error
                self.bytes_written += sent
                while sent:
                    size = len(views[at])
                    if sent < size:
                        views[at] = views[at][sent:]
                        break
                    sent -= size
                    at += 1

    def _send(self, views: list[memoryview]) -> int:
        if self._write_fd < 0:
            raise ChannelError(f"{self.uri}: this end only reads")
        return os.writev(self._write_fd, views)

    # -- reading

    def read(self, size: int = READ_SIZE) -> bytes:
        while True:
            data = self.read_now(size)
            if data is not None:
                return data
            self.wait_readable()

    def read_now(self, size: int = READ_SIZE) -> bytes | None:
        with self._waker:
            if self._read_fd < 0:
                raise ChannelError(f"{self.uri}: this end only writes")
            try:
                data = os.read(self._read_fd, size)
            except BlockingIOError:
                return None
            except OSError as error:
                raise ChannelError(f"{self.uri}: read failed: {error.strerror or error}") from error
            if not data:
                if self._waker.closed:
                    raise closed_error(self.uri)
                self._at_end()
            self.bytes_read += len(data)
            return data

    def wait_readable(self, timeout: float | None = None) -> bool:
        with self._waker:
            if self._read_fd < 0:
                raise ChannelError(f"{self.uri}: this end only writes")
            return self._waker.wait(self._read_fd, select.POLLIN, timeout)

    def _at_end(self) -> None:
        """The read side is at its end: a chance to find out that it came too early."""

    # -- the end

    def close(self) -> None:
        self._waker.close()

    def _release(self) -> None:
        for fd in {self._read_fd, self._write_fd} - {-1}:
            os.close(fd)
        self._read_fd = self._write_fd = -1
