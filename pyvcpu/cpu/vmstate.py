"""The sections of a vCPU on the wire: "cpu" version 12 (1,817 bytes) and "cpu_common".

    cpu         regs[16] eip eflags hflags | fpuc fpus fptag format fpregs[8] | segs[6] ldt tr gdt idt
                | sysenter | cr0 cr2 cr3 cr4 dr[8] a20 | mxcsr xmm[16] | efer star lstar cstar fmask
                kernelgsbase | smbase pat hflags2 | SVM | MTRRs | events, mp_state, tsc | MCE | tsc_aux
                kvmclock MSRs | xcr0 xstate_bv ymmh[16] | subsections
    cpu_common  halted interrupt_request | exception_index crash_occurred

The layout and the names are those that QEMU 7.2 and 10.0 print in their vmdesc. What a value means is in
:class:`~pyvcpu.cpu.state.CpuState`; the hooks below are the only place where the two differ:

  - hflags is computed (:mod:`pyvcpu.cpu.hflags`); of it only the interrupt shadow is state.
  - hflags2 bit 2 is "in an NMI handler", our ``nmi_masked``.
  - x87: TCG's fpregs are physical registers, KVM's are ST(0) to ST(7), and nothing in the stream says
    which. A guest TSC in ``tsc`` is a mark of KVM: under TCG the TSC lies in ``timer``.
  - xstate_bv: TCG sends 0 and ignores it, KVM throws away x87 and SSE state for it. We send at least 3.

What is refused before anything is loaded stands in :mod:`pyvcpu.cpu.validity`. ``CpuState.rflags`` must be
whole (the engine's ``save_state()``) before anything is saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyvcpu.cpu import layout
from pyvcpu.cpu.hflags import SHADOW, hflags_of
from pyvcpu.cpu.layout import LDTR, MP_HALTED, TR
from pyvcpu.cpu.validity import HF2_NMI, SEG_FLAGS_BITS, check_cpu, one_of, only_bits, segments_of
from pyvcpu.migration.vmstate.description import (
    SUBSECTIONS,
    Description,
    LoadContext,
    SaveContext,
    Struct,
    refuse,
)
from pyvcpu.migration.vmstate.fields import I32, I64, U8, U16, U32, U64, Array, Bool, Field, Integer, Values

if TYPE_CHECKING:
    from pyvcpu.cpu.state import CpuState

TSC_KHZ = 1_000_000
"""1 TSC tick is 1 ns on both clocks."""

_MASK64 = (1 << 64) - 1

# -- the layout


def _env(kind: type[Integer], name: str, *, wire_name: str | None = None, since: int = 0) -> Integer:
    """A field of QEMU's env: "env.NAME" in the vmdesc, NAME in our values."""
    return kind(name, wire_name=f"env.{wire_name or name}", since=since)


_SEGMENT = Description("segment", 1, [U32("selector"), U64("base"), U32("limit"), U32("flags")])
_FPREG_TMP = Description("fpreg_tmp", 0, [U64("tmp_mant"), U16("tmp_exp")])
_FPREG = Description("fpreg", 0, [Struct("tmp", _FPREG_TMP, kind="tmp", flat=True)])
_XMM_REG = Description("xmm_reg", 1, [U64("q0", wire_name="_q_ZMMReg[0]"), U64("q1", wire_name="_q_ZMMReg[1]")])
_YMMH_REG = Description("ymmh_reg", 1, [U64("q2", wire_name="_q_ZMMReg[2]"), U64("q3", wire_name="_q_ZMMReg[3]")])
_MTRR_VAR = Description("mtrr_var", 1, [U64("base"), U64("mask")])


def _env_struct(name: str, description: Description, wire_name: str | None = None) -> Struct:
    return Struct(name, description, wire_name=f"env.{wire_name or name}")


def _zero_vectors() -> list[Values]:
    return [{"q2": 0, "q3": 0} for _ in range(16)]


