"""The bus: who answers for an address."""

from __future__ import annotations

import pytest

from pyvcpu.errors import ConfigurationError
from pyvcpu.memory.bus import Bus
from pyvcpu.memory.pages import PAGE_SIZE
from pyvcpu.memory.ram import GuestRam

MIB = 1 << 20


class Recorder:
    """A device that answers with its offset and notes what is asked of it."""

    def __init__(self) -> None:
        self.log: list[tuple] = []

    def read(self, offset: int, size: int) -> int:
        self.log.append(("r", offset, size))
        return 0xA0A0A0A0A0A0A000 | offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("w", offset, size, value))


@pytest.fixture
def bus():
    ram = GuestRam([("microvm.ram", 2 * MIB), ("pc.bios", 0x10000)])
    bus = Bus(ram)
    bus.map_ram(0, 2 * MIB, ram.block("microvm.ram"))
    yield bus
    ram.close()


class TestMemory:
    @pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
    @pytest.mark.parametrize("gpa", [0x100, 0xFFF, 0xFFD, 2 * MIB - 8])
    def test_ram_at_every_alignment(self, bus: Bus, gpa: int, size: int) -> None:
        value = 0x1122334455667788 & (1 << 8 * size) - 1
        bus.write(gpa, size, value)
        assert bus.read(gpa, size) == value
        assert bus.ram.read(gpa, size) == value.to_bytes(size, "little")

    def test_nothing_reads_as_zero_and_takes_writes(self, bus: Bus) -> None:
        bus.write(3 * MIB, 4, 0xFFFFFFFF)
        assert bus.read(3 * MIB, 4) == 0
        assert bus.read(1 << 52, 8) == 0
        assert bus.lookup_page(3 * MIB >> 12) == -1 and not bus.writable_page(3 * MIB >> 12)

    def test_the_edge_of_ram(self, bus: Bus) -> None:
        bus.write(2 * MIB - 2, 4, 0xAABBCCDD)
        assert bus.read(2 * MIB - 2, 4) == 0xCCDD

    def test_writes_are_seen_by_the_dirty_log(self, bus: Bus) -> None:
        bus.ram.start_dirty_log()
        bus.ram.harvest_dirty()
        bus.write(0x2FFE, 4, 1)
        assert bus.ram.harvest_dirty().tolist() == [2, 3]

    def test_rom_hides_ram_and_ignores_writes(self, bus: Bus) -> None:
        ram, bios = bus.ram, bus.ram.block("pc.bios")
        bus.write(0xF0000, 4, 0x11111111)
        ram.write(bios.offset, b"BIOS")
        bus.map_ram(0xF0000, 0x10000, bios, readonly=True)
        bus.map_ram(0xFFFF0000, 0x10000, bios, readonly=True)
        for gpa in (0xF0000, 0xFFFF0000):
            assert bus.read(gpa, 4) == int.from_bytes(b"BIOS", "little")
            assert bus.lookup_page(gpa >> 12) == bios.offset and not bus.writable_page(gpa >> 12)
            bus.write(gpa, 4, 0)
        assert ram.read(bios.offset, 4) == b"BIOS"
        assert ram.read(0xF0000, 4) == b"\x11" * 4
        assert bus.writable_page(0xEF)

    def test_part_of_a_block(self, bus: Bus) -> None:
        bus.map_ram(0xE0000, PAGE_SIZE, bus.ram.block("pc.bios"), 0xF000)
        assert bus.lookup_page(0xE0) == 2 * MIB + 0xF000
        assert bus.writable_page(0xE0)

    @pytest.mark.parametrize(("gpa", "size", "at"), [(1, 4096, 0), (0, 100, 0), (0, 4096, 100), (0, 0x10000, 0x1000)])
    def test_refuses_parts_of_pages_and_too_much(self, bus: Bus, gpa: int, size: int, at: int) -> None:
        with pytest.raises(ConfigurationError):
            bus.map_ram(gpa, size, bus.ram.block("pc.bios"), at)


