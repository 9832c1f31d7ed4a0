"""Delivery: frames, stacks, gate checks with their error codes, double and triple faults."""

from __future__ import annotations

import pytest

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.interrupts import deliver_exception, deliver_interrupt
from pyvcpu.cpu.events import DE, DF, GP, NMI, NP, PF, TS, UD, GuestException
from pyvcpu.cpu.events import SS as STACK_FAULT
from pyvcpu.cpu.layout import CS, R11, RCX, RSP, SS, TR
from pyvcpu.errors import UnsupportedInstruction
from tests.unit.accel.helpers.box import (
    CODE,
    CODE32,
    GDT,
    IDT,
    KERNEL_CS,
    KERNEL_DS,
    STACK,
    TSS,
    USER_CS,
    USER_CS32,
    USER_DS,
    Box,
)

HANDLER = 0x7000


def box64(vector: int, *, user: bool = False, kind: int = 0x8E, selector: int = KERNEL_CS, ist: int = 0) -> Box:
    box = Box().long_mode(user=user)
    box.put_int(TSS + 4, 8, 0x5008)  # RSP0, not aligned
    box.gate64(vector, HANDLER, kind=kind, selector=selector, ist=ist)
    box.engine.set_rflags(flags.IF | flags.NT | flags.CF)
    return box


def raised(box: Box, vector: int) -> tuple[int, int | None]:
    """What ``deliver_interrupt`` runs into: the vector and error code that are delivered instead."""
    for at in range(32):
        if not box.get(IDT + 16 * at, 8):
            box.gate64(at, 0x9000 + at)
    box.state.regs[RSP] = STACK
    deliver_interrupt(box.engine, vector)
    code = box.state.rip - 0x9000
    return code, box.frame(1)[0] if code in (DF, TS, NP, STACK_FAULT, GP, PF) else None


# -- long mode --------------------------------------------------------------------------------


def test_an_interrupt_at_the_same_level() -> None:
    box = box64(0x40)
    box.state.regs[RSP] = 0x6004
    deliver_interrupt(box.engine, 0x40)
    state = box.state
    assert state.rip == HANDLER
    assert box.reg(RSP) == 0x6000 - 40
    assert box.frame(5) == [CODE, KERNEL_CS, flags.IF | flags.NT | flags.CF | 2, 0x6004, KERNEL_DS]
    assert state.rflags == flags.CF | 2
    assert state.seg_selector[SS] == KERNEL_DS


def test_a_trap_gate_leaves_interrupts_on() -> None:
    box = box64(0x40, kind=0x8F)
    deliver_interrupt(box.engine, 0x40)
    assert box.state.rflags == flags.IF | flags.CF | 2


def test_an_interrupt_out_of_ring_3() -> None:
    box = box64(0x40, user=True)
    deliver_interrupt(box.engine, 0x40)
    state = box.state
    assert box.engine.cpl == 0
    assert box.reg(RSP) == 0x5000 - 40
    assert box.frame(5)[1:] == [USER_CS | 3, flags.IF | flags.NT | flags.CF | 2, STACK, USER_DS | 3]
    assert (state.seg_selector[SS], state.seg_selector[CS]) == (0, KERNEL_CS)
    assert not box.engine.mmu.user


def test_ist_even_at_the_same_level() -> None:
    box = box64(NMI, ist=3)
    box.put_int(TSS + 0x24 + 16, 8, 0xA00F)
    deliver_exception(box.engine, GuestException(NMI))
    assert box.reg(RSP) == 0xA000 - 40
    assert box.frame(5)[3:] == [STACK, KERNEL_DS]
    assert box.frame(3)[2] & flags.RF == 0  # no fault


def test_a_fault_pushes_its_error_code_and_rf() -> None:
    box = box64(PF)
    deliver_exception(box.engine, GuestException(PF, 7, cr2=0x123456789))
    assert box.reg(RSP) == STACK - 48
    assert box.frame(4) == [7, CODE, KERNEL_CS, flags.RF | flags.IF | flags.NT | flags.CF | 2]
    assert box.state.cr2 == 0x123456789
    assert box.state.rflags & (flags.RF | flags.NT) == 0


