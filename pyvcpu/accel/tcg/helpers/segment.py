"""Segment registers: MOV, PUSH, POP, LDS and its kin, LDTR and TR, and the checks of each load (SDM 3A 5.4 to 5.6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Mnemonic, OpKind, Register

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import MASK, REGISTERS, SEGMENTS
from pyvcpu.accel.tcg.frames import linear, stack_pointer
from pyvcpu.accel.tcg.helpers import helper
from pyvcpu.accel.tcg.helpers.operands import (
    memory_offset,
    operand_size,
    pop_values,
    push_values,
    read_operand,
    require_cpl0,
    unsupported,
    write_operand,
    write_register,
)
from pyvcpu.cpu import segments
from pyvcpu.cpu.events import GP, NP, UD, GuestException
from pyvcpu.cpu.events import SS as STACK_FAULT
from pyvcpu.cpu.layout import CS, DS, ES, FS, GS, LDTR, SS, TR
from pyvcpu.cpu.segments import Descriptor

if TYPE_CHECKING:
    from pyvcpu.accel.tcg.decode import Insn
    from pyvcpu.accel.tcg.engine import TcgEngine

EFER_LMA = 1 << 10


def is_protected(e: TcgEngine) -> bool:
    """Protected or IA-32e mode; virtual-8086 mode says that it is missing."""
    return bool(e.state.cr0 & 1)


def refuse_v86(e: TcgEngine, insn: Insn) -> None:
    if e.state.cr0 & 1 and e.state.rflags & flags.VM:
        unsupported(e, insn, "virtual-8086 mode is not there yet")


# -- ES, SS, DS, FS, GS -----------------------------------------------------------------------


def load_segment(e: TcgEngine, segment: int, selector: int) -> None:
    """Load a data or stack segment register with every check; the caller commits nothing before."""
    state = e.state
    selector &= 0xFFFF
    if not is_protected(e):
        segments.load_real(state, segment, selector)
    elif not selector & 0xFFFC:
        if segment == SS and (e.mode.bits != 64 or e.cpl == 3 or selector & 3 != e.cpl):
            raise GuestException(GP, 0)
        segments.load_null(state, segment, selector, e.cpl if segment == SS else 0)
    else:
        descriptor = segments.fetch(state, e.mmu, selector)
        (_check_stack if segment == SS else _check_data)(e, selector, descriptor)
        descriptor = segments.mark_accessed(e.mmu, descriptor)
        segments.load_descriptor(state, segment, selector, descriptor)
    if segment in (ES, SS, DS):
        e.mode_changed()


def _check_stack(e: TcgEngine, selector: int, descriptor: Descriptor) -> None:
    if selector & 3 != e.cpl:
        raise GuestException(GP, selector & 0xFFFC)
    check_stack_descriptor(selector, descriptor, e.cpl)


def check_stack_descriptor(selector: int, descriptor: Descriptor, cpl: int) -> None:
    """Writable data whose DPL is ``cpl``, and present."""
    wanted = segments.S | segments.WRITABLE
    if descriptor.high & (wanted | segments.CODE) != wanted or descriptor.dpl != cpl:
        raise GuestException(GP, selector & 0xFFFC)
    if not descriptor.present:
        raise GuestException(STACK_FAULT, selector & 0xFFFC)


def _check_data(e: TcgEngine, selector: int, descriptor: Descriptor) -> None:
    error = selector & 0xFFFC
    readable = not descriptor.high & segments.CODE or descriptor.high & segments.READABLE
    if not descriptor.high & segments.S or not readable:
        raise GuestException(GP, error)
    conforming = descriptor.is_code and descriptor.is_conforming
    if not conforming and max(selector & 3, e.cpl) > descriptor.dpl:
        raise GuestException(GP, error)
    if not descriptor.present:
        raise GuestException(NP, error)


def drop_privileged(e: TcgEngine, cpl: int) -> None:
    """After a return to an outer level: data segments that it may not use become null (SDM 2A, RET).

    Bases stay, as on processors: in 64-bit mode those of FS and GS are in use without a selector.
    """
    state = e.state
    for segment in (ES, DS, FS, GS):
        high = state.seg_flags[segment]
        conforming = high & (segments.CODE | segments.CONFORMING) == segments.CODE | segments.CONFORMING
        if state.seg_selector[segment] & 0xFFFC and not conforming and high >> segments.DPL_SHIFT & 3 < cpl:
            state.seg_selector[segment] = 0
            state.seg_flags[segment] = high & ~segments.P


def move_segment(e: TcgEngine, insn: Insn) -> int | None:
    """MOV to or from a segment register."""
    iced = insn.iced
    if iced.op0_kind == OpKind.REGISTER and iced.op0_register in SEGMENTS:
        segment = SEGMENTS[iced.op0_register]
        if segment == CS:
            raise GuestException(UD)
        load_segment(e, segment, read_operand(e, insn, 1))
        if segment == SS:
            e.state.interrupt_shadow = 1
    else:
        write_operand(e, insn, 0, e.state.seg_selector[SEGMENTS[iced.op1_register]])
    return None


def push_segment(e: TcgEngine, insn: Insn) -> int | None:
    push_values(e, -insn.iced.stack_pointer_increment, [e.state.seg_selector[SEGMENTS[insn.iced.op0_register]]])
    return None


def pop_segment(e: TcgEngine, insn: Insn) -> int | None:
    segment = SEGMENTS[insn.iced.op0_register]
    size = insn.iced.stack_pointer_increment
    (selector,) = pop_values(e, size, 1)
    new = stack_pointer(e) + size
    width = e.mode.stack
    load_segment(e, segment, selector)
    if segment == SS:
        e.state.interrupt_shadow = 1
    write_register(e, REGISTERS[{16: Register.SP, 32: Register.ESP, 64: Register.RSP}[width]], new)
    return None


_LOADED = {
    Mnemonic.LDS: DS, Mnemonic.LES: ES, Mnemonic.LSS: SS, Mnemonic.LFS: FS, Mnemonic.LGS: GS,
}  # fmt: skip


@helper(*_LOADED)
def load_far_pointer(e: TcgEngine, insn: Insn) -> int | None:
    offset, selector = read_far_pointer(e, insn, operand_size(insn, 0))
    load_segment(e, _LOADED[insn.mnemonic], selector)
    write_operand(e, insn, 0, offset)
    return None


def read_far_pointer(e: TcgEngine, insn: Insn, size: int) -> tuple[int, int]:
    """(offset, selector) of the memory operand m16:16, m16:32 or m16:64."""
    at = linear(e, SEGMENTS[insn.iced.memory_segment], memory_offset(e, insn))
    raw = int.from_bytes(e.mmu.read_bytes(at, size + 2), "little")
    return raw & MASK[8 * size], raw >> 8 * size


# -- LDTR and TR ------------------------------------------------------------------------------


def _require_protected(e: TcgEngine) -> None:
    if not is_protected(e) or e.state.rflags & flags.VM:
        raise GuestException(UD)


def _system_descriptor(e: TcgEngine, selector: int, types: tuple[int, ...]) -> tuple[Descriptor, int]:
    """A system descriptor of the GDT and its base; in IA-32e mode it has 16 bytes."""
    error = selector & 0xFFFC
    long = bool(e.state.efer & EFER_LMA)
    if selector & 4 or (selector & 0xFFF8) + (15 if long else 7) > e.state.gdt_limit:
        raise GuestException(GP, error)
    descriptor = segments.fetch(e.state, e.mmu, selector)
    upper = e.mmu.read(descriptor.address + 8, 8, True) if long else 0
    if descriptor.high & segments.S or descriptor.type not in types or upper >> 32 & 0x1F00:
        raise GuestException(GP, error)
    if not descriptor.present:
        raise GuestException(NP, error)
    return descriptor, descriptor.base | (upper & 0xFFFFFFFF) << 32


@helper(Mnemonic.LLDT)
def lldt(e: TcgEngine, insn: Insn) -> int | None:
    _require_protected(e)
    require_cpl0(e)
    selector = read_operand(e, insn, 0) & 0xFFFF
    if not selector & 0xFFFC:
        segments.load_null(e.state, LDTR, selector)
        return None
    descriptor, base = _system_descriptor(e, selector, (segments.LDT,))
    segments.set_segment(e.state, LDTR, selector, base, descriptor.limit, descriptor.flags)
    return None


@helper(Mnemonic.LTR)
def ltr(e: TcgEngine, insn: Insn) -> int | None:
    """The TSS becomes busy, in the table and in TR."""
    _require_protected(e)
    require_cpl0(e)
    selector = read_operand(e, insn, 0) & 0xFFFF
    if not selector & 0xFFFC:
        raise GuestException(GP, 0)
    types = (segments.TSS32,) if e.state.efer & EFER_LMA else (segments.TSS16, segments.TSS32)
    descriptor, base = _system_descriptor(e, selector, types)
    busy = descriptor.flags | segments.BUSY
    e.mmu.write(descriptor.address + 5, 1, busy >> 8 & 0xFF, True)
    segments.set_segment(e.state, TR, selector, base, descriptor.limit, busy)
    return None


@helper(Mnemonic.SLDT, Mnemonic.STR)
def store_selector(e: TcgEngine, insn: Insn) -> int | None:
    _require_protected(e)
    segment = LDTR if insn.mnemonic == Mnemonic.SLDT else TR
    write_operand(e, insn, 0, e.state.seg_selector[segment])
    return None


# -- questions about descriptors --------------------------------------------------------------

_LAR_TYPES = {
    False: frozenset({1, 2, 3, 4, 5, 9, 11, 12}),
    True: frozenset({2, 9, 11, 12}),
}
_LSL_TYPES = {
    False: frozenset({1, 2, 3, 9, 11}),
    True: frozenset({2, 9, 11}),
}


def _visible(e: TcgEngine, selector: int, system_types: frozenset[int]) -> Descriptor | None:
    """The descriptor, if LAR and LSL may see it."""
    if not selector & 0xFFFC:
        return None
    try:
        descriptor = segments.fetch(e.state, e.mmu, selector)
    except GuestException as exception:
        if exception.vector == GP:
            return None
        raise
    if not descriptor.high & segments.S:
        if descriptor.type not in system_types:
            return None
    elif descriptor.is_code and descriptor.is_conforming:
        return descriptor
    return descriptor if max(selector & 3, e.cpl) <= descriptor.dpl else None


def _set_zf(e: TcgEngine, value: bool) -> None:
    e.set_rflags(e.get_rflags() & ~flags.ZF | (flags.ZF if value else 0))


@helper(Mnemonic.LAR, Mnemonic.LSL)
def load_access_rights_or_limit(e: TcgEngine, insn: Insn) -> int | None:
    _require_protected(e)
    long = bool(e.state.efer & EFER_LMA)
    rights = insn.mnemonic == Mnemonic.LAR
    selector = _selector_operand(e, insn, 1)
    descriptor = _visible(e, selector, (_LAR_TYPES if rights else _LSL_TYPES)[long])
    if descriptor is not None:
        write_operand(e, insn, 0, descriptor.high & 0xF0FF00 if rights else descriptor.limit)
    _set_zf(e, descriptor is not None)
    return None


@helper(Mnemonic.VERR, Mnemonic.VERW)
def verify_access(e: TcgEngine, insn: Insn) -> int | None:
    _require_protected(e)
    descriptor = _visible(e, _selector_operand(e, insn, 0), frozenset())
    if descriptor is None:
        good = False
    elif insn.mnemonic == Mnemonic.VERR:
        good = not descriptor.is_code or bool(descriptor.high & segments.READABLE)
    else:
        good = not descriptor.is_code and bool(descriptor.high & segments.WRITABLE)
    _set_zf(e, good)
    return None


def _selector_operand(e: TcgEngine, insn: Insn, i: int) -> int:
    """A selector in a register or in 16 bits of memory, whatever the operand size."""
    if insn.iced.op_kind(i) == OpKind.REGISTER:
        return read_operand(e, insn, i) & 0xFFFF
    return e.mmu.read(linear(e, SEGMENTS[insn.iced.memory_segment], memory_offset(e, insn)), 2)


@helper(Mnemonic.ARPL)
def arpl(e: TcgEngine, insn: Insn) -> int | None:
    """Raise the RPL of the destination to the source's; ZF says whether it changed."""
    _require_protected(e)
    selector, wanted = read_operand(e, insn, 0) & 0xFFFF, read_operand(e, insn, 1) & 3
    raised = selector & 3 < wanted
    if raised:
        if insn.iced.op0_kind == OpKind.REGISTER:
            register = REGISTERS[insn.iced.op0_register]
            write_register(e, register._replace(width=16), selector & ~3 | wanted)
        else:
            write_operand(e, insn, 0, selector & ~3 | wanted)
    _set_zf(e, raised)
    return None
