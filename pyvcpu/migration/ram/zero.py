"""Zero detection over many pages at once.

A page of zeros travels as 9 bytes instead of 4104. Measured: OR-reducing the 512 quadwords of
each page runs at memory speed (9 to 40 GB/s), twice as fast as comparing bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyvcpu.memory.pages import PAGE_SIZE

PageNumbers = npt.NDArray[np.int64]


def zero_pages(
    words: npt.NDArray[np.uint64], pages: PageNumbers, backed: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.bool_]:
    """Which of ``pages`` hold nothing but zeros.

    ``words`` is guest RAM as (npages, 512) uint64; the result has the shape of ``pages``. What ``backed``
    (npages,) denies was never written: it is zero, and is not looked at. Few other pages that are not zero begin
    with a zero quadword, so most are decided by one word.
    """
    if backed is not None:
        zero: npt.NDArray[np.bool_] = ~backed[pages]
        if not zero.all():
            zero[~zero] = zero_pages(words, pages[~zero])
        return zero
    zero = words[pages, 0] == 0
    candidates = pages[zero]
    if len(candidates):
        first, last = int(candidates[0]), int(candidates[-1])
        run = words[first : last + 1] if last - first + 1 == len(candidates) else words[candidates]
        zero[zero] = np.bitwise_or.reduce(run, axis=1) == 0
    return zero


def as_words(ram: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Guest RAM (bytes, a page multiple) as (npages, 512) uint64: a view."""
    return ram.view(np.uint64).reshape(-1, PAGE_SIZE // 8)
