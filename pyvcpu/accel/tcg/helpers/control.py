"""Far control flow: JMP, CALL, RET and IRET between segments, and software interrupts (SDM 3A 5.8, 2A/2B)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Mnemonic, OpKind

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import MASK
from pyvcpu.accel.tcg.frames import is_canonical, stack_pointer
from pyvcpu.accel.tcg.helpers import helper
from pyvcpu.accel.tcg.helpers.operands import operand_size, pop_values, push_values, set_stack_pointer, unsupported
from pyvcpu.accel.tcg.helpers.segment import (
    EFER_LMA,
    check_stack_descriptor,
    drop_privileged,
    is_protected,
    read_far_pointer,
    refuse_v86,
)
from pyvcpu.accel.tcg.interrupts import software_interrupt
from pyvcpu.cpu import events, segments
from pyvcpu.cpu.events import GP, NP, GuestException
from pyvcpu.cpu.layout import CS, SS
from pyvcpu.cpu.segments import Descriptor

if TYPE_CHECKING:
    from pyvcpu.accel.tcg.decode import Insn
    from pyvcpu.accel.tcg.engine import TcgEngine


# -- JMP and CALL -----------------------------------------------------------------------------


def _far_target(e: TcgEngine, insn: Insn) -> tuple[int, int, int]:
    """(selector, offset, operand size in bytes) of a far JMP or CALL."""
    iced = insn.iced
    if iced.op0_kind == OpKind.FAR_BRANCH16:
        return iced.far_branch_selector, iced.far_branch16, 2
    if iced.op0_kind == OpKind.FAR_BRANCH32:
        return iced.far_branch_selector, iced.far_branch32, 4
    size = operand_size(insn, 0) - 2
    offset, selector = read_far_pointer(e, insn, size)
    return selector, offset, size


def _check_rip(e: TcgEngine, rip: int, code: Descriptor) -> None:
    """#GP(0) for a target outside of the segment, or not canonical in 64-bit code."""
    if e.state.efer & EFER_LMA and code.high & segments.L:
        if not is_canonical(rip):
            raise GuestException(GP, 0)
    elif rip > code.limit:
        raise GuestException(GP, 0)


def _jump_descriptor(e: TcgEngine, insn: Insn, selector: int) -> Descriptor:
    """The code segment of a far JMP or CALL at the same privilege level."""
    if not selector & 0xFFFC:
        raise GuestException(GP, 0)
    error = selector & 0xFFFC
    code = segments.fetch(e.state, e.mmu, selector)
    if not code.high & segments.S:
        _refuse_system(e, insn, code, error)
    if not code.is_code or (e.state.efer & EFER_LMA and code.high & segments.L and code.high & segments.DB):
        raise GuestException(GP, error)
    if code.is_conforming:
        allowed = code.dpl <= e.cpl
    else:
        allowed = selector & 3 <= e.cpl and code.dpl == e.cpl
    if not allowed:
        raise GuestException(GP, error)
    if not code.present:
        raise GuestException(NP, error)
    return code


def _refuse_system(e: TcgEngine, insn: Insn, descriptor: Descriptor, error: int) -> None:
    long = bool(e.state.efer & EFER_LMA)
    if descriptor.type == segments.CALL32 or (descriptor.type == segments.CALL16 and not long):
        unsupported(e, insn, "call gates are not there yet")
    tasks = (segments.TSS16, segments.TSS16_BUSY, segments.TASK_GATE, segments.TSS32, segments.TSS32_BUSY)
    if descriptor.type in tasks and not long:
        unsupported(e, insn, "task switches are not there yet")
    raise GuestException(GP, error)


def _enter_code(e: TcgEngine, selector: int, code: Descriptor, rip: int) -> int:
    """Load CS from a checked descriptor; cannot fault once the descriptor's page is writable."""
    code = segments.mark_accessed(e.mmu, code)
    segments.load_descriptor(e.state, CS, selector, code)
    e.mode_changed()
    return rip


