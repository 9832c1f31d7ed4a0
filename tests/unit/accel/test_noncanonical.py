"""Addresses that are not canonical: #GP(0), and #SS(0) for what goes through the stack segment (SDM 3A 6.15)."""

from __future__ import annotations

import pytest

from pyvcpu.cpu.events import GP
from pyvcpu.cpu.events import SS as STACK_FAULT
from pyvcpu.cpu.layout import RAX, RBP, RDI, RSP
from tests.unit.accel.helpers.box import CODE, DATA, STACK, Box

BAD = 0x8000000000000000


@pytest.mark.parametrize(
    ("code", "register", "vector"),
    [
        ("488b07", RDI, GP),  # mov rax, [rdi]
        ("488907", RDI, GP),  # mov [rdi], rax
        ("ff37", RDI, GP),  # push [rdi]: the operand, not the stack
        ("488b4500", RBP, STACK_FAULT),  # mov rax, [rbp]
        ("488b0424", RSP, STACK_FAULT),  # mov rax, [rsp]
        ("50", RSP, STACK_FAULT),  # push rax
        ("58", RSP, STACK_FAULT),  # pop rax
        ("c3", RSP, STACK_FAULT),  # ret
        ("ff37", RSP, STACK_FAULT),  # push [rdi]: the stack, not the operand
        ("c9", RBP, STACK_FAULT),  # leave
        ("9d", RSP, STACK_FAULT),  # popfq
        ("48cf", RSP, STACK_FAULT),  # iretq
        ("0fa0", RSP, STACK_FAULT),  # push fs
        ("0fa1", RSP, STACK_FAULT),  # pop fs
        ("c8100000", RSP, STACK_FAULT),  # enter 16, 0
        ("c8100001", RSP, STACK_FAULT),
        ("8f0424", RSP, STACK_FAULT),  # pop [rsp]
        ("0f015500", RBP, STACK_FAULT),  # lgdt [rbp]
        ("0f0117", RDI, GP),  # lgdt [rdi]
        ("aa", RDI, GP),  # stosb
        ("48ff1f", RDI, GP),  # call far [rdi]
    ],
)
def test_vector(code: str, register: int, vector: int) -> None:
    box = Box()
    box.long_mode()
    box.state.regs[RDI], box.state.regs[RAX] = DATA, 7
    box.state.regs[register] = BAD
    for number in (GP, STACK_FAULT):
        box.gate64(number, 0x7000 + 0x100 * number, ist=1)
    box.put_int(0x4000 + 0x24, 8, STACK)  # IST1 of the TSS
    box.put(0x7000 + 0x100 * vector, "90")
    box.run(code, 1)  # the delivery is no instruction: the handler's first is the one
    assert box.state.rip == 0x7000 + 0x100 * vector + 1
    assert box.clock.instructions == 1
    assert box.frame(2) == [0, CODE]  # the error code, and the instruction itself
