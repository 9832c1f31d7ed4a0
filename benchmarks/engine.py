"""The interpreter beside unicorn and beside this processor itself, on the same loops."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.timing import in_turn, median, rate_of, ratio
from pyvcpu.cpu.layout import CS, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from pyvcpu.machine import MIB, Machine, MachineConfig, make_machine

CODE, AREA, AREA_SIZE = 0x8000, 4 * MIB, 4 * MIB
NUMBERS = {RAX: "rax", RCX: "rcx", RDX: "rdx", RBX: "rbx", RSP: "rsp", RSI: "rsi", RDI: "rdi"}


class Loop(NamedTuple):
    """``code`` falls through when RCX has come down to 0; ``insns`` a turn; RDI and RSI point into the area."""

    name: str
    code: bytes
    insns: int
    turns: int
    bytes_a_run: int = 0


LOOPS = (
    # add rax,rbx; xor rdx,rax; lea rdx,[rdx+rax*2+1]; shr rax,3; dec rcx; jnz
    Loop("integer", bytes.fromhex("4801d8 4831c2 488d544201 48c1e803 48ffc9 75ec".replace(" ", "")), 6, 400_000),
    # mov [rdi],rcx; add rdi,8; and rdi,~(1<<20)... ; dec rcx; jnz
    Loop("store", bytes.fromhex("48890f 4883c708 4881e7ffff5f00 48ffc9 75ed".replace(" ", "")), 5, 400_000),
    # add rax,[rdi]; add rdi,8; and rdi; dec rcx; jnz
    Loop("load", bytes.fromhex("480307 4883c708 4881e7ffff5f00 48ffc9 75ed".replace(" ", "")), 5, 400_000),
    # call +2 (over the jmp); jmp over the function; inc rax; ret; dec rcx; jnz
    Loop("call", bytes.fromhex("e802000000 eb04 48ffc0 c3 48ffc9 75f0".replace(" ", "")), 6, 60_000),
    Loop("rep movsb", bytes.fromhex("f3a4"), 0, MIB, MIB),
    Loop("rep stosq", bytes.fromhex("f348ab"), 0, MIB // 8, MIB),
)
REPEATS = 20  # of a REP loop, so that one run is long enough to time


def long_mode_machine() -> Machine:
    """A machine in 64-bit mode with the first GiB mapped one to one by 2 MiB pages, accessed and dirty."""
    machine = make_machine(MachineConfig(machine="none", memory=16 * MIB))
    cpu = machine.cpu
    machine.bus.write(0x1000, 8, 0x2023)
    machine.bus.write(0x2000, 8, 0x3023)
    for i in range(8):
        machine.bus.write(0x3000 + 8 * i, 8, i << 21 | 0xE3)
    cpu.cr3, cpu.cr4, cpu.efer, cpu.cr0 = 0x1000, 0x20, 0x500, 0x80000011
    cpu.seg_flags[CS], cpu.seg_base[CS], cpu.seg_selector[CS] = 0xAF9B00, 0, 8
    machine.engine.load_state()
    return machine


def start_registers(loop: Loop) -> dict[int, int]:
    return {RAX: 5, RBX: 7, RCX: loop.turns, RDX: 1, RSI: AREA + 2 * MIB, RDI: AREA, RSP: AREA - 0x1000}


def ours(loop: Loop) -> Callable[[], float]:
    machine = long_mode_machine()
    machine.ram.write(CODE, loop.code)

    def run() -> float:
        def work() -> float:
            for _ in range(REPEATS if loop.bytes_a_run else 1):
                for number, value in start_registers(loop).items():
                    machine.cpu.regs[number] = value
                machine.cpu.rip = CODE
                machine.run(loop.turns * max(loop.insns, 1))
            return loop.bytes_a_run * REPEATS or loop.turns * loop.insns

        return rate_of(work)

    return run


def unicorn(loop: Loop) -> Callable[[], float]:
    from unicorn import UC_ARCH_X86, UC_MODE_64, Uc, x86_const

    uc = Uc(UC_ARCH_X86, UC_MODE_64)
    uc.mem_map(0, 16 * MIB)
    uc.mem_write(CODE, loop.code)
    ids = {number: getattr(x86_const, f"UC_X86_REG_{name.upper()}") for number, name in NUMBERS.items()}

    def run() -> float:
        def work() -> float:
            for _ in range(REPEATS if loop.bytes_a_run else 1):
                for number, value in start_registers(loop).items():
                    uc.reg_write(ids[number], value)
                uc.emu_start(CODE, CODE + len(loop.code))
            return loop.bytes_a_run * REPEATS or loop.turns * loop.insns

        return rate_of(work)

    return run


def native(loop: Loop) -> Callable[[], float]:
    """This processor: the loop as a function, with its area at a host address."""
    area = mmap.mmap(-1, 8 * MIB)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    aligned = -(-base // (4 * MIB)) * 4 * MIB
    loads = {RAX: 5, RBX: 7, RCX: loop.turns, RDX: 1, RSI: aligned + 2 * MIB, RDI: aligned}
    prologue = b"\x53" + b"".join(bytes((0x48, 0xB8 + n)) + v.to_bytes(8, "little") for n, v in loads.items())
    # The area of the guest lies below 8 MiB: its wrapping mask becomes one that keeps the upper half.
    code = loop.code.replace(bytes.fromhex("4881e7ffff5f00"), bytes.fromhex("4881e7ffffdfff"))
    text = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    text.write(prologue + code + b"\x5b\xc3")
    function = ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(text)))
    times = 50 if loop.bytes_a_run else 100
    keep = (text, area)  # the mappings live as long as the function

    def run() -> float:
        assert keep

        def work() -> float:
            for _ in range(times):
                function()
            return times * (loop.bytes_a_run or loop.turns * loop.insns)

        return rate_of(work)

    return run


def main() -> None:
    """Print the table."""
    print("engine: millions of guest instructions a second (REP: GB/s); ratios are of runs in turn, [min .. max]")
    print(f"{'loop':10} {'interp':>9} {'unicorn':>9} {'native':>9}   interp/unicorn            interp/native")
    for loop in LOOPS:
        results = in_turn({"interp": ours(loop), "unicorn": unicorn(loop), "native": native(loop)})
        unit = 1e9 if loop.bytes_a_run else 1e6
        figures = " ".join(f"{median(rates) / unit:9.2f}" for rates in results.values())
        print(
            f"{loop.name:10} {figures}   {ratio(results['interp'], results['unicorn']):25} "
            f"{ratio(results['interp'], results['native'])}"
        )
