"""What a machine is made of, as plain data: the options of ``run`` in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MIB = 1 << 20


class Image(NamedTuple):
    """Bytes to load at a guest physical address (``--loader FILE,addr=N``)."""

    data: bytes
    address: int


def discard(data: bytes) -> None:
    """A serial line to nowhere."""


@dataclass
class MachineConfig:
    """Everything that :func:`pyvcpu.machine.make_machine` needs.

    ``memory`` is in bytes; ``bios`` the image's bytes; ``loader`` images are written to RAM at every reset, and the
    vCPU starts at the first of them; ``serial`` gets what the guest sends; ``debug_exit`` is (iobase, iosize).
    ``pace`` makes HLT wait in real time on the icount clock (QEMU's ``sleep=on``).
    """

    machine: str = "microvm"
    memory: int = 128 * MIB
    accel: str = "auto"
    clock: str = "icount"
    bios: bytes | None = None
    loader: Sequence[Image] = field(default_factory=tuple)
    serial: Callable[[bytes], None] = discard
    debug_exit: tuple[int, int] | None = None
    no_reboot: bool = False
    pace: bool = False
