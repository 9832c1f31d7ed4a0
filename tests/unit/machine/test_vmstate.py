"""The sections "timer", "globalstate" and "kvm-tpr-opt"; both clocks through every kind of stream."""

from __future__ import annotations

import pytest

from pyvcpu.clock import HostClock, IcountClock, make_clock
from pyvcpu.cpu.state import CpuState
from pyvcpu.cpu.vmstate import CPU, guest_tsc
from pyvcpu.errors import MigrationError
from pyvcpu.machine.vmstate import GLOBALSTATE, KVM_TPR_OPT, TIMER, GlobalState, Timers
from pyvcpu.migration.vmstate.codec import decode_section, load_sections, save_section
from pyvcpu.migration.vmstate.description import LoadContext, SaveContext, SectionEntry
from tests import streams


def timers(clock="icount", now=0, count=0, tsc=None):
    cpu = CpuState()
    cpu.reset()
    made = make_clock(clock)
    made.instructions = count
    made.set_now(now)
    cpu.tsc_offset = 0 if tsc is None else tsc - now
    return Timers(made, cpu)


def entries(holder):
    return [SectionEntry(TIMER, 0, holder), SectionEntry(CPU, 0, holder.cpu)]


def move(source, target, peer="pyvcpu"):
    """Save the source's clock and CPU, load them into the target."""
    sections = {}
    for entry in entries(source):
        data, _ = save_section(entry, SaveContext(profile=peer, clock=source.clock))
        sections[entry.name], _ = decode_section(entry.description, data)
    load_sections(entries(target), sections, LoadContext(clock=target.clock))
    return sections["timer/0"]


CLOCKS = pytest.mark.parametrize("there", ["icount", "host"])
HERE = pytest.mark.parametrize("here", ["icount", "host"])


@HERE
@CLOCKS
@pytest.mark.parametrize("tsc", [None, 7, (1 << 64) - 5, 1 << 63])
def test_count_time_and_tsc_come_back_exactly_on_any_pair_of_clocks(here, there, tsc):
    source = timers(here, now=123_456_789, count=100_000, tsc=tsc)
    target = timers(there, now=55, count=999, tsc=4)
    move(source, target)
    assert target.clock.now() == 123_456_789
    assert target.clock.instructions == 100_000
    assert guest_tsc(target.cpu, target.clock) == guest_tsc(source.cpu, source.clock) == (tsc or 123_456_789)


@CLOCKS
@pytest.mark.parametrize("peer", ["qemu-7.2-tcg", "qemu-7.2-kvm", "qemu-10.0-tcg"])
def test_without_icount_time_and_tsc_come_back(there, peer):
    """As a stream of that QEMU would: no count."""
    source = timers(now=5_000, count=77, tsc=1_000_000)
    target = timers(there, now=1, count=9)
    values = move(source, target, peer)
    assert "subsections" not in values
    assert (target.clock.now(), target.clock.instructions) == (5_000, 0)
    assert guest_tsc(target.cpu, target.clock) == 1_000_000


def test_the_layout():
    data, _ = save_section(SectionEntry(TIMER, 0, timers(now=2, tsc=1)), SaveContext(profile="qemu-7.2-tcg"))
    assert data == bytes.fromhex("0000000000000001 0000000000000000 0000000000000002")


def test_the_tsc_of_a_kvm_stream_is_in_cpu():
    source = timers(now=5_000, tsc=1_000_000)
    target = timers()
    sections = {}
    for entry in entries(source):
        data, _ = save_section(entry, SaveContext(profile="qemu-7.2-kvm", clock=source.clock))
        sections[entry.name], _ = decode_section(entry.description, data)
    sections["timer/0"]["cpu_ticks_offset"] = 42  # KVM's host tick count: means nothing
    load_sections(entries(target), sections, LoadContext(clock=target.clock))
    assert guest_tsc(target.cpu, target.clock) == 1_000_000


def test_a_kvm_stream_without_timer_brings_its_tsc():
    source, target = timers(now=5_000, tsc=1_000_000), timers(now=100)
    data, _ = save_section(entries(source)[1], SaveContext(profile="qemu-7.2-kvm", clock=source.clock))
    values, _ = decode_section(CPU, data)
    load_sections(entries(target), {"cpu/0": values}, LoadContext(clock=target.clock))
    assert guest_tsc(target.cpu, target.clock) == 1_000_000


