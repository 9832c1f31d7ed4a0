"""Helpers: instructions that are rare or change the machine, one Python function each.

A helper runs between two regions, on whole state: every register is in ``e.state``, ``e.state.rip`` is
the instruction's own, and ``e.clock.instructions`` counts what retired before it. It computes
first and commits last, so that a GuestException leaves the state untouched. It returns the next RIP (an
offset within what CS is then), or None for the instruction that follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvcpu.accel.tcg.decode import Insn
    from pyvcpu.accel.tcg.engine import TcgEngine

Helper = Callable[["TcgEngine", "Insn"], "int | None"]

HELPERS: dict[int, Helper] = {}
"""iced Mnemonic -> helper. Complete once this package is imported."""


def helper(*mnemonics: int) -> Callable[[Helper], Helper]:
    """Register a helper for these iced mnemonics."""

    def register(function: Helper) -> Helper:
        for mnemonic in mnemonics:
            assert mnemonic not in HELPERS, mnemonic
            HELPERS[mnemonic] = function
        return function

    return register


# The modules register themselves, so they come after the registry.
from pyvcpu.accel.tcg.helpers import (  # noqa: E402, F401
    control,
    decimal,
    flags,
    io,
    move,
    msr,
    rotate,
    segment,
    sse,
    stack,
    string,
    system,
    timing,
)