def _jump(e: TcgEngine, insn: Insn, back: int | None) -> int:
    refuse_v86(e, insn)
    state = e.state
    selector, rip, size = _far_target(e, insn)
    if not is_protected(e):
        if rip > state.seg_limit[CS]:
            raise GuestException(GP, 0)
        if back is not None:
            push_values(e, size, [state.seg_selector[CS], back])
        segments.load_real(state, CS, selector)
        e.mode_changed()
        return rip
    code = _jump_descriptor(e, insn, selector)
    _check_rip(e, rip, code)
    code = segments.mark_accessed(e.mmu, code)
    if back is not None:
        push_values(e, size, [state.seg_selector[CS], back])
    return _enter_code(e, selector & 0xFFFC | e.cpl, code, rip)


@helper(Mnemonic.JMP)
def jmp(e: TcgEngine, insn: Insn) -> int | None:
    return _jump(e, insn, None)


@helper(Mnemonic.CALL)
def call(e: TcgEngine, insn: Insn) -> int | None:
    return _jump(e, insn, insn.next_ip)


# -- RET and IRET -----------------------------------------------------------------------------


def _return_descriptor(e: TcgEngine, selector: int) -> Descriptor:
    """The code segment that a far return goes to, at RPL, which is not more privileged than CPL."""
    if not selector & 0xFFFC:
        raise GuestException(GP, 0)
    error = selector & 0xFFFC
    rpl = selector & 3
    code = segments.fetch(e.state, e.mmu, selector)
    if not code.is_code or rpl < e.cpl:
        raise GuestException(GP, error)
    if code.dpl > rpl if code.is_conforming else code.dpl != rpl:
        raise GuestException(GP, error)
    if e.state.efer & EFER_LMA and code.high & segments.L and code.high & segments.DB:
        raise GuestException(GP, error)
    if not code.present:
        raise GuestException(NP, error)
    return code


def _return_stack(e: TcgEngine, selector: int, cpl: int, code: Descriptor) -> Descriptor | None:
    """The stack segment that is returned to; None for the null selector that 64-bit code may have."""
    if not selector & 0xFFFC:
        if e.state.efer & EFER_LMA and code.high & segments.L and cpl != 3 and selector & 3 == cpl:
            return None
        raise GuestException(GP, 0)
    stack = segments.fetch(e.state, e.mmu, selector)
    if selector & 3 != cpl:
        raise GuestException(GP, selector & 0xFFFC)
    check_stack_descriptor(selector, stack, cpl)
    return stack


def _load_stack(e: TcgEngine, selector: int, stack: Descriptor | None, cpl: int) -> None:
    if stack is None:
        segments.load_null(e.state, SS, selector, cpl)
    else:
        segments.load_descriptor(e.state, SS, selector, segments.mark_accessed(e.mmu, stack))


@helper(Mnemonic.RETF)
def retf(e: TcgEngine, insn: Insn) -> int | None:
    refuse_v86(e, insn)
    extra = insn.iced.immediate(0) if insn.iced.op_count else 0
    size = (insn.iced.stack_pointer_increment - extra) // 2
    rip, selector = pop_values(e, size, 2)
    selector &= 0xFFFF
    top = stack_pointer(e) + 2 * size + extra
    if not is_protected(e):
        if rip > e.state.seg_limit[CS]:
            raise GuestException(GP, 0)
        set_stack_pointer(e, top)
        segments.load_real(e.state, CS, selector)
        e.mode_changed()
        return rip
    cpl = selector & 3
    code = _return_descriptor(e, selector)
    if cpl == e.cpl:
        _check_rip(e, rip, code)
        code = segments.mark_accessed(e.mmu, code)
        set_stack_pointer(e, top)
        return _enter_code(e, selector, code, rip)
    rsp, stack_selector = pop_values(e, size, 2, 2 * size + extra)
    stack_selector &= 0xFFFF
    stack = _return_stack(e, stack_selector, cpl, code)
    _check_rip(e, rip, code)
    code = segments.mark_accessed(e.mmu, code)
    _load_stack(e, stack_selector, stack, cpl)
    _enter_code(e, selector, code, rip)
    set_stack_pointer(e, rsp + extra)
    drop_privileged(e, cpl)
    return rip


