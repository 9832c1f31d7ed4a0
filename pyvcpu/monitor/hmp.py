"""A human monitor: QEMU's commands, a line each, on stdin.

info status | info registers | info migrate | stop | cont | quit
migrate URI | migrate_incoming URI | migrate_cancel | migrate_set_parameter max-bandwidth|downtime-limit N
"""

from __future__ import annotations

import threading
from typing import TextIO

from pyvcpu.cpu.layout import REG_NAMES, SEG_NAMES
from pyvcpu.errors import ConfigurationError, PyvcpuError
from pyvcpu.machine import Machine
from pyvcpu.migration.channel import connect, listen
from pyvcpu.migration.session import DestinationSession, MigrationParameters, SourceSession


class HumanMonitor:
    """Runs ``machine`` in its thread and obeys the lines of ``commands`` until quit, the end, or the guest's end."""

    def __init__(self, machine: Machine, commands: TextIO, output: TextIO, max_instructions: int | None = None) -> None:
        self.machine, self._commands, self._output = machine, commands, output
        self._limit = max_instructions
        self._parameters = MigrationParameters()
        self._outgoing: SourceSession | None = None
        self._ended = threading.Event()
        self._quit = False

    def run(self, *, start: bool) -> int:
        """Obey until the end; returns the exit code."""
        threading.Thread(target=self._read, name="monitor", daemon=True).start()
        if start:
            self._cont()
        while not self._ended.wait(0.05):
            if self.machine.exit_code is not None:
                break
        self.machine.stop()
        self.machine.wait()
        return self.machine.exit_code or 0

    def _say(self, text: str) -> None:
        print(text, file=self._output, flush=True)

    def _read(self) -> None:
        for line in self._commands:
            words = line.split()
            if not words:
                continue
            try:
                self._obey(words)
            except PyvcpuError as error:
                self._say(f"Error: {error}")
            if self._quit:
                break
        if self._quit or self.machine.status != "running":
            self._ended.set()

    def _obey(self, words: list[str]) -> None:
        command = " ".join(words[:2]) if words[0] == "info" else words[0]
        handler = {
            "info status": lambda: self._say(f"VM status: {self.machine.status}"),
            "info registers": self._registers,
            "info migrate": self._migration,
            "stop": self.machine.stop,
            "cont": self._cont,
            "c": self._cont,
            "quit": self._leave,
            "q": self._leave,
            "migrate_cancel": self._cancel,
        }.get(command)
        if handler is not None:
            handler()
        elif command == "migrate" and len(words) > 1:
            self._migrate(" ".join(words[1:]))
        elif command == "migrate_incoming" and len(words) > 1:
            self._incoming(" ".join(words[1:]))
        elif command == "migrate_set_parameter" and len(words) == 3:
            self._set_parameter(words[1], words[2])
        else:
            self._say(f"unknown command: {' '.join(words)}\n{__doc__}")

    def _leave(self) -> None:
        self._quit = True

    def _cont(self) -> None:
        if not self.machine.running:
            self.machine.start(self._limit)

    def _cancel(self) -> None:
        if self._outgoing is not None:
            self._outgoing.cancel()

    def _set_parameter(self, name: str, value: str) -> None:
        if name not in ("max-bandwidth", "downtime-limit") or not value.isdigit():
            raise ConfigurationError("migrate_set_parameter max-bandwidth BYTES/S or downtime-limit MS")
        setattr(self._parameters, name.replace("-", "_"), int(value))

    def _migrate(self, uri: str) -> None:
        session = self._outgoing = SourceSession(self.machine, connect(uri), self._parameters)
        session.start()

        def report() -> None:
            try:
                statistics = session.wait()
                self._say(
                    f"migrated: total {statistics.total_time_ms:.0f} ms, downtime {statistics.downtime_ms:.1f} ms"
                )
            except PyvcpuError as error:
                self._say(f"Error: {error}")

        threading.Thread(target=report, name="migration report", daemon=True).start()

    def _incoming(self, uri: str) -> None:
        if self.machine.running:
            raise ConfigurationError("a guest runs here already")
        self.machine.status = "inmigrate"
        with listen(uri) as listener:
            channel = listener.accept()
        DestinationSession(self.machine, channel, MigrationParameters(), autostart=False).run()
        if self.machine.status == "running":
            self._cont()

    def _migration(self) -> None:
        if self._outgoing is None:
            self._say("Migration status: none")
            return
        self._say(f"Migration status: {self._outgoing.status}")
        for name, value in self._outgoing.statistics.to_dict().items():
            if name != "iterations":
                self._say(f"{name}: {value}")

    def _registers(self) -> None:
        self.machine.at_edge(self._show_registers)

    def _show_registers(self) -> None:
        self.machine.engine.save_state()
        cpu = self.machine.cpu
        names = [name.upper().ljust(3) for name in REG_NAMES]
        for row in range(0, 16, 4):
            self._say(" ".join(f"{names[i]}={cpu.regs[i]:016x}" for i in range(row, row + 4)))
        self._say(
            f"RIP={cpu.rip:016x} RFL={cpu.rflags:08x} CPL={cpu.seg_flags[2] >> 13 & 3} HLT={int(cpu.mp_state == 3)}"
        )
        for i, name in enumerate(SEG_NAMES):
            self._say(
                f"{name.upper():3}={cpu.seg_selector[i]:04x} {cpu.seg_base[i]:016x} "
                f"{cpu.seg_limit[i]:08x} {cpu.seg_flags[i]:08x}"
            )
        self._say(f"CR0={cpu.cr0:08x} CR2={cpu.cr2:016x} CR3={cpu.cr3:016x} CR4={cpu.cr4:08x} EFER={cpu.efer:016x}")
