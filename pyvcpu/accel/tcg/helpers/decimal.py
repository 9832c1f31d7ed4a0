"""Decimal adjustment: AAA AAS AAM AAD DAA DAS (SDM 2A). Flags that it leaves undefined follow the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Mnemonic

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import Reg
from pyvcpu.accel.tcg.helpers import helper
from pyvcpu.accel.tcg.helpers.operands import read_register, write_register
from pyvcpu.cpu.events import DE, GuestException
from pyvcpu.cpu.layout import RAX

if TYPE_CHECKING:
    from pyvcpu.accel.tcg.decode import Insn
    from pyvcpu.accel.tcg.engine import TcgEngine

_AL, _AX = Reg(RAX, 8, 0), Reg(RAX, 16, 0)


def _finish(e: TcgEngine, register: Reg, value: int, carries: int) -> None:
    """Write the result; SF, ZF and PF are AL's, ``carries`` is the rest of the arithmetic flags."""
    write_register(e, register, value)
    al = value & 0xFF
    image = carries | flags.PARITY[al] | (0 if al else flags.ZF) | (al & flags.SF)
    e.set_rflags(e.get_rflags() & ~flags.ARITHMETIC | image)


@helper(Mnemonic.DAA, Mnemonic.DAS)
def daa(e: TcgEngine, insn: Insn) -> int | None:
    sign = 1 if insn.mnemonic == Mnemonic.DAA else -1
    al, rflags = read_register(e, _AL), e.get_rflags()
    result, carries = al, 0
    if al & 0xF > 9 or rflags & flags.AF:
        result += 6 * sign
        carries |= flags.AF
        if sign < 0 and result < 0:
            carries |= flags.CF
    if al > 0x99 or rflags & flags.CF:
        result += 0x60 * sign
        carries |= flags.CF
    _finish(e, _AL, result & 0xFF, carries)
    return None


@helper(Mnemonic.AAA, Mnemonic.AAS)
def aaa(e: TcgEngine, insn: Insn) -> int | None:
    ax, carries = read_register(e, _AX), 0
    if ax & 0xF > 9 or e.get_rflags() & flags.AF:
        ax = ax + 0x106 if insn.mnemonic == Mnemonic.AAA else ax - 6 - 0x100
        carries = flags.AF | flags.CF
    _finish(e, _AX, ax & 0xFF0F, carries)
    return None


@helper(Mnemonic.AAM)
def aam(e: TcgEngine, insn: Insn) -> int | None:
    base = insn.iced.immediate(0) & 0xFF
    if base == 0:
        raise GuestException(DE)
    high, low = divmod(read_register(e, _AL), base)
    _finish(e, _AX, high << 8 | low, 0)
    return None


@helper(Mnemonic.AAD)
def aad(e: TcgEngine, insn: Insn) -> int | None:
    ax = read_register(e, _AX)
    _finish(e, _AX, (ax & 0xFF) + (ax >> 8) * (insn.iced.immediate(0) & 0xFF) & 0xFF, 0)
    return None
