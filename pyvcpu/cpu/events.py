"""Exceptions of the guest: vectors, error codes, and which two make a double fault (SDM 3A chapter 6)."""

from __future__ import annotations

DE, DB, NMI, BP, OF, BR, UD, NM, DF = range(9)
TS, NP, SS, GP, PF = 10, 11, 12, 13, 14
MF, AC, MC, XM = 16, 17, 18, 19

VECTOR_NAMES = {
    DE: "#DE", DB: "#DB", NMI: "NMI", BP: "#BP", OF: "#OF", BR: "#BR", UD: "#UD", NM: "#NM", DF: "#DF", TS: "#TS",
    NP: "#NP", SS: "#SS", GP: "#GP", PF: "#PF", MF: "#MF", AC: "#AC", MC: "#MC", XM: "#XM",
}  # fmt: skip

PUSH_ERROR_CODE = frozenset({DF, TS, NP, SS, GP, PF, AC})
"""Vectors whose frame has an error code (in real mode none has)."""

CONTRIBUTORY = frozenset({DE, TS, NP, SS, GP})
"""Two of these in a row are a double fault (SDM 3A table 6-5)."""

TRAPS = frozenset({DB, NMI, BP, OF, MC, DF})
"""Vectors that are no faults: RF in the pushed RFLAGS stays as it was (SDM 3B 17.3.1.1)."""


class GuestException(Exception):
    """The instruction at RIP raised an exception; nothing of it has changed the state.

    ``error_code`` is None for vectors that have none; ``cr2`` is the address of a page fault.
    """

    def __init__(self, vector: int, error_code: int | None = None, *, cr2: int | None = None) -> None:
        self.vector, self.error_code, self.cr2 = vector, error_code, cr2
        super().__init__(vector, error_code, cr2)

    def __str__(self) -> str:
        text = VECTOR_NAMES.get(self.vector, f"vector {self.vector}")
        if self.error_code is not None:
            text += f"({self.error_code:#x})"
        return text if self.cr2 is None else f"{text} at {self.cr2:#x}"


def is_double_fault(first: int, second: int) -> bool:
    """Whether ``second``, raised while ``first`` was being delivered, makes #DF; otherwise it takes its place."""
    if first in CONTRIBUTORY:
        return second in CONTRIBUTORY
    return first == PF and (second == PF or second in CONTRIBUTORY)
