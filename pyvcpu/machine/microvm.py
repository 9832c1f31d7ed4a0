"""``-M microvm``, small: vCPU, local APIC, RAM, firmware, and a polled 16550A at port 3F8.

Memory as QEMU's microvm has it: RAM from 0 up to at most 3 GiB (more would go above 4 GiB, and is
not there yet), the firmware below 4 GiB and below 1 MiB.
"""

from __future__ import annotations

from pyvcpu.devices.serial import PORT, Serial16550
from pyvcpu.devices.vmstate import SERIAL
from pyvcpu.errors import ConfigurationError
from pyvcpu.machine.config import MIB, MachineConfig
from pyvcpu.machine.loader import check_bios, map_bios
from pyvcpu.machine.machine import Machine
from pyvcpu.migration.vmstate.description import SectionEntry

MAXIMUM_MEMORY = 3072 * MIB


class MicroVm(Machine):
    """RAM is "microvm.ram", firmware "pc.bios"."""

    name = "microvm"

    def __init__(self, config: MachineConfig) -> None:
        if config.memory > MAXIMUM_MEMORY:
            raise ConfigurationError(f"microvm has at most 3072 MiB here, not {config.memory // MIB}")
        blocks = [("microvm.ram", config.memory)]
        if config.bios is not None:
            check_bios(config.bios)
            blocks.append(("pc.bios", len(config.bios)))
        super().__init__(config, blocks)
        if config.bios is not None:
            map_bios(self.bus, self.ram.block("pc.bios"))
        self.serial = Serial16550(config.serial)
        self.bus.map_io(PORT, 8, self.serial, "serial")
        self.devices.append(self.serial)
        self.reset()

    def reset(self) -> None:
        if self.config.bios is not None:
            self.ram.write(self.ram.block("pc.bios").offset, self.config.bios)
        super().reset()

    def device_sections(self) -> list[SectionEntry]:
        return [SectionEntry(SERIAL, 0, self.serial)]
