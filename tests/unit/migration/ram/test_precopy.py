"""The sending half of RAM: what goes on the wire, and that no store is ever lost."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pyvcpu.memory.ram import GuestRam
from pyvcpu.migration.ram.precopy import RamSource
from pyvcpu.migration.ram.zero import as_words, zero_pages


def directly(function: Callable[[], Any]) -> Any:
    return function()


def decode(data: bytes, blocks: dict[str, int], pages: dict[tuple[str, int], bytes], block: str | None) -> str | None:
    """An independent reading of the data of one PART or END: fills ``pages``, returns the last block."""
    at = 0
    while True:
        (word,) = struct.unpack_from(">Q", data, at)
        at += 8
        if word == 0x10:
            assert at == len(data)
            return block
        flags, address = word & 0xFFF, word & ~0xFFF
        if not flags & 0x20:
            length = data[at]
            block = data[at + 1 : at + 1 + length].decode()
            at += 1 + length
        assert block is not None and address + 4096 <= blocks[block]
        if flags & 0x02:
            pages[block, address] = bytes([data[at]]) * 4096
            at += 1
        else:
            assert flags & ~0x20 == 0x08
            pages[block, address] = data[at : at + 4096]
            at += 4096


class Receiver:
    """Both blocks as the wire has told them so far."""

    def __init__(self, ram: GuestRam) -> None:
        self.ram = ram
        self.pages: dict[tuple[str, int], bytes] = {}
        self.block: str | None = None

    def take(self, batch: Any) -> None:
        data = b"".join(batch.chunks)
        assert len(data) == batch.size
        before = len(self.pages)
        own: dict[tuple[str, int], bytes] = {}
        self.block = decode(data, {b.name: b.size for b in self.ram.blocks}, own, self.block)
        assert len(own) == batch.pages + batch.zero_pages
        assert sum(not any(p) for p in own.values()) == batch.zero_pages
        self.pages |= own
        assert len(self.pages) >= before

    def memory(self) -> bytes:
        return b"".join(self.pages[b.name, at] for b in self.ram.blocks for at in range(0, b.size, 4096))


@pytest.fixture
def ram() -> GuestRam:
    ram = GuestRam([("main", 64 * 4096), ("rom", 4 * 4096), ("tail", 8 * 4096)])
    rng = np.random.default_rng(1)
    for page in range(0, 76, 3):
        ram.write(page * 4096, rng.integers(0, 256, 4096, np.uint8).tobytes())
    ram.write(5 * 4096 + 4095, b"\x01")  # not zero, by its last byte only
    ram.write(66 * 4096, b"\x01")  # by its first
    return ram


def test_zero_pages_are_found_exactly(ram: GuestRam) -> None:
    words = as_words(ram.u8)
    for pages in (range(76), range(3, 9), [1, 2, 4], [5], [66], []):
        numbers = np.array(pages, np.int64)
        want = [not any(ram.read(int(p) * 4096, 4096)) for p in numbers]
        assert zero_pages(words, numbers).tolist() == want


def test_start_lists_the_blocks(ram: GuestRam) -> None:
    data = b"".join(RamSource(ram, directly).setup().chunks)
    total = 76 * 4096
    want = struct.pack(">Q", total | 4)
    for name, size in (("main", 64), ("rom", 4), ("tail", 8)):
        want += bytes([len(name)]) + name.encode() + struct.pack(">Q", size * 4096)
    assert data == want + struct.pack(">Q", 0x10)


@pytest.mark.parametrize("batch_pages", [1, 7, 1024])
def test_what_is_written_while_it_is_sent_arrives(ram: GuestRam, batch_pages: int) -> None:
    source, receiver = RamSource(ram, directly), Receiver(ram)
    source.setup()
    rng = np.random.default_rng(2)
    assert source.synchronise() == 76
    for _ in range(4):
        while (batch := source.iterate(batch_pages)) is not None:
            receiver.take(batch)
            for page in rng.integers(0, 76, 2):  # the guest goes on between the batches
                ram.write(int(page) * 4096 + int(rng.integers(4000)), rng.bytes(9))
        assert source.pending() == ram.dirty.count * 4104
        assert source.synchronise() == source.pending() // 4104
    for batch in source.complete():
        receiver.take(batch)
    assert receiver.memory() == ram.read(0, ram.size)
    source.cleanup()
    assert not ram.logging and not (ram.state & 2).any()


def test_a_pass_that_is_cut_short_is_not_forgotten(ram: GuestRam) -> None:
    source, receiver = RamSource(ram, directly), Receiver(ram)
    source.setup()
    source.synchronise()
    receiver.take(source.iterate(10))
    ram.write(3 * 4096, b"again")
    ram.write(40 * 4096, b"first")
    assert source.synchronise() == 67, "66 not sent yet, one of them written, and one written again"
    for batch in source.complete():
        receiver.take(batch)
    assert receiver.memory() == ram.read(0, ram.size)


def test_an_idle_guest_ends_with_an_empty_section(ram: GuestRam) -> None:
    source = RamSource(ram, directly)
    source.setup()
    source.synchronise()
    while source.iterate() is not None:
        pass
    (last,) = source.complete()
    assert b"".join(last.chunks) == struct.pack(">Q", 0x10) and last.pages == last.zero_pages == 0


def test_the_harvest_happens_at_an_edge(ram: GuestRam) -> None:
    edges: list[str] = []

    def at_edge(function: Callable[[], Any]) -> Any:
        edges.append(function.__name__)
        return function()

    source = RamSource(ram, at_edge)
    source.setup()
    source.synchronise()
    list(source.complete())
    source.cleanup()
    source.cleanup()
    assert edges == ["start_dirty_log", "harvest_dirty", "harvest_dirty", "stop_dirty_log"]


def test_after_a_cancel_the_next_migration_sends_everything(ram: GuestRam) -> None:
    first = RamSource(ram, directly)
    first.setup()
    first.synchronise()
    first.iterate(10)
    first.cleanup()
    ram.write(4096, b"unseen by the first")
    second, receiver = RamSource(ram, directly), Receiver(ram)
    second.setup()
    assert second.synchronise() == 76
    while (batch := second.iterate()) is not None:
        receiver.take(batch)
    for batch in second.complete():
        receiver.take(batch)
    assert receiver.memory() == ram.read(0, ram.size)
