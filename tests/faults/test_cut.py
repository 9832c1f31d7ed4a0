"""The channel is cut, or the destination dies, at every record boundary of a migration.

What must hold, always: at most one guest runs. Before the hand-over (the first byte of EOF) the source goes on as
if nothing had been, and can migrate again; from then on it stays paused until it is told otherwise.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyvcpu.errors import ChannelError, MigrationError
from pyvcpu.machine import Machine
from pyvcpu.migration.channel import Faults, FaultyChannel, connect, memory_pair
from pyvcpu.migration.session import HandOverUnconfirmed, MigrationParameters, SourceSession, Step
from pyvcpu.migration.wire.reader import StreamReader
from pyvcpu.migration.wire.records import Eof, pages
from tests.moving import Outcome, contents, make_empty, make_walker, migrate, walked

START, BETWEEN = 400, 53
NONE = Faults()
PARAMETERS = MigrationParameters(max_bandwidth=None, max_iterations=2)


class Guest:
    """A source whose guest runs a little at every step, until it is stopped: the same bytes every time."""

    def __init__(self) -> None:
        self.machine = make_walker()
        self.machine.run(START)
        self.stopped = False

    def between(self, step: Step) -> None:
        self.stopped = self.stopped or step.name == "stopped"
        if not self.stopped and step.name in ("synchronised", "batch"):
            self.machine.run(BETWEEN)


def attempt(faults: Faults, *, back: Faults = NONE, die_after: int = -1) -> tuple[Outcome, Machine]:
    """One migration with faults on the way there, on the way back, or a destination that dies after so many records."""
    guest = Guest()
    destination = make_empty()
    a, b = memory_pair()
    taken = 0

    def on_record(step: Step) -> None:
        nonlocal taken
        if step.name == "record":
            taken += 1
            if taken == die_after:
                b.close()  # as the kernel does for a process that is gone

    outcome = migrate(
        guest.machine, destination, ends=(FaultyChannel(a, faults), FaultyChannel(b, back)), parameters=PARAMETERS,
        between=guest.between, on_record=on_record,
    )  # fmt: skip
    return outcome, destination


def clean_run() -> tuple[list[int], int, int, int]:
    """(offsets of records and pages, number of records, offset of EOF, length) of a run without faults."""
    guest = Guest()
    captured = bytearray()

    class Tap(FaultyChannel):
        def write(self, data: bytes | bytearray | memoryview) -> None:
            captured.extend(data)
            super().write(data)

    a, b = memory_pair()
    outcome = migrate(
        guest.machine, make_empty(), ends=(Tap(a, Faults()), b), parameters=PARAMETERS, between=guest.between
    )
    assert outcome.started
    sections = {(e.description.name, e.instance_id): e.description for e in guest.machine.sections()}
    records = list(StreamReader(sections).feed(bytes(captured)))
    (eof,) = [record.offset for record in records if isinstance(record, Eof)]
    # Pages too are boundaries; a batch of them is one record.
    inside = [r.offset for r in records] + [
        r.offset + r.length * i // len(r) for r in records if hasattr(r, "addresses") for i in range(len(r))
    ]
    assert len(list(pages(records))) > len(records)
    return sorted(set(inside)), len(records), eof, len(captured)


BOUNDARIES, RECORDS, EOF, LENGTH = clean_run()


def check(outcome: Outcome, destination: Machine) -> None:
    """The rules above, and that each guest that may run is whole."""
    source = outcome.source
    assert not (outcome.started and outcome.source_may_run), "two guests run"
    machine = source.machine
    if source.handed_over:
        assert machine.status == "postmigrate" and isinstance(outcome.source_error, HandOverUnconfirmed)
    else:
        assert source.status == "failed" and machine.status == "paused" and not outcome.started
        assert destination.status == "inmigrate"
    assert not machine.ram.logging
    at = machine.instructions
    assert contents(machine) == walked(at)
    if outcome.started:
        assert contents(destination) == walked(destination.instructions)
    # An operator says cont (or the run simply goes on): its memory is whole, and it can move again.
    machine.run(100)
    second = make_empty()
    again = migrate(machine, second, parameters=PARAMETERS)
    assert again.started and again.source.status == "completed"
    second.run(100)
    assert contents(second) == walked(at + 200)
    for each in (machine, destination, second):
        each.close()


@pytest.mark.parametrize("offset", [*BOUNDARIES, LENGTH - 1])
def test_the_channel_is_cut_on_the_way_there(offset: int) -> None:
    outcome, destination = attempt(Faults(cut_write=offset))
    assert outcome.source.handed_over == (offset > EOF), "the hand-over is the first byte of EOF, no other"
    assert not outcome.started, "without the whole trailer nothing starts"
    assert outcome.source_error is not None
    check(outcome, destination)


@pytest.mark.parametrize("records", range(1, RECORDS))
def test_the_destination_dies_after_a_record(records: int) -> None:
    outcome, destination = attempt(Faults(), die_after=records)
    assert outcome.source_error is not None and not outcome.started
    check(outcome, destination)


def test_the_way_back_is_cut_at_every_byte_that_matters() -> None:
    """Before READY the source resumes; SHUT lost: the destination runs, the source stays paused."""
    seen = set()
    for offset in (0, 4, 8, 20, 100):
        outcome, destination = attempt(Faults(cut_read=offset))
        assert not outcome.source.handed_over
        check(outcome, destination)
    whole, _ = attempt(Faults())
    replies = whole.source.channel.bytes_read
    for offset in range(replies - 16, replies):  # PONG (READY), then SHUT 0, 8 bytes each
        outcome, destination = attempt(Faults(cut_read=offset))
        ready = offset > replies - 8  # at this very byte the cut is seen before EOF goes out
        assert outcome.source.handed_over == outcome.started == ready
        seen.add(outcome.started)
        check(outcome, destination)
    assert seen == {False, True}


@pytest.mark.parametrize("offset", sorted({*range(9, EOF, max(1, EOF // 60)), EOF - 5, EOF}))
def test_damage_on_the_way_is_refused_before_anything_starts(offset: int) -> None:
    """A flipped bit that no layout notices is found by the CRC in the READY PING."""
    outcome, destination = attempt(Faults(corrupt=offset, mask=0x10))
    assert not outcome.started and outcome.destination_error is not None
    if offset < EOF:
        assert not outcome.source.handed_over
    check(outcome, destination)


def test_the_source_hears_why() -> None:
    source, other = make_walker(), make_empty()
    other.name = "microvm"
    outcome = migrate(source, other)
    assert outcome.source_error is not None and "machine" in str(outcome.source_error)
    assert "microvm" in str(outcome.source_error), "found by the handshake or by the destination"
    assert outcome.source.status == "failed" and source.status != "postmigrate"


DESTINATION = """
import os, signal, sys
from pyvcpu.migration.channel import listen
from pyvcpu.migration.session import DestinationSession
from tests.moving import make_empty
machine = make_empty()
listener = listen(sys.argv[1])
print("listening", flush=True)
session = DestinationSession(machine, listener.accept(30), start=lambda: print("started", flush=True))
count = 0
for step in session.steps():
    if step.name == "record":
        count += 1
        if count == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
    elif step.name == "read":
        session.channel.wait_readable()
