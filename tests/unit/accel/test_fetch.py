"""Fetching at the end of a page, and instructions that are none."""

from __future__ import annotations

import pytest

from pyvcpu.cpu.events import GP, PF, UD
from pyvcpu.cpu.layout import RAX
from tests.unit.accel.helpers.box import STACK, TABLES, Box

END = 0x9000  # of the page before, where the code is
TOO_LONG = "66" * 15 + "90"


def run(code: str, *, second: int = 0) -> tuple[int | None, int, int]:
    """(vector or None, error code, CR2) of ``code`` that ends at ``END``; ``second`` is the next page's entry."""
    box = Box().long_mode()
    for vector in (UD, GP, PF):
        box.gate64(vector, 0x7000 + 0x10 * vector, ist=1)
        box.put(0x7000 + 0x10 * vector, "90")
    box.put_int(0x4000 + 0x24, 8, STACK)
    box.page_entry(END >> 12, second)
    box.put(END, "c3" * 16)
    box.run(code, 1, at=END - len(code) // 2)
    vector = box.state.rip - 1 - 0x7000 >> 4
    if not 0 <= vector < 32:
        return None, 0, 0
    return vector, box.frame(1)[0] if vector != UD else 0, box.state.cr2


@pytest.mark.parametrize("code", ["06", "0f04", "0f0b", "f090", "8dc0", "48ffff", "0f27"])
def test_what_is_undefined_is_so_without_the_next_page(code: str) -> None:
    assert run(code) == (UD, 0, 0)


@pytest.mark.parametrize(
    "code", ["0f", "66", "8b", "48", "0f38", "e8000000", "6681", "f0", "48b8" + "00" * 7, "66" * 14]
)
def test_what_goes_on_is_fetched(code: str) -> None:
    assert run(code) == (PF, 0x10, END)


def test_the_next_page_is_looked_at_for_what_goes_on_only() -> None:
    box = Box().long_mode()
    entry = TABLES + 0x3000 + 8 * (END >> 12)
    box.gate64(UD, 0x7000)
    box.put(0x7000, "90")
    box.run("06", 1, at=END - 1)
    assert not box.get(entry, 1) & 0x20
    box.put(END, "c0" + "90")
    box.run("89", 1, at=END - 1)
    assert box.get(entry, 1) & 0x20


@pytest.mark.parametrize(
    ("code", "vector"),
    [
        (TOO_LONG, GP),
        ("66" * 14 + "90", None),
        ("2e" * 14 + "8b042500000000", GP),
        ("66" * 12 + "48b8" + "00" * 8, GP),
        ("f0" + "66" * 13 + "90", UD),  # short enough, but LOCK NOP
        ("f0" + "66" * 14 + "06", UD),
        ("2e66" * 8 + "f390", GP),
    ],
)
def test_fifteen_bytes_are_the_limit(code: str, vector: int | None) -> None:
    """Anywhere in a page, and across its end."""
    assert run(code + "90")[0] == vector
    box = Box().long_mode()
    for number in (UD, GP):
        box.gate64(number, 0x7000 + 0x10 * number)
        box.put(0x7000 + 0x10 * number, "90")
    box.state.regs[RAX] = 1
    box.run(code, 1, at=END - 5)
    reached = box.state.rip - 1 - 0x7000 >> 4
    assert reached == vector if vector is not None else box.state.rip == END - 5 + len(code) // 2
