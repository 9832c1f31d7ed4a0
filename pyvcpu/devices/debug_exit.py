"""isa-debug-exit: a write to its port ends the run with exit code ``(value << 1) | 1``, as in QEMU."""

from __future__ import annotations

from collections.abc import Callable


class DebugExit:
    """``on_exit(code)`` is called with the exit code, 1 to 255 and odd as a process sees it."""

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self.on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.on_exit((value << 1 | 1) & 0xFF)