_FIELDS: tuple[Field, ...] = (
    Array(_env(U64, "regs"), 16),
    _env(U64, "eip"),
    _env(U64, "eflags"),
    _env(U32, "hflags"),
    _env(U16, "fpuc"),
    _env(U16, "fpus_vmstate"),
    _env(U16, "fptag_vmstate"),
    _env(U16, "fpregs_format_vmstate"),
    Array(_env_struct("fpregs", _FPREG), 8),
    Array(_env_struct("segs", _SEGMENT), 6),
    _env_struct("ldt", _SEGMENT),
    _env_struct("tr", _SEGMENT),
    _env_struct("gdt", _SEGMENT),
    _env_struct("idt", _SEGMENT),
    _env(U32, "sysenter_cs"),
    _env(U64, "sysenter_esp"),
    _env(U64, "sysenter_eip"),
    _env(U64, "cr0", wire_name="cr[0]"),
    _env(U64, "cr2", wire_name="cr[2]"),
    _env(U64, "cr3", wire_name="cr[3]"),
    _env(U64, "cr4", wire_name="cr[4]"),
    Array(_env(U64, "dr"), 8),
    _env(I32, "a20_mask"),
    _env(U32, "mxcsr"),
    Array(_env_struct("xmm_regs", _XMM_REG, "xmm_regs[0]"), 16),
    _env(U64, "efer"),
    _env(U64, "star"),
    _env(U64, "lstar"),
    _env(U64, "cstar"),
    _env(U64, "fmask"),
    _env(U64, "kernelgsbase"),
    _env(U32, "smbase"),
    _env(U64, "pat"),
    _env(U32, "hflags2"),
    _env(U64, "vm_hsave"),
    _env(U64, "vm_vmcb"),
    _env(U64, "tsc_offset"),
    _env(U64, "intercept"),
    _env(U16, "intercept_cr_read"),
    _env(U16, "intercept_cr_write"),
    _env(U16, "intercept_dr_read"),
    _env(U16, "intercept_dr_write"),
    _env(U32, "intercept_exceptions"),
    _env(U8, "v_tpr"),
    Array(_env(U64, "mtrr_fixed"), 11),
    _env(U64, "mtrr_deftype"),
    Array(_env_struct("mtrr_var", _MTRR_VAR), 8),
    _env(I32, "interrupt_injected"),
    _env(U32, "mp_state"),
    _env(U64, "tsc"),
    _env(I32, "exception_nr"),
    _env(U8, "soft_interrupt"),
    _env(U8, "nmi_injected"),
    _env(U8, "nmi_pending"),
    _env(U8, "has_error_code"),
    _env(U32, "sipi_vector"),
    _env(U64, "mcg_cap"),
    _env(U64, "mcg_status"),
    _env(U64, "mcg_ctl"),
    Array(_env(U64, "mce_banks"), 40),
    _env(U64, "tsc_aux"),
    _env(U64, "system_time_msr"),
    _env(U64, "wall_clock_msr"),
    _env(U64, "xcr0", since=12),
    _env(U64, "xstate_bv", since=12),
    Array(_env_struct("ymmh_regs", _YMMH_REG, "xmm_regs[1]"), 16, since=12, default=_zero_vectors()),
)

# Scalars and arrays whose field in CpuState has the same name; below, those that have another.
_SAME = (
    "regs", "sysenter_cs", "sysenter_esp", "sysenter_eip", "cr0", "cr2", "cr3", "cr4", "dr", "a20_mask", "mxcsr",
    "efer", "star", "lstar", "cstar", "fmask", "kernelgsbase", "smbase", "pat", "vm_hsave", "vm_vmcb", "v_tpr",
    "mtrr_fixed", "mtrr_deftype", "interrupt_injected", "mp_state", "exception_nr", "soft_interrupt",
    "nmi_injected", "nmi_pending", "sipi_vector", "mcg_cap", "mcg_status", "mcg_ctl", "mce_banks", "tsc_aux",
    "system_time_msr", "wall_clock_msr", "xcr0",
)  # fmt: skip
_PLAIN = {
    "eip": "rip",
    "eflags": "rflags",
    "fpuc": "fpu_control",
    "fpus_vmstate": "fpu_status",
    "fptag_vmstate": "fpu_tag",
    "tsc_offset": "svm_tsc_offset",
    "intercept": "svm_intercept",
    "intercept_cr_read": "svm_cr_read",
    "intercept_cr_write": "svm_cr_write",
    "intercept_dr_read": "svm_dr_read",
    "intercept_dr_write": "svm_dr_write",
    "intercept_exceptions": "svm_exceptions",
    "has_error_code": "exception_has_error_code",
    **{name: name for name in _SAME},
}

