"""The committed images are what the sources give, and decode as what was meant."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from pyvcpu.errors import ConfigurationError
from pyvcpu.machine.config import Image
from pyvcpu.machine.guests import PARAMETERS, as_bios, guest_directory, load_guest, parse_guest


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(guest_directory())
    return importlib.import_module("build")


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(guest_directory())
    return importlib.import_module("verify")


def image(name: str) -> bytes:
    return (guest_directory() / name / f"{name}.bin").read_bytes()


def test_every_guest_has_parameters_and_a_source(build: ModuleType) -> None:
    assert set(build.GUESTS) == PARAMETERS.keys()
    assert tuple(path.stem for name in build.GUESTS for path in (guest_directory() / name).glob("*.s")) == build.GUESTS


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_image_is_what_the_source_gives(build: ModuleType, name: str) -> None:
    pytest.importorskip("keystone", reason="keystone-engine is not installed")
    assert build.assemble(name) == image(name)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_image_decodes_as_its_source(build: ModuleType, name: str) -> None:
    """Without an assembler: every statement, where it must be."""
    build.verify_image(name, image(name))


@pytest.mark.parametrize(
    ("bits", "text", "code"),
    [
        (64, "mov rax, qword ptr [0x6000]", "488b0500600000"),  # RIP-relative: what keystone makes of it
        (64, "push 5", "666a05"),
        (32, "push 0x100000", "6a00"),
        (64, "add qword ptr [rdi], 1", "830701"),
        (64, "add rax, rcx", "4801c2"),
        (64, "mov eax, 0x20040", "b840000000"),
        (64, "jb 0x1002", "7700"),
        (64, "jne 0x1010", "7500"),
        (64, "mov rax, qword ptr [rcx + rdi * 8 + 0x100]", "488b84f900020000"),
        (64, "mov rax, qword ptr [rcx + rdi * 8]", "488b04b9"),
        (64, "rep stosq", "48ab"),
        (64, "lgdt [rdi]", "0f0117"[:4]),
    ],
)
def test_what_an_assembler_gets_wrong_is_found(verify: ModuleType, bits: int, text: str, code: str) -> None:
    with pytest.raises(verify.Mismatch):
        verify.verify([(1, text)], bytes.fromhex(code), bits, 0x1000)


def test_a_label_is_held_to_its_place(verify: ModuleType) -> None:
    source = [(1, "again:"), (2, "nop"), (3, "lea rax, [rip + again]"), (4, "jmp again")]
    code = bytes.fromhex("90 488d05f8ffffff ebf6")
    assert verify.verify(source, code, 64, 0x1000) == len(code)
    for byte in (4, 9):
        wrong = bytearray(code)
        wrong[byte] += 1
        with pytest.raises(verify.Mismatch):
            verify.verify(source, bytes(wrong), 64, 0x1000)


def test_parameters_land_at_their_place() -> None:
    data = parse_guest("ticker,rate=0x10,beats=3").data
    assert data[0xF08:0xF10] == (16).to_bytes(8, "little")
    assert data[0xF20:0xF28] == (3).to_bytes(8, "little")


@pytest.mark.parametrize("text", ["nobody", "ticker,speed=1", "ticker,rate", "ticker,rate=-1", "ticker,rate=x"])
def test_wrong_options_are_named(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_guest(text)


def test_what_does_not_fit_into_firmware_is_refused() -> None:
    assert len(as_bios(load_guest("irqs"))) == 64 << 10
    with pytest.raises(ConfigurationError):
        as_bios(Image(bytes(0xFF01), 0x8000))
    with pytest.raises(ConfigurationError):
        as_bios(Image(bytes(16), 0x7C00))