def test_software_interrupts_push_the_next_instruction() -> None:
    for vector, code in ((0x80, "cd80"), (3, "cc"), (1, "f1")):
        box = box64(vector)
        box.run(code, 1)
        assert box.frame(1) == [CODE + len(code) // 2]
        assert box.state.rip == HANDLER
        assert box.clock.instructions == 1


def test_int_n_needs_the_gates_dpl() -> None:
    box = box64(0x80, user=True, kind=0xEE)
    assert box.run("cd80", 1).state.rip == HANDLER
    box = box64(0x80, user=True)
    box.gate64(GP, 0x9000)
    box.put(0x9000, "90")
    box.run("cd80", 1)
    assert box.state.rip == 0x9001
    assert box.frame(2) == [0x80 << 3 | 2, CODE]


def test_int1_and_interrupts_do_not_need_it() -> None:
    box = box64(1, user=True)
    box.run("f1", 1)
    assert box.state.rip == HANDLER


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda b: b.gate64(0x40, HANDLER, kind=0x0E), (NP, 0x40 << 3 | 3)),
        (lambda b: b.gate64(0x40, HANDLER, kind=0x85), (GP, 0x40 << 3 | 3)),
        (lambda b: b.gate64(0x40, HANDLER, kind=0x86), (GP, 0x40 << 3 | 3)),
        (lambda b: b.gate64(0x40, HANDLER, selector=0), (GP, 1)),
        (lambda b: b.gate64(0x40, HANDLER, selector=0x100), (GP, 0x101)),
        (lambda b: b.gate64(0x40, HANDLER, selector=0x0C), (GP, 0x0D)),  # there is no LDT
        (lambda b: b.gate64(0x40, HANDLER, selector=KERNEL_DS), (GP, KERNEL_DS | 1)),
        (lambda b: b.gate64(0x40, HANDLER, selector=CODE32), (GP, CODE32 | 1)),
        (lambda b: b.gate64(0x40, HANDLER, selector=USER_CS), (GP, USER_CS | 1)),
        (lambda b: b.gate64(0x40, 1 << 60), (GP, 1)),
        (lambda b: b.put_int(GDT + KERNEL_CS, 8, 0x00AF1B000000FFFF), None),
        (lambda b: setattr(b.state, "idt_limit", 0x40 * 16 + 14), (GP, 0x40 << 3 | 3)),
        (lambda b: b.gate64(0x40, HANDLER, ist=7), (STACK_FAULT, 1)),  # IST7 is not canonical below
    ],
)
def test_gate_checks(change, expected: tuple[int, int] | None) -> None:
    box = box64(0x40)
    box.put_int(TSS + 0x24 + 48, 8, 1 << 50)
    change(box)
    if expected is None:  # no handler can be reached at all
        raised(box, 0x40)
        assert box.state.shutdown == 1
        return
    assert raised(box, 0x40) == expected


def test_a_tss_that_is_too_short() -> None:
    box = box64(0x40, ist=2)
    box.state.seg_limit[TR] = 0x24 + 8 + 6
    assert raised(box, 0x40) == (TS, 0x30 | 1)


def test_nothing_changes_when_the_frame_does_not_fit() -> None:
    """The lower page of the frame is not there: #PF while #UD is delivered, by an IST that works."""
    box = box64(UD)
    box.gate64(PF, 0x9000, ist=1)
    box.put_int(TSS + 0x24, 8, 0xB000)
    box.page_entry(5, 0)
    box.state.regs[RSP] = 0x6010
    before = box.ram.read(0x6000, 0x20)
    deliver_exception(box.engine, GuestException(UD))
    assert box.state.rip == 0x9000
    assert box.state.cr2 == 0x6010 - 40
    assert box.frame(5)[:2] == [2, CODE]
    assert box.frame(5)[4] == 0x6010
    assert box.ram.read(0x6000, 0x20) == before


def test_ring_3_may_not_see_the_stack_that_ring_0_uses() -> None:
    box = box64(0x40, user=True)
    box.page_entry(4, 0x4003)
    box.page_entry(2, 0x2003)
    box.page_entry(3, 0x3003)
    deliver_interrupt(box.engine, 0x40)
    assert box.state.rip == HANDLER


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        (GuestException(GP, 0), NP, DF),
        (GuestException(DE), TS, DF),
        (GuestException(PF, 0, cr2=5), GP, DF),
        (GuestException(UD), NP, NP),
        (GuestException(GP, 0), PF, PF),
        (GuestException(PF, 0, cr2=5), PF, DF),
    ],
)
def test_two_exceptions(first: GuestException, second: int, result: int) -> None:
    box = box64(DF)
    box.gate64(result, 0x9000)
    if second == NP:
        box.gate64(first.vector, HANDLER, kind=0x0E)
    elif second == GP:
        box.gate64(first.vector, HANDLER, selector=0)
    elif second == TS:
        box.gate64(first.vector, HANDLER, ist=2)
        box.state.seg_limit[TR] = 0x24 + 7
        box.gate64(result, 0x9000)
    else:
        box.gate64(first.vector, HANDLER, ist=2)
        box.put_int(TSS + 0x24 + 8, 8, 0x1FFF000)  # nothing is mapped there
        if result == PF:
            box.gate64(PF, 0x9000)
    deliver_exception(box.engine, first)
    assert box.state.rip == 0x9000
    if result == DF:
        assert box.frame(2) == [0, CODE]
    if second == PF:
        assert box.state.cr2 == 0x1FFF000 - 40 - (8 if first.error_code is not None else 0)


