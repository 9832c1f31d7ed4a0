"""Machine: a vCPU, its memory, devices and clock, and who runs them.

    run(n)             in the caller's thread, up to n instructions
    start() / stop()   in a thread of its own, until stopped or ended
    at_edge(f)         call f where no instruction is under way: in the thread that runs the guest, else here

                 start, run             stop, limit, halted
    prelaunch  ------------->  running  ------------------>  paused  --> running ...
                                  |  debug-exit, triple fault: shutdown      an error: internal-error
                                  |  the migration session's: finish-migrate, postmigrate

Run states are QEMU's words. The clock runs exactly while the guest does.
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
from pyvcpu.devices.serial import Serial16550
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
        self.serial: Serial16550 | None = None
        self.devices: list[Any] = []
        self.exit_code: int | None = None
        """Of the process, once the guest has ended itself (isa-debug-exit, or a triple fault with no_reboot)."""
        self.status = "prelaunch"
        self.error: BaseException | None = None
        self.last_exit: RunExit | None = None
        self.on_exit: Callable[[RunExit | None], None] = lambda reason: None
        """Called in the thread that ran the guest, when a run has ended; None for an error."""
        self.global_state = GlobalState()
        if config.debug_exit is not None:
            iobase, iosize = config.debug_exit
            self.bus.map_io(iobase, iosize, DebugExit(self._debug_exit), "isa-debug-exit")
        self.cpu.reset()
        self.engine = make_accelerator(config.accel, self.cpu, self.ram, self.bus, self.apic, self.clock)
        self.engine.pace = config.pace
        self.bus.add_map_listener(self.engine.flush_tlb)
        self._mutex = threading.RLock()  # guards who runs the guest, and the list of edge calls
        self._runner: threading.Thread | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._edge_calls: deque[Callable[[], None]] = deque()
        self._stopping = False

    # -- state --------------------------------------------------------------------------------

    def reset(self) -> None:
        """Power-up: the vCPU, the devices, and the images of the configuration back in RAM. Time goes on.

        At a region edge only, when the guest runs.
        """
        self.cpu.reset()
        self.apic.reset()
        for device in self.devices:
            device.reset()
        for image in self.config.loader:
            write_image(self.ram, self.main_memory, image)
        if self.config.loader:
            start_at(self.cpu, self.config.loader[0].address)
        self.engine.load_state()
        self.exit_code = None
        if self.status == "shutdown":
            self.status = "prelaunch"

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

    # -- running ------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether a thread is running the guest: that of :meth:`start`, or of whoever is in :meth:`run`."""
        return self._runner is not None

    def run(self, instructions: int | None = None) -> RunExit:
        """Run up to ``instructions`` (None: without a limit) in this thread, and say why it ended.

        "limit", "halted", "request" (:meth:`request_stop`), and "debug-exit" and, with ``no_reboot``, "shutdown",
        which set ``exit_code``; a guest that has ended so stays ended until a reset. Raises what the engine raises,
        as UnsupportedInstruction, and ConfigurationError if the guest runs already.
        """
        limit = self._claim(threading.current_thread(), instructions)
        try:
            return self._run(limit)
        finally:
            self._release()

    def start(self, instructions: int | None = None) -> None:
        """Run in a thread, up to ``instructions`` from now; see :meth:`wait` and :meth:`stop`."""
        thread = threading.Thread(target=self._thread_body, name="vCPU 0", daemon=True)
        self._limit = self._claim(thread, instructions)
        thread.start()

    def request_stop(self) -> None:
        """End the run at the next instruction boundary, without waiting for it; from any thread."""
        self._stopping = True
        self.engine.request_exit()

    def stop(self) -> None:
        """Stop the guest at an instruction boundary, and wait until it stands (in its own thread: do not wait)."""
        if self._runner is threading.current_thread():
            self.request_stop()
        elif self._runner is not None:
            self.request_stop()
            self._idle.wait()
        elif self.status == "prelaunch":
            self.status = "paused"

    def wait(self, timeout: float | None = None) -> RunExit | None:
        """Wait for the run to end by itself: why it did, or None at the timeout (s). Raises what ended its thread."""
        if not self._idle.wait(timeout):
            return None
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self.last_exit

    def _claim(self, runner: threading.Thread, instructions: int | None) -> int:
        """Let ``runner`` be the thread that runs the guest; the instruction count to run to."""
        with self._mutex:
            if self._runner is not None:
                raise ConfigurationError("the machine runs already")
            self._runner, self._stopping = runner, False
            self._idle.clear()
            self.status = "running" if self.exit_code is None else "shutdown"
            return UNLIMITED if instructions is None else self.clock.instructions + instructions

    def _release(self) -> None:
        """Nobody runs the guest any more; edge calls that came too late for the run are served first."""
        while True:
            self._serve_edge_calls()
            with self._mutex:
                if not self._edge_calls:
                    self._runner = None
                    self._idle.set()
                    return

    def _thread_body(self) -> None:
        try:
            self._run(self._limit)
        except BaseException as error:  # for whoever waits
            self.error = error
        finally:
            self._release()

    def _run(self, limit: int) -> RunExit:
        reason: RunExit | None = None
        if self.exit_code is not None and self.last_exit is not None:
            return self.last_exit
        self.last_exit = None
        self.clock.resume()
        try:
            reason = self.last_exit = self._run_to(limit)
            return reason
        finally:
            self.clock.pause()
            if self.exit_code is not None:
                self.status = "shutdown"
            elif reason is None:
                self.status = "internal-error"
            elif self.status == "running":
                self.status = "paused"
            self.on_exit(reason)

    def _run_to(self, limit: int) -> RunExit:
        while True:
            self._serve_edge_calls()
            if self._stopping:
                return "request"
            reason = self.engine.run(limit)
            if self.exit_code is not None:
                return "debug-exit"
            if reason == "shutdown":
                if self.config.no_reboot:
                    self.exit_code = 0
                    return reason
                self.reset()
            elif reason != "request":
                return reason

    # -- edge calls ---------------------------------------------------------------------------

    def at_edge(self, function: Callable[[], T]) -> T:
        """``function()`` between two instructions: in the thread that runs the guest, else here.

        While it runs here the guest cannot start. Raises what ``function`` raises.
        """
        outcome: list[T] = []
        failure: list[BaseException] = []
        done = threading.Event()

        def call() -> None:
            try:
                outcome.append(function())
            except BaseException as error:  # raised again in the caller's thread
                failure.append(error)
            finally:
                done.set()

        with self._mutex:
            if self._runner is None or self._runner is threading.current_thread():
                return function()
            self._edge_calls.append(call)
            self.engine.request_exit()
        done.wait()
        if failure:
            raise failure[0]
        return outcome[0]

    def _serve_edge_calls(self) -> None:
        while self._edge_calls:
            self._edge_calls.popleft()()

    def close(self) -> None:
        """Stop, and give the memory back."""
        self.stop()
        self.ram.close()
