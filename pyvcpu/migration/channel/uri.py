"""From a migration URI to a channel: the one place that knows every transport."""

from __future__ import annotations

from pyvcpu.migration.channel.base import Channel, Listener, split_uri
from pyvcpu.migration.channel.exec import ExecChannel, ExecListener
from pyvcpu.migration.channel.file import FileListener, write_file
from pyvcpu.migration.channel.socket import connect_tcp, connect_unix, listen_tcp, listen_unix

CONNECT_TIMEOUT = 10.0
"""Seconds that :func:`connect` waits by default."""


def connect(uri: str, timeout: float | None = CONNECT_TIMEOUT) -> Channel:
    """The outgoing end of ``uri``: what ``migrate URI`` writes to. Raises ChannelError, ConfigurationError."""
    scheme, rest = split_uri(uri)
    if scheme == "unix":
        return connect_unix(rest, timeout)
    if scheme == "tcp":
        return connect_tcp(rest, timeout)
    if scheme == "file":
        return write_file(rest)
    return ExecChannel(rest, outgoing=True)


def listen(uri: str) -> Listener:
    """The incoming end of ``uri``: what ``--incoming URI`` reads. Raises ChannelError, ConfigurationError."""
    scheme, rest = split_uri(uri)
    if scheme == "unix":
        return listen_unix(rest)
    if scheme == "tcp":
        return listen_tcp(rest)
    return FileListener(rest) if scheme == "file" else ExecListener(rest)
