"""The layout of a vCPU's state: one table, from which every view of it is made.

The block is plain little-endian memory. Python reads and writes it through a ctypes
structure (:mod:`pyvcpu.cpu.state`), native code by offset, tests and diffs through a numpy
record dtype of the same bytes.

Segment arrays are indexed ES CS SS DS FS GS LDTR TR; ``seg_flags`` holds bits 8 to 23 of the
descriptor's second dword in place (SDM 3A 3.4.5), ``seg_limit`` is in bytes, after G.
"""

from __future__ import annotations

from typing import NamedTuple

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
R8, R9, R10, R11, R12, R13, R14, R15 = range(8, 16)
ES, CS, SS, DS, FS, GS, LDTR, TR = range(8)

REG_NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
             "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")  # fmt: skip
SEG_NAMES = ("es", "cs", "ss", "ds", "fs", "gs", "ldt", "tr")

MP_RUNNABLE, MP_UNINITIALIZED, MP_INIT_RECEIVED, MP_HALTED, MP_SIPI_RECEIVED = range(5)


class Field(NamedTuple):
    """One row: ``count`` items of ``type`` ("u8" .. "u64", "i32", "i64") at byte ``offset``."""

    name: str
    type: str
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs
    offset: int


TYPE_SIZES = {"u8": 1, "i8": 1, "u16": 2, "i16": 2, "u32": 4, "i32": 4, "u64": 8, "i64": 8}

_TABLE: tuple[tuple[str, str, int], ...] = (
    # -- what an engine touches all the time
    ("regs", "u64", 16),
    ("rip", "u64", 1),
    ("cc_op", "u64", 1),  # lazy flags: see accel/tcg/flags.py; CC_EFLAGS when rflags is whole
    ("cc_dst", "u64", 1),
    ("cc_src", "u64", 1),
    ("rflags", "u64", 1),  # arithmetic bits are valid only after Accelerator.save_state()
    ("seg_base", "u64", 8),
    ("seg_limit", "u32", 8),
    ("seg_flags", "u32", 8),
    ("seg_selector", "u16", 8),
    ("gdt_base", "u64", 1),
    ("gdt_limit", "u32", 1),
    ("idt_limit", "u32", 1),
    ("idt_base", "u64", 1),
    ("cr0", "u64", 1),
    ("cr2", "u64", 1),
    ("cr3", "u64", 1),
    ("cr4", "u64", 1),
    ("xcr0", "u64", 1),
    ("efer", "u64", 1),
    ("dr", "u64", 8),
    # -- pending events and run state
    ("mp_state", "u32", 1),  # MP_*; MP_HALTED is HLT
    ("interrupt_shadow", "u8", 1),  # 1 for the one instruction after STI or MOV SS
    ("nmi_masked", "u8", 1),
    ("nmi_pending", "u8", 1),
    ("nmi_injected", "u8", 1),
    ("exception_nr", "i32", 1),  # -1: none being delivered
    ("exception_has_error_code", "u8", 1),
    ("exception_injected", "u8", 1),
    ("soft_interrupt", "u8", 1),
    ("shutdown", "u8", 1),  # 1 after a triple fault
    ("error_code", "u32", 1),
    ("interrupt_injected", "i32", 1),  # KVM: the vector being injected, -1 none
    ("sipi_vector", "u32", 1),
    ("a20_mask", "i32", 1),
    ("smbase", "u32", 1),
    ("hflags2", "u32", 1),  # bit 0 GIF and bit 8 VGIF are 1 at reset
    # -- x87 and SSE; st_*: TCG's order, physical register i
    ("fpu_control", "u16", 1),
    ("fpu_status", "u16", 1),  # TOP in bits 11-13
    ("fpu_tag", "u8", 1),  # abridged, 1 = valid (the stream's fptag is this byte too)
    ("fpu_pad", "u8", 1),
    ("fpu_opcode", "u16", 1),
    ("fpu_ip", "u64", 1),
    ("fpu_dp", "u64", 1),
    ("st_mantissa", "u64", 8),
    ("st_exponent", "u16", 8),
    ("mxcsr", "u32", 1),
    ("pkru", "u32", 1),
    ("xmm", "u64", 32),  # register i at [2 i] low, [2 i + 1] high
    ("ymmh", "u64", 32),
    ("xstate_bv", "u64", 1),
    # -- MSRs
    ("sysenter_cs", "u32", 1),
    ("tsc_aux_pad", "u32", 1),
    ("sysenter_esp", "u64", 1),
    ("sysenter_eip", "u64", 1),
    ("star", "u64", 1),
    ("lstar", "u64", 1),
    ("cstar", "u64", 1),
    ("fmask", "u64", 1),
    ("kernelgsbase", "u64", 1),
    ("pat", "u64", 1),
    ("tsc_aux", "u64", 1),
    ("tsc_offset", "i64", 1),  # guest TSC = clock.now() + tsc_offset
    ("tsc_adjust", "u64", 1),
    ("tsc_deadline", "u64", 1),
    ("misc_enable", "u64", 1),
    ("feature_control", "u64", 1),
    ("spec_ctrl", "u64", 1),
    ("virt_ssbd", "u64", 1),
    ("xss", "u64", 1),
    ("smi_count", "u64", 1),
    ("system_time_msr", "u64", 1),
    ("wall_clock_msr", "u64", 1),
    ("poll_control_msr", "u64", 1),
    ("mtrr_fixed", "u64", 11),
    ("mtrr_deftype", "u64", 1),
    ("mtrr_base", "u64", 8),
    ("mtrr_mask", "u64", 8),
    ("mcg_cap", "u64", 1),
    ("mcg_status", "u64", 1),
    ("mcg_ctl", "u64", 1),
    ("mce_banks", "u64", 40),  # 10 banks of CTL, STATUS, ADDR, MISC
    # -- SVM (carried, not used)
    ("vm_hsave", "u64", 1),
    ("vm_vmcb", "u64", 1),
    ("svm_tsc_offset", "u64", 1),
    ("svm_intercept", "u64", 1),
    ("svm_cr_read", "u16", 1),
    ("svm_cr_write", "u16", 1),
    ("svm_dr_read", "u16", 1),
    ("svm_dr_write", "u16", 1),
    ("svm_exceptions", "u32", 1),
    ("v_tpr", "u8", 1),
)


def _place() -> tuple[tuple[Field, ...], int]:
    fields, offset = [], 0
    for name, kind, count in _TABLE:
        size = TYPE_SIZES[kind]
        offset = -(-offset // size) * size
        fields.append(Field(name, kind, count, offset))
        offset += size * count
    return tuple(fields), -(-offset // 64) * 64


FIELDS, STATE_SIZE = _place()
OFFSETS = {field.name: field.offset for field in FIELDS}
BY_NAME = {field.name: field for field in FIELDS}
