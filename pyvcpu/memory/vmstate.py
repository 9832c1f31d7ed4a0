"""The list of RAM blocks at the head of the section "ram" (version 4), and what it must agree with.

    (total size | 4) u64,  then until the sizes add up to the total:  name (u8 length), size u64
    then 0x10 (end of section) u64

The names and sizes are all of a machine's memory that a stream describes; pages follow by name. A
destination may have blocks that the stream lacks (ROMs of a BIOS that was not used), never the other
way round, and a size must be the same: with another size every page after the first hole
would be a wrong one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyvcpu.errors import MigrationError
from pyvcpu.migration.vmstate.description import refuse

if TYPE_CHECKING:
    from pyvcpu.memory.ram import GuestRam

RAM_SECTION = "ram"
RAM_VERSION = 4
PAGE_SIZE = 4096
MAX_BLOCKS = 256
"""More blocks than any machine has; a list is not read beyond it."""

MAX_NAME = 255


def ram_blocks(ram: GuestRam) -> list[tuple[str, int]]:
    """(name, size in bytes) of every block, in the order in which a stream lists them."""
    return [(block.name, block.size) for block in ram.blocks]


def check_block_list(blocks: Sequence[tuple[str, int]]) -> None:
    """MigrationError unless ``blocks`` can be the block list of any machine."""
    if not blocks:
        raise refuse("blocks", "a machine without memory", "at least one block", 0)
    if len(blocks) > MAX_BLOCKS:
        raise refuse("blocks", "too many RAM blocks", f"at most {MAX_BLOCKS}", len(blocks))
    seen: set[str] = set()
    for index, (name, size) in enumerate(blocks):
        path = f"blocks[{index}]"
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise refuse(f"{path}/name", "a RAM block has no usable name", f"1 to {MAX_NAME} characters", name)
        if name in seen:
            raise refuse(f"{path}/name", "a RAM block comes twice", f"one {name}", "another")
        if size <= 0 or size % PAGE_SIZE:
            raise refuse(f"{path}/size", f"the size of {name} is not a number of pages", f"n * {PAGE_SIZE}", size)
        seen.add(name)


def check_ram_blocks(
    ram: GuestRam, blocks: Sequence[tuple[str, int]], *, offset: int | None = None, required: Sequence[str] = ()
) -> None:
    """MigrationError unless a stream with these blocks can be loaded into ``ram``.

    ``offset`` is where the list lies in the stream; ``required`` names the blocks that must be in it
    (a machine's main memory).
    """
    try:
        check_block_list(blocks)
        sizes = dict(ram_blocks(ram))
        for index, (name, size) in enumerate(blocks):
            if name not in sizes:
                raise refuse(f"blocks[{index}]/name", "this machine has no such RAM block", ", ".join(sizes), name)
            if size != sizes[name]:
                raise refuse(f"blocks[{index}]/size", f"RAM block {name} has another size here", sizes[name], size)
        missing = [name for name in required if name not in dict(blocks)]
        if missing:
            raise refuse("blocks", "a RAM block is missing", missing[0], ", ".join(name for name, _ in blocks))
    except MigrationError as error:
        error.section, error.offset = f"{RAM_SECTION}/0", offset
        raise