class TestMmio:
    def test_hides_ram_gets_offsets_and_can_move(self, bus: Bus) -> None:
        device, changes = Recorder(), []
        bus.add_map_listener(lambda: changes.append(1))
        bus.write(0x5010, 4, 0x12345678)
        bus.map_mmio(0x5000, PAGE_SIZE, device, "apic")
        assert bus.lookup_page(5) == -1
        assert bus.read(0x5010, 4) == 0xA0A0A010
        bus.write(0x5020, 4, 9)
        bus.unmap_mmio("apic")
        assert bus.read(0x5010, 4) == 0x12345678
        bus.map_mmio(0xFEE00000, PAGE_SIZE, device, "apic")
        assert bus.read(0xFEE00FF0, 1) == 0xF0
        assert device.log == [("r", 0x10, 4), ("w", 0x20, 4, 9), ("r", 0xFF0, 1)]
        assert len(changes) == 3

    def test_the_later_region_wins(self, bus: Bus) -> None:
        first, second = Recorder(), Recorder()
        bus.map_mmio(0xD0000000, 4 * PAGE_SIZE, first, "first")
        bus.map_mmio(0xD0001000, PAGE_SIZE, second, "second")
        for page in range(4):
            bus.read(0xD0000000 + page * PAGE_SIZE, 4)
        assert [offset for _, offset, _ in first.log] == [0, 0x2000, 0x3000]
        assert [offset for _, offset, _ in second.log] == [0]

    def test_an_access_over_two_pages_is_two(self, bus: Bus) -> None:
        device = Recorder()
        bus.map_mmio(2 * MIB, PAGE_SIZE, device, "next to RAM")
        bus.write(2 * MIB - 2, 4, 0xAABBCCDD)
        assert device.log == [("w", 0, 2, 0xAABB)]
        assert bus.ram.read(2 * MIB - 2, 2) == b"\xdd\xcc"

    def test_whole_pages_only(self, bus: Bus) -> None:
        with pytest.raises(ConfigurationError):
            bus.map_mmio(0x1000, 0x100, Recorder(), "small")


class TestPorts:
    def test_nobody(self, bus: Bus) -> None:
        assert [bus.io_read(0x80, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
        bus.io_write(0x80, 4, 1)

    def test_offsets_and_sizes(self, bus: Bus) -> None:
        device = Recorder()
        bus.map_io(0x3F8, 8, device, "serial")
        assert bus.io_read(0x3FD, 1) == 5
        bus.io_write(0x3F8, 2, 0x4142)
        assert device.log == [("r", 5, 1), ("w", 0, 2, 0x4142)]
        assert bus.io_read(0x400, 1) == 0xFF

    def test_a_wide_access_that_begins_at_nobody(self, bus: Bus) -> None:
        device = Recorder()
        bus.map_io(0x3F8, 8, device, "serial")
        assert bus.io_read(0x3F6, 4) == 0x0100FFFF
        bus.io_write(0x3F6, 4, 0x44332211)
        assert device.log == [("r", 0, 1), ("r", 1, 1), ("w", 0, 1, 0x33), ("w", 1, 1, 0x44)]

    def test_ports_wrap(self, bus: Bus) -> None:
        device = Recorder()
        bus.map_io(0, 1, device, "first")
        bus.io_write(0xFFFF, 2, 0x1234)
        assert device.log == [("w", 0, 1, 0x12)]

    def test_taken_and_impossible_ports(self, bus: Bus) -> None:
        bus.map_io(0x3F8, 8, Recorder(), "serial")
        with pytest.raises(ConfigurationError, match="0x3ff"):
            bus.map_io(0x3FF, 2, Recorder(), "other")
        assert bus.io_read(0x400, 1) == 0xFF  # nothing of a refused mapping is left
        for port, count in ((0xFFFF, 2), (-1, 1), (4, 0)):
            with pytest.raises(ConfigurationError):
                bus.map_io(port, count, Recorder(), "other")


def test_a_walk_over_all_of_physical_memory_does_not_fill_ours(bus: Bus) -> None:
    for page in range((1 << 20) + 10):
        bus.lookup_page((1 << 30) + page)
    assert len(bus._pages) <= 1 << 20
