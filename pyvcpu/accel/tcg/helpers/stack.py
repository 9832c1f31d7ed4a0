"""Stack frames and the rest that is too rare to translate: ENTER, PUSHA, POPA, BOUND, XLAT, CMPXCHG8B and 16B."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Code, Mnemonic

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import MASK, Reg
from pyvcpu.accel.tcg.frames import stack_pointer
from pyvcpu.accel.tcg.helpers import helper
from pyvcpu.accel.tcg.helpers.operands import (
    effective_address,
    operand_size,
    pop_values,
    push_values,
    read_operand,
    set_stack_pointer,
    stack_address,
    write_register,
)
from pyvcpu.cpu.events import BR, GP, GuestException
from pyvcpu.cpu.layout import RAX, RBP, RBX, RCX, RDX, RSP

if TYPE_CHECKING:
    from pyvcpu.accel.tcg.decode import Insn
    from pyvcpu.accel.tcg.engine import TcgEngine

_ENTER = {Code.ENTERW_IMM16_IMM8: 2, Code.ENTERD_IMM16_IMM8: 4, Code.ENTERQ_IMM16_IMM8: 8}


@helper(Mnemonic.ENTER)
def enter(e: TcgEngine, insn: Insn) -> int | None:
    """Push RBP and, for a nested procedure, the enclosing frame pointers; make room for the locals."""
    size, regs = _ENTER[insn.iced.code], e.state.regs
    room, level = insn.iced.immediate(0), insn.iced.immediate(1) & 31
    frame = stack_pointer(e) - size
    values = [regs[RBP]]
    values += [e.mmu.read(stack_address(e, regs[RBP] - i * size), size) for i in range(1, level)]
    if level:
        values.append(frame)
    push_values(e, size, values)
    set_stack_pointer(e, stack_pointer(e) - room)
    write_register(e, Reg(RBP, 8 * size, 0), frame)
    return None


@helper(Mnemonic.PUSHA, Mnemonic.PUSHAD)
def pusha(e: TcgEngine, insn: Insn) -> int | None:
    """All eight, RSP as it was before."""
    push_values(e, 2 if insn.mnemonic == Mnemonic.PUSHA else 4, [e.state.regs[i] for i in range(8)])
    return None


@helper(Mnemonic.POPA, Mnemonic.POPAD)
def popa(e: TcgEngine, insn: Insn) -> int | None:
    """All eight but RSP, whose value is skipped."""
    size = 2 if insn.mnemonic == Mnemonic.POPA else 4
    values = pop_values(e, size, 8)
    set_stack_pointer(e, stack_pointer(e) + 8 * size)
    for i, value in enumerate(reversed(values)):
        if i != RSP:
            write_register(e, Reg(i, 8 * size, 0), value)
    return None


@helper(Mnemonic.BOUND)
def bound(e: TcgEngine, insn: Insn) -> int | None:
    """#BR unless lower <= index <= upper, signed."""
    size = operand_size(insn, 0)
    sign, mask = 1 << (8 * size - 1), MASK[8 * size]
    raw = e.mmu.read(effective_address(e, insn), 2 * size)
    index, lower, upper = ((v & mask ^ sign) - sign for v in (read_operand(e, insn, 0), raw, raw >> 8 * size))
    if not lower <= index <= upper:
        raise GuestException(BR)
    return None


@helper(Mnemonic.XLATB)
def xlat(e: TcgEngine, insn: Insn) -> int | None:
    """AL = [RBX + AL]: the decoder gives AL as the index."""
    write_register(e, Reg(RAX, 8, 0), e.mmu.read(effective_address(e, insn), 1))
    return None


@helper(Mnemonic.CMPXCHG8B, Mnemonic.CMPXCHG16B)
def cmpxchg_pair(e: TcgEngine, insn: Insn) -> int | None:
    """The destination is written in either case, so a page fault is one of a write."""
    size = 8 if insn.mnemonic == Mnemonic.CMPXCHG8B else 16
    half, regs = 4 * size, e.state.regs
    mask = MASK[half]
    at = effective_address(e, insn)
    if size == 16 and at & 15:
        raise GuestException(GP, 0)
    e.mmu.check_write(at, size)
    old = e.mmu.read(at, size)
    equal = old == (regs[RDX] & mask) << half | regs[RAX] & mask
    e.mmu.write(at, size, (regs[RCX] & mask) << half | regs[RBX] & mask if equal else old)
    if not equal:
        regs[RAX], regs[RDX] = old & mask, old >> half
    e.set_rflags(e.get_rflags() & ~flags.ZF | (flags.ZF if equal else 0))
    return None
