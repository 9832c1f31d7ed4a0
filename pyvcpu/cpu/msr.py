"""Model-specific registers: one table, index -> how to read and write it (SDM 4 chapter 2, APM 2 appendix A).

What is not in the table raises #GP(0), as do bits that a register does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from pyvcpu.clock import Clock
from pyvcpu.cpu.events import GP, GuestException
from pyvcpu.cpu.layout import FS, GS
from pyvcpu.cpu.state import CpuState

EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 1 << 0, 1 << 8, 1 << 10, 1 << 11
_CR0_PG = 1 << 31
_MASK64 = (1 << 64) - 1
_PHYSICAL = (1 << 40) - 1

UCODE_REVISION = 0x01000065
"""What QEMU reports for an AMD processor."""

MTRR_CAPABILITIES = 0x508
"""Eight variable ranges, fixed ranges, write combining."""

_MEMORY_TYPES = frozenset({0, 1, 4, 5, 6})


class Apic(Protocol):
    """The part of the local APIC that an MSR reaches."""

    apicbase: int

    def set_base(self, value: int) -> None: ...


class Mmu(Protocol):
    def flush(self) -> None: ...


class Processor(Protocol):
    """What MSRs belong to; the engine is one."""

    @property
    def state(self) -> CpuState: ...
    @property
    def clock(self) -> Clock: ...
    @property
    def apic(self) -> Apic | None: ...
    @property
    def mmu(self) -> Mmu: ...

    def mode_changed(self) -> None: ...


class Msr(NamedTuple):
    """One register: ``write`` raises GuestException, before any change, for a value that is not allowed."""

    read: Callable[[Processor], int]
    write: Callable[[Processor, int], None]


def read_msr(cpu: Processor, index: int) -> int:
    """RDMSR, without the check of the privilege level."""
    return _find(index).read(cpu) & _MASK64


def write_msr(cpu: Processor, index: int, value: int) -> None:
    """WRMSR, without the check of the privilege level."""
    _find(index).write(cpu, value)


def _find(index: int) -> Msr:
    found = MSRS.get(index)
    if found is None:
        raise _refused()
    return found


def _refused() -> GuestException:
    return GuestException(GP, 0)


# -- kinds of register ------------------------------------------------------------------------


def _field(name: str, allowed: int = _MASK64, canonical: bool = False) -> Msr:
    """A scalar of CpuState; bits outside of ``allowed`` are #GP(0)."""

    def write(cpu: Processor, value: int) -> None:
        if value & ~allowed or (canonical and not _canonical(value)):
            raise _refused()
        setattr(cpu.state, name, value)

    return Msr(lambda cpu: int(getattr(cpu.state, name)), write)


def _item(name: str, i: int, valid: Callable[[int], bool] = lambda value: True) -> Msr:
    """One item of an array of CpuState."""

    def write(cpu: Processor, value: int) -> None:
        if not valid(value):
            raise _refused()
        getattr(cpu.state, name)[i] = value

    return Msr(lambda cpu: int(getattr(cpu.state, name)[i]), write)


def _constant(value: int, writable: bool = False) -> Msr:
    """Reads as ``value``; a write is ignored if ``writable``, else #GP(0)."""

    def write(cpu: Processor, value: int) -> None:
        if not writable:
            raise _refused()

    return Msr(lambda cpu: value, write)


def _canonical(value: int) -> bool:
    return value >> 47 in (0, 0x1FFFF)


# -- registers with rules of their own --------------------------------------------------------


def _write_efer(cpu: Processor, value: int) -> None:
    state = cpu.state
    if value & ~(EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE):
        raise _refused()
    if (value ^ state.efer) & EFER_LME and state.cr0 & _CR0_PG:
        raise _refused()
    state.efer = value & ~EFER_LMA | state.efer & EFER_LMA
    cpu.mmu.flush()
    cpu.mode_changed()


def _base(segment: int) -> Msr:
    return _item("seg_base", segment, _canonical)


def tsc(cpu: Processor) -> int:
    """The guest's time-stamp counter: 1 tick is 1 ns of guest time."""
    return int(cpu.clock.now() + cpu.state.tsc_offset) & _MASK64


def _move_tsc(cpu: Processor, delta: int) -> None:
    state = cpu.state
    state.tsc_offset = state.tsc_offset + delta
    state.tsc_adjust = state.tsc_adjust + delta & _MASK64


def _read_apic_base(cpu: Processor) -> int:
    if cpu.apic is None:
        raise _refused()
    return cpu.apic.apicbase


def _write_apic_base(cpu: Processor, value: int) -> None:
    if cpu.apic is None:
        raise _refused()
    try:
        cpu.apic.set_base(value)
    except ValueError:
        raise _refused() from None


