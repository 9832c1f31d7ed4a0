"""CPUID: QEMU 7.2's qemu64 under TCG, as read there, less what this engine lacks.

A guest that moves to QEMU finds there what it found here or more. Leaves that are not listed read as
zero, those beyond the highest too (there QEMU answers with leaf DH, which is zero as well).
"""

from __future__ import annotations

from pyvcpu.cpu.state import CPUID_SIGNATURE

Registers = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""

_FPU, _APIC, _MMX, _FXSR, _SSE, _SSE2 = 1 << 0, 1 << 9, 1 << 23, 1 << 24, 1 << 25, 1 << 26
_SSE3, _SVM = 1 << 0, 1 << 2

LACKING_1_EDX = _FPU | _MMX | _FXSR | _SSE | _SSE2
LACKING_1_ECX = _SSE3
LACKING_80000001_ECX = _SVM
"""Features of qemu64 that are not there yet: x87, MMX, SSE to SSE3, SVM."""

_LEAVES: dict[int, Registers] = {
    0x00000000: (0xD, 0x68747541, 0x444D4163, 0x69746E65),  # AuthenticAMD
    0x00000001: (CPUID_SIGNATURE, 0x00000800, 0x80002001 & ~LACKING_1_ECX, 0x078BFBFD & ~LACKING_1_EDX),
    0x00000005: (0, 0, 3, 0),
    0x40000000: (0x40000001, 0x54474354, 0x43544743, 0x47435447),  # TCGTCGTCGTCG
    0x80000000: (0x8000000A, 0x68747541, 0x444D4163, 0x69746E65),
    0x80000001: (CPUID_SIGNATURE, 0, 5 & ~LACKING_80000001_ECX, 0x2193FBFD & ~LACKING_1_EDX),
    0x80000002: (0x554D4551, 0x72695620, 0x6C617574, 0x55504320),  # QEMU Virtual CPU version 2.5+
    0x80000003: (0x72657620, 0x6E6F6973, 0x352E3220, 0x0000002B),
    0x80000005: (0x01FF01FF, 0x01FF01FF, 0x40020140, 0x40020140),  # L1 caches and TLBs
    0x80000006: (0, 0x42004200, 0x02008140, 0x00808140),
    0x80000008: (0x3028, 0, 0, 0),  # 40 physical, 48 linear address bits
}

_TOPOLOGY: dict[int, Registers] = {0: (0, 1, 0x100, 0), 1: (0, 1, 0x201, 0)}


def cpuid(leaf: int, subleaf: int, apic_id: int = 0, apic_enabled: bool = True) -> Registers:
    """What CPUID answers; the APIC's bit follows IA32_APIC_BASE."""
    if leaf == 0xB:
        eax, ebx, ecx, _ = _TOPOLOGY.get(subleaf, (0, 0, subleaf & 0xFF, 0))
        return eax, ebx, ecx, apic_id
    eax, ebx, ecx, edx = _LEAVES.get(leaf, (0, 0, 0, 0))
    if leaf == 1:
        ebx |= (apic_id & 0xFF) << 24
    if leaf in (1, 0x80000001) and not apic_enabled:
        edx &= ~_APIC
    return eax, ebx, ecx, edx
