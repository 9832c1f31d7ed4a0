"""What every channel promises. A new transport is tested by being listed in ``TRANSPORTS``."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvcpu.errors import ChannelError
from pyvcpu.migration.channel import Channel, Faults, FaultyChannel, connect, listen, memory_pair
from pyvcpu.migration.channel.file import read_file

Pair = Callable[[Path], tuple[Channel, Callable[[], Channel]]]
"""Makes the writing end, and a function that gives the reading end (for a stored one: after finish)."""


def _socket(make_uri: Callable[[Path], str]) -> Pair:
    def pair(tmp_path: Path) -> tuple[Channel, Callable[[], Channel]]:
        with listen(make_uri(tmp_path)) as listener:
            out = connect(listener.uri)
            incoming = listener.accept(5)
        return out, lambda: incoming

    return pair


def _memory(tmp_path: Path) -> tuple[Channel, Callable[[], Channel]]:
    a, b = memory_pair(capacity=1 << 16)
    return a, lambda: b


def _file(tmp_path: Path) -> tuple[Channel, Callable[[], Channel]]:
    uri = f"file:{tmp_path}/stream"
    return connect(uri), lambda: listen(uri).accept(5)


def _exec(tmp_path: Path) -> tuple[Channel, Callable[[], Channel]]:
    return connect(f"exec:cat > {tmp_path}/stream"), lambda: listen(f"exec:cat {tmp_path}/stream").accept(5)


def _fifo(tmp_path: Path) -> tuple[Channel, Callable[[], Channel]]:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    incoming = read_file(str(path))  # first, or the writer's open would find no reader
    return connect(f"file:{path}"), lambda: incoming


def _faulty(tmp_path: Path) -> tuple[Channel, Callable[[], Channel]]:
    a, b = memory_pair(capacity=1 << 16)
    return FaultyChannel(a, Faults(chunk=1000)), lambda: FaultyChannel(b, Faults(chunk=777))


TRANSPORTS: dict[str, Pair] = {
    "unix": _socket(lambda tmp: f"unix:{tmp}/s"),
    "tcp": _socket(lambda tmp: "tcp:127.0.0.1:0"),
    "memory": _memory,
    "file": _file,
    "exec": _exec,
    "fifo": _fifo,
    "faulty": _faulty,
}
STORED = {"file", "exec"}  # read after the write has finished
BLOCKING = sorted(set(TRANSPORTS) - STORED)
DUPLEX = ["unix", "tcp", "memory", "faulty"]


@pytest.fixture(params=sorted(TRANSPORTS))
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ends(transport: str, tmp_path: Path) -> Iterator[tuple[Channel, Callable[[], Channel]]]:
    out, accept = TRANSPORTS[transport](tmp_path)
    opened: list[Channel] = [out]

    def get() -> Channel:
        channel = accept()
        opened.append(channel)
        return channel

    if transport not in STORED:
        incoming = get()
        yield out, lambda: incoming
    else:
        yield out, get
    for channel in opened:
        channel.close()


def read_all(channel: Channel) -> bytes:
    parts = []
    while part := channel.read():
        parts.append(part)
    assert channel.read() == b"", "the end of the stream stays the end"
    return b"".join(parts)


def in_thread(function: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Run it; its result, or its exception, lands in the list."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(function())
        except ChannelError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


DATA = bytes(range(256)) * 4096 + b"tail"


def test_all_bytes_arrive_in_order(transport: str, ends: tuple[Channel, Callable[[], Channel]]) -> None:
    out, accept = ends

    def send() -> None:
        out.write_many([DATA[:5], b"", memoryview(DATA)[5:70000], bytearray(DATA[70000:])])
        out.finish()

    if transport in STORED:
        send()
        incoming = accept()
        assert read_all(incoming) == DATA
    else:
        thread, outcome = in_thread(send)
        incoming = accept()
        got = bytearray()
        while part := incoming.read(50_000):
            assert len(part) <= 50_000
            got += part
        thread.join(5)
        assert outcome == [None] and got == DATA
    assert out.bytes_written == len(DATA) and incoming.bytes_read == len(DATA)


def test_everything_after_close_is_a_channel_error(ends: tuple[Channel, Callable[[], Channel]]) -> None:
    out, _ = ends
    out.close()
    out.close()
    for call in (lambda: out.write(b"x"), lambda: out.read(1), lambda: out.read_now(1), lambda: out.wait_readable(0)):
        with pytest.raises(ChannelError):
            call()
    assert out.bytes_written == 0


def test_a_wait_has_a_timeout(transport: str, ends: tuple[Channel, Callable[[], Channel]]) -> None:
    if transport in STORED:
        pytest.skip("a stored stream is always readable")
    out, accept = ends
    incoming = accept()
    assert incoming.read_now() is None
    start = time.monotonic()
    assert incoming.wait_readable(0.05) is False
    assert 0.04 < time.monotonic() - start < 2
    out.write(b"x")
    assert incoming.wait_readable(5) is True
    assert incoming.read_now() == b"x"


@pytest.mark.parametrize("name", BLOCKING)
def test_close_wakes_a_blocked_writer(name: str, tmp_path: Path) -> None:
    out, accept = TRANSPORTS[name](tmp_path)
    incoming = accept()
    thread, outcome = in_thread(lambda: out.write(bytes(64 << 20)))
    time.sleep(0.1)
    assert thread.is_alive(), "64 MiB must not fit into any buffer"
    out.close()
    thread.join(5)
    assert len(outcome) == 1 and isinstance(outcome[0], ChannelError)
    assert 0 < out.bytes_written < 64 << 20
    incoming.close()


@pytest.mark.parametrize("name", DUPLEX)
@pytest.mark.parametrize("end", ["outgoing", "incoming"])
def test_close_wakes_a_blocked_reader(name: str, end: str, tmp_path: Path) -> None:
    out, accept = TRANSPORTS[name](tmp_path)
    incoming = accept()
    victim = out if end == "outgoing" else incoming
    thread, outcome = in_thread(victim.read)
    time.sleep(0.05)
    assert thread.is_alive()
    victim.close()
    thread.join(5)
    assert len(outcome) == 1 and isinstance(outcome[0], ChannelError)
    out.close()
    incoming.close()


@pytest.mark.parametrize("name", DUPLEX)
def test_the_way_back_and_the_half_close(name: str, tmp_path: Path) -> None:
    out, accept = TRANSPORTS[name](tmp_path)
    incoming = accept()
    assert out.duplex and incoming.duplex
    out.write(b"there")
    assert incoming.read(100) == b"there"
    incoming.write(b"back")
    assert out.read(100) == b"back"
    out.finish()
    assert incoming.read() == b""
    incoming.write(b"after the half-close")
    assert out.read(100) == b"after the half-close"
    incoming.close()
    assert out.read() == b""
    out.close()


@pytest.mark.parametrize("name", DUPLEX)
def test_a_dead_reader_fails_the_writer(name: str, tmp_path: Path) -> None:
    out, accept = TRANSPORTS[name](tmp_path)
    accept().close()
    with pytest.raises(ChannelError):
        for _ in range(100):
            out.write(bytes(1 << 16))
    out.close()
