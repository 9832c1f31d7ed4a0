"""Operands and the stack, as helpers see them: values read from and written to whole state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from iced_x86 import MemorySize, MemorySizeExt, OpKind, Register

from pyvcpu.accel.tcg.builder import IMMEDIATES, MASK, REGISTERS, SEGMENTS, Reg
from pyvcpu.accel.tcg.frames import linear, segment_base, stack_pointer, store_frame
from pyvcpu.cpu.events import GP, GuestException
from pyvcpu.cpu.layout import RSP, SS
from pyvcpu.errors import UnsupportedInstruction

if TYPE_CHECKING:
    from pyvcpu.accel.tcg.decode import Insn
    from pyvcpu.accel.tcg.engine import TcgEngine

_SIZES: dict[int, int] = {
    getattr(MemorySize, name): MemorySizeExt.size(getattr(MemorySize, name))
    for name, value in vars(MemorySize).items()
    if isinstance(value, int) and not name.startswith("_")
}
_DISPLACEMENTS = {2: 16, 4: 32, 8: 64}


def unsupported(e: TcgEngine, insn: Insn, reason: str) -> NoReturn:
    """Say exactly what is not there yet."""
    raise UnsupportedInstruction(insn.code, insn.name, e.mode_name, insn.ip, reason)


def require_cpl0(e: TcgEngine) -> None:
    """#GP(0) unless the privilege level is 0."""
    if e.cpl:
        raise GuestException(GP, 0)


# -- registers and memory ---------------------------------------------------------------------


def read_register(e: TcgEngine, reg: Reg) -> int:
    return int(e.state.regs[reg.number] >> reg.low & MASK[reg.width])


def write_register(e: TcgEngine, reg: Reg, value: int) -> None:
    """A 32-bit write clears the upper half, narrower ones keep the rest (SDM 1 3.4.1.1)."""
    mask = MASK[reg.width]
    if reg.width >= 32:
        e.state.regs[reg.number] = value & mask
    else:
        old = e.state.regs[reg.number]
        e.state.regs[reg.number] = old & ~(mask << reg.low) | (value & mask) << reg.low


def address_width(insn: Insn) -> int:
    """Address size of the memory operand in bits."""
    iced = insn.iced
    for register in (iced.memory_base, iced.memory_index):
        if register == Register.RIP:
            return 64
        if register == Register.EIP:
            return 32
        if register != Register.NONE:
            return REGISTERS[register].width
    return _DISPLACEMENTS.get(iced.memory_displ_size, insn.bits)


def memory_offset(e: TcgEngine, insn: Insn) -> int:
    """The effective address within its segment, wrapped to the address size."""
    iced = insn.iced
    total: int = iced.memory_displacement
    if iced.memory_base not in (Register.NONE, Register.RIP, Register.EIP):
        total += read_register(e, REGISTERS[iced.memory_base])
    if iced.memory_index != Register.NONE:
        total += read_register(e, REGISTERS[iced.memory_index]) * iced.memory_index_scale
    return total & MASK[address_width(insn)]


def effective_address(e: TcgEngine, insn: Insn, operand: int | None = None) -> int:
    """Linear address of the memory operand (there is only one, so ``operand`` need not be given)."""
    return linear(e, SEGMENTS[insn.iced.memory_segment], memory_offset(e, insn))


def operand_size(insn: Insn, i: int = 0) -> int:
    """Bytes of operand ``i``."""
    if insn.iced.op_kind(i) == OpKind.REGISTER:
        return REGISTERS[insn.iced.op_register(i)].width // 8
    return _SIZES[insn.iced.memory_size]


def read_operand(e: TcgEngine, insn: Insn, i: int) -> int:
    """The value of operand ``i``, zero-extended; immediates come sign-extended to 64 bits."""
    iced = insn.iced
    kind = iced.op_kind(i)
    if kind == OpKind.REGISTER:
        return read_register(e, REGISTERS[iced.op_register(i)])
    if kind in IMMEDIATES:
        return int(iced.immediate(i)) & MASK[64]
    return e.mmu.read(effective_address(e, insn), operand_size(insn, i))


def write_operand(e: TcgEngine, insn: Insn, i: int, value: int) -> None:
    """Write operand ``i``, a general register or memory."""
    iced = insn.iced
    if iced.op_kind(i) == OpKind.REGISTER:
        write_register(e, REGISTERS[iced.op_register(i)], value)
    else:
        e.mmu.write(effective_address(e, insn), operand_size(insn, i), value)


# -- the stack --------------------------------------------------------------------------------


def set_stack_pointer(e: TcgEngine, value: int) -> None:
    write_register(e, Reg(RSP, e.mode.stack, 0), value)


def stack_address(e: TcgEngine, pointer: int) -> int:
    """Linear address of a stack offset."""
    return linear(e, SS, pointer & MASK[e.mode.stack])


def pop_values(e: TcgEngine, size: int, count: int, skip: int = 0) -> list[int]:
    """``count`` items from the top of the stack (``skip`` bytes further up); the pointer stays where it is."""
    top = stack_pointer(e) + skip
    return [e.mmu.read(stack_address(e, top + i * size), size) for i in range(count)]


def push_values(e: TcgEngine, size: int, values: Sequence[int]) -> None:
    """Push ``values`` in order, all or none."""
    top = stack_pointer(e)
    store_frame(e, segment_base(e, SS), top, e.mode.stack, size, values, False)
    set_stack_pointer(e, top - size * len(values))