def test_a_third_exception_shuts_down() -> None:
    box = box64(0x40)
    for vector in range(32):
        box.gate64(vector, 0, kind=0)
    before = box.state.snapshot()
    deliver_exception(box.engine, GuestException(GP, 0))
    assert box.state.shutdown == 1
    box.state.shutdown = 0
    assert box.state.snapshot() == before
    box.state.shutdown = 1
    assert box.engine.run(10) == "shutdown"


def test_an_nmi_is_masked_until_iret() -> None:
    box = box64(NMI)
    box.put(HANDLER, "9048cf")
    box.put(CODE, "90909090")
    box.state.nmi_pending = 1
    box.engine.run(1)
    assert (box.state.rip, box.state.nmi_masked) == (HANDLER + 1, 1)
    box.state.nmi_pending = 1
    box.state.rflags &= ~flags.NT
    box.engine.run(2)  # IRETQ is next: NT was cleared by the delivery
    assert box.state.nmi_masked == 0
    box.engine.run(3)
    assert (box.state.rip, box.state.nmi_masked) == (HANDLER + 1, 1)


# -- iret -------------------------------------------------------------------------------------


def push_frame(box: Box, *values: int, size: int = 8) -> None:
    box.state.regs[RSP] = STACK - size * len(values)
    for i, value in enumerate(values):
        box.put_int(STACK - size * (len(values) - i), size, value)


def test_iretq_to_ring_3_clears_what_it_may_not_use() -> None:
    box = Box().long_mode()
    push_frame(box, 0x8000, USER_CS | 3, 0x3202 | flags.RF | flags.ID, 0x7777, USER_DS | 3)
    box.put(0x8000, "90")
    box.run("48cf", 1)
    state = box.state
    assert (state.rip, box.reg(RSP), box.engine.cpl) == (0x8000, 0x7777, 3)
    assert state.rflags == 0x3202 | flags.RF | flags.ID
    assert [state.seg_selector[i] for i in (0, 3, 4, 5)] == [0, 0, 0, 0]
    assert box.engine.mmu.user
    box.engine.run(2)
    assert not state.rflags & flags.RF  # it has lasted for one instruction


def test_ring_3_cannot_change_iopl_or_if() -> None:
    box = Box().long_mode(user=True)
    box.engine.set_rflags(flags.IF)
    push_frame(box, 0x8000, USER_CS | 3, 0x3002 | flags.ZF, 0x7770, USER_DS | 3)
    box.run("48cf", 1)
    assert box.state.rflags == flags.IF | flags.ZF | 2


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        ((0x8000, 0, 2, 0x7000, USER_DS | 3), 0),
        ((0x8000, 0x200, 2, 0x7000, USER_DS | 3), 0x200),
        ((0x8000, KERNEL_DS, 2, 0x7000, KERNEL_DS), KERNEL_DS),
        ((0x8000, USER_CS, 2, 0x7000, KERNEL_DS), USER_CS),
        ((0x8000, KERNEL_CS | 3, 2, 0x7000, USER_DS | 3), KERNEL_CS),
        ((0x8000, USER_CS | 3, 2, 0x7000, KERNEL_DS), KERNEL_DS),
        ((0x8000, USER_CS | 3, 2, 0x7000, 0), 0),
        ((0x8000, USER_CS | 3, 2, 0x7000, USER_CS | 3), USER_CS),
        ((1 << 60, USER_CS | 3, 2, 0x7000, USER_DS | 3), 0),
        ((0x8000, KERNEL_CS, 2, 0x7000, USER_DS | 3), USER_DS),
    ],
)
def test_iretq_checks(frame: tuple[int, ...], error: int) -> None:
    box = Box().long_mode()
    box.gate64(GP, 0x9000)
    box.put(0x9000, "90")
    push_frame(box, *frame)
    box.run("48cf", 1)
    assert box.state.rip == 0x9001
    assert box.frame(2) == [error, CODE]
    assert box.frame(5)[4] == STACK - 40


