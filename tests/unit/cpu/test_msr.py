"""Model-specific registers: what is kept, what is refused, what they change besides."""

from __future__ import annotations

import pytest

from pyvcpu.apic.local import LocalApic
from pyvcpu.clock import IcountClock
from pyvcpu.cpu.events import GP, GuestException
from pyvcpu.cpu.layout import FS
from pyvcpu.cpu.msr import MSRS, read_msr, write_msr
from pyvcpu.cpu.state import CpuState

ONES = (1 << 64) - 1


class Cpu:
    """What an MSR belongs to; counts what it asks of the engine."""

    def __init__(self, apic: bool = True) -> None:
        self.state, self.clock = CpuState(), IcountClock()
        self.state.reset()
        self.apic = LocalApic(self.clock) if apic else None
        self.mmu = self
        self.flushes = self.changes = 0

    def flush(self) -> None:
        self.flushes += 1

    def mode_changed(self) -> None:
        self.changes += 1


def refused(cpu: Cpu, index: int, value: int) -> bool:
    before = cpu.state.snapshot()
    try:
        write_msr(cpu, index, value)
    except GuestException as exception:
        assert (exception.vector, exception.error_code) == (GP, 0)
        assert cpu.state.snapshot() == before
        return True
    return False


@pytest.mark.parametrize(
    ("index", "good", "bad"),
    [
        (0x1B, [0xFEE00900, 0xFEC00900, 0xFEE00100], [0xFEE00D00, 0xFEE00901, 1 << 41]),
        (0x174, [8, 0xFFFFFFFF], [1 << 32]),
        (0x175, [0xFFFF800000000000, 5], [1 << 47, 1 << 63]),
        (0x17A, [4, 0], [8]),
        (0x17B, [0, ONES], [1]),
        (0x200, [0xC0000006, 0xFFFFFFF001], [0x100, 2, 1 << 40]),
        (0x201, [0xFFC0000800], [0x400, 1 << 40]),
        (0x20F, [0x800], [1]),
        (0x250, [0x0606060606060606], [2, 7 << 56]),
        (0x26F, [0x0505050505050505], [0xFF]),
        (0x277, [0x0007040600070406], [2, 3 << 8, 8 << 56]),
        (0x2FF, [0xC06, 0x800], [0x1000, 2]),
        (0x400, [0, ONES], [2]),
        (0x410, [0, ONES & ~(1 << 10)], [1 << 10, ONES & ~(1 << 11)]),
        (0x401, [0, 12345], []),
        (0x427, [0, ONES], []),
        (0xC0000081, [ONES], []),
        (0xC0000082, [0xFFFFFFFF81000000], [1 << 47]),
        (0xC0000083, [0x1000], [1 << 60]),
        (0xC0000084, [0x47700, 0xFFFFFFFF], [1 << 32]),
        (0xC0000100, [0x7FFFFFFFFFFF], [0x800000000000]),
        (0xC0000101, [ONES], [1 << 62]),
        (0xC0000102, [0xFFFF888000000000], [0x0FFF888000000000]),
        (0xC0000103, [3], [1 << 32]),
        (0xC0010117, [0x1000], [0x800, 1 << 40]),
    ],
)
def test_values(index: int, good: list[int], bad: list[int]) -> None:
    cpu = Cpu()
    for value in good:
        assert not refused(cpu, index, value)
        assert read_msr(cpu, index) == value
    for value in bad:
        assert refused(cpu, index, value), hex(value)


def test_read_only_and_unknown() -> None:
    cpu = Cpu()
    assert (read_msr(cpu, 0xFE), read_msr(cpu, 0x179)) == (0x508, 0x100010A)
    for index in (0xFE, 0x179, 0x198, 0x12345678, 0x6E0, 0x48):
        assert refused(cpu, index, 0), hex(index)
    for index in (0x12345678, 0x428, 0x210, 0x3A):
        with pytest.raises(GuestException):
            read_msr(cpu, index)


def test_what_linux_asks_of_an_amd_processor_reads_as_zero() -> None:
    cpu = Cpu()
    for index in (*range(0xC0010000, 0xC0010008), 0xC0010010, 0xC0010015, 0xC0010055, 0xC0011029, 0x1D9):
        assert not refused(cpu, index, ONES)
        assert read_msr(cpu, index) == 0


def test_efer() -> None:
    cpu = Cpu()
    assert not refused(cpu, 0xC0000080, 0xD01)
    assert cpu.state.efer == 0x901  # LMA cannot be written
    assert (cpu.flushes, cpu.changes) == (1, 1)
    cpu.state.cr0 |= 1 << 31
    cpu.state.efer |= 0x400
    assert refused(cpu, 0xC0000080, 0x801)  # LME while paging
    assert not refused(cpu, 0xC0000080, 0x100)
    assert cpu.state.efer == 0x500
    for bit in (1, 9, 12, 14, 15, 63):
        assert refused(cpu, 0xC0000080, 0x100 | 1 << bit)


def test_the_time_stamp_counter() -> None:
    cpu = Cpu()
    cpu.clock.instructions = 1000
    cpu.state.tsc_offset = 500
    assert read_msr(cpu, 0x10) == 1500
    write_msr(cpu, 0x10, 100)
    assert (read_msr(cpu, 0x10), cpu.state.tsc_offset, read_msr(cpu, 0x3B)) == (100, -900, -1400 & ONES)
    write_msr(cpu, 0x3B, 0)
    assert read_msr(cpu, 0x10) == 1500
    write_msr(cpu, 0x10, ONES)
    cpu.clock.instructions += 2
    assert read_msr(cpu, 0x10) == 1
    write_msr(cpu, 0x3B, 1 << 63)
    write_msr(cpu, 0x3B, 0)
    assert read_msr(cpu, 0x3B) == 0


def test_segment_bases_are_those_of_the_segments() -> None:
    cpu = Cpu()
    write_msr(cpu, 0xC0000100, 0x1234)
    assert cpu.state.seg_base[FS] == 0x1234


def test_apic_base_without_an_apic() -> None:
    assert refused(Cpu(apic=False), 0x1B, 0xFEE00900)
    cpu = Cpu()
    write_msr(cpu, 0x1B, 0xFEC00900)
    assert cpu.apic is not None
    assert cpu.apic.base == 0xFEC00000


def test_every_register_reads_at_reset() -> None:
    cpu = Cpu()
    for index in MSRS:
        assert 0 <= read_msr(cpu, index) <= ONES
