"""CPUID: names, limits, the features that must and must not show."""

from __future__ import annotations

from pyvcpu.cpu.cpuid import LACKING_1_EDX, cpuid
from pyvcpu.cpu.layout import RDX
from pyvcpu.cpu.state import CPUID_SIGNATURE, CpuState


def text(*registers: int) -> str:
    return b"".join(r.to_bytes(4, "little") for r in registers).decode().rstrip("\0")


def test_names() -> None:
    _, ebx, ecx, edx = cpuid(0, 0)
    assert text(ebx, edx, ecx) == "AuthenticAMD"
    assert text(*(r for leaf in (0x80000002, 0x80000003, 0x80000004) for r in cpuid(leaf, 0))) == (
        "QEMU Virtual CPU version 2.5+"
    )
    assert text(*cpuid(0x40000000, 0)[1:]) == "TCGTCGTCGTCG"


def test_the_signature_is_the_one_in_edx_after_reset() -> None:
    state = CpuState()
    state.reset()
    assert cpuid(1, 0)[0] == cpuid(0x80000001, 0)[0] == CPUID_SIGNATURE == state.regs[RDX]


def test_features() -> None:
    _, _, ecx, edx = cpuid(1, 0)
    tsc, msr, pae, cx8, apic, pge, cmov, pat, clflush = (edx >> bit & 1 for bit in (4, 5, 6, 8, 9, 13, 15, 16, 19))
    assert (tsc, msr, pae, cx8, apic, pge, cmov, pat, clflush) == (1,) * 9
    assert not edx & LACKING_1_EDX
    cx16, hypervisor, osxsave, avx = (ecx >> bit & 1 for bit in (13, 31, 27, 28))
    assert (cx16, hypervisor, osxsave, avx) == (1, 1, 0, 0)
    _, _, ecx, edx = cpuid(0x80000001, 0)
    syscall, nx, pages_1g, rdtscp, long_mode = (edx >> bit & 1 for bit in (11, 20, 26, 27, 29))
    assert (syscall, nx, pages_1g, rdtscp, long_mode) == (1, 1, 0, 0, 1)
    assert not edx & LACKING_1_EDX
    assert ecx == 1  # LAHF; no SVM


def test_the_apic_shows_while_it_is_enabled() -> None:
    assert cpuid(1, 0, 5)[1] >> 24 == 5
    for leaf in (1, 0x80000001):
        assert cpuid(leaf, 0)[3] & ~cpuid(leaf, 0, apic_enabled=False)[3] == 1 << 9


def test_topology() -> None:
    assert cpuid(0xB, 0, 3) == (0, 1, 0x100, 3)
    assert cpuid(0xB, 1, 3) == (0, 1, 0x201, 3)
    assert cpuid(0xB, 2, 3) == (0, 0, 2, 3)


def test_beyond_the_highest_leaf() -> None:
    for leaf in (0xE, 0x3FFFFFFF, 0x40000002, 0x8000000B, 0xC0000000, 0xFFFFFFFF):
        assert cpuid(leaf, 0) == (0, 0, 0, 0)