_IRET_SIZES = {Mnemonic.IRET: 2, Mnemonic.IRETD: 4, Mnemonic.IRETQ: 8}
_ALWAYS = flags.ARITHMETIC | flags.TF | flags.DF | flags.NT
_WIDE = flags.RF | flags.AC | flags.ID


@helper(*_IRET_SIZES)
def iret(e: TcgEngine, insn: Insn) -> int | None:
    refuse_v86(e, insn)
    size = _IRET_SIZES[insn.mnemonic]
    result = _iret_protected(e, insn, size) if is_protected(e) else _iret_real(e, size)
    e.state.nmi_masked = 0
    return result


def _iret_real(e: TcgEngine, size: int) -> int:
    rip, selector, image = pop_values(e, size, 3)
    if rip > e.state.seg_limit[CS]:
        raise GuestException(GP, 0)
    set_stack_pointer(e, stack_pointer(e) + 3 * size)
    segments.load_real(e.state, CS, selector & 0xFFFF)
    _set_flags(e, image, _ALWAYS | flags.IF | flags.IOPL | (_WIDE if size > 2 else 0))
    e.mode_changed()
    return rip


def _iret_protected(e: TcgEngine, insn: Insn, size: int) -> int:
    long_code = e.mode.bits == 64
    if e.get_rflags() & flags.NT:
        if e.state.efer & EFER_LMA:
            raise GuestException(GP, 0)
        unsupported(e, insn, "returns to another task are not there yet")
    rip, selector, image = pop_values(e, size, 3)
    selector &= 0xFFFF
    if size > 2 and image & flags.VM and e.cpl == 0 and not e.state.efer & EFER_LMA:
        unsupported(e, insn, "virtual-8086 mode is not there yet")
    cpl = selector & 3
    code = _return_descriptor(e, selector)
    mask = _ALWAYS | (_WIDE if size > 2 else 0)
    if e.cpl == 0:
        mask |= flags.IOPL
    if e.cpl <= e.get_rflags() >> 12 & 3:
        mask |= flags.IF
    if cpl == e.cpl and not long_code:
        _check_rip(e, rip, code)
        code = segments.mark_accessed(e.mmu, code)
        set_stack_pointer(e, stack_pointer(e) + 3 * size)
        _set_flags(e, image, mask)
        return _enter_code(e, selector, code, rip)
    rsp, stack_selector = pop_values(e, size, 2, 3 * size)
    stack_selector &= 0xFFFF
    stack = _return_stack(e, stack_selector, cpl, code)
    _check_rip(e, rip, code)
    code = segments.mark_accessed(e.mmu, code)
    outer = cpl > e.cpl
    _load_stack(e, stack_selector, stack, cpl)
    _set_flags(e, image, mask)
    _enter_code(e, selector, code, rip)
    set_stack_pointer(e, rsp)
    if outer:
        drop_privileged(e, cpl)
    return rip


def _set_flags(e: TcgEngine, image: int, mask: int) -> None:
    e.set_rflags(e.get_rflags() & ~mask & MASK[32] | image & mask)


# -- software interrupts ----------------------------------------------------------------------


@helper(Mnemonic.INT)
def int_n(e: TcgEngine, insn: Insn) -> int | None:
    refuse_v86(e, insn)
    return software_interrupt(e, insn.iced.immediate(0) & 0xFF, insn.next_ip)


@helper(Mnemonic.INT3)
def int3(e: TcgEngine, insn: Insn) -> int | None:
    return software_interrupt(e, events.BP, insn.next_ip)


@helper(Mnemonic.INT1)
def int1(e: TcgEngine, insn: Insn) -> int | None:
    """Undocumented for long: #DB as if by hardware, so the gate's DPL does not matter."""
    return software_interrupt(e, events.DB, insn.next_ip, privileged=True)


@helper(Mnemonic.INTO)
def into(e: TcgEngine, insn: Insn) -> int | None:
    if not e.get_rflags() & flags.OF:
        return None
    return software_interrupt(e, events.OF, insn.next_ip)
