"""Helpers against unicorn: single instructions on random state, in 16, 32 and 64-bit code."""

from __future__ import annotations

import random

import pytest

from pyvcpu.accel.tcg import flags
from pyvcpu.cpu.layout import REG_NAMES, RSP
from tests.unit.accel.helpers.box import CODE, Box

unicorn = pytest.importorskip("unicorn")
from unicorn import x86_const  # noqa: E402

DATA, TOP = 0x8000, 0x9000
ALL = flags.ARITHMETIC

# (bits, code, flags that the SDM leaves undefined)
CASES = {
    "rcl al, cl": (64, "d2d0", 0), "rcr al, cl": (64, "d2d8", 0), "rcl ax, cl": (64, "66d3d0", 0),
    "rcr ax, cl": (64, "66d3d8", 0), "rcl eax, cl": (64, "d3d0", 0), "rcr eax, cl": (64, "d3d8", 0),
    "rcl rax, cl": (64, "48d3d0", 0), "rcr rax, cl": (64, "48d3d8", 0), "rcl ah, 3": (64, "c0d403", flags.OF),
    "rcr byte [rsi], cl": (64, "d21e", 0), "rcl qword [rsi], 40": (64, "48c11628", flags.OF),
    "rcr dword [rsi+rcx*4+8]": (32, "c15e0811", flags.OF),
    "enter 20, 0": (64, "c8140000", 0), "enter 16, 1": (64, "c8100001", 0), "enter 8, 5": (64, "c8080005", 0),
    "enter 32-bit": (32, "c8200003", 0), "enter 16-bit operand": (32, "66c8200003", 0),
    "pusha": (32, "6660", 0), "pushad": (32, "60", 0), "popa": (32, "6661", 0), "popad": (32, "61", 0),
    "xlat": (64, "d7", 0), "xlat 32": (32, "d7", 0), "cmpxchg8b": (64, "0fc70e", 0), "cmpxchg16b": (64, "480fc70e", 0),
    "lock cmpxchg8b": (32, "f00fc70e", 0), "pushfq": (64, "9c", 0), "pushfw": (64, "669c", 0), "popfq": (64, "9d", 0),
    "popfw": (64, "669d", 0), "popfd": (32, "9d", 0), "lahf": (64, "9f", 0), "sahf": (64, "9e", 0),
    "pop [rsp]": (64, "8f0424", 0), "pop [rsp+16]": (64, "8f442410", 0), "pop word [rsp+8]": (64, "668f442408", 0),
    "pop [esp] 32": (32, "8f442404", 0), "daa": (32, "27", flags.OF), "das": (32, "2f", flags.OF),
    "aaa": (32, "37", flags.OF | flags.SF | flags.ZF | flags.PF),
    "aas": (32, "3f", flags.OF | flags.SF | flags.ZF | flags.PF),
    "aam": (32, "d40a", flags.OF | flags.AF | flags.CF), "aad": (32, "d50a", flags.OF | flags.AF | flags.CF),
    "rcl rax, 33": (64, "48c1d021", flags.OF), "rcr eax, 33": (64, "c1d821", 0), "rcl cx, 17": (64, "66c1d111", 0),
    "movsb": (64, "a4", 0), "rep movsw": (64, "66f3a5", 0), "repne scasb": (64, "f2ae", 0),
    "repe cmpsd": (64, "f3a7", 0), "std rep": (64, "f348ab", 0), "movsd 16-bit addresses": (32, "67a5", 0),
    "lodsw": (32, "66ad", 0), "cmpsq": (64, "48a7", 0), "scasq": (64, "48af", 0),
}  # fmt: skip


def random_state(rng: random.Random, name: str) -> tuple[list[int], int, bytes]:
    regs = [rng.choice((0, 1, (1 << 64) - 1, rng.getrandbits(64), rng.getrandbits(8))) for _ in range(16)]
    regs[1] = rng.choice((rng.randrange(8), rng.getrandbits(6)))
    regs[3] = DATA + rng.randrange(0x100)
    regs[4], regs[5], regs[6], regs[7] = TOP - 0x200, TOP - 0x180, DATA + 0x200, DATA + 0x400
    memory = bytearray(rng.randbytes(TOP - DATA))
    if rng.random() < 0.5:  # make comparisons hold
        memory[0x200:0x210] = (regs[0] & 0xFFFFFFFF | (regs[2] & 0xFFFFFFFF) << 32).to_bytes(8, "little") * 2
        memory[0x400:0x480] = memory[0x200:0x280]
    if "16b" in name and rng.random() < 0.5:
        memory[0x200:0x210] = (regs[0] | regs[2] << 64).to_bytes(16, "little")
    # POPF must not set TF here: what follows is another instruction
    memory[0xE00:0xE08] = (rng.getrandbits(22) & ~(flags.TF | flags.VM | flags.RF | 0x180000)).to_bytes(8, "little")
    rflags = 2 | rng.getrandbits(12) & (ALL | flags.DF)
    return regs, rflags, bytes(memory)


def run_unicorn(bits: int, code: bytes, regs: list[int], rflags: int, memory: bytes) -> tuple[list[int], int, bytes]:
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64 if bits == 64 else unicorn.UC_MODE_32)
    uc.mem_map(0, 0x100000)
    uc.mem_write(CODE, code)
    uc.mem_write(DATA, memory)
    names = REG_NAMES if bits == 64 else ["e" + n[1:] for n in REG_NAMES[:8]]
    ids = [getattr(x86_const, "UC_X86_REG_" + n.upper()) for n in names]
    for register, value in zip(ids, regs, strict=False):
        uc.reg_write(register, value)
    uc.reg_write(x86_const.UC_X86_REG_EFLAGS, rflags)
    uc.emu_start(CODE, CODE + len(code))
    out = [uc.reg_read(register) for register in ids]
    return out, uc.reg_read(x86_const.UC_X86_REG_EFLAGS), bytes(uc.mem_read(DATA, len(memory)))


@pytest.mark.parametrize("name", CASES)
def test_against_unicorn(name: str) -> None:
    bits, text, undefined = CASES[name]
    code = bytes.fromhex(text)
    for seed in range(30):
        regs, rflags, memory = random_state(random.Random(f"{name} {seed}"), name)
        if bits == 32:
            regs = [r & 0xFFFFFFFF for r in regs[:8]]
        box = Box()
        box.long_mode() if bits == 64 else box.protected()
        for i, value in enumerate(regs):
            box.state.regs[i] = value
        box.engine.set_rflags(rflags)
        box.put(DATA, memory)
        box.put(CODE, code)
        box.state.rip = CODE
        while box.state.rip == CODE:
            box.engine.run(box.clock.instructions + 1)
        box.engine.save_state()
        want_regs, want_flags, want_memory = run_unicorn(bits, code, regs, rflags, memory)
        got = [box.reg(i) for i in range(len(regs))]
        assert got == want_regs, (seed, [hex(v) for v in got], [hex(v) for v in want_regs])
        mask = ~(undefined | flags.RF)
        assert box.state.rflags & mask == want_flags & mask, (seed, hex(box.state.rflags), hex(want_flags))
        assert box.ram.read(DATA, len(memory)) == want_memory, seed
        assert box.state.rip == CODE + len(code)
        assert box.reg(RSP) == want_regs[RSP]
