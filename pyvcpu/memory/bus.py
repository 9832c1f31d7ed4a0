"""The bus: which guest physical address is RAM, ROM or a device, and which port is whose.

Physical memory is a table of pages: each leads to a byte offset in :class:`GuestRam`, or to nothing, where
MMIO regions are looked up. Later mappings hide earlier ones, MMIO hides RAM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from pyvcpu.errors import ConfigurationError
from pyvcpu.memory.pages import PAGE_SHIFT, PAGE_SIZE
from pyvcpu.memory.ram import GuestRam, RamBlock

_OFFSET = PAGE_SIZE - 1


class Device(Protocol):
    """What MMIO regions and ports are mapped to. ``size`` is 1, 2, 4 or 8 bytes; ``offset`` counts from the mapping."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...


class MmioRegion(NamedTuple):
    base: int
    size: int
    device: Device
    name: str


class _RamRange(NamedTuple):
    first: int  # guest physical page
    npages: int
    offset: int  # byte offset in RAM of the first page
    readonly: bool


class Bus:
    """Physical memory and ports of one machine."""

    def __init__(self, ram: GuestRam) -> None:
        self.ram = ram
        self._ranges: list[_RamRange] = []
        self._mmio: list[MmioRegion] = []
        self._mmio_pages: set[int] = set()
        self._pages: dict[int, int] = {}  # guest page -> RAM offset, or -1; a cache of _find
        self._readonly: set[int] = set()
        self._ports: dict[int, tuple[int, Device]] = {}
        self._listeners: list[Callable[[], None]] = []

    # -- the map ------------------------------------------------------------------------------

    def map_ram(self, gpa: int, size: int, block: RamBlock, block_offset: int = 0, readonly: bool = False) -> None:
        """Show ``size`` bytes of ``block`` at ``gpa``. ``readonly`` makes it ROM: guest writes are ignored."""
        if (gpa | size | block_offset) & _OFFSET or block_offset + size > block.size:
            raise ConfigurationError(f"cannot map {size:#x} bytes of {block.name} at {gpa:#x}")
        offset = block.offset + block_offset
        self._ranges.insert(0, _RamRange(gpa >> PAGE_SHIFT, size >> PAGE_SHIFT, offset, readonly))
        self._map_changed()

    def map_mmio(self, base: int, size: int, device: Device, name: str) -> None:
        """Let ``device`` answer for ``size`` bytes at ``base`` (multiples of a page)."""
        if (base | size) & _OFFSET:
            raise ConfigurationError(f"MMIO region {name} at {base:#x} is not made of whole pages")
        self._mmio.insert(0, MmioRegion(base, size, device, name))
        self._mmio_changed()

    def unmap_mmio(self, name: str) -> None:
        """Take an MMIO region away (the LAPIC moves, or is switched off)."""
        self._mmio = [region for region in self._mmio if region.name != name]
        self._mmio_changed()

    def map_io(self, port: int, count: int, device: Device, name: str) -> None:
        """Let ``device`` answer for ``count`` ports from ``port`` on."""
        if count < 1 or not 0 <= port <= port + count - 1 <= 0xFFFF:
            raise ConfigurationError(f"{name}: there are no ports {port:#x} to {port + count - 1:#x}")
        for at in range(port, port + count):
            if at in self._ports:
                raise ConfigurationError(f"{name}: port {at:#x} is taken")
        for at in range(port, port + count):
            self._ports[at] = (port, device)

    def _mmio_changed(self) -> None:
        self._mmio_pages = {
            page for r in self._mmio for page in range(r.base >> PAGE_SHIFT, (r.base + r.size) >> PAGE_SHIFT)
        }
        self._map_changed()

    def add_map_listener(self, listener: Callable[[], None]) -> None:
        """``listener()`` is called when addresses change their meaning: translations to RAM must be dropped."""
        self._listeners.append(listener)

    def _map_changed(self) -> None:
        self._forget()
        for listener in self._listeners:
            listener()

    def _forget(self) -> None:
        self._pages.clear()
        self._readonly.clear()

    # -- look-up ------------------------------------------------------------------------------

    def lookup_page(self, gpa_page: int) -> int:
        """Byte offset in RAM of a guest physical page, or -1 where it is MMIO or nothing."""
        found = self._pages.get(gpa_page)
        if found is None:
            found = self._pages[gpa_page] = self._find(gpa_page)
        return found

    def writable_page(self, gpa_page: int) -> bool:
        """Whether guest stores reach the RAM page (False for ROM)."""
        return self.lookup_page(gpa_page) >= 0 and gpa_page not in self._readonly

    def _find(self, gpa_page: int) -> int:
        if len(self._pages) > 1 << 20:  # a guest that walks all of physical memory must not fill ours
            self._forget()
        if gpa_page in self._mmio_pages:
            return -1
        for r in self._ranges:
            if r.first <= gpa_page < r.first + r.npages:
                if r.readonly:
                    self._readonly.add(gpa_page)
                return r.offset + ((gpa_page - r.first) << PAGE_SHIFT)
        return -1

    # -- memory accesses ----------------------------------------------------------------------

    def read(self, gpa: int, size: int) -> int:
        """An unsigned little-endian item of ``size`` bytes. Unassigned memory reads as 0."""
        room = PAGE_SIZE - (gpa & _OFFSET)
        if size > room:
            return self.read(gpa, room) | self.read(gpa + room, size - room) << (8 * room)
        offset = self.lookup_page(gpa >> PAGE_SHIFT)
        if offset >= 0:
            offset += gpa & _OFFSET
            return int.from_bytes(self.ram.acquire(offset, size, False), "little")
        region = self._region(gpa)
        return region.device.read(gpa - region.base, size) & (1 << 8 * size) - 1 if region else 0

    def write(self, gpa: int, size: int, value: int) -> None:
        """The opposite of :meth:`read`. Writes to ROM and to nothing are ignored."""
        room = PAGE_SIZE - (gpa & _OFFSET)
        if size > room:
            self.write(gpa, room, value & (1 << 8 * room) - 1)
            self.write(gpa + room, size - room, value >> 8 * room)
            return
        offset = self.lookup_page(gpa >> PAGE_SHIFT)
        if offset >= 0:
            if gpa >> PAGE_SHIFT not in self._readonly:
                self.ram.acquire(offset + (gpa & _OFFSET), size, True)[:] = value.to_bytes(size, "little")
            return
        region = self._region(gpa)
        if region:
            region.device.write(gpa - region.base, size, value)

    def _region(self, gpa: int) -> MmioRegion | None:
        if gpa >> PAGE_SHIFT not in self._mmio_pages:
            return None
        return next(r for r in self._mmio if r.base <= gpa < r.base + r.size)

    # -- ports --------------------------------------------------------------------------------

    def io_read(self, port: int, size: int) -> int:
        """Read a port; what nobody answers for reads as all ones.

        The device of the first port gets the whole access; where there is none, each byte is looked up.
        """
        found = self._ports.get(port)
        if found is not None:
            base, device = found
            return device.read(port - base, size) & (1 << 8 * size) - 1
        if size == 1:
            return 0xFF
        return sum(self.io_read(port + i & 0xFFFF, 1) << 8 * i for i in range(size))

    def io_write(self, port: int, size: int, value: int) -> None:
        """Write a port, by the same rule as :meth:`io_read`; what nobody answers for is ignored."""
        found = self._ports.get(port)
        if found is not None:
            base, device = found
            device.write(port - base, size, value)
        elif size > 1:
            for i in range(size):
                self.io_write(port + i & 0xFFFF, 1, value >> 8 * i & 0xFF)
