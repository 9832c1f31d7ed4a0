"""Integer arithmetic and logic: ADD ADC SUB SBB CMP AND OR XOR TEST NEG NOT INC DEC, CMPXCHG, XADD, the carry flag."""

from __future__ import annotations

from iced_x86 import Mnemonic, OpKind

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import REGISTERS, Builder, Reg
from pyvcpu.accel.tcg.decode import Insn
from pyvcpu.accel.tcg.translate import translates
from pyvcpu.cpu.layout import RAX


def _operands(b: Builder, insn: Insn) -> tuple[int, int, int]:
    """Width, left and right operand; an immediate is taken at the width."""
    width = b.width(insn)
    right = b.read(insn, 1)
    left = b.read(insn, 0)
    if right < 0:
        right = b.const(b.consts[-1 - right] & ((1 << width) - 1))
    return width, left, right


@translates(Mnemonic.ADD)
def add(b: Builder, insn: Insn) -> None:
    width, left, right = _operands(b, insn)
    result = b.op("add", width, left, right)
    b.write(insn, 0, result)
    b.set_flags(flags.ADD, width, result, right)


@translates(Mnemonic.SUB)
def sub(b: Builder, insn: Insn) -> None:
    width, left, right = _operands(b, insn)
    result = b.op("sub", width, left, right)
    b.write(insn, 0, result)
    b.set_flags(flags.SUB, width, result, right, left)


@translates(Mnemonic.CMP)
def cmp(b: Builder, insn: Insn) -> None:
    width, left, right = _operands(b, insn)
    b.set_flags(flags.SUB, width, b.op("sub", width, left, right), right, left)


@translates(Mnemonic.AND, Mnemonic.OR, Mnemonic.XOR)
def logic(b: Builder, insn: Insn) -> None:
    name = {Mnemonic.AND: "and", Mnemonic.OR: "or", Mnemonic.XOR: "xor"}[insn.mnemonic]
    width = b.width(insn)
    iced = insn.iced
    if (
        name == "xor"
        and iced.op1_kind == OpKind.REGISTER
        and iced.op0_kind == OpKind.REGISTER
        and (iced.op0_register == iced.op1_register)
    ):
        result = b.const(0)
    else:
        width, left, right = _operands(b, insn)
        result = b.op(name, width, left, right)
    b.write(insn, 0, result)
    b.set_flags(flags.LOGIC, width, result, b.const(0))


@translates(Mnemonic.TEST)
def test(b: Builder, insn: Insn) -> None:
    width, left, right = _operands(b, insn)
    b.set_flags(flags.LOGIC, width, b.op("and", width, left, right), b.const(0))


@translates(Mnemonic.INC, Mnemonic.DEC)
def step(b: Builder, insn: Insn) -> None:
    width = b.width(insn)
    carry = b.carry()
    up = insn.mnemonic == Mnemonic.INC
    result = b.op("add" if up else "sub", width, b.read(insn, 0), b.const(1))
    b.write(insn, 0, result)
    b.set_flags(flags.INC if up else flags.DEC, width, result, carry)


@translates(Mnemonic.NEG)
def neg(b: Builder, insn: Insn) -> None:
    width = b.width(insn)
    right = b.read(insn, 0)
    zero = b.const(0)
    result = b.op("sub", width, zero, right)
    b.write(insn, 0, result)
    b.set_flags(flags.SUB, width, result, right, zero)


@translates(Mnemonic.NOT)
def complement(b: Builder, insn: Insn) -> None:
    width = b.width(insn)
    b.write(insn, 0, b.op("xor", width, b.read(insn, 0), b.const(-1)))


@translates(Mnemonic.ADC, Mnemonic.SBB)
def with_carry(b: Builder, insn: Insn) -> None:
    """The flags are computed whole: carry in and carry out need one bit more than the width."""
    carry = b.carry()
    width, left, right = _operands(b, insn)
    adding = insn.mnemonic == Mnemonic.ADC
    name = "add" if adding else "sub"
    partial = b.op(name, width, left, right)
    result = b.op(name, width, partial, carry)
    image = carry_flags(b, width, left, right, carry, partial, result, adding)
    b.write(insn, 0, result)
    b.set_eflags(image)


