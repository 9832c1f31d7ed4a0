"""String instructions against a model that does one element after the other."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest

from pyvcpu.accel.tcg import flags
from pyvcpu.cpu.layout import DS, ES, FS, RAX, RCX, RDI, RDX, RSI
from tests.unit.accel.helpers.box import CODE, SIZE, TABLES, Box

MASK64 = (1 << 64) - 1
OPCODES = {"movs": 0xA4, "stos": 0xAA, "lods": 0xAC, "cmps": 0xA6, "scas": 0xAE}
AREA, AREA_SIZE = 0x20000, 0x6000


class Case(NamedTuple):
    name: str
    size: int
    width: int  # address size
    bits: int  # code size
    prefix: int  # F3, F2 or 0
    backward: bool
    si: int
    di: int
    count: int
    rax: int

    def code(self) -> bytes:
        out = bytes([self.prefix]) if self.prefix else b""
        if (self.size == 2) != (self.bits == 16) and self.size in (2, 4):
            out += b"\x66"
        if self.width != self.bits:
            out += b"\x67"
        if self.size == 8:
            out += b"\x48"
        return out + bytes([OPCODES[self.name] + (self.size > 1)])


def random_case(rng: random.Random) -> Case:
    name = rng.choice(list(OPCODES))
    bits = rng.choice((16, 32, 64, 64))
    width = {16: rng.choice((16, 32)), 32: rng.choice((32, 16)), 64: rng.choice((64, 64, 32))}[bits]
    size = rng.choice((1, 2, 4, 8) if bits == 64 else (1, 2, 4))
    first = 0 if width == 16 else AREA  # with 16-bit addresses the bases point to the area
    close = rng.random() < 0.5
    si = first + rng.randrange(0x100, AREA_SIZE - 0x100)
    di = si + rng.randrange(-40, 41) if close else first + rng.randrange(0x100, AREA_SIZE - 0x100)
    count = rng.choice((0, 1, 2, rng.randrange(50), rng.randrange(50), rng.randrange(3000)))
    backward = rng.random() < 0.4
    low = min(si, di) - first
    high = AREA_SIZE - (max(si, di) - first)
    count = min(count, (low if backward else high) // size - 1)
    if name in ("cmps", "scas"):
        prefix = rng.choice((0, 0xF2, 0xF3, 0xF3))
    else:
        prefix = rng.choice((0, 0xF3, 0xF3, 0xF2))
    rax = rng.choice((0, MASK64, rng.getrandbits(64)))
    return Case(name, size, width, bits, prefix, backward, si, di, max(count, 0), rax)


class Result(NamedTuple):
    memory: bytes
    si: int
    di: int
    count: int
    rax: int
    compared: tuple[int, int] | None
    retired: int


def model(case: Case, memory: bytearray, base: int) -> Result:
    """SDM pseudo-code, element by element; ``memory`` is the whole of RAM."""
    size, mask = case.size, (1 << case.width) - 1
    step = -size if case.backward else size
    si, di, rax = case.si, case.di, case.rax
    left = case.count if case.prefix else 1
    done, compared = 0, None
    while left:
        source, target = base + si, base + di
        if case.name == "movs":
            memory[target : target + size] = bytes(memory[source : source + size])
        elif case.name == "stos":
            memory[target : target + size] = (rax & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        elif case.name == "lods":
            value = int.from_bytes(memory[source : source + size], "little")
            keep = 0 if size >= 4 else rax >> 8 * size << 8 * size
            rax = keep | value
        else:
            first = rax & ((1 << 8 * size) - 1)
            if case.name == "cmps":
                first = int.from_bytes(memory[source : source + size], "little")
            compared = first, int.from_bytes(memory[target : target + size], "little")
        if case.name in ("movs", "lods", "cmps"):
            si = (si + step) & mask
        if case.name in ("movs", "stos", "cmps", "scas"):
            di = (di + step) & mask
        left -= 1
        done += 1
        if compared is not None and case.prefix and (compared[0] == compared[1]) == (case.prefix == 0xF2):
            break
    return Result(bytes(memory), si, di, left if case.prefix else case.count, rax, compared, max(done, 1))


def subtraction_flags(a: int, b: int, size: int) -> int:
    mask, top = (1 << 8 * size) - 1, 8 * size - 1
    result = (a - b) & mask
    out = flags.CF if a < b else 0
    out |= flags.PF if bin(result & 0xFF).count("1") % 2 == 0 else 0
    out |= (a ^ b ^ result) & flags.AF
    out |= 0 if result else flags.ZF
    out |= flags.SF if result >> top else 0
    out |= flags.OF if ((a ^ b) & (a ^ result)) >> top else 0
    return out


def make_box(case: Case, rng: random.Random) -> tuple[Box, int]:
    box = Box()
    if case.bits == 64:
        box.long_mode()
    elif case.bits == 32:
        box.protected()
    base = AREA if case.width == 16 else 0
    box.state.seg_base[DS] = box.state.seg_base[ES] = base
    box.engine.load_state()
    kind = rng.randrange(3)
    data = bytearray(rng.randbytes(AREA_SIZE) if kind == 0 else bytes([case.rax & 0xFF]) * AREA_SIZE)
    if kind == 1:
        for at in rng.sample(range(AREA_SIZE), 20):
            data[at] ^= 1
    box.put(AREA, data)
    return box, base


def run_case(case: Case, seed: int, slices: list[int]) -> None:
    rng = random.Random(seed)
    box, base = make_box(case, rng)
    state = box.state
    high = rng.getrandbits(16) << 48 if case.width == 16 else 0
    state.regs[RSI], state.regs[RDI], state.regs[RCX] = case.si | high, case.di | high, case.count | high
    state.regs[RAX] = case.rax
    box.engine.set_rflags((flags.DF if case.backward else 0) | flags.CF)
    box.put(CODE, case.code())
    box.put(CODE + len(case.code()), "90" * 20)
    want = model(case, bytearray(box.ram.read(0, SIZE)), base)
    for n in slices:
        if box.clock.instructions + n < want.retired:
            box.engine.run(box.clock.instructions + n)
            box.engine.save_state()
            assert state.rip == CODE
    box.engine.run(want.retired)
    box.engine.save_state()
    assert box.clock.instructions == want.retired
    assert state.rip == CODE + len(case.code())
    assert box.ram.read(TABLES + 0x4000, SIZE - TABLES - 0x4000) == want.memory[TABLES + 0x4000 :]
    assert [state.regs[r] for r in (RSI, RDI, RCX)] == [want.si | high, want.di | high, want.count | high]
    assert state.regs[RAX] == want.rax
    expected = subtraction_flags(*want.compared, case.size) if want.compared else flags.CF
    assert state.rflags & flags.ARITHMETIC == expected


@pytest.mark.parametrize("first", range(0, 1200, 100))
def test_random_cases(first: int) -> None:
    for seed in range(first, first + 100):
        rng = random.Random(seed)
        case = random_case(rng)
        slices = [rng.randrange(1, 200) for _ in range(rng.choice((0, 0, 5)))]
        try:
            run_case(case, seed, slices)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {case}, slices {slices}") from error


def test_16_bit_addresses_wrap_within_the_segment() -> None:
    box = Box()
    box.state.seg_base[DS], box.state.seg_base[ES] = 0x10000, 0x30000
    box.engine.load_state()
    box.put(0x1FFFE, "0102")
    box.put(0x10000, "0304")
    box.state.regs[RSI], box.state.regs[RDI], box.state.regs[RCX] = 0xFFFE, 0xFFFF, 4
    box.run("f3a4", 4)
    assert (box.get(0x3FFFF, 1), box.get(0x30000, 3)) == (1, 0x040302)
    assert (box.reg(RSI), box.reg(RDI), box.reg(RCX)) == (2, 3, 0)


def test_a_segment_override_counts_for_the_source_only() -> None:
    box = Box().long_mode()
    box.state.seg_base[FS] = 0x1000
    box.put(0x9000, "11223344")
    box.state.regs[RSI], box.state.regs[RDI] = 0x8000, 0xA000
    box.run("64a5", 1)
    assert box.get(0xA000, 4) == 0x44332211


def test_a_fault_keeps_what_was_done() -> None:
    """REP STOSB into a page that is not there: RCX and RDI say how far it came, #PF how it went on."""
    box = Box().long_mode()
    box.gate64(14, 0x7000)
    box.put(0x7000, "90")
    box.page_entry(0x31, 0)
    box.state.regs[RAX], box.state.regs[RDI], box.state.regs[RCX] = 0x55, 0x30F00, 0x300
    box.run("f3aa", 0x100)
    assert box.clock.instructions == 0x100
    box.engine.run(0x101)
    assert (box.reg(RDI), box.reg(RCX)) == (0x31000, 0x200)
    assert box.state.cr2 == 0x31000
    assert box.frame(2) == [2, CODE]
    assert box.state.rip == 0x7001
    assert box.clock.instructions == 0x101  # the nop of the handler: the fault is none
    assert box.ram.read(0x30F00, 0x100) == b"\x55" * 0x100


