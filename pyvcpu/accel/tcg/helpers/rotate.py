"""RCL and RCR by any count (SDM 2B): rotation through CF, that is of width + 1 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Mnemonic

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import MASK
from pyvcpu.accel.tcg.helpers import helper
from pyvcpu.accel.tcg.helpers.operands import operand_size, read_operand, write_operand

if TYPE_CHECKING:
    from pyvcpu.accel.tcg.decode import Insn
    from pyvcpu.accel.tcg.engine import TcgEngine


def rotate_through_carry(left: bool, width: int, value: int, carry: int, count: int) -> tuple[int, int]:
    """(result, carry) of a rotation by ``count`` of the ``width`` + 1 bits carry:value."""
    whole = width + 1
    count %= whole
    if not left:
        count = (whole - count) % whole
    wide = carry << width | value
    wide = (wide << count | wide >> (whole - count)) & ((1 << whole) - 1)
    return wide & MASK[width], wide >> width


@helper(Mnemonic.RCL, Mnemonic.RCR)
def rotate(e: TcgEngine, insn: Insn) -> int | None:
    """OF is defined for a count of one only: the change of the top bit, and so it is for all others."""
    width = 8 * operand_size(insn, 0)
    count = read_operand(e, insn, 1) & (63 if width == 64 else 31)
    value = read_operand(e, insn, 0)
    rflags = e.get_rflags()
    result, carry = rotate_through_carry(insn.mnemonic == Mnemonic.RCL, width, value, rflags & flags.CF, count)
    write_operand(e, insn, 0, result)
    if count % (width + 1):
        rflags &= ~(flags.CF | flags.OF)
        e.set_rflags(rflags | carry | (value ^ result) >> (width - 1) << 11)
    return None