# -- save


def _pre_save(cpu: CpuState, ctx: SaveContext) -> Values:
    if not ctx.to_pyvcpu and not ctx.to_kvm and cpu.tsc_deadline:
        raise refuse("msr_tscdeadline/tsc_deadline", f"{ctx.peer} has no TSC-deadline timer", 0, int(cpu.tsc_deadline))
    values: Values = {}
    for name, attribute in _PLAIN.items():
        value = getattr(cpu, attribute)
        values[name] = list(value) if layout.BY_NAME[attribute].count > 1 else int(value)
    values["hflags"] = hflags_of(cpu)
    values["hflags2"] = cpu.hflags2 & ~HF2_NMI | (HF2_NMI if cpu.nmi_masked else 0)
    values["fpregs_format_vmstate"] = 0
    turn = _top(cpu.fpu_status) if ctx.to_kvm else 0
    order = [(i + turn) & 7 for i in range(8)]
    values["fpregs"] = [{"tmp_mant": cpu.st_mantissa[i], "tmp_exp": cpu.st_exponent[i]} for i in order]
    segments = [
        {
            "selector": cpu.seg_selector[i],
            "base": cpu.seg_base[i],
            "limit": cpu.seg_limit[i],
            "flags": cpu.seg_flags[i],
        }
        for i in range(8)
    ]
    values["segs"], values["ldt"], values["tr"] = segments[:6], segments[LDTR], segments[TR]
    values["gdt"] = {"selector": 0, "base": cpu.gdt_base, "limit": cpu.gdt_limit, "flags": 0}
    values["idt"] = {"selector": 0, "base": cpu.idt_base, "limit": cpu.idt_limit, "flags": 0}
    values["xmm_regs"] = [{"q0": cpu.xmm[2 * i], "q1": cpu.xmm[2 * i + 1]} for i in range(16)]
    values["ymmh_regs"] = [{"q2": cpu.ymmh[2 * i], "q3": cpu.ymmh[2 * i + 1]} for i in range(16)]
    values["mtrr_var"] = [{"base": cpu.mtrr_base[i], "mask": cpu.mtrr_mask[i]} for i in range(8)]
    values["xstate_bv"] = cpu.xstate_bv | 3 | (4 if any(cpu.ymmh) else 0)
    values["tsc"] = guest_tsc(cpu, ctx.clock) if ctx.to_kvm else 0
    return values


def guest_tsc(cpu: CpuState, clock: Any) -> int:
    """What RDTSC reads now: virtual time (ns) and the offset, modulo 2**64."""
    return int(clock.now() + cpu.tsc_offset) & _MASK64


def _top(fpu_status: int) -> int:
    return (fpu_status >> 11) & 7


# -- load


def from_kvm(values: Values, ctx: LoadContext) -> bool:
    """True if a stream with these "cpu" values was written by QEMU with KVM."""
    return bool(values["tsc"]) or "cpu/tsc_khz" in values.get(SUBSECTIONS, {}) or "kvmclock/0" in ctx.sections


