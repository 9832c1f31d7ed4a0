"""Builder: what translators use to emit ops for one basic block.

It knows operands (registers, memory, immediates), segment bases, and what the lazy flags hold at
compile time, so that ``cmp; jb`` becomes one comparison.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from iced_x86 import Instruction, MemorySize, MemorySizeExt, OpKind, Register

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.decode import Insn
from pyvcpu.accel.tcg.ops import CC_DST, CC_OP, CC_SRC, CONDITIONS, FIRST_TEMP, Op
from pyvcpu.cpu.layout import CS, DS, ES, FS, GS, RSP, SS


class Mode(NamedTuple):
    """What the meaning of code bytes depends on, beyond the bytes: part of every cache key."""

    bits: int  # code size: 16, 32, 64
    stack: int  # width of the stack pointer: 16, 32, 64
    protected: bool
    flat: bool  # ES, CS, SS and DS all have base 0 (always so in 64-bit code)


class Reg(NamedTuple):
    """A general register operand: its number, width in bits and lowest bit (8 for AH .. BH)."""

    number: int
    width: int
    low: int


def _registers() -> dict[int, Reg]:
    names64 = ["RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI"]
    table: dict[int, Reg] = {}
    for n, name in enumerate(names64):
        legacy = name[1:]
        table[getattr(Register, name)] = Reg(n, 64, 0)
        table[getattr(Register, "E" + legacy)] = Reg(n, 32, 0)
        table[getattr(Register, legacy)] = Reg(n, 16, 0)
        table[getattr(Register, legacy[0] + "L" if n < 4 else legacy + "L")] = Reg(n, 8, 0)
        if n < 4:
            table[getattr(Register, legacy[0] + "H")] = Reg(n, 8, 8)
    for n in range(8, 16):
        for suffix, width in (("", 64), ("D", 32), ("W", 16), ("L", 8)):
            table[getattr(Register, f"R{n}{suffix}")] = Reg(n, width, 0)
    return table


REGISTERS = _registers()
"""iced's Register -> :class:`Reg`, general registers only."""

SEGMENTS = {Register.ES: ES, Register.CS: CS, Register.SS: SS, Register.DS: DS, Register.FS: FS, Register.GS: GS}

IMMEDIATES = frozenset({
    OpKind.IMMEDIATE8, OpKind.IMMEDIATE16, OpKind.IMMEDIATE32, OpKind.IMMEDIATE64, OpKind.IMMEDIATE8TO16,
    OpKind.IMMEDIATE8TO32, OpKind.IMMEDIATE8TO64, OpKind.IMMEDIATE32TO64, OpKind.IMMEDIATE8_2ND,
})  # fmt: skip

MASK = {8: 0xFF, 16: 0xFFFF, 32: 0xFFFFFFFF, 64: 0xFFFFFFFFFFFFFFFF}


class StaticFlags(NamedTuple):
    """What is known of the lazy flags: their kind and width, and the left operand of a SUB if it is at hand."""

    kind: int
    width: int
    left: int | None = None


