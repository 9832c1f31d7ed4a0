"""``-M none``: a vCPU, its local APIC and RAM, nothing else, as QEMU's machine of that name.

It takes isa-debug-exit, for which QEMU's has no bus: else a guest could end here only by a triple fault.
"""

from __future__ import annotations

from pyvcpu.errors import ConfigurationError
from pyvcpu.machine.config import MachineConfig
from pyvcpu.machine.machine import Machine


class NoneMachine(Machine):
    """RAM is one block, "ram"."""

    name = "none"

    def __init__(self, config: MachineConfig) -> None:
        if config.bios is not None:
            raise ConfigurationError("machine none has no firmware: use --loader or --guest")
        super().__init__(config, [("ram", config.memory)])
        self.reset()
