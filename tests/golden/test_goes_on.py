"""The captured streams of ``-M none`` load here, and the guest goes on at the next instruction.

Their guest sets RBX, R15 and XMM3 to constants, then counts in RAX and at 100000:

    80d1  movq xmm3, r15        80db  xor eax, eax        80e0  mov [rdi], rax
    80d6  mov edi, 100000h      80dd  inc rax             80e3  jmp 80dd
"""

from __future__ import annotations

import pytest

from pyvcpu.cpu.layout import R15, RAX, RBX, RDI
from pyvcpu.machine import MIB, Machine, MachineConfig, make_machine
from pyvcpu.migration.snapshot import load_snapshot, save_snapshot
from tests import streams

COUNT = 0x100000
LOOP = 0x80DD
TURNS = 50_000
R15_CONSTANT = 0xDEADBEEFCAFEF00D


def load(data: bytes) -> Machine:
    machine = make_machine(MachineConfig(machine="none", memory=16 * MIB))
    load_snapshot(machine, data)
    return machine


def check_counts(machine: Machine, before: int) -> None:
    """From the head of the loop: three instructions a turn, and nothing else changes."""
    assert machine.cpu.rip == LOOP
    assert machine.cpu.regs[RAX] == before
    assert machine.run(3 * TURNS) == "limit"
    assert machine.cpu.rip == LOOP
    assert machine.cpu.regs[RAX] == before + TURNS
    assert int.from_bytes(machine.ram.read(COUNT, 8), "little") == before + TURNS
    assert machine.cpu.regs[RBX] == 0x1122334455667788
    assert machine.cpu.regs[R15] == R15_CONSTANT
    assert machine.cpu.regs[RDI] == COUNT
    assert machine.cpu.xmm[6] == R15_CONSTANT


def test_from_tcg() -> None:
    machine = load(streams.stream("none-7.2-counter-tcg"))
    assert machine.status == "running"
    before = int.from_bytes(machine.ram.read(COUNT, 8), "little")
    assert before > 100_000_000
    check_counts(machine, before)


def test_from_kvm() -> None:
    """A KVM that cannot emulate SSE had stopped at 80d1; what it could not do is done here."""
    machine = load(streams.stream("none-7.2-counter-kvm"))
    assert machine.status == "internal-error"
    assert machine.cpu.rip == 0x80D1
    assert machine.run(3) == "limit"
    check_counts(machine, 0)


@pytest.mark.parametrize("profile", ["pyvcpu", "qemu-7.2-tcg"])
def test_from_tcg_and_on_again(profile: str) -> None:
    """What QEMU wrote is loaded, run, saved and loaded once more."""
    first = load(streams.stream("none-7.2-counter-tcg"))
    first.run(3 * TURNS)
    second = load(save_snapshot(first, profile=profile))
    assert second.ram.read(0, 16 * MIB) == first.ram.read(0, 16 * MIB)
    check_counts(second, int.from_bytes(first.ram.read(COUNT, 8), "little"))
