"""A guest that runs single instructions under every privilege and logs what each did, here and in QEMU.

    1000 PML4, PDPT, PD      4000 TSS        5000 IDT       6000 GDT and LDT, in use     7000 the same, untouched
    8000 driver, handlers    A000 targets    F000 a page table for tests, of the 2 MiB at E00000
    C00000 targets of 2 MiB; 1F0000 and A00000 are what page tables of tests point to besides
    18000 stack  1C000 IST1  1E000 RSP0      20000 code, 64 bytes a case   100000 cases   800000 log

For each case the driver restores tables and control registers, loads the registers, and goes to the code in 64-bit
or 32-bit code, at level 0 or 3. The code ends with INT 81h. That and every exception come to one handler, which
logs the frame, registers and tables and goes on with the next case.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyvcpu.cpu.layout import CS, DS, ES, FS, GS, R12, R13, R14, RSP, SS
from pyvcpu.machine import MIB, Machine, MachineConfig, make_machine
from pyvcpu.migration.snapshot import save_snapshot
from tests.interop.qemu import NONE, Qemu

CODE, CASES, LOG, TARGET = 0x20000, 0x100000, 0x800000, 0xA000
CODE_SIZE, CASE_SIZE, RECORD_SIZE = 64, 128, 256
LARGE = 0xC00000  # targets, of 2 MiB
WINDOW, TABLE, ENTRY = 0xE00000, 0xF000, 0x3038  # linear window; its page table; its page-directory entry
KERNEL, USER, KERNEL32, USER32 = range(4)
DONE = 0x81

FIELDS = (
    "vector", "error", "rip", "cs", "rflags", "rsp", "ss", "rax", "rbx", "rcx", "rdx", "ds", "es", "fs", "gs", "cr2",
    "ldtr", "tr", "cr0", "cr4", "fs_base", "gs_base", "efer", "tables", "stack", "pte", "pte2", "pde",
)  # fmt: skip

DRIVER = """
next: test r14, r14; jz end
  mov rsi, 0x7000; mov rdi, 0x6000; mov ecx, 0x200; cld; rep movsq
  mov rax, [r12+64]; mov [0x5900], rax; mov rax, [r12+72]; mov [0x5908], rax
  lgdt [0xB000]
  mov eax, 0x10; mov ds, eax; mov es, eax; mov ss, eax; mov fs, eax; mov gs, eax
  mov eax, 0x40; lldt ax; mov eax, 0x30; ltr ax
  mov eax, 0x80010033; mov cr0, rax
  mov rax, 0xE000E7; mov [0x3038], rax; mov rax, cr3; mov cr3, rax
  xor eax, eax; mov cr2, rax
  mov rsp, 0x18000; mov rdi, 0x17e00; mov ecx, 0x40; rep stosq
  mov rax, [r12+8]; cmp rax, 1; je user; cmp rax, 2; je kernel32; cmp rax, 3; je user32
  push qword ptr [r12+80]; popfq; call load; jmp qword ptr [r12]
kernel32: push qword ptr [r12+80]; popfq; push 0x50; push qword ptr [r12]; call load; .byte 0x48, 0xcb
user: push 0x23; push 0x18000; push qword ptr [r12+80]; push 0x2b; push qword ptr [r12]; call load; iretq
user32: push 0x23; push 0x18000; push qword ptr [r12+80]; push 0x1b; push qword ptr [r12]; call load; iretq
load: mov rax, [r12+16]; mov rbx, [r12+24]; mov rcx, [r12+32]; mov rdx, [r12+40]; mov rdi, [r12+48]; ret
end: cli; hlt; jmp end
"""
HANDLER = """
  mov [r13+56], rax; mov [r13+64], rbx; mov [r13+72], rcx; mov [r13+80], rdx
  pop [r13]; pop [r13+8]; pop [r13+16]; pop [r13+24]; pop [r13+32]; pop [r13+40]; pop [r13+48]
  xor eax, eax; mov ax, ds; mov [r13+88], rax; mov ax, es; mov [r13+96], rax
  mov ax, fs; mov [r13+104], rax; mov ax, gs; mov [r13+112], rax
  mov rax, cr2; mov [r13+120], rax
  sldt eax; mov [r13+128], rax; str eax; mov [r13+136], rax
  mov rax, cr0; mov [r13+144], rax; mov rax, cr4; mov [r13+152], rax
  mov ecx, 0xc0000100; rdmsr; shl rdx, 32; or rax, rdx; mov [r13+160], rax
  mov ecx, 0xc0000101; rdmsr; shl rdx, 32; or rax, rdx; mov [r13+168], rax
  mov ecx, 0xc0000080; rdmsr; mov [r13+176], rax
  mov rsi, 0x6000; mov ecx, 0x200; xor eax, eax
