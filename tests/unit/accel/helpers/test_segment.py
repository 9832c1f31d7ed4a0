"""Segment loads, far transfers, LDTR, TR and the questions about descriptors."""

from __future__ import annotations

import pytest

from pyvcpu.accel.tcg import flags
from pyvcpu.cpu.events import GP, NP, TS
from pyvcpu.cpu.events import SS as STACK_FAULT
from pyvcpu.cpu.layout import CS, DS, ES, FS, GS, LDTR, RAX, RBX, RSP, SS, TR
from pyvcpu.errors import UnsupportedInstruction
from tests.unit.accel.helpers.box import (
    CODE,
    CODE32,
    GDT,
    KERNEL_CS,
    KERNEL_DS,
    STACK,
    TSS,
    TSS_SELECTOR,
    USER_CS,
    USER_CS32,
    USER_DS,
    Box,
)

ERROR_VECTORS = (TS, NP, STACK_FAULT, GP)


def with_handlers(box: Box) -> Box:
    """Every exception leads to 9000 + 16 * vector, a NOP, at the same level where there is one."""
    wide = box.engine.mode.bits == 64
    for vector in range(32):
        (box.gate64 if wide else box.gate32)(vector, 0x9000 + 16 * vector)
        box.put(0x9000 + 16 * vector, "90")
    box.put_int(TSS + 4, 8 if wide else 4, 0x5000)
    if not wide:
        box.put_int(TSS + 8, 2, KERNEL_DS)
    return box


def outcome(box: Box, code: str) -> tuple[int, int] | None:
    """(vector, error code) that an instruction raised, None if it just went on."""
    size = 8 if box.engine.mode.bits == 64 else 4
    box.run(code + "90", 1)
    vector = box.state.rip - 1 - 0x9000 >> 4
    if not 0 <= vector < 32:
        return None
    return vector, box.frame(1, size)[0] if vector in ERROR_VECTORS else 0


MOV_DS, MOV_SS = "8ed8", "8ed0"

LOADS = [
    # 64-bit code at level 0
    (False, MOV_DS, KERNEL_DS, None),
    (False, MOV_DS, 0, None),
    (False, MOV_DS, 3, None),
    (False, MOV_DS, USER_DS | 3, None),
    (False, MOV_DS, KERNEL_DS | 3, (GP, KERNEL_DS)),
    (False, MOV_DS, 0x200, (GP, 0x200)),
    (False, MOV_DS, 0x14, (GP, 0x14)),  # LDT, which is not there
    (False, MOV_DS, TSS_SELECTOR, (GP, TSS_SELECTOR)),
    (False, MOV_DS, 0x78, (GP, 0x78)),  # execute-only
    (False, MOV_DS, KERNEL_CS, None),  # readable code
    (False, MOV_DS, 0x50, (NP, 0x50)),
    (False, MOV_SS, KERNEL_DS, None),
    (False, MOV_SS, 0, None),
    (False, MOV_SS, 3, (GP, 0)),
    (False, MOV_SS, USER_DS | 3, (GP, USER_DS)),
    (False, MOV_SS, USER_DS, (GP, USER_DS)),
    (False, MOV_SS, KERNEL_CS, (GP, KERNEL_CS)),
    (False, MOV_SS, 0x80, (GP, 0x80)),  # read-only
    (False, MOV_SS, 0x50, (STACK_FAULT, 0x50)),
    # at level 3
    (True, MOV_DS, KERNEL_DS, (GP, KERNEL_DS)),
    (True, MOV_DS, USER_DS, None),
    (True, MOV_SS, 3, (GP, 0)),
    (True, MOV_SS, USER_DS | 3, None),
]


@pytest.mark.parametrize(("user", "code", "selector", "expected"), LOADS)
def test_loads_in_64_bit_code(user: bool, code: str, selector: int, expected: tuple[int, int] | None) -> None:
    box = with_handlers(Box().long_mode(user=user))
    box.state.regs[RAX] = selector | 0xABCD0000
    before = list(box.state.seg_selector)
    assert outcome(box, code) == expected
    if expected is None:
        assert box.state.seg_selector[SS if code == MOV_SS else DS] == selector
        assert box.engine.cpl == (3 if user else 0)
    elif not user:
        assert list(box.state.seg_selector) == before


def test_a_load_fills_the_hidden_part_and_marks_the_descriptor() -> None:
    box = Box().protected()
    box.put_int(GDT + 0x70, 8, 0x12CF92345678ABCD & ~(0xF << 48) | 0x3 << 48)
    box.state.regs[RAX] = 0x70
    box.run("8ee0", 1)
    state = box.state
    assert (state.seg_base[FS], state.seg_limit[FS]) == (0x12345678, 0x3ABCDFFF)
    assert state.seg_flags[FS] == 0xC09300
    assert box.get(GDT + 0x75, 1) == 0x93


def test_a_base_counts_at_once() -> None:
    box = Box().protected()
    box.put_int(GDT + 0x70, 8, 0x00CF92010000FFFF)
    box.put_int(0x18000, 4, 0x11223344)
    box.state.regs[RAX] = 0x70
    box.run("8ed8a100800000", 2)  # mov ds, eax; mov eax, [0x8000]
    assert box.reg(RAX) == 0x11223344


