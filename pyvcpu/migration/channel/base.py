"""What a channel is: ordered bytes to another process, and back where the transport allows.

    unix:PATH            stream socket                     both directions
    tcp:HOST:PORT        stream socket (PORT 0: any)       both directions
    file:PATH            a regular file (or FIFO, device)  one direction
    exec:COMMAND         a shell command's stdin/stdout    one direction
    (memory)             :func:`~pyvcpu.migration.channel.memory.memory_pair`, both directions

The names are QEMU's. Rules that every channel keeps, and that ``tests/contract/test_channel.py``
runs on each of them:

  - ``write`` returns when the transport has taken all bytes; ``read`` returns at least one byte,
    or ``b""`` once, for ever, when the other end closed.
  - ``close`` may come from any thread at any time, wakes whoever is blocked in the channel, and
    may be repeated. Whatever is called afterwards raises :class:`ChannelError`, as does every
    failure of the transport.
  - ``bytes_written`` counts every byte that may have left. A write that fails before its first
    byte leaves it unchanged: the source's hand-over rests on this.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Self, TypeAlias

from pyvcpu.errors import ChannelError, ConfigurationError

Data: TypeAlias = bytes | bytearray | memoryview

READ_SIZE = 1 << 20
"""How much one read asks for: large, so that the interpreter lock changes hands seldom."""


class Channel(abc.ABC):
    """One end of a connection. A reader and a writer may be in it at the same time, from two threads."""

    uri: str = ""
    duplex: bool = False
    """Bytes flow both ways: a return path is possible."""
    stored: bool = False
    """The bytes rest before they are read (a file): any time may pass in between."""

    def __init__(self) -> None:
        self.bytes_written = 0
        self.bytes_read = 0

    @abc.abstractmethod
    def write(self, data: Data) -> None:
        """Send all of ``data``; blocks. Raises ChannelError."""

    def write_many(self, chunks: Sequence[Data]) -> None:
        """Send several buffers in order, without joining them where the transport can."""
        for chunk in chunks:
            self.write(chunk)

    @abc.abstractmethod
    def read(self, size: int = READ_SIZE) -> bytes:
        """Up to ``size`` bytes, at least one; blocks. ``b""`` at the end of the stream. Raises ChannelError."""

    @abc.abstractmethod
    def read_now(self, size: int = READ_SIZE) -> bytes | None:
        """As :meth:`read`, but None instead of waiting."""

    @abc.abstractmethod
    def wait_readable(self, timeout: float | None = None) -> bool:
        """Wait until :meth:`read` would not block; False after ``timeout`` seconds. Raises ChannelError when closed."""

    @abc.abstractmethod
    def finish(self) -> None:
        """No more writes: let the other end see the end of the stream, and make sure that it arrives.

        For ``exec`` this waits for the command and refuses a non-zero exit; for ``file`` the file gets
        its name. Reading stays possible. Raises ChannelError.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Release everything. What was not finished may be lost."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.uri}>"


class Listener(abc.ABC):
    """The incoming end of a URI, before anyone has come."""

    uri: str
    """The URI for the other end; with the real port where port 0 was asked for."""

    @abc.abstractmethod
    def accept(self, timeout: float | None = None) -> Channel:
        """Wait for one connection, at most ``timeout`` seconds. Raises ChannelError."""

    @abc.abstractmethod
    def close(self) -> None:
        """Stop listening; wakes :meth:`accept`. From any thread, repeatable."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def split_uri(uri: str) -> tuple[str, str]:
    """``"unix:/run/a"`` -> ``("unix", "/run/a")``. Raises ConfigurationError on what is not a migration URI."""
    scheme, colon, rest = uri.partition(":")
    if not colon or not rest or scheme not in ("unix", "tcp", "file", "exec"):
        raise ConfigurationError(
            f"not a migration URI: {uri!r} (known: unix:PATH, tcp:HOST:PORT, file:PATH, exec:COMMAND)"
        )
    return scheme, rest


def closed_error(uri: str) -> ChannelError:
    return ChannelError(f"{uri}: the channel is closed")
