"""The mmu: linear addresses to guest memory, with a TLB for loads and one for stores.

    linear address --walk--> guest physical --bus--> byte offset in RAM, or MMIO

A TLB is a dict: page number -> (RAM offset less linear address), filled by ``__missing__`` and so
free when it hits. A load entry needs a present page; a store entry needs one that is also writable, dirty
already, and holds no translated code. What cannot be filled raises :class:`SlowAccess`: the engine then
runs that one instruction with :meth:`Mmu.read` and :meth:`Mmu.write`, which serve every
case, exactly and with the exact fault.

Page walk: SDM 3A 4.5 (4-level), faults and error codes 4.7, accessed and dirty flags 4.8.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvcpu.cpu.events import GP, PF, GuestException
from pyvcpu.cpu.state import CpuState
from pyvcpu.errors import UnsupportedInstruction
from pyvcpu.memory.bus import Bus
from pyvcpu.memory.pages import CLEAN, CODE, PAGE_SHIFT, PAGE_SIZE, SNAPSHOT
from pyvcpu.memory.ram import GuestRam

CR0_PG, CR0_WP = 1 << 31, 1 << 16
EFER_LMA, EFER_NXE = 1 << 10, 1 << 11
PTE_P, PTE_W, PTE_U, PTE_A, PTE_D, PTE_PS, PTE_NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
PF_P, PF_W, PF_U, PF_RSVD, PF_I = 1, 2, 4, 8, 16

PHYSICAL_BITS = 40
"""MAXPHYADDR, as CPUID 80000008 says."""
_ADDRESS = (1 << PHYSICAL_BITS) - 1 & ~0xFFF
_BEYOND = (1 << 52) - (1 << PHYSICAL_BITS)  # reserved physical address bits of an entry
_MASK64 = (1 << 64) - 1
_OFFSET = PAGE_SIZE - 1


SLOW_PAGES = 64
"""Pages remembered as slow before the memory is cleared, so that none is slow for ever."""


class SlowAccess(Exception):
    """This access needs the slow path."""


class NonCanonical(GuestException):
    """#GP(0) for an address that is not canonical; #SS(0) where it was the stack's, which the engine knows."""

    def __init__(self, linear: int) -> None:
        super().__init__(GP, 0)
        self.linear = linear


class Tlb(dict[int, int]):
    """Linear page number -> byte offset in RAM of the page, less its linear address."""

    __slots__ = ("fill",)

    def __init__(self, fill: Callable[[int], int]) -> None:
        super().__init__()
        self.fill = fill

    def __missing__(self, page: int) -> int:
        delta = self[page] = self.fill(page)
        return delta


