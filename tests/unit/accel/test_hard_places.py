"""A guest saved where a processor is in the middle of something, restored elsewhere, ends as one that never moved.

Each case is a run of a few dozen instructions; it is cut at every one of them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pyvcpu.cpu.layout import CS, RAX, RCX, RDI, RSI, RSP, SS, TR
from pyvcpu.machine import MIB, Machine, MachineConfig, make_machine
from pyvcpu.migration.snapshot import load_snapshot, save_snapshot
from pyvcpu.migration.vmstate.description import SaveContext

CODE, GDT, IDT, TSS, STACK = 0x8000, 0x5000, 0x6000, 0x7000, 0xB000
HANDLERS = 0x9000  # of vector n: n * 0x20 further
APIC = 0xFEE00000
CONFIG = MachineConfig(machine="none", memory=2 * MIB)
NMI, DB, UD, TIMER, SELF = 2, 1, 6, 0x40, 0x50

# Every handler counts in its own word at 0xC000 + 8 * vector and returns; those of the APIC's vectors end them.
COUNT, IRET = "48ff0425", "48cf"  # inc qword [0xc000 + 8 * vector]


def le(value: int, size: int = 4) -> str:
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little").hex()


def apic_write(offset: int, value: int) -> str:
    """mov dword [abs APIC + offset], value by RBX, which every program has at the APIC."""
    return "c783" + le(offset) + le(value)


def prepared(code: str, **regs: int) -> Machine:
    """In long mode with a GDT, an IDT, a TSS and handlers; RBX points to the APIC, which is enabled."""
    machine = make_machine(CONFIG)
    put, cpu = machine.ram.write, machine.cpu
    for i, entry in enumerate((0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)):
        put(GDT + 8 * i, entry.to_bytes(8, "little"))
    for at, entry in ((0x1000, 0x2023), (0x2000, 0x3023), (0x3000, 0xE3), (0x2018, 0x4023)):
        put(at, entry.to_bytes(8, "little"))  # 2 MiB at 0, and below the 4 GiB the page of the APIC
    cpu.cr3, cpu.cr4, cpu.efer, cpu.cr0 = 0x1000, 0x20, 0x500, 0x80000011
    cpu.seg_flags[CS], cpu.seg_base[CS], cpu.seg_selector[CS] = 0xAF9B00, 0, 8
    machine.bus.write(0x4000 + 8 * (APIC >> 21 & 511), 8, APIC & ~0x1FFFFF | 0xF3)
    for vector in (DB, NMI, UD, TIMER, SELF):
        at = HANDLERS + 0x20 * (vector & 0x3F) + (0x1000 if vector == TIMER else 0)
        gate = at & 0xFFFF | 8 << 16 | 0x8E << 40 | (at >> 16) << 48
        put(IDT + 16 * vector, gate.to_bytes(8, "little"))
        end = apic_write(0xB0, 0) if vector in (TIMER, SELF) else ""
        put(at, bytes.fromhex(COUNT + le(0xC000 + 8 * vector) + end + IRET))
    cpu.gdt_base, cpu.gdt_limit, cpu.idt_base, cpu.idt_limit = GDT, 23, IDT, 0xFFF
    cpu.seg_base[TR], cpu.seg_limit[TR], cpu.seg_flags[TR] = TSS, 0x67, 0x8B00
    cpu.seg_selector[SS], cpu.seg_flags[SS], cpu.seg_limit[SS] = 16, 0xCF9300, 0xFFFFFFFF
    put(CODE, bytes.fromhex(code))
    cpu.rip, cpu.regs[RSP], cpu.regs[3] = CODE, STACK, APIC
    for name, value in regs.items():
        cpu.regs[{"rax": RAX, "rcx": RCX, "rsi": RSI, "rdi": RDI}[name]] = value
    machine.engine.load_state()
    assert machine.apic is not None
    machine.apic.write(0xF0, 4, 0x1FF)
    return machine


ENABLE_TIMER = apic_write(0x3E0, 0xB) + apic_write(0x320, TIMER) + apic_write(0x380, 6)
PERIODIC = apic_write(0x3E0, 0xB) + apic_write(0x320, TIMER | 1 << 17) + apic_write(0x380, 20)
SELF_IPI = apic_write(0x300, 1 << 18 | SELF)
SELF_NMI = apic_write(0x300, 1 << 18 | 4 << 8)
STOP = "ebfe"
SET_TF = "9c 810c2400010000 9d"  # pushfq; or dword [rsp], TF; popfq
CLEAR_TF = "9c 812424fffeffff 9d"
LOOP = "48ffc0 48ffc9 75f8"  # inc rax; dec rcx; jnz

# name: (code, registers, the words at 0xC000 that must not be 0 at the end, by vector)
CASES: dict[str, tuple[str, dict[str, int], tuple[int, ...]]] = {
    "rep movsb": ("f3a4" + STOP, {"rcx": 40, "rsi": 0x100FF0, "rdi": 0x102FF8}, ()),
    "rep stosq under a timer": ("fb" + PERIODIC + "f348ab" + STOP, {"rcx": 40, "rdi": 0x100FE4}, (TIMER,)),
    "repe cmpsb": ("f3a6" + STOP, {"rcx": 30, "rsi": 0x100000, "rdi": 0x102000}, ()),
    "std rep movsw": ("fd66f3a5" + STOP, {"rcx": 30, "rsi": 0x101010, "rdi": 0x10300F}, ()),
    "sti shadow": (SELF_IPI + "fb 48ffc0 48ffc0" + STOP, {}, (SELF,)),
    "sti; cli takes none": (SELF_IPI + "fb fa 48ffc0 fb 90" + STOP, {}, (SELF,)),
    "mov ss shadow": (SELF_IPI + "fb 8cd1 8ed1 48ffc0 48ffc0" + STOP, {}, (SELF,)),
    "nmi under mov ss": ("8cd1 " + SELF_NMI + "8ed1 48ffc0" + STOP, {}, (NMI,)),
    "trap flag": (SET_TF + "48ffc0 48ffc0 48ffc0" + CLEAR_TF + STOP, {}, (DB,)),
    "trap flag and mov ss": ("8cd1" + SET_TF + "48ffc0 8ed1 48ffc0 48ffc0" + CLEAR_TF + STOP, {}, (DB,)),
    "trap flag and rep": (SET_TF + "f3aa" + CLEAR_TF + STOP, {"rcx": 5, "rdi": 0x100FFD}, (DB,)),
    "trap flag and interrupt": ("fb" + SET_TF + SELF_IPI + "48ffc0" + CLEAR_TF + STOP, {}, (DB, SELF)),
    "halted with a timer": ("fb" + ENABLE_TIMER + "f4 48ffc0 f4", {}, (TIMER,)),
    "halted with a periodic timer": (PERIODIC + "fb f4 48ffc0 f4 48ffc0 ebf6", {}, (TIMER,)),
    "interrupts in service": (
        "fb" + PERIODIC + SELF_IPI + LOOP + STOP, {"rcx": 30}, (TIMER, SELF)),
    "masked by the task priority": (
        "fb" + apic_write(0x80, 0xF0) + SELF_IPI + "48ffc0" + apic_write(0x80, 0) + "48ffc0" + STOP, {}, (SELF,)),
    "undefined": ("0f0b" + STOP, {}, (UD,)),
    "self-modifying": (
        # mov byte [rip+0], 0x48 over the opcode that follows: cmc (f5) -> a prefix of inc eax
        "48ffc0 c605 00000000 48 f5 ffc0 90" + STOP, {}, ()),
    "rep stosb over itself": ("b090 f3aa 48ffc0 48ffc0" + STOP, {"rcx": 6, "rdi": CODE + 1}, ()),
}  # fmt: skip
LENGTH = 60
HANDLER_OF_TIMER = HANDLERS + 0x1000


def everything(machine: Machine) -> tuple[object, ...]:
    machine.engine.save_state()
    context = SaveContext(machine=machine.name, clock=machine.clock)
    devices = {entry.name: entry.description.save(entry.obj, context) for entry in machine.sections()}
    return (
        machine.instructions, machine.clock.now(), machine.cpu.architectural(), devices,
        machine.ram.read(0, machine.ram.size),
    )  # fmt: skip


def moved(machine: Machine) -> Machine:
    target = make_machine(CONFIG)
    load_snapshot(target, save_snapshot(machine))
    return target


def check_every_cut(make: Callable[[], Machine], words: tuple[int, ...], length: int = LENGTH) -> None:
    whole = make()
    whole.run(length)
    total = whole.instructions
    expected = everything(whole)
    for vector in words:
        assert whole.ram.read(0xC000 + 8 * vector, 8) != bytes(8), f"vector {vector:#x} was not taken"
    stepped = make()
    for done in range(total):
        assert stepped.instructions == done
        target = moved(stepped)
        assert everything(target) == everything(stepped), f"at {done}"
        target.run(length - done)
        assert everything(target) == expected, f"moved at {done}"
        target.close()
        stepped.run(1)
    stepped.run(length - total)
    assert everything(stepped) == expected
    stepped.close()
    whole.close()


@pytest.mark.parametrize("name", sorted(CASES))
def test_cut_at_every_instruction(name: str) -> None:
    code, regs, words = CASES[name]
    check_every_cut(lambda: prepared(code, **regs), words)


def test_cut_around_an_instruction_that_crosses_pages() -> None:
    def make() -> Machine:
        machine = prepared("e9" + le(0xDFFC - CODE - 5))  # jmp 0xdffc
        # mov rax, imm64 over 0xe000, then a store into its own immediate on the second page, and again
        machine.ram.write(0xDFFC, bytes.fromhex("48b8 8877665544332211 fe0d" + le(-10) + "ebee"))
        return machine

    check_every_cut(make, ())


@pytest.mark.parametrize("initial", [1, 2, 5, 17])
@pytest.mark.parametrize("divider", [0xB, 0x0])
def test_a_timer_interrupt_comes_right_after_the_instruction_that_it_is_due_at(initial: int, divider: int) -> None:
    def make() -> Machine:
        code = apic_write(0x3E0, divider) + apic_write(0x320, TIMER) + "fb" + apic_write(0x380, initial) + "90" * 50
        machine = prepared(code + STOP)
        machine.run(3)
        return machine

    whole = make()
    loaded_at = whole.instructions  # what the device saw when its register was written
    due = loaded_at + (initial + 1) * (1 if divider == 0xB else 2)
    whole.run(due - whole.instructions)
    count = (0xC000 + 8 * TIMER, 8)
    assert whole.clock.next_deadline() == due
    assert whole.cpu.rip != HANDLER_OF_TIMER  # the instruction before is done, the interrupt is not taken yet
    whole.run(1)  # the first of the handler, no other in between
    assert whole.ram.read(*count) == (1).to_bytes(8, "little")
    stepped = make()
    while stepped.instructions < whole.instructions:
        stepped.run(1)
    assert everything(stepped) == everything(whole)
