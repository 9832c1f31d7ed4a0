"""String instructions: MOVS STOS LODS CMPS SCAS INS OUTS, alone and repeated (SDM 2B, REP).

A repeated one runs in chunks. A chunk is what both operands reach without a gap in the TLB: one copy, fill
or vector comparison of the mapping. Where there is none (a fault, MMIO, an element across two
pages that lie apart) one element goes the slow way. A chunk never looks up a page that its elements do not reach
yet, so accessed and dirty bits, and the progress at a fault, are those of one element after the other.

An element at a device or port is always the first of its call: the clock is exact when the device looks.

An element that is stored over the instruction itself is the last of its call: the next one is fetched again, so
that what happens does not depend on where a run is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from iced_x86 import Mnemonic, OpKind

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import MASK, SEGMENTS, Reg
from pyvcpu.accel.tcg.frames import segment_base
from pyvcpu.accel.tcg.helpers import helper
from pyvcpu.accel.tcg.helpers.io import check_port
from pyvcpu.accel.tcg.helpers.operands import unsupported, write_register
from pyvcpu.accel.tcg.mmu import SlowAccess
from pyvcpu.cpu.events import GuestException
from pyvcpu.cpu.layout import CS, ES, RAX, RCX, RDI, RDX, RSI
from pyvcpu.memory.pages import CLEAN, CODE, PAGE_SHIFT, PAGE_SIZE, SNAPSHOT

if TYPE_CHECKING:
    from pyvcpu.accel.tcg.decode import Insn
    from pyvcpu.accel.tcg.engine import TcgEngine

_INSIDE = PAGE_SIZE - 1
_SCAN = 16384
"""Elements that one vector comparison looks at."""

_ADDRESS = {
    OpKind.MEMORY_SEG_SI: 16, OpKind.MEMORY_SEG_ESI: 32, OpKind.MEMORY_SEG_RSI: 64,
    OpKind.MEMORY_ESDI: 16, OpKind.MEMORY_ESEDI: 32, OpKind.MEMORY_ESRDI: 64,
}  # fmt: skip
_DTYPES = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}


def _family(name: str, sizes: str = "BWDQ") -> dict[int, int]:
    """iced mnemonics of MOVSB, MOVSW, .. -> bytes an element."""
    return {getattr(Mnemonic, name + letter): {"B": 1, "W": 2, "D": 4, "Q": 8}[letter] for letter in sizes}


MOVS, STOS, LODS, CMPS, SCAS = (_family(name) for name in ("MOVS", "STOS", "LODS", "CMPS", "SCAS"))
INS, OUTS = _family("INS", "BWD"), _family("OUTS", "BWD")
_SIZES = MOVS | STOS | LODS | CMPS | SCAS | INS | OUTS
_STORING = frozenset(MOVS | STOS)  # INS does one element a call in any case


class _Run:
    """One execution: up to ``limit`` elements, of which ``done`` are complete."""

    def __init__(self, e: TcgEngine, insn: Insn) -> None:
        self.e, self.mmu, self.insn = e, e.mmu, insn
        iced, regs = insn.iced, e.state.regs
        self.size = _SIZES[insn.mnemonic]
        kinds = [iced.op_kind(0), iced.op_kind(1)]
        width = next((_ADDRESS[k] for k in kinds if k in _ADDRESS), None)
        if width is None:  # MOVSD and CMPSD are also names of SSE2 instructions
            unsupported(e, insn, "SSE2 arithmetic is not there yet")
        self.width = width
        mask = self.mask = MASK[self.width]
        self.source = any(k in (OpKind.MEMORY_SEG_SI, OpKind.MEMORY_SEG_ESI, OpKind.MEMORY_SEG_RSI) for k in kinds)
        self.target = any(k in (OpKind.MEMORY_ESDI, OpKind.MEMORY_ESEDI, OpKind.MEMORY_ESRDI) for k in kinds)
        self.si, self.di = regs[RSI] & mask, regs[RDI] & mask
        self.si_base = segment_base(e, SEGMENTS[iced.memory_segment]) if self.source else 0
        self.di_base = segment_base(e, ES) if self.target else 0
        self.linear_mask = MASK[64] if e.mode.bits == 64 else MASK[32]
        self.backward = bool(e.state.rflags & flags.DF)
        self.step = -self.size if self.backward else self.size
        self.repeat = bool(iced.has_rep_prefix or iced.has_repne_prefix)
        self.count = regs[RCX] & mask if self.repeat else 1
        self.limit = min(self.count, e.budget)
        self.done = 0
        self.finished = False
        self.own = self._places_of_code() if self.repeat and insn.mnemonic in _STORING else ()

    def _places_of_code(self) -> tuple[tuple[int, int], ...]:
        """Where the instruction lies in RAM: (first byte, end) of its part on each page."""
        e, length = self.e, self.insn.length
        base = 0 if e.mode.bits == 64 else e.state.seg_base[CS]
        linear = (base + self.insn.ip) & self.linear_mask
        head = min(length, PAGE_SIZE - (linear & _INSIDE))
        first = self.mmu.fetch_page(linear)
        if head == length:
            return ((first, first + length),)
        second = self.mmu.fetch_page((linear + head) & self.linear_mask)
        return (first, first + head), (second, second + length - head)

    def _until_own_code(self, host: int, n: int) -> tuple[int, int]:
        """What a store of ``n`` elements from the lowest at byte offset ``host`` on may do before the next fetch."""
        for start, end in self.own:
            length = n * self.size
            if host < end and start < host + length:
                clear = (host + length - end if self.backward else start - host) // self.size
                if clear <= 0:
                    self.limit = self.done + 1
                keep = max(clear, 1)
                host += (n - keep) * self.size if self.backward else 0
                n = keep
        return host, n

    def execute(self, element: Callable[[_Run], int]) -> int | None:
        """Call ``element`` (elements done now, 0 to stop here) until the limit, a fault or its own end."""
        e = self.e
        if self.count == 0:
            return None
        try:
            while self.done < self.limit and not self.finished:
                n = element(self)
                if n == 0:
                    break
                self.advance(n)
        except GuestException:
            if self.done:
                self.commit()
            e.iterations = self.done
            raise
        self.commit()
        e.iterations = self.done
        return None if self.finished or self.done == self.count else self.insn.ip

    def advance(self, n: int) -> None:
        self.done += n
        self.si = (self.si + n * self.step) & self.mask
        self.di = (self.di + n * self.step) & self.mask

    def commit(self) -> None:
        e, width = self.e, self.width
        if self.source:
            write_register(e, Reg(RSI, width, 0), self.si)
        if self.target:
            write_register(e, Reg(RDI, width, 0), self.di)
        if self.repeat:
            write_register(e, Reg(RCX, width, 0), self.count - self.done)

    # -- addresses

    @property
    def source_linear(self) -> int:
        return int(self.si_base + self.si) & self.linear_mask

    @property
    def target_linear(self) -> int:
        return int(self.di_base + self.di) & self.linear_mask

    def chunk(self, *, write: bool, of_target: bool, most: int) -> tuple[int, int]:
        """(byte offset in RAM of the element that is lowest, elements): what can be had at once, 0 for nothing.

        For a write, what the pages' clients must know is done: exactly that many elements must be stored.
        """
        host, n = self._reach(write, of_target, most)
        return self._until_own_code(host, n) if write else (host, n)

    def _reach(self, write: bool, of_target: bool, most: int) -> tuple[int, int]:
        offset, linear = (self.di, self.target_linear) if of_target else (self.si, self.source_linear)
        tlb, size = (self.mmu.stores if write else self.mmu.loads), self.size
        inside = linear & _INSIDE
        page = linear >> PAGE_SHIFT
        try:
            delta = tlb[page]
        except SlowAccess:
            return self._code_chunk(offset, linear, most) if write else (0, 0)
        if self.backward:
            if inside + size > PAGE_SIZE:
                return 0, 0
            most = min(most, offset // size + 1, linear // size + 1)
            length = inside + size
            while length < most * size:
                page -= 1
                if tlb.get(page) != delta:
                    break
                length += PAGE_SIZE
            n = min(most, length // size)
            return linear + delta - (n - 1) * size, n
        length = PAGE_SIZE - inside
        end = min(most * size, self.mask + 1 - offset, self.linear_mask + 1 - linear)
        while length < end:
            page += 1
            if tlb.get(page) != delta:
                break
            length += PAGE_SIZE
        return linear + delta, min(length, end) // size

    def _code_chunk(self, offset: int, linear: int, most: int) -> tuple[int, int]:
        """A chunk of one page of RAM that stores cannot go to directly, because code was translated from it."""
        e, mmu, size = self.e, self.mmu, self.size
        try:
            gpa = mmu.translate(linear, write=True, user=mmu.user)
        except GuestException:
            return 0, 0
        host = e.bus.lookup_page(gpa >> PAGE_SHIFT)
        if host < 0 or not e.bus.writable_page(gpa >> PAGE_SHIFT):
            return 0, 0
        inside = linear & _INSIDE
        if self.backward:
            n = min(most, offset // size + 1, inside // size + 1) if inside + size <= PAGE_SIZE else 0
            inside -= (n - 1) * size
        else:
            n = min(most * size, self.mask + 1 - offset, PAGE_SIZE - inside) // size
        if n <= 0:
            return 0, 0
        page = host >> PAGE_SHIFT
        state = int(e.ram.state[page])
        if state & CODE:
            mmu.code_written(page, inside, inside + n * size)
        if state & (CLEAN | SNAPSHOT):
            e.ram.page_written(page, code=False)
        return host + inside, n

    def is_ram(self, linear: int, write: bool) -> bool:
        """Whether the element there is in RAM or ROM; raises the fault that the access would raise."""
        found = True
        last = (linear + self.size - 1) & self.linear_mask
        across = linear >> PAGE_SHIFT != last >> PAGE_SHIFT
        for at in (linear, last & ~_INSIDE) if across else (linear,):
            gpa = self.mmu.translate(at, write=write, user=self.mmu.user)
            found = found and self.e.bus.lookup_page(gpa >> PAGE_SHIFT) >= 0
        return found

    def device_waits(self, ram: bool) -> bool:
        """An element at a device must be the first of its call, and is the last."""
        if ram:
            return False
        if self.done:
            return True
        self.limit = 1
        return False

    def elements(self, host: int, n: int) -> npt.NDArray[np.unsignedinteger]:
        """``n`` elements from the lowest on, in the order in which they are visited."""
        found = self.e.ram.u8[host : host + n * self.size].view(_DTYPES[self.size])
        return found[::-1] if self.backward else found

    def accumulator(self) -> int:
        return int(self.e.state.regs[RAX] & MASK[8 * self.size])


# -- MOVS, STOS, LODS -------------------------------------------------------------------------


@helper(*MOVS)
def movs(e: TcgEngine, insn: Insn) -> int | None:
    return _Run(e, insn).execute(_move)


def _move(run: _Run) -> int:
    most = run.limit - run.done
    source, n = run.chunk(write=False, of_target=False, most=most)
    if n:
        target, m = run.chunk(write=True, of_target=True, most=n)
        if m:
            if run.backward:
                source += (n - m) * run.size
            _copy(run, source, target, m)
            return m
    ram = run.is_ram(run.source_linear, False) & run.is_ram(run.target_linear, True)
    if run.device_waits(ram):
        return 0
    run.mmu.write(run.target_linear, run.size, run.mmu.read(run.source_linear, run.size))
    run.limit = run.done + 1  # it may have been the instruction itself
    return 1


def _copy(run: _Run, source: int, target: int, n: int) -> None:
    """Element by element in effect: where the target runs ahead of the source, the start repeats itself."""
    view, size, length = run.e.ram.view8, run.size, n * run.size
    ahead = source - target if run.backward else target - source
    if ahead <= 0 or ahead >= length:
        view[target : target + length] = view[source : source + length]
    elif ahead < size:  # an element overlaps its own copy
        places = range((n - 1) * size, -1, -size) if run.backward else range(0, length, size)
        for at in places:
            view[target + at : target + at + size] = bytes(view[source + at : source + at + size])
    elif run.backward:
        pattern = bytes(view[source + length - ahead : source + length])
        view[target : target + length] = (pattern * (length // ahead + 1))[-length:]
    else:
        pattern = bytes(view[source : source + ahead])
        view[target : target + length] = (pattern * (length // ahead + 1))[:length]


@helper(*STOS)
def stos(e: TcgEngine, insn: Insn) -> int | None:
    return _Run(e, insn).execute(_store)


def _store(run: _Run) -> int:
    value = run.accumulator()
    target, n = run.chunk(write=True, of_target=True, most=run.limit - run.done)
    if n:
        pattern = value.to_bytes(run.size, "little")
        end = target + n * run.size
        if pattern == pattern[:1] * run.size:
            run.e.ram.u8[target:end] = pattern[0]
        else:
            run.e.ram.view8[target:end] = pattern * n
        return n
    if run.device_waits(run.is_ram(run.target_linear, True)):
        return 0
    run.mmu.write(run.target_linear, run.size, value)
    run.limit = run.done + 1
    return 1


@helper(*LODS)
def lods(e: TcgEngine, insn: Insn) -> int | None:
    return _Run(e, insn).execute(_load)


def _load(run: _Run) -> int:
    """Of a chunk only the last element stays in the accumulator."""
    source, n = run.chunk(write=False, of_target=False, most=run.limit - run.done)
    if n:
        last = source if run.backward else source + (n - 1) * run.size
        value = int.from_bytes(run.e.ram.view8[last : last + run.size], "little")
    else:
        if run.device_waits(run.is_ram(run.source_linear, False)):
            return 0
        value, n = run.mmu.read(run.source_linear, run.size), 1
    write_register(run.e, Reg(RAX, 8 * run.size, 0), value)
    return n


# -- CMPS, SCAS -------------------------------------------------------------------------------


@helper(*CMPS)
def cmps(e: TcgEngine, insn: Insn) -> int | None:
    return _Run(e, insn).execute(_compare)


def _compare(run: _Run) -> int:
    most = min(run.limit - run.done, _SCAN)
    left, n = run.chunk(write=False, of_target=False, most=most)
    if n:
        right, m = run.chunk(write=False, of_target=True, most=n)
        if m:
            if run.backward:
                left += (n - m) * run.size
            return _scan(run, run.elements(left, m), run.elements(right, m))
    ram = run.is_ram(run.source_linear, False) & run.is_ram(run.target_linear, False)
    if run.device_waits(ram):
        return 0
    first = run.mmu.read(run.source_linear, run.size)
    return _verdict(run, first, run.mmu.read(run.target_linear, run.size), 1)


@helper(*SCAS)
def scas(e: TcgEngine, insn: Insn) -> int | None:
    return _Run(e, insn).execute(_search)


def _search(run: _Run) -> int:
    value = run.accumulator()
    right, n = run.chunk(write=False, of_target=True, most=min(run.limit - run.done, _SCAN))
    if n:
        items = run.elements(right, n)
        return _scan(run, np.full(n, value, dtype=items.dtype), items)
    if run.device_waits(run.is_ram(run.target_linear, False)):
        return 0
    return _verdict(run, value, run.mmu.read(run.target_linear, run.size), 1)


def _scan(run: _Run, left: npt.NDArray[np.unsignedinteger], right: npt.NDArray[np.unsignedinteger]) -> int:
    """Elements up to the one that ends the repetition, or all; the flags are those of the last one."""
    if not run.repeat:
        return _verdict(run, int(left[0]), int(right[0]), 1)
    stops = left == right if run.insn.iced.has_repne_prefix else left != right
    at = int(stops.argmax())
    if not stops[at]:
        at = len(left) - 1
    return _verdict(run, int(left[at]), int(right[at]), at + 1)


def _verdict(run: _Run, left: int, right: int, n: int) -> int:
    state, width = run.e.state, 8 * run.size
    state.cc_op, state.cc_dst, state.cc_src = flags.cc_op(flags.SUB, width), (left - right) & MASK[width], right
    if run.repeat:
        run.finished = (left == right) == bool(run.insn.iced.has_repne_prefix)
    return n


# -- INS, OUTS --------------------------------------------------------------------------------


@helper(*INS)
def ins(e: TcgEngine, insn: Insn) -> int | None:
    return _Run(e, insn).execute(_input)


def _input(run: _Run) -> int:
    """The target is checked before the port is read: reading may change the device."""
    run.limit = 1
    port = run.e.state.regs[RDX] & 0xFFFF
    check_port(run.e, port, run.size)
    run.mmu.check_write(run.target_linear, run.size)
    run.mmu.write(run.target_linear, run.size, run.e.bus.io_read(port, run.size))
    return 1


@helper(*OUTS)
def outs(e: TcgEngine, insn: Insn) -> int | None:
    return _Run(e, insn).execute(_output)


def _output(run: _Run) -> int:
    run.limit = 1
    port = run.e.state.regs[RDX] & 0xFFFF
    check_port(run.e, port, run.size)
    run.e.bus.io_write(port, run.size, run.mmu.read(run.source_linear, run.size))
    return 1