def test_a_misaligned_element_faults_before_it_is_stored() -> None:
    box = Box().long_mode()
    box.gate64(14, 0x7000)
    box.put(0x7000, "90")
    box.page_entry(0x31, 0x31005)  # read-only, and CR0.WP is set
    before = box.ram.read(0x30FF0, 0x20)
    box.state.regs[RAX], box.state.regs[RDI], box.state.regs[RCX] = MASK64, 0x30FFC, 3
    box.run("f348ab", 1)
    assert box.state.cr2 == 0x31000
    assert box.frame(1) == [3]
    assert box.reg(RCX) == 3
    assert box.ram.read(0x30FF0, 0x20) == before


def test_only_the_pages_in_use_become_accessed_and_dirty() -> None:
    box = Box().long_mode()
    table = 0x13000
    box.state.regs[RSI], box.state.regs[RDI], box.state.regs[RCX] = 0x30800, 0x40800, 0x1000
    box.run("f3a4", 0x700)
    assert [box.get(table + 8 * p, 1) for p in (0x30, 0x31, 0x40, 0x41)] == [0x27, 0x07, 0x67, 0x07]
    box.engine.run(0x1000)
    assert [box.get(table + 8 * p, 1) for p in (0x30, 0x31, 0x32, 0x40, 0x41, 0x42)] == [0x27, 0x27, 7, 0x67, 0x67, 7]


