"""Delivery of exceptions and interrupts through the IDT or the real-mode vector table (SDM 3A chapter 6).

    64-bit gate   127..96 -        95..64 offset 63..32    IDT: 16 bytes a vector
                  63..48 offset    47 P  46..45 DPL  44 0  43..40 type  34..32 IST
                  31..16 selector  15..0 offset
    frame         SS  RSP  RFLAGS  CS  RIP  [error code]   the last pushed lowest

A delivery that faults has changed nothing: the frame is checked as a whole before its first byte is
stored, registers follow. The second exception then takes the place of the first, makes a double
fault, or, while that is being delivered, shuts the processor down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import MASK
from pyvcpu.accel.tcg.frames import is_canonical, segment_base, stack_pointer, store_frame
from pyvcpu.cpu import events, segments
from pyvcpu.cpu.events import GP, NP, TS, GuestException, is_double_fault
from pyvcpu.cpu.layout import CS, MP_RUNNABLE, RSP, SS, TR
from pyvcpu.cpu.segments import Descriptor
from pyvcpu.errors import UnsupportedInstruction

if TYPE_CHECKING:
    from pyvcpu.accel.tcg.engine import TcgEngine

CR0_PE = 1
EFER_LMA = 1 << 10
_IDT = 2  # the error code's IDT bit


class _Event(NamedTuple):
    """What is delivered. ``gate_dpl`` says that the gate's DPL is checked: INT n, INT3 and INTO."""

    vector: int
    error_code: int | None
    return_ip: int
    rflags: int  # the image that is pushed
    gate_dpl: bool
    ext: int  # EXT bit of error codes that arise on the way

    def gate_error(self, vector: int) -> GuestException:
        return GuestException(vector, self.vector << 3 | _IDT | self.ext)


def deliver_exception(e: TcgEngine, exception: GuestException) -> None:
    """Deliver an exception of the instruction at RIP; a triple fault sets ``state.shutdown``."""
    first, following = exception, None
    while True:
        if first.vector == events.PF and first.cr2 is not None:
            e.state.cr2 = first.cr2
        rflags = e.get_rflags() | (0 if first.vector in events.TRAPS else flags.RF)
        event = _Event(first.vector, first.error_code, e.state.rip, rflags, False, 1)
        try:
            _deliver(e, event)
            return
        except GuestException as second:
            following = second
        if first.vector == events.DF and (following.vector == events.PF or following.vector in events.CONTRIBUTORY):
            e.state.shutdown = 1
            return
        if is_double_fault(first.vector, following.vector):
            if following.cr2 is not None:
                e.state.cr2 = following.cr2
            following = GuestException(events.DF, 0)
        first = following


def deliver_interrupt(e: TcgEngine, vector: int) -> None:
    """Deliver an external interrupt."""
    try:
        _deliver(e, _Event(vector, None, e.state.rip, e.get_rflags(), False, 1))
    except GuestException as second:
        deliver_exception(e, second)


def software_interrupt(e: TcgEngine, vector: int, next_ip: int, *, privileged: bool = False) -> int:
    """INT n, INT3, INTO, and INT1 (``privileged``: no check of the gate's DPL). The handler's RIP."""
    _deliver(e, _Event(vector, None, next_ip, e.get_rflags(), not privileged, int(privileged)))
    return int(e.state.rip)


def _deliver(e: TcgEngine, event: _Event) -> None:
    state = e.state
    if not state.cr0 & CR0_PE:
        _real(e, event)
    elif state.efer & EFER_LMA:
        _long(e, event)
    else:
        _protected(e, event)
    state.mp_state = MP_RUNNABLE  # a single step over HLT is taken in HLT
    e.mode_changed()


# -- real mode --------------------------------------------------------------------------------


def _real(e: TcgEngine, event: _Event) -> None:
    """IVT: IP and CS, 4 bytes a vector; no error codes (SDM 3B 20.1.4)."""
    state = e.state
    if event.vector * 4 + 3 > state.idt_limit:
        raise event.gate_error(GP)
    entry = e.mmu.read(state.idt_base + event.vector * 4, 4, True)
    top = stack_pointer(e)
    values = (event.rflags & 0xFFFF, state.seg_selector[CS], event.return_ip)
    store_frame(e, state.seg_base[SS], top, e.mode.stack, 2, values, False)
    _set_sp(e, top - 6)
    segments.load_real(state, CS, entry >> 16)
    state.rip = entry & 0xFFFF
    e.set_rflags(e.get_rflags() & ~(flags.IF | flags.TF | flags.RF | flags.AC))


