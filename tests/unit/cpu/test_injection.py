"""What was being delivered begins again."""

from __future__ import annotations

import pytest

from pyvcpu.apic.local import LocalApic
from pyvcpu.clock import IcountClock
from pyvcpu.cpu.injection import restart_events
from pyvcpu.cpu.state import CpuState


@pytest.fixture
def cpu():
    made = CpuState()
    made.reset()
    return made


@pytest.fixture
def apic():
    made = LocalApic(IcountClock())
    made.write(0xF0, 4, 0x1FF)
    return made


def test_nothing_happens_where_nothing_was(cpu, apic):
    apic.raise_vector(0x55)
    apic.acknowledge()
    before, in_service = cpu.snapshot(), list(apic.isr)
    restart_events(cpu, apic)
    assert (cpu.snapshot(), apic.isr, apic.irr) == (before, in_service, [0] * 8)


def test_an_interrupt_waits_again_and_can_be_taken(cpu, apic):
    apic.raise_vector(0x55)
    cpu.interrupt_injected = apic.acknowledge()
    assert apic.pending_vector() == -1
    restart_events(cpu, apic)
    assert (cpu.interrupt_injected, apic.pending_vector()) == (-1, 0x55)


def test_int_n_is_executed_again(cpu, apic):
    cpu.interrupt_injected, cpu.soft_interrupt = 0x80, 1
    restart_events(cpu, apic)
    assert (cpu.interrupt_injected, cpu.soft_interrupt, apic.irr) == (-1, 0, [0] * 8)


def test_a_fault_comes_again_by_itself(cpu, apic):
    cpu.exception_nr, cpu.exception_injected, cpu.exception_has_error_code, cpu.error_code = 14, 1, 1, 6
    restart_events(cpu, apic)
    assert cpu.exception_nr == -1
    assert not (cpu.exception_injected or cpu.exception_has_error_code or cpu.error_code)


def test_an_nmi_is_pending_again(cpu, apic):
    cpu.nmi_injected, cpu.nmi_masked = 1, 1
    restart_events(cpu, apic)
    assert (cpu.nmi_injected, cpu.nmi_pending, cpu.nmi_masked) == (0, 1, 0)


def test_without_an_apic(cpu):
    cpu.interrupt_injected = 8
    restart_events(cpu, None)
    assert cpu.interrupt_injected == -1
