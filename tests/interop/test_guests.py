"""The bundled guests on QEMU's microvm print what they print here, line for line, and end with the same exit code.

So what they check about a processor, a local APIC and its timer is not only what we made of them.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pyvcpu.machine import MIB, MachineConfig, make_machine
from pyvcpu.machine.guests import as_bios, load_guest
from tests.interop.qemu import BINARY, TIMEOUT, version

pytestmark = pytest.mark.skipif(version() is None, reason="Debian's QEMU (qemu-system-x86) is not installed")

ICOUNT = ("-icount", "shift=0,sleep=off")
TICKER = {"period": 200_000, "rate": 8, "pages": 64, "ticks": 50, "beats": 4}


def in_qemu(directory: Path, bios: bytes, *arguments: str) -> tuple[int, str]:
    """(exit code, serial output)"""
    image, output = directory / "guest.rom", directory / "serial"
    image.write_bytes(bios)
    done = subprocess.run(
        [
            BINARY, "-accel", "tcg", "-nodefaults", "-display", "none", "-M", "microvm,isa-serial=on", "-m", "16",
            "-bios", str(image), "-serial", f"file:{output}", "-no-reboot",
            "-device", "isa-debug-exit,iobase=0xf4,iosize=4", *arguments,
        ],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    return done.returncode, output.read_text() if output.exists() else done.stderr


def here(bios: bytes) -> tuple[int | None, str]:
    output = bytearray()
    machine = make_machine(MachineConfig(memory=16 * MIB, bios=bios, serial=output.extend, debug_exit=(0xF4, 4)))
    assert machine.run(100_000_000) == "debug-exit", output
    return machine.exit_code, output.decode()


@pytest.mark.parametrize(
    ("name", "parameters", "arguments"),
    [
        ("counter", {"limit": 3_000_000}, ()),
        ("ticker", TICKER, ()),
        ("ticker", {**TICKER, "sequence": 1}, ICOUNT),  # no tick lost, none doubled
        ("dirtier", {"pattern": 0, "pages": 256, "writes": 10_000, "reports": 3}, ()),
        ("dirtier", {"pattern": 1, "pages": 256, "writes": 10_000, "reports": 3}, ()),
        ("dirtier", {"pattern": 2, "pages": 256, "writes": 10_000, "reports": 3}, ()),
        ("irqs", {"rounds": 3}, ()),
        ("irqs", {"rounds": 3}, ICOUNT),
    ],
)
def test_a_guest_prints_the_same(
    tmp_path: Path, name: str, parameters: dict[str, int], arguments: tuple[str, ...]
) -> None:
    bios = as_bios(load_guest(name, **parameters))
    code, text = in_qemu(tmp_path, bios, *arguments)
    assert f"{name}: OK" in text
    assert "FAIL" not in text
    assert code == 1
    assert here(bios) == (code, text)