def test_pages_far_apart_are_followed_by_the_page() -> None:
    """Neighbours in linear memory that are none in physical memory, with elements across the border."""
    box = Box().long_mode()
    for page in range(8):
        box.page_entry(0x50 + page, (0x70 - 2 * page) << 12 | 7)
    data = bytes(random.Random(5).getrandbits(8) for _ in range(0x7000))
    box.put(0x20000, data)
    box.state.regs[RSI], box.state.regs[RDI], box.state.regs[RCX] = 0x20000, 0x50003, 0x7000 // 8
    box.run("f348a5", 0x7000 // 8)
    seen = b"".join(box.ram.read((0x70 - 2 * page) << 12, 0x1000) for page in range(8))
    assert seen[3 : 3 + len(data)] == data
    box.state.regs[RSI], box.state.regs[RDI], box.state.regs[RCX] = 0x56FFB, 0x26FF8, 0x7000 // 8
    box.engine.set_rflags(flags.DF)
    box.put(0x20000, bytes(0x7000))
    box.run("f348a5", 0x7000 // 8)
    assert box.ram.read(0x20000, 0x7000) == data


def test_stores_over_translated_code_are_seen() -> None:
    """The loop body is rewritten by REP MOVSB; what runs then is the new one, what lies beside stays."""
    box = Box().long_mode()
    box.put(0x9000, "b801000000c3")  # mov eax, 1; ret
    box.put(0x9800, "b803000000c3")
    box.put(0xA000, "b802000000c3")
    # call 0x9000; call 0x9800; rep movsb; call 0x9000
    box.put(CODE, "e8fb7f000089c3e8f487000001c3f3a4e8eb7f000090")
    box.state.regs[RSI], box.state.regs[RDI], box.state.regs[RCX] = 0xA000, 0x9000, 6
    box.state.rip = CODE
    box.engine.run(3 + 1 + 3 + 1 + 6 + 3)
    assert (box.reg(RAX), box.reg(3)) == (2, 4)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("code", ["f3aa", "f366ab", "f3ab", "f348ab", "f3a4", "f348a5"])
@pytest.mark.parametrize("at", [0x9000, 0x9FF9, 0x9FFE, 0x9FFF])
def test_what_overwrites_itself_is_fetched_again(code: str, backward: bool, at: int) -> None:
    """A REP that stores over its own bytes ends there, wherever the run is cut (at 9fff it is on two pages)."""

    def run(step: int) -> tuple[dict[str, object], bytes]:
        box = Box().long_mode()
        box.put(at, code + "90" * 0x60)
        box.put(0xC000, "90" * 0x100)
        state = box.state
        state.regs[RCX], state.regs[RAX], state.rip = 0x20, int("90" * 8, 16), at
        size = {"f366ab": 2, "f3ab": 4, "f348ab": 8, "f348a5": 8}.get(code, 1)
        state.regs[RDI], state.regs[RSI] = at + 1 + (12 * size if backward else -12 * size), 0xC080
        box.engine.set_rflags(flags.DF if backward else 0)
        while box.clock.instructions < 0x40:
            box.engine.run(min(0x40, box.clock.instructions + step))
        box.engine.save_state()
        assert 0 < state.regs[RCX] < 0x20
        return state.architectural(), box.ram.read(0x8000, 0x5000)

    whole = run(0x40)
    assert run(1) == whole
    assert run(7) == whole


def test_writes_are_logged_once_a_page() -> None:
    box = Box().long_mode()
    box.ram.start_dirty_log()
    box.ram.harvest_dirty()
    box.state.regs[RDI], box.state.regs[RCX] = 0x30010, 0x2000 // 8
    box.run("f348ab", 0x400)
    dirty = set(box.ram.harvest_dirty().tolist())
    assert {0x30, 0x31, 0x32} <= dirty
    assert not {0x2F, 0x33} & dirty


class _Fifo:
    """A device that counts and says when it was asked."""

    def __init__(self, box: Box) -> None:
        self.box, self.log = box, []

    def read(self, offset: int, size: int) -> int:
        self.log.append((offset, size, self.box.clock.instructions))
        return len(self.log)

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append((offset, size, value, self.box.clock.instructions))


def test_ports_see_one_element_at_a_time_at_the_right_time() -> None:
    box = Box().long_mode()
    fifo = _Fifo(box)
    box.bus.map_io(0x300, 4, fifo, "fifo")
    box.state.regs[RDI], box.state.regs[RCX], box.state.regs[RDX] = 0x9000, 3, 0x301
    box.run("f3666d", 3)
    assert fifo.log == [(1, 2, 0), (1, 2, 1), (1, 2, 2)]
    assert box.ram.read(0x9000, 6) == bytes([1, 0, 2, 0, 3, 0])
    fifo.log.clear()
    box.state.regs[RSI], box.state.regs[RCX] = 0x9000, 2
    box.run("f36e", 2)
    assert fifo.log == [(1, 1, 1, 3), (1, 1, 0, 4)]


def test_mmio_is_reached_element_by_element() -> None:
    box = Box().long_mode()
    fifo = _Fifo(box)
    box.bus.map_mmio(0x60000, 0x1000, fifo, "fifo")
    box.engine.flush_tlb()
    box.put(0x5FFF0, bytes(range(1, 17)))
    box.state.regs[RSI], box.state.regs[RDI], box.state.regs[RCX] = 0x5FFF8, 0x9000, 4
    box.run("f3a5", 4)
    assert fifo.log == [(0, 4, 2), (4, 4, 3)]
    assert box.ram.read(0x9000, 16) == bytes(range(9, 17)) + bytes([1, 0, 0, 0, 2, 0, 0, 0])
    fifo.log.clear()
    box.state.regs[RDI], box.state.regs[RCX], box.state.regs[RAX] = 0x60010, 2, 0xAB
    box.run("f3aa", 2)
    assert fifo.log == [(0x10, 1, 0xAB, 4), (0x11, 1, 0xAB, 5)]


def test_input_to_a_page_that_is_not_there_leaves_the_device_alone() -> None:
    box = Box().long_mode()
    fifo = _Fifo(box)
    box.bus.map_io(0x300, 1, fifo, "fifo")
    box.gate64(14, 0x7000)
    box.put(0x7000, "90")
    box.page_entry(0x31, 0)
    box.state.regs[RDI], box.state.regs[RDX] = 0x31000, 0x300
    box.run("6c", 1)
    assert box.state.cr2 == 0x31000
    assert fifo.log == []
