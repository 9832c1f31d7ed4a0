"""The parts of a session: transition table, policy, handshake, return path, hold, trace."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from pyvcpu.errors import ChannelError, MigrationError
from pyvcpu.migration.channel import BytesReader, BytesWriter, memory_pair
from pyvcpu.migration.session import FINAL, TRANSITIONS, DestinationSession, MigrationParameters, SourceSession, Step
from pyvcpu.migration.session.handshake import (
    Hello,
    Refusal,
    check_hello,
    describe_machine,
    parse_message,
)
from pyvcpu.migration.session.hold import Hold
from pyvcpu.migration.session.policy import Bandwidth, RateLimit, expected_downtime, should_stop
from pyvcpu.migration.session.replies import ReturnPath
from pyvcpu.migration.session.states import StateMachine
from pyvcpu.migration.wire import return_path
from tests.moving import contents, make_empty, make_walker, migrate, walked

# -- states


def test_the_table_is_closed_and_reaches_every_status() -> None:
    assert {after for row in TRANSITIONS.values() for after in row} | {"none"} == set(TRANSITIONS)
    assert frozenset({"completed", "failed", "cancelled"}) == FINAL


def test_a_move_that_the_table_lacks_is_a_bug() -> None:
    states = StateMachine()
    heard: list[tuple[str, str]] = []
    states.listeners.append(lambda old, new: heard.append((old, new)))
    states.to("setup")
    with pytest.raises(AssertionError, match="from setup to completed"):
        states.to("completed")
    states.to("cancelling")
    states.to("cancelled")
    assert states.final and heard == [("none", "setup"), ("setup", "cancelling"), ("cancelling", "cancelled")]


# -- policy


def test_the_guest_is_stopped_when_the_rest_fits_and_no_longer_shrinks() -> None:
    parameters = MigrationParameters(downtime_limit=300)
    assert not should_stop(1000, 2000, 301.0, parameters), "over the limit"
    assert not should_stop(400, 1000, 200.0, parameters), "another pass is worth it"
    assert should_stop(500, 1000, 200.0, parameters), "it does not shrink any more"
    assert should_stop(1500, 1000, 200.0, parameters)
    assert should_stop(1, 1000, 1.0, parameters), "negligible"
    assert should_stop(0, 1000, 0.0, parameters)
    assert expected_downtime(1_000_000, 10_000_000) == 100.0


def test_the_rate_limit_owes_what_was_sent() -> None:
    limit = RateLimit(MigrationParameters(max_bandwidth=1_000_000))
    time.sleep(0.3)
    assert limit.sent(100_000) < 0.01, "one unused window is saved up"
    assert 0.35 < limit.sent(400_000) <= 0.4
    assert RateLimit(MigrationParameters(max_bandwidth=None)).sent(1 << 40) == 0
    assert RateLimit(MigrationParameters(max_bandwidth=0)).sent(1 << 40) == 0


def test_the_limit_may_change_while_it_runs() -> None:
    parameters = MigrationParameters(max_bandwidth=1000)
    limit = RateLimit(parameters)
    assert limit.sent(1000) > 0.8
    parameters.max_bandwidth = None
    assert limit.sent(1 << 30) == 0


def test_bandwidth_forgets() -> None:
    bandwidth = Bandwidth()
    assert bandwidth.estimate() == 0
    bandwidth.sent(1000, 0.1)
    assert bandwidth.estimate() == pytest.approx(10_000)
    for _ in range(10):
        bandwidth.sent(100_000, 0.1)
    assert bandwidth.estimate() == pytest.approx(1_000_000)


# -- handshake


def test_hello_goes_there_and_back() -> None:
    hello = describe_machine(make_empty())
    assert parse_message(hello.to_message()) == hello
    check_hello(hello, hello)
    assert hello.machine == "none" and hello.ram == {"ram": 0x20000} and hello.clock == "icount"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"machine": "microvm"}, "machine"),
        ({"protocol": 2}, "protocol"),
        ({"ram": {"ram": 4096}}, "ram/ram"),
        ({"ram": {}}, "ram/ram"),
        ({"cpuid": {"1": [0, 0, 0]}}, "cpuid/1/ecx"),
        ({"cpuid": {"1": [0, 0]}}, "cpuid/1"),
        ({"cpuid": {"1": "no"}}, "cpuid/1"),
        ({"cpuid": {}}, "cpuid/1/ecx"),
    ],
)
def test_a_destination_that_cannot_take_the_guest_is_refused_before_ram_is_sent(
    change: dict[str, Any], field: str
) -> None:
    ours = describe_machine(make_empty())
    with pytest.raises(MigrationError) as caught:
        check_hello(Hello(**{**ours.__dict__, **change}), ours)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "content",
    [{}, {"hello": 1}, {"hello": {}}, {"error": 1}, {"hello": {"machine": 1}}, {"hello": {"machine": "none"}}],
)
def test_a_message_that_is_none(content: dict[str, Any]) -> None:
    with pytest.raises(MigrationError, match="not one"):
        parse_message(content)


def test_a_refusal() -> None:
    assert parse_message(Refusal("no room").to_message()) == Refusal("no room")
    assert len(return_path.message(Refusal("\u2028" * 100_000).to_message())) < 0xFFFF


# -- return path


def replies(*messages: bytes, end: bool = False) -> ReturnPath:
    here, there = memory_pair()
    for message in messages:
        there.write(message)
    if end:
        there.close()
    return ReturnPath(here)


def test_pongs_are_matched_in_order() -> None:
    path = replies(return_path.pong(1), return_path.pong(2))
    assert list(path.wait_for_pong(1, 1, "x")) == [] == list(path.wait_for_pong(2, 1, "x"))
    path = replies(return_path.pong(3))
    with pytest.raises(MigrationError, match="not sent"):
        list(path.wait_for_pong(4, 1, "x"))


def test_waiting_is_a_step_and_ends() -> None:
    steps = replies().wait_for_pong(1, 0.05, "READY")
    step = next(steps)
    assert step.name == "return-path" and 0 < step.seconds <= 0.05
    time.sleep(0.06)
    with pytest.raises(ChannelError, match=r"READY within 0\.05 s"):
        next(steps)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ([return_path.shut(1)], "failed"),
        ([return_path.message({"error": "the disk is full"}), return_path.shut(1)], "the disk is full"),
        ([return_path.shut(0)], "before it has the guest"),
        ([return_path.request_pages(0, 4096, "ram")], "post-copy"),
        ([b"\x00\x09\x00\x00"], "unknown type"),
        ([return_path.pong(1)[:5]], "inside a message"),
        ([], "closed the channel"),
    ],
)
def test_bad_news(said: list[bytes], text: str) -> None:
    with pytest.raises(MigrationError, match=text):
        replies(*said, end=True).poll()


def test_shut_is_right_after_eof() -> None:
    path = replies(return_path.shut(0), end=True)
    path.expect_shut = True
    assert list(path.wait_for_shut(1)) == [] and path.shut == 0
    path.poll()


# -- hold


def test_a_held_guest_stands_still_and_goes_on() -> None:
    machine = make_walker(clock="host")
    machine.start()
    time.sleep(0.02)
    hold = Hold(machine)
    hold.take()
    assert hold.taken and hold.was_running and machine.status == "finish-migrate"
    at, now = machine.instructions, machine.clock.now()
    time.sleep(0.05)
    assert machine.instructions == at and machine.clock.now() == now
    assert hold.at_edge(lambda: 42) == 42, "an edge call of ours does not wait for our own hold"
    hold.release()
    time.sleep(0.05)
    assert machine.status == "running" and machine.instructions > at
    machine.stop()


def test_a_hold_that_ends_ends_the_run() -> None:
    machine = make_walker()
    machine.start()
    hold = Hold(machine)
    hold.take()
    at = machine.instructions
    hold.end("postmigrate")
    assert machine.status == "postmigrate" and not machine.running and machine.instructions == at
    assert machine.wait(5) == "request"
    machine.start(10)  # an operator says cont
    assert machine.wait(5) == "limit" and contents(machine) == walked(at + 10)


def test_a_guest_in_anybodys_run_is_held_too() -> None:
    machine = make_walker()
    ended: list[object] = []
    thread = threading.Thread(target=lambda: ended.append(machine.run(3_000_000)))
    thread.start()
    while not machine.running:
        time.sleep(0.001)
    hold = Hold(machine)
    hold.take()
    assert not ended
    hold.release()
    thread.join(60)
    assert ended == ["limit"] and contents(machine) == walked(3_000_000)


def test_a_guest_that_does_not_run_is_left_alone() -> None:
    machine = make_walker()
    machine.run(10)
    hold = Hold(machine)
    hold.take()
    assert hold.taken and not hold.was_running and machine.status == "paused"
    hold.release()
    assert machine.status == "paused"


# -- cancel, at every step


def steps_of_a_run() -> int:
    count = 0

    def between(step: Step) -> None:
        nonlocal count
        count += 1

    migrate(make_walker(), make_empty(), between=between, parameters=MigrationParameters(max_iterations=2))
    return count


@pytest.mark.parametrize("how", ["cancel", "abandon"])
@pytest.mark.parametrize("at", range(1, steps_of_a_run() + 1))
def test_a_cancel_at_any_step(at: int, how: str) -> None:
    source, destination = make_walker(), make_empty()
    source.run(20)
    a, b = memory_pair()
    sending = SourceSession(source, a, MigrationParameters(max_iterations=2), live=True)
    receiving = DestinationSession(destination, b, autostart=False)
    receiving.start()
    steps = sending.steps()
    handed_over = True
    for _ in range(at):
        step = next(steps, None)
        while step is not None and step.name == "return-path":
            a.wait_readable(5)
            step = next(steps, None)
        if step is None or step.name in ("hand-over", "completed"):
            break
    else:
        handed_over = False
    if handed_over:
        assert not sending.cancel(), "it is too late"
        for step in steps:
            if step.name == "return-path":
                a.wait_readable(5)
        receiving.wait(5)
        assert sending.status == "completed" and source.status == "postmigrate"
        return
    if how == "cancel":
        assert sending.cancel()
        with pytest.raises(MigrationError, match="cancelled"):
            for _ in steps:
                pass
    else:
        steps.close()
    assert sending.status == "cancelled" and sending.states.history[-2] == "cancelling"
    with pytest.raises(MigrationError):
        receiving.wait(5)
    assert source.status == "paused" and not source.ram.logging
    source.run(100)
    assert contents(source) == walked(120)
    assert migrate(source, make_empty()).started


def test_a_cancel_before_it_has_begun() -> None:
    session = SourceSession(make_walker(), BytesWriter())
    assert session.cancel()
    with pytest.raises(MigrationError, match="cancelled"):
        session.run()
    assert session.status == "cancelled"


def test_a_cancel_wakes_a_source_whose_destination_does_not_read() -> None:
    source = make_walker()
    source.start()
    a, _ = memory_pair(capacity=4096)
    session = SourceSession(source, a, MigrationParameters(max_bandwidth=None, return_path=False))
    session.start()
    time.sleep(0.1)
    assert session.status == "active"
    assert session.cancel()
    with pytest.raises(MigrationError, match="cancelled"):
        session.wait(5)
    assert source.running
    source.stop()
    assert contents(source) == walked(source.instructions)


# -- trace


def test_both_synchronisations_are_told() -> None:
    machine, copy = make_walker(), make_empty()
    machine.run(7)
    there: list[str] = []
    back: list[str] = []
    out = BytesWriter()
    SourceSession(machine, out, live=False, runstate="running", trace_sync=there.append).run()
    DestinationSession(copy, BytesReader(out.getvalue()), autostart=False, trace_sync=back.append).run()
    heads = [line for line in there if not line.startswith(" ")]
    assert heads[0] == "engine interp -> CpuState: save_state() at instruction 7"
    assert [line.split(":")[1].split()[0] for line in heads[1:]] == [
        "timer/0", "cpu_common/0", "cpu/0", "kvm-tpr-opt/0", "apic/0", "globalstate/0",
    ]  # fmt: skip
    data = out.getvalue()
    rax = next(line for line in there if " regs[0] = " in line)
    offset, value = int(rax.split()[0], 16), int(rax.split("=")[1], 16)
    assert int.from_bytes(data[offset : offset + 8], "big") == value == machine.cpu.regs[0]
    assert back[-1] == "CpuState -> engine interp: load_state() at instruction 7"
    assert rax in back, "the same field at the same place, read"
    assert any(line.strip() == f"regs[0]: 0x0 -> {value:#x}" for line in back)