def test_qemus_icount_with_its_shift():
    found = streams.section("none-7.2-icount-tcg", "timer")
    values, _ = decode_section(TIMER, found.data)
    target = timers()
    TIMER.load(target, values, LoadContext(clock=target.clock, icount_shift=1))
    assert target.clock.instructions == 218_193_659
    assert target.clock.now() == 63_145 + 2 * 218_193_659
    assert guest_tsc(target.cpu, target.clock) == target.clock.now()


def test_qemus_automatic_shift_is_in_the_stream():
    found = streams.section("none-7.2-icount-tcg", "timer")
    values, _ = decode_section(TIMER, found.data)
    icount = values["subsections"]["timer/icount"]
    icount["subsections"]["timer/icount/shift"] = {"icount_time_shift": 3, "last_delta": 0}
    values, _ = decode_section(TIMER, TIMER.encode(values))
    target = timers()
    TIMER.load(target, values, LoadContext(clock=target.clock))
    assert target.clock.now() == 63_145 + (218_193_659 << 3)
    icount["subsections"]["timer/icount/shift"]["icount_time_shift"] = 99
    with pytest.raises(MigrationError, match="shift"):
        TIMER.check(values | {"subsections": {"timer/icount": icount}}, LoadContext())


def test_time_before_the_beginning_is_refused():
    values = TIMER.save(timers(now=10), SaveContext(profile="qemu-7.2-tcg"))
    target = timers(now=3)
    with pytest.raises(MigrationError) as error:
        TIMER.load(target, values | {"cpu_clock_offset": -1}, LoadContext())
    assert error.value.field == "cpu_clock_offset"
    assert target.clock.now() == 3


def test_a_negative_count_is_refused():
    values = TIMER.save(timers(now=10, count=4), SaveContext())
    values["subsections"]["timer/icount"]["qemu_icount"] = -1
    with pytest.raises(MigrationError) as error:
        TIMER.check(values, LoadContext())
    assert error.value.field == "icount/qemu_icount"


def test_clocks_are_what_they_were_made_as():
    assert isinstance(timers("icount").clock, IcountClock) and isinstance(timers("host").clock, HostClock)


# -- globalstate


@pytest.mark.parametrize("runstate", ["running", "paused", "prelaunch", "internal-error"])
def test_the_run_state_comes_back(runstate):
    data, _ = save_section(SectionEntry(GLOBALSTATE, 0, GlobalState()), SaveContext(runstate=runstate))
    assert len(data) == 104
    assert data[:4] == (len(runstate) + 1).to_bytes(4, "big")
    target = GlobalState("paused")
    GLOBALSTATE.load(target, decode_section(GLOBALSTATE, data)[0], LoadContext())
    assert target.runstate == runstate


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"runstate": b"\0" * 32}, "runstate"),
        ({"runstate": b"walking".ljust(32, b"\0")}, "runstate"),
        ({"runstate": b"running".ljust(32, b"x")}, "runstate"),
        ({"runstate": b"r" * 32}, "runstate"),
        ({"runstate": b"running\0\0\1".ljust(32, b"\0")}, "runstate"),
        ({"runstate": b"\xff\xfe".ljust(32, b"\0")}, "runstate"),
        ({"size": 7}, "size"),
        ({"size": 0xFFFFFFFF}, "size"),
        ({"has_vm_was_suspended": 2}, "has_vm_was_suspended"),
    ],
)
def test_other_run_states_are_refused(change, path):
    values = GLOBALSTATE.save(GlobalState(), SaveContext()) | change
    with pytest.raises(MigrationError) as error:
        GLOBALSTATE.check(values, LoadContext())
    assert error.value.field == path


# -- kvm-tpr-opt


def test_the_vapic_is_144_zero_bytes_and_must_be_inactive():
    data, values = save_section(SectionEntry(KVM_TPR_OPT, 0, None), SaveContext())
    assert data == bytes(144)
    KVM_TPR_OPT.load(None, values, LoadContext())
    with pytest.raises(MigrationError, match="patched"):
        KVM_TPR_OPT.check(values | {"state": 1}, LoadContext())
