"""PUSHF, POPF, LAHF, SAHF, CLI, STI: RFLAGS as a value, and the interrupt flag."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Mnemonic

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import MASK, Reg
from pyvcpu.accel.tcg.frames import stack_pointer
from pyvcpu.accel.tcg.helpers import helper
from pyvcpu.accel.tcg.helpers.operands import pop_values, push_values, read_register, set_stack_pointer, write_register
from pyvcpu.accel.tcg.helpers.segment import refuse_v86
from pyvcpu.cpu.events import GP, GuestException
from pyvcpu.cpu.layout import RAX

if TYPE_CHECKING:
    from pyvcpu.accel.tcg.decode import Insn
    from pyvcpu.accel.tcg.engine import TcgEngine

_PUSH = {Mnemonic.PUSHF: 2, Mnemonic.PUSHFD: 4, Mnemonic.PUSHFQ: 8}
_POP = {Mnemonic.POPF: 2, Mnemonic.POPFD: 4, Mnemonic.POPFQ: 8}
_ANYBODY = flags.ARITHMETIC | flags.TF | flags.DF | flags.NT | flags.AC | flags.ID
_AH = Reg(RAX, 8, 8)
_LOW = flags.SF | flags.ZF | flags.AF | flags.PF | flags.CF


@helper(*_PUSH)
def pushf(e: TcgEngine, insn: Insn) -> int | None:
    """RF and VM are pushed as 0."""
    refuse_v86(e, insn)
    push_values(e, _PUSH[insn.mnemonic], [e.get_rflags() & ~(flags.VM | flags.RF)])
    return None


@helper(*_POP)
def popf(e: TcgEngine, insn: Insn) -> int | None:
    """IOPL needs CPL 0, IF needs CPL <= IOPL: without it they stay, and nothing faults."""
    refuse_v86(e, insn)
    size = _POP[insn.mnemonic]
    (value,) = pop_values(e, size, 1)
    old = e.get_rflags()
    mask = _ANYBODY
    if e.cpl == 0:
        mask |= flags.IOPL
    if e.cpl <= old >> 12 & 3:
        mask |= flags.IF
    mask &= MASK[8 * size]
    set_stack_pointer(e, stack_pointer(e) + size)
    e.set_rflags(old & ~mask | value & mask)
    return None


@helper(Mnemonic.LAHF)
def lahf(e: TcgEngine, insn: Insn) -> int | None:
    write_register(e, _AH, e.get_rflags() & _LOW | 2)
    return None


@helper(Mnemonic.SAHF)
def sahf(e: TcgEngine, insn: Insn) -> int | None:
    e.set_rflags(e.get_rflags() & ~_LOW | read_register(e, _AH) & _LOW)
    return None


def _require_iopl(e: TcgEngine) -> None:
    if e.cpl > e.state.rflags >> 12 & 3:
        raise GuestException(GP, 0)


@helper(Mnemonic.CLI)
def cli(e: TcgEngine, insn: Insn) -> int | None:
    refuse_v86(e, insn)
    _require_iopl(e)
    e.state.rflags &= ~flags.IF
    return None


@helper(Mnemonic.STI)
def sti(e: TcgEngine, insn: Insn) -> int | None:
    """Interrupts wait for one more instruction, if they were off."""
    refuse_v86(e, insn)
    _require_iopl(e)
    if not e.state.rflags & flags.IF:
        e.state.rflags |= flags.IF
        e.state.interrupt_shadow = 1
    return None
