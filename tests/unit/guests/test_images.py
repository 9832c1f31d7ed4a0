"""The committed images are what the sources give, and decode as what was meant."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from iced_x86 import Code, Decoder

from pyvcpu.errors import ConfigurationError
from pyvcpu.machine.guests import PARAMETERS, guest_directory, load_guest, parse_guest

BUILD = guest_directory() / "build.py"


def build_module():
    spec = importlib.util.spec_from_file_location("guests_build", BUILD)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["guests_build"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_image_is_what_the_source_gives(name: str) -> None:
    pytest.importorskip("keystone", reason="keystone-engine is not installed")
    assert build_module().assemble(name) == Path(guest_directory() / name / f"{name}.bin").read_bytes()


@pytest.mark.parametrize("name", PARAMETERS)
def test_no_absolute_address_became_rip_relative(name: str) -> None:
    """keystone's silent trap: every RIP-relative operand must point into the image."""
    image = load_guest(name)
    code = image.data[0x1000:]
    for insn in Decoder(64, code, ip=image.address + 0x1000):
        if insn.code != Code.INVALID and insn.is_ip_rel_memory_operand and "lea" in str(insn):
            assert image.address + 0x1000 <= insn.ip_rel_memory_address < image.address + len(image.data), str(insn)


def test_parameters_land_at_their_place() -> None:
    image = parse_guest("ticker,rate=0x10,beats=3").data
    assert image[0xF08:0xF10] == (16).to_bytes(8, "little")
    assert image[0xF20:0xF28] == (3).to_bytes(8, "little")


@pytest.mark.parametrize("text", ["nobody", "ticker,speed=1", "ticker,rate", "ticker,rate=-1", "ticker,rate=x"])
def test_wrong_options_are_named(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_guest(text)
