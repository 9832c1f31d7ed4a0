"""GuestRam: all of a machine's memory blocks in one shared mapping, with a byte of state a page.

    mapping   | block 0 (microvm.ram)        | block 1 (pc.bios) | ...
    state     | one byte a page: PRESENT CLEAN CODE SNAPSHOT (pages.py)

Every accessor but the engine's own fast path goes through :meth:`GuestRam.acquire`, which serves the
clients of the pages first: the dirty log, the code cache, a snapshot.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from pyvcpu.errors import ConfigurationError
from pyvcpu.memory.dirty import DirtyBitmap, PageNumbers
from pyvcpu.memory.pages import CLEAN, CODE, PAGE_SHIFT, PAGE_SIZE, PRESENT, SNAPSHOT, TRAPS


class RamBlock:
    """A named piece of the mapping: ``size`` bytes from byte ``offset`` on, as in QEMU's ``ram`` section."""

    __slots__ = ("name", "offset", "size")

    def __init__(self, name: str, size: int, offset: int) -> None:
        self.name, self.size, self.offset = name, size, offset

    @property
    def pages(self) -> range:
        """Page numbers of the block within the mapping."""
        return range(self.offset >> PAGE_SHIFT, (self.offset + self.size) >> PAGE_SHIFT)

    def __repr__(self) -> str:
        return f"RamBlock({self.name!r}, size={self.size:#x}, offset={self.offset:#x})"


