"""What is particular to one transport."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from pyvcpu.errors import ChannelError, ConfigurationError
from pyvcpu.migration.channel import BytesReader, BytesWriter, Faults, FaultyChannel, connect, listen, memory_pair


@pytest.mark.parametrize("uri", ["", "unix", "unix:", "http://x", "fd:3", "tcp:host", "tcp:host:port", "tcp:h:99999"])
def test_a_bad_uri_is_a_configuration_error(uri: str) -> None:
    with pytest.raises(ConfigurationError):
        connect(uri)
    with pytest.raises(ConfigurationError):
        listen(uri)


def test_a_refused_connection(tmp_path: Path) -> None:
    with pytest.raises(ChannelError, match="cannot connect"):
        connect(f"unix:{tmp_path}/nobody")
    with listen("tcp:127.0.0.1:0") as listener:
        uri = listener.uri
    assert not uri.endswith(":0")
    with pytest.raises(ChannelError, match="cannot connect"):
        connect(uri)


def test_listen_gives_up_after_its_timeout_and_on_close(tmp_path: Path) -> None:
    listener = listen(f"unix:{tmp_path}/s")
    with pytest.raises(ChannelError, match=r"nobody connected within 0\.05 s"):
        listener.accept(0.05)
    threading.Timer(0.1, listener.close).start()
    start = time.monotonic()
    with pytest.raises(ChannelError, match="closed"):
        listener.accept(30)
    assert time.monotonic() - start < 10
    assert not (tmp_path / "s").exists(), "the socket's path goes with the listener"


def test_a_stale_unix_socket_is_replaced_but_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = listen(f"unix:{path}")
    os.rename(path, tmp_path / "kept")
    listener.close()
    os.rename(tmp_path / "kept", path)
    listen(f"unix:{path}").close()
    path.write_text("precious")
    with pytest.raises(ChannelError, match="cannot listen"):
        listen(f"unix:{path}")
    assert path.read_text() == "precious"


def test_tcp_over_ipv6_brackets() -> None:
    try:
        listener = listen("tcp:[::1]:0")
    except ChannelError:
        pytest.skip("no IPv6 here")
    with listener, connect(listener.uri) as out, listener.accept(5) as incoming:
        out.write(b"six")
        assert incoming.read() == b"six"


def test_a_file_gets_its_name_only_when_finished(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    path.write_bytes(b"the good one")
    with connect(f"file:{path}") as out:
        out.write(b"half a")
    assert path.read_bytes() == b"the good one"
    assert os.listdir(tmp_path) == ["snapshot"]
    with connect(f"file:{path}") as out:
        out.write(b"whole")
        out.finish()
    assert path.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["snapshot"]


def test_file_errors(tmp_path: Path) -> None:
    for uri in (f"file:{tmp_path}/none/x", f"file:{tmp_path}"):
        with pytest.raises(ChannelError, match=r"cannot|is a directory"):
            listen(uri).accept()
        with pytest.raises(ChannelError, match="cannot"):
            connect(uri)


def test_a_full_disk_is_a_channel_error() -> None:
    with connect("file:/dev/full") as out, pytest.raises(ChannelError, match="No space left"):
        out.write(b"x")


def test_a_failing_command_fails_the_migration(tmp_path: Path) -> None:
    with connect("exec:cat > /dev/null; exit 3") as out:
        out.write(b"x")
        with pytest.raises(ChannelError, match="exit status 3"):
            out.finish()
    with listen("exec:echo half; exit 4").accept() as incoming:
        assert incoming.read() == b"half\n"
        with pytest.raises(ChannelError, match="exit status 4"):
            incoming.read()
    with connect("exec:kill -9 $$") as out, pytest.raises(ChannelError, match="SIGKILL"):
        out.finish()


def test_close_ends_the_wait_for_a_command_that_does_not_end(tmp_path: Path) -> None:
    out = connect(f"exec:sleep 1000 & echo $! > {tmp_path}/pid; wait")
    threading.Timer(0.3, out.close).start()
    start = time.monotonic()
    with pytest.raises(ChannelError, match="closed"):
        out.finish()
    assert time.monotonic() - start < 10
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(pid), "the whole process group is gone"


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_bytes_channels() -> None:
    writer = BytesWriter()
    writer.write_many([b"ab", memoryview(b"cd")])
    writer.finish()
    assert writer.getvalue() == b"abcd"
    reader = BytesReader(b"abcd")
    assert (reader.read(3), reader.read(3), reader.read(3)) == (b"abc", b"d", b"")
    assert reader.stored and not reader.duplex


def test_faults_are_exact() -> None:
    a, b = memory_pair()
    cut: list[bool] = []
    faulty = FaultyChannel(a, Faults(cut_write=10, corrupt=3, mask=0x80), lambda: cut.append(True))
    faulty.write(bytes(6))
    with pytest.raises(ChannelError, match="cut at byte 10"):
        faulty.write(bytes(6))
    got = b""
    while part := b.read():
        got += part
    assert got == b"\0\0\0\x80" + bytes(6)
    assert cut == [True] and faulty.is_cut and faulty.bytes_written == 10

    a, b = memory_pair()
    faulty = FaultyChannel(a, Faults(cut_at_write=2, cut_read=3))
    b.write(b"12345")
    assert faulty.read() == b"123"
    faulty.write(b"one")
    faulty.write(b"two")
    with pytest.raises(ChannelError):
        faulty.write(b"three")
    assert (b.read(), b.read(), b.read()) == (b"one", b"two", b"")

    a, b = memory_pair()
    faulty = FaultyChannel(b, Faults(cut_read=3))
    a.write(b"12345")
    assert faulty.read() == b"123"
    with pytest.raises(ChannelError, match="3 read"):
        faulty.read()
    assert a.wait_readable(1) and a.read() == b""


def test_a_delay_delays() -> None:
    a, b = memory_pair()
    faulty = FaultyChannel(a, Faults(delay=4, seconds=0.1))
    start = time.monotonic()
    faulty.write(b"12345678")
    assert time.monotonic() - start >= 0.1
    assert b.read() == b"1234" and b.read() == b"5678"