def _all_or_nothing(value: int) -> bool:
    return value in (0, _MASK64)


def _bank_control(value: int) -> bool:
    """MCi_CTL: all or nothing; kernels for this family clear bit 10 of bank 4, whose GART walks raise false errors."""
    return _all_or_nothing(value | 1 << 10 if value else 0)


def _pat(value: int) -> bool:
    return all(value >> 8 * i & 0xFF in (0, 1, 4, 5, 6, 7) for i in range(8))


def _write_pat(cpu: Processor, value: int) -> None:
    if not _pat(value):
        raise _refused()
    cpu.state.pat = value


def _fixed_range(value: int) -> bool:
    return all(value >> 8 * i & 0xFF in _MEMORY_TYPES for i in range(8))


def _mtrr_base(value: int) -> bool:
    return not value & ~(_PHYSICAL & ~0xFFF | 0xFF) and value & 0xFF in _MEMORY_TYPES


def _mtrr_mask(value: int) -> bool:
    return not value & ~(_PHYSICAL & ~0x7FF)


def _write_mtrr_default(cpu: Processor, value: int) -> None:
    if value & ~0xCFF or value & 0xFF not in _MEMORY_TYPES:
        raise _refused()
    cpu.state.mtrr_deftype = value


def _write_mcg_ctl(cpu: Processor, value: int) -> None:
    if not _all_or_nothing(value):
        raise _refused()
    cpu.state.mcg_ctl = value


MSRS: dict[int, Msr] = {
    0x10: Msr(tsc, lambda cpu, value: _move_tsc(cpu, value - tsc(cpu))),
    0x1B: Msr(_read_apic_base, _write_apic_base),
    0x3B: Msr(lambda cpu: int(cpu.state.tsc_adjust), lambda cpu, value: _move_tsc(cpu, value - cpu.state.tsc_adjust)),
    0x8B: _constant(UCODE_REVISION, writable=True),
    0xFE: _constant(MTRR_CAPABILITIES),
    0x174: _field("sysenter_cs", 0xFFFFFFFF),
    0x175: _field("sysenter_esp", canonical=True),
    0x176: _field("sysenter_eip", canonical=True),
    0x179: Msr(lambda cpu: int(cpu.state.mcg_cap), _constant(0).write),
    0x17A: _field("mcg_status", 7),
    0x17B: Msr(lambda cpu: int(cpu.state.mcg_ctl), _write_mcg_ctl),
    0x198: _constant(1000 | 4 << 40),  # PERF_STATUS: the multiplier that QEMU shows
    0x1A0: _field("misc_enable"),
    0x1D9: _constant(0, writable=True),  # DEBUGCTL: no branch records
    **{0x200 + 2 * i: _item("mtrr_base", i, _mtrr_base) for i in range(8)},
    **{0x201 + 2 * i: _item("mtrr_mask", i, _mtrr_mask) for i in range(8)},
    **{
        index: _item("mtrr_fixed", i, _fixed_range)
        for i, index in enumerate((0x250, 0x258, 0x259, 0x268, 0x269, 0x26A, 0x26B, 0x26C, 0x26D, 0x26E, 0x26F))
    },
    0x277: Msr(lambda cpu: int(cpu.state.pat), _write_pat),
    0x2FF: Msr(lambda cpu: int(cpu.state.mtrr_deftype), _write_mtrr_default),
    **{0x400 + i: _item("mce_banks", i, _bank_control if i % 4 == 0 else lambda value: True) for i in range(40)},
    0xC0000080: Msr(lambda cpu: int(cpu.state.efer), _write_efer),
    0xC0000081: _field("star"),
    0xC0000082: _field("lstar", canonical=True),
    0xC0000083: _field("cstar", canonical=True),
    0xC0000084: _field("fmask", 0xFFFFFFFF),
    0xC0000100: _base(FS),
    0xC0000101: _base(GS),
    0xC0000102: _field("kernelgsbase", canonical=True),
    0xC0000103: _field("tsc_aux", 0xFFFFFFFF),
    # AMD's performance counters, SYSCFG, HWCR, INTPEND and DE_CFG: QEMU reads 0 and ignores writes, Linux asks.
    **{index: _constant(0, writable=True) for index in (*range(0xC0010000, 0xC0010008), 0xC0010010, 0xC0010015)},
    0xC0010055: _constant(0, writable=True),
    0xC0010117: _field("vm_hsave", _PHYSICAL & ~0xFFF),
    0xC0011029: _constant(0, writable=True),
}
"""MSR index -> register."""