class Builder:
    """Ops of one block under construction."""

    def __init__(self, mode: Mode, known: StaticFlags | None = None) -> None:
        self.mode = mode
        self.ops: list[Op] = []
        self.consts: list[int] = []
        self.insns: list[Insn] = []
        self.index = -1
        self.flags = known
        self._interned: dict[int, int] = {}
        self._next = FIRST_TEMP
        self._address: int | None = None

    def begin(self, insn: Insn) -> None:
        """Start the next instruction of the block."""
        self.insns.append(insn)
        self.index += 1
        self._address = None

    # -- ids ----------------------------------------------------------------------------------

    def const(self, value: int) -> int:
        value &= MASK[64]
        found = self._interned.get(value)
        if found is None:
            self.consts.append(value)
            found = self._interned[value] = -len(self.consts)
        return found

    def temp(self) -> int:
        self._next += 1
        return self._next - 1

    def op(self, name: str, x: object, *sources: int | None) -> int:
        """Emit a pure op into a new temporary, which is returned."""
        dest = self.temp()
        self.ops.append((name, x, dest, *sources))
        return dest

    def put(self, dest: int, source: int, width: int = 64) -> None:
        """Write a register id (0..18) with the low ``width`` bits of ``source``, zero-extended."""
        self.ops.append(("mov", width, dest, source))

    def end(self, name: str, x: object, *sources: int) -> None:
        """Emit a terminator."""
        self.ops.append((name, x, None, *sources))

    # -- memory -------------------------------------------------------------------------------

    def load(self, width: int, address: int) -> int:
        dest = self.temp()
        self.ops.append(("ld", (width, self.index), dest, address))
        return dest

    def store(self, width: int, address: int, value: int) -> None:
        self.ops.append(("st", (width, self.index), None, address, value))

    def segment_base(self, segment: int) -> int | None:
        """The id of a segment's base, or None where it is known to be 0."""
        if segment in (FS, GS):
            return self.op("getf", ("seg_base", segment))
        if self.mode.bits == 64 or self.mode.flat:
            return None
        return self.op("getf", ("seg_base", segment))

    def linear(self, segment: int, offset: int) -> int:
        """Linear address of an offset that is already wrapped to the address size."""
        base = self.segment_base(segment)
        if base is None:
            return offset
        return self.op("add", 64 if self.mode.bits == 64 else 32, base, offset)

    def offset(self, iced: Instruction) -> int:
        """The effective address of the memory operand: base + index * scale + displacement, wrapped (as LEA)."""
        base, index = iced.memory_base, iced.memory_index
        if base in (Register.RIP, Register.EIP):
            return self.const(iced.memory_displacement)
        width = self.address_width(iced)
        if base == Register.NONE and index == Register.NONE:
            return self.const(iced.memory_displacement & MASK[width])
        base_id = None if base == Register.NONE else REGISTERS[base].number
        index_id = None if index == Register.NONE else REGISTERS[index].number
        if width != 64:
            base_id = None if base_id is None else self.op("mov", width, base_id)
            index_id = None if index_id is None else self.op("mov", width, index_id)
        displacement = iced.memory_displacement & MASK[width]
        if displacement >> (width - 1):
            displacement -= 1 << width
        if index_id is None and displacement == 0 and base_id is not None:
            return self.op("mov", width, base_id)
        return self.op("lea", (iced.memory_index_scale, displacement, width), base_id, index_id)

    def address_width(self, iced: Instruction) -> int:
        for register in (iced.memory_base, iced.memory_index):
            if register != Register.NONE:
                return {Register.RIP: 64, Register.EIP: 32}.get(register) or REGISTERS[register].width
        size = iced.memory_displ_size
        return {2: 16, 4: 32, 8: 64}.get(size, self.mode.bits)

    def address(self, insn: Insn) -> int:
        """Linear address of the instruction's memory operand; made once an instruction."""
        if self._address is None:
            self._address = self.linear(SEGMENTS[insn.iced.memory_segment], self.offset(insn.iced))
        return self._address

    # -- operands -----------------------------------------------------------------------------

    def width(self, insn: Insn, i: int = 0) -> int:
        """Width in bits of operand ``i``."""
        kind = insn.iced.op_kind(i)
        if kind == OpKind.REGISTER:
            return REGISTERS[insn.iced.op_register(i)].width
        return _memory_width(insn.iced)

    def read(self, insn: Insn, i: int) -> int:
        """The value of operand ``i``, zero-extended; immediates come sign-extended to 64 bits."""
        iced = insn.iced
        kind = iced.op_kind(i)
        if kind == OpKind.REGISTER:
            return self.read_register(REGISTERS[iced.op_register(i)])
        if kind == OpKind.MEMORY:
            return self.load(_memory_width(iced), self.address(insn))
        if kind in IMMEDIATES:
            return self.const(iced.immediate(i))
        raise KeyError(kind)

    def write(self, insn: Insn, i: int, value: int) -> None:
        """Write operand ``i``. A memory write must come before any register write of the instruction."""
        iced = insn.iced
        if iced.op_kind(i) == OpKind.REGISTER:
            self.write_register(REGISTERS[iced.op_register(i)], value)
        else:
            self.store(_memory_width(iced), self.address(insn), value)

    def read_register(self, reg: Reg) -> int:
        if reg.low:
            return self.op("extr", (8, 8), reg.number)
        return self.op("mov", reg.width, reg.number)

    def write_register(self, reg: Reg, value: int) -> None:
        """A 32-bit write clears the upper half, narrower ones keep the rest (SDM 1 3.4.1.1)."""
        if reg.width >= 32:
            self.put(reg.number, value, reg.width)
        else:
            self.ops.append(("dep", (reg.low, reg.width), reg.number, reg.number, value))

    # -- the stack ----------------------------------------------------------------------------

    def push(self, width: int, value: int) -> None:
        """Store, then move the stack pointer."""
        new = self.op("lea", (1, -(width // 8), self.mode.stack), RSP, None)
        self.store(width, self.linear(SS, new), value)
        self.set_stack_pointer(new)

    def stack_top(self) -> int:
        """Linear address of the top of the stack."""
        return self.linear(SS, self.op("mov", self.mode.stack, RSP))

    def moved_stack_pointer(self, by: int) -> int:
        return self.op("lea", (1, by, self.mode.stack), RSP, None)

    def set_stack_pointer(self, new: int) -> None:
        self.write_register(Reg(RSP, self.mode.stack, 0), new)

    # -- flags --------------------------------------------------------------------------------

    def set_flags(self, kind: int, width: int, dst: int, src: int, left: int | None = None) -> None:
        """Record the lazy triple; ``left`` is the left operand of a SUB (a temp, already at width)."""
        self.put(CC_OP, self.const(flags.cc_op(kind, width)))
        self.put(CC_DST, dst)
        self.put(CC_SRC, src)
        self.flags = StaticFlags(kind, width, left)

    def set_eflags(self, image: int) -> None:
        """The flags are whole, in ``image``."""
        self.put(CC_OP, self.const(flags.CC_EFLAGS))
        self.put(CC_SRC, image)
        self.flags = StaticFlags(flags.EFLAGS, 64)

    def forget_flags(self) -> None:
        """The kind is only known at run time from here on."""
        self.flags = None

    def eflags(self) -> int:
        """The arithmetic bits of EFLAGS as a value."""
        if self.flags is None:
            return self.op("ccd", None, CC_OP, CC_DST, CC_SRC)
        if self.flags.kind == flags.EFLAGS:
            return self.op("mov", 64, CC_SRC)
        return self.op("cce", (self.flags.kind, self.flags.width), CC_DST, CC_SRC)

    def carry(self) -> int:
        """CF as 0 or 1."""
        known = self.flags
        if known is not None:
            kind, width = known.kind, known.width
            if kind == flags.LOGIC:
                return self.const(0)
            if kind in (flags.INC, flags.DEC, flags.MUL):
                return self.op("mov", 64, CC_SRC)
            if kind == flags.ADD:
                return self.op("setc", ("ltu", width), CC_DST, CC_SRC)
            if kind == flags.SUB:
                return self.op("setc", ("ltu", width), self._left(), CC_SRC)
            if kind in (flags.SHR, flags.SAR):
                return self.op("and", 64, CC_SRC, self.const(1))
            if kind == flags.SHL:
                return self.op("extr", (width - 1, 1), CC_SRC)
        return self.op("and", 64, self.eflags(), self.const(flags.CF))

    def _left(self) -> int:
        """The left operand of the SUB whose flags these are."""
        assert self.flags is not None
        if self.flags.left is not None:
            return self.flags.left
        return self.op("add", self.flags.width, CC_DST, CC_SRC)

    def condition(self, cc: int) -> tuple[str, int, int, int]:
        """The condition code ``cc`` (0 = O .. 15 = G, as in the opcode) as a comparison: cond, width, a, b."""
        base, negate = cc & ~1, cc & 1
        found = self._direct(base)
        if found is None:
            found = self._from_image(base)
        cond, width, a, b = found
        return (CONDITIONS[cond] if negate else cond), width, a, b

    def _direct(self, cc: int) -> tuple[str, int, int, int] | None:
        """A comparison for the even condition code, straight from the lazy operands, if their kind allows."""
        known = self.flags
        if known is None or known.kind == flags.EFLAGS:
            return None
        kind, width = known.kind, known.width
        zero = self.const(0)
        if cc == 4:  # E
            if kind == flags.SUB and known.left is not None:
                return "eq", width, known.left, CC_SRC
            return "eq", width, CC_DST, zero
        if cc == 8:  # S
            return "lts", width, CC_DST, zero
        if cc == 2:  # B
            if kind == flags.SUB:
                return "ltu", width, self._left(), CC_SRC
            return "ne", 64, self.carry(), zero
        if kind == flags.SUB:
            if cc == 6:  # BE
                return "leu", width, self._left(), CC_SRC
            if cc == 12:  # L
                return "lts", width, self._left(), CC_SRC
            if cc == 14:  # LE
                return "les", width, self._left(), CC_SRC
        if kind == flags.LOGIC:
            if cc == 6:
                return "eq", width, CC_DST, zero
            if cc == 12:
                return "lts", width, CC_DST, zero
            if cc == 14:
                return "les", width, CC_DST, zero
        return None

    def _from_image(self, cc: int) -> tuple[str, int, int, int]:
        image, zero = self.eflags(), self.const(0)
        single = {0: flags.OF, 2: flags.CF, 4: flags.ZF, 6: flags.CF | flags.ZF, 8: flags.SF, 10: flags.PF}.get(cc)
        if single is not None:
            return "ne", 64, self.op("and", 64, image, self.const(single)), zero
        # L is SF != OF; LE adds ZF. SF is bit 7, OF bit 11.
        differ = self.op(
            "and", 64, self.op("xor", 64, image, self.op("shr", 64, image, self.const(4))), self.const(0x80)
        )
        if cc == 14:
            differ = self.op("or", 64, differ, self.op("and", 64, image, self.const(flags.ZF)))
        return "ne", 64, differ, zero


def _memory_width(iced: Instruction) -> int:
    return _MEMORY_WIDTHS[iced.memory_size]


def _memory_widths() -> dict[int, int]:
    sizes: list[Any] = [v for name, v in vars(MemorySize).items() if isinstance(v, int) and not name.startswith("_")]
    return {size: MemorySizeExt.size(size) * 8 for size in sizes}


_MEMORY_WIDTHS = _memory_widths()
