"""Random straight-line programs of the integer instructions, and the machines that run them.

A program is a list of encoded instructions that leave RBX, RSI and RSP alone; RBX and RSI point into a data
area. The python target runs it as one region on plain memory; unicorn is the partner.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from iced_x86 import Code, InstructionInfoFactory, OpAccess, OpKind, Register, RegisterExt, RflagsBits

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import Mode
from pyvcpu.accel.tcg.decode import decode
from pyvcpu.accel.tcg.region import translate
from pyvcpu.accel.tcg.target.python import lower
from pyvcpu.cpu.layout import REG_NAMES
from pyvcpu.cpu.state import CpuState

CODE, DATA, STACK = 0x1000, 0x4000, 0x9000
DATA_SIZE, MEMORY = 0x2000, 0x10000
LONG = Mode(64, 64, True, True)

_KEEP = {Register.RBX, Register.RSI, Register.RSP}
_KEEP_NARROW = {Register.RSP, Register.SP}
# Unicorn clears the upper half of a 32-bit destination that these leave alone; processors keep it (test_host_cpu).
_UNICORN_DIFFERS = {Code.BSF_R32_RM32, Code.BSR_R32_RM32, Code.CMPXCHG_RM32_R32}
_FACTORY = InstructionInfoFactory()
_FLAG_BITS = {
    RflagsBits.CF: flags.CF, RflagsBits.PF: flags.PF, RflagsBits.AF: flags.AF,
    RflagsBits.ZF: flags.ZF, RflagsBits.SF: flags.SF, RflagsBits.OF: flags.OF,
}  # fmt: skip

# (opcode bytes, has ModRM, allowed /digit or None, immediate bytes: 0, 1, or -1 for "operand size up to 4")
FORMS: list[tuple[bytes, bool, tuple[int, ...] | None, int]] = [
    *((bytes([op + form]), True, None, 0) for op in range(0, 0x40, 8) for form in range(4)),
    *((bytes([op + 4]), False, None, 1) for op in range(0, 0x40, 8)),
    *((bytes([op + 5]), False, None, -1) for op in range(0, 0x40, 8)),
    (b"\x80", True, None, 1), (b"\x81", True, None, -1), (b"\x83", True, None, 1),
    (b"\x84", True, None, 0), (b"\x85", True, None, 0), (b"\x86", True, None, 0), (b"\x87", True, None, 0),
    (b"\x88", True, None, 0), (b"\x89", True, None, 0), (b"\x8a", True, None, 0), (b"\x8b", True, None, 0),
    (b"\x8d", True, None, 0), (b"\x63", True, None, 0), (b"\x98", False, None, 0), (b"\x99", False, None, 0),
    (b"\xa8", False, None, 1), (b"\xa9", False, None, -1),
    *((bytes([op]), False, None, 1) for op in range(0xB0, 0xB8)),
    *((bytes([op]), False, None, -1) for op in range(0xB8, 0xC0)),
    (b"\xc0", True, (0, 1, 4, 5, 7), 1), (b"\xc1", True, (0, 1, 4, 5, 7), 1), (b"\xd0", True, None, 0),
    (b"\xd1", True, None, 0), (b"\xd2", True, (0, 1, 4, 5, 7), 0), (b"\xd3", True, (0, 1, 4, 5, 7), 0),
    (b"\xc6", True, (0,), 1), (b"\xc7", True, (0,), -1),
    (b"\xf6", True, (0,), 1), (b"\xf7", True, (0,), -1), (b"\xf6", True, (2, 3, 4, 5), 0),
    (b"\xf7", True, (2, 3, 4, 5), 0),
    (b"\xfe", True, (0, 1), 0), (b"\xff", True, (0, 1), 0), (b"\x69", True, None, -1), (b"\x6b", True, None, 1),
    (b"\xf5", False, None, 0), (b"\xf8", False, None, 0), (b"\xf9", False, None, 0),
    *((bytes([0x0F, op]), True, None, 0) for op in range(0x40, 0x50)),
    *((bytes([0x0F, op]), True, None, 0) for op in range(0x90, 0xA0)),
    *((bytes([0x0F, op]), True, None, 0) for op in bytes.fromhex("a3a5abadafb0b1b3b6b7bbbcbdbebfc0c1")),
    (b"\x0f\xa4", True, None, 1), (b"\x0f\xac", True, None, 1), (b"\x0f\xba", True, (4, 5, 6, 7), 1),
    *((bytes([0x0F, op]), False, None, 0) for op in range(0xC8, 0xD0)),
    *((bytes([op]), False, None, 0) for op in range(0x50, 0x60)),
    (b"\x68", False, None, -1), (b"\x6a", False, None, 1),
]  # fmt: skip


class Program(NamedTuple):
    code: bytes
    regs: tuple[int, ...]
    rflags: int
    data: bytes
    undefined: int  # flags that the SDM leaves undefined at the end


def _encode(rng: random.Random) -> bytes:
    opcode, modrm, digits, immediate = rng.choice(FORMS)
    prefix = b"\x66" if rng.random() < 0.2 else b""
    rex = rng.choice([0, 0, 0x48, 0x48, 0x40, rng.randrange(0x40, 0x50)])
    if digits == (0,):
        rex &= ~4  # unicorn refuses MOV r/m, imm with REX.R, which processors ignore
    out = prefix + (bytes([rex]) if rex else b"") + opcode
    if modrm:
        digit = rng.choice(digits) if digits else rng.randrange(8)
        mod = rng.choice([0, 1, 2, 3, 3, 3])
        rm = rng.choice([3, 6]) if mod < 3 else rng.randrange(8)
        out += bytes([mod << 6 | digit << 3 | rm])
        if mod == 1:
            out += rng.randrange(256).to_bytes(1, "little")
        elif mod == 2:
            out += rng.randrange(-0x300, 0x300).to_bytes(4, "little", signed=True)
    size = 8 if rex & 8 else 2 if prefix else 4
    wide = opcode[0] in range(0xB8, 0xC0) and size == 8
    count = immediate if immediate >= 0 else 8 if wide else min(size, 4)
    return out + bytes(rng.choice([0, 1, 0xFF, 0x7F, 0x80, rng.randrange(256)]) for _ in range(count))


def _fits(code: bytes) -> tuple[bool, int, int]:
    """(usable, flags made undefined, flags written) of one encoded instruction."""
    insn = decode(code + b"\x90" * 15, CODE, 64)
    iced = insn.iced
    if (
        not insn.valid
        or insn.length != len(code)
        or (iced.code in (Code.POP_R64, Code.POP_R16) and iced.op0_register in _KEEP_NARROW)
    ):
        return False, 0, 0
    if iced.code in _UNICORN_DIFFERS and iced.op0_kind == OpKind.REGISTER:
        return False, 0, 0
    info = _FACTORY.info(iced)
    for used in info.used_registers():
        full = RegisterExt.full_register(used.register)
        writes = used.access not in (OpAccess.READ, OpAccess.COND_READ, OpAccess.NONE)
        if full in _KEEP and writes and not (full == Register.RSP and iced.is_stack_instruction):
            return False, 0, 0
    for memory in info.used_memory():
        if memory.base not in (Register.RBX, Register.RSI, Register.RSP) or memory.index != Register.NONE:
            return False, 0, 0
        bit_string = insn.name in ("bt", "bts", "btr", "btc") and iced.op1_register != Register.NONE
        if bit_string and memory.base != Register.RSP:
            return False, 0, 0
    undefined = sum(bit for name, bit in _FLAG_BITS.items() if iced.rflags_undefined & name)
    written = sum(
        bit for name, bit in _FLAG_BITS.items() if (iced.rflags_written | iced.rflags_cleared | iced.rflags_set) & name
    )
    return True, undefined, written


def make_program(seed: int, length: int = 12) -> Program:
    """A program for a seed; no instruction reads a flag that an earlier one left undefined."""
    rng = random.Random(seed)
    code, undefined, depth = b"", 0, 0
    while length:
        one = _encode(rng)
        usable, leaves, writes = _fits(one)
        insn = decode(one + b"\x90" * 15, CODE, 64) if usable else None
        if insn is None or sum(bit for n, bit in _FLAG_BITS.items() if insn.iced.rflags_read & n) & undefined:
            continue
        depth -= insn.iced.stack_pointer_increment
        if not 0 <= depth <= 0x100:
            depth += insn.iced.stack_pointer_increment
            continue
        # Shifts and rotates by CL may have a count of 0 or 1: what they leave stays uncertain from then on.
        if insn.name in ("shl", "shr", "sar", "sal", "rol", "ror", "rcl", "rcr", "shld", "shrd"):
            undefined |= flags.OF | (0 if insn.name.startswith("r") else flags.AF)
            if insn.name in ("shld", "shrd") or insn.name[0] == "s":
                undefined |= flags.CF
        else:
            undefined = (undefined & ~writes) | leaves
        code += one
        length -= 1
    interesting = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFFFFFF, 0x80000000, (1 << 64) - 1, 1 << 63]
    regs = [rng.choice([rng.choice(interesting), rng.getrandbits(64), rng.getrandbits(16)]) for _ in range(16)]
    regs[3], regs[6], regs[4] = DATA + 0x800 + rng.randrange(64), DATA + 0x1000 - rng.randrange(32), STACK
    rflags = 2 | rng.getrandbits(12) & flags.ARITHMETIC
    return Program(code, tuple(regs), rflags, rng.randbytes(DATA_SIZE), undefined)


class Outcome(NamedTuple):
    regs: tuple[int, ...]
    rflags: int
    data: bytes
    stack: bytes
    rip: int


class FlatMemory:
    """The mmu's part for generated code: memory without paging, with misaligned accesses."""

    def __init__(self, data: bytearray) -> None:
        self.data = data

    def __getattr__(self, name: str):  # load2 .. store8
        size = int(name[-1])
        if name.startswith("load"):
            return lambda a: int.from_bytes(self.data[a : a + size], "little")

        def store(a: int, value: int) -> None:
            self.data[a : a + size] = value.to_bytes(size, "little")

        return store


