"""Decoding: a second opinion on every instruction of the guests, and what is not decoded."""

from __future__ import annotations

import pytest
from capstone import CS_ARCH_X86, CS_MODE_64, Cs

from pyvcpu.accel.tcg.decode import decode, decode_block
from pyvcpu.machine.guests import PARAMETERS, load_guest


@pytest.mark.parametrize("name", PARAMETERS)
def test_capstone_agrees_on_the_length_of_every_instruction(name: str) -> None:
    code = load_guest(name).data[0x1000:]
    capstone = Cs(CS_ARCH_X86, CS_MODE_64)
    at = compared = 0
    while at < len(code) - 15:
        ours = decode(code[at : at + 15], 0x9000 + at, 64)
        if not ours.valid:
            break  # the texts begin
        theirs = next(capstone.disasm(code[at : at + 15], 0x9000 + at, 1), None)
        if theirs is not None:
            assert theirs.size == ours.length, f"{at:#x} {ours}"
            compared += 1
        at += ours.length
    assert compared > 80


def test_a_block_ends_with_the_first_branch() -> None:
    block = decode_block(bytes.fromhex("90 4801d8 75fa 90"), 0x1000, 64, 64)
    assert [insn.name for insn in block] == ["nop", "add", "jne"]
    assert [insn.ip for insn in block] == [0x1000, 0x1001, 0x1004]


def test_what_is_undefined_or_cut_short_is_left_out() -> None:
    assert decode_block(bytes.fromhex("0f04"), 0, 64, 64) == []
    assert [i.name for i in decode_block(bytes.fromhex("90 48b811"), 0, 64, 64)] == ["nop"]
    assert not decode(bytes.fromhex("06"), 0, 64).valid  # push es: not in 64-bit code
    assert decode(bytes.fromhex("06"), 0, 32).valid


@pytest.mark.parametrize(("bits", "target"), [(16, 0x8FF0), (32, 0x18FF0), (64, 0x18FF0)])
def test_branch_targets_wrap_at_the_code_size(bits: int, target: int) -> None:
    insn = decode(bytes.fromhex("ebee"), 0x19000, bits)
    assert insn.iced.near_branch_target == target
    assert insn.next_ip == 0x19002