def test_iretq_with_nt() -> None:
    box = Box().long_mode()
    box.gate64(GP, 0x9000)
    box.put(0x9000, "90")
    box.engine.set_rflags(flags.NT)
    box.run("48cf", 1)
    assert box.frame(1) == [0]


def test_iretq_may_load_a_null_ss_in_ring_0() -> None:
    box = Box().long_mode()
    push_frame(box, 0x8000, KERNEL_CS, 2, 0x7770, 0)
    box.run("48cf", 1)
    assert (box.state.rip, box.reg(RSP), box.state.seg_selector[SS], box.engine.cpl) == (0x8000, 0x7770, 0, 0)


# -- real and protected mode ------------------------------------------------------------------


def test_real_mode_vectors() -> None:
    box = Box()
    box.state.idt_limit = 0x3FF
    box.state.seg_selector[CS], box.state.seg_base[CS] = 0x12, 0x120
    box.put(0x84 * 4, "00700800")
    box.engine.set_rflags(flags.IF | flags.TF | flags.AC | flags.CF)
    box.engine.load_state()
    deliver_interrupt(box.engine, 0x84)
    assert box.frame(3, 2) == [CODE, 0x12, flags.IF | flags.TF | flags.CF | 2]
    assert (box.state.rip, box.state.seg_base[CS], box.state.seg_selector[CS]) == (0x7000, 0x80, 8)
    assert box.state.rflags == flags.CF | 2


def test_real_mode_stack_wraps() -> None:
    box = Box()
    box.state.regs[RSP] = 0x12340002
    box.put(4 * 4, "00700000")
    deliver_interrupt(box.engine, 4)
    assert box.reg(RSP) == 0x1234FFFC
    assert (box.get(0, 2), box.get(0xFFFE, 2), box.get(0xFFFC, 2)) == (2, 0, CODE)


def test_a_short_vector_table_shuts_down() -> None:
    box = Box()
    box.state.idt_limit = 3
    deliver_interrupt(box.engine, 0x84)
    assert box.state.shutdown == 1


def test_protected_mode_gates() -> None:
    for kind, size, cleared in ((0x8E, 4, True), (0x8F, 4, False), (0x86, 2, True)):
        box = Box().protected()
        box.gate32(13, HANDLER, kind=kind)
        box.engine.set_rflags(flags.IF)
        deliver_exception(box.engine, GuestException(GP, 0x18))
        assert box.frame(4, size) == [0x18, CODE, CODE32, (flags.IF | 2 | flags.RF) & ((1 << 8 * size) - 1)]
        assert bool(box.state.rflags & flags.IF) != cleared
        assert box.state.rip == HANDLER


def test_protected_mode_out_of_ring_3() -> None:
    box = Box().protected(user=True)
    box.put_int(TSS + 4, 4, 0x5000)
    box.put_int(TSS + 8, 2, KERNEL_DS)
    box.gate32(0x80, HANDLER, kind=0xEE)
    box.put(HANDLER, "cf")
    box.run("cd8090", 1)
    assert (box.engine.cpl, box.state.seg_selector[SS], box.reg(RSP)) == (0, KERNEL_DS, 0x5000 - 20)
    assert box.frame(5, 4) == [CODE + 2, USER_CS32 | 3, 2, STACK, USER_DS | 3]
    box.engine.run(3)
    assert (box.engine.cpl, box.state.seg_selector[SS], box.reg(RSP)) == (3, USER_DS | 3, STACK)
    assert box.state.rip == CODE + 3