def _post_load(cpu: CpuState, values: Values, ctx: LoadContext) -> None:
    for name, attribute in _PLAIN.items():
        if layout.BY_NAME[attribute].count > 1:
            getattr(cpu, attribute)[:] = values[name]
        else:
            setattr(cpu, attribute, values[name])
    cpu.interrupt_shadow = 1 if values["hflags"] & SHADOW else 0
    cpu.hflags2 = values["hflags2"] & ~HF2_NMI
    cpu.nmi_masked = 1 if values["hflags2"] & HF2_NMI else 0
    turn = _top(values["fpus_vmstate"]) if from_kvm(values, ctx) else 0
    for i, register in enumerate(values["fpregs"]):
        cpu.st_mantissa[(i + turn) & 7] = register["tmp_mant"]
        cpu.st_exponent[(i + turn) & 7] = register["tmp_exp"]
    for i, (_, segment) in enumerate(segments_of(values)):
        cpu.seg_selector[i] = segment["selector"]
        cpu.seg_base[i] = segment["base"]
        cpu.seg_limit[i] = segment["limit"]
        cpu.seg_flags[i] = segment["flags"] & SEG_FLAGS_BITS
    cpu.gdt_base, cpu.gdt_limit = values["gdt"]["base"], values["gdt"]["limit"]
    cpu.idt_base, cpu.idt_limit = values["idt"]["base"], values["idt"]["limit"]
    for i in range(16):
        cpu.xmm[2 * i], cpu.xmm[2 * i + 1] = values["xmm_regs"][i]["q0"], values["xmm_regs"][i]["q1"]
        cpu.ymmh[2 * i], cpu.ymmh[2 * i + 1] = values["ymmh_regs"][i]["q2"], values["ymmh_regs"][i]["q3"]
    for i, variable in enumerate(values["mtrr_var"]):
        cpu.mtrr_base[i], cpu.mtrr_mask[i] = variable["base"], variable["mask"]
    cpu.xstate_bv = values["xstate_bv"] | 3
    cpu.exception_injected = 1 if values["exception_nr"] >= 0 else 0
    cpu.error_code = 0
    cpu.shutdown = 0
    cpu.cc_op = cpu.cc_dst = cpu.cc_src = 0
    if values["tsc"] and ctx.clock is not None:
        # KVM. For TCG the "timer" section, loaded after this one, sets the TSC.
        cpu.tsc_offset = _signed64(values["tsc"] - ctx.clock.now())


def _signed64(value: int) -> int:
    return ((value + (1 << 63)) & _MASK64) - (1 << 63)


# -- subsections


def _register(
    subsection: str,
    wire_name: str,
    attribute: str,
    *,
    default: int = 0,
    kind: type[Integer] = U64,
    limit: int = _MASK64,
) -> Description:
    """A subsection of one register that is sent where it differs from ``default``."""

    def check(values: Values, ctx: LoadContext) -> None:
        if values[wire_name] > limit:
            raise refuse(wire_name, "a register is out of range", f"at most {limit:#x}", values[wire_name])

    return Description(
        f"cpu/{subsection}",
        1,
        [_env(kind, wire_name)],
        needed=lambda cpu, ctx: getattr(cpu, attribute) != default,
        pre_save=lambda cpu, ctx: {wire_name: int(getattr(cpu, attribute))},
        check=check,
        post_load=lambda cpu, values, ctx: setattr(cpu, attribute, values[wire_name]),
        absent=lambda cpu, ctx: setattr(cpu, attribute, default),
    )


def _check_exception_info(values: Values, ctx: LoadContext) -> None:
    for name in ("exception_pending", "exception_injected", "exception_has_payload"):
        one_of(values, name, (0, 1), "a flag is neither 0 nor 1")


def _load_exception_info(cpu: CpuState, values: Values, ctx: LoadContext) -> None:
    """Pending or injected is one thing outside nested guests; a payload is already due."""
    cpu.exception_injected = values["exception_injected"] | values["exception_pending"]
    if values["exception_pending"] and values["exception_has_payload"]:
        if cpu.exception_nr == 1:
            cpu.dr[6] = values["exception_payload"]
        elif cpu.exception_nr == 14:
            cpu.cr2 = values["exception_payload"]


_EXCEPTION_INFO = Description(
    "cpu/exception_info",
    1,
    [
        _env(U8, "exception_pending"),
        _env(U8, "exception_injected"),
        _env(U8, "exception_has_payload"),
        _env(U64, "exception_payload"),
    ],
    # QEMU sends it for nested guests only, which we have none of; exception_nr says the rest.
    needed=lambda cpu, ctx: False,
    pre_save=lambda cpu, ctx: {
        "exception_pending": 0,
        "exception_injected": int(cpu.exception_injected),
        "exception_has_payload": 0,
        "exception_payload": 0,
    },
    check=_check_exception_info,
    post_load=_load_exception_info,
)

