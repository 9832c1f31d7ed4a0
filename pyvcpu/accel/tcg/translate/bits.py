"""Bit tests and scans: BT BTS BTR BTC BSF BSR.

TZCNT and LZCNT are BSF and BSR on a processor whose CPUID lacks BMI1 and LZCNT, as ours does.
"""

from __future__ import annotations

from iced_x86 import Mnemonic, OpKind

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import REGISTERS, SEGMENTS, Builder
from pyvcpu.accel.tcg.decode import Insn
from pyvcpu.accel.tcg.translate import translates


@translates(Mnemonic.BT, Mnemonic.BTS, Mnemonic.BTR, Mnemonic.BTC)
def bit_test(b: Builder, insn: Insn) -> None:
    """A register bit offset reaches beyond a memory operand, signed, in units of the operand (SDM 2A, table 3-2)."""
    width = b.width(insn)
    selector = b.read(insn, 1)
    bit = b.op("and", 64, selector, b.const(width - 1))
    in_memory = insn.iced.op0_kind == OpKind.MEMORY
    address = 0
    if in_memory:
        address = b.address(insn)
        if insn.iced.op1_kind == OpKind.REGISTER:
            address = _displaced(b, insn, selector, width)
        value = b.load(width, address)
    else:
        value = b.read(insn, 0)
    tested = b.op("and", 64, b.op("shr", width, value, bit), b.const(1))
    image = b.op("or", 64, b.op("and", 64, b.eflags(), b.const(~flags.CF)), tested)
    if insn.mnemonic != Mnemonic.BT:
        mask = b.op("shl", width, b.const(1), bit)
        if insn.mnemonic == Mnemonic.BTS:
            result = b.op("or", width, value, mask)
        elif insn.mnemonic == Mnemonic.BTC:
            result = b.op("xor", width, value, mask)
        else:
            result = b.op("and", width, value, b.op("xor", width, mask, b.const(-1)))
        if in_memory:
            b.store(width, address, result)
        else:
            b.write(insn, 0, result)
    b.set_eflags(image)


def _displaced(b: Builder, insn: Insn, selector: int, width: int) -> int:
    """Linear address of the operand-sized unit that holds the bit."""
    address_width = b.address_width(insn.iced)
    signed = selector if width == 64 else b.op("sext", (width, 64), selector)
    units = b.op("sar", 64, signed, b.const({16: 4, 32: 5, 64: 6}[width]))
    offset = b.op("lea", (width // 8, 0, address_width), b.offset(insn.iced), units)
    return b.linear(SEGMENTS[insn.iced.memory_segment], offset)


@translates(Mnemonic.BSF, Mnemonic.BSR, Mnemonic.TZCNT, Mnemonic.LZCNT)
def bit_scan(b: Builder, insn: Insn) -> None:
    """A zero source leaves the destination as it was, all 64 bits of it (AMD 3; Intel's processors do the same)."""
    width = b.width(insn)
    name = "ctz" if insn.mnemonic in (Mnemonic.BSF, Mnemonic.TZCNT) else "bsr"
    source = b.read(insn, 1)
    # The op wants a non-zero value: with bit `width - 1` or 0 forced where the result is thrown away.
    safe = b.op("movc", ("eq", width), source, b.const(0), b.const(1), source)
    found = b.op(name, width, safe)
    target = REGISTERS[insn.iced.op0_register]
    whole = b.op("dep", (0, 16), target.number, found) if width == 16 else found
    b.put(target.number, b.op("movc", ("eq", width), source, b.const(0), target.number, whole))
    b.set_flags(flags.LOGIC, width, b.op("mov", width, source), b.const(0))