tables: rol rax, 7; add rax, [rsi]; add rsi, 8; dec ecx; jnz tables
  mov [r13+184], rax
  mov rsi, 0x17e00; mov ecx, 0x40; xor eax, eax
stack: rol rax, 7; add rax, [rsi]; add rsi, 8; dec ecx; jnz stack
  mov [r13+192], rax
  mov rax, [0xF000]; mov [r13+200], rax; mov rax, [0xF008]; mov [r13+208], rax; mov rax, [0x3038]; mov [r13+216], rax
  add r13, 256; add r12, 128; dec r14; mov eax, 0x8000; jmp rax
"""
HAVE_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17})
FIXED = (
    0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF,
    0x0000890040000200, 0, 0x000082006800007F, 0, 0x00CF9B000000FFFF, 0x008F9B000000FFFF,
)  # fmt: skip
"""GDT: 08 64-bit code, 10 data, 18 user code, 20 user data, 28 user 64-bit code, 30 TSS, 40 LDT, 50, 58 32, 16-bit."""


@dataclass(frozen=True)
class Case:
    """``code`` under a privilege; ``gate`` is the IDT entry 90h, ``registers`` RAX RBX RCX RDX RDI."""

    family: str
    code: bytes
    where: int = KERNEL
    registers: dict[str, int] = field(default_factory=dict)
    rflags: int = 2
    gate: tuple[int, int] | None = None


Record = dict[str, int]


def gate(offset: int, selector: int = 8, kind: int = 0x8E, ist: int = 1) -> tuple[int, int]:
    """The two quadwords of a 64-bit gate."""
    low = offset & 0xFFFF | selector << 16 | ist << 32 | kind << 40 | (offset >> 16 & 0xFFFF) << 48
    return low, offset >> 32


def descriptor(rng: random.Random) -> int:
    """A random descriptor. Left out is where QEMU differs from the manual: code that is both L and D,
    16-bit system types in IA-32e mode, the upper half of an LDT's; and a free TSS, which LTR would use."""
    is_segment, kind = rng.random() < 0.8, rng.randrange(16)
    is_code = is_segment and kind & 8
    if not is_segment:
        kind = rng.choice((0, 8, 10, 11, 13))
    long, big = rng.random() < 0.3, rng.random() < 0.5
    if is_code and long:
        big = False
    base = 0 if is_code else rng.choice((0, 0, 0x1000, rng.randrange(1 << 24)))
    limit = 0xFFFFF if is_code else rng.choice((0xFFFFF, 0xFFFF, 0xFFF, rng.randrange(1 << 20)))
    high = kind << 8 | is_segment << 12 | rng.choice((0, 0, 1, 2, 3, 3)) << 13 | (rng.random() < 0.85) << 15
    high |= limit & 0xF0000 | long << 21 | big << 22 | (bool(is_code) or rng.random() < 0.6) << 23 | base >> 16 & 0xFF
    return limit & 0xFFFF | (base & 0xFFFF) << 16 | high << 32


def assemble(source: str, address: int) -> bytes:
    import keystone

    assembler = keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_64)
    text = source.replace("pop [", "pop qword ptr [").replace(": ", ":\n").replace(";", "\n")
    return bytes(assembler.asm(text, address)[0])