_ERROR_CODE = Description(
    "cpu/error_code",
    1,
    [_env(I32, "error_code")],
    # QEMU 7.2 and 10.0 lack it and lose the code; newer ones have it.
    needed=lambda cpu, ctx: ctx.to_pyvcpu and bool(cpu.exception_has_error_code),
    pre_save=lambda cpu, ctx: {"error_code": _signed32(cpu.error_code)},
    post_load=lambda cpu, values, ctx: setattr(cpu, "error_code", values["error_code"]),
)

_FPOP_IP_DP = Description(
    "cpu/fpop_ip_dp",
    1,
    [_env(U16, "fpop"), _env(U64, "fpip"), _env(U64, "fpdp")],
    needed=lambda cpu, ctx: bool(cpu.fpu_opcode or cpu.fpu_ip or cpu.fpu_dp),
    pre_save=lambda cpu, ctx: {"fpop": int(cpu.fpu_opcode), "fpip": int(cpu.fpu_ip), "fpdp": int(cpu.fpu_dp)},
    post_load=lambda cpu, values, ctx: _set_fpu_pointers(cpu, values["fpop"], values["fpip"], values["fpdp"]),
    absent=lambda cpu, ctx: _set_fpu_pointers(cpu, 0, 0, 0),
)

_TSC_KHZ = Description(
    "cpu/tsc_khz",
    1,
    [_env(I64, "tsc_khz")],
    needed=lambda cpu, ctx: ctx.to_kvm and ctx.machine != "none",
    pre_save=lambda cpu, ctx: {"tsc_khz": TSC_KHZ},
    check=lambda values, ctx: one_of(values, "tsc_khz", range(1, 1 << 32), "a TSC frequency (kHz) is out of range"),
    # The rate is ours; the TSC goes on from its value.
    post_load=lambda cpu, values, ctx: None,
)

_TRIPLE_FAULT = Description(
    "cpu/triple_fault",
    1,
    [_env(U8, "triple_fault_pending")],
    needed=lambda cpu, ctx: bool(cpu.shutdown),
    pre_save=lambda cpu, ctx: {"triple_fault_pending": int(cpu.shutdown)},
    check=lambda values, ctx: one_of(values, "triple_fault_pending", (0, 1), "a flag is neither 0 nor 1"),
    post_load=lambda cpu, values, ctx: setattr(cpu, "shutdown", values["triple_fault_pending"]),
    absent=lambda cpu, ctx: setattr(cpu, "shutdown", 0),
)


def _set_fpu_pointers(cpu: CpuState, opcode: int, ip: int, dp: int) -> None:
    cpu.fpu_opcode, cpu.fpu_ip, cpu.fpu_dp = opcode, ip, dp


