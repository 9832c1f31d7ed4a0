"""The receiving half of RAM: pages go straight into guest memory as they arrive.

Nothing waits: a page that comes again overwrites. Where pages have clients (translated code, a dirty
log) those are served first, as by any other accessor. What the stream may say (blocks, addresses) was
checked by the reader.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyvcpu.memory.pages import PAGE_SHIFT, PAGE_SIZE, TRAPS
from pyvcpu.memory.ram import GuestRam
from pyvcpu.migration.ram.zero import PageNumbers, as_words
from pyvcpu.migration.wire.records import RamPages


class RamDestination:
    """Guest RAM during an incoming migration."""

    def __init__(self, ram: GuestRam) -> None:
        self._ram = ram
        self._rows = ram.u8.reshape(-1, PAGE_SIZE)
        self._words = as_words(ram.u8)
        self._untouched = ~ram.backed()  # zeros, as long as nobody looks
        self._offsets = {block.name: block.offset for block in ram.blocks}
        self.pages = 0
        self.fill_pages = 0

    def take(self, record: RamPages) -> None:
        """Store a batch. Where an address comes twice in it the later one stays."""
        numbers = (record.addresses + self._offsets[record.block]) >> PAGE_SHIFT
        if record.data is not None:
            self._serve(numbers)
            self._untouched[numbers] = False
            self._rows[numbers] = record.data
            self.pages += len(numbers)
        elif record.fill is not None:
            self._fill(numbers, record.fill)
            self.fill_pages += len(numbers)

    def _fill(self, numbers: PageNumbers, fill: npt.NDArray[np.uint8]) -> None:
        """Pages of one byte each. One that holds it already is not written; untouched zeros are not even read."""
        patterns = fill.astype(np.uint64) * np.uint64(0x0101010101010101)
        # Of an address that comes twice only the last counts, and it must be compared with what is there now.
        numbers, last = np.unique(numbers[::-1], return_index=True)
        patterns = patterns[::-1][last]
        wanted = ~self._untouched[numbers] | (patterns != 0)
        numbers, patterns = numbers[wanted], patterns[wanted]
        differs = np.bitwise_or.reduce(self._words[numbers] ^ patterns[:, None], axis=1) != 0
        changed = numbers[differs]
        self._serve(changed)
        self._untouched[changed] = False
        self._words[changed] = patterns[differs][:, None]

    def _serve(self, numbers: PageNumbers) -> None:
        for page in numbers[(self._ram.state[numbers] & TRAPS) != 0]:
            self._ram.page_written(int(page))
