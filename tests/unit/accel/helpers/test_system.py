"""Control, debug and descriptor-table registers, fast system calls, HLT, STI, I/O permission, time, MSRs."""

from __future__ import annotations

import pytest

from pyvcpu.accel.tcg import flags
from pyvcpu.cpu.events import GP, UD
from pyvcpu.cpu.layout import CS, GS, MP_HALTED, R8, R11, RAX, RBX, RCX, RDX, RSP, SS
from pyvcpu.errors import UnsupportedInstruction
from tests.unit.accel.helpers.box import CODE, KERNEL_CS, TSS, Box
from tests.unit.accel.helpers.test_segment import outcome, with_handlers

PRIVILEGED = {
    "lgdt": "0f0113", "lidt": "0f011b", "lmsw": "0f01f0", "clts": "0f06", "mov cr0": "0f22c0", "mov from cr3": "0f20d8",
    "mov dr7": "0f23f8", "mov from dr0": "0f21c0", "invlpg": "0f013b", "invd": "0f08", "wbinvd": "0f09", "hlt": "f4",
    "cli": "fa", "sti": "fb", "rdmsr": "0f32", "wrmsr": "0f30", "swapgs": "0f01f8", "lldt": "0f00d0", "in": "ec",
    "out": "ef", "sysretq": "480f07",
}  # fmt: skip


@pytest.mark.parametrize("name", PRIVILEGED)
def test_privileged_instructions(name: str) -> None:
    box = with_handlers(Box().long_mode(user=True))
    control = [box.state.cr0, box.state.cr3, box.state.cr4, box.state.efer, box.state.gdt_base, box.state.idt_base]
    assert outcome(box, PRIVILEGED[name]) == (GP, 0)
    assert box.clock.instructions == 1  # the handler's NOP
    state = box.state
    assert [state.cr0, state.cr3, state.cr4, state.efer, state.gdt_base, state.idt_base] == control
    assert box.frame(2)[1] == CODE


@pytest.mark.parametrize(
    "code", ["0f0b", "0fb9c0", "0fffc0", "0f01c8", "0f01c9", "0f01d0", "0fc7f0", "f30faec0", "0f34"]
)
def test_undefined(code: str) -> None:
    box = with_handlers(Box().long_mode())
    assert outcome(box, code) == (UD, 0)
    assert box.frame(1) == [CODE]


CONTROL = [
    ("0f22c0", 0x80010033, None, 0x80010033),  # CR0
    ("0f22c0", 0x8001003B, None, 0x8001003B),
    ("0f22c0", 0x80010023, None, 0x80010033),  # ET is fixed
    ("0f22c0", 0x80000032, (GP, 0), None),  # PG without PE
    ("0f22c0", 0xA0000033, (GP, 0), None),  # NW without CD
    ("0f22c0", 0x10033, (GP, 0), None),  # PG off in 64-bit code
    ("0f22c0", 0x180010033, (GP, 0), None),
    ("0f22d0", 0x123456789A, None, 0x123456789A),  # CR2
    ("0f22d8", 0x10000, None, 0x10000),  # CR3
    ("0f22d8", 1 << 41, (GP, 0), None),
    ("0f22e0", 0x6F0, None, 0x6F0),  # CR4
    ("0f22e0", 0x600, (GP, 0), None),  # PAE off in long mode
    ("0f22e0", 0x20620, (GP, 0), None),  # PCIDE is not there
    ("0f22c8", 0, (UD, 0), None),  # CR1
]


@pytest.mark.parametrize(("code", "value", "expected", "stored"), CONTROL)
def test_control_registers(code: str, value: int, expected: tuple[int, int] | None, stored: int | None) -> None:
    box = with_handlers(Box().long_mode())
    box.state.regs[RAX] = value
    before = [box.state.cr0, box.state.cr2, box.state.cr3, box.state.cr4]
    assert outcome(box, code) == expected
    if expected is not None:
        assert [box.state.cr0, box.state.cr2, box.state.cr3, box.state.cr4] == before
        return
    box.run(code.replace("0f22", "0f20"), 1)
    assert box.reg(RAX) == stored


