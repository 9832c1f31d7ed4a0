"""Moves of XMM registers: MOVD MOVQ MOVAPS MOVAPD MOVUPS MOVUPD MOVDQA MOVDQU (SDM 2B). No arithmetic.

Enough for code that keeps values in XMM registers; QEMU's own test guests do. State is whole: every
stream carries these registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Mnemonic, OpKind, Register

from pyvcpu.accel.tcg.builder import REGISTERS
from pyvcpu.accel.tcg.helpers import helper
from pyvcpu.accel.tcg.helpers.operands import effective_address, read_register, unsupported, write_register
from pyvcpu.cpu.events import GP, NM, UD, GuestException

if TYPE_CHECKING:
    from pyvcpu.accel.tcg.decode import Insn
    from pyvcpu.accel.tcg.engine import TcgEngine

CR0_EM, CR0_TS, CR4_OSFXSR = 1 << 2, 1 << 3, 1 << 9
XMM = {getattr(Register, f"XMM{n}"): n for n in range(16)}

_WHOLE = frozenset({
    Mnemonic.MOVAPS, Mnemonic.MOVAPD, Mnemonic.MOVUPS, Mnemonic.MOVUPD, Mnemonic.MOVDQA, Mnemonic.MOVDQU,
})  # fmt: skip
_ALIGNED = frozenset({Mnemonic.MOVAPS, Mnemonic.MOVAPD, Mnemonic.MOVDQA})


def check_sse(e: TcgEngine) -> None:
    """#UD and #NM as SDM 3A table 13-1 has them."""
    if e.state.cr0 & CR0_EM or not e.state.cr4 & CR4_OSFXSR:
        raise GuestException(UD)
    if e.state.cr0 & CR0_TS:
        raise GuestException(NM)


@helper(Mnemonic.MOVD, Mnemonic.MOVQ, *_WHOLE)
def move_xmm(e: TcgEngine, insn: Insn) -> int | None:
    """What is narrower than a register clears its upper part."""
    iced = insn.iced
    for i in (0, 1):
        register = iced.op_register(i)
        if iced.op_kind(i) == OpKind.REGISTER and register not in XMM and register not in REGISTERS:
            unsupported(e, insn, "MMX registers are not there yet")
    check_sse(e)
    size = 16 if insn.mnemonic in _WHOLE else 4 if insn.mnemonic == Mnemonic.MOVD else 8
    address = 0
    if OpKind.MEMORY in (iced.op0_kind, iced.op1_kind):
        address = effective_address(e, insn)
        if insn.mnemonic in _ALIGNED and address & 15:
            raise GuestException(GP, 0)
    if iced.op1_kind == OpKind.MEMORY:
        value = int.from_bytes(e.mmu.read_bytes(address, size), "little")
    elif iced.op1_register in XMM:
        n = XMM[iced.op1_register]
        value = (e.state.xmm[2 * n] | e.state.xmm[2 * n + 1] << 64) & ((1 << 8 * size) - 1)
    else:
        value = read_register(e, REGISTERS[iced.op1_register])
    if iced.op0_kind == OpKind.MEMORY:
        e.mmu.write_bytes(address, value.to_bytes(size, "little"))
    elif iced.op0_register in XMM:
        n = XMM[iced.op0_register]
        e.state.xmm[2 * n], e.state.xmm[2 * n + 1] = value & (1 << 64) - 1, value >> 64
    else:
        write_register(e, REGISTERS[iced.op0_register], value)
    return None
