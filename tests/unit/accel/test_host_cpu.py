"""What the manuals leave open is asked of the host processor itself."""

from __future__ import annotations

import ctypes
import mmap
import platform

import pytest

from tests.unit.accel.snippets import Program, run_python_target

RAX_START = 0x1111111122222222
RCX_START = 0x3333333344444444
RDX_START = 0x5555555566666666

CASES = {
    "bsf eax, r8d of zero": "41 0f bc c0",
    "bsr eax, r8d of zero": "41 0f bd c0",
    "bsf rax, r8 of zero": "49 0f bc c0",
    "bsf ax, r8w of zero": "66 41 0f bc c0",
    "cmpxchg ecx, edx that fails": "0f b1 d1",
    "cmpxchg rcx, rdx that fails": "48 0f b1 d1",
    "cmpxchg cx, dx that fails": "66 0f b1 d1",
    "cmpxchg eax, edx that holds": "0f b1 d0",
    "bswap ax": "66 0f c8",
    "cmovb eax, edx that does not move": "0f 42 c2",
    "shl eax, cl with a count of 4": "d3 e0",
    "xadd eax, eax": "0f c1 c0",
    "xchg al, ah": "86 e0",
    "imul ax, dx, 0x7777": "66 69 c2 77 77",
    "movsxd ax, edx": "66 63 c2",
}


def run_host(code: bytes) -> tuple[int, int, int]:
    """RAX, RCX and RDX after ``code`` on this processor, from the start values above, R8 = 0 and CF clear."""
    prologue = b"\x48\xb8" + RAX_START.to_bytes(8, "little") + b"\x48\xb9" + RCX_START.to_bytes(8, "little")
    prologue += b"\x48\xba" + RDX_START.to_bytes(8, "little") + b"\x45\x31\xc0"
    epilogue = b"\x48\x89\x07\x48\x89\x4f\x08\x48\x89\x57\x10\xc3"  # store to [rdi]
    area = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    area.write(prologue + code + epilogue)
    out = (ctypes.c_uint64 * 3)()
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(ctypes.addressof(out))
    return out[0], out[1], out[2]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the host is not an x86-64")
@pytest.mark.parametrize("name", CASES)
def test_registers_as_on_the_host(name: str) -> None:
    code = bytes.fromhex(CASES[name])
    regs = (RAX_START, RCX_START, RDX_START, *([0] * 13))
    ours = run_python_target(Program(code, regs, 2, bytes(0x2000), 0))
    assert ours.regs[:3] == run_host(code)