def test_smsw_lmsw_clts() -> None:
    box = Box().long_mode()
    box.state.regs[RAX] = (1 << 64) - 1
    box.run("0f01e0", 1)
    assert box.reg(RAX) == 0x80010033
    box.state.regs[RAX] = (1 << 64) - 1
    box.run("660f01e0", 1)
    assert box.reg(RAX) == 0xFFFFFFFFFFFF0033
    box.state.regs[RAX] = 0x18
    box.run("0f01f0", 1)
    assert box.state.cr0 == 0x80010039  # PE stays, ET too; MP goes, TS comes
    box.run("0f06", 1)
    assert box.state.cr0 == 0x80010031


def test_a_new_cr3_is_used_at_once() -> None:
    box = Box().long_mode()
    box.put(0x20000, box.ram.read(0x10000, 0x4000))
    for level in range(2):
        box.put_int(0x20000 + 0x1000 * level, 8, 0x21007 + 0x1000 * level)
    box.put_int(0x22000, 8, 0x23007)
    box.put_int(0x23000 + 8 * 0x30, 8, 0x31007)
    box.put_int(0x30000, 8, 1)
    box.put_int(0x31000, 8, 2)
    box.state.regs[RBX], box.state.regs[RAX] = 0x30000, 0x20000
    box.run("488b0b0f22d8488b13", 3)
    assert (box.reg(RCX), box.reg(RDX)) == (1, 2)


def test_descriptor_table_registers() -> None:
    box = Box().long_mode()
    box.put(0x8000, "ff01" + (0xFFFF800012345678).to_bytes(8, "little").hex())
    box.state.regs[RBX] = 0x8000
    box.run("0f0113", 1)
    assert (box.state.gdt_base, box.state.gdt_limit) == (0xFFFF800012345678, 0x1FF)
    box.state.regs[RBX] = 0x8100
    box.run("0f0103", 1)
    assert box.ram.read(0x8100, 10) == box.ram.read(0x8000, 10)
    box = with_handlers(Box().long_mode())
    box.put(0x8000, "ff01" + (1 << 60).to_bytes(8, "little").hex())
    box.state.regs[RBX] = 0x8000
    assert outcome(box, "0f011b") == (GP, 0)
    box = Box()
    box.put(0x8000, "ff0178563412")
    box.run("0f01160080", 1)
    assert (box.state.gdt_base, box.state.gdt_limit) == (0x345678, 0x1FF)  # 24 bits by a 16-bit operand
    box.run("660f01160080", 1)
    assert box.state.gdt_base == 0x12345678


def test_debug_registers() -> None:
    box = with_handlers(Box().long_mode())
    box.state.regs[RAX] = 0x1234567890
    box.run("0f23c0", 1)
    box.state.regs[RAX] = 0xF00F
    box.run("0f23f0", 1)
    assert (box.state.dr[0], box.state.dr[6]) == (0x1234567890, 0xFFFFEFFF)
    box.run("0f21e3", 1)  # DR4 is DR6 unless CR4.DE
    assert box.reg(RBX) == 0xFFFFEFFF
    box.state.cr4 |= 8
    assert outcome(box, "0f21e3") == (UD, 0)
    box.state.regs[RAX] = 1 << 32
    assert outcome(box, "0f23f8") == (GP, 0)
    box.state.regs[RAX] = 0xFFFFDF00
    box.run("0f23f8", 1)
    assert box.state.dr[7] == 0xFFFF0700  # 10 is fixed at 1, 11, 12, 14 and 15 at 0
    box.state.regs[RAX] = 1
    with pytest.raises(UnsupportedInstruction, match="breakpoints"):
        box.run("0f23f8", 1)


