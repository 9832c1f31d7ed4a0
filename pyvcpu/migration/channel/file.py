"""``file:PATH``: a stream at rest.

A save goes to ``PATH.partial`` and gets its name in :meth:`FileChannel.finish`, so a failed or
cancelled save never replaces a good file by half a one. Where PATH is not a regular file (a
FIFO, ``/dev/fd/3``) the bytes go straight there.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat

from pyvcpu.errors import ChannelError
from pyvcpu.migration.channel.base import Channel, Listener
from pyvcpu.migration.channel.descriptor import DescriptorChannel


class FileChannel(DescriptorChannel):
    """One direction of a file."""

    stored = True

    def __init__(self, uri: str, read_fd: int, write_fd: int, partial: str | None = None, path: str = "") -> None:
        super().__init__(uri, read_fd, write_fd)
        self._partial, self._path = partial, path

    def finish(self) -> None:
        with self._waker:
            if self._write_fd < 0:
                return
            if self._partial is None:
                os.close(self._write_fd)  # a FIFO: only the close ends the stream
                self._write_fd = -1
                return
            try:
                os.fdatasync(self._write_fd)
                os.replace(self._partial, self._path)
            except OSError as error:
                raise ChannelError(f"{self.uri}: cannot complete the file: {error.strerror}") from error
            self._partial = None

    def _release(self) -> None:
        super()._release()
        if self._partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._partial)


def write_file(path: str) -> FileChannel:
    """A channel that writes ``path``. Raises ChannelError."""
    uri = f"file:{path}"
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(path).st_mode):
                return FileChannel(uri, -1, os.open(path, os.O_WRONLY | os.O_CLOEXEC))
        partial = f"{path}.partial"
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ChannelError(f"{uri}: cannot write: {error.strerror}") from error
    return FileChannel(uri, -1, fd, partial, path)


def read_file(path: str) -> FileChannel:
    """A channel that reads ``path``. Raises ChannelError."""
    uri = f"file:{path}"
    try:
        # Without O_NONBLOCK the open of a FIFO would wait for its writer where nothing can wake it.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            raise ChannelError(f"{uri}: is a directory")
    except OSError as error:
        raise ChannelError(f"{uri}: cannot read: {error.strerror}") from error
    return FileChannel(uri, fd, -1)


class FileListener(Listener):
    """``accept`` opens the file: it is there already, or it never comes."""

    def __init__(self, path: str) -> None:
        self.uri = f"file:{path}"
        self._path, self._closed = path, False

    def accept(self, timeout: float | None = None) -> Channel:
        if self._closed:
            raise ChannelError(f"{self.uri}: the listener is closed")
        channel = read_file(self._path)
        if stat.S_ISFIFO(os.stat(self._path).st_mode):
            # A FIFO that no one has opened for writing reads as its end: wait for the writer's first bytes.
            with channel._waker:
                if not channel._waker.wait(channel._read_fd, select.POLLIN, timeout):
                    raise ChannelError(f"{self.uri}: nobody wrote within {timeout:g} s")
        return channel

    def close(self) -> None:
        self._closed = True