class Mmu:
    """Address translation and memory access of one vCPU."""

    def __init__(self, state: CpuState, ram: GuestRam, bus: Bus) -> None:
        self.state, self.ram, self.bus = state, ram, bus
        self.user = False
        self.long = False  # IA-32e mode: linear addresses have 64 bits, else 32
        self.code_written: Callable[[int, int, int], None] = lambda page, start, end: None
        self.flushed: Callable[[], None] = lambda: None
        self._loads = (Tlb(lambda p: self._fill(p, False, False)), Tlb(lambda p: self._fill(p, False, True)))
        self._stores = (Tlb(lambda p: self._fill(p, True, False)), Tlb(lambda p: self._fill(p, True, True)))
        self._fetches = (Tlb(lambda p: 0), Tlb(lambda p: 0))  # filled by fetch_page, which has the address
        self.loads, self.stores = self._loads[0], self._stores[0]
        self._slow: set[int] = set()  # linear pages that no entry could be made for; a hint only
        self.bytes, self.view64 = ram.view8, ram.view64
        ram.add_trap_listener(self.drop_stores)

    def set_user(self, user: bool) -> None:
        """Use the entries of user mode (CPL 3) or of supervisor mode."""
        self.user = user
        self.loads, self.stores = self._loads[user], self._stores[user]

    def drop_stores(self) -> None:
        """Pages became clean, code or snapshot: the first store to each must be seen again."""
        for tlb in self._stores:
            tlb.clear()

    def flush(self) -> None:
        """Forget all translations (MOV CR3 and its kin)."""
        for tlb in (*self._loads, *self._stores, *self._fetches):
            tlb.clear()
        self._slow.clear()
        self.flushed()

    def invlpg(self, linear: int) -> None:
        """Forget the translations of one page. A large page may be held as many: then all go."""
        self.flush()

    # -- translation --------------------------------------------------------------------------

    def translate(self, linear: int, *, write: bool = False, user: bool = False, fetch: bool = False) -> int:
        """Guest physical address; sets accessed and dirty flags; raises #PF or, for a non-canonical address, #GP."""
        state = self.state
        a20 = state.a20_mask & _MASK64 if state.a20_mask != -1 else _MASK64
        if not state.cr0 & CR0_PG:
            return linear & a20
        if not state.efer & EFER_LMA:
            raise UnsupportedInstruction(
                b"", "paging", "protected32", state.rip, "32-bit and PAE paging are not there yet"
            )
        if (linear >> 47) not in (0, 0x1FFFF):
            raise NonCanonical(linear)
        table = state.cr3 & _ADDRESS
        reserved = _BEYOND | (0 if state.efer & EFER_NXE else PTE_NX)
        rights = PTE_W | PTE_U
        no_execute = 0
        for shift in (39, 30, 21, 12):
            at = (table + (linear >> shift & 0x1FF) * 8) & a20
            entry = self.bus.read(at, 8)
            if not entry & PTE_P:
                raise self._fault(linear, 0, write, user, fetch)
            leaf = shift == 12 or entry & PTE_PS
            bad = entry & reserved
            if leaf and shift > 12:
                bad |= entry & ((1 << shift) - 1) & ~0x1FFF if shift < 39 else PTE_PS
            if bad:
                raise self._fault(linear, PF_P | PF_RSVD, write, user, fetch)
            rights &= entry
            no_execute |= entry & PTE_NX
            if leaf:
                break
            if not entry & PTE_A:
                self.bus.write(at, 8, entry | PTE_A)
            table = entry & _ADDRESS
        allowed = (
            not (user and not rights & PTE_U)
            and not (fetch and no_execute)
            and not (write and not rights & PTE_W and (user or state.cr0 & CR0_WP))
        )
        if not allowed:
            raise self._fault(linear, PF_P, write, user, fetch)
        wanted = entry | PTE_A | (PTE_D if write else 0)
        if wanted != entry:
            self.bus.write(at, 8, wanted)
        inside = (1 << shift) - 1
        return ((entry & _ADDRESS & ~inside) | (linear & inside)) & a20

    def _fault(self, linear: int, bits: int, write: bool, user: bool, fetch: bool) -> GuestException:
        error = bits | (PF_W if write else 0) | (PF_U if user else 0)
        if fetch and self.state.efer & EFER_NXE:
            error |= PF_I
        return GuestException(PF, error, cr2=linear)

    def _fill(self, page: int, write: bool, user: bool) -> int:
        """RAM offset less linear address, for a TLB entry; SlowAccess where there can be none.

        A sum of registers beyond 64 bits, as of an index that is negative, has an entry of its own: the offset
        takes the wrapping in. All that drops entries drops all.
        """
        linear = page << PAGE_SHIFT
        if not self.long and not 0 <= linear <= 0xFFFFFFFF:
            raise SlowAccess
        try:
            gpa = self.translate(linear & _MASK64, write=write, user=user)
        except GuestException:
            raise SlowAccess from None
        offset = self.bus.lookup_page(gpa >> PAGE_SHIFT)
        if offset < 0:
            raise SlowAccess
        if write:
            if not self.bus.writable_page(gpa >> PAGE_SHIFT):
                raise SlowAccess
            ram_page = offset >> PAGE_SHIFT
            flags = int(self.ram.state[ram_page])
            if flags & CODE:
                raise SlowAccess
            if flags & (CLEAN | SNAPSHOT):
                self.ram.page_written(ram_page)
        return offset - linear

    def fetch_page(self, linear: int) -> int:
        """RAM offset of the code at ``linear``; -1 where it is not RAM. Raises #PF, #GP."""
        tlb = self._fetches[self.user]
        delta = tlb.get(linear >> PAGE_SHIFT)
        if delta is None:
            gpa = self.translate(linear, user=self.user, fetch=True)
            offset = self.bus.lookup_page(gpa >> PAGE_SHIFT)
            if offset < 0:
                return -1
            delta = tlb[linear >> PAGE_SHIFT] = offset - (linear & ~_OFFSET)
        return linear + delta

    # -- misaligned accesses of generated code ------------------------------------------------

    def _load(self, linear: int, size: int) -> int:
        at = self.loads[linear >> PAGE_SHIFT] + linear
        room = PAGE_SIZE - (linear & _OFFSET)
        if room >= size:
            return int.from_bytes(self.bytes[at : at + size], "little")
        rest = self.loads[(linear >> PAGE_SHIFT) + 1] + linear + room
        low = int.from_bytes(self.bytes[at : at + room], "little")
        return low | int.from_bytes(self.bytes[rest : rest + size - room], "little") << (8 * room)

    def _store(self, linear: int, size: int, value: int) -> None:
        at = self.stores[linear >> PAGE_SHIFT] + linear
        room = PAGE_SIZE - (linear & _OFFSET)
        data = value.to_bytes(size, "little")
        if room >= size:
            self.bytes[at : at + size] = data
            return
        rest = self.stores[(linear >> PAGE_SHIFT) + 1] + linear + room
        if self.stores.get(linear >> PAGE_SHIFT) is None:  # the second fill may have dropped the first
            raise SlowAccess
        self.bytes[at : at + room] = data[:room]
        self.bytes[rest : rest + size - room] = data[room:]

    def load2(self, linear: int) -> int:
        return self._load(linear, 2)

    def load4(self, linear: int) -> int:
        return self._load(linear, 4)

    def load8(self, linear: int) -> int:
        return self._load(linear, 8)

    def store2(self, linear: int, value: int) -> None:
        self._store(linear, 2, value)

    def store4(self, linear: int, value: int) -> None:
        self._store(linear, 4, value)

    def store8(self, linear: int, value: int) -> None:
        self._store(linear, 8, value)

    # -- the slow path: every case, exactly ----------------------------------------------------

    def read(self, linear: int, size: int, supervisor: bool = False) -> int:
        """An unsigned little-endian item of ``size`` bytes; both pages are checked before MMIO is touched."""
        at = self._loadable(linear, size, supervisor)
        if at >= 0:
            return int.from_bytes(self.bytes[at : at + size], "little")
        value = shift = 0
        for gpa, count in self._parts(linear, size, False, supervisor):
            value |= self.bus.read(gpa, count) << shift
            shift += 8 * count
        return value

    def write(self, linear: int, size: int, value: int, supervisor: bool = False) -> None:
        """The opposite of :meth:`read`; nothing is written if any page faults."""
        value &= (1 << 8 * size) - 1
        at = self._storable(linear, size, supervisor)
        if at >= 0:
            self.bytes[at : at + size] = value.to_bytes(size, "little")
            return
        for gpa, count in self._parts(linear, size, True, supervisor):
            self._write_physical(gpa, count, value & (1 << 8 * count) - 1)
            value >>= 8 * count

    def read_bytes(self, linear: int, size: int, supervisor: bool = False) -> bytes:
        """``size`` bytes from ``linear`` on; raises before anything is read if any page faults."""
        at = self._loadable(linear, size, supervisor)
        if at >= 0:
            return bytes(self.bytes[at : at + size])
        out = bytearray()
        for gpa, count in self._parts(linear, size, False, supervisor):
            offset = self.bus.lookup_page(gpa >> PAGE_SHIFT)
            if offset >= 0:
                offset += gpa & _OFFSET
                out += self.bytes[offset : offset + count]
            else:
                out += b"".join(self.bus.read(gpa + i, 1).to_bytes(1, "little") for i in range(count))
        return bytes(out)

    def write_bytes(self, linear: int, data: bytes, supervisor: bool = False) -> None:
        """The opposite of :meth:`read_bytes`; nothing is written if any page faults."""
        at = self._storable(linear, len(data), supervisor)
        if at >= 0:
            self.bytes[at : at + len(data)] = data
            return
        at = 0
        for gpa, count in self._parts(linear, len(data), True, supervisor):
            for i in range(0, count, 8):
                piece = data[at + i : at + min(i + 8, count)]
                self._write_physical(gpa + i, len(piece), int.from_bytes(piece, "little"))
            at += count

    def _loadable(self, linear: int, size: int, supervisor: bool) -> int:
        """Byte offset in RAM of an access within one page that the TLB has, or can have; else -1. Raises nothing."""
        return self._reachable(self._loads[self.user and not supervisor], linear, size)

    def _storable(self, linear: int, size: int, supervisor: bool) -> int:
        """As :meth:`_loadable`, for a store."""
        return self._reachable(self._stores[self.user and not supervisor], linear, size)

    def _reachable(self, tlb: Tlb, linear: int, size: int) -> int:
        linear &= _MASK64 if self.long else 0xFFFFFFFF
        if (linear & _OFFSET) + size > PAGE_SIZE:
            return -1
        page = linear >> PAGE_SHIFT
        delta = tlb.get(page)
        if delta is None:
            if page in self._slow:  # lately it was a device's or held code: do not walk for it twice
                return -1
            try:
                delta = tlb[page]
            except SlowAccess:
                if len(self._slow) >= SLOW_PAGES:
                    self._slow.clear()
                self._slow.add(page)
                return -1
        return delta + linear

    def check_write(self, linear: int, size: int, supervisor: bool = False) -> None:
        """Raise what a write there would raise; writes nothing but accessed and dirty flags."""
        self._parts(linear, size, True, supervisor)

    def _parts(self, linear: int, size: int, write: bool, supervisor: bool) -> list[tuple[int, int]]:
        """(gpa, bytes) of each page that the access touches, all of them translated."""
        mask = _MASK64 if self.long else 0xFFFFFFFF
        user = self.user and not supervisor
        out = []
        while size > 0:
            linear &= mask
            count = min(size, PAGE_SIZE - (linear & _OFFSET))
            out.append((self.translate(linear, write=write, user=user), count))
            linear += count
            size -= count
        return out

    def _write_physical(self, gpa: int, size: int, value: int) -> None:
        """One write inside one page. Code that it hits is dropped, code beside it stays."""
        offset = self.bus.lookup_page(gpa >> PAGE_SHIFT)
        if offset < 0 or not self.bus.writable_page(gpa >> PAGE_SHIFT):
            self.bus.write(gpa, size, value)
            return
        page, start = offset >> PAGE_SHIFT, gpa & _OFFSET
        flags = int(self.ram.state[page])
        if flags & CODE:
            self.code_written(page, start, start + size)
        if flags & (CLEAN | SNAPSHOT):
            self.ram.page_written(page, code=False)
        self.bytes[offset + start : offset + start + size] = value.to_bytes(size, "little")
