"""Pre-copy: guest RAM as QEMU's ``ram`` section, version 4, sent while the guest runs.

    START   u64 total | MEM_SIZE, then per block: u8 length, name, u64 size; then u64 EOS
    PART    page records, then u64 EOS
    END     the last of them, then u64 EOS

    page    u64 address | PAGE | CONTINUE    4096 bytes
    zero    u64 address | ZERO | CONTINUE    u8 fill = 0
    without CONTINUE the block's name (u8 length, name) stands between the two parts

``address`` is the byte within the block. Of a batch of n pages, one array of (n, 4104) bytes
is the wire form, filled by vectorised copies: nothing here loops over pages.

No store is lost: the pages to send are harvested first (at a region edge, so that every
store afterwards marks its page again) and copied later. A page torn by a store while it is copied
is sent again, because that store marked it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pyvcpu.errors import MigrationError
from pyvcpu.memory.pages import PAGE_SIZE
from pyvcpu.migration.ram.iterative import Batch
from pyvcpu.migration.ram.zero import PageNumbers, as_words, zero_pages

RAM_SAVE_ZERO, RAM_SAVE_MEM_SIZE, RAM_SAVE_PAGE = 0x02, 0x04, 0x08
RAM_SAVE_EOS, RAM_SAVE_CONTINUE = 0x10, 0x20

EOS = memoryview(struct.pack(">Q", RAM_SAVE_EOS))
PAGE_RECORD = 8 + PAGE_SIZE
ZERO_RECORD = 8 + 1

BATCH_PAGES = 1024
"""4 MiB: a batch costs a few hand-overs of the interpreter lock, so it must be large."""

MANY_PAGES = 4096
"""Of so many some were probably never touched: to ask the host is quicker than to look."""


class Block(Protocol):
    """What is needed of a RamBlock."""

    name: str
    size: int
    offset: int


class Ram(Protocol):
    """What is needed of GuestRam."""

    @property
    def blocks(self) -> Sequence[Any]: ...

    @property
    def u8(self) -> npt.NDArray[np.uint8]: ...

    @property
    def dirty(self) -> Any: ...

    @property
    def logging(self) -> bool: ...

    def backed(self) -> npt.NDArray[np.bool_]: ...

    def start_dirty_log(self) -> None: ...

    def harvest_dirty(self) -> npt.NDArray[Any]: ...

    def stop_dirty_log(self) -> None: ...


AtEdge = Callable[[Callable[[], Any]], Any]
"""Runs a function where no guest instruction is under way."""


class RamSource:
    """The ``ram`` section of one migration. ``at_edge`` is the machine's."""

    name, instance_id, version_id = "ram", 0, 4

    def __init__(self, ram: Ram, at_edge: AtEdge) -> None:
        self._ram, self._at_edge = ram, at_edge
        self._words = as_words(ram.u8)
        self._rows = ram.u8.reshape(-1, PAGE_SIZE)
        self._blocks: list[Block] = list(ram.blocks)
        self._starts = np.array([b.offset // PAGE_SIZE for b in self._blocks], np.int64)
        self._ends = np.array([(b.offset + b.size) // PAGE_SIZE for b in self._blocks], np.int64)
        self._todo: PageNumbers = np.empty(0, np.int64)
        self._at = 0
        self._block = -1  # whose name the stream has seen last
        self._backed: npt.NDArray[np.bool_] | None = None  # where looking it up is worth its time
        self._logging = False

    # -- the handler

    def setup(self) -> Batch:
        """Everything is dirty from here on. MigrationError while another migration uses the dirty log."""
        if self._ram.logging:
            raise MigrationError("another migration of this guest is under way")
        self._at_edge(self._ram.start_dirty_log)
        self._logging = True
        data = bytearray(struct.pack(">Q", sum(b.size for b in self._blocks) | RAM_SAVE_MEM_SIZE))
        for block in self._blocks:
            name = block.name.encode("ascii")
            data += struct.pack(">B", len(name)) + name + struct.pack(">Q", block.size)
        return Batch([memoryview(data), EOS], 0, 0)

    def synchronise(self) -> int:
        """Harvest at a region edge; what the last pass has not sent yet stays to be sent."""
        harvested = np.asarray(self._at_edge(self._ram.harvest_dirty), np.int64)
        left = self._todo[self._at :]
        self._todo = np.union1d(left, harvested) if len(left) else harvested
        # After the harvest: a page that is written from now on comes again, whatever it was taken for.
        self._backed = self._ram.backed() if len(self._todo) > MANY_PAGES else None
        self._at = 0
        return len(self._todo)

    def pending(self) -> int:
        return (len(self._todo) - self._at + int(self._ram.dirty.count)) * PAGE_RECORD

    @property
    def pending_pages(self) -> int:
        """Pages of this pass that were not sent yet."""
        return len(self._todo) - self._at

    def iterate(self, max_pages: int = BATCH_PAGES) -> Batch | None:
        if self._at >= len(self._todo):
            return None
        pages = self._todo[self._at : self._at + max_pages]
        batch = self._encode(pages)
        self._at += len(pages)
        return batch

    def complete(self) -> Iterator[Batch]:
        self.synchronise()
        last = Batch([EOS], 0, 0)
        while (batch := self.iterate()) is not None:
            if self._at >= len(self._todo):
                last = batch
            else:
                yield batch
        yield last

    def cleanup(self) -> None:
        """The log stops; what was dirty is forgotten, for the next migration begins with all pages."""
        if self._logging:
            self._logging = False
            self._at_edge(self._ram.stop_dirty_log)

    # -- the bytes

    def _encode(self, pages: PageNumbers) -> Batch:
        """``pages`` (sorted page numbers of the mapping) as the data of one section."""
        chunks: list[memoryview] = []
        zeros = 0
        bounds = np.searchsorted(pages, self._starts), np.searchsorted(pages, self._ends)
        for index, (first, last) in enumerate(zip(*bounds, strict=True)):
            if first == last:
                continue
            of_block = pages[first:last]
            zero = zero_pages(self._words, of_block, self._backed)
            zeros += int(np.count_nonzero(zero))
            for numbers, flag in ((of_block[zero], RAM_SAVE_ZERO), (of_block[~zero], RAM_SAVE_PAGE)):
                if len(numbers):
                    chunks += self._records(index, numbers, flag)
        chunks.append(EOS)
        return Batch(chunks, len(pages) - zeros, zeros)

    def _records(self, index: int, pages: PageNumbers, flag: int) -> list[memoryview]:
        """The records of pages of one block and one kind."""
        size = PAGE_RECORD if flag == RAM_SAVE_PAGE else ZERO_RECORD
        records = np.zeros((len(pages), size), np.uint8) if flag == RAM_SAVE_ZERO else None
        if records is None:
            records = np.empty((len(pages), size), np.uint8)
            first, last = int(pages[0]), int(pages[-1])
            whole_run = last - first + 1 == len(pages)
            records[:, 8:] = self._rows[first : last + 1] if whole_run else self._rows[pages]
        addresses = ((pages - self._starts[index]) * PAGE_SIZE) | (flag | RAM_SAVE_CONTINUE)
        records[:, :8] = addresses.astype(">u8").view(np.uint8).reshape(-1, 8)
        data = records.reshape(-1).data
        if self._block == index:
            return [data]
        # The first record of another block carries its name and no CONTINUE.
        self._block = index
        name = self._blocks[index].name.encode("ascii")
        head = struct.pack(">QB", int(addresses[0]) & ~RAM_SAVE_CONTINUE, len(name)) + name
        return [memoryview(head), data[8:]]