class Identity(dict[int, int]):
    def __missing__(self, page: int) -> int:
        return 0


def run_python_target(program: Program, *, slice_budget: int = 10_000) -> Outcome:
    """The program as one region of the python target."""
    memory = bytearray(MEMORY)
    memory[CODE : CODE + len(program.code)] = program.code
    memory[DATA : DATA + DATA_SIZE] = program.data
    state = CpuState()
    state.reset()
    for i, value in enumerate(program.regs):
        state.regs[i] = value
    state.cc_src = program.rflags
    end = CODE + len(program.code)
    blocks = translate(bytes(memory[CODE:end]), CODE, CODE, LONG)
    views = [memoryview(memory).cast("B").cast(kind) for kind in "BHIQ"]
    left = [0]
    made = lower(blocks)
    rip = made.function(state, state.regs, slice_budget, Identity(), Identity(), *views, FlatMemory(memory), left)
    image = flags.image(state.cc_op, state.cc_dst, state.cc_src)
    return Outcome(
        tuple(state.regs), image | 2, bytes(memory[DATA : DATA + DATA_SIZE]), bytes(memory[STACK - 0x200 : STACK]), rip
    )


def run_unicorn(program: Program) -> Outcome:
    """The same program on unicorn."""
    from unicorn import UC_ARCH_X86, UC_MODE_64, Uc, x86_const

    ids = [getattr(x86_const, f"UC_X86_REG_{name.upper()}") for name in REG_NAMES]
    uc = Uc(UC_ARCH_X86, UC_MODE_64)
    uc.mem_map(0, MEMORY)
    uc.mem_write(CODE, program.code)
    uc.mem_write(DATA, program.data)
    for register, value in zip(ids, program.regs, strict=True):
        uc.reg_write(register, value)
    uc.reg_write(x86_const.UC_X86_REG_EFLAGS, program.rflags)
    uc.emu_start(CODE, CODE + len(program.code))
    return Outcome(
        tuple(uc.reg_read(register) for register in ids),
        uc.reg_read(x86_const.UC_X86_REG_EFLAGS) & flags.ARITHMETIC | 2,
        bytes(uc.mem_read(DATA, DATA_SIZE)),
        bytes(uc.mem_read(STACK - 0x200, 0x200)),
        uc.reg_read(x86_const.UC_X86_REG_RIP),
    )


def listing(program: Program) -> str:
    """The program's instructions, a line each."""
    out, at = [], 0
    while at < len(program.code):
        insn = decode(program.code[at : at + 15], CODE + at, 64)
        out.append(f"{CODE + at:#x}  {insn.code.hex():24} {insn}")
        at += insn.length
    return "\n".join(out)
