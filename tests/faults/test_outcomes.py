"""The table of outcomes in docs/outcomes.md, but for its first rows, which test_cut.py holds."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvcpu.errors import ChannelError, MigrationError
from pyvcpu.migration.channel import Faults, FaultyChannel, connect, memory_pair
from pyvcpu.migration.session import HandOverUnconfirmed, MigrationParameters, SourceSession
from pyvcpu.migration.snapshot import load_snapshot_file, save_snapshot
from pyvcpu.migration.wire import return_path
from pyvcpu.migration.wire.records import Command, CommandType, Eof, SectionEnd
from tests.moving import contents, make_empty, make_walker, walked
from tests.unit.migration.session.test_bad_input import records


def test_a_file_that_cannot_be_written_leaves_the_guest_here(tmp_path: Path) -> None:
    machine = make_walker()
    machine.start()
    channel = FaultyChannel(connect(f"file:{tmp_path}/x"), Faults(cut_write=1000))
    with pytest.raises(ChannelError):
        SourceSession(machine, channel).run()
    assert machine.running and not (tmp_path / "x").exists()
    machine.stop()
    assert contents(machine) == walked(machine.instructions)


def test_a_command_that_fails_after_all_bytes_leaves_the_guest_paused() -> None:
    machine = make_walker()
    machine.start()
    session = SourceSession(machine, connect("exec:cat > /dev/null; exit 1"))
    with pytest.raises(HandOverUnconfirmed, match="exit status 1"):
        session.run()
    assert session.status == "failed" and machine.status == "postmigrate" and not machine.running
    at = machine.instructions
    machine.start(50)  # cont
    machine.wait(10)
    assert contents(machine) == walked(at + 50)


def test_a_file_survives_its_source(tmp_path: Path) -> None:
    machine, copy = make_walker(), make_empty()
    machine.start()
    SourceSession(machine, connect(f"file:{tmp_path}/x")).run()
    assert machine.status == "postmigrate"
    load_snapshot_file(copy, tmp_path / "x", require_checksums=True)
    assert contents(copy) == contents(machine) == walked(machine.instructions)


class Qemu(threading.Thread):
    """A destination that only does what QEMU does: reads, echoes each PING, says SHUT ``shut`` after the trailer."""

    def __init__(self, channel: object, shut: int | None, pong: Callable[[int], bool] = lambda n: True) -> None:
        super().__init__(daemon=True)
        self.channel, self.shut, self.answers = channel, shut, pong
        self.data = b""
        self.pings = 0

    def run(self) -> None:
        channel = self.channel
        try:
            while b'"page_size"' not in self.data:
                part = channel.read()  # type: ignore[attr-defined]
                if not part:
                    return
                self.data += part
                while True:
                    at = self.data.find(b"\x08\x00\x02\x00\x04", getattr(self, "seen", 0))
                    if at < 0 or at + 9 > len(self.data):
                        break
                    self.seen = at + 9
                    self.pings += 1
                    if self.answers(self.pings):
                        value = int.from_bytes(self.data[at + 5 : at + 9], "big")
                        channel.write(return_path.pong(value))  # type: ignore[attr-defined]
            if self.shut is not None:
                channel.write(return_path.shut(self.shut))  # type: ignore[attr-defined]
            channel.close()  # type: ignore[attr-defined]
        except ChannelError:
            pass


@pytest.mark.parametrize(("shut", "status"), [(0, "completed"), (1, "failed"), (None, "failed")])
def test_a_qemu_destination(shut: int | None, status: str) -> None:
    machine = make_walker()
    machine.start()
    out, incoming = memory_pair()
    qemu = Qemu(incoming, shut)
    qemu.start()
    session = SourceSession(machine, out, MigrationParameters(profile="qemu-7.2-tcg", max_bandwidth=None))
    if shut == 0:
        session.run()
    else:
        with pytest.raises(HandOverUnconfirmed):
            session.run()
    assert session.peer is None, "it echoes, and does not say who it is"
    assert (session.status, machine.status) == (status, "postmigrate")
    qemu.join(5)
    assert qemu.pings == 3


def test_a_qemu_that_dies_before_ready_leaves_the_guest_here() -> None:
    machine = make_walker()
    machine.start()
    out, incoming = memory_pair()
    Qemu(incoming, 0, lambda n: n < 3).start()
    parameters = MigrationParameters(profile="qemu-7.2-tcg", ready_timeout=0.2, max_bandwidth=None)
    with pytest.raises(ChannelError, match="READY"):
        SourceSession(machine, out, parameters).run()
    assert machine.running
    machine.stop()
    assert contents(machine) == walked(machine.instructions)


@pytest.mark.parametrize(("profile", "sent"), [("qemu-7.2-tcg", 0), ("qemu-10.0-tcg", 1), ("pyvcpu", 0)])
def test_switchover_start_is_for_those_who_know_it(profile: str, sent: int) -> None:
    machine = make_walker()
    machine.run(30)
    found = records(save_snapshot(machine, profile))
    starts = [r.offset for r in found if isinstance(r, Command) and r.command == CommandType.SWITCHOVER_START]
    (end,) = [r.offset for r in found if isinstance(r, SectionEnd)]
    (eof,) = [r.offset for r in found if isinstance(r, Eof)]
    assert len(starts) == sent and all(offset < end < eof for offset in starts)


def test_an_interrupt_from_the_keyboard_waits_for_the_migration() -> None:
    """Machine.run() in the main thread, held: Ctrl-C must not let the guest slip out of the hold."""
    machine = make_walker()
    out, incoming = memory_pair()
    session = SourceSession(
        machine, out, MigrationParameters(profile="qemu-7.2-tcg", ready_timeout=1, max_bandwidth=None)
    )
    Qemu(incoming, 0, lambda n: n < 3).start()
    seen: list[int] = []

    def press() -> None:
        while machine.instructions < 1000:
            time.sleep(0.001)
        session.start()
        while session.status != "device":
            time.sleep(0.001)
        time.sleep(0.2)
        seen.append(machine.instructions)
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.3)
        seen.append(machine.instructions)

    thread = threading.Thread(target=press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread.start()
        assert machine.run() == "request"
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    with pytest.raises(MigrationError):
        session.wait(10)
    assert seen[0] == seen[1], "it stood still until the migration had ended"
    assert contents(machine) == walked(machine.instructions)
