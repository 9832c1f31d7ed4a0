"""Compiled 64-bit integer C: the same program here and on this processor, at every optimisation level."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.engine import long_mode_machine
from pyvcpu.cpu.layout import RDI, RSP

SOURCE = Path(__file__).with_name("compiled.c")
CODE, OUT, STACK, HALT = 0x10000, 0x200000, 0x300000, 0x8000
WORDS = 64
FLAGS = (
    "-ffreestanding", "-nostdlib", "-mgeneral-regs-only", "-fno-stack-protector", "-fcf-protection=none",
    "-fno-tree-loop-distribute-patterns",
)  # fmt: skip
SCRIPT = f"""
SECTIONS {{
  . = {CODE:#x};
  .text : {{ *(.text.entry) *(.text*) *(.rodata*) *(.data*) *(.bss*) }}
  /DISCARD/ : {{ *(.note*) *(.comment) *(.eh_frame*) }}
}}
"""


def gcc(*arguments: str, cwd: Path) -> None:
    subprocess.run(["gcc", *FLAGS, *arguments, str(SOURCE)], cwd=cwd, check=True, capture_output=True)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the host is not an x86-64")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
@pytest.mark.parametrize("level", ["-O0", "-O1", "-O2", "-O3", "-Os"])
def test_the_same_results_as_on_this_processor(level: str, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(SCRIPT)
    gcc(level, "-shared", "-fPIC", "-o", "native.so", cwd=tmp_path)
    gcc(
        level, "-static", "-fno-pic", "-no-pie", "-Wl,-T,script", "-Wl,--build-id=none", "-Wl,--oformat=binary", "-o",
        "image", cwd=tmp_path,
    )  # fmt: skip
    native = (ctypes.c_uint64 * WORDS)()
    ctypes.CDLL(str(tmp_path / "native.so")).entry(native)

    machine = long_mode_machine()
    machine.ram.write(CODE, (tmp_path / "image").read_bytes())
    machine.ram.write(HALT, b"\xf4")
    machine.ram.write(STACK - 8, HALT.to_bytes(8, "little"))  # where the function returns to
    machine.cpu.rip, machine.cpu.regs[RDI], machine.cpu.regs[RSP] = CODE, OUT, STACK - 8
    assert machine.run(10_000_000) == "halted"
    ours = [int.from_bytes(machine.ram.read(OUT + 8 * i, 8), "little") for i in range(WORDS)]
    assert ours[WORDS - 1] > 30  # so many results were written
    assert ours == list(native)
