"""MOV, PUSH and POP in the forms that no translator takes: by the operand, each goes to its own helper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Mnemonic, OpKind, Register

from pyvcpu.accel.tcg.builder import MASK, REGISTERS, SEGMENTS
from pyvcpu.accel.tcg.frames import linear, stack_pointer
from pyvcpu.accel.tcg.helpers import helper
from pyvcpu.accel.tcg.helpers.operands import memory_offset, operand_size, pop_values, set_stack_pointer
from pyvcpu.accel.tcg.helpers.segment import move_segment, pop_segment, push_segment
from pyvcpu.accel.tcg.helpers.system import move_control, move_debug
from pyvcpu.cpu.events import UD, GuestException
from pyvcpu.cpu.layout import SS

if TYPE_CHECKING:
    from pyvcpu.accel.tcg.decode import Insn
    from pyvcpu.accel.tcg.engine import TcgEngine


@helper(Mnemonic.MOV)
def mov(e: TcgEngine, insn: Insn) -> int | None:
    """Segment, control and debug registers."""
    for i in (0, 1):
        if insn.iced.op_kind(i) == OpKind.REGISTER:
            register = insn.iced.op_register(i)
            if Register.CR0 <= register <= Register.CR15:
                return move_control(e, insn)
            if Register.DR0 <= register <= Register.DR15:
                return move_debug(e, insn)
            if register in SEGMENTS:
                return move_segment(e, insn)
    raise GuestException(UD)  # test registers, which went away with the 486


@helper(Mnemonic.PUSH)
def push(e: TcgEngine, insn: Insn) -> int | None:
    return push_segment(e, insn)


@helper(Mnemonic.POP)
def pop(e: TcgEngine, insn: Insn) -> int | None:
    """A segment register, or memory addressed by RSP: its address counts from the new RSP (SDM 2B, POP)."""
    iced = insn.iced
    if iced.op0_kind == OpKind.REGISTER:
        return pop_segment(e, insn)
    size = iced.stack_pointer_increment
    (value,) = pop_values(e, size, 1)
    width = REGISTERS[iced.memory_base].width
    offset = memory_offset(e, insn) + size & MASK[width]
    e.mmu.write(linear(e, SEGMENTS.get(iced.memory_segment, SS), offset), operand_size(insn, 0), value)
    set_stack_pointer(e, stack_pointer(e) + size)
    return None
