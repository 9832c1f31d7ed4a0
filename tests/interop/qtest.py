"""A QEMU machine that stands still, whose ports and memory are accessed one by one (``-qtest stdio``)."""

from __future__ import annotations

import shutil
import subprocess

BINARY = "qemu-system-x86_64"


def available() -> bool:
    """Whether Debian's qemu-system-x86 is installed."""
    return shutil.which(BINARY) is not None


class QTest:
    """``arguments`` are the command line's; the vCPU never runs."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [BINARY, "-accel", "tcg", "-S", "-nodefaults", "-display", "none", "-qtest", "stdio", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> QTest:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _command(self, text: str) -> list[str]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if not line.startswith("IRQ"):
                words = line.split()
                assert words[0] == "OK", line
                return words[1:]
        raise AssertionError(f"QEMU ended at {text}")

    def io_read(self, port: int, size: int) -> int:
        """Read a port, as :meth:`pyvcpu.memory.bus.Bus.io_read`."""
        return int(self._command(f"in{' bw l'[size]} {port:#x}")[0], 16)

    def io_write(self, port: int, size: int, value: int) -> None:
        """Write a port."""
        self._command(f"out{' bw l'[size]} {port:#x} {value:#x}")

    def read(self, gpa: int) -> int:
        """Read a byte of physical memory."""
        return int(self._command(f"readb {gpa:#x}")[0], 16)

    def write(self, gpa: int, value: int) -> None:
        """Write a byte of physical memory."""
        self._command(f"writeb {gpa:#x} {value:#x}")
