"""What every engine is: something that runs a vCPU and can be stopped at an instruction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal

from pyvcpu.clock import Clock
from pyvcpu.cpu.state import CpuState
from pyvcpu.errors import ConfigurationError
from pyvcpu.memory.bus import Bus
from pyvcpu.memory.ram import GuestRam

if TYPE_CHECKING:
    from pyvcpu.apic.local import LocalApic

Exit = Literal["limit", "request", "halted", "shutdown"]
"""Why a run ended: the count was reached; somebody asked; HLT that nothing can end; a triple fault."""


class Accelerator(ABC):
    """An engine. It owns nothing: state, memory and time are the machine's."""

    name: str
    state: CpuState
    pace: bool = False
    """In HLT on the icount clock: wait in real time instead of skipping at once."""

    @abstractmethod
    def run(self, limit: int) -> Exit:
        """Run until ``clock.instructions`` reaches ``limit`` (absolute), or something else ends it.

        On return ``state`` is exact but for what :meth:`save_state` completes. Raises UnsupportedInstruction with
        the state of that instruction's start.
        """

    @abstractmethod
    def request_exit(self) -> None:
        """Make :meth:`run` return "request" soon, at an instruction boundary; from any thread."""

    @abstractmethod
    def save_state(self) -> None:
        """Engine -> CpuState: complete ``state``."""

    @abstractmethod
    def load_state(self) -> None:
        """CpuState -> engine: ``state``, or memory, was written from outside."""

    @abstractmethod
    def flush_tlb(self) -> None:
        """Guest physical addresses mean something else now (a device moved)."""


def make_accelerator(
    name: str, state: CpuState, ram: GuestRam, bus: Bus, apic: LocalApic | None, clock: Clock
) -> Accelerator:
    """The engine of that name: "interp", or "auto" for the best that there is."""
    from pyvcpu.accel.tcg.engine import TcgEngine

    if name not in ("auto", "interp"):
        raise ConfigurationError(f"--accel {name}: there is auto and interp")
    return TcgEngine(state, ram, bus, apic, clock)