def test_mov_to_cs_is_undefined() -> None:
    box = with_handlers(Box().long_mode())
    assert outcome(box, "8ec8") == (6, 0)


def test_mov_from_a_segment_register() -> None:
    box = Box().long_mode()
    box.state.seg_selector[GS] = 0xBEEF
    for code, expected in (("8ce8", 0xBEEF), ("668ce8", 0x111111111111BEEF), ("488ce8", 0xBEEF)):
        box.state.regs[RAX] = 0x1111111111111111
        box.run(code, 1)
        assert box.reg(RAX) == expected
    box.state.regs[RBX] = 0x8000
    box.put_int(0x8000, 8, (1 << 64) - 1)
    box.run("488c2b", 1)
    assert box.get(0x8000, 8) == 0xFFFFFFFFFFFFBEEF


def test_interrupts_wait_after_a_load_of_ss() -> None:
    box = Box().long_mode()
    box.gate64(2, 0x9000)
    box.put(0x9000, "f4")
    box.state.regs[RAX] = KERNEL_DS
    box.put(CODE, "8ed0bc0050000090")
    box.state.rip = CODE
    box.engine.run(1)
    box.state.nmi_pending = 1
    box.engine.run(2)
    assert (box.state.rip, box.reg(RSP)) == (CODE + 7, 0x5000)
    box.engine.run(3)
    assert box.frame(1) == [CODE + 7]


def test_push_and_pop_of_segment_registers() -> None:
    box = Box().protected()
    box.put_int(GDT + 0x70, 8, 0x00CF92345678FFFF)
    box.state.regs[RAX] = 0x70
    box.run("500fa91e661e", 4)  # push eax; pop gs; push ds; pushw ds
    assert box.state.seg_base[GS] == 0x345678
    assert box.reg(RSP) == STACK - 6
    assert box.frame(3, 2) == [KERNEL_DS, KERNEL_DS, 0]
    box.run("661f17", 2)  # popw ds; pop ss
    assert (box.reg(RSP), box.state.interrupt_shadow) == (STACK, 1)


def test_a_pop_that_faults_moves_nothing() -> None:
    box = with_handlers(Box().long_mode())
    box.put_int(STACK, 8, 0x200)
    assert outcome(box, "0fa1") == (GP, 0x200)
    assert box.frame(5)[4] == STACK


def test_far_pointers() -> None:
    box = Box().protected()
    box.put(0x8000, "7856341270003412")
    box.put_int(GDT + 0x70, 8, 0x00CF92000000FFFF)
    box.state.regs[RBX] = 0x8000
    box.run("0fb503", 1)  # lgs eax, [ebx]
    assert (box.reg(RAX), box.state.seg_selector[GS]) == (0x12345678, 0x70)
    box = Box()
    box.put(0x8000, "34120050")
    box.state.regs[RBX] = 0x8000
    box.run("c407", 1)  # les ax, [bx]
    assert (box.reg(RAX) & 0xFFFF, box.state.seg_selector[ES], box.state.seg_base[ES]) == (0x1234, 0x5000, 0x50000)


# -- far transfers ----------------------------------------------------------------------------


def jump_code(selector: int, offset: int) -> str:
    """jmp far [rip] with a 16:32 pointer behind it."""
    return "ff2d00000000" + offset.to_bytes(4, "little").hex() + selector.to_bytes(2, "little").hex()


JUMPS = [
    (KERNEL_CS, 0x8000, None),
    (CODE32, 0x8000, None),
    (0, 0x8000, (GP, 0)),
    (0x200, 0x8000, (GP, 0x200)),
    (KERNEL_DS, 0x8000, (GP, KERNEL_DS)),
    (KERNEL_CS | 1, 0x8000, (GP, KERNEL_CS)),
    (USER_CS | 3, 0x8000, (GP, USER_CS)),
    (0x58, 0x8000, (NP, 0x58)),
    (TSS_SELECTOR, 0x8000, (GP, TSS_SELECTOR)),
]


@pytest.mark.parametrize(("selector", "offset", "expected"), JUMPS)
def test_far_jumps_in_64_bit_code(selector: int, offset: int, expected: tuple[int, int] | None) -> None:
    box = with_handlers(Box().long_mode())
    assert outcome(box, jump_code(selector, offset)) == expected
    if expected is None:
        assert (box.state.rip, box.state.seg_selector[CS]) == (offset, selector)
        assert box.engine.mode.bits == (64 if selector == KERNEL_CS else 32)


def test_a_far_jump_beyond_the_limit() -> None:
    box = with_handlers(Box().protected())
    box.put_int(GDT + 0x70, 8, 0x00409A0000000FFF)
    assert outcome(box, "ea001000007000") == (GP, 0)