def build(seed: int, cases: Sequence[Case]) -> Machine:
    """A machine about to run the driver."""
    rng = random.Random(seed)
    machine = make_machine(MachineConfig(machine="none", memory=16 * MIB))

    def put(address: int, *quadwords: int) -> None:
        machine.ram.write(address, struct.pack(f"<{len(quadwords)}Q", *quadwords))

    put(0x1000, 0x2027)
    put(0x2000, 0x3027)
    put(0x3000, *(i << 21 | 0xE7 for i in range(8)))
    tss = bytearray(rng.choice((0, 0, 0xFF, rng.randrange(256))) for _ in range(0x201))
    tss[:0x68] = bytes(0x68)
    struct.pack_into("<Q", tss, 4, 0x1E000)
    struct.pack_into("<Q", tss, 0x24, 0x1C000)
    struct.pack_into("<H", tss, 0x66, 0x68)
    machine.ram.write(0x4000, bytes(tss))
    machine.ram.write(0x8000, assemble(DRIVER, 0x8000))
    machine.ram.write(0x9C00, assemble(HANDLER, 0x9C00))
    for vector in (*range(32), DONE, 0x90):
        at = 0x9000 + 16 * (vector if vector < 32 else 32 + (vector & 1))
        stub = (b"" if vector in HAVE_ERROR_CODE else b"\x6a\x00") + b"\x68" + struct.pack("<I", vector)
        machine.ram.write(at, stub + b"\xe9" + struct.pack("<i", 0x9C00 - (at + len(stub) + 5)))
        put(0x5000 + 16 * vector, *gate(at, kind=0xEE if vector == DONE else 0x8E))
    for address, size in ((TARGET, 0x1000), (LARGE, 0x4000)):
        machine.ram.write(address, b"\xcc" * size)  # INT3
    for address in (TARGET, TARGET + 0xFF0, 0x9F00):
        machine.ram.write(address, b"\xcd\x81" * 4)
    tables = [*FIXED, *(descriptor(rng) for _ in range(256 - len(FIXED) + 16))]
    put(0x6000, *tables)
    put(0x7000, *tables)
    machine.ram.write(0xB000, struct.pack("<HQ", 0x7FF, 0x6000))
    default = gate(0x9000 + 16 * 32)
    for i, case in enumerate(cases):
        at = CODE + CODE_SIZE * i
        assert len(case.code) <= CODE_SIZE - 2
        machine.ram.write(at, case.code + b"\xcd\x81")
        registers = [case.registers.get(name, 0) for name in ("rax", "rbx", "rcx", "rdx", "rdi")]
        put(CASES + CASE_SIZE * i, at, case.where, *registers, 0, *(case.gate or default), case.rflags)

    cpu = machine.cpu
    cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer = 0x80010033, 0x1000, 0x620, 0xD01
    for segment in (ES, CS, SS, DS, FS, GS):
        cpu.seg_selector[segment], cpu.seg_flags[segment] = (8, 0xA09B00) if segment == CS else (0x10, 0xC09300)
        cpu.seg_base[segment], cpu.seg_limit[segment] = 0, 0xFFFFFFFF
    cpu.gdt_base, cpu.gdt_limit, cpu.idt_base, cpu.idt_limit = 0x6000, 0x7FF, 0x5000, 0xFFF
    cpu.star, cpu.lstar, cpu.cstar, cpu.fmask = 0x1B << 48 | 8 << 32, 0x9F00, 0x9F00, 0x700
    cpu.rip, cpu.regs[RSP] = 0x8000, 0x18000
    cpu.regs[R12], cpu.regs[R13], cpu.regs[R14] = CASES, LOG, len(cases)
    machine.engine.load_state()
    return machine


def records(log: bytes) -> list[Record]:
    size = 8 * len(FIELDS)
    return [
        dict(zip(FIELDS, struct.unpack(f"<{len(FIELDS)}Q", log[at : at + size]), strict=True))
        for at in range(0, len(log), RECORD_SIZE)
    ]


def run_here(seed: int, cases: Sequence[Case]) -> list[Record]:
    machine = build(seed, cases)
    assert machine.run(20_000 * len(cases)) == "halted"
    assert machine.cpu.regs[R14] == 0
    return records(machine.ram.read(LOG, RECORD_SIZE * len(cases)))


def run_in_qemu(seed: int, cases: Sequence[Case], directory: Path) -> list[Record]:
    stream = directory / f"{seed}.mig"
    stream.write_bytes(save_snapshot(build(seed, cases), profile="qemu-7.2-tcg"))
    arguments = (*NONE, "-m", "16", "-no-reboot", "-no-shutdown", "-incoming", f"exec:cat {stream}")
    with Qemu(directory, *arguments, name=f"q{seed}") as qemu:
        deadline = time.monotonic() + 30
        while "HLT=1" not in (registers := qemu.human("info registers")):
            status = qemu.command("query-status")["status"]
            assert status in ("running", "inmigrate") and time.monotonic() < deadline, f"{status}: {registers}"
            time.sleep(0.02)
        return records(qemu.memory(LOG, RECORD_SIZE * len(cases)))
