"""DirtyBitmap: which pages were written since the last harvest."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PageNumbers = npt.NDArray[np.int64]


class DirtyBitmap:
    """One byte a page: a byte store is atomic under the interpreter lock, setting one bit of a byte would not be."""

    def __init__(self, npages: int) -> None:
        self._marks = bytearray(npages)
        self._array = np.frombuffer(self._marks, np.uint8)

    def __len__(self) -> int:
        return len(self._marks)

    def mark(self, page: int) -> None:
        """Page ``page`` was written."""
        self._marks[page] = 1

    def mark_range(self, first: int, count: int) -> None:
        """``count`` pages from ``first`` on were written."""
        self._array[first : first + count] = 1

    def mark_all(self) -> None:
        """Every page must be sent, as when a migration begins."""
        self.mark_range(0, len(self._marks))

    def merge(self, pages: PageNumbers) -> None:
        """Mark pages again: what was harvested but not sent."""
        self._array[pages] = 1

    def is_dirty(self, page: int) -> bool:
        """Whether the page was written since the last harvest."""
        return bool(self._marks[page])

    @property
    def count(self) -> int:
        """Pages marked now."""
        return self._marks.count(1)

    def harvest(self) -> PageNumbers:
        """The marked pages, ascending; their marks are gone.

        No mark is ever lost: the set is fixed by one copy, and only the marks of that set are removed. A page of the
        set that is marked once more in between is going to be read after its mark was made, so it need not stay.
        """
        taken = bytes(self._marks)
        pages = np.flatnonzero(np.frombuffer(taken, np.bool_))
        self._array[pages] = 0
        return pages