def _set_sp(e: TcgEngine, value: int, width: int = 0) -> None:
    width = width or e.mode.stack
    mask = MASK[width]
    if width == 16:
        value = e.state.regs[RSP] & ~mask | value & mask
    e.state.regs[RSP] = value & (mask if width > 16 else MASK[64])


# -- gates ------------------------------------------------------------------------------------


def _code_segment(e: TcgEngine, event: _Event, selector: int) -> tuple[Descriptor, int]:
    """The handler's code segment and the privilege level that it runs at."""
    if not selector & 0xFFFC:
        raise GuestException(GP, event.ext)
    descriptor = segments.fetch(e.state, e.mmu, selector, GP, event.ext)
    error = selector & 0xFFFC | event.ext
    if not descriptor.is_code or descriptor.dpl > e.cpl:
        raise GuestException(GP, error)
    if not descriptor.present:
        raise GuestException(NP, error)
    return descriptor, e.cpl if descriptor.is_conforming else descriptor.dpl


def _check_gate(e: TcgEngine, event: _Event, high: int) -> None:
    """DPL for software interrupts, then presence; ``high`` is the gate's second dword."""
    if event.gate_dpl and high >> segments.DPL_SHIFT & 3 < e.cpl:
        raise GuestException(GP, event.vector << 3 | _IDT)
    if not high & segments.P:
        raise event.gate_error(NP)


def _enter(e: TcgEngine, event: _Event, selector: int, code: Descriptor, cpl: int, rip: int, interrupt: bool) -> None:
    """The part after which nothing can fault: CS, RIP, RFLAGS."""
    clear = flags.TF | flags.NT | flags.RF | flags.VM | (flags.IF if interrupt else 0)
    rflags = e.get_rflags() & ~clear
    segments.load_descriptor(e.state, CS, selector & 0xFFFC | cpl, code)
    e.state.rip = rip
    e.set_rflags(rflags)


def _long(e: TcgEngine, event: _Event) -> None:
    state = e.state
    at = event.vector * 16
    if at + 15 > state.idt_limit:
        raise event.gate_error(GP)
    low = e.mmu.read(state.idt_base + at, 8, True)
    top_half = e.mmu.read(state.idt_base + at + 8, 8, True)
    high = low >> 32
    if high >> 8 & 0x1F not in (segments.INTERRUPT32, segments.TRAP32):
        raise event.gate_error(GP)
    _check_gate(e, event, high)
    selector = low >> 16 & 0xFFFF
    rip = low & 0xFFFF | high & 0xFFFF0000 | (top_half & 0xFFFFFFFF) << 32
    code, cpl = _code_segment(e, event, selector)
    if code.high & (segments.L | segments.DB) != segments.L:
        raise GuestException(GP, selector & 0xFFFC | event.ext)
    if not is_canonical(rip):
        raise GuestException(GP, event.ext)
    ist = high & 7
    if ist:
        rsp = _tss64_stack(e, event, 0x24 + 8 * (ist - 1))
    elif cpl < e.cpl:
        rsp = _tss64_stack(e, event, 4 + 8 * cpl)
    else:
        rsp = state.regs[RSP]
    rsp &= ~0xF
    values = [state.seg_selector[SS], state.regs[RSP], event.rflags, state.seg_selector[CS], event.return_ip]
    if event.error_code is not None:
        values.append(event.error_code)
    store_frame(e, 0, rsp, 64, 8, values, cpl != 3, event.ext)
    code = segments.mark_accessed(e.mmu, code)
    if cpl < e.cpl:
        segments.load_null(state, SS, cpl, cpl)
    state.regs[RSP] = (rsp - 8 * len(values)) & MASK[64]
    _enter(e, event, selector, code, cpl, rip, high >> 8 & 0xF == segments.INTERRUPT32)


