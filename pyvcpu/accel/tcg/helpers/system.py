"""System instructions: descriptor-table registers, control and debug registers, HLT, fast system calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from iced_x86 import Code, Mnemonic, Register

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import MASK
from pyvcpu.accel.tcg.frames import is_canonical
from pyvcpu.accel.tcg.helpers import helper
from pyvcpu.accel.tcg.helpers.operands import effective_address, read_operand, require_cpl0, unsupported, write_operand
from pyvcpu.accel.tcg.mmu import PHYSICAL_BITS
from pyvcpu.cpu import segments
from pyvcpu.cpu.events import GP, UD, GuestException
from pyvcpu.cpu.layout import CS, GS, MP_HALTED, R11, RCX, RDX, RSP, SS
from pyvcpu.cpu.msr import EFER_LMA, EFER_LME, EFER_SCE

if TYPE_CHECKING:
    from pyvcpu.accel.tcg.decode import Insn
    from pyvcpu.accel.tcg.engine import TcgEngine

CR0_PE, CR0_TS, CR0_ET, CR0_NW, CR0_CD, CR0_PG = 1, 1 << 3, 1 << 4, 1 << 29, 1 << 30, 1 << 31
CR0_BITS = 0xE005003F
CR4_PAE = 1 << 5
CR4_DE = 1 << 3
CR4_BITS = 0x7FC
"""TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT: CPUID shows no VME and nothing newer."""

DR6_FIXED, DR6_WRITABLE = 0xFFFF0FF0, 0xE00F
DR7_FIXED, DR7_WRITABLE = 0x400, 0xFFFF23FF
DR7_ENABLE, DR7_GD = 0xFF, 1 << 13


# -- descriptor-table registers ---------------------------------------------------------------


@helper(Mnemonic.LGDT, Mnemonic.LIDT)
def load_table(e: TcgEngine, insn: Insn) -> int | None:
    """Limit, then a base of 24 bits (16-bit operand), 32 bits or, in 64-bit code, 64 bits."""
    require_cpl0(e)
    wide = insn.bits == 64
    raw = int.from_bytes(e.mmu.read_bytes(effective_address(e, insn), 10 if wide else 6), "little")
    limit, base = raw & 0xFFFF, raw >> 16
    if insn.iced.code in (Code.LGDT_M1632_16, Code.LIDT_M1632_16):
        base &= 0xFFFFFF
    if wide and not is_canonical(base):
        raise GuestException(GP, 0)
    if insn.mnemonic == Mnemonic.LGDT:
        e.state.gdt_base, e.state.gdt_limit = base, limit
    else:
        e.state.idt_base, e.state.idt_limit = base, limit
    return None


@helper(Mnemonic.SGDT, Mnemonic.SIDT)
def store_table(e: TcgEngine, insn: Insn) -> int | None:
    state = e.state
    if insn.mnemonic == Mnemonic.SGDT:
        base, limit = state.gdt_base, state.gdt_limit
    else:
        base, limit = state.idt_base, state.idt_limit
    size = 8 if insn.bits == 64 else 4
    data = (limit & 0xFFFF | (base & MASK[8 * size]) << 16).to_bytes(size + 2, "little")
    e.mmu.write_bytes(effective_address(e, insn), data)
    return None


# -- control registers ------------------------------------------------------------------------


@helper(Mnemonic.SMSW)
def smsw(e: TcgEngine, insn: Insn) -> int | None:
    write_operand(e, insn, 0, e.state.cr0)
    return None


@helper(Mnemonic.LMSW)
def lmsw(e: TcgEngine, insn: Insn) -> int | None:
    """PE, MP, EM and TS; PE can be set but not cleared."""
    require_cpl0(e)
    write_cr0(e, e.state.cr0 & ~0xE | read_operand(e, insn, 0) & 0xF)
    return None


@helper(Mnemonic.CLTS)
def clts(e: TcgEngine, insn: Insn) -> int | None:
    require_cpl0(e)
    e.state.cr0 &= ~CR0_TS
    return None


def move_control(e: TcgEngine, insn: Insn) -> int | None:
    """MOV to or from CR0, CR2, CR3, CR4, CR8."""
    iced = insn.iced
    loading = Register.CR0 <= iced.op0_register <= Register.CR15
    number = (iced.op0_register if loading else iced.op1_register) - Register.CR0
    if number not in _READ:
        raise GuestException(UD)
    require_cpl0(e)
    if loading:
        _WRITE[number](e, read_operand(e, insn, 1))
    else:
        write_operand(e, insn, 0, _READ[number](e))
    return None


def write_cr0(e: TcgEngine, value: int) -> None:
    """SDM 3A 2.5 and, for what starts and ends IA-32e mode, 10.8.5."""
    state = e.state
    if value >> 32 or (value & CR0_PG and not value & CR0_PE) or (value & CR0_NW and not value & CR0_CD):
        raise GuestException(GP, 0)
    efer = state.efer & ~EFER_LMA
    paging = value & CR0_PG
    if paging and efer & EFER_LME:
        starting = not state.cr0 & CR0_PG
        if not state.cr4 & CR4_PAE or (starting and state.seg_flags[CS] & segments.L):
            raise GuestException(GP, 0)
        efer |= EFER_LMA
    elif not paging and e.mode.bits == 64:
        raise GuestException(GP, 0)
    state.cr0 = value & CR0_BITS | CR0_ET
    state.efer = efer
    e.mmu.flush()
    e.mode_changed()


def _write_cr2(e: TcgEngine, value: int) -> None:
    e.state.cr2 = value


def _write_cr3(e: TcgEngine, value: int) -> None:
    if value >> PHYSICAL_BITS:
        raise GuestException(GP, 0)
    e.state.cr3 = value
    e.mmu.flush()


def _write_cr4(e: TcgEngine, value: int) -> None:
    if value & ~CR4_BITS or (e.state.efer & EFER_LMA and not value & CR4_PAE):
        raise GuestException(GP, 0)
    e.state.cr4 = value
    e.mmu.flush()
    e.mode_changed()


def _write_cr8(e: TcgEngine, value: int) -> None:
    if value >> 4:
        raise GuestException(GP, 0)
    if e.apic is not None:
        e.apic.set_cr8(value)


def _read_cr8(e: TcgEngine) -> int:
    return e.apic.get_cr8() if e.apic is not None else 0


_READ: dict[int, Callable[[TcgEngine], int]] = {
    0: lambda e: e.state.cr0, 2: lambda e: e.state.cr2, 3: lambda e: e.state.cr3, 4: lambda e: e.state.cr4,
    8: _read_cr8,
}  # fmt: skip
_WRITE: dict[int, Callable[[TcgEngine, int], None]] = {
    0: write_cr0,
    2: _write_cr2,
    3: _write_cr3,
    4: _write_cr4,
    8: _write_cr8,
}


# -- debug registers --------------------------------------------------------------------------


def move_debug(e: TcgEngine, insn: Insn) -> int | None:
    """MOV to or from a debug register; hardware breakpoints themselves are not there."""
    iced, state = insn.iced, e.state
    loading = Register.DR0 <= iced.op0_register <= Register.DR15
    number = (iced.op0_register if loading else iced.op1_register) - Register.DR0
    if number > 7 or (number in (4, 5) and state.cr4 & CR4_DE):
        raise GuestException(UD)
    if number in (4, 5):
        number += 2
    require_cpl0(e)
    if not loading:
        write_operand(e, insn, 0, state.dr[number])
        return None
    value = read_operand(e, insn, 1)
    if number >= 6 and value >> 32:
        raise GuestException(GP, 0)
    if number == 7:
        if value & (DR7_ENABLE | DR7_GD):
            unsupported(e, insn, f"hardware breakpoints are not there yet (DR7 = {value:#x})")
        value = value & DR7_WRITABLE | DR7_FIXED
    elif number == 6:
        value = value & DR6_WRITABLE | DR6_FIXED
    state.dr[number] = value
    return None


# -- caches, translations, halt ---------------------------------------------------------------


@helper(Mnemonic.INVLPG)
def invlpg(e: TcgEngine, insn: Insn) -> int | None:
    require_cpl0(e)
    e.mmu.invlpg(effective_address(e, insn))
    return None


@helper(Mnemonic.INVD, Mnemonic.WBINVD)
def cache_flush(e: TcgEngine, insn: Insn) -> int | None:
    """There is no cache between the processor and memory."""
    require_cpl0(e)
    return None


@helper(Mnemonic.CLFLUSH)
def clflush(e: TcgEngine, insn: Insn) -> int | None:
    """Nothing to flush, but it faults as a load of one byte does."""
    e.mmu.read_bytes(effective_address(e, insn), 1)
    return None


@helper(Mnemonic.HLT)
def hlt(e: TcgEngine, insn: Insn) -> int | None:
    require_cpl0(e)
    e.state.mp_state = MP_HALTED
    return None


@helper(
    Mnemonic.UD0, Mnemonic.UD1, Mnemonic.UD2, Mnemonic.MONITOR, Mnemonic.MWAIT, Mnemonic.RSM, Mnemonic.VMCALL,
    Mnemonic.VMMCALL, Mnemonic.VMRUN, Mnemonic.XGETBV, Mnemonic.XSETBV, Mnemonic.RDRAND, Mnemonic.RDSEED,
    Mnemonic.RDFSBASE, Mnemonic.RDGSBASE, Mnemonic.WRFSBASE, Mnemonic.WRGSBASE, Mnemonic.STAC, Mnemonic.CLAC,
    Mnemonic.RDPID, Mnemonic.INVPCID,
)  # fmt: skip
def undefined(e: TcgEngine, insn: Insn) -> int | None:
    """Undefined on purpose, or part of a feature that CPUID does not show."""
    raise GuestException(UD)


# -- fast system calls ------------------------------------------------------------------------

_CODE64 = 0x00A09B00  # G L P S, readable, accessed
_CODE32 = 0x00C09B00
_DATA = 0x00C09300
_DPL3 = 3 << segments.DPL_SHIFT
_FLAT = 0xFFFFFFFF
_SYSRET_FLAGS = 0x3C7FD7


def _flat_segments(e: TcgEngine, code: int, code_flags: int, stack: int, level: int = 0) -> None:
    """Fixed descriptors: these instructions do not look into the GDT."""
    segments.set_segment(e.state, CS, code & 0xFFFF, 0, _FLAT, code_flags | level)
    segments.set_segment(e.state, SS, stack & 0xFFFF, 0, _FLAT, _DATA | level)
    e.mode_changed()


def _arrive(e: TcgEngine, rip: int) -> int:
    """SYSCALL and SYSRET trap by the TF that they leave, not by the one that they found: the kernel's entry
    is not stepped into where FMASK has TF, and user code is stepped as if its SYSCALL had just ended."""
    e.state.rip = rip
    if e.state.rflags & flags.TF:
        e.single_step_trap()
    return int(e.state.rip)


@helper(Mnemonic.SYSCALL)
def syscall(e: TcgEngine, insn: Insn) -> int | None:
    """AMD's rules, since CPUID says AMD: also in compatibility and in legacy protected mode (APM 3)."""
    state = e.state
    if not state.efer & EFER_SCE or not state.cr0 & CR0_PE:
        raise GuestException(UD)
    rflags = e.get_rflags()
    selector = state.star >> 32 & 0xFFFC
    if not state.efer & EFER_LMA:
        state.regs[RCX] = insn.next_ip & MASK[32]
        e.set_rflags(rflags & ~(flags.VM | flags.IF | flags.RF))
        _flat_segments(e, selector, _CODE32, selector + 8)
        return _arrive(e, state.star & MASK[32])
    target = state.lstar if e.mode.bits == 64 else state.cstar
    state.regs[RCX] = insn.next_ip
    state.regs[R11] = rflags & ~flags.RF
    e.set_rflags(rflags & ~(state.fmask | flags.RF))
    _flat_segments(e, selector, _CODE64, selector + 8)
    return _arrive(e, target)


