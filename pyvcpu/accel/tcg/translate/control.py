"""Near control flow: JMP, Jcc, CALL, RET, LOOP, JRCXZ. What is far is a helper's."""

from __future__ import annotations

from iced_x86 import Code, Mnemonic, OpKind

from pyvcpu.accel.tcg.builder import MASK, Builder
from pyvcpu.accel.tcg.decode import Insn
from pyvcpu.accel.tcg.translate import UseHelper, translates
from pyvcpu.accel.tcg.translate.data import by_condition
from pyvcpu.cpu.layout import RCX

JUMP = by_condition("J")

_NEAR = frozenset({OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32, OpKind.NEAR_BRANCH64})


def operand_bits(b: Builder, insn: Insn) -> int:
    """Operand size of a near branch: 64-bit code has no other (SDM 2A: the 66 prefix is ignored)."""
    kind = insn.iced.op0_kind
    if kind in _NEAR:
        return {OpKind.NEAR_BRANCH16: 16, OpKind.NEAR_BRANCH32: 32, OpKind.NEAR_BRANCH64: 64}[kind]
    return b.width(insn)


def _refuse_far(insn: Insn) -> None:
    iced = insn.iced
    if iced.is_jmp_far or iced.is_jmp_far_indirect or iced.is_call_far or iced.is_call_far_indirect:
        raise UseHelper


@translates(Mnemonic.JMP)
def jmp(b: Builder, insn: Insn) -> None:
    _refuse_far(insn)
    if insn.iced.op0_kind in _NEAR:
        b.end("goto", insn.iced.near_branch_target)
    else:
        b.end("exiti", b.width(insn), b.read(insn, 0))


@translates(*JUMP)
def jcc(b: Builder, insn: Insn) -> None:
    cond, width, left, right = b.condition(JUMP[insn.mnemonic])
    b.end("br", (cond, width, insn.iced.near_branch_target, insn.next_ip), left, right)


@translates(Mnemonic.CALL)
def call(b: Builder, insn: Insn) -> None:
    _refuse_far(insn)
    width = operand_bits(b, insn)
    back = b.const(insn.next_ip & MASK[width])
    if insn.iced.op0_kind in _NEAR:
        b.push(width, back)
        b.end("goto", insn.iced.near_branch_target)
    else:
        target = b.read(insn, 0)
        b.push(width, back)
        b.end("exiti", width, target)


@translates(Mnemonic.RET)
def ret(b: Builder, insn: Insn) -> None:
    extra = insn.iced.immediate(0) if insn.iced.op_count else 0
    width = (insn.iced.stack_pointer_increment - extra) * 8
    target = b.load(width, b.stack_top())
    b.set_stack_pointer(b.moved_stack_pointer(width // 8 + extra))
    b.end("exiti", width, target)


@translates(Mnemonic.LOOP, Mnemonic.LOOPE, Mnemonic.LOOPNE)
def loop(b: Builder, insn: Insn) -> None:
    """RCX counts down without touching the flags; the counter's width is the address size."""
    width = _COUNTERS[insn.iced.code]
    left = b.op("sub", width, RCX, b.const(1))
    more = left
    if insn.mnemonic != Mnemonic.LOOP:
        # Both conditions as one comparison: the new count, or 0 when the flag says stop.
        cond, cw, x, y = b.condition(4 if insn.mnemonic == Mnemonic.LOOPE else 5)
        more = b.op("movc", (cond, cw), x, y, left, b.const(0))
    if width >= 32:
        b.put(RCX, left, width)
    else:
        b.ops.append(("dep", (0, width), RCX, RCX, left))
    b.end("br", ("ne", width, insn.iced.near_branch_target, insn.next_ip), more, b.const(0))


@translates(Mnemonic.JCXZ, Mnemonic.JECXZ, Mnemonic.JRCXZ)
def jcxz(b: Builder, insn: Insn) -> None:
    width = {Mnemonic.JCXZ: 16, Mnemonic.JECXZ: 32, Mnemonic.JRCXZ: 64}[insn.mnemonic]
    b.end("br", ("eq", width, insn.iced.near_branch_target, insn.next_ip), b.op("mov", width, RCX), b.const(0))


def _counter_widths() -> dict[int, int]:
    bits = {"CX": 16, "ECX": 32, "RCX": 64}
    return {
        value: bits[name.rsplit("_", 1)[1]]
        for name, value in vars(Code).items()
        if name.startswith("LOOP") and isinstance(value, int)
    }


_COUNTERS = _counter_widths()
"""iced Code of a LOOP form -> width of its counter in bits."""