def _signed32(value: int) -> int:
    return ((value + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


CPU = Description(
    "cpu",
    12,
    _FIELDS,
    minimum_version_id=11,
    pre_save=_pre_save,
    check=check_cpu,
    post_load=_post_load,
    # In QEMU's order, in which they are sent.
    subsections=[
        _EXCEPTION_INFO,
        _ERROR_CODE,
        _register("poll_control_msr", "poll_control_msr", "poll_control_msr", default=1),
        _FPOP_IP_DP,
        _register("msr_tsc_adjust", "tsc_adjust", "tsc_adjust"),
        _register("msr_tscdeadline", "tsc_deadline", "tsc_deadline"),
        _register("msr_ia32_misc_enable", "msr_ia32_misc_enable", "misc_enable", default=1),
        _register("msr_ia32_feature_control", "msr_ia32_feature_control", "feature_control"),
        _register("xss", "xss", "xss"),
        _TSC_KHZ,
        _register("msr_smi_count", "msr_smi_count", "smi_count"),
        _register("pkru", "pkru", "pkru", kind=U32),
        _register("spec_ctrl", "spec_ctrl", "spec_ctrl"),
        _register("virt_ssbd", "virt_ssbd", "virt_ssbd"),
        _TRIPLE_FAULT,
    ],
)
"""The section "cpu"; its object is a :class:`~pyvcpu.cpu.state.CpuState`."""


# -- cpu_common

INTERRUPT_HARD, INTERRUPT_POLL, INTERRUPT_NMI = 0x2, 0x10, 0x200
_INTERRUPT_BITS = INTERRUPT_HARD | INTERRUPT_POLL | INTERRUPT_NMI


@dataclass
class CpuCommon:
    """What "cpu_common" speaks of: ``cpu`` (CpuState) and ``apic`` (LocalApic)."""

    cpu: Any
    apic: Any


def _save_common(common: CpuCommon, ctx: SaveContext) -> Values:
    """TCG delivers a vector that waits in IRR only if HARD is set.

    HARD with a vector that TPR or one in service holds back makes it deliver a spurious one, HARD with none at
    all kills the guest: so it is set for what can be delivered now.
    """
    request = INTERRUPT_HARD if common.apic.pending_vector() >= 0 else 0
    if common.cpu.nmi_pending:
        request |= INTERRUPT_NMI
    return {"halted": 1 if common.cpu.mp_state == MP_HALTED else 0, "interrupt_request": request}


def _check_common(values: Values, ctx: LoadContext) -> None:
    one_of(values, "halted", (0, 1), "a flag is neither 0 nor 1")
    only_bits(values, "interrupt_request", _INTERRUPT_BITS, "interrupt_request")
    apic = ctx.sections.get("apic/0")
    if values["interrupt_request"] & INTERRUPT_HARD and apic is not None and not any(apic["irr"]):
        raise refuse(
            "interrupt_request",
            "an interrupt is requested but no vector waits in the local APIC",
            values["interrupt_request"] & ~INTERRUPT_HARD,
            values["interrupt_request"],
        )


def _load_common(common: CpuCommon, values: Values, ctx: LoadContext) -> None:
    """HARD and POLL follow from the local APIC, so only HLT and NMI are state."""
    if values["halted"]:
        common.cpu.mp_state = MP_HALTED
    if values["interrupt_request"] & INTERRUPT_NMI:
        common.cpu.nmi_pending = 1


TCG_EXIT_REASONS = range(0x10000, 0x10006)
"""exception_index also says why TCG's loop ended last (interrupted, HLT, ...): no exception."""


def _check_exception_index(values: Values, ctx: LoadContext) -> None:
    if values["exception_index"] not in TCG_EXIT_REASONS:
        one_of(values, "exception_index", range(-1, 32), "an exception vector is out of range")


_EXCEPTION_INDEX = Description(
    "cpu_common/exception_index",
    1,
    [I32("exception_index")],
    # TCG's own pending exception; ours are always delivered before a state is saved, unless KVM left one.
    needed=lambda common, ctx: not ctx.to_kvm and common.cpu.exception_nr >= 0,
    pre_save=lambda common, ctx: {"exception_index": int(common.cpu.exception_nr)},
    check=_check_exception_index,
    post_load=lambda common, values, ctx: _load_exception_index(common.cpu, values["exception_index"]),
)


def _load_exception_index(cpu: CpuState, vector: int) -> None:
    cpu.exception_nr = -1 if vector in TCG_EXIT_REASONS else vector
    cpu.exception_injected = 1 if cpu.exception_nr >= 0 else 0


CPU_COMMON = Description(
    "cpu_common",
    1,
    [U32("halted"), U32("interrupt_request")],
    pre_save=_save_common,
    check=_check_common,
    post_load=_load_common,
    loads_after=("cpu", "apic"),
    subsections=[
        _EXCEPTION_INDEX,
        Description(
            "cpu_common/crash_occurred",
            1,
            [Bool("crash_occurred")],
            # The guest reported a panic to its machine: a note for the operator, no state of the CPU.
            needed=lambda common, ctx: False,
            pre_save=lambda common, ctx: {"crash_occurred": False},
            post_load=lambda common, values, ctx: None,
        ),
    ],
)
"""The section "cpu_common"; its object is a :class:`CpuCommon`."""
