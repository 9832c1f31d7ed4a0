"""The code cache: translated regions, found by where and how they run, dropped when their bytes change.

    regions   (mode, CS base, RIP, RAM offset of the first byte) -> Region
    jumps     (mode, CS base, user) -> {RIP -> Region}: what the running code uses; dropped with the TLB
    pages     RAM page -> the regions with bytes on it

A translation depends on nothing but the bytes, the mode and RIP, so all machines of a process share
one store of finished code (``SHARED``): what was thrown away by a write or a new machine costs a
comparison of bytes when it comes back.
"""

from __future__ import annotations

from collections import OrderedDict

from pyvcpu.accel.tcg.builder import Mode
from pyvcpu.accel.tcg.region import translate
from pyvcpu.accel.tcg.target.python import Code, lower
from pyvcpu.memory.pages import PAGE_SIZE

Key = tuple[Mode, int, int, int]
"""Mode, CS base, RIP, RAM offset of the first byte."""
SharedKey = tuple[Mode, int, bool]
"""Mode, RIP, whether it is a single step."""
Spans = tuple[tuple[int, int], ...]
"""(start, end) of each block, relative to the first byte of the entry."""


class Region:
    """Translated code in use by one engine. ``first`` is the instruction count of its entry block."""

    __slots__ = ("code", "faults", "first", "function", "spans")

    def __init__(self, code: Code, first: int, spans: Spans) -> None:
        self.code = code.function.__code__
        self.function, self.faults, self.first = code.function, code.fault_lines, first
        self.spans = spans


class SharedStore:
    """Finished translations by (mode, RIP, variant), each with the bytes it was made from; bounded."""

    def __init__(self, capacity: int = 16384) -> None:
        self._entries: OrderedDict[SharedKey, list[tuple[Spans, list[bytes], Code, int]]] = OrderedDict()
        self._capacity = capacity

    def find(self, code: bytes, at: int, key: SharedKey) -> Region | None:
        for spans, contents, made, first in self._entries.get(key, ()):
            if all(
                at + s >= 0 and at + e <= len(code) and code[at + s : at + e] == content
                for (s, e), content in zip(spans, contents, strict=True)
            ):
                return Region(made, first, spans)
        return None

    def add(self, code: bytes, at: int, key: SharedKey, made: Code, first: int, spans: Spans) -> None:
        entry = self._entries.setdefault(key, [])
        entry.append((spans, [code[at + s : at + e] for s, e in spans], made, first))
        del entry[:-4]
        if len(self._entries) > self._capacity:
            self._entries.popitem(last=False)


SHARED = SharedStore()


class CodeCache:
    """The regions of one engine."""

    def __init__(self) -> None:
        self.regions: dict[Key, Region] = {}
        self.steps: dict[Key, Region] = {}  # one instruction each, with slow accessors
        self.jumps: dict[tuple[Mode, int, bool], dict[int, Region]] = {}
        self._pages: dict[int, set[tuple[bool, Key]]] = {}

    def drop_jumps(self) -> None:
        """Linear addresses may mean other pages now."""
        for table in self.jumps.values():
            table.clear()

    def get(self, code: bytes, at: int, mode: Mode, base_ip: int, *, slow: bool) -> Region | None:
        """Translate, or find again, the region at ``code[at]``; ``base_ip`` is the offset in CS of ``code[0]``.

        None where the first instruction is undefined or does not fit.
        """
        ip = base_ip + at
        key = (mode, ip, slow)
        found = SHARED.find(code, at, key)
        if found is not None:
            return found
        blocks = translate(code, base_ip, ip, mode, blocks=1, insns=1) if slow else translate(code, base_ip, ip, mode)
        if not blocks:
            return None
        spans = tuple((b.rip - ip, b.insns[-1].ip + b.insns[-1].length - ip) for b in blocks)
        made = lower(blocks, slow=slow)
        first = len(blocks[0].insns)
        SHARED.add(code, at, key, made, first, spans)
        return Region(made, first, spans)

    def insert(self, region: Region, key: Key, page: int, *, slow: bool) -> None:
        """Keep a region, all of whose bytes are on RAM page ``page``."""
        (self.steps if slow else self.regions)[key] = region
        self._pages.setdefault(page, set()).add((slow, key))

    def invalidate(self, page: int, start: int = 0, end: int = PAGE_SIZE) -> bool:
        """Drop what has bytes in ``start`` to ``end`` of a RAM page; True if nothing is left on the page."""
        present = self._pages.get(page)
        if not present:
            return True
        dropped = [item for item in present if self._touches(item, page, start, end)]
        for slow, key in dropped:
            (self.steps if slow else self.regions).pop(key, None)
            present.discard((slow, key))
        if dropped:
            self.drop_jumps()
        if not present:
            del self._pages[page]
        return not present

    def _touches(self, item: tuple[bool, Key], page: int, start: int, end: int) -> bool:
        slow, key = item
        region = (self.steps if slow else self.regions).get(key)
        if region is None:
            return True
        entry = key[3] - page * PAGE_SIZE
        return any(entry + s < end and start < entry + e for s, e in region.spans)

    def clear(self) -> None:
        self.regions.clear()
        self.steps.clear()
        self._pages.clear()
        self.drop_jumps()
