"""CpuState: the data of one vCPU, made from the table in :mod:`pyvcpu.cpu.layout`."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from pyvcpu.cpu import layout
from pyvcpu.cpu.layout import CS, FIELDS, LDTR, MP_RUNNABLE, RDX, STATE_SIZE, TR

_CTYPES = {
    "u8": ctypes.c_uint8, "i8": ctypes.c_int8, "u16": ctypes.c_uint16, "i16": ctypes.c_int16,
    "u32": ctypes.c_uint32, "i32": ctypes.c_int32, "u64": ctypes.c_uint64, "i64": ctypes.c_int64,
}  # fmt: skip
_NUMPY = {"u8": "<u1", "i8": "<i1", "u16": "<u2", "i16": "<i2", "u32": "<u4", "i32": "<i4", "u64": "<u8", "i64": "<i8"}

DTYPE = np.dtype(
    {
        "names": [f.name for f in FIELDS],
        "formats": [_NUMPY[f.type] if f.count == 1 else (_NUMPY[f.type], (f.count,)) for f in FIELDS],
        "offsets": [f.offset for f in FIELDS],
        "itemsize": STATE_SIZE,
    }
)

CPUID_SIGNATURE = 0x60FB1
"""Family 15, model 107, stepping 1: what QEMU 7.2's qemu64 reports; in EDX after reset."""

ENGINE_PRIVATE = frozenset({"cc_op", "cc_dst", "cc_src", "fpu_pad", "tsc_aux_pad"})
"""Fields that say how an engine holds the flags, not what the guest can see."""


def _ctypes_fields() -> list[tuple[str, type]]:
    """The table as ctypes fields; explicit padding keeps the two in step."""
    fields: list[tuple[str, type]] = []
    at = 0
    for f in FIELDS:
        if f.offset > at:
            fields.append((f"_pad{at}", ctypes.c_uint8 * (f.offset - at)))
        kind = _CTYPES[f.type]
        fields.append((f.name, kind if f.count == 1 else kind * f.count))
        at = f.offset + layout.TYPE_SIZES[f.type] * f.count
    if at < STATE_SIZE:
        fields.append(("_tail", ctypes.c_uint8 * (STATE_SIZE - at)))
    return fields


class CpuState(ctypes.Structure):
    """All state of one vCPU. Scalars read as ints and wrap on write; arrays index as ctypes arrays.

    The arithmetic flags in ``rflags`` are whole only after the engine's ``save_state()``.
    """

    _pack_ = 1
    _fields_ = _ctypes_fields()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def record(self) -> np.ndarray[Any, Any]:
        """The same bytes as a numpy record, shape (1,); a view, not a copy."""
        return np.ndarray((1,), DTYPE, buffer=self)  # type: ignore[arg-type]  # a ctypes structure is a buffer

    def snapshot(self) -> bytes:
        """A copy of the block."""
        return bytes(self)

    def restore(self, snapshot: bytes) -> None:
        """Overwrite the block with what :meth:`snapshot` returned."""
        ctypes.memmove(ctypes.addressof(self), snapshot, STATE_SIZE)

    def architectural(self) -> dict[str, object]:
        """Every field that the guest can see, as ints and tuples, for comparison and printing."""
        record = self.record()[0]
        return {
            f.name: int(record[f.name]) if f.count == 1 else tuple(int(v) for v in record[f.name])
            for f in FIELDS
            if f.name not in ENGINE_PRIVATE
        }

    def reset(self) -> None:
        """Power-up state (SDM 3A 10.1.1, table 10-1), RIP at the reset vector FFFFFFF0."""
        ctypes.memset(ctypes.addressof(self), 0, STATE_SIZE)
        self.rip = 0xFFF0
        self.rflags = 2
        self.regs[RDX] = CPUID_SIGNATURE
        for seg in range(6):
            self.seg_limit[seg] = 0xFFFF
            self.seg_flags[seg] = 0x9300
        self.seg_flags[CS] = 0x9B00
        self.seg_selector[CS] = 0xF000
        self.seg_base[CS] = 0xFFFF0000
        self.seg_limit[LDTR] = self.seg_limit[TR] = 0xFFFF
        self.seg_flags[LDTR], self.seg_flags[TR] = 0x8200, 0x8B00
        self.gdt_limit = self.idt_limit = 0xFFFF
        self.cr0 = 0x60000010
        self.dr[6], self.dr[7] = 0xFFFF0FF0, 0x400
        self.mp_state = MP_RUNNABLE
        self.exception_nr = self.interrupt_injected = -1
        self.a20_mask = -1
        self.smbase = 0x30000
        self.hflags2 = 0x101
        self.fpu_control, self.mxcsr = 0x37F, 0x1F80
        self.xcr0 = 1
        self.xstate_bv = 3
        self.pat = 0x0007040600070406
        self.misc_enable = 1
        # QEMU's qemu64 under TCG: no polling MSR; 10 MCE banks, CTL_P, SER_P.
        self.poll_control_msr = 0
        self.mcg_cap, self.mcg_ctl = 0x0100010A, (1 << 64) - 1
        for bank in range(10):
            self.mce_banks[4 * bank] = (1 << 64) - 1
