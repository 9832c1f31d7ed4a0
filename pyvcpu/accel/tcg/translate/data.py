"""Data movement: MOV, MOVZX, MOVSX, LEA, XCHG, CMOVcc, SETcc, PUSH, POP, LEAVE, sign extensions, BSWAP, DF, no-ops."""

from __future__ import annotations

from iced_x86 import Code, Mnemonic, OpKind, Register

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import REGISTERS, Builder, Reg
from pyvcpu.accel.tcg.decode import Insn
from pyvcpu.accel.tcg.translate import UseHelper, translates
from pyvcpu.cpu.layout import RAX, RBP, RDX, SS

_CONDITIONS = ("O", "NO", "B", "AE", "E", "NE", "BE", "A", "S", "NS", "P", "NP", "L", "GE", "LE", "G")


def by_condition(prefix: str) -> dict[int, int]:
    """iced mnemonics of a family (J, SET, CMOV) -> condition code 0..15."""
    return {getattr(Mnemonic, prefix + name): cc for cc, name in enumerate(_CONDITIONS)}


CMOV = by_condition("CMOV")
SET = by_condition("SET")


@translates(Mnemonic.MOV)
def mov(b: Builder, insn: Insn) -> None:
    """General registers, memory and immediates; segment, control and debug registers are the helper's."""
    for i in (0, 1):
        if insn.iced.op_kind(i) == OpKind.REGISTER and insn.iced.op_register(i) not in REGISTERS:
            raise UseHelper
    b.write(insn, 0, b.read(insn, 1))


@translates(Mnemonic.MOVZX)
def movzx(b: Builder, insn: Insn) -> None:
    b.write(insn, 0, b.read(insn, 1))


@translates(Mnemonic.MOVSX, Mnemonic.MOVSXD)
def movsx(b: Builder, insn: Insn) -> None:
    source, target = b.width(insn, 1), b.width(insn, 0)
    value = b.read(insn, 1)
    b.write(insn, 0, b.op("sext", (source, target), value) if source < target else value)


@translates(Mnemonic.LEA)
def lea(b: Builder, insn: Insn) -> None:
    b.write(insn, 0, b.offset(insn.iced))


@translates(Mnemonic.XCHG)
def xchg(b: Builder, insn: Insn) -> None:
    first, second = b.read(insn, 0), b.read(insn, 1)
    b.write(insn, 0, second)  # the memory operand, if there is one, is operand 0
    b.write(insn, 1, first)


@translates(*CMOV)
def cmov(b: Builder, insn: Insn) -> None:
    """The source is read in any case; a 32-bit destination is zero-extended in any case (SDM 2A)."""
    width = b.width(insn)
    source = b.read(insn, 1)
    cond, cw, left, right = b.condition(CMOV[insn.mnemonic])
    old = b.op("mov", width, REGISTERS[insn.iced.op0_register].number)
    b.write(insn, 0, b.op("movc", (cond, cw), left, right, source, old))


@translates(*SET)
def setcc(b: Builder, insn: Insn) -> None:
    cond, width, left, right = b.condition(SET[insn.mnemonic])
    b.write(insn, 0, b.op("setc", (cond, width), left, right))


@translates(Mnemonic.PUSH)
def push(b: Builder, insn: Insn) -> None:
    iced = insn.iced
    kind = iced.op0_kind
    if kind == OpKind.REGISTER and iced.op0_register not in REGISTERS:
        raise UseHelper
    width = abs(iced.stack_pointer_increment) * 8
    b.push(width, b.read(insn, 0))


@translates(Mnemonic.POP)
def pop(b: Builder, insn: Insn) -> None:
    """A memory destination addressed by RSP uses the incremented value (SDM 2B, POP)."""
    iced = insn.iced
    if iced.op0_kind == OpKind.REGISTER and iced.op0_register not in REGISTERS:
        raise UseHelper
    if iced.op0_kind == OpKind.MEMORY and iced.memory_base in (Register.RSP, Register.ESP):
        raise UseHelper
    width = iced.stack_pointer_increment * 8
    value = b.load(width, b.stack_top())
    new = b.moved_stack_pointer(width // 8)
    if iced.op0_kind == OpKind.MEMORY:
        b.write(insn, 0, value)
        b.set_stack_pointer(new)
    else:
        b.set_stack_pointer(new)
        b.write(insn, 0, value)


@translates(Mnemonic.LEAVE)
def leave(b: Builder, insn: Insn) -> None:
    width = {Code.LEAVEQ: 64, Code.LEAVED: 32, Code.LEAVEW: 16}[insn.iced.code]
    value = b.load(width, b.linear(SS, b.op("mov", b.mode.stack, RBP)))
    b.set_stack_pointer(b.op("lea", (1, width // 8, b.mode.stack), RBP, None))
    b.write_register(Reg(RBP, width, 0), value)


@translates(Mnemonic.CBW, Mnemonic.CWDE, Mnemonic.CDQE)
def extend_accumulator(b: Builder, insn: Insn) -> None:
    half = {Mnemonic.CBW: 8, Mnemonic.CWDE: 16, Mnemonic.CDQE: 32}[insn.mnemonic]
    b.write_register(Reg(RAX, 2 * half, 0), b.op("sext", (half, 2 * half), RAX))


@translates(Mnemonic.CWD, Mnemonic.CDQ, Mnemonic.CQO)
def sign_into_rdx(b: Builder, insn: Insn) -> None:
    width = {Mnemonic.CWD: 16, Mnemonic.CDQ: 32, Mnemonic.CQO: 64}[insn.mnemonic]
    b.write_register(Reg(RDX, width, 0), b.op("sar", width, RAX, b.const(width - 1)))


@translates(Mnemonic.BSWAP)
def bswap(b: Builder, insn: Insn) -> None:
    """With a 16-bit operand the result is undefined (SDM 2A); processors clear it, and so does this."""
    width = b.width(insn)
    value = b.const(0) if width == 16 else b.op("bswap", width, b.read(insn, 0))
    b.write(insn, 0, value)


@translates(Mnemonic.CLD, Mnemonic.STD)
def direction(b: Builder, insn: Insn) -> None:
    field = ("rflags", None)
    old = b.op("getf", field)
    if insn.mnemonic == Mnemonic.CLD:
        new = b.op("and", 64, old, b.const(~flags.DF))
    else:
        new = b.op("or", 64, old, b.const(flags.DF))
    b.ops.append(("setf", field, None, new))


@translates(
    Mnemonic.NOP, Mnemonic.PAUSE, Mnemonic.ENDBR64, Mnemonic.ENDBR32, Mnemonic.LFENCE, Mnemonic.MFENCE, Mnemonic.SFENCE,
    Mnemonic.PREFETCHNTA, Mnemonic.PREFETCHT0, Mnemonic.PREFETCHT1, Mnemonic.PREFETCHT2, Mnemonic.PREFETCHW,
    Mnemonic.PREFETCH, Mnemonic.RESERVEDNOP,
)  # fmt: skip
def nothing(b: Builder, insn: Insn) -> None:
    """Hints and fences: one processor, no reordering."""
