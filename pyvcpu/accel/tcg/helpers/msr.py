"""RDMSR, WRMSR and CPUID: the registers of :mod:`pyvcpu.cpu.msr`, the leaves of :mod:`pyvcpu.cpu.cpuid`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Mnemonic

from pyvcpu.accel.tcg.helpers import helper
from pyvcpu.accel.tcg.helpers.operands import require_cpl0
from pyvcpu.cpu.cpuid import cpuid
from pyvcpu.cpu.layout import RAX, RBX, RCX, RDX
from pyvcpu.cpu.msr import read_msr, write_msr

if TYPE_CHECKING:
    from pyvcpu.accel.tcg.decode import Insn
    from pyvcpu.accel.tcg.engine import TcgEngine

_APIC_ENABLE = 1 << 11


@helper(Mnemonic.RDMSR)
def rdmsr(e: TcgEngine, insn: Insn) -> int | None:
    require_cpl0(e)
    regs = e.state.regs
    value = read_msr(e, regs[RCX] & 0xFFFFFFFF)
    regs[RAX], regs[RDX] = value & 0xFFFFFFFF, value >> 32
    return None


@helper(Mnemonic.WRMSR)
def wrmsr(e: TcgEngine, insn: Insn) -> int | None:
    require_cpl0(e)
    regs = e.state.regs
    write_msr(e, regs[RCX] & 0xFFFFFFFF, regs[RAX] & 0xFFFFFFFF | (regs[RDX] & 0xFFFFFFFF) << 32)
    return None


@helper(Mnemonic.CPUID)
def cpuid_leaf(e: TcgEngine, insn: Insn) -> int | None:
    regs, apic = e.state.regs, e.apic
    enabled = apic is not None and bool(apic.apicbase & _APIC_ENABLE)
    answer = cpuid(regs[RAX] & 0xFFFFFFFF, regs[RCX] & 0xFFFFFFFF, apic.id if apic is not None else 0, enabled)
    regs[RAX], regs[RBX], regs[RCX], regs[RDX] = answer
    return None