def test_syscall_and_sysret() -> None:
    box = Box().long_mode(user=True)
    state = box.state
    state.star, state.lstar, state.cstar = (0x18 | 3) << 48 | KERNEL_CS << 32, 0x8000, 0x8800
    state.fmask = flags.IF | flags.DF
    box.engine.set_rflags(flags.IF | flags.DF | flags.CF)
    box.put(0x8000, "480f07")
    box.run("0f0590", 1)
    assert (state.rip, box.engine.cpl, box.reg(RCX)) == (0x8000, 0, CODE + 2)
    assert (state.seg_selector[CS], state.seg_selector[SS]) == (KERNEL_CS, KERNEL_CS + 8)
    assert (box.reg(R11), state.rflags) == (flags.IF | flags.DF | flags.CF | 2, flags.CF | 2)
    box.engine.run(3)
    box.engine.save_state()
    assert (state.rip, box.engine.cpl, box.engine.mode.bits) == (CODE + 3, 3, 64)
    assert (state.seg_selector[CS], state.seg_selector[SS]) == (0x2B, 0x23)
    assert state.rflags == flags.IF | flags.DF | flags.CF | 2


def test_sysret_to_32_bit_code() -> None:
    box = Box().long_mode()
    box.state.star = 0x1B << 48
    box.state.regs[RCX], box.state.regs[R11] = 0x100008000, 0x3FFFFF
    box.run("0f07", 1)
    assert (box.state.rip, box.engine.mode.bits, box.engine.cpl) == (0x8000, 32, 3)
    assert box.state.rflags == 0x3C7FD7


def test_syscall_needs_efer_sce() -> None:
    box = with_handlers(Box().long_mode())
    box.state.efer &= ~1
    assert outcome(box, "0f05") == (UD, 0)
    assert outcome(box, "480f07") == (UD, 0)


def test_sysenter_and_sysexit_in_legacy_mode() -> None:
    box = Box().protected(user=True)
    box.state.sysenter_cs, box.state.sysenter_esp, box.state.sysenter_eip = 8, 0x5000, 0x8000
    box.engine.set_rflags(flags.IF)
    box.put(0x8000, "0f35")
    box.state.regs[RCX], box.state.regs[RDX] = 0x7000, 0x8100
    box.run("0f34", 1)
    assert (box.state.rip, box.reg(RSP), box.engine.cpl, box.state.rflags) == (0x8000, 0x5000, 0, 2)
    assert (box.state.seg_selector[CS], box.state.seg_selector[SS]) == (8, 0x10)
    box.engine.run(2)
    assert (box.state.rip, box.reg(RSP), box.engine.cpl) == (0x8100, 0x7000, 3)
    assert (box.state.seg_selector[CS], box.state.seg_selector[SS]) == (0x1B, 0x23)


def test_swapgs() -> None:
    box = Box().long_mode()
    box.state.seg_base[GS], box.state.kernelgsbase = 0x111000, 0xFFFF888000000000
    box.run("0f01f8", 1)
    assert (box.state.seg_base[GS], box.state.kernelgsbase) == (0xFFFF888000000000, 0x111000)


def test_hlt_ends_with_an_interrupt_after_sti() -> None:
    """STI; HLT with an NMI pending: HLT is reached, the handler returns behind it."""
    box = Box().long_mode()
    box.gate64(2, 0x9000)
    box.put(0x9000, "48cf")
    box.put(CODE, "fbf490")
    box.state.rip = CODE
    box.engine.run(1)
    assert (box.state.rip, box.state.interrupt_shadow) == (CODE + 1, 1)
    box.state.nmi_pending = 1
    box.engine.run(4)
    assert box.state.rip == CODE + 3
    box.run("f4", 1)
    assert box.state.mp_state == MP_HALTED
    assert box.engine.run(100) == "halted"


def test_sti_has_no_shadow_when_interrupts_were_on() -> None:
    box = Box().long_mode()
    box.engine.set_rflags(flags.IF)
    box.run("fb", 1)
    assert box.state.interrupt_shadow == 0
    box.run("fafb", 2)
    assert box.state.interrupt_shadow == 1


# -- ports ------------------------------------------------------------------------------------


class Port:
    def __init__(self) -> None:
        self.log: list[tuple[int, ...]] = []

    def read(self, offset: int, size: int) -> int:
        return 0x44332211

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append((offset, size, value))


