"""Moves of XMM registers, and what is refused."""

from __future__ import annotations

import pytest

from pyvcpu.cpu.layout import RAX, RDI
from pyvcpu.errors import UnsupportedInstruction
from tests.unit.accel.helpers.box import CODE, DATA, Box

LOW, HIGH = 0x1122334455667788, 0x99AABBCCDDEEFF00


def box() -> Box:
    made = Box()
    made.long_mode()
    made.state.cr4 |= 1 << 9
    made.state.xmm[2], made.state.xmm[3] = LOW, HIGH  # XMM1
    made.state.xmm[0] = made.state.xmm[1] = 0x5555555555555555
    made.state.regs[RAX], made.state.regs[RDI] = 0x0123456789ABCDEF, DATA
    return made


def xmm0(made: Box) -> int:
    return made.state.xmm[0] | made.state.xmm[1] << 64


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("66480f6ec0", 0x0123456789ABCDEF),  # movq xmm0, rax
        ("660f6ec0", 0x89ABCDEF),  # movd xmm0, eax
        ("f30f7ec1", LOW),  # movq xmm0, xmm1
        ("0f28c1", LOW | HIGH << 64),  # movaps xmm0, xmm1
        ("f30f6f07", int.from_bytes(bytes(range(16)), "little")),  # movdqu xmm0, [rdi]
        ("f30f7e07", int.from_bytes(bytes(range(8)), "little")),  # movq xmm0, [rdi]
    ],
)
def test_into_a_register(code: str, expected: int) -> None:
    made = box()
    made.ram.write(DATA, bytes(range(16)))
    made.run(bytes.fromhex(code), 1)
    assert xmm0(made) == expected


@pytest.mark.parametrize(
    ("code", "size"),
    [("0f290f", 16), ("f30f7f0f", 16), ("660fd60f", 8), ("660f7e0f", 4)],  # movaps, movdqu, movq, movd to [rdi]
)
def test_into_memory(code: str, size: int) -> None:
    made = box()
    made.run(bytes.fromhex(code), 1)
    assert made.ram.read(DATA, 17) == (LOW | HIGH << 64).to_bytes(16, "little")[:size].ljust(17, b"\0")


def test_into_a_general_register() -> None:
    made = box()
    made.run(bytes.fromhex("66480f7ec8"), 1)  # movq rax, xmm1
    assert made.state.regs[RAX] == LOW


@pytest.mark.parametrize("code", ["f20f58c1", "0f6ec0", "f20f10c1", "f20fc2c100"])
def test_what_is_not_there_is_named(code: str) -> None:
    """addsd; movd mm0, eax; movsd and cmpsd of SSE2, which share a mnemonic with string instructions."""
    made = box()
    with pytest.raises(UnsupportedInstruction) as caught:
        made.run(bytes.fromhex(code), 1)
    assert caught.value.rip == CODE
    assert caught.value.code == bytes.fromhex(code)
