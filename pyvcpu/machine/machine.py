"""Machine: a vCPU, its memory, devices and clock, and the thread that runs them.

    run(n)             in the caller's thread, up to n instructions
    start() / stop()   in a thread of its own, until stopped or ended
    at_edge(f)         call f where no instruction is under way: here, or in that thread

Run states are QEMU's: prelaunch, running, paused, finish-migrate, postmigrate, inmigrate, shutdown.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from pyvcpu.accel.base import Exit, make_accelerator
from pyvcpu.apic.local import LocalApic
from pyvcpu.apic.vmstate import APIC
from pyvcpu.clock import make_clock
from pyvcpu.cpu.state import CpuState
from pyvcpu.cpu.vmstate import CPU, CPU_COMMON, CpuCommon
from pyvcpu.devices.debug_exit import DebugExit
from pyvcpu.errors import ConfigurationError
from pyvcpu.machine.config import MachineConfig
from pyvcpu.machine.loader import start_at, write_image
from pyvcpu.machine.vmstate import GLOBALSTATE, KVM_TPR_OPT, TIMER, GlobalState, Timers
from pyvcpu.memory.bus import Bus
from pyvcpu.memory.pages import PAGE_SIZE
from pyvcpu.memory.ram import GuestRam
from pyvcpu.migration.vmstate.description import SectionEntry

T = TypeVar("T")

RunExit = Exit | Literal["debug-exit"]
"""Why a run ended: an engine's reason, or the guest's write to isa-debug-exit."""

UNLIMITED = 1 << 62
APIC_SIZE = PAGE_SIZE


class Machine:
    """What all machines share. ``ram_blocks`` come first in the RAM section's order; the first is main memory."""

    name = "abstract"

    def __init__(self, config: MachineConfig, ram_blocks: list[tuple[str, int]]) -> None:
        self.config = config
        self.ram = GuestRam(ram_blocks)
        self.main_memory = self.ram.blocks[0]
        self.bus = Bus(self.ram)
        self.bus.map_ram(0, self.main_memory.size, self.main_memory)
        self.clock = make_clock(config.clock)
        self.cpu = CpuState()
        self.apic = LocalApic(self.clock)
        self.apic.on_move = self._apic_moved
        self.apic.on_nmi = self._nmi
        self.devices: list[Any] = []
        self.exit_code: int | None = None
        self.status = "prelaunch"
        self.error: BaseException | None = None
        self.global_state = GlobalState()
        if config.debug_exit is not None:
            iobase, iosize = config.debug_exit
            self.bus.map_io(iobase, iosize, DebugExit(self._debug_exit), "isa-debug-exit")
        self.cpu.reset()
        self.engine = make_accelerator(config.accel, self.cpu, self.ram, self.bus, self.apic, self.clock)
        self.engine.pace = config.pace
        self._lock = threading.Lock()
        self._edge_calls: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.last_exit: RunExit | None = None

    # -- state --------------------------------------------------------------------------------

    def reset(self) -> None:
        """Power-up: the vCPU, the devices, and the images of the configuration back in RAM. Time goes on."""
        self.cpu.reset()
        self.apic.reset()
        for device in self.devices:
            device.reset()
        for image in self.config.loader:
            write_image(self.ram, self.main_memory, image)
        if self.config.loader:
            start_at(self.cpu, self.config.loader[0].address)
        self.engine.load_state()

    def sections(self) -> list[SectionEntry]:
        """The device sections of this machine, in QEMU's order."""
        return [
            SectionEntry(TIMER, 0, Timers(self.clock, self.cpu)),
            SectionEntry(CPU_COMMON, 0, CpuCommon(self.cpu, self.apic)),
            SectionEntry(CPU, 0, self.cpu),
            SectionEntry(KVM_TPR_OPT, 0, None),
            SectionEntry(APIC, 0, self.apic),
            *self.device_sections(),
            SectionEntry(GLOBALSTATE, 0, self.global_state),
        ]

    def device_sections(self) -> list[SectionEntry]:
        """What this kind of machine adds, between the APIC and globalstate."""
        return []

    @property
    def instructions(self) -> int:
        """Instructions retired since power-up, wherever they were."""
        return self.clock.instructions

    def _apic_moved(self, base: int, enabled: bool) -> None:
        self.bus.unmap_mmio("apic")
        if enabled:
            self.bus.map_mmio(base, APIC_SIZE, self.apic, "apic")

    def _nmi(self) -> None:
        self.cpu.nmi_pending = 1

    def _debug_exit(self, code: int) -> None:
        self.exit_code = code
        self.engine.request_exit()

    # -- running in the caller's thread -------------------------------------------------------

    def run(self, instructions: int | None = None) -> RunExit:
        """Run up to ``instructions`` (None: without a limit) in this thread, and say why it ended.

        "limit", "debug-exit" and "shutdown" (with ``no_reboot``; ``exit_code`` is set) and "halted", as
        :data:`RunExit` has them, and "request" after :meth:`request_stop`. Raises UnsupportedInstruction.
        """
        if self.running:
            raise ConfigurationError("the machine runs already")
        self._stopping = False
        limit = UNLIMITED if instructions is None else self.clock.instructions + instructions
        return self._run(limit)

    def request_stop(self) -> None:
        """End :meth:`run` at the next instruction boundary; from any thread."""
        self._stopping = True
        self.engine.request_exit()

    def _run(self, limit: int) -> RunExit:
        self.status = "running"
        self.clock.resume()
        try:
            while True:
                self._serve_edge_calls()
                if self._stopping:
                    return "request"
                reason = self.engine.run(limit)
                if self.exit_code is not None:
                    self.status = "shutdown"
                    return "debug-exit"
                if reason == "shutdown" and not self.config.no_reboot:
                    self.reset()
                elif reason == "shutdown":
                    self.status = "shutdown"
                    self.exit_code = 0
                    return reason
                elif reason != "request":
                    return reason
        finally:
            self.clock.pause()
            if self.status == "running":
                self.status = "paused"

    # -- running in a thread ------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether the vCPU thread is there."""
        return self._thread is not None

    def start(self, instructions: int | None = None) -> None:
        """Run in a thread, up to ``instructions`` from now; see :meth:`wait` and :meth:`stop`."""
        with self._lock:
            if self._thread is not None:
                raise ConfigurationError("the machine runs already")
            self._stopping = False
            limit = UNLIMITED if instructions is None else self.clock.instructions + instructions
            self.status = "running"
            self._thread = threading.Thread(target=self._thread_body, args=(limit,), name="vCPU 0", daemon=True)
            self._thread.start()

    def _thread_body(self, limit: int) -> None:
        try:
            self.last_exit = self._run(limit)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            self.error = error
            self.last_exit = None
        with self._lock:  # no edge call may slip in between the last look and the end
            self._thread = None
            self._serve_edge_calls()

    def stop(self) -> None:
        """Stop the vCPU thread at an instruction boundary; nothing to do if it does not run."""
        thread = self._thread
        if thread is not None:
            self.request_stop()
            thread.join()
        if self.status == "prelaunch":
            self.status = "paused"

    def wait(self, timeout: float | None = None) -> RunExit | None:
        """Wait for the thread to end by itself: why it did, or None at the timeout. Raises what it raised."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
            if thread.is_alive():
                return None
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self.last_exit

    def at_edge(self, function: Callable[[], T]) -> T:
        """``function()`` between two instructions: in the vCPU thread while it runs, else here."""
        if threading.current_thread() is self._thread:
            return function()
        done = threading.Event()
        outcome: list[Any] = [None, None]

        def call() -> None:
            try:
                outcome[0] = function()
            except BaseException as error:  # noqa: BLE001 - raised again in the caller
                outcome[1] = error
            done.set()

        with self._lock:
            if self._thread is None:
                return function()
            self._edge_calls.append(call)
            self.engine.request_exit()
        done.wait()
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def _serve_edge_calls(self) -> None:
        while self._edge_calls:
            self._edge_calls.popleft()()

    def close(self) -> None:
        """Stop, and give the memory back."""
        self.stop()
        self.ram.close()