class GuestRam:
    """The blocks named in ``blocks``, (name, bytes) each; sizes are multiples of 4096.

    ``u8`` is a numpy array of all bytes, ``view8`` .. ``view64`` memoryviews of the same bytes as items of that
    width. Raises ConfigurationError for a size that is not a positive multiple of a page, or a name used twice.
    """

    def __init__(self, blocks: Sequence[tuple[str, int]]) -> None:
        self.blocks: list[RamBlock] = []
        offset = 0
        for name, size in blocks:
            if size <= 0 or size % PAGE_SIZE:
                raise ConfigurationError(
                    f"RAM block {name!r}: size {size:#x} is not a positive multiple of {PAGE_SIZE:#x}"
                )
            if any(block.name == name for block in self.blocks):
                raise ConfigurationError(f"RAM block {name!r} is there twice")
            self.blocks.append(RamBlock(name, size, offset))
            offset += size
        self.size = offset
        self._fd = os.memfd_create("pyvcpu-ram", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, offset)
            self._map = mmap.mmap(self._fd, offset)
        except OSError as error:
            os.close(self._fd)
            raise ConfigurationError(f"cannot map {offset:#x} bytes of guest RAM: {error}") from error
        self._close_fd = weakref.finalize(self, os.close, self._fd)
        self.view8 = memoryview(self._map)
        self.view16, self.view32, self.view64 = self.view8.cast("H"), self.view8.cast("I"), self.view8.cast("Q")
        self.u8: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self.npages = offset >> PAGE_SHIFT
        states = bytearray([PRESENT]) * self.npages
        self.state: npt.NDArray[np.uint8] = np.frombuffer(states, np.uint8)
        self._states = memoryview(states)  # the same bytes: one at a time is three times as fast this way
        self.dirty = DirtyBitmap(self.npages)
        self.logging = False
        self._snapshot: Callable[[int], None] | None = None
        self._traps: list[Callable[[], None]] = []
        self._code: list[Callable[[int], None]] = []

    def block(self, name: str) -> RamBlock:
        """The block of that name; ConfigurationError if there is none."""
        for block in self.blocks:
            if block.name == name:
                return block
        raise ConfigurationError(f"there is no RAM block {name!r}")

    # -- access -------------------------------------------------------------------------------

    def acquire(self, offset: int, length: int, write: bool) -> memoryview:
        """``length`` bytes at byte ``offset`` of the mapping, as a view to be used at once.

        For a write every page's clients are served first. The view must not outlive the next region edge: a
        harvest there would count later stores through it as done. Raises IndexError outside of the mapping.
        """
        end = offset + length
        if offset < 0 or length < 0 or end > self.size:
            raise IndexError(f"RAM access of {length:#x} bytes at {offset:#x}, size {self.size:#x}")
        if write and length:
            first, last = offset >> PAGE_SHIFT, (end - 1) >> PAGE_SHIFT
            if first == last:
                if self._states[first] & TRAPS:
                    self.page_written(first)
            else:
                self._range_written(first, last + 1)
        return self.view8[offset:end]

    def _range_written(self, first: int, end: int) -> None:
        """:meth:`page_written` for pages ``first`` to ``end``, the dirty log's part of it at once."""
        states = self.state[first:end]
        for page in np.flatnonzero(states & (CODE | SNAPSHOT)).tolist():
            self.page_written(first + page)
        clean = np.flatnonzero(states & CLEAN)
        if len(clean):
            self.dirty.merge(clean + first)
            states[clean] &= ~np.uint8(CLEAN)

    def read(self, offset: int, length: int) -> bytes:
        """A copy of ``length`` bytes at byte ``offset`` of the mapping."""
        return bytes(self.acquire(offset, length, False))

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Store ``data`` at byte ``offset`` of the mapping."""
        self.acquire(offset, len(data), True)[:] = data

    def backed(self) -> npt.NDArray[np.bool_]:
        """Which pages the host holds memory for, (npages,); the others are zeros that nobody has touched.

        Merely to read one of those through the mapping would make the host allocate it.
        """
        held = np.zeros(self.npages, np.bool_)
        at = 0
        while at < self.size:
            try:
                first = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # there is no more data
                    raise
                break
            at = os.lseek(self._fd, first, os.SEEK_HOLE)
            held[first >> PAGE_SHIFT : -(-at >> PAGE_SHIFT)] = True
        return held

    # -- page states --------------------------------------------------------------------------

    def page_written(self, page: int, *, code: bool = True) -> None:
        """The first store to a page that has a client: serve the client, and let later stores pass.

        With ``code`` False the CODE bit stays: the caller has dropped just the code that its bytes hit.
        """
        states = self._states
        flags = states[page]
        if flags & SNAPSHOT:
            if self._snapshot is not None:
                self._snapshot(page)
            flags &= ~SNAPSHOT
        if flags & CLEAN:
            self.dirty.mark(page)
            flags &= ~CLEAN
        dropped = code and flags & CODE
        if dropped:
            flags &= ~CODE
        states[page] = flags
        if dropped:
            for listener in self._code:
                listener(page)

    def set_code(self, page: int) -> None:
        """Code was translated from this page: stores to it must be seen."""
        if not self._states[page] & CODE:
            self._states[page] |= CODE
            self._trap()

    def clear_code(self, page: int) -> None:
        """No translated code has bytes on this page any more."""
        self._states[page] &= ~CODE

    def add_trap_listener(self, listener: Callable[[], None]) -> None:
        """``listener()`` is called when store TLB entries must be dropped."""
        self._traps.append(listener)

    def add_code_listener(self, listener: Callable[[int], None]) -> None:
        """``listener(page)`` is called when anything but the engine's own stores hit a page with code."""
        self._code.append(listener)

    def _trap(self) -> None:
        for listener in self._traps:
            listener()

    # -- the dirty log ------------------------------------------------------------------------

    def start_dirty_log(self) -> None:
        """Everything is dirty, and every page's first store from now on will be seen. At a region edge only."""
        self.logging = True
        self.dirty.mark_all()
        self.state |= CLEAN
        self._trap()

    def harvest_dirty(self) -> PageNumbers:
        """Pages written since the last harvest, ascending; they are clean from here on. At a region edge only."""
        pages = self.dirty.harvest()
        self.state[pages] |= CLEAN
        self._trap()
        return pages

    def stop_dirty_log(self) -> None:
        """Nobody asks any more."""
        self.logging = False
        self.state &= ~np.uint8(CLEAN)
        self.dirty.harvest()
        self._trap()

    # -- snapshots ----------------------------------------------------------------------------

    def start_snapshot(self, handler: Callable[[int], None]) -> None:
        """``handler(page)`` is called before the first store to each page from now on. At a region edge only."""
        self._snapshot = handler
        self.state |= SNAPSHOT
        self._trap()

    def page_saved(self, page: int) -> None:
        """The snapshot has this page: stores to it need not be seen any more."""
        self._states[page] &= ~SNAPSHOT

    def stop_snapshot(self) -> None:
        """No handler is called any more."""
        self._snapshot = None
        self.state &= ~np.uint8(SNAPSHOT)

    def close(self) -> None:
        """Give the memory back; the views of this object are unusable afterwards.

        Where somebody still holds a view or an array of it, the mapping goes when they do.
        """
        self._close_fd()
        self.u8 = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):
            for view in (self.view64, self.view32, self.view16, self.view8):
                view.release()
            self._map.close()