"""


@pytest.mark.parametrize("scheme", ["unix", "tcp"])
@pytest.mark.parametrize("records", [1, 6, 12, 20, 27, 31])
def test_a_real_process_is_killed(scheme: str, records: int, tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/s" if scheme == "unix" else f"tcp:127.0.0.1:{_free_port()}"
    with subprocess.Popen(
        [sys.executable, "-c", DESTINATION, uri, str(records)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "listening\n"
        source = make_walker()
        source.start()
        session = SourceSession(source, connect(uri), MigrationParameters(max_bandwidth=None, max_iterations=2))
        error: MigrationError | None = None
        try:
            session.run()
        except MigrationError as failure:
            error = failure
        started = "started" in process.stdout.read()
        assert process.wait() in (0, -signal.SIGKILL)
    runs_here = source.running
    assert not (started and runs_here)
    assert runs_here == (not session.handed_over)
    if error is not None:
        assert isinstance(error, ChannelError | HandOverUnconfirmed)
    source.stop()
    assert contents(source) == walked(source.instructions)
    source.close()


def _free_port() -> int:
    import socket

    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_slow_destination_does_not_keep_the_guest_stopped_for_ever() -> None:
    source = make_walker()
    source.start()
    a, _silent = memory_pair()
    session = SourceSession(source, a, MigrationParameters(handshake_timeout=0.1))
    started = time.monotonic()
    with pytest.raises(ChannelError, match=r"within 0\.1 s"):
        session.run()
    assert time.monotonic() - started < 5 and source.running
    source.stop()
