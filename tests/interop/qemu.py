"""Debian's QEMU, driven over QMP: started, migrated out of and into, and looked into."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BINARY = "qemu-system-x86_64"
TIMEOUT = 30.0
# -M none wires its CPU up only with an explicit APIC id.
NONE = ("-M", "none", "-cpu", "qemu64", "-global", "qemu64-x86_64-cpu.apic-id=0")


def version() -> str | None:
    """QEMU's version such as "7.2.22", or None where it is not installed."""
    if shutil.which(BINARY) is None:
        return None
    text = subprocess.run([BINARY, "--version"], capture_output=True, text=True, check=True).stdout
    return text.split("version", 1)[1].split()[0]


class Qemu:
    """A QEMU under TCG with a QMP monitor; a context manager that ends it."""

    def __init__(self, directory: Path, *arguments: str, name: str = "qemu") -> None:
        self._path = directory / f"{name}.qmp"
        self._log = directory / f"{name}.log"
        self._arguments = [
            BINARY, "-accel", "tcg", "-nodefaults", "-display", "none",
            "-qmp", f"unix:{self._path},server=on,wait=off", *arguments,
        ]  # fmt: skip
        self._buffer = ""

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT)
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                self._socket.connect(str(self._path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"QEMU did not start: {self.log()}") from None
                time.sleep(0.02)
        self._receive()  # the greeting
        self.command("qmp_capabilities")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def log(self) -> str:
        """What QEMU said on its outputs."""
        return self._log.read_text(errors="replace")

    def _receive(self) -> dict[str, Any]:
        decoder = json.JSONDecoder()
        while True:
            try:
                message, end = decoder.raw_decode(self._buffer.lstrip())
                self._buffer = self._buffer.lstrip()[end:]
                return message
            except ValueError:
                data = self._socket.recv(65536)
                if not data:
                    raise AssertionError(f"QEMU is gone: {self.log()}") from None
                self._buffer += data.decode()

    def command(self, name: str, **arguments: Any) -> Any:
        """Execute a QMP command; its result. Events in between are dropped."""
        self._socket.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())
        while True:
            message = self._receive()
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise AssertionError(f"{name}: {message['error']['desc']}")

    def human(self, line: str) -> str:
        """Execute a command of the human monitor; its text."""
        return str(self.command("human-monitor-command", **{"command-line": line}))

    def migrate(self, uri: str) -> dict[str, Any]:
        """Migrate out, and wait; ``query-migrate``'s last answer, which says completed."""
        self.command("migrate", uri=uri)
        return self.wait_migration()

    def wait_migration(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            status: dict[str, Any] = self.command("query-migrate")
            if status.get("status") == "completed":
                return status
            assert status.get("status") not in ("failed", "cancelled"), f"{status} {self.log()}"
            time.sleep(0.02)
        raise AssertionError(f"the migration did not end: {self.log()}")

    def wait_status(self, wanted: str) -> None:
        """Wait for a run state."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            status = self.command("query-status")["status"]
            if status == wanted:
                return
            assert time.monotonic() < deadline, f"{status}, not {wanted}: {self.log()}"
            time.sleep(0.02)

    def memory(self, address: int, size: int) -> bytes:
        """Guest physical memory."""
        path = self._path.with_suffix(".mem")
        self.command("pmemsave", val=address, size=size, filename=str(path))
        return path.read_bytes()

    def u64(self, address: int) -> int:
        return int.from_bytes(self.memory(address, 8), "little")