def carry_flags(
    b: Builder, width: int, left: int, right: int, carry: int, partial: int, result: int, adding: bool
) -> int:
    """EFLAGS image of left +- right +- carry."""
    if adding:
        out = b.op("or", 64, b.op("setc", ("ltu", width), partial, left), b.op("setc", ("ltu", width), result, carry))
        overflow = b.op("and", width, b.op("xor", width, left, result), b.op("xor", width, right, result))
    else:
        out = b.op("or", 64, b.op("setc", ("ltu", width), left, right), b.op("setc", ("ltu", width), partial, carry))
        overflow = b.op("and", width, b.op("xor", width, left, right), b.op("xor", width, left, result))
    image = b.op("cce", (flags.LOGIC, width), result, b.const(0))  # PF ZF SF
    half = b.op("and", 64, b.op("xor", width, b.op("xor", width, left, right), result), b.const(flags.AF))
    top = b.op("shl", 64, b.op("extr", (width - 1, 1), overflow), b.const(11))
    return b.op("or", 64, b.op("or", 64, image, out), b.op("or", 64, half, top))


@translates(Mnemonic.CMPXCHG)
def cmpxchg(b: Builder, insn: Insn) -> None:
    """A memory destination is written in every case (SDM 2A); a register that differs keeps all its 64 bits."""
    width = b.width(insn)
    accumulator = Reg(RAX, width, 0)
    old = b.read(insn, 0)
    expected = b.read_register(accumulator)
    new = b.read(insn, 1)
    kept = b.op("movc", ("eq", width), expected, old, b.op("mov", 64, RAX), _merged(b, accumulator, old))
    difference = b.op("sub", width, expected, old)
    if insn.iced.op0_kind == OpKind.REGISTER:
        target = REGISTERS[insn.iced.op0_register]
        if width >= 32:
            written = b.op("mov", width, new)
        else:
            written = b.op("dep", (target.low, width), target.number, new)
        other = kept if target.number == RAX else b.op("mov", 64, target.number)  # of AH, AL may differ
        result = b.op("movc", ("eq", width), expected, old, written, other)
        b.put(RAX, kept)
        b.put(target.number, result)
    else:
        b.write(insn, 0, b.op("movc", ("eq", width), expected, old, new, old))
        b.put(RAX, kept)
    b.set_flags(flags.SUB, width, difference, old, expected)


def _merged(b: Builder, reg: Reg, value: int) -> int:
    """The whole 64-bit register after a write of ``value`` to its low part."""
    if reg.width == 64:
        return value
    if reg.width == 32:
        return b.op("mov", 32, value)
    return b.op("dep", (0, reg.width), reg.number, value)


@translates(Mnemonic.XADD)
def xadd(b: Builder, insn: Insn) -> None:
    width = b.width(insn)
    old = b.read(insn, 0)
    addend = b.read(insn, 1)
    result = b.op("add", width, old, addend)
    if insn.iced.op0_kind == OpKind.REGISTER:
        b.write(insn, 1, old)
        b.write(insn, 0, result)
    else:
        b.write(insn, 0, result)
        b.write(insn, 1, old)
    b.set_flags(flags.ADD, width, result, addend)


@translates(Mnemonic.CLC, Mnemonic.STC, Mnemonic.CMC)
def carry_flag(b: Builder, insn: Insn) -> None:
    image = b.eflags()
    if insn.mnemonic == Mnemonic.CLC:
        image = b.op("and", 64, image, b.const(~flags.CF))
    elif insn.mnemonic == Mnemonic.STC:
        image = b.op("or", 64, image, b.const(flags.CF))
    else:
        image = b.op("xor", 64, image, b.const(flags.CF))
    b.set_eflags(image)
