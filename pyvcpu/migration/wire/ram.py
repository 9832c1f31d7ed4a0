"""The data of the section "ram", version 4: one decoder for whoever reads a stream and for whoever sums it up.

    each piece begins with a u64: address within the block | flags

    MEM_SIZE 04              total size | 04, then until the sizes add up: name (u8 length), size u64
    ZERO     02              [name (u8 length)]  fill u8
    PAGE     08              [name (u8 length)]  4096 bytes
    EOS      10              the end of this part
    CONTINUE 20              with ZERO or PAGE: no name, the block is that of the piece before; it
                             survives from one part to the next

Pieces with CONTINUE follow each other by the thousand, 4104 (9) bytes each. They are seen as one
array of shape (n, 4104), whose flags are compared at once; nothing loops over pages.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from pyvcpu.errors import MigrationError
from pyvcpu.migration.vmstate.cursor import NeedMore
from pyvcpu.migration.wire.records import PAGE_SIZE, RamBlocks, RamEos, RamFlag, RamPages

RAM_VERSION = 4
MAX_BLOCKS = 256
"""More blocks than any machine has; a list is not read beyond it."""

_FLAGS = PAGE_SIZE - 1
_WHOLE = RamFlag.PAGE | RamFlag.CONTINUE
_FILLED = RamFlag.ZERO | RamFlag.CONTINUE
_U64 = struct.Struct(">Q")

UNSUPPORTED = {
    RamFlag.XBZRLE: "XBZRLE pages (capability xbzrle)",
    RamFlag.HOOK: "RDMA",
    RamFlag.COMPRESS_PAGE: "compressed pages (capability compress)",
    RamFlag.MULTIFD_FLUSH: "multifd (capability multifd)",
}


class RamDecoder:
    """Decodes one stream's RAM, part after part.

    ``expected`` maps the blocks that may come to their size in bytes; None takes any. ``required`` names
    those that must come, by default all of them. ``limit`` bounds the sum (bytes) where any may come.
    """

    def __init__(
        self,
        expected: Mapping[str, int] | None = None,
        required: Iterable[str] | None = None,
        *,
        limit: int = 1 << 38,
        section: str = "ram/0",
    ) -> None:
        self.expected, self.limit, self.section = expected, limit, section
        self.required = tuple((expected or ()) if required is None else required)
        self.blocks: dict[str, int] = {}
        self._block: str | None = None

    def step(self, buffer: memoryview, pos: int, base: int) -> RamBlocks | RamPages | RamEos:
        """The next record, from ``buffer[pos]`` on, which is byte ``base + pos`` of the stream.

        NeedMore where it has not arrived yet: a record never spans what is missing.
        """
        offset, left = base + pos, len(buffer) - pos
        if left < 8:
            raise NeedMore(8 - left)
        (head,) = _U64.unpack_from(buffer, pos)
        flags, address = head & _FLAGS, head & ~_FLAGS
        if flags == RamFlag.EOS:
            if address:
                raise self.error("the end of a part of RAM has an address", offset, "eos", int(RamFlag.EOS), head)
            return RamEos(offset, 8)
        if flags & RamFlag.MEM_SIZE:
            return self._block_list(buffer, pos, base)
        kind = flags & ~RamFlag.CONTINUE
        if kind not in (RamFlag.ZERO, RamFlag.PAGE):
            raise self._unknown(flags, offset)
        if not self.blocks:
            raise self.error("a page comes before the list of RAM blocks", offset, "flags", "MEM_SIZE", flags)
        if flags & RamFlag.CONTINUE:
            if self._block is None:
                raise self.error(
                    "a page continues a block before any was named", offset, "flags", "a block's name", flags
                )
            return self._run(buffer, pos, base, flags, address)
        return self._named(buffer, pos, base, kind, address)

    # -- pages

    def _run(self, buffer: memoryview, pos: int, base: int, flags: int, address: int) -> RamPages:
        """As many pieces with the same flags as there are, at least one."""
        size = 8 + (PAGE_SIZE if flags == _WHOLE else 1)
        available = (len(buffer) - pos) // size
        if not available:
            raise NeedMore(size - (len(buffer) - pos))
        assert self._block is not None
        if available == 1 or _U64.unpack_from(buffer, pos + size)[0] & _FLAGS != flags:
            # Whole pages and zero pages in turn: to handle an array of one costs more than the page.
            return self._one(buffer, pos, base, pos + 8, self._block, address, size - 8)
        raw = np.frombuffer(buffer, np.uint8, available * size, pos).reshape(available, size)
        heads: list[npt.NDArray[np.uint64]] = []
        count, window = 0, 16
        # Growing windows: a short run is not paid for with a look at the whole buffer.
        while count < available:
            some = np.ascontiguousarray(raw[count : count + window, :8]).view(">u8").reshape(-1)
            same = (some & np.uint64(_FLAGS)) == flags
            if not same.all():
                some = some[: int(np.argmin(same))]
                heads.append(some)
                count += len(some)
                break
            heads.append(some)
            count += len(some)
            window *= 4
        addresses = (np.concatenate(heads) & np.uint64(~_FLAGS & (1 << 64) - 1)).astype(np.uint64)
        limit = self.blocks[self._block]
        outside = addresses >= np.uint64(limit)
        if outside.any():
            first = int(np.argmax(outside))
            if first:  # what came before is in order, and comes out however the bytes were chunked
                count, addresses = first, addresses[:first]
            else:
                raise self._outside(base + pos, self._block, int(addresses[0]))
        rows = raw[:count, 8:]
        return RamPages(
            base + pos,
            count * size,
            self._block,
            addresses.astype(np.int64),
            data=rows if flags == _WHOLE else None,
            fill=rows[:, 0] if flags == _FILLED else None,
        )

    def _named(self, buffer: memoryview, pos: int, base: int, kind: int, address: int) -> RamPages:
        """One piece with its block's name."""
        name, start = self._name(buffer, pos + 8, base)
        if name not in self.blocks:
            raise self.error(
                "a page is of a RAM block that was not listed", base + pos + 8, "block", sorted(self.blocks), name
            )
        size = PAGE_SIZE if kind == RamFlag.PAGE else 1
        page = self._one(buffer, pos, base, start, name, address, size)
        self._block = name
        return page

    def _one(
        self, buffer: memoryview, pos: int, base: int, start: int, block: str, address: int, size: int
    ) -> RamPages:
        """The piece at ``pos`` alone; its ``size`` bytes of data begin at ``start``."""
        if address >= self.blocks[block]:
            raise self._outside(base + pos, block, address)
        if len(buffer) - start < size:
            raise NeedMore(size - (len(buffer) - start))
        raw = np.frombuffer(buffer, np.uint8, size, start)
        whole = size == PAGE_SIZE
        return RamPages(
            base + pos,
            start + size - pos,
            block,
            np.array([address], np.int64),
            data=raw.reshape(1, PAGE_SIZE) if whole else None,
            fill=None if whole else raw,
        )

    def _name(self, buffer: memoryview, pos: int, base: int) -> tuple[str, int]:
        """A block's name (u8 length) and where it ends."""
        if len(buffer) <= pos:
            raise NeedMore(1)
        end = pos + 1 + buffer[pos]
        if len(buffer) < end:
            raise NeedMore(end - len(buffer))
        raw = bytes(buffer[pos + 1 : end])
        try:
            name = raw.decode("ascii")
        except UnicodeDecodeError:
            name = ""
        if not name or not name.isprintable():
            raise self.error("the name of a RAM block is not one", base + pos, "block", "printable ASCII", raw)
        return name, end

    # -- the list of blocks

    def _block_list(self, buffer: memoryview, pos: int, base: int) -> RamBlocks:
        offset = base + pos
        (head,) = _U64.unpack_from(buffer, pos)
        total = head & ~_FLAGS
        if head & _FLAGS != RamFlag.MEM_SIZE:
            raise self._unknown(head & _FLAGS, offset)
        if self.blocks:
            raise self.error("the list of RAM blocks comes twice", offset, "blocks", "once", "twice")
        if not total:
            raise self.error("a machine without memory", offset, "blocks", "at least one block", 0)
        if total > self.limit and self.expected is None:
            raise self.error("more RAM than a stream may name", offset, "blocks", f"at most {self.limit:#x}", total)
        blocks: dict[str, int] = {}
        at, left = pos + 8, total
        while left:
            if len(blocks) == MAX_BLOCKS:
                raise self.error("too many RAM blocks", base + at, "blocks", f"at most {MAX_BLOCKS}", "more")
            path = f"blocks[{len(blocks)}]"
            name, end = self._name(buffer, at, base)
            if len(buffer) < end + 8:
                raise NeedMore(end + 8 - len(buffer))
            (size,) = _U64.unpack_from(buffer, end)
            if name in blocks:
                raise self.error("a RAM block comes twice", base + at, f"{path}/name", f"one {name}", "another")
            if not size or size % PAGE_SIZE or size > left:
                raise self.error(
                    f"the size of RAM block {name} is impossible",
                    base + end,
                    f"{path}/size",
                    f"n * {PAGE_SIZE}, at most {left:#x}",
                    size,
                )
            self._check_expected(name, size, path, base + at, base + end)
            blocks[name] = size
            left -= size
            at = end + 8
        missing = [name for name in self.required if name not in blocks]
        if missing:
            raise self.error("a RAM block is missing", offset, "blocks", missing[0], ", ".join(blocks))
        self.blocks = blocks
        return RamBlocks(offset, at - pos, tuple(blocks.items()))

    def _check_expected(self, name: str, size: int, path: str, name_at: int, size_at: int) -> None:
        if self.expected is None:
            return
        if name not in self.expected:
            raise self.error(
                "this machine has no such RAM block", name_at, f"{path}/name", ", ".join(self.expected), name
            )
        if size != self.expected[name]:
            raise self.error(
                f"RAM block {name} has another size here", size_at, f"{path}/size", self.expected[name], size
            )

    # -- errors

    def error(self, message: str, offset: int, field: str, expected: object, got: object) -> MigrationError:
        return MigrationError(message, offset=offset, section=self.section, field=field, expected=expected, got=got)

    def _outside(self, offset: int, block: str, address: int) -> MigrationError:
        limit = self.blocks[block]
        return self.error("a page lies outside its RAM block", offset, block, f"an address below {limit:#x}", address)

    def _unknown(self, flags: int, offset: int) -> MigrationError:
        for flag, what in UNSUPPORTED.items():
            if flags & flag:
                return self.error(f"{what}: known, not supported", offset, "flags", "ZERO, PAGE or EOS", flags)
        return self.error("RAM data with unknown flags", offset, "flags", "ZERO, PAGE or EOS", flags)


class Coverage:
    """Which pages have come at least once; a page's byte is touched when it comes."""

    def __init__(self, blocks: Iterable[tuple[str, int]]) -> None:
        self._seen = {name: np.zeros(size // PAGE_SIZE, np.bool_) for name, size in blocks}

    def add(self, batch: RamPages) -> None:
        self._seen[batch.block][batch.addresses // PAGE_SIZE] = True

    def check(self, offset: int) -> None:
        """MigrationError where some pages have come and others never did.

        A pre-copy sends all of them. Where it ends without, they went another way: with multifd QEMU 7.2 sends
        pages of zeros here and all others through other channels, with no other trace of it, and a guest
        without its memory would start. A stream with no page at all is taken as it is: RAM of zeros.
        """
        if not any(seen.any() for seen in self._seen.values()):
            return
        for name, seen in self._seen.items():
            if not seen.all():
                raise MigrationError(
                    "pages of RAM have never come; multifd, which sends them through other channels, is not supported",
                    offset=offset,
                    section="ram/0",
                    field=f"{name}[{int(np.argmin(seen)) * PAGE_SIZE:#x}]",
                    expected=f"{len(seen)} pages",
                    got=f"{int(np.count_nonzero(seen))} pages",
                )
