"""The captured ``none`` streams of real QEMU, under TCG and KVM: they load, and their guests go on."""

from __future__ import annotations

import pytest

from pyvcpu.cpu.layout import R15, RAX, RBX
from pyvcpu.machine import MIB, MachineConfig, make_machine
from pyvcpu.migration.snapshot import load_snapshot
from tests.streams import stream

COUNT = 0x100000
"""Where the captured counter guest keeps RAX."""


@pytest.mark.parametrize(
    ("name", "runstate"),
    # That KVM could not emulate MOVQ in ring 0 and stopped there; the state is that of the instruction's start.
    [("none-7.2-counter-tcg", "running"), ("none-7.2-counter-kvm", "internal-error")],
)
def test_the_counter_goes_on(name: str, runstate: str) -> None:
    machine = make_machine(MachineConfig(machine="none", memory=16 * MIB))
    load_snapshot(machine, stream(name))
    assert machine.status == runstate
    machine.run(1000)  # the KVM stream was taken before the loop
    before = machine.cpu.regs[RAX]
    assert machine.run(300_000) == "limit"
    # inc rax; mov [rdi], rax; jmp
    assert machine.cpu.regs[RAX] == before + 100_000
    assert int.from_bytes(machine.ram.read(COUNT, 8), "little") in (before + 100_000, before + 99_999)
    # What the guest put into registers before it began to count: lost state would show.
    assert machine.cpu.regs[RBX] == 0x1122334455667788
    assert machine.cpu.regs[R15] == 0xDEADBEEFCAFEF00D
    assert machine.cpu.xmm[6] == 0xDEADBEEFCAFEF00D  # XMM3
