"""A guest moves: the ordinary way, in one thread and live, over each kind of channel."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from pyvcpu.errors import ChannelError, ConfigurationError, MigrationError
from pyvcpu.migration.channel import BytesReader, BytesWriter, Faults, FaultyChannel, connect, listen, memory_pair
from pyvcpu.migration.session import DOWNTIME_PARTS, DestinationSession, MigrationParameters, SourceSession, Step
from pyvcpu.migration.snapshot import load_snapshot, load_snapshot_file, save_snapshot, save_snapshot_file
from tests.moving import contents, make_empty, make_walker, migrate, walked


@pytest.mark.parametrize("chunk", [0, 1, 7, 4096])
def test_a_guest_that_moved_is_the_guest_that_did_not(chunk: int) -> None:
    source, destination = make_walker(), make_empty()
    source.run(500)
    seen: list[str] = []

    def between(step: Step) -> None:
        seen.append(step.name)
        if "stopped" not in seen:
            source.run(101)

    a, b = memory_pair()
    outcome = migrate(
        source, destination, ends=(a, FaultyChannel(b, Faults(chunk=chunk))), between=between,
        parameters=MigrationParameters(max_bandwidth=None, max_iterations=3),
    )  # fmt: skip
    assert outcome.source.states.history == ["none", "setup", "active", "device", "completed"]
    assert outcome.destination.states.history == ["none", "setup", "active", "completed"]
    assert outcome.started and (source.status, destination.status) == ("postmigrate", "running")
    assert outcome.source.peer is not None and outcome.source.peer.machine == "none"
    at = destination.instructions
    assert at > 500 and contents(destination) == walked(at)
    destination.run(2000)
    assert contents(destination) == walked(at + 2000)


def test_it_can_move_again_and_again() -> None:
    machine = make_walker()
    machine.run(100)
    for hop in range(4):
        target = make_empty()
        assert migrate(machine, target).started
        machine.close()
        machine = target
        machine.run(50 + hop)
    assert contents(machine) == walked(100 + 50 + 51 + 52 + 53)


@pytest.mark.parametrize("uri", ["unix:{}/s", "tcp:127.0.0.1:0", "file:{}/stream", "exec:cat > {0}/stream"])
def test_live_over_every_channel(uri: str, tmp_path: Path) -> None:
    uri = uri.format(tmp_path)
    source, destination = make_walker(), make_empty()
    source.start()
    time.sleep(0.05)
    if uri.startswith(("unix", "tcp")):
        with listen(uri) as listener:
            channel = connect(listener.uri)
            receiving = DestinationSession(destination, listener.accept(5))
        receiving.start()
        sending = SourceSession(source, channel)
        statistics = sending.run()
    else:
        sending = SourceSession(source, connect(uri))
        statistics = sending.run()
        back = f"file:{tmp_path}/stream" if uri.startswith("file") else f"exec:cat {tmp_path}/stream"
        receiving = DestinationSession(destination, listen(back).accept())
        receiving.start()
    receiving.wait(10)
    assert sending.status == receiving.status == "completed"
    assert source.status == "postmigrate" and not source.running
    assert destination.status == "running" and destination.running
    time.sleep(0.05)
    destination.stop()
    assert destination.instructions > source.instructions
    assert contents(source) == walked(source.instructions)
    assert contents(destination) == walked(destination.instructions)
    assert set(statistics.downtime_parts) <= set(DOWNTIME_PARTS)
    assert statistics.downtime_ms is not None
    assert sum(statistics.downtime_parts.values()) <= statistics.downtime_ms <= statistics.total_time_ms
    assert statistics.transferred == sending.channel.bytes_written


def test_statistics_say_what_happened() -> None:
    source, destination = make_walker(), make_empty()
    source.run(3)  # so far only the code's page is not zero
    outcome = migrate(source, destination, parameters=MigrationParameters(max_bandwidth=None, max_iterations=1))
    told = outcome.source.statistics.to_dict()
    first, last = told["iterations"]
    assert (first["pages"], first["zero-pages"], first["remaining-pages"]) == (1, 31, 0)
    assert (last["pages"], last["zero-pages"], last["guest-stopped"]) == (0, 0, True)
    assert told["ram"]["normal"] == 1 and told["ram"]["duplicate"] == 31
    assert told["ram"]["normal-bytes"] == 4096 and told["ram"]["total"] == 0x20000
    assert told["ram"]["dirty-sync-count"] == 3, "at the start, after the pass, with the guest stopped"
    assert told["ram"]["transferred"] == outcome.source.channel.bytes_written
    assert outcome.destination.statistics.received == told["ram"]["transferred"]
    # head, the block's name at the first record, 31 zero pages, one whole, EOS, footer
    assert first["bytes"] == 5 + (1 + len("ram")) + 31 * 9 + (8 + 4096) + 8 + 5


def test_a_snapshot_is_a_copy(tmp_path: Path) -> None:
    machine = make_walker()
    machine.run(777)
    before = contents(machine)
    data = save_snapshot(machine)
    assert contents(machine) == before and machine.status == "paused"
    assert save_snapshot(machine) == data, "the same state is the same bytes"
    save_snapshot_file(machine, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == data
    machine.run(1000)
    assert contents(machine) == walked(1777)
    for load in (lambda m: load_snapshot(m, data), lambda m: load_snapshot_file(m, tmp_path / "file")):
        copy = make_empty()
        load(copy)
        assert copy.status == "running" and not copy.running and contents(copy) == before
        copy.run(1000)
        assert contents(copy) == walked(1777)


@pytest.mark.parametrize("runstate", ["running", "paused", "prelaunch", "shutdown"])
def test_the_run_state_is_honoured(runstate: str) -> None:
    machine = make_walker()
    machine.run(10)
    data = save_snapshot(machine, runstate=runstate)
    started: list[bool] = []
    copy = make_empty()
    session = DestinationSession(copy, BytesReader(data), start=lambda: started.append(True))
    session.run()
    assert session.runstate == copy.status == runstate
    assert bool(started) == (runstate == "running")


def test_a_paused_guest_arrives_paused() -> None:
    source, destination = make_walker(), make_empty()
    source.run(10)
    out, incoming = memory_pair()
    receiving = DestinationSession(destination, incoming)
    receiving.start()
    SourceSession(source, out).run()
    receiving.wait(5)
    assert destination.status == "paused" and not destination.running
    assert source.status == "postmigrate"


def test_pre_switchover_waits_for_the_operator() -> None:
    source, destination = make_walker(), make_empty()
    source.start()
    out, incoming = memory_pair()
    DestinationSession(destination, incoming).start()
    session = SourceSession(source, out, MigrationParameters(pause_before_switchover=True, max_bandwidth=None))
    session.start()
    deadline = time.monotonic() + 10
    while session.status != "pre-switchover" and time.monotonic() < deadline:
        time.sleep(0.005)
    before = source.instructions
    time.sleep(0.1)
    assert session.status == "pre-switchover" and source.status == "running" and source.instructions > before
    session.switch_over()
    session.wait(10)
    assert session.states.history == ["none", "setup", "active", "pre-switchover", "device", "completed"]
    destination.stop()
    assert contents(destination) == walked(destination.instructions)


def test_the_rate_limit_limits() -> None:
    source, destination = make_walker(), make_empty()
    source.ram.write(0, bytes(range(1, 129)) * (0x8000 // 128))
    source.ram.write(0x10000, bytes(range(1, 129)) * (0x10000 // 128))
    source.start()
    out, incoming = memory_pair()
    DestinationSession(destination, incoming).start()
    parameters = MigrationParameters(max_bandwidth=400_000, downtime_limit=0, max_iterations=1)
    session = SourceSession(source, out, parameters)
    started = time.monotonic()
    session.run()
    elapsed = time.monotonic() - started
    first = session.statistics.iterations[0]
    assert first.pages >= 24
    assert elapsed >= first.bytes / 400_000 * 0.8 - 0.1
    destination.stop()


def test_downtime_limit_zero_and_a_busy_guest_do_not_converge_and_cancel_ends_it() -> None:
    source = make_walker()
    source.start()
    out, incoming = memory_pair()
    destination = make_empty()
    receiving = DestinationSession(destination, incoming)
    receiving.start()
    session = SourceSession(source, out, MigrationParameters(downtime_limit=0, max_bandwidth=2_000_000))
    session.start()
    time.sleep(0.6)
    assert session.status == "active" and len(session.statistics.iterations) > 2
    assert session.cancel()
    with pytest.raises(MigrationError, match="cancelled"):
        session.wait(10)
    with pytest.raises(MigrationError):
        receiving.wait(10)
    assert session.status == "cancelled" and receiving.status == "failed"
    assert source.status == "running" and source.running
    source.stop()
    assert contents(source) == walked(source.instructions)
    assert not source.ram.logging


def test_a_run_with_a_limit_never_notices_a_failed_migration() -> None:
    source = make_walker()
    source.start(200_000)
    out, _ = memory_pair()
    session = SourceSession(source, FaultyChannel(out, Faults(cut_write=3000)), MigrationParameters(return_path=False))
    with pytest.raises(ChannelError, match="cut"):
        session.run()
    assert session.status == "failed"
    assert source.wait(60) == "limit"
    assert contents(source) == walked(200_000)


def test_two_migrations_at_once_are_refused() -> None:
    source = make_walker()
    first = SourceSession(source, BytesWriter(), live=True)
    steps = first.steps()
    while next(steps).name != "synchronised":
        pass
    with pytest.raises(MigrationError, match="another migration"):
        SourceSession(source, BytesWriter()).run()
    assert source.ram.logging, "the first one's log is untouched"
    steps.close()
    assert first.status == "cancelled" and not source.ram.logging


def test_a_machine_that_waits_for_a_guest_has_none_to_give() -> None:
    machine = make_empty()
    machine.status = "inmigrate"
    with pytest.raises(MigrationError, match="no guest here"):
        save_snapshot(machine)


@pytest.mark.parametrize(
    "wrong", [{"max_bandwidth": -1}, {"downtime_limit": -1}, {"downtime_limit": 2_000_001}, {"max_iterations": 0}]
)
def test_parameters_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError):
        SourceSession(make_walker(), BytesWriter(), MigrationParameters(**wrong))  # type: ignore[arg-type]


def test_the_host_clock_is_compensated_for_the_downtime() -> None:
    source, destination = make_walker(clock="host"), make_empty(clock="host")
    source.start()
    time.sleep(0.05)
    out, incoming = memory_pair()
    receiving = DestinationSession(destination, incoming)
    started = time.monotonic_ns()
    virtual = source.clock.now()

    def late() -> None:
        time.sleep(0.3)
        receiving.run()

    thread = threading.Thread(target=late)
    sending = SourceSession(source, out, MigrationParameters(return_path=False))
    sending.run()
    frozen = source.clock.now()
    thread.start()
    thread.join()
    now, elapsed = destination.clock.now(), time.monotonic_ns() - started
    destination.stop()
    assert source.clock.now() == frozen
    assert now - frozen >= 0.25e9, "the time between is not lost to the guest"
    assert abs(now - virtual - elapsed) < 0.2e9
    assert destination.instructions >= source.instructions


def test_the_host_clock_out_of_a_file_goes_on_where_it_stopped() -> None:
    source, destination = make_walker(clock="host"), make_empty(clock="host")
    source.start()
    time.sleep(0.02)
    out = BytesWriter()
    SourceSession(source, out).run()
    time.sleep(0.2)
    DestinationSession(destination, BytesReader(out.getvalue()), autostart=False).run()
    assert destination.clock.now() == source.clock.now()
