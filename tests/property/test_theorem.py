"""The theorem: with the deterministic clock, a run migrated at any instruction ends bit for bit as the run that
never moved: the same RAM, the same CpuState, the same devices, the same serial output, the same instruction count.

Hypothesis picks the guest, the instructions at which it moves (none to three times), how the stream is cut
into pieces, and whether it is copied while it stands or moves live, running between the steps of the source.
"""

from __future__ import annotations

import hashlib
import itertools
from functools import cache
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyvcpu.machine import MIB, Machine, MachineConfig, make_machine
from pyvcpu.machine.guests import load_guest
from pyvcpu.migration.channel import BytesReader, memory_pair
from pyvcpu.migration.channel.base import READ_SIZE
from pyvcpu.migration.session import DestinationSession, MigrationParameters, SourceSession
from pyvcpu.migration.snapshot import save_snapshot
from pyvcpu.migration.vmstate.description import SaveContext

GUESTS: dict[str, dict[str, int]] = {
    "counter": {"limit": 3000, "mask": 0x3FF},
    "ticker": {"period": 20_000, "rate": 1, "pages": 8, "ticks": 3, "beats": 4},
    "dirtier": {"pattern": 1, "pages": 64, "writes": 200, "reports": 2},
    "irqs": {"rounds": 1},
}
MEMORY = 16 * MIB


class End(NamedTuple):
    """Everything there is to compare at the end of a run."""

    ram: str
    cpu: dict[str, object]
    devices: dict[str, object]
    serial: bytes
    instructions: int
    virtual_time: int
    exit_code: int | None


def build(output: bytearray, name: str | None) -> Machine:
    loader = (load_guest(name, **GUESTS[name]),) if name else ()
    return make_machine(
        MachineConfig(memory=MEMORY, loader=loader, serial=output.extend, debug_exit=(0xF4, 4), no_reboot=True)
    )


def end_of(machine: Machine, output: bytearray) -> End:
    machine.engine.save_state()
    context = SaveContext(machine=machine.name, clock=machine.clock)
    devices = {entry.name: entry.description.save(entry.obj, context) for entry in machine.sections()}
    return End(
        hashlib.blake2b(machine.ram.u8).hexdigest(),
        machine.cpu.architectural(),
        devices,
        bytes(output),
        machine.instructions,
        machine.clock.now(),
        machine.exit_code,
    )


@cache
def unmoved(name: str) -> End:
    """How the guest ends that never moves. It must end by itself, and well."""
    output = bytearray()
    machine = build(output, name)
    assert machine.run() == "debug-exit"
    assert machine.exit_code == 1
    end = end_of(machine, output)
    machine.close()
    return end


def run_to(machine: Machine, instruction: int) -> None:
    if machine.exit_code is None and instruction > machine.instructions:
        machine.run(instruction - machine.instructions)


class Pieces(BytesReader):
    """Bytes that arrive in pieces of the given sizes, over and over."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        super().__init__(data)
        self._sizes = itertools.cycle(sizes)

    def read_now(self, size: int = READ_SIZE) -> bytes | None:
        return super().read_now(min(size, next(self._sizes)))


def copy_over(source: Machine, target: Machine, pieces: list[int]) -> None:
    """While it stands: one stream, which arrives in pieces of those sizes, over and over."""
    stream = save_snapshot(source)
    DestinationSession(target, Pieces(stream, pieces), autostart=False).run()


def move_live(source: Machine, target: Machine, slices: list[int]) -> None:
    """Both ends in this thread; the guest runs for a slice of instructions between two steps of the source."""
    ours, theirs = memory_pair()
    parameters = MigrationParameters(max_bandwidth=None, downtime_limit=1, max_iterations=len(slices))
    sending = SourceSession(source, ours, parameters, live=True).steps()
    receiving = DestinationSession(target, theirs, autostart=False).steps()
    todo = list(slices)
    received = next(receiving, None)
    for step in sending:
        if step.name == "iteration" and todo and source.exit_code is None:
            source.run(todo.pop())
        while received is not None and theirs.wait_readable(0):
            received = next(receiving, None)
    for _ in receiving:
        pass


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(GUESTS)),
    cuts=st.lists(st.floats(0, 1), max_size=3),
    pieces=st.lists(st.integers(1, 9000), min_size=1, max_size=4),
    slices=st.lists(st.integers(1, 3000), min_size=1, max_size=3),
    live=st.booleans(),
)
@example(name="irqs", cuts=[0.5, 0.5, 0.5], pieces=[4096], slices=[1], live=False)
@example(name="ticker", cuts=[0.0, 1.0], pieces=[1, 7], slices=[2999], live=True)
def test_a_migrated_run_ends_as_the_run_that_never_moved(
    name: str, cuts: list[float], pieces: list[int], slices: list[int], live: bool
) -> None:
    expected = unmoved(name)
    output = bytearray()
    machine = build(output, name)
    for cut in sorted(cuts):
        run_to(machine, int(cut * expected.instructions))
        if machine.exit_code is not None:
            break
        target = build(output, None)
        if live:
            move_live(machine, target, slices)
            if machine.exit_code is not None:  # the guest ended while it was being sent
                break
        else:
            copy_over(machine, target, pieces)
        assert end_of(target, output) == end_of(machine, output)  # and now, not only at the end
        machine.close()
        machine = target
    run_to(machine, expected.instructions + 1)
    assert end_of(machine, output) == expected
    machine.close()


@pytest.mark.parametrize("name", sorted(GUESTS))
def test_every_instruction_of_a_stretch(name: str) -> None:
    """Twenty neighbouring instructions in the middle of each guest, so that no boundary is left to chance."""
    expected = unmoved(name)
    middle = expected.instructions // 2
    walker = build(bytearray(), name)
    walker.run(middle)
    for _ in range(20):
        output = bytearray()
        target = build(output, None)
        DestinationSession(target, BytesReader(save_snapshot(walker)), autostart=False).run()
        run_to(target, expected.instructions + 1)
        end = end_of(target, output)
        assert end._replace(serial=b"") == expected._replace(serial=b"")
        assert expected.serial.endswith(end.serial)
        target.close()
        walker.run(1)
    walker.close()
