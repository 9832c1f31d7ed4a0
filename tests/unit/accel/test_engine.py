"""The engine: exact counts, exact faults, self-modifying code, the dirty log, exits."""

from __future__ import annotations

import threading

import pytest

from benchmarks.engine import long_mode_machine
from pyvcpu.cpu.layout import RAX, RBX, RCX, RDI, RSP
from pyvcpu.errors import UnsupportedInstruction
from pyvcpu.machine import Machine

CODE = 0x8000


def machine_with(code: str, at: int = CODE, **regs: int) -> Machine:
    """A machine in long mode about to run ``code`` (hex)."""
    machine = long_mode_machine()
    machine.ram.write(at, bytes.fromhex(code))
    machine.cpu.rip = at
    machine.cpu.regs[RSP] = 0xB000
    for name, value in regs.items():
        machine.cpu.regs[{"rax": RAX, "rbx": RBX, "rcx": RCX, "rdi": RDI}[name]] = value
    return machine


# add rax,rbx; xor rdx,rax; shr rax,3; dec rcx; jnz
LOOP = "4801d8 4831c2 48c1e803 48ffc9 75f1"


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 7, 99, 100])
def test_a_run_stops_exactly_there(count: int) -> None:
    whole = machine_with(LOOP, rax=5, rbx=7, rcx=1000)
    assert whole.run(count) == "limit"
    stepped = machine_with(LOOP, rax=5, rbx=7, rcx=1000)
    for _ in range(count):
        assert stepped.run(1) == "limit"
    for machine in (whole, stepped):
        assert machine.instructions == count
        machine.engine.save_state()
    assert whole.cpu.architectural() == stepped.cpu.architectural()


def test_self_modifying_code_takes_effect_at_the_next_instruction() -> None:
    # mov byte [rip+3], 0x90 ; nop ; inc ecx -> becomes: nop; ...
    # c6 05 01 00 00 00 c3: write C3 over the byte at 8008
    machine = machine_with("c60501000000ff 90 ffc1 eb fe".replace(" ", ""), rcx=1)
    machine.ram.write(CODE, bytes.fromhex("c60500000000 41".replace(" ", "")) + bytes.fromhex("ffc1 ebfe"))
    # The store turns "ff c1" (inc ecx) into "41 c1 eb fe": shr r11d, 0xfe.
    machine.run(2)
    assert machine.cpu.regs[RCX] == 1
    assert machine.cpu.rip == CODE + 7 + 4


def test_code_beside_data_is_not_translated_again() -> None:
    """A loop that stores to its own page runs; its region survives the stores."""
    # inc qword [rip+0x100]; dec rcx; jnz
    machine = machine_with("48ff0500010000 48ffc9 75f4 ebfe", rcx=50)
    machine.run(9)
    regions = set(map(id, machine.engine.cache.regions.values()))
    machine.run(30)
    assert set(map(id, machine.engine.cache.regions.values())) >= regions
    assert int.from_bytes(machine.ram.read(CODE + 0x107, 8), "little") == 13


def test_an_instruction_across_two_pages() -> None:
    # mov rax, imm64 with its immediate on the next page
    machine = machine_with("48b88877665544332211 ebfe", at=0x9000 - 4)
    machine.run(2)
    assert machine.cpu.regs[RAX] == 0x1122334455667788
    machine.ram.write(0x9000, b"\xaa")  # the second page alone changes
    machine.cpu.rip = 0x9000 - 4
    machine.run(1)
    assert machine.cpu.regs[RAX] & 0xFFFFFF == 0xAA7788


def test_the_dirty_log_sees_the_first_store_and_only_dirty_pages() -> None:
    # mov [rdi], rax; add rdi, 4096; dec rcx; jnz; jmp $
    machine = machine_with("488907 4881c700100000 48ffc9 75f1 ebfe", rdi=0x100000, rcx=8)
    machine.ram.start_dirty_log()
    assert len(machine.ram.harvest_dirty()) == machine.ram.npages
    machine.run(4 * 8 - 1)
    assert list(machine.ram.harvest_dirty()) == list(range(0x100, 0x108))
    machine.cpu.regs[RDI], machine.cpu.regs[RCX], machine.cpu.rip = 0x103000, 1, CODE
    machine.run(4)
    assert list(machine.ram.harvest_dirty()) == [0x103]


def test_a_misaligned_store_across_pages_marks_both() -> None:
    machine = machine_with("488907 ebfe", rdi=0x100FFC, rax=0x1122334455667788)
    machine.ram.start_dirty_log()
    machine.ram.harvest_dirty()
    machine.run(1)
    assert machine.ram.read(0x100FFC, 8) == bytes.fromhex("8877665544332211")
    assert list(machine.ram.harvest_dirty()) == [0x100, 0x101]


def test_what_is_not_there_is_named() -> None:
    machine = machine_with("90 0f58c1", rax=1)  # nop; addps xmm0, xmm1
    with pytest.raises(UnsupportedInstruction) as caught:
        machine.run(5)
    error = caught.value
    assert (error.code, error.mnemonic, error.mode, error.rip) == (bytes.fromhex("0f58c1"), "addps", "long64", CODE + 1)
    assert machine.instructions == 1
    assert machine.cpu.rip == CODE + 1


def test_a_request_ends_the_run() -> None:
    machine = machine_with("ebfe")
    machine.start()
    try:
        assert machine.at_edge(lambda: machine.cpu.rip) == CODE
    finally:
        threading.Timer(0.01, machine.stop).start()
    assert machine.wait(10) == "request"


def test_addresses_wrap_at_64_bits() -> None:
    # mov rax, [rdi + 0x7ff8]: RDI is negative, the sum is not
    machine = machine_with("488b87f87f0000 ebfe", rdi=(1 << 64) - 0x100)
    machine.ram.write(0x7EF8, (0xABCD).to_bytes(8, "little"))
    machine.run(1)
    assert machine.cpu.regs[RAX] == 0xABCD


def test_a_negative_index_is_as_fast_as_any() -> None:
    """Compilers count an index up to 0: the sum wraps, and must not take the slow way each time."""
    # add rax, [rdi+rcx*8]; inc rcx; jnz; jmp $
    machine = machine_with("480304cf 48ffc1 75f7 ebfe", rdi=0x101000, rcx=(1 << 64) - 600)
    machine.ram.write(0x101000 - 8 * 600, (1).to_bytes(8, "little") * 600)
    machine.run(3 * 600)
    assert machine.cpu.regs[RAX] == 600
    assert not machine.engine.cache.steps  # nothing was single-stepped