def test_protected_mode_pushes_all_of_esp_for_a_16_bit_stack() -> None:
    box = Box().protected(user=True)
    box.put_int(TSS + 4, 4, 0x5000)
    box.put_int(TSS + 8, 2, KERNEL_DS)
    box.gate32(0x40, HANDLER)
    box.state.seg_flags[SS] &= ~(1 << 22)
    box.engine.load_state()
    box.state.regs[RSP] = 0x12345678
    deliver_interrupt(box.engine, 0x40)
    assert box.frame(5, 4)[3:] == [0x12345678, USER_DS | 3]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (0, (TS, 1)),
        (USER_DS | 3, (TS, USER_DS | 1)),
        (0x50, (STACK_FAULT, 0x51)),
        (0x80, (TS, 0x81)),
        (0x200, (TS, 0x201)),
    ],
)
def test_protected_mode_stack_of_the_tss(selector: int, expected: tuple[int, int]) -> None:
    """The new stack is bad, so the exception comes at the old level, through a conforming handler."""
    box = Box().protected(user=True)
    box.put_int(GDT + 0x70, 8, 0x00CF9F000000FFFF)  # conforming code
    box.put_int(TSS + 4, 4, 0x5000)
    box.put_int(TSS + 8, 2, selector)
    box.gate32(0x40, HANDLER)
    for vector in range(32):
        box.gate32(vector, 0x9000 + vector, selector=0x70)
    deliver_interrupt(box.engine, 0x40)
    assert (box.state.rip - 0x9000, box.frame(1, 4)[0]) == expected
    assert box.engine.cpl == 3


def test_task_gates_say_that_they_are_missing() -> None:
    box = Box().protected()
    box.gate32(0x40, 0, kind=0x85, selector=0x30)
    with pytest.raises(UnsupportedInstruction, match="task gates"):
        deliver_interrupt(box.engine, 0x40)


# -- shadows and single steps -----------------------------------------------------------------


def test_single_steps_count_every_instruction() -> None:
    box = Box().long_mode()
    box.gate64(1, 0x9000)
    box.put(0x9000, "48cf")
    box.put(CODE, "9090909090")
    box.engine.set_rflags(flags.TF)
    trace = []
    for _ in range(6):
        box.engine.run(box.clock.instructions + 1)
        trace.append(box.state.rip)
    assert trace == [0x9000, CODE + 1, 0x9000, CODE + 2, 0x9000, CODE + 3]
    assert box.state.dr[6] & 1 << 14


def test_software_interrupts_and_loads_of_ss_hold_the_single_step_back() -> None:
    box = Box().long_mode()
    box.gate64(1, 0x9000)
    box.gate64(0x80, 0x9100)
    box.put(0x9100, "90")
    box.put(CODE, "8ed090cd80")
    box.state.regs[0] = KERNEL_DS
    box.engine.set_rflags(flags.TF)
    box.engine.run(1)
    assert (box.state.rip, box.state.interrupt_shadow) == (CODE + 2, 1)
    box.engine.run(2)
    assert box.state.rip == 0x9000
    assert box.frame(1) == [CODE + 3]
    box.put(0x9000, "48cf")
    box.engine.run(4)
    assert box.state.rip == 0x9100
    assert not box.state.rflags & flags.TF


def stepping(user: bool = False) -> Box:
    """#DB leads to 9000; SYSCALL to 8000, where FMASK clears IF."""
    box = Box().long_mode(user=user)
    box.gate64(1, 0x9000)
    box.put(0x9000, "9090")
    box.put(0x8000, "9090")
    box.put_int(TSS + 4, 8, 0x5000)
    box.state.star, box.state.lstar, box.state.fmask = 0x1B << 48 | KERNEL_CS << 32, 0x8000, flags.IF
    box.engine.set_rflags(flags.TF)
    return box


def test_a_single_step_over_hlt_is_taken_in_hlt() -> None:
    box = stepping()
    assert box.run("f4", 1).state.rip == 0x9000
    assert box.frame(1) == [CODE + 1]
    assert box.engine.run(2) == "limit"  # not halted any more
    assert box.state.rip == 0x9001


@pytest.mark.parametrize("masked", [False, True])
def test_syscall_traps_by_the_flags_that_it_leaves(masked: bool) -> None:
    box = stepping(user=True)
    box.state.fmask |= flags.TF if masked else 0
    box.run("0f05", 1)
    assert box.state.rip == (0x8000 if masked else 0x9000)
    assert bool(box.state.dr[6] & 1 << 14) != masked
    if not masked:
        assert box.frame(2) == [0x8000, KERNEL_CS]


@pytest.mark.parametrize("before", [0, flags.TF])
@pytest.mark.parametrize("after", [0, flags.TF])
def test_sysret_traps_by_the_flags_that_it_loads(before: int, after: int) -> None:
    box = stepping()
    box.engine.set_rflags(before)
    box.state.regs[RCX], box.state.regs[R11] = 0x8000, after
    box.run("480f07", 1)
    assert box.clock.instructions == 1
    assert box.state.rip == (0x9000 if after else 0x8000)
    assert box.engine.cpl == (0 if after else 3)
    if after:
        assert box.frame(3) == [0x8000, USER_CS | 3, flags.TF | 2]
