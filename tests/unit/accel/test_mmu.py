"""The page walk (SDM 3A 4.5 to 4.8): rights at every level, error codes, accessed and dirty flags, large pages."""

from __future__ import annotations

import pytest

from pyvcpu.accel.tcg.mmu import Mmu
from pyvcpu.cpu.events import GP, PF, GuestException
from pyvcpu.cpu.state import CpuState
from pyvcpu.memory.bus import Bus
from pyvcpu.memory.ram import GuestRam

PML4, PDPT, PD, PT, PAGE = 0x1000, 0x2000, 0x3000, 0x4000, 0x8000
P, W, U, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
LINEAR = 0x0000_1234_5678_9ABC & ~0x1FF_FFFF | 0x5678  # any canonical address; its indexes come from it

READ, WRITE, FETCH = "read", "write", "fetch"


class Walk:
    """Tables for one address, all rights given; tests take some away."""

    def __init__(self) -> None:
        self.ram = GuestRam([("ram", 16 << 20)])
        self.bus = Bus(self.ram)
        self.bus.map_ram(0, 16 << 20, self.ram.block("ram"))
        self.state = CpuState()
        self.state.reset()
        self.state.cr0, self.state.cr3, self.state.cr4, self.state.efer = 0x80010011, PML4, 0x20, 0xD00
        self.mmu = Mmu(self.state, self.ram, self.bus)
        self.mmu.long = True
        self.linear = LINEAR
        self.places = [
            (table + (self.linear >> shift & 511) * 8) for table, shift in ((PML4, 39), (PDPT, 30), (PD, 21), (PT, 12))
        ]
        for place, entry in zip(self.places, (PDPT, PD, PT, PAGE), strict=True):
            self.bus.write(place, 8, entry | P | W | U)

    def change(self, level: int, *, set_bits: int = 0, clear: int = 0) -> None:
        """Change the entry of a level, 4 (PML4E) to 1 (PTE)."""
        place = self.places[4 - level]
        self.bus.write(place, 8, self.bus.read(place, 8) & ~clear | set_bits)

    def entry(self, level: int) -> int:
        return self.bus.read(self.places[4 - level], 8)

    def translate(self, access: str = READ, user: bool = False) -> int:
        return self.mmu.translate(self.linear, write=access == WRITE, fetch=access == FETCH, user=user)

    def fault(self, access: str = READ, user: bool = False) -> GuestException:
        with pytest.raises(GuestException) as caught:
            self.translate(access, user)
        return caught.value


def test_four_levels() -> None:
    walk = Walk()
    assert walk.translate() == PAGE | (LINEAR & 0xFFF)


@pytest.mark.parametrize(("level", "shift"), [(2, 21), (3, 30)])
def test_large_pages(level: int, shift: int) -> None:
    walk = Walk()
    place = walk.places[4 - level]
    base = (3 << shift) & ((1 << 40) - 1)
    walk.bus.write(place, 8, base | P | W | U | PS)
    assert walk.translate() == base | (LINEAR & ((1 << shift) - 1))


@pytest.mark.parametrize("level", [4, 3, 2, 1])
@pytest.mark.parametrize(
    ("access", "user", "code"), [(READ, False, 0), (WRITE, False, 2), (READ, True, 4), (WRITE, True, 6)]
)
def test_not_present(level: int, access: str, user: bool, code: int) -> None:
    walk = Walk()
    walk.change(level, clear=P)
    error = walk.fault(access, user)
    assert (error.vector, error.error_code, error.cr2) == (PF, code, LINEAR)


@pytest.mark.parametrize("level", [4, 3, 2, 1])
def test_every_level_must_allow_user_access(level: int) -> None:
    walk = Walk()
    walk.change(level, clear=U)
    assert walk.fault(READ, user=True).error_code == 5
    assert walk.fault(WRITE, user=True).error_code == 7
    walk.translate(WRITE)  # the supervisor may


@pytest.mark.parametrize("level", [4, 3, 2, 1])
def test_every_level_must_allow_writes(level: int) -> None:
    walk = Walk()
    walk.change(level, clear=W)
    assert walk.fault(WRITE, user=True).error_code == 7
    assert walk.fault(WRITE).error_code == 3
    walk.translate(READ, user=True)
    walk.state.cr0 &= ~(1 << 16)  # without WP the supervisor writes anyway
    walk.translate(WRITE)
    assert walk.fault(WRITE, user=True).error_code == 7


