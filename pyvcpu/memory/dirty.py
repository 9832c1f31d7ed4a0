"""DirtyBitmap: which pages were written since the last harvest."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PageNumbers = npt.NDArray[np.int64]


class DirtyBitmap:
    """One byte a page (a byte store is atomic under the interpreter lock; a bit would not be)."""

    def __init__(self, npages: int) -> None:
        self._marks = bytearray(npages)

    def __len__(self) -> int:
        return len(self._marks)

    def mark(self, page: int) -> None:
        self._marks[page] = 1

    def mark_range(self, first: int, count: int) -> None:
        self._marks[first : first + count] = b"\1" * count

    def mark_all(self) -> None:
        self.mark_range(0, len(self._marks))

    def merge(self, pages: PageNumbers) -> None:
        """Mark pages again: what was harvested but not sent."""
        np.frombuffer(self._marks, np.uint8)[pages] = 1

    def is_dirty(self, page: int) -> bool:
        return bool(self._marks[page])

    @property
    def count(self) -> int:
        """Pages marked now."""
        return self._marks.count(1)

    def harvest(self) -> PageNumbers:
        """The marked pages, ascending, and none marked any more. Atomic: one swap of a reference."""
        taken, self._marks = self._marks, bytearray(len(self._marks))
        return np.flatnonzero(np.frombuffer(taken, np.uint8))
