"""Segment descriptors (SDM 3A 3.4.5, 3.5, 5.8): their bits, and how they are fetched from the GDT and LDT.

    high dword   31..24 base  23 G  22 D/B  21 L  20 AVL  19..16 limit  15 P  14..13 DPL  12 S  11..8 type  7..0 base
    low dword    31..16 base                              15..0 limit

A selector is index << 3 | TI << 2 | RPL. The flags of a loaded segment are bits 8 to 23 of the high dword in
place, without the limit's.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from pyvcpu.cpu.events import GP, GuestException
from pyvcpu.cpu.layout import LDTR
from pyvcpu.cpu.state import CpuState

ACCESSED, WRITABLE, CONFORMING, CODE = 1 << 8, 1 << 9, 1 << 10, 1 << 11
READABLE, EXPAND_DOWN, BUSY = WRITABLE, CONFORMING, WRITABLE
S, P, L, DB, G = 1 << 12, 1 << 15, 1 << 21, 1 << 22, 1 << 23
FLAGS = 0xF0FF00
DPL_SHIFT = 13

TSS16, LDT, TSS16_BUSY, CALL16, TASK_GATE, INTERRUPT16, TRAP16 = 1, 2, 3, 4, 5, 6, 7
TSS32, TSS32_BUSY, CALL32, INTERRUPT32, TRAP32 = 9, 11, 12, 14, 15
"""System types; in IA-32e mode 9, 11, 12, 14 and 15 are the 64-bit ones."""

REAL_DATA_FLAGS = 0x9300
"""Present, writable, accessed data: what real mode gives every segment."""


class Memory(Protocol):
    """What descriptors are read through: linear addresses, supervisor privilege."""

    def read(self, linear: int, size: int, supervisor: bool = ...) -> int: ...

    def write(self, linear: int, size: int, value: int, supervisor: bool = ...) -> None: ...


class Descriptor(NamedTuple):
    """One entry of a table: ``low`` and ``high`` are its dwords, ``address`` is where it is."""

    low: int
    high: int
    address: int = 0

    @property
    def base(self) -> int:
        return self.low >> 16 | (self.high & 0xFF) << 16 | self.high & 0xFF000000

    @property
    def limit(self) -> int:
        """In bytes, after G."""
        limit = self.low & 0xFFFF | self.high & 0xF0000
        return limit << 12 | 0xFFF if self.high & G else limit

    @property
    def flags(self) -> int:
        return self.high & FLAGS

    @property
    def dpl(self) -> int:
        return self.high >> DPL_SHIFT & 3

    @property
    def type(self) -> int:
        """Bits 8 to 11."""
        return self.high >> 8 & 0xF

    @property
    def is_code(self) -> bool:
        return self.high & (S | CODE) == S | CODE

    @property
    def is_conforming(self) -> bool:
        return bool(self.high & CONFORMING)

    @property
    def present(self) -> bool:
        return bool(self.high & P)


def fetch(state: CpuState, memory: Memory, selector: int, vector: int = GP, ext: int = 0) -> Descriptor:
    """The descriptor that ``selector`` names; ``vector``(selector) if it lies outside of its table.

    ``ext`` is the EXT bit of that error code.
    """
    if selector & 4:
        present = state.seg_selector[LDTR] & 0xFFFC and state.seg_flags[LDTR] & P
        base, limit = state.seg_base[LDTR], state.seg_limit[LDTR] if present else -1
    else:
        base, limit = state.gdt_base, state.gdt_limit
    index = selector & 0xFFF8
    if index + 7 > limit:
        raise GuestException(vector, selector & 0xFFFC | ext)
    address = base + index
    raw = memory.read(address, 8, True)
    return Descriptor(raw & 0xFFFFFFFF, raw >> 32, address)


def mark_accessed(memory: Memory, descriptor: Descriptor) -> Descriptor:
    """Set the accessed bit in the table, as loading a code or data segment does."""
    if descriptor.high & ACCESSED:
        return descriptor
    memory.write(descriptor.address + 5, 1, descriptor.high >> 8 & 0xFF | 1, True)
    return descriptor._replace(high=descriptor.high | ACCESSED)


def set_segment(state: CpuState, segment: int, selector: int, base: int, limit: int, flags: int) -> None:
    """Load selector and hidden part."""
    state.seg_selector[segment] = selector
    state.seg_base[segment] = base
    state.seg_limit[segment] = limit
    state.seg_flags[segment] = flags


def load_descriptor(state: CpuState, segment: int, selector: int, descriptor: Descriptor) -> None:
    """:func:`set_segment` from a descriptor."""
    set_segment(state, segment, selector, descriptor.base, descriptor.limit, descriptor.flags)


def load_real(state: CpuState, segment: int, selector: int) -> None:
    """Real mode: base is selector * 16; limit and attributes stay (so "unreal" mode works)."""
    state.seg_selector[segment] = selector
    state.seg_base[segment] = selector << 4


def load_null(state: CpuState, segment: int, selector: int, dpl: int = 0) -> None:
    """A null selector: unusable (not present)."""
    set_segment(state, segment, selector, 0, 0, dpl << DPL_SHIFT)
