"""Machines: what QEMU calls ``-M``."""

from __future__ import annotations

from pyvcpu.errors import ConfigurationError
from pyvcpu.machine.config import MIB, Image, MachineConfig
from pyvcpu.machine.machine import Machine
from pyvcpu.machine.microvm import MicroVm
from pyvcpu.machine.none import NoneMachine

MACHINES: dict[str, type[MicroVm] | type[NoneMachine]] = {"none": NoneMachine, "microvm": MicroVm}


def make_machine(config: MachineConfig) -> Machine:
    """The machine that ``config`` describes, after reset, not started. Raises ConfigurationError."""
    try:
        kind = MACHINES[config.machine]
    except KeyError:
        raise ConfigurationError(f"-M {config.machine}: there is {' and '.join(MACHINES)}") from None
    return kind(config)


__all__ = ["MACHINES", "MIB", "Image", "Machine", "MachineConfig", "make_machine"]
