"""Random straight-line programs of the integer instructions, and the machines that run them.

A program is a list of encoded instructions that leave RBX, RSI and RSP alone; RBX and RSI point into a data
area. The python target runs it as one region on plain memory; unicorn is the partner.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from iced_x86 import Code, InstructionInfoFactory, OpAccess, OpKind, Register, RegisterExt, RflagsBits

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import MASK, Mode
from pyvcpu.accel.tcg.decode import decode
from pyvcpu.accel.tcg.region import translate
from pyvcpu.accel.tcg.target.python import lower
from pyvcpu.cpu.layout import FS, GS, REG_NAMES
from pyvcpu.cpu.state import CpuState

CODE, DATA, STACK = 0x1000, 0x4000, 0x9000
DATA_SIZE, MEMORY = 0x2000, 0x10000
LONG = Mode(64, 64, True, True)

_KEEP = {Register.RBX, Register.RSI, Register.RSP}
_KEEP_NARROW = {Register.RSP, Register.SP}
# Programs with every form of address keep these too; indices are small, R13 has a random upper half, see _operand.
_BASES = {Register.RBX, Register.RSI, Register.R12, Register.R13, Register.R15}
_INDICES = {Register.RDI, Register.R14}
FS_BASE, GS_BASE = 0x140, 0xFFFF_9000_0000_1230
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

# With every form of address: MOV from and to an absolute address of 64 bits, PUSH and POP of memory.
ADDRESS_FORMS = [
    *FORMS, *((bytes([op]), False, None, 0) for op in range(0xA0, 0xA4)),
    (b"\xff", True, (6,), 0), (b"\x8f", True, (0,), 0), (b"\x8d", True, None, 0),
    *((bytes([0x0F, op]), True, None, 0) for op in bytes.fromhex("a3abb3bb")),
]  # fmt: skip


class Program(NamedTuple):
    code: bytes
    regs: tuple[int, ...]
    rflags: int
    data: bytes
    undefined: int  # flags that the SDM leaves undefined at the end
    fs_base: int = 0
    gs_base: int = 0


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


def _operand(rng: random.Random, digit: int, tail: int, at: int) -> tuple[bytes, int, bytes]:
    """(prefixes, REX.X and REX.B, ModRM to displacement) of a memory operand in the data area.

    ``tail`` is the number of bytes from the displacement's end to the next instruction, and ``at`` the address that
    ModRM has when there are no prefixes but REX.
    """
    near = rng.choice([(0, 0), (1, rng.randrange(-128, 128)), (2, rng.randrange(-0x300, 0x300))])
    prefixes, base = b"", rng.choice(["rbx", "rsi", "r12", "r13", "r15", "index", "absolute", "rip"])
    if base == "r13":  # its upper half counts for nothing
        prefixes = b"\x67"
    elif base == "r15":  # DATA from GS's base on
        prefixes = b"\x65"
    else:
        prefixes = rng.choice([b"", b"", b"\x64"]) + rng.choice([b"", b"", b"", b"\x67"])
    if base == "rip":
        target = DATA + rng.randrange(0x1000)
        displacement = target - (at + len(prefixes) + 5 + tail)
        return prefixes, rng.choice([0, 1]), bytes([digit << 3 | 5]) + displacement.to_bytes(4, "little", signed=True)
    scale, index = rng.randrange(4) << 6, rng.choice([7, 14])
    indexed = rng.random() < 0.6
    if base in ("index", "absolute"):
        number = index if base == "index" else 4
        rex = (number >> 3) << 1
        sib = bytes([digit << 3 | 4, scale | (number & 7) << 3 | 5])
        return prefixes, rex, sib + (DATA + 0x800 + rng.randrange(0x400)).to_bytes(4, "little")
    number = {"rbx": 3, "rsi": 6, "r12": 12, "r13": 13, "r15": 15}[base]
    mod, displacement = (1, near[1] % 128) if number == 13 and near[0] == 0 else near
    shown = displacement.to_bytes((0, 1, 4)[mod], "little", signed=True)
    if indexed or number == 12:
        index = index if indexed else 4
        sib = scale | (index & 7) << 3 | number & 7
        return prefixes, (index >> 3) << 1 | number >> 3, bytes([mod << 6 | digit << 3 | 4, sib]) + shown
    return prefixes, number >> 3 | rng.choice([0, 2]), bytes([mod << 6 | digit << 3 | number & 7]) + shown


def _encode_address(rng: random.Random, at: int) -> bytes:
    """As _encode, for the instruction at ``at``; three of four operands in memory, by every form of address."""
    opcode, modrm, digits, immediate = rng.choice(ADDRESS_FORMS)
    small = b"\x66" if rng.random() < 0.2 else b""
    rex = rng.choice([0, 0, 0x48, 0x48, 0x40, 0x44, 0x4C])
    if digits == (0,):
        rex &= ~4
    size = 8 if rex & 8 else 2 if small else 4
    count = immediate if immediate >= 0 else 8 if opcode[0] in range(0xB8, 0xC0) and size == 8 else min(size, 4)
    value = bytes(rng.choice([0, 1, 0xFF, 0x7F, 0x80, rng.randrange(256)]) for _ in range(count))
    if not modrm:
        if opcode[0] not in range(0xA0, 0xA4) or len(opcode) > 1:
            return small + (bytes([rex]) if rex else b"") + opcode + value
        prefix = rng.choice([b"", b"\x64", b"\x67"])
        address = (DATA + rng.randrange(0x1000)).to_bytes(4 if prefix == b"\x67" else 8, "little")
        return prefix + small + (bytes([rex]) if rex else b"") + opcode + address
    digit = rng.choice(digits) if digits else rng.randrange(8)
    if rng.random() < 0.25:
        return small + (bytes([rex]) if rex else b"") + opcode + bytes([0xC0 | digit << 3 | rng.randrange(8)]) + value
    start = at + len(small) + len(opcode)
    state = rng.getstate()
    prefixes, bits, rest = _operand(rng, digit, count, start)
    if bits or rex:
        rex |= 0x40 | bits
        rng.setstate(state)  # the same operand, one byte further for the RIP
        prefixes, bits, rest = _operand(rng, digit, count, start + 1)
    return prefixes + small + (bytes([rex]) if rex else b"") + opcode + rest + value


def _fits_address(code: bytes, at: int) -> bool:
    """Whether the registers that hold addresses keep their values, and what is accessed lies in reach."""
    insn = decode(code + b"\x90" * 15, at, 64)
    iced = insn.iced
    for used in _FACTORY.info(iced).used_registers():
        writes = used.access not in (OpAccess.READ, OpAccess.COND_READ, OpAccess.NONE)
        if writes and RegisterExt.full_register(used.register) in _BASES | _INDICES:
            return False
    if insn.name in ("bt", "bts", "btr", "btc") and iced.op0_kind == OpKind.MEMORY and iced.op1_kind == OpKind.REGISTER:
        return RegisterExt.full_register(iced.op1_register) in _INDICES
    if iced.code in (Code.POP_RM64, Code.POP_RM16) and iced.op0_register in _KEEP_NARROW:
        return False
    # Unicorn forgets the immediate when it works out what RIP these mean.
    return not (insn.name in ("shld", "shrd") and iced.is_ip_rel_memory_operand and iced.op2_kind == OpKind.IMMEDIATE8)


def _fits(code: bytes, at: int = CODE, *, addresses: bool = False) -> tuple[bool, int, int]:
    """(usable, flags made undefined, flags written) of one encoded instruction."""
    insn = decode(code + b"\x90" * 15, at, 64)
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
    if addresses and not _fits_address(code, at):
        return False, 0, 0
    for memory in info.used_memory() if not addresses else ():
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


def make_program(seed: int, length: int = 12, *, addresses: bool = False) -> Program:
    """A program for a seed; no instruction reads a flag that an earlier one left undefined.

    ``addresses``: with operands in memory by every form of address; else by RBX, RSI and RSP alone.
    """
    rng = random.Random(seed)
    code, undefined, depth = b"", 0, 0
    while length:
        one = _encode_address(rng, CODE + len(code)) if addresses else _encode(rng)
        usable, leaves, writes = _fits(one, CODE + len(code), addresses=addresses)
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
    program = Program(code, tuple(regs), rflags, rng.randbytes(DATA_SIZE), undefined)
    if not addresses:
        return program
    regs[7], regs[14] = (rng.randrange(-16, 16) & (1 << 64) - 1 for _ in range(2))
    regs[12], regs[13] = DATA + 0xC00 + rng.randrange(64), DATA + 0x900 | rng.getrandbits(32) << 32
    regs[15] = DATA + 0xA00 - GS_BASE & (1 << 64) - 1
    return program._replace(regs=tuple(regs), fs_base=FS_BASE, gs_base=GS_BASE)


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
            return lambda a: int.from_bytes(self.data[a & MASK[64] : (a & MASK[64]) + size], "little")

        def store(a: int, value: int) -> None:
            a &= MASK[64]
            self.data[a : a + size] = value.to_bytes(size, "little")

        return store


class Identity(dict[int, int]):
    """Page -> 0; generated code leaves it to the TLB to wrap addresses at 64 bits."""

    def __missing__(self, page: int) -> int:
        return -(page >> 52 << 64)


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
    state.seg_base[FS], state.seg_base[GS] = program.fs_base, program.gs_base
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
    uc.reg_write(x86_const.UC_X86_REG_FS_BASE, program.fs_base)
    uc.reg_write(x86_const.UC_X86_REG_GS_BASE, program.gs_base)
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
