"""RDTSC, RDTSCP, RDPMC."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Mnemonic

from pyvcpu.accel.tcg.helpers import helper
from pyvcpu.cpu.events import GP, GuestException
from pyvcpu.cpu.layout import RAX, RCX, RDX
from pyvcpu.cpu.msr import tsc

if TYPE_CHECKING:
    from pyvcpu.accel.tcg.decode import Insn
    from pyvcpu.accel.tcg.engine import TcgEngine

CR4_TSD = 1 << 2


@helper(Mnemonic.RDTSC, Mnemonic.RDTSCP)
def rdtsc(e: TcgEngine, insn: Insn) -> int | None:
    """What has retired before this instruction counts, this one does not."""
    if e.state.cr4 & CR4_TSD and e.cpl:
        raise GuestException(GP, 0)
    value, regs = tsc(e), e.state.regs
    regs[RAX], regs[RDX] = value & 0xFFFFFFFF, value >> 32
    if insn.mnemonic == Mnemonic.RDTSCP:
        regs[RCX] = e.state.tsc_aux & 0xFFFFFFFF
    return None


@helper(Mnemonic.RDPMC)
def rdpmc(e: TcgEngine, insn: Insn) -> int | None:
    """There are no counters, so no index is valid."""
    raise GuestException(GP, 0)
