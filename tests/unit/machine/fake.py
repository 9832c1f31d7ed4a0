"""An engine whose guest is a Python function: ``program(engine)`` is one instruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyvcpu.accel.base import Accelerator, Exit
from pyvcpu.cpu.layout import MP_RUNNABLE


class FakeEngine(Accelerator):
    """Follows the rules of an engine: exact counts, timers between instructions, exit requests at an edge."""

    name = "fake"

    def __init__(self, name: str, state: Any, ram: Any, bus: Any, apic: Any, clock: Any) -> None:
        self.state, self.bus, self.apic, self.clock = state, bus, apic, clock
        self.program: Callable[[FakeEngine], None] = lambda engine: None
        self.requested = False
        self.loads = self.flushes = 0

    def run(self, limit: int) -> Exit:
        while True:
            if self.requested:
                self.requested = False
                return "request"
            if self.clock.instructions >= limit:
                return "limit"
            if self.state.shutdown:
                return "shutdown"
            if self.state.mp_state != MP_RUNNABLE:
                return "halted"
            self.clock.run_due()
            self.program(self)
            self.clock.instructions += 1

    def request_exit(self) -> None:
        self.requested = True

    def save_state(self) -> None:
        pass

    def load_state(self) -> None:
        self.loads += 1

    def flush_tlb(self) -> None:
        self.flushes += 1
