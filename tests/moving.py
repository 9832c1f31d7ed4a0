"""Two machines, a guest and a channel, for the tests of migration: everything in one thread, step by step.

The guest "walker" runs in real mode and adds to 16-bit words all over the 64 KiB from 0x10000 on, forever: any
instruction lost or done twice, and any page lost, shows in registers and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from pyvcpu.errors import MigrationError
from pyvcpu.machine import Image, Machine, MachineConfig, make_machine
from pyvcpu.migration.channel import Channel, memory_pair
from pyvcpu.migration.session import DestinationSession, MigrationParameters, SourceSession, Step

MEMORY = 0x20000
WALKER = bytes.fromhex(
    "ea 05 80 00 00"  # jmp 0:0x8005
    "b9 00 10"  #       mov cx, 0x1000
    "8e d9"  #          mov ds, cx
    "ff 05"  #          again: inc word [di]
    "81 c7 11 01"  #    add di, 0x111
    "40"  #             inc ax
    "eb f7"  #          jmp again
)


def make_walker(**settings: object) -> Machine:
    """A machine "none" with the walker in it, not started."""
    return make_machine(MachineConfig("none", MEMORY, loader=(Image(WALKER, 0x8000),), **settings))  # type: ignore[arg-type]


def make_empty(**settings: object) -> Machine:
    """The same machine, for an incoming guest."""
    return make_machine(MachineConfig("none", MEMORY, **settings))  # type: ignore[arg-type]


def contents(machine: Machine) -> tuple[object, ...]:
    """All that a guest is: for comparison of a run that moved with one that did not."""
    machine.engine.save_state()
    return machine.instructions, machine.cpu.architectural(), machine.ram.read(0, machine.ram.size)


def walked(instructions: int) -> tuple[object, ...]:
    """The walker after so many instructions, never moved."""
    machine = make_walker()
    machine.run(instructions)
    try:
        return contents(machine)
    finally:
        machine.close()


class Outcome(NamedTuple):
    """How a migration ended. ``started`` says that the destination let the guest run."""

    source: SourceSession
    destination: DestinationSession
    started: bool
    source_error: MigrationError | None
    destination_error: MigrationError | None

    @property
    def source_may_run(self) -> bool:
        """Whether the guest at the source goes on by itself."""
        return self.source.machine.status != "postmigrate"


def advance(steps: Iterator[Step]) -> tuple[Step | None, MigrationError | None]:
    """One step: (None, None) at the end, (None, error) where it failed."""
    try:
        return next(steps, None), None
    except MigrationError as error:
        return None, error


def migrate(
    source: Machine,
    destination: Machine,
    *,
    ends: tuple[Channel, Channel] | None = None,
    parameters: MigrationParameters | None = None,
    between: Callable[[Step], object] = lambda step: None,
    on_record: Callable[[Step], object] = lambda step: None,
) -> Outcome:
    """Migrate in this thread. ``between`` sees every step of the source, ``on_record`` of the destination."""
    out, incoming = ends or memory_pair()
    started: list[bool] = []
    sending = SourceSession(source, out, parameters or MigrationParameters(max_bandwidth=None), live=True)
    receiving = DestinationSession(destination, incoming, start=lambda: started.append(True))
    there, here = sending.steps(), receiving.steps()
    errors: list[MigrationError | None] = [None, None]
    done = [False, False]
    while not all(done):
        if not done[0]:
            step, errors[0] = advance(there)
            done[0] = step is None
            if step is not None:
                between(step)
        while not done[1]:
            step, errors[1] = advance(here)
            done[1] = step is None
            if step is None or step.name == "read":
                break
            on_record(step)
        if done[0] and not done[1] and not incoming.wait_readable(0):
            raise AssertionError("the source has ended and the destination waits")
        if done[1] and not done[0] and step is None and sending.handed_over and not out.wait_readable(0):
            raise AssertionError("the destination has ended and the source waits")
    return Outcome(sending, receiving, bool(started), errors[0], errors[1])
