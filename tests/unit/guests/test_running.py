"""What the guests say: OK where all is well, FAIL where anything is not."""

from __future__ import annotations

import re

import pytest

from pyvcpu.machine import MIB, Machine, MachineConfig, make_machine
from pyvcpu.machine.guests import as_bios, load_guest

PAGES = 0x200000
COUNT = 0x6000
VECTOR = 0x40


class Guest:
    """A bundled guest on a microvm, and what it printed."""

    def __init__(self, name: str, *, bios: bool = False, **parameters: int) -> None:
        self.output = bytearray()
        image = load_guest(name, **parameters)
        self.machine: Machine = make_machine(
            MachineConfig(
                memory=16 * MIB,
                bios=as_bios(image) if bios else None,
                loader=() if bios else (image,),
                serial=self.output.extend,
                debug_exit=(0xF4, 4),
            )
        )

    def run(self, instructions: int) -> None:
        assert self.machine.run(instructions) == "limit"

    def finish(self) -> list[str]:
        assert self.machine.run(20_000_000) == "debug-exit", self.output
        return self.output.decode().splitlines()

    def ends_well(self) -> str:
        lines = self.finish()
        assert self.machine.exit_code == 1
        assert "FAIL" not in " ".join(lines)
        return lines[-1]

    def fails(self) -> str:
        lines = self.finish()
        assert self.machine.exit_code == 3
        return lines[-1]


SOME_TICKS = {"period": 20_000, "rate": 1, "pages": 8, "ticks": 10, "beats": 3}
SOME_WRITES = {"pages": 64, "writes": 1000, "reports": 2}


@pytest.mark.parametrize("bios", [False, True], ids=["loader", "bios"])
@pytest.mark.parametrize(
    ("name", "parameters", "last"),
    [
        ("counter", {"limit": 100_000, "mask": 0x3FFF}, "counter: OK 100000 sum "),
        ("ticker", SOME_TICKS, "ticker: OK beats 3 ticks 30 pages 30 sum "),
        ("ticker", {**SOME_TICKS, "sequence": 1}, "ticker: OK beats 3 ticks 30 pages 30 sum "),
        ("dirtier", {**SOME_WRITES, "pattern": 0}, "dirtier: OK writes 2000 state "),
        ("dirtier", {**SOME_WRITES, "pattern": 1}, "dirtier: OK writes 2000 state "),
        ("dirtier", {**SOME_WRITES, "pattern": 2}, "dirtier: OK writes 2000 state "),
        ("irqs", {}, "irqs: OK 75 checks"),
        ("irqs", {"rounds": 2}, "irqs: OK 150 checks"),
    ],
)
def test_all_is_well(name: str, parameters: dict[str, int], last: str, bios: bool) -> None:
    assert Guest(name, bios=bios, **parameters).ends_well().startswith(last)


def test_the_sum_of_the_counter() -> None:
    total = 0
    for count in range(1, 3001):
        total = ((total << 5 | total >> 59) & (1 << 64) - 1) ^ count
    assert Guest("counter", limit=3000).ends_well() == f"counter: OK 3000 sum {total:016x}"


def test_the_counter_notices_a_lost_store() -> None:
    guest = Guest("counter", limit=100_000, mask=0x3FF)
    guest.run(100_000)
    was = int.from_bytes(guest.machine.ram.read(COUNT, 8), "little")
    guest.machine.ram.write(COUNT, (was - 1).to_bytes(8, "little"))
    assert re.fullmatch(r"counter: FAIL memory says \d+", guest.fails())


@pytest.mark.parametrize("word", [0, 1, 511])
def test_the_ticker_notices_a_changed_word(word: int) -> None:
    guest = Guest("ticker", **SOME_TICKS)
    guest.run(40_000)
    address = PAGES + 3 * 4096 + 8 * word
    guest.machine.ram.write(address, b"?")
    assert guest.fails() == f"ticker: FAIL word at {address:016x}"


def test_the_ticker_notices_an_old_page() -> None:
    """As a migration that lost a dirty page would leave it: whole, but of an earlier time."""
    guest = Guest("ticker", **SOME_TICKS)
    guest.run(40_000)
    before = guest.machine.ram.read(PAGES, 8 * 4096)
    guest.run(2_500)
    after = guest.machine.ram.read(PAGES, 8 * 4096)
    (lost,) = {page for page in range(8) if before[page * 4096 :][:4096] != after[page * 4096 :][:4096]} or {None}
    assert lost is not None
    guest.machine.ram.write(PAGES + lost * 4096, before[lost * 4096 :][:4096])
    assert guest.fails() == f"ticker: FAIL word at {PAGES + lost * 4096:016x}"


def test_the_ticker_notices_a_doubled_tick() -> None:
    guest = Guest("ticker", sequence=1, **SOME_TICKS)
    guest.run(40_000)
    ticks = int.from_bytes(guest.machine.ram.read(COUNT, 8), "little")
    guest.machine.apic.raise_vector(VECTOR)
    assert guest.fails() == f"ticker: FAIL tick {ticks + 1} came in period {ticks}"


def test_the_ticker_notices_a_lost_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest("ticker", sequence=1, **SOME_TICKS)
    guest.run(40_000)
    ticks = int.from_bytes(guest.machine.ram.read(COUNT, 8), "little")

    def lose(vector: int, level: bool = False) -> None:
        monkeypatch.undo()

    monkeypatch.setattr(guest.machine.apic, "raise_vector", lose)
    assert guest.fails() == f"ticker: FAIL tick {ticks + 1} came in period {ticks + 2}"


@pytest.mark.parametrize("pattern", [0, 1, 2])
@pytest.mark.parametrize("offset", [0, 0x800, 0xFF8])
def test_the_dirtier_notices_a_changed_page(pattern: int, offset: int) -> None:
    guest = Guest("dirtier", **{**SOME_WRITES, "pages": 8}, pattern=pattern)
    guest.run(20_000)
    address = PAGES + offset
    guest.machine.ram.write(address, bytes([guest.machine.ram.read(address, 1)[0] ^ 0x10]))
    assert guest.fails() == "dirtier: FAIL page 0"


def test_the_patterns_dirty_what_they_say() -> None:
    counts = []
    for pattern in (0, 1, 2):
        guest = Guest("dirtier", pages=64, writes=6400, reports=1, pattern=pattern)
        guest.ends_well()
        table = guest.machine.ram.read(0x100000, 64 * 8)
        counts.append([int.from_bytes(table[at : at + 8], "little") for at in range(0, len(table), 8)])
    sequential, random, hot = counts
    assert sequential == [100] * 64
    assert random != sequential
    assert 50 < min(random) <= max(random) < 150
    assert 0.8 < sum(hot[:8]) / 6400 < 0.95


def test_irqs_notices_a_wrong_result() -> None:
    """A spurious interrupt too many is in the tally that is checked at the end of a round."""
    guest = Guest("irqs")
    guest.run(12_000)
    guest.machine.ram.write(0x6070, (1).to_bytes(8, "little"))
    assert re.search(r"irqs: FAIL check \d+ got 0000000000000001 wanted 0000000000000000", "\n".join(guest.finish()))
    assert guest.machine.exit_code == 3
