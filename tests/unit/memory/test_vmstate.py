"""The RAM block list of a stream against the machine's memory."""

from __future__ import annotations

import pytest

from pyvcpu.errors import MigrationError
from pyvcpu.memory.ram import GuestRam
from pyvcpu.memory.vmstate import MAX_BLOCKS, check_block_list, check_ram_blocks, ram_blocks

MIB = 1 << 20


@pytest.fixture
def ram():
    made = GuestRam([("main", MIB), ("pc.bios", 65536)])
    yield made
    made.close()


def test_a_machines_own_list_fits(ram):
    assert ram_blocks(ram) == [("main", MIB), ("pc.bios", 65536)]
    check_ram_blocks(ram, ram_blocks(ram), required=["main"])
    check_ram_blocks(ram, [("main", MIB)], required=["main"])


@pytest.mark.parametrize(
    ("blocks", "path", "got"),
    [
        ([("main", MIB), ("vga", 4096)], "blocks[1]/name", "vga"),
        ([("main", MIB // 2)], "blocks[0]/size", MIB // 2),
        ([("main", 1 << 32)], "blocks[0]/size", 1 << 32),
        ([("pc.bios", 65536)], "blocks", "pc.bios"),
        ([("main", MIB), ("main", MIB)], "blocks[1]/name", "another"),
        ([("main", 0)], "blocks[0]/size", 0),
        ([("main", MIB + 1)], "blocks[0]/size", MIB + 1),
        ([("", MIB)], "blocks[0]/name", ""),
        ([("ma\nin", MIB)], "blocks[0]/name", "ma\nin"),
        ([], "blocks", 0),
    ],
)
def test_another_memory_is_refused_where_the_list_lies(ram, blocks, path, got):
    with pytest.raises(MigrationError) as error:
        check_ram_blocks(ram, blocks, offset=0x30, required=["main"])
    assert (error.value.section, error.value.offset) == ("ram/0", 0x30)
    assert (error.value.field, error.value.got) == (path, got)
    assert error.value.expected is not None


def test_a_list_without_end_is_refused():
    with pytest.raises(MigrationError, match="too many"):
        check_block_list([(f"b{i}", 4096) for i in range(MAX_BLOCKS + 1)])