def test_in_and_out() -> None:
    box = Box().long_mode()
    port = Port()
    box.bus.map_io(0x80, 8, port, "port")
    box.state.regs[RAX], box.state.regs[RDX] = 0x8877665544332288, 0x81
    for code, value in (("e480", 0x8877665544332211), ("66ed", 0x8877665544332211), ("ed", 0x44332211)):
        box.run(code, 1)
        assert box.reg(RAX) == value
    for code, expected in (("e682", (2, 1, 0x11)), ("66ef", (1, 2, 0x2211)), ("ef", (1, 4, 0x44332211))):
        box.run(code, 1)
        assert port.log.pop() == expected
    box.state.regs[RDX] = 0x4000
    box.run("ec", 1)
    assert box.reg(RAX) & 0xFF == 0xFF


@pytest.mark.parametrize(
    ("iopl", "limit", "bitmap", "allowed"),
    [
        (3, 0x67, {}, True),
        (0, 0x67, {}, False),
        (0, 0x80, {}, True),
        (0, 0x80, {0x10: 1 << 3}, False),  # port 0x83 itself
        (0, 0x80, {0x10: 1 << 4}, False),  # the second port of the word
        (0, 0x80, {0x10: 1 << 2 | 1 << 5}, True),
        (0, 0x68 + 0x11, {}, True),
        (0, 0x68 + 0x10, {}, False),  # the byte after the ports' is read too
    ],
)
def test_who_may_use_a_port(iopl: int, limit: int, bitmap: dict[int, int], allowed: bool) -> None:
    box = with_handlers(Box().long_mode(user=True))
    box.put_int(TSS + 0x66, 2, 0x68)
    for at, value in bitmap.items():
        box.put_int(TSS + 0x68 + at, 1, value)
    box.state.seg_limit[7] = limit
    box.engine.set_rflags(iopl << 12)
    box.state.regs[RDX] = 0x83
    assert outcome(box, "66ef") == (None if allowed else (GP, 0))


# -- time and MSRs ----------------------------------------------------------------------------


def test_rdtsc_counts_what_came_before() -> None:
    box = Box().long_mode()
    box.state.tsc_offset = 5 << 32
    box.state.tsc_aux = 7
    box.run("90900f31", 3)
    assert (box.reg(RAX), box.reg(RDX)) == (2, 5)
    box.run("0f01f9", 1)
    assert (box.reg(RAX), box.reg(RDX), box.reg(RCX)) == (3, 5, 7)


def test_rdtsc_and_cr4_tsd() -> None:
    box = with_handlers(Box().long_mode(user=True))
    box.state.cr4 |= 4
    assert outcome(box, "0f31") == (GP, 0)
    box = with_handlers(Box().long_mode())
    assert outcome(box, "0f33") == (GP, 0)


def test_wrmsr_takes_halves_of_registers() -> None:
    box = Box().long_mode()
    high = 0xAAAAAAAA << 32
    box.state.regs[RCX], box.state.regs[RAX], box.state.regs[RDX] = (
        high | 0xC0000082,
        high | 0x80001234,
        high | 0xFFFF8000,
    )
    box.run("0f30", 1)
    assert box.state.lstar == 0xFFFF800080001234
    box.run("0f32", 1)
    assert (box.reg(RAX), box.reg(RDX)) == (0x80001234, 0xFFFF8000)


def test_a_gs_base_from_wrmsr_counts_at_once() -> None:
    box = Box().long_mode()
    box.put_int(0x30008, 8, 0x1122)
    box.state.regs[RCX], box.state.regs[RDX], box.state.regs[RAX] = 0xC0000101, 0, 0x30000
    box.run("0f30654c8b042508000000", 2)
    assert box.reg(R8) == 0x1122


def test_unknown_msr() -> None:
    box = with_handlers(Box().long_mode())
    box.state.regs[RCX] = 0x12345
    assert outcome(box, "0f32") == (GP, 0)
    assert outcome(box, "0f30") == (GP, 0)
