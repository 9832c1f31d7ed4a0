"""From the reset vector's mode into long mode and to ring 3 and back, as firmware and kernels do it."""

from __future__ import annotations

from pyvcpu.cpu.layout import CS, LDTR, MP_HALTED, RAX, RBX, RCX, RDX, RSP, SS, TR
from tests.unit.accel.helpers.box import GDT, GDT_LIMIT, IDT, KERNEL_CS, TSS, TSS_SELECTOR, USER_CS, Box

REAL = """
    fa                            cli
    0f 01 16 00 08                lgdt [0x800]
    0f 01 1e 08 08                lidt [0x808]
    0f 20 c0                      mov eax, cr0
    66 83 c8 01                   or eax, 1
    0f 22 c0                      mov cr0, eax
    ea 00 11 40 00                jmp 0x40:0x1100
"""
PROTECTED = """
    66 b8 10 00                   mov ax, 0x10
    8e d8                         mov ds, ax
    8e d0                         mov ss, ax
    bc 00 60 00 00                mov esp, 0x6000
    0f 20 e0                      mov eax, cr4
    83 c8 20                      or eax, 0x20
    0f 22 e0                      mov cr4, eax
    b8 00 00 01 00                mov eax, 0x10000
    0f 22 d8                      mov cr3, eax
    b9 80 00 00 c0                mov ecx, 0xc0000080
    0f 32                         rdmsr
    0d 00 01 00 00                or eax, 0x100
    0f 30                         wrmsr
    0f 20 c0                      mov eax, cr0
    0d 00 00 00 80                or eax, 0x80000000
    0f 22 c0                      mov cr0, eax
    ea 00 12 00 00 08 00          jmp 8:0x1200
"""
LONG = """
    66 b8 30 00                   mov ax, 0x30
    0f 00 d8                      ltr ax
    6a 23                         push 0x23
    6a 00                         push 0
    9c                            pushfq
    6a 2b                         push 0x2b
    68 00 13 00 00                push 0x1300
    48 cf                         iretq
"""
USER = """
    b8 07 00 00 00                mov eax, 7
    cd 80                         int 0x80
    bb 09 00 00 00                mov ebx, 9
    f4                            hlt            (#GP in ring 3)
"""


def assemble(listing: str) -> bytes:
    return b"".join(bytes.fromhex(line.strip()[:29]) for line in listing.strip().splitlines())


def boot() -> Box:
    box = Box()
    ready = Box().long_mode()
    ready.gate64(0x80, 0x7000, kind=0xEE)
    ready.gate64(13, 0x7100)
    image = ready.ram.read(GDT, 0x20000 - GDT)
    box.put(GDT, image)
    box.put(0x800, GDT_LIMIT.to_bytes(2, "little") + GDT.to_bytes(4, "little"))
    box.put(0x808, (0xFFF).to_bytes(2, "little") + IDT.to_bytes(4, "little"))
    box.put_int(TSS + 4, 8, 0x5000)
    box.put(0x1000, assemble(REAL))
    box.put(0x1100, assemble(PROTECTED))
    box.put(0x1200, assemble(LONG))
    box.put(0x1300, assemble(USER))
    box.put(0x7000, "48 ff c0 48 cf")  # inc rax; iretq
    box.put(0x7100, "f4")
    return box


def test_the_whole_way() -> None:
    box = boot()
    names = []
    for _ in range(60):
        name = box.engine.mode_name
        if not names or names[-1] != name:
            names.append(name)
        if box.engine.run(box.clock.instructions + 1) == "halted":
            break
    state = box.state
    assert names == ["real", "protected16", "protected32", "compatibility32", "long64"]
    assert state.mp_state == MP_HALTED
    assert box.reg(RAX) == 8
    assert box.reg(RBX) == 9
    assert state.efer == 0x500
    assert box.reg(RSP) == 0x5000 - 48
    error, rip, cs, _, rsp, ss = box.frame(6)
    assert (error, rip, cs, rsp, ss) == (0, 0x130C, USER_CS | 3, 0, 0x23)
    assert state.seg_selector[CS] == KERNEL_CS
    assert state.seg_selector[SS] == 0
    assert state.seg_selector[TR] == TSS_SELECTOR
    assert state.seg_flags[TR] == 0x8B00
    assert box.get(GDT + TSS_SELECTOR + 5, 1) == 0x8B  # busy in the table, too
    assert state.seg_selector[LDTR] == 0
    # 7 + 17 + 8 + 3 (mov, int, mov) + 2 (handler) + 1 (hlt of the #GP handler)
    assert box.clock.instructions == 38


def test_any_slicing_gives_the_same_state() -> None:
    whole, sliced = boot(), boot()
    whole.engine.run(1000)
    whole.engine.save_state()
    while sliced.engine.run(sliced.clock.instructions + 3) != "halted":
        sliced.engine.save_state()
        sliced.engine.load_state()
    sliced.engine.save_state()
    assert whole.state.architectural() == sliced.state.architectural()
    assert whole.ram.read(0, whole.ram.size) == sliced.ram.read(0, sliced.ram.size)
    assert whole.clock.instructions == sliced.clock.instructions


def test_paging_without_pae_is_refused() -> None:
    """LME and PG without CR4.PAE: #GP(0), and with no IDT a triple fault."""
    box = Box().protected()
    box.state.efer = 0x100
    box.gate32(13, 0x7000)
    box.put(0x7000, "90")
    box.state.regs[RAX] = 0x80000011
    box.run("0f22c0", 1)
    assert box.state.rip == 0x7001
    assert box.frame(2, 4) == [0, 0x1000]
    assert (box.state.cr0, box.state.efer) == (0x11, 0x100)


def test_cpuid_and_the_registers_that_it_leaves() -> None:
    box = Box().long_mode()
    box.state.regs[RAX], box.state.regs[RCX] = (1 << 63) | 0x80000008, (1 << 40)
    box.run("0fa2", 1)
    assert [box.reg(r) for r in (RAX, RBX, RCX, RDX)] == [0x3028, 0, 0, 0]
