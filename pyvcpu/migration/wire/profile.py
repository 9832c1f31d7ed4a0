"""Who is at the other end, as far as the bytes depend on it.

A profile is chosen by the user or found out by the handshake; descriptions see it as
``SaveContext.profile``.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyvcpu.errors import ConfigurationError


@dataclass(frozen=True)
class TargetProfile:
    """What a destination understands.

    ``kvm``: a KVM guest (x87 stack in ST order, XSTATE_BV obeyed, mp_state obeyed, TSC in ``cpu``).
    ``icount_timer``: takes ``timer/icount`` with its ``warp_timer`` (plain TCG aborts on the latter).
    ``switchover_start``: expects the command SWITCHOVER_START; older ones refuse it.
    ``understands_pyvcpu``: answers our MESSAGE on the return path and checks our checksums.
    ``vmdesc_configuration``: its own streams describe the configuration section too.
    """

    name: str
    kvm: bool = False
    icount_timer: bool = False
    switchover_start: bool = False
    understands_pyvcpu: bool = False
    vmdesc_configuration: bool = False

    @property
    def qemu(self) -> bool:
        return not self.understands_pyvcpu

    def __str__(self) -> str:
        return self.name


PROFILES = {
    profile.name: profile
    for profile in (
        TargetProfile("pyvcpu", icount_timer=True, understands_pyvcpu=True, vmdesc_configuration=True),
        TargetProfile("qemu-7.2-tcg"),
        TargetProfile("qemu-7.2-kvm", kvm=True),
        TargetProfile("qemu-10.0-tcg", switchover_start=True, vmdesc_configuration=True),
        TargetProfile("qemu-10.0-kvm", kvm=True, switchover_start=True, vmdesc_configuration=True),
    )
}
"""By name."""

PYVCPU = PROFILES["pyvcpu"]


def target_profile(name: str | TargetProfile) -> TargetProfile:
    """The profile of this name. ConfigurationError where there is none."""
    if isinstance(name, TargetProfile):
        return name
    if name not in PROFILES:
        raise ConfigurationError(f"no target profile {name!r} (known: {', '.join(PROFILES)})")
    return PROFILES[name]