@pytest.mark.parametrize("level", [4, 3, 2, 1])
def test_no_execute(level: int) -> None:
    walk = Walk()
    walk.change(level, set_bits=NX)
    assert walk.fault(FETCH).error_code == 0x11
    assert walk.fault(FETCH, user=True).error_code == 0x15
    walk.translate(READ)
    walk.state.efer &= ~0x800  # without NXE the bit is reserved
    assert walk.fault(READ).error_code == 9


def test_a_fetch_fault_says_so_only_with_nxe() -> None:
    walk = Walk()
    walk.change(1, clear=P)
    assert walk.fault(FETCH).error_code == 0x10
    walk.state.efer &= ~0x800
    assert walk.fault(FETCH).error_code == 0


@pytest.mark.parametrize(
    ("level", "bit"),
    [(4, 7), (4, 45), (3, 45), (2, 45), (1, 45), (1, 51)],  # PS of a PML4E, address bits beyond MAXPHYADDR
)
def test_reserved_bits(level: int, bit: int) -> None:
    walk = Walk()
    walk.change(level, set_bits=1 << bit)
    assert walk.fault(READ).error_code == 9
    assert walk.fault(WRITE, user=True).error_code == 0xF


@pytest.mark.parametrize(("level", "bit"), [(2, 13), (2, 20), (3, 13), (3, 29)])
def test_reserved_bits_of_large_pages(level: int, bit: int) -> None:
    walk = Walk()
    walk.bus.write(walk.places[4 - level], 8, P | W | U | PS | 1 << bit)
    assert walk.fault(READ).error_code == 9
    walk.bus.write(walk.places[4 - level], 8, P | W | U | PS | 1 << 12)  # PAT is not reserved
    walk.translate(READ)


def test_accessed_and_dirty() -> None:
    walk = Walk()
    walk.translate(READ)
    assert [walk.entry(level) & (A | D) for level in (4, 3, 2, 1)] == [A, A, A, A]
    walk.translate(WRITE)
    assert [walk.entry(level) & (A | D) for level in (4, 3, 2, 1)] == [A, A, A, A | D]


def test_a_fault_marks_only_what_was_used() -> None:
    walk = Walk()
    walk.change(2, clear=P)
    walk.fault(READ)
    assert [walk.entry(level) & A for level in (4, 3, 2)] == [A, A, 0]


def test_a_refused_write_is_not_dirty() -> None:
    walk = Walk()
    walk.change(1, clear=W)
    walk.fault(WRITE, user=True)
    assert not walk.entry(1) & D


@pytest.mark.parametrize("linear", [1 << 47, 0xFFFF_7FFF_FFFF_FFFF, 1 << 63])
def test_not_canonical(linear: int) -> None:
    walk = Walk()
    walk.linear = linear
    error = walk.fault()
    assert (error.vector, error.error_code) == (GP, 0)


def test_an_access_across_pages_writes_nothing_if_the_second_faults() -> None:
    walk = Walk()
    walk.mmu.write(LINEAR & ~0xFFF | 0xFF0, 8, 0x1111)
    with pytest.raises(GuestException) as caught:
        walk.mmu.write(LINEAR & ~0xFFF | 0xFFC, 8, (1 << 64) - 1)
    assert caught.value.cr2 == (LINEAR & ~0xFFF) + 0x1000
    assert walk.ram.read(PAGE + 0xFFC, 4) == bytes(4)


def test_tables_are_read_anew_after_a_flush() -> None:
    walk = Walk()
    walk.ram.write(PAGE, b"old page")
    walk.ram.write(PAGE + 0x1000, b"new page")
    start = LINEAR & ~0xFFF
    assert walk.mmu.load8(start).to_bytes(8, "little") == b"old page"
    walk.change(1, set_bits=0x1000)
    assert walk.mmu.load8(start).to_bytes(8, "little") == b"old page"
    walk.mmu.flush()
    assert walk.mmu.load8(start).to_bytes(8, "little") == b"new page"