@helper(Mnemonic.SYSRET, Mnemonic.SYSRETQ)
def sysret(e: TcgEngine, insn: Insn) -> int | None:
    """AMD's rules: a return address that is not canonical faults when it is fetched from."""
    state = e.state
    if not state.efer & EFER_SCE:
        raise GuestException(UD)
    if not state.cr0 & CR0_PE or e.cpl:
        raise GuestException(GP, 0)
    selector = state.star >> 48
    if not state.efer & EFER_LMA:
        e.set_rflags(e.get_rflags() | flags.IF)
        _flat_segments(e, selector | 3, _CODE32, (selector + 8) | 3, _DPL3)
        return _arrive(e, state.regs[RCX] & MASK[32])
    e.set_rflags(state.regs[R11] & _SYSRET_FLAGS)
    if insn.mnemonic == Mnemonic.SYSRETQ:
        _flat_segments(e, (selector + 16) | 3, _CODE64, (selector + 8) | 3, _DPL3)
        return _arrive(e, state.regs[RCX])
    _flat_segments(e, selector | 3, _CODE32, (selector + 8) | 3, _DPL3)
    return _arrive(e, state.regs[RCX] & MASK[32])


@helper(Mnemonic.SYSENTER)
def sysenter(e: TcgEngine, insn: Insn) -> int | None:
    """On AMD's processors only in legacy mode."""
    state = e.state
    if state.efer & EFER_LMA:
        raise GuestException(UD)
    if not state.cr0 & CR0_PE or not state.sysenter_cs & 0xFFFC:
        raise GuestException(GP, 0)
    selector = state.sysenter_cs & 0xFFFC
    e.set_rflags(e.get_rflags() & ~(flags.VM | flags.IF | flags.RF))
    state.regs[RSP] = state.sysenter_esp & MASK[32]
    _flat_segments(e, selector, _CODE32, selector + 8)
    return int(state.sysenter_eip & MASK[32])


@helper(Mnemonic.SYSEXIT, Mnemonic.SYSEXITQ)
def sysexit(e: TcgEngine, insn: Insn) -> int | None:
    state = e.state
    if state.efer & EFER_LMA:
        raise GuestException(UD)
    if not state.cr0 & CR0_PE or e.cpl or not state.sysenter_cs & 0xFFFC:
        raise GuestException(GP, 0)
    selector = state.sysenter_cs & 0xFFFC
    state.regs[RSP] = state.regs[RCX] & MASK[32]
    _flat_segments(e, (selector + 16) | 3, _CODE32, (selector + 24) | 3, _DPL3)
    return int(state.regs[RDX] & MASK[32])


@helper(Mnemonic.SWAPGS)
def swapgs(e: TcgEngine, insn: Insn) -> int | None:
    if e.mode.bits != 64:
        raise GuestException(UD)
    require_cpl0(e)
    state = e.state
    state.seg_base[GS], state.kernelgsbase = state.kernelgsbase, state.seg_base[GS]
    return None