def test_far_call_and_return_in_real_mode() -> None:
    box = Box()
    box.put(0x8000, "cb")
    box.put(CODE, "9a000000089090")
    box.state.rip = CODE
    box.engine.run(1)
    assert (box.state.rip, box.state.seg_base[CS]) == (0, 0x8000)
    assert box.frame(2, 2) == [CODE + 5, 0]
    box.engine.run(2)
    assert (box.state.rip, box.state.seg_base[CS], box.reg(RSP)) == (CODE + 5, 0, STACK)


def test_far_call_and_return_over_modes() -> None:
    """From 64-bit code to 32-bit code and back, with an argument dropped."""
    box = Box().long_mode()
    box.put(CODE, "50ff1d020000009090" + (0x8000).to_bytes(4, "little").hex() + "4000")
    box.put(0x8000, "40ca0800")  # inc eax; retf 8
    box.state.regs[RAX] = 41
    box.state.rip = CODE
    box.engine.run(2)
    assert box.engine.mode.bits == 32
    assert box.frame(2, 4) == [CODE + 7, KERNEL_CS]
    box.engine.run(4)
    assert (box.state.rip, box.engine.mode.bits, box.reg(RSP), box.reg(RAX)) == (CODE + 7, 64, STACK, 42)


def test_retf_to_ring_3() -> None:
    box = Box().protected()
    for i, value in enumerate((0x8000, USER_CS32 | 3, 0, 0x7700, USER_DS | 3)):
        box.put_int(STACK - 20 + 4 * i, 4, value)
    box.state.regs[RSP] = STACK - 20
    box.run("ca0400", 1)
    state = box.state
    assert (state.rip, box.engine.cpl, box.reg(RSP)) == (0x8000, 3, 0x7704)
    assert [state.seg_selector[s] for s in (ES, DS, FS, GS)] == [0, 0, 0, 0]
    assert not state.seg_flags[DS] & 0x8000


def test_call_gates_say_that_they_are_missing() -> None:
    box = Box().protected()
    box.put_int(GDT + 0x70, 8, 0x00008C0000088000)
    with pytest.raises(UnsupportedInstruction, match="call gates"):
        box.run("ea000000007000", 1)


# -- LDTR, TR, LAR and so on ------------------------------------------------------------------


def test_lldt_and_a_descriptor_in_it() -> None:
    box = Box().long_mode()
    box.put_int(0x8010, 8, 0x00CF93000000FFFF)
    box.state.regs[RAX], box.state.regs[RBX] = 0x60, 0x14
    box.run("0f00d08eeb", 2)  # lldt ax; mov gs, bx
    state = box.state
    assert (state.seg_base[LDTR], state.seg_limit[LDTR], state.seg_selector[GS]) == (0x8000, 0x17, 0x14)
    box.run("0f00c3", 1)  # sldt ebx
    assert box.reg(RBX) == 0x60


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (TSS_SELECTOR, None), (0, (GP, 0)), (0x60, (GP, 0x60)), (KERNEL_DS, (GP, KERNEL_DS)), (0x34, (GP, 0x34)),
        (0x200, (GP, 0x200)),
    ],
)  # fmt: skip
def test_ltr(selector: int, expected: tuple[int, int] | None) -> None:
    box = with_handlers(Box().long_mode())
    box.state.seg_selector[TR] = 0
    box.state.regs[RAX] = selector
    assert outcome(box, "0f00d8") == expected
    if expected is None:
        assert (box.state.seg_base[TR], box.state.seg_flags[TR]) == (TSS, 0x8B00)
        box.state.regs[RAX] = selector
        assert outcome(box, "0f00d8") == (GP, selector)  # it is busy now


def test_ltr_is_not_for_ring_3() -> None:
    box = with_handlers(Box().long_mode(user=True))
    assert outcome(box, "0f00d8") == (GP, 0)


def zf(box: Box) -> bool:
    return bool(box.state.rflags & flags.ZF)


def test_lar_lsl_verr_verw() -> None:
    box = Box().long_mode()
    for selector, rights, limit in (
        (KERNEL_DS, 0xCF9300 & 0xF0FF00, 0xFFFFFFFF),
        (TSS_SELECTOR, 0x8900, 0x67),
        (0x200, None, None),
        (0, None, None),
        (KERNEL_DS | 3, None, None),
    ):
        for code, expected in (("0f02c3", rights), ("0f03c3", limit)):
            box.state.regs[RAX], box.state.regs[RBX] = 0x55, selector
            box.run(code, 1)
            assert zf(box) == (expected is not None)
            assert box.reg(RAX) == (0x55 if expected is None else expected)
    for selector, readable, writable in (
        (KERNEL_DS, 1, 1),
        (KERNEL_CS, 1, 0),
        (0x78, 0, 0),
        (0x80, 1, 0),
        (0x60, 0, 0),
    ):
        box.state.regs[RBX] = selector
        assert zf(box.run("0f00e3", 1)) == bool(readable)
        assert zf(box.run("0f00eb", 1)) == bool(writable)


def test_arpl() -> None:
    box = Box().protected()
    box.state.regs[RAX], box.state.regs[RBX] = 0x12340010, 3
    assert zf(box.run("63d8", 1))
    assert box.reg(RAX) == 0x12340013
    assert not zf(box.run("63d8", 1))
