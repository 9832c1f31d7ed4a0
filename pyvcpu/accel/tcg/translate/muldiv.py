"""Multiplication and division: MUL IMUL DIV IDIV."""

from __future__ import annotations

from iced_x86 import Mnemonic

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import MASK, Builder, Reg
from pyvcpu.accel.tcg.decode import Insn
from pyvcpu.accel.tcg.translate import translates
from pyvcpu.cpu.layout import RAX, RDX

_AH = Reg(RAX, 8, 8)


@translates(Mnemonic.MUL)
def mul(b: Builder, insn: Insn) -> None:
    _one_operand(b, insn, "mulhu")


@translates(Mnemonic.IMUL)
def imul(b: Builder, insn: Insn) -> None:
    """One operand: RDX:RAX. Two or three: the low half, CF and OF when it is not the whole product."""
    if insn.iced.op_count == 1:
        _one_operand(b, insn, "mulhs")
        return
    width = b.width(insn)
    three = insn.iced.op_count == 3
    right = b.read(insn, 2 if three else 1)
    left = b.read(insn, 1 if three else 0)
    if right < 0:
        right = b.const(b.consts[-1 - right] & MASK[width])
    low = b.op("mul", width, left, right)
    overflow = _signed_overflow(b, width, low, b.op("mulhs", width, left, right))
    b.write(insn, 0, low)
    b.set_flags(flags.MUL, width, low, overflow)


def _signed_overflow(b: Builder, width: int, low: int, high: int) -> int:
    """1 if the upper half is not the sign of the lower."""
    return b.op("setc", ("ne", width), high, b.op("sar", width, low, b.const(width - 1)))


def _one_operand(b: Builder, insn: Insn, upper: str) -> None:
    width = b.width(insn)
    right = b.read(insn, 0)
    left = b.op("mov", width, RAX)
    low = b.op("mul", width, left, right)
    high = b.op(upper, width, left, right)
    overflow = (
        b.op("setc", ("ne", width), high, b.const(0)) if upper == "mulhu" else _signed_overflow(b, width, low, high)
    )
    b.write_register(Reg(RAX, width, 0), low)
    b.write_register(_AH if width == 8 else Reg(RDX, width, 0), high)
    b.set_flags(flags.MUL, width, low, overflow)


@translates(Mnemonic.DIV, Mnemonic.IDIV)
def div(b: Builder, insn: Insn) -> None:
    """#DE on a zero divisor and on a quotient that does not fit; the flags, undefined in the SDM, stay."""
    width = b.width(insn)
    sign = "s" if insn.mnemonic == Mnemonic.IDIV else "u"
    divisor = b.read(insn, 0)
    low = b.op("mov", width, RAX)
    high_reg = _AH if width == 8 else Reg(RDX, width, 0)
    high = b.read_register(high_reg)
    results = []
    for part in "qr":
        dest = b.temp()
        b.ops.append((f"{sign}div{part}", (width, b.index), dest, high, low, divisor))
        results.append(dest)
    b.write_register(Reg(RAX, width, 0), results[0])
    b.write_register(high_reg, results[1])
