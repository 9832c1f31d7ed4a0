"""The receiving half of RAM."""

from __future__ import annotations

import numpy as np

from pyvcpu.memory.pages import CODE
from pyvcpu.memory.ram import GuestRam
from pyvcpu.migration.ram.incoming import RamDestination
from pyvcpu.migration.ram.precopy import MANY_PAGES, RamSource
from pyvcpu.migration.wire.records import RamPages

PAGE = 4096


def whole(block: str, pages: dict[int, bytes]) -> RamPages:
    data = np.frombuffer(b"".join(pages.values()), np.uint8).reshape(-1, PAGE)
    return RamPages(0, 0, block, np.array(list(pages), np.int64) * PAGE, data=data)


def filled(block: str, *pages: tuple[int, int]) -> RamPages:
    numbers, fill = zip(*pages, strict=True)
    return RamPages(0, 0, block, np.array(numbers, np.int64) * PAGE, fill=np.array(fill, np.uint8))


def test_pages_land_in_their_block() -> None:
    ram = GuestRam([("a", 4 * PAGE), ("b", 4 * PAGE)])
    incoming = RamDestination(ram)
    incoming.take(whole("b", {2: b"x" * PAGE, 0: b"y" * PAGE}))
    incoming.take(filled("a", (3, 0x5A)))
    want = {3: b"\x5a", 4: b"y", 6: b"x"}
    assert ram.read(0, ram.size) == b"".join(want.get(page, b"\0") * PAGE for page in range(8))
    assert (incoming.pages, incoming.fill_pages) == (2, 1)


def test_what_comes_later_stays() -> None:
    ram = GuestRam([("a", 4 * PAGE)])
    incoming = RamDestination(ram)
    incoming.take(whole("a", {1: b"x" * PAGE}))
    incoming.take(filled("a", (1, 0), (1, 7)))
    assert ram.read(PAGE, PAGE) == b"\7" * PAGE
    incoming.take(filled("a", (1, 9), (1, 7), (1, 0), (2, 0)))
    assert ram.read(0, ram.size) == bytes(ram.size)
    incoming.take(whole("a", {1: b"z" * PAGE}))
    assert ram.read(PAGE, PAGE) == b"z" * PAGE


def test_a_batch_with_one_address_twice_keeps_the_later_page() -> None:
    ram = GuestRam([("a", 4 * PAGE)])
    data = np.repeat(np.arange(1, 4, dtype=np.uint8), PAGE).reshape(3, PAGE)
    RamDestination(ram).take(RamPages(0, 0, "a", np.array([PAGE, PAGE, PAGE], np.int64), data=data))
    assert ram.read(PAGE, PAGE) == b"\3" * PAGE


def test_zeros_cost_no_memory_on_either_side() -> None:
    pages = MANY_PAGES + 1000
    ram = GuestRam([("a", pages * PAGE)])
    ram.write(5000 * PAGE, b"x")
    assert np.flatnonzero(ram.backed()).tolist() == [5000]
    source = RamSource(ram, lambda function: function())
    source.setup()
    source.synchronise()
    zeros = 0
    while (batch := source.iterate()) is not None:
        zeros += batch.zero_pages
    assert zeros == pages - 1
    assert np.flatnonzero(ram.backed()).tolist() == [5000], "nothing was touched by looking"
    destination = GuestRam([("a", pages * PAGE)])
    incoming = RamDestination(destination)
    incoming.take(filled("a", *((page, 0) for page in range(pages))))
    assert not destination.backed().any()


def test_a_page_that_was_used_before_becomes_zero() -> None:
    ram = GuestRam([("a", 4 * PAGE)])
    ram.write(PAGE, b"left over")
    incoming = RamDestination(ram)
    incoming.take(filled("a", *((page, 0) for page in range(4))))
    assert ram.read(0, ram.size) == bytes(ram.size)


def test_code_and_dirty_log_hear_of_it() -> None:
    ram = GuestRam([("a", 4 * PAGE)])
    dropped: list[int] = []
    ram.add_code_listener(dropped.append)
    ram.set_code(1)
    ram.set_code(2)
    ram.start_dirty_log()
    ram.harvest_dirty()
    incoming = RamDestination(ram)
    incoming.take(whole("a", {1: b"x" * PAGE}))
    incoming.take(filled("a", (2, 0), (3, 1)))
    assert dropped == [1] and not ram.state[1] & CODE
    assert ram.state[2] & CODE, "a page that holds its fill byte already is not written"
    assert ram.harvest_dirty().tolist() == [1, 3]
