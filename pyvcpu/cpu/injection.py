"""Events that were being delivered when the state was taken, for engines that cannot go on in the middle.

KVM may stop between taking an event and entering its handler (a page of the IDT or of the stack was missing). Its
state then says what is under way: ``exception_nr``, ``interrupt_injected`` with ``soft_interrupt``,
``nmi_injected``. Nothing of the delivery has happened in registers or memory yet, so it can as well begin
again from before: RIP is still at the instruction that faulted, or that is the INT n.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pyvcpu.cpu.state import CpuState

NOT_RESTARTED = frozenset({1, 2, 18})
"""#DB, NMI and #MC as exceptions: after them RIP may be past what raised them, so nothing raises them again."""


class Vectors(Protocol):
    """The registers of a local APIC that say which vectors wait and which are in service."""

    irr: list[int]
    isr: list[int]


def restart_events(cpu: CpuState, apic: Vectors | None) -> None:
    """Put what was being delivered back to where it was before; nothing happens where nothing was.

    A fault or INT n comes again by its instruction, an interrupt of the APIC from IRR, an NMI from its latch.
    """
    vector = cpu.interrupt_injected
    if vector >= 0:
        cpu.interrupt_injected = -1
        if not cpu.soft_interrupt and apic is not None:
            word, bit = vector >> 5, 1 << (vector & 31)
            apic.isr[word] &= ~bit
            apic.irr[word] |= bit
    cpu.soft_interrupt = 0
    if cpu.exception_nr >= 0:
        cpu.exception_nr = -1
        cpu.exception_injected = cpu.exception_has_error_code = cpu.error_code = 0
    if cpu.nmi_injected:
        cpu.nmi_injected, cpu.nmi_pending, cpu.nmi_masked = 0, 1, 0
