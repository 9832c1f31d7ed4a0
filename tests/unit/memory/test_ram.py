"""GuestRam: the blocks, the views, and the byte of state that each page has."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvcpu.errors import ConfigurationError
from pyvcpu.memory.pages import CLEAN, CODE, PAGE_SIZE, PRESENT, SNAPSHOT
from pyvcpu.memory.ram import GuestRam


@pytest.fixture
def ram():
    ram = GuestRam([("ram", 8 * PAGE_SIZE), ("pc.bios", 2 * PAGE_SIZE)])
    yield ram
    ram.close()


class TestBlocks:
    def test_lie_one_after_the_other(self, ram: GuestRam) -> None:
        assert [(b.name, b.offset, b.size) for b in ram.blocks] == [
            ("ram", 0, 8 * PAGE_SIZE),
            ("pc.bios", 8 * PAGE_SIZE, 2 * PAGE_SIZE),
        ]
        assert ram.size == 10 * PAGE_SIZE and ram.npages == 10
        assert ram.block("pc.bios").pages == range(8, 10)

    @pytest.mark.parametrize("blocks", [[("a", 0)], [("a", -4096)], [("a", 4097)], [("a", 4096), ("a", 4096)]])
    def test_refuses_what_cannot_be(self, blocks: list[tuple[str, int]]) -> None:
        with pytest.raises(ConfigurationError):
            GuestRam(blocks)

    def test_unknown_name(self, ram: GuestRam) -> None:
        with pytest.raises(ConfigurationError, match=r"vga\.vram"):
            ram.block("vga.vram")

    def test_more_than_the_host_has_is_an_error_of_ours(self) -> None:
        with pytest.raises(ConfigurationError):
            GuestRam([("ram", 1 << 62)])


def test_all_views_show_the_same_bytes(ram: GuestRam) -> None:
    ram.view64[1] = 0x1122334455667788
    assert ram.read(8, 8) == bytes.fromhex("8877665544332211")
    assert (ram.view32[2], ram.view16[4], ram.view8[8]) == (0x55667788, 0x7788, 0x88)
    assert ram.u8[15] == 0x11
    ram.u8[15] = 0x99
    assert ram.view64[1] >> 56 == 0x99


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (0, 10 * PAGE_SIZE + 1), (10 * PAGE_SIZE, 1), (4096, -1), (1 << 70, 1)]
)
def test_access_outside_is_an_error(ram: GuestRam, offset: int, length: int) -> None:
    with pytest.raises(IndexError):
        ram.acquire(offset, length, False)


def test_close_gives_the_memory_back_even_if_somebody_holds_a_view() -> None:
    ram = GuestRam([("ram", PAGE_SIZE)])
    held = ram.acquire(0, 4, True)
    held[0] = 7
    ram.close()
    assert held[0] == 7
    with pytest.raises(ValueError, match="released"):
        _ = ram.view8[0]


class TestDirtyLog:
    def test_starts_with_everything(self, ram: GuestRam) -> None:
        ram.start_dirty_log()
        assert ram.logging
        assert ram.harvest_dirty().tolist() == list(range(10))
        assert ram.harvest_dirty().tolist() == []

    @given(st.lists(st.tuples(st.integers(0, 10 * PAGE_SIZE - 1), st.integers(0, 3 * PAGE_SIZE), st.booleans())))
    def test_names_the_pages_written_and_no_others(self, accesses: list[tuple[int, int, bool]]) -> None:
        ram = GuestRam([("ram", 10 * PAGE_SIZE)])
        ram.start_dirty_log()
        ram.harvest_dirty()
        expected = set()
        for offset, wanted, write in accesses:
            length = min(wanted, ram.size - offset)
            ram.acquire(offset, length, write)
            if write and length:
                expected |= set(range(offset // PAGE_SIZE, (offset + length - 1) // PAGE_SIZE + 1))
        assert ram.harvest_dirty().tolist() == sorted(expected)
        assert (ram.state == PRESENT | CLEAN).all()
        ram.close()

    def test_after_the_first_store_a_page_traps_no_more(self, ram: GuestRam) -> None:
        ram.start_dirty_log()
        ram.harvest_dirty()
        ram.page_written(3)
        assert ram.state[3] == PRESENT
        assert ram.dirty.is_dirty(3)

    def test_each_harvest_traps(self, ram: GuestRam) -> None:
        traps: list[int] = []
        ram.add_trap_listener(lambda: traps.append(1))
        ram.start_dirty_log()
        ram.harvest_dirty()
        ram.harvest_dirty()
        assert len(traps) == 3

    def test_stop_forgets(self, ram: GuestRam) -> None:
        ram.start_dirty_log()
        ram.stop_dirty_log()
        assert not ram.logging
        assert (ram.state == PRESENT).all() and ram.dirty.count == 0
        ram.write(0, b"x")
        assert ram.dirty.count == 0

    def test_harvested_but_not_sent_can_be_marked_again(self, ram: GuestRam) -> None:
        ram.start_dirty_log()
        pages = ram.harvest_dirty()
        ram.dirty.merge(pages[2:5])
        ram.write(9 * PAGE_SIZE, b"x")
        assert ram.harvest_dirty().tolist() == [2, 3, 4, 9]


class TestCode:
    def test_a_store_tells_the_listeners_once(self, ram: GuestRam) -> None:
        hits: list[int] = []
        ram.add_code_listener(hits.append)
        ram.set_code(2)
        ram.write(PAGE_SIZE, b"x")
        assert hits == []
        ram.write(2 * PAGE_SIZE - 1, b"xy")  # the end of page 1 and the start of page 2
        ram.write(2 * PAGE_SIZE, b"z")
        assert hits == [2]

    def test_the_bytes_are_old_when_the_listener_runs(self, ram: GuestRam) -> None:
        seen: list[bytes] = []
        ram.write(0, b"old")
        ram.add_code_listener(lambda page: seen.append(ram.read(0, 3)))
        ram.set_code(0)
        ram.write(0, b"new")
        assert seen == [b"old"] and ram.read(0, 3) == b"new"

    def test_marking_traps_once(self, ram: GuestRam) -> None:
        traps: list[int] = []
        ram.add_trap_listener(lambda: traps.append(1))
        ram.set_code(2)
        ram.set_code(2)
        assert traps == [1]

    def test_the_dirty_log_and_code_share_a_page(self, ram: GuestRam) -> None:
        """The engine has dropped just the code that was hit: the page stays a code page, and is dirty."""
        hits: list[int] = []
        ram.add_code_listener(hits.append)
        ram.start_dirty_log()
        ram.harvest_dirty()
        ram.set_code(4)
        ram.page_written(4, code=False)
        assert hits == [] and ram.state[4] == PRESENT | CODE and ram.dirty.is_dirty(4)
        ram.clear_code(4)
        assert ram.state[4] == PRESENT


class TestSnapshot:
    def test_each_page_is_offered_before_its_first_store(self, ram: GuestRam) -> None:
        for page in range(10):
            ram.write(page * PAGE_SIZE, bytes([page]))
        copies: dict[int, bytes] = {}

        def copy(page: int) -> None:
            assert page not in copies
            copies[page] = ram.read(page * PAGE_SIZE, 1)

        ram.start_snapshot(copy)
        ram.page_saved(5)
        ram.write(3 * PAGE_SIZE, b"\xff" * (3 * PAGE_SIZE))
        ram.write(3 * PAGE_SIZE, b"\xfe")
        assert copies == {3: b"\3", 4: b"\4"}
        ram.stop_snapshot()
        ram.write(0, b"x")
        assert len(copies) == 2 and not (ram.state & SNAPSHOT).any()
