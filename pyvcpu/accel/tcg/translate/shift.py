"""Shifts and rotates: SHL SHR SAR ROL ROR SHLD SHRD, and RCL RCR by one (other counts are a helper's)."""

from __future__ import annotations

from iced_x86 import Mnemonic

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import IMMEDIATES, Builder
from pyvcpu.accel.tcg.decode import Insn
from pyvcpu.accel.tcg.ops import CC_DST, CC_OP, CC_SRC
from pyvcpu.accel.tcg.translate import UseHelper, translates


def _count(b: Builder, insn: Insn, operand: int, width: int) -> tuple[int, int | None]:
    """The masked count as an id, and as a number where it is known (SDM 2B: 5 bits, 6 for 64-bit operands)."""
    mask = 63 if width == 64 else 31
    raw = b.read(insn, operand)
    if raw < 0:
        known = b.consts[-1 - raw] & mask
        return b.const(known), known
    return b.op("and", 64, raw, b.const(mask)), None


@translates(Mnemonic.SHL, Mnemonic.SAL, Mnemonic.SHR, Mnemonic.SAR)
def shift(b: Builder, insn: Insn) -> None:
    width = b.width(insn)
    kind, name = {
        Mnemonic.SHR: (flags.SHR, "shr"), Mnemonic.SAR: (flags.SAR, "sar"),
    }.get(insn.mnemonic, (flags.SHL, "shl"))  # fmt: skip
    count, known = _count(b, insn, 1, width)
    value = b.read(insn, 0)
    if known == 0:
        b.write(insn, 0, value)
        return
    result = b.op(name, width, value, count)
    before = b.op(name, width, value, b.op("sub", 64, count, b.const(1)))
    b.write(insn, 0, result)
    _shift_flags(b, kind, width, count, known, result, before)


def _shift_flags(b: Builder, kind: int, width: int, count: int, known: int | None, result: int, before: int) -> None:
    """A count of zero leaves the flags alone."""
    if known is not None:
        b.set_flags(kind, width, result, before)
        return
    zero = b.const(0)
    op = b.const(flags.cc_op(kind, width))
    kept = [b.op("movc", ("eq", 8), count, zero, *pair) for pair in ((CC_OP, op), (CC_DST, result), (CC_SRC, before))]
    for register, value in zip((CC_OP, CC_DST, CC_SRC), kept, strict=True):
        b.put(register, value)
    b.forget_flags()


@translates(Mnemonic.SHLD, Mnemonic.SHRD)
def double_shift(b: Builder, insn: Insn) -> None:
    """Counts above 16 of a 16-bit operand are undefined in the SDM; here the bits go round, as on processors."""
    width = b.width(insn)
    left = insn.mnemonic == Mnemonic.SHLD
    count, known = _count(b, insn, 2, width)
    filler = b.read(insn, 1)
    value = b.read(insn, 0)
    if known == 0:
        b.write(insn, 0, value)
        return
    less = b.op("sub", 64, count, b.const(1))
    if width == 16:
        wide = _sandwich(b, value, filler)
        if left:
            result = b.op("extr", (32, 16), b.op("shl", 64, wide, count))
            before = b.op("extr", (32, 16), b.op("shl", 64, wide, less))
        else:
            result = b.op("mov", 16, b.op("shr", 64, wide, count))
            before = b.op("mov", 16, b.op("shr", 64, wide, less))
    else:
        # filler moved by width - count, in two steps because a count of 0 would be a shift by the whole width
        opposite = b.op("sub", 64, b.const(width - 1), count)
        one = b.const(1)
        if left:
            rest = b.op("shr", width, b.op("shr", width, filler, one), opposite)
            before = b.op("shl", width, value, less)
            result = b.op("or", width, b.op("shl", width, value, count), rest)
        else:
            rest = b.op("shl", width, b.op("shl", width, filler, one), opposite)
            before = b.op("shr", width, value, less)
            result = b.op("or", width, b.op("shr", width, value, count), rest)
    if known is None and width == 32:
        result = b.op("movc", ("eq", 8), count, b.const(0), b.op("mov", 32, value), result)
    elif known is None:
        result = b.op("movc", ("eq", 8), count, b.const(0), value, result)
    b.write(insn, 0, result)
    # The last bit out of SHRD is bit 0 of `before`, and OF is the change of sign, as SHR's formula has it
    # only when `before` is the original value (count 1), which is the one defined case.
    _shift_flags(b, flags.SHL if left else flags.SHR, width, count, known, result, before)


def _sandwich(b: Builder, value: int, filler: int) -> int:
    """value : filler : value, 16 bits each."""
    return b.op("dep", (32, 16), b.op("dep", (16, 16), b.op("mov", 16, value), filler), value)


@translates(Mnemonic.ROL, Mnemonic.ROR)
def rotate(b: Builder, insn: Insn) -> None:
    """Only CF and OF change; OF is defined for a count of one, and its formula is used for all."""
    width = b.width(insn)
    left = insn.mnemonic == Mnemonic.ROL
    count, known = _count(b, insn, 1, width)
    value = b.read(insn, 0)
    if known == 0:
        b.write(insn, 0, value)
        return
    by = count if left else b.op("sub", 64, b.const(2 * width), count)
    result = b.op("rotl", width, value, b.op("and", 64, by, b.const(width - 1)))
    top = b.op("extr", (width - 1, 1), result)
    old = b.eflags()
    if left:
        carry = b.op("and", 64, result, b.const(1))
        overflow = b.op("xor", 64, top, carry)
    else:
        carry = top
        overflow = b.op("xor", 64, top, b.op("extr", (width - 2, 1), result))
    image = _with_carry_and_overflow(b, old, carry, overflow)
    if known is None:
        image = b.op("movc", ("eq", 8), count, b.const(0), old, image)
    b.write(insn, 0, result)
    b.set_eflags(image)


def _with_carry_and_overflow(b: Builder, old: int, carry: int, overflow: int) -> int:
    rest = b.op("and", 64, old, b.const(~(flags.CF | flags.OF)))
    return b.op("or", 64, b.op("or", 64, rest, carry), b.op("shl", 64, overflow, b.const(11)))


@translates(Mnemonic.RCL, Mnemonic.RCR)
def rotate_through_carry(b: Builder, insn: Insn) -> None:
    width = b.width(insn)
    if insn.iced.op1_kind not in IMMEDIATES or insn.iced.immediate(1) & (63 if width == 64 else 31) != 1:
        raise UseHelper
    value = b.read(insn, 0)
    old = b.eflags()
    carry_in = b.op("and", 64, old, b.const(1))
    one = b.const(1)
    if insn.mnemonic == Mnemonic.RCL:
        result = b.op("or", width, b.op("shl", width, value, one), carry_in)
        carry = b.op("extr", (width - 1, 1), value)
        overflow = b.op("xor", 64, b.op("extr", (width - 1, 1), result), carry)
    else:
        result = b.op("dep", (width - 1, 1), b.op("shr", width, value, one), carry_in)
        carry = b.op("and", 64, value, one)
        overflow = b.op("xor", 64, b.op("extr", (width - 1, 1), result), b.op("extr", (width - 2, 1), result))
    image = _with_carry_and_overflow(b, old, carry, overflow)
    b.write(insn, 0, result)
    b.set_eflags(image)
