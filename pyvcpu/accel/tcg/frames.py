"""The stack as helpers and deliveries see it: linear addresses, and frames that are stored whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyvcpu.accel.tcg.builder import MASK
from pyvcpu.cpu.events import SS as STACK_FAULT
from pyvcpu.cpu.events import GuestException
from pyvcpu.cpu.layout import FS, GS, RSP

if TYPE_CHECKING:
    from pyvcpu.accel.tcg.engine import TcgEngine


def segment_base(e: TcgEngine, segment: int) -> int:
    """Base of a segment; in 64-bit code only FS and GS have one."""
    if e.mode.bits == 64 and segment not in (FS, GS):
        return 0
    return int(e.state.seg_base[segment])


def linear(e: TcgEngine, segment: int, offset: int) -> int:
    """Linear address of an offset."""
    return (segment_base(e, segment) + offset) & (MASK[64] if e.mode.bits == 64 else MASK[32])


def stack_pointer(e: TcgEngine) -> int:
    """RSP, ESP or SP, by the stack's width."""
    return int(e.state.regs[RSP] & MASK[e.mode.stack])


def store_frame(
    e: TcgEngine, base: int, top: int, width: int, size: int, values: Sequence[int], supervisor: bool, code: int = 0
) -> None:
    """Store ``values`` below ``top``, the first highest, as pushes would; nothing is stored if any store faults.

    ``width`` is that of the stack pointer in bits. ``code`` is the error code of #SS for an address that
    is not canonical.
    """
    length = size * len(values)
    bottom = (top - length) & MASK[width]
    limit = MASK[64] if width == 64 else MASK[32]
    if width == 64:
        first, last = base + bottom, (base + bottom + length - 1) & limit
        if not (is_canonical(first) and is_canonical(last)):
            raise GuestException(STACK_FAULT, code)
    if bottom + length <= MASK[width] + 1:
        data = b"".join((v & MASK[8 * size]).to_bytes(size, "little") for v in reversed(values))
        e.mmu.write_bytes((base + bottom) & limit, data, supervisor)
        return
    places = [(base + (top - (i + 1) * size & MASK[width])) & limit for i in range(len(values))]
    for place in places:
        e.mmu.check_write(place, size, supervisor)
    for place, value in zip(places, values, strict=True):
        e.mmu.write(place, size, value & MASK[8 * size], supervisor)


def is_canonical(address: int) -> bool:
    """Bits 63 to 47 all equal (48-bit linear addresses)."""
    return address >> 47 in (0, 0x1FFFF)