def _tss64_stack(e: TcgEngine, event: _Event, offset: int) -> int:
    """An RSPn or ISTn of the 64-bit TSS (SDM 3A 7.7)."""
    state = e.state
    if offset + 7 > state.seg_limit[TR]:
        raise GuestException(TS, state.seg_selector[TR] & 0xFFFC | event.ext)
    rsp = e.mmu.read(state.seg_base[TR] + offset, 8, True)
    if not is_canonical(rsp):
        raise GuestException(events.SS, event.ext)
    return rsp


def _protected(e: TcgEngine, event: _Event) -> None:
    """Legacy protected mode: interrupt and trap gates of 16 and 32 bits; no tasks, no virtual-8086 mode."""
    state = e.state
    if state.rflags & flags.VM:
        raise _missing(e, event, "interrupts in virtual-8086 mode are not there yet")
    at = event.vector * 8
    if at + 7 > state.idt_limit:
        raise event.gate_error(GP)
    gate = e.mmu.read(state.idt_base + at, 8, True)
    high = gate >> 32
    kind = high >> 8 & 0x1F
    if kind not in (segments.TASK_GATE, segments.INTERRUPT16, segments.TRAP16, segments.INTERRUPT32, segments.TRAP32):
        raise event.gate_error(GP)
    _check_gate(e, event, high)
    if kind == segments.TASK_GATE:
        raise _missing(e, event, "task gates are not there yet")
    selector = gate >> 16 & 0xFFFF
    size = 4 if kind & 8 else 2
    eip = gate & 0xFFFF | (high & 0xFFFF0000 if size == 4 else 0)
    code, cpl = _code_segment(e, event, selector)
    values = [event.rflags, state.seg_selector[CS], event.return_ip]
    if event.error_code is not None:
        values.append(event.error_code)
    if cpl == e.cpl:
        if eip > code.limit:
            raise GuestException(GP, event.ext)
        top = stack_pointer(e)
        store_frame(e, segment_base(e, SS), top, e.mode.stack, size, values, False)
        code = segments.mark_accessed(e.mmu, code)
        _set_sp(e, top - size * len(values))
    else:
        stack_selector, top = _tss_stack(e, event, cpl)
        stack = _stack_segment(e, event, stack_selector, cpl)
        if eip > code.limit:
            raise GuestException(GP, event.ext)
        values = [state.seg_selector[SS], state.regs[RSP], *values]  # all of ESP, also of a 16-bit stack
        width = 32 if stack.high & segments.DB else 16
        store_frame(e, stack.base, top, width, size, values, True)
        code, stack = segments.mark_accessed(e.mmu, code), segments.mark_accessed(e.mmu, stack)
        segments.load_descriptor(state, SS, stack_selector, stack)
        _set_sp(e, top - size * len(values), width)
    _enter(e, event, selector, code, cpl, eip, kind in (segments.INTERRUPT16, segments.INTERRUPT32))


def _tss_stack(e: TcgEngine, event: _Event, cpl: int) -> tuple[int, int]:
    """SSn and ESPn of the 32-bit or 16-bit TSS."""
    state = e.state
    size = 4 if state.seg_flags[TR] >> 8 & 8 else 2
    at = cpl * 2 * size + size
    if at + 2 * size - 1 > state.seg_limit[TR]:
        raise GuestException(TS, state.seg_selector[TR] & 0xFFFC | event.ext)
    esp = e.mmu.read(state.seg_base[TR] + at, size, True)
    return e.mmu.read(state.seg_base[TR] + at + size, 2, True), esp


def _stack_segment(e: TcgEngine, event: _Event, selector: int, cpl: int) -> Descriptor:
    if not selector & 0xFFFC:
        raise GuestException(TS, event.ext)
    stack = segments.fetch(e.state, e.mmu, selector, TS, event.ext)
    error = selector & 0xFFFC | event.ext
    writable = stack.high & (segments.S | segments.CODE | segments.WRITABLE) == segments.S | segments.WRITABLE
    if selector & 3 != cpl or stack.dpl != cpl or not writable:
        raise GuestException(TS, error)
    if not stack.present:
        raise GuestException(events.SS, error)
    return stack


def _missing(e: TcgEngine, event: _Event, reason: str) -> UnsupportedInstruction:
    return UnsupportedInstruction(b"", f"vector {event.vector}", e.mode_name, e.state.rip, reason)
