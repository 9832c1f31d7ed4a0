"""IN and OUT, and who may use which port (SDM 1 chapter 19)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Mnemonic

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.helpers import helper
from pyvcpu.accel.tcg.helpers.operands import operand_size, read_operand, write_operand
from pyvcpu.cpu.events import GP, GuestException
from pyvcpu.cpu.layout import TR

if TYPE_CHECKING:
    from pyvcpu.accel.tcg.decode import Insn
    from pyvcpu.accel.tcg.engine import TcgEngine

_TSS_TYPES_32 = (9, 11)
_IO_MAP_BASE = 0x66


def check_port(e: TcgEngine, port: int, size: int) -> None:
    """#GP(0) unless CPL <= IOPL or the TSS's I/O permission bits of all ``size`` ports are clear."""
    state = e.state
    if not state.cr0 & 1:
        return
    if e.cpl <= state.rflags >> 12 & 3 and not state.rflags & flags.VM:
        return
    limit = state.seg_limit[TR]
    if state.seg_flags[TR] >> 8 & 0xF not in _TSS_TYPES_32 or limit < _IO_MAP_BASE + 1:
        raise GuestException(GP, 0)
    at = e.mmu.read(state.seg_base[TR] + _IO_MAP_BASE, 2, True) + port // 8
    # Two bytes are read always, so the map needs one byte more than its ports do.
    if at + 1 > limit:
        raise GuestException(GP, 0)
    if e.mmu.read(state.seg_base[TR] + at, 2, True) >> (port & 7) & ((1 << size) - 1):
        raise GuestException(GP, 0)


@helper(Mnemonic.IN)
def port_in(e: TcgEngine, insn: Insn) -> int | None:
    port, size = read_operand(e, insn, 1) & 0xFFFF, operand_size(insn, 0)
    check_port(e, port, size)
    write_operand(e, insn, 0, e.bus.io_read(port, size))
    return None


@helper(Mnemonic.OUT)
def port_out(e: TcgEngine, insn: Insn) -> int | None:
    port, size = read_operand(e, insn, 0) & 0xFFFF, operand_size(insn, 1)
    check_port(e, port, size)
    e.bus.io_write(port, size, read_operand(e, insn, 1))
    return None
