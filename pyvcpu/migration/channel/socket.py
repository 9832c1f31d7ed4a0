"""``unix:PATH`` and ``tcp:HOST:PORT``: stream sockets, both directions."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat

from pyvcpu.errors import ChannelError, ConfigurationError
from pyvcpu.migration.channel.base import Channel, Listener
from pyvcpu.migration.channel.descriptor import DescriptorChannel, Waker

BUFFER_SIZE = 4 << 20
"""Asked for as the kernel's socket buffers; it gives what its limits allow."""


class SocketChannel(DescriptorChannel):
    """A connected stream socket; takes ``sock`` over."""

    duplex = True

    def __init__(self, sock: socket.socket, uri: str) -> None:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_SIZE)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            # PING, PONG and EOF are small and are waited for.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        super().__init__(uri, sock.fileno(), sock.fileno())

    def finish(self) -> None:
        """Half-close: the other end reads the end of the stream, and may still answer."""
        with self._waker:
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise ChannelError(f"{self.uri}: shutdown failed: {error.strerror}") from error

    def close(self) -> None:
        # Closed first, so that no reader of ours takes the shutdown for the other end's; then the shutdown, so
        # that the other end sees the close at once, though a thread of ours is still leaving.
        with contextlib.suppress(OSError, ChannelError), self._waker:
            super().close()
            self._socket.shutdown(socket.SHUT_RDWR)

    def _release(self) -> None:
        self._read_fd = self._write_fd = -1
        self._socket.close()


class SocketListener(Listener):
    """A listening socket; removes a unix socket's path when it closes."""

    def __init__(self, uri: str, sock: socket.socket, path: str | None) -> None:
        self.uri = uri
        self._socket, self._path = sock, path
        sock.setblocking(False)
        self._waker = Waker(uri)
        self._waker.release = self._release  # type: ignore[method-assign]

    def accept(self, timeout: float | None = None) -> Channel:
        with self._waker:
            while True:
                if not self._waker.wait(self._socket.fileno(), select.POLLIN, timeout):
                    raise ChannelError(f"{self.uri}: nobody connected within {timeout:g} s")
                try:
                    connection, _ = self._socket.accept()
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise ChannelError(f"{self.uri}: accept failed: {error.strerror}") from error
                return SocketChannel(connection, self.uri)

    def close(self) -> None:
        self._waker.close()

    def _release(self) -> None:
        self._socket.close()
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)


def connect_unix(path: str, timeout: float | None = None) -> SocketChannel:
    """Connect to ``path``. Raises ChannelError."""
    uri = f"unix:{path}"
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(timeout)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise ChannelError(f"{uri}: cannot connect: {error.strerror or error}") from error
    return SocketChannel(sock, uri)


def listen_unix(path: str) -> SocketListener:
    """Listen on ``path``, replacing a socket that is there already, as QEMU does. Raises ChannelError."""
    uri = f"unix:{path}"
    sock = socket.socket(socket.AF_UNIX)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode):
                os.unlink(path)
        sock.bind(path)
        sock.listen(1)
    except OSError as error:
        sock.close()
        raise ChannelError(f"{uri}: cannot listen: {error.strerror or error}") from error
    return SocketListener(uri, sock, path)


def _host_and_port(rest: str) -> tuple[str, int]:
    host, colon, port = rest.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ConfigurationError(f"tcp:{rest}: expected tcp:HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def connect_tcp(rest: str, timeout: float | None = None) -> SocketChannel:
    """Connect to ``"HOST:PORT"`` (``"[::1]:PORT"`` too). Raises ChannelError, ConfigurationError."""
    host, port = _host_and_port(rest)
    try:
        sock = socket.create_connection((host or "localhost", port), timeout)
    except OSError as error:
        raise ChannelError(f"tcp:{rest}: cannot connect: {error.strerror or error}") from error
    return SocketChannel(sock, f"tcp:{rest}")


def listen_tcp(rest: str) -> SocketListener:
    """Listen on ``"HOST:PORT"``; an empty HOST is every address, PORT 0 any free port."""
    host, port = _host_and_port(rest)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(1)
    except OSError as error:
        sock.close()
        raise ChannelError(f"tcp:{rest}: cannot listen: {error.strerror or error}") from error
    real = sock.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    return SocketListener(f"tcp:{shown}:{real}", sock, None)
