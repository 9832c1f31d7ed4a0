"""A bare processor for tests: an engine, RAM from address 0, code written as bytes.

0x1000 code   0x2000 GDT   0x3000 IDT   0x4000 TSS   0x5000 stack top   0x6000 .. handlers and data
0x10000 page tables (the first GiB mapped 1:1 by 2 MiB pages, plus what a test adds)
"""

from __future__ import annotations

from pyvcpu.accel.tcg.engine import TcgEngine
from pyvcpu.clock import IcountClock
from pyvcpu.cpu.layout import CS, DS, ES, FS, GS, RSP, SS, TR
from pyvcpu.cpu.state import CpuState
from pyvcpu.memory.bus import Bus
from pyvcpu.memory.ram import GuestRam

CODE, GDT, IDT, TSS, STACK, DATA, TABLES = 0x1000, 0x2000, 0x3000, 0x4000, 0x6000, 0x8000, 0x10000
SIZE = 1 << 20

# Selectors of the GDT that `long_mode` and `protected` build.
KERNEL_CS, KERNEL_DS, USER_CS32, USER_DS, USER_CS, TSS_SELECTOR, CODE32 = 0x08, 0x10, 0x18, 0x20, 0x28, 0x30, 0x40

_GDT = (
    0,
    0x00AF9B000000FFFF,  # 08 64-bit code
    0x00CF93000000FFFF,  # 10 data
    0x00CFFB000000FFFF,  # 18 user 32-bit code
    0x00CFF3000000FFFF,  # 20 user data
    0x00AFFB000000FFFF,  # 28 user 64-bit code
    0x0000890000000067 | TSS << 16,  # 30 TSS (16 bytes)
    0,
    0x00CF9B000000FFFF,  # 40 32-bit code
    0x008F9B000000FFFF,  # 48 16-bit code
    0x00CF13000000FFFF,  # 50 data, not present
    0x00CF1B000000FFFF,  # 58 32-bit code, not present
    0x0000820080000017,  # 60 LDT at 8000, limit 17
    0,
    0x008F93000000FFFF,  # 70 16-bit data
    0x00CF99000000FFFF,  # 78 execute-only code
    0x00CF91000000FFFF,  # 80 read-only data
)
GDT_LIMIT = 8 * len(_GDT) - 1


class Box:
    """A processor in real mode with everything at address 0."""

    def __init__(self) -> None:
        self.ram = GuestRam([("ram", SIZE)])
        self.bus = Bus(self.ram)
        self.bus.map_ram(0, SIZE, self.ram.block("ram"))
        self.state = CpuState()
        self.state.reset()
        self.clock = IcountClock()
        state = self.state
        state.seg_selector[CS], state.seg_base[CS] = 0, 0
        state.rip = CODE
        state.regs[RSP] = STACK
        self.engine = TcgEngine(state, self.ram, self.bus, None, self.clock)

    # -- set-up

    def put(self, address: int, data: bytes | str) -> None:
        self.ram.write(address, bytes.fromhex(data) if isinstance(data, str) else data)

    def put_int(self, address: int, size: int, value: int) -> None:
        self.ram.write(address, value.to_bytes(size, "little"))

    def get(self, address: int, size: int) -> int:
        return int.from_bytes(self.ram.read(address, size), "little")

    def _tables(self) -> None:
        for i, entry in enumerate(_GDT):
            self.put_int(GDT + 8 * i, 8, entry)
        state = self.state
        state.gdt_base, state.gdt_limit = GDT, GDT_LIMIT
        state.idt_base, state.idt_limit = IDT, 0xFFF
        state.seg_selector[TR], state.seg_base[TR], state.seg_limit[TR] = TSS_SELECTOR, TSS, 0x67
        state.seg_flags[TR] = 0x8B00

    def _segment(self, segment: int, selector: int) -> None:
        entry = self.get(GDT + (selector & ~7), 8)
        self.state.seg_selector[segment] = selector
        self.state.seg_base[segment], self.state.seg_limit[segment] = 0, 0xFFFFFFFF
        self.state.seg_flags[segment] = entry >> 32 & 0xF0FF00

    def long_mode(self, user: bool = False) -> Box:
        """64-bit code with paging, at privilege 0 or 3."""
        self._tables()
        for level, entry in ((0, (TABLES + 0x1000) | 7), (0x1000, (TABLES + 0x2000) | 7)):
            self.put_int(TABLES + level, 8, entry)
        self.put_int(TABLES + 0x2000, 8, (TABLES + 0x3000) | 7)  # the first 2 MiB by small pages
        for page in range(512):
            self.put_int(TABLES + 0x3000 + 8 * page, 8, page << 12 | 7)
        state = self.state
        state.cr0, state.cr3, state.cr4, state.efer = 0x80010033, TABLES, 0x620, 0xD01
        self._segment(CS, (USER_CS | 3) if user else KERNEL_CS)
        for segment in (DS, ES, FS, GS, SS):
            self._segment(segment, (USER_DS | 3) if user else KERNEL_DS)
        self.engine.load_state()
        return self

    def protected(self, user: bool = False) -> Box:
        """32-bit code without paging, at privilege 0 or 3."""
        self._tables()
        self.state.cr0 = 0x11
        self._segment(CS, (USER_CS32 | 3) if user else CODE32)
        for segment in (DS, ES, FS, GS, SS):
            self._segment(segment, (USER_DS | 3) if user else KERNEL_DS)
        self.engine.load_state()
        return self

    def page_entry(self, page: int, entry: int) -> None:
        """Replace the mapping of a small page."""
        self.put_int(TABLES + 0x3000 + 8 * page, 8, entry)
        self.engine.flush_tlb()

    def gate64(self, vector: int, offset: int, *, kind: int = 0x8E, selector: int = KERNEL_CS, ist: int = 0) -> None:
        low = offset & 0xFFFF | selector << 16 | ist << 32 | kind << 40 | (offset >> 16 & 0xFFFF) << 48
        self.put_int(IDT + 16 * vector, 8, low)
        self.put_int(IDT + 16 * vector + 8, 8, offset >> 32)

    def gate32(self, vector: int, offset: int, *, kind: int = 0x8E, selector: int = CODE32) -> None:
        low = offset & 0xFFFF | selector << 16 | kind << 40 | (offset >> 16 & 0xFFFF) << 48
        self.put_int(IDT + 8 * vector, 8, low)

    # -- running

    def run(self, code: bytes | str, count: int = 1, at: int = CODE) -> Box:
        """Write code at ``at``, go there, run ``count`` instructions."""
        self.put(at, code)
        self.state.rip = at
        self.engine.run(self.clock.instructions + count)
        self.engine.save_state()
        return self

    def reg(self, number: int) -> int:
        return int(self.state.regs[number])

    def frame(self, count: int, size: int = 8) -> list[int]:
        """``count`` items from the top of the stack."""
        return [self.get(self.state.regs[RSP] + i * size, size) for i in range(count)]
