"""Pages: their size, and the byte of state that each one has.

    bit 0  PRESENT   has content; a load needs it
    bit 1  CLEAN     a client of the dirty log wants to know of the first store
    bit 2  CODE      translated code has bytes here
    bit 3  SNAPSHOT  must be copied before the first store

A store may go straight to memory only where PRESENT is set and the other bits are not.
"""

from __future__ import annotations

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
"""Bytes a page: 4096."""

PRESENT, CLEAN, CODE, SNAPSHOT = 1, 2, 4, 8
TRAPS = CLEAN | CODE | SNAPSHOT
"""Any of these makes the first store to a page take the slow path."""
