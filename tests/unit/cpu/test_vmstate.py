"""The sections "cpu" and "cpu_common": what CpuState becomes, what comes back, what is refused."""

from __future__ import annotations

import pytest

from pyvcpu.accel.tcg.helpers import system
from pyvcpu.accel.tcg.mmu import PHYSICAL_BITS
from pyvcpu.clock import IcountClock
from pyvcpu.cpu import msr, validity
from pyvcpu.cpu.layout import CS, FS, GS, MP_HALTED, MP_RUNNABLE, SS
from pyvcpu.cpu.state import CpuState
from pyvcpu.cpu.vmstate import (
    CPU,
    CPU_COMMON,
    INTERRUPT_HARD,
    INTERRUPT_NMI,
    INTERRUPT_POLL,
    CpuCommon,
    from_kvm,
    guest_tsc,
)
from pyvcpu.errors import MigrationError
from pyvcpu.migration.vmstate.codec import decode_section, save_section
from pyvcpu.migration.vmstate.description import LoadContext, SaveContext, SectionEntry

HIGH = 0xFFFF_8000_0000_0000
PEERS = ("pyvcpu", "qemu-7.2-tcg", "qemu-7.2-kvm", "qemu-10.0-tcg", "qemu-10.0-kvm")


def long_mode() -> CpuState:
    """A CPU in 64-bit ring 0 in which every field that can be is not what it is at reset."""
    cpu = CpuState()
    cpu.reset()
    for i in range(16):
        cpu.regs[i] = 0x0123_4567_89AB_CDEF * (i + 1) % (1 << 64)
        cpu.xmm[2 * i], cpu.xmm[2 * i + 1] = i + 1, (i + 1) << 60
        cpu.ymmh[2 * i], cpu.ymmh[2 * i + 1] = i + 100, (i + 100) << 50
    cpu.rip, cpu.rflags = HIGH + 0x1234, 0x40AD7
    cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4 = 0xE0000033, 0xDEAD_BEEF_F00D, 0x1000, 0x620
    cpu.efer = 0xD01
    cpu.seg_flags[CS], cpu.seg_selector[CS], cpu.seg_base[CS], cpu.seg_limit[CS] = 0xAF9B00, 8, 0, 0xFFFFFFFF
    cpu.seg_flags[SS], cpu.seg_selector[SS], cpu.seg_limit[SS] = 0xCF9300, 16, 0xFFFFFFFF
    cpu.seg_base[FS], cpu.seg_base[GS] = 0x7FFF_0000_1000, HIGH
    cpu.gdt_base, cpu.gdt_limit, cpu.idt_base, cpu.idt_limit = HIGH + 0x8000, 0x7F, HIGH + 0x9000, 0xFFF
    cpu.dr[0], cpu.dr[7] = 0x1000, 0xF0400
    cpu.fpu_control, cpu.fpu_status, cpu.fpu_tag = 0x27F, 0x3800 >> 1 | 0x41, 0xF0
    cpu.fpu_opcode, cpu.fpu_ip, cpu.fpu_dp = 0x1D9, HIGH, 0x2000
    for i in range(8):
        cpu.st_mantissa[i], cpu.st_exponent[i] = 1 << 63 | i, 0x3FFF + i
        cpu.mtrr_base[i], cpu.mtrr_mask[i] = i << 20, 0xFF_0000_0800
    cpu.mxcsr, cpu.pkru = 0x1FA0, 0x55555554
    cpu.sysenter_cs, cpu.sysenter_esp, cpu.sysenter_eip = 0x10, HIGH + 1, HIGH + 2
    cpu.star, cpu.lstar, cpu.cstar, cpu.fmask, cpu.kernelgsbase = 0x23_0008_0000_0000, HIGH + 3, HIGH + 4, 0x47700, 77
    cpu.pat, cpu.tsc_aux, cpu.tsc_offset = 0x0407_0506_0107_0106, 9, -12345
    cpu.tsc_adjust, cpu.misc_enable, cpu.feature_control, cpu.spec_ctrl = 5, 0x801, 1, 2
    cpu.virt_ssbd, cpu.xss, cpu.smi_count, cpu.poll_control_msr = 4, 0x100, 3, 0
    cpu.system_time_msr, cpu.wall_clock_msr = 0x3000, 0x4000
    cpu.interrupt_shadow = cpu.nmi_masked = cpu.nmi_pending = 1
    cpu.mp_state, cpu.xstate_bv, cpu.smbase, cpu.v_tpr = MP_HALTED, 7, 0xA0000, 3
    cpu.mtrr_deftype, cpu.mcg_status, cpu.sipi_vector = 0xC06, 1, 0x12
    for i in range(11):
        cpu.mtrr_fixed[i] = 0x0606060606060606 + i
    cpu.mce_banks[5] = 0xBE
    return cpu


def through(cpu: CpuState, peer: str = "pyvcpu", clock: IcountClock | None = None) -> CpuState:
    """Save, encode, decode, load into another CPU."""
    clock = clock or IcountClock()
    data, _ = save_section(SectionEntry(CPU, 0, cpu), SaveContext(profile=peer, clock=clock, machine="microvm"))
    values, _ = decode_section(CPU, data)
    target = CpuState()
    target.reset()
    target.restore(bytes(b ^ 0x5A for b in target.snapshot()))  # nothing of the old state may survive
    CPU.load(target, values, LoadContext(clock=clock))
    return target


def changes(cpu: CpuState, other: CpuState) -> set[str]:
    left, right = cpu.architectural(), other.architectural()
    return {name for name in left if left[name] != right[name]}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("make", [long_mode, None], ids=["long mode", "reset"])
def test_the_whole_state_comes_back(peer, make):
    """All of it but the TSC, which the section "timer" brings (or, for KVM, tsc)."""
    cpu = make() if make else CpuState()
    if not make:
        cpu.reset()
    assert changes(cpu, through(cpu, peer)) - {"tsc_offset"} == set()


def test_the_size_is_that_of_version_12():
    cpu = CpuState()
    cpu.reset()
    cpu.poll_control_msr = 1  # QEMU's default, for which nothing is sent
    data, _ = save_section(SectionEntry(CPU, 0, cpu), SaveContext(profile="qemu-7.2-tcg", clock=IcountClock()))
    assert len(data) == 1817


def test_version_11_has_no_avx():
    values = CPU.save(long_mode(), SaveContext(clock=IcountClock()))
    del values["subsections"]
    data = CPU.encode(values)[: 1817 - 8 - 8 - 256]
    older, _ = decode_section(CPU, data, version_id=11)
    assert older["regs"] == values["regs"] and older["ymmh_regs"] == [{"q2": 0, "q3": 0}] * 16


# -- subsections


def sent(cpu: CpuState, peer: str = "pyvcpu", machine: str = "none") -> set[str]:
    values = CPU.save(cpu, SaveContext(profile=peer, clock=IcountClock(), machine=machine))
    return {name.removeprefix("cpu/") for name in values.get("subsections", {})}


@pytest.mark.parametrize(
    ("attribute", "default", "value", "name"),
    [
        ("poll_control_msr", 1, 0, "poll_control_msr"),
        ("fpu_opcode", 0, 1, "fpop_ip_dp"),
        ("fpu_ip", 0, 1, "fpop_ip_dp"),
        ("fpu_dp", 0, 1, "fpop_ip_dp"),
        ("tsc_adjust", 0, 1, "msr_tsc_adjust"),
        ("tsc_deadline", 0, 1, "msr_tscdeadline"),
        ("misc_enable", 1, 0, "msr_ia32_misc_enable"),
        ("feature_control", 0, 5, "msr_ia32_feature_control"),
        ("xss", 0, 1, "xss"),
        ("smi_count", 0, 1, "msr_smi_count"),
        ("pkru", 0, 1, "pkru"),
        ("spec_ctrl", 0, 1, "spec_ctrl"),
        ("virt_ssbd", 0, 1, "virt_ssbd"),
        ("shutdown", 0, 1, "triple_fault"),
    ],
)
def test_a_subsection_is_sent_exactly_where_its_register_is_not_the_default(attribute, default, value, name):
    cpu = CpuState()
    cpu.reset()
    setattr(cpu, attribute, default)
    assert name not in sent(cpu)
    setattr(cpu, attribute, value)
    assert name in sent(cpu)
    assert getattr(through(cpu), attribute) == value
    setattr(cpu, attribute, default)
    assert getattr(through(cpu), attribute) == default  # not sent: the default, not what was there


def test_the_tsc_rate_goes_to_kvm_machines_that_save_it():
    cpu = CpuState()
    cpu.reset()
    assert "tsc_khz" in sent(cpu, "qemu-7.2-kvm", "microvm")
    assert "tsc_khz" not in sent(cpu, "qemu-7.2-kvm", "none")
    assert "tsc_khz" not in sent(cpu, "qemu-7.2-tcg", "microvm")


def test_an_error_code_is_only_sent_where_it_is_understood():
    cpu = long_mode()
    cpu.exception_nr, cpu.exception_has_error_code, cpu.error_code, cpu.exception_injected = 14, 1, 0x80000006, 1
    assert "error_code" in sent(cpu)
    assert "error_code" not in sent(cpu, "qemu-7.2-kvm")
    other = through(cpu)
    assert (other.exception_nr, other.error_code, other.exception_injected) == (14, 0x80000006, 1)


def test_a_pending_exception_of_kvm_is_as_good_as_injected():
    values = CPU.save(long_mode(), SaveContext(clock=IcountClock()))
    values["exception_nr"] = 14
    info = {"exception_pending": 1, "exception_injected": 0, "exception_has_payload": 1, "exception_payload": 0xABC}
    values["subsections"]["cpu/exception_info"] = info
    cpu = CpuState()
    CPU.load(cpu, values, LoadContext())
    assert (cpu.exception_injected, cpu.cr2) == (1, 0xABC)


def test_a_deadline_is_refused_where_it_would_be_lost():
    cpu = long_mode()
    cpu.tsc_deadline = 1000
    for peer in ("qemu-7.2-tcg", "qemu-10.0-tcg"):
        with pytest.raises(MigrationError, match="deadline"):
            sent(cpu, peer)
    assert "msr_tscdeadline" in sent(cpu, "qemu-7.2-kvm")


# -- what the hooks translate


def test_the_x87_stack_is_turned_for_kvm():
    cpu = long_mode()
    top = cpu.fpu_status >> 11 & 7
    assert top == 3
    ctx = SaveContext(profile="qemu-7.2-tcg", clock=IcountClock())
    assert CPU.save(cpu, ctx)["fpregs"][top]["tmp_exp"] == cpu.st_exponent[top]
    ctx.profile = "qemu-7.2-kvm"
    assert CPU.save(cpu, ctx)["fpregs"][0]["tmp_exp"] == cpu.st_exponent[top]


def test_kvm_is_known_by_its_tsc_its_rate_or_its_clock():
    values = CPU.save(long_mode(), SaveContext(profile="qemu-7.2-tcg", clock=IcountClock()))
    assert not from_kvm(values, LoadContext())
    assert from_kvm(values | {"tsc": 1}, LoadContext())
    assert from_kvm(values | {"subsections": {"cpu/tsc_khz": {"tsc_khz": 1}}}, LoadContext())
    assert from_kvm(values, LoadContext(sections={"kvmclock/0": {}}))


def test_the_tsc_goes_on_through_kvm():
    clock = IcountClock()
    clock.set_now(1_000_000)
    cpu = long_mode()
    cpu.tsc_offset = 5_000
    other = through(cpu, "qemu-7.2-kvm", clock)
    assert guest_tsc(other, clock) == guest_tsc(cpu, clock) == 1_005_000


def test_xstate_bv_never_makes_kvm_forget_sse():
    cpu = CpuState()
    cpu.reset()
    cpu.xstate_bv = 0
    save = SaveContext(clock=IcountClock())
    assert CPU.save(cpu, save)["xstate_bv"] == 3
    cpu.ymmh[31] = 1
    assert CPU.save(cpu, save)["xstate_bv"] == 7


def test_the_nmi_mask_and_the_shadow_have_their_bits():
    cpu = CpuState()
    cpu.reset()
    save = SaveContext(clock=IcountClock())
    assert CPU.save(cpu, save)["hflags2"] == 0x101
    cpu.nmi_masked = cpu.interrupt_shadow = 1
    values = CPU.save(cpu, save)
    assert (values["hflags2"], values["hflags"]) == (0x105, 0x48)


def test_flags_of_a_segment_are_those_that_it_can_have():
    values = CPU.save(long_mode(), SaveContext(clock=IcountClock()))
    values["segs"][3]["flags"] = 0x12CF93AB  # TCG keeps the base's and the limit's bits too
    cpu = CpuState()
    CPU.load(cpu, values, LoadContext())
    assert cpu.seg_flags[3] == 0x00CF9300


# -- refused


def broken(**change):
    values = CPU.save(long_mode(), SaveContext(clock=IcountClock()))
    for path, value in change.items():
        *outer, last = path.split("__")
        target = values
        for key in outer:
            target = target[int(key)] if key.isdigit() else target[key]
        target[int(last) if last.isdigit() else last] = value
    return values


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"eflags": 0}, "eflags"),
        ({"eflags": 0x8002}, "eflags"),
        ({"eflags": 1 << 22 | 2}, "eflags"),
        ({"eflags": 0x20002}, "eflags"),  # virtual-8086 mode in long mode
        ({"cr0": 0xE0000032}, "cr0"),  # paging without protection
        ({"cr0": 0x1_E0000033}, "cr0"),
        ({"cr4": 0x600}, "cr4"),  # long mode without PAE
        ({"cr4": 0x1620}, "cr4"),  # 5-level paging
        ({"efer": 0x901}, "efer"),  # paging and LME without LMA
        ({"efer": 0x401, "cr0": 0x60000033}, "efer"),
        ({"efer": 0x1D01}, "efer"),
        ({"cr3": 1 << 40}, "cr3"),
        ({"dr__7": 1 << 32}, "dr[7]"),
        ({"a20_mask": 0}, "a20_mask"),
        ({"dr__7": 0x402}, "dr[7]"),
        ({"lstar": 1 << 47}, "lstar"),
        ({"kernelgsbase": 0xFFFF_7FFF_FFFF_FFFF}, "kernelgsbase"),
        ({"segs__4__base": 1 << 48}, "segs[4]/base"),
        ({"segs__3__base": 1 << 32}, "segs[3]/base"),
        ({"segs__3__selector": 0x10000}, "segs[3]/selector"),
        ({"segs__1__flags": 0xEF9B00}, "segs[1]/flags"),  # L and D
        ({"segs__1__flags": 0xAF1B00}, "segs[1]/flags"),  # not present
        ({"tr__base": 1 << 60}, "tr/base"),
        ({"gdt__limit": 0x10000}, "gdt/limit"),
        ({"idt__base": 1 << 50}, "idt/base"),
        ({"gdt__flags": 1}, "gdt/flags"),
        ({"hflags": 0}, "hflags"),
        ({"hflags": 0x40C2B8 & ~0x8000}, "hflags"),
        ({"hflags2": 0x100}, "hflags2"),  # GIF
        ({"hflags2": 0x109}, "hflags2"),
        ({"mp_state": 1}, "mp_state"),
        ({"mp_state": 0xFFFFFFFF}, "mp_state"),
        ({"exception_nr": 32}, "exception_nr"),
        ({"exception_nr": -2}, "exception_nr"),
        ({"exception_nr": 1}, "exception_nr"),  # RIP may be past what raised it
        ({"interrupt_injected": 256}, "interrupt_injected"),
        ({"nmi_pending": 2}, "nmi_pending"),
        ({"sipi_vector": 256}, "sipi_vector"),
        ({"tsc_offset": 1}, "tsc_offset"),
        ({"fpregs_format_vmstate": 1}, "fpregs_format_vmstate"),
        ({"fptag_vmstate": 0x100}, "fptag_vmstate"),
        ({"mxcsr": 0x10000}, "mxcsr"),
        ({"xcr0": 0}, "xcr0"),
        ({"xcr0": 5}, "xcr0"),
        ({"xstate_bv": 8}, "xstate_bv"),
        ({"pat": 2}, "pat"),
    ],
)
def test_what_no_cpu_can_be_is_refused_and_changes_nothing(change, path):
    values = broken(**change)
    cpu = CpuState()
    cpu.reset()
    before = cpu.snapshot()
    with pytest.raises(MigrationError) as error:
        CPU.load(cpu, values, LoadContext())
    assert error.value.field == path
    assert error.value.expected is not None and error.value.got is not None
    assert cpu.snapshot() == before


def test_the_unbroken_state_is_accepted():
    CPU.check(broken(), LoadContext())
    CPU.check(broken(eip=0x8000_0000_0000), LoadContext())  # faults at the next fetch


def test_32_bit_code_has_a_32_bit_eip():
    cpu = CpuState()
    cpu.reset()
    values = CPU.save(cpu, SaveContext(clock=IcountClock()))
    with pytest.raises(MigrationError) as error:
        CPU.check(values | {"eip": 1 << 32}, LoadContext())
    assert error.value.field == "eip"


def test_what_is_refused_is_what_the_engine_does_not_have():
    assert validity.CR0_BITS == system.CR0_BITS
    assert validity.CR4_BITS == system.CR4_BITS
    assert validity.DR7_BREAKPOINTS == system.DR7_ENABLE | system.DR7_GD
    assert validity.MAXPHYADDR == PHYSICAL_BITS
    assert validity.EFER_BITS == msr.EFER_SCE | msr.EFER_LME | msr.EFER_LMA | msr.EFER_NXE


# -- cpu_common


class Apic:
    def __init__(self, irr=0, deliverable=-1):
        self.irr = [0, irr] + [0] * 6
        self.deliverable = deliverable

    def pending_vector(self):
        return self.deliverable


def common(apic=None, **state):
    cpu = CpuState()
    cpu.reset()
    for name, value in state.items():
        setattr(cpu, name, value)
    return CpuCommon(cpu, apic or Apic())


def saved(holder, peer="qemu-7.2-tcg"):
    return CPU_COMMON.save(holder, SaveContext(profile=peer, clock=IcountClock()))


def test_hlt_is_said_twice():
    holder = common(mp_state=MP_HALTED)
    assert saved(holder) == {"halted": 1, "interrupt_request": 0}
    assert saved(common()) == {"halted": 0, "interrupt_request": 0}
    # TCG writes mp_state 0 for a halted CPU: what cpu_common says counts.
    target = common(mp_state=MP_RUNNABLE)
    CPU_COMMON.load(target, saved(holder), LoadContext())
    assert target.cpu.mp_state == MP_HALTED
    # KVM writes mp_state 3, and halted need not be set.
    CPU_COMMON.load(target, {"halted": 0, "interrupt_request": 0}, LoadContext())
    assert target.cpu.mp_state == MP_HALTED


def test_hard_is_set_for_what_can_be_delivered():
    assert saved(common(Apic(1, 32)))["interrupt_request"] == INTERRUPT_HARD
    assert saved(common(Apic(1, -1)))["interrupt_request"] == 0
    assert saved(common(nmi_pending=1))["interrupt_request"] == INTERRUPT_NMI


def test_an_nmi_of_tcg_arrives():
    target = common()
    CPU_COMMON.load(target, {"halted": 0, "interrupt_request": INTERRUPT_NMI | INTERRUPT_POLL}, LoadContext())
    assert target.cpu.nmi_pending == 1


def test_a_request_without_a_vector_is_refused():
    values = {"halted": 0, "interrupt_request": INTERRUPT_HARD}
    with pytest.raises(MigrationError, match="no vector"):
        CPU_COMMON.check(values, LoadContext(sections={"apic/0": {"irr": [0] * 8}}))
    CPU_COMMON.check(values, LoadContext(sections={"apic/0": {"irr": [0, 1] + [0] * 6}}))


@pytest.mark.parametrize(
    "values", [{"halted": 2}, {"interrupt_request": 0x40}, {"interrupt_request": 0x400}, {"interrupt_request": 1 << 31}]
)
def test_other_requests_are_refused(values):
    with pytest.raises(MigrationError):
        CPU_COMMON.check({"halted": 0, "interrupt_request": 0} | values, LoadContext())


def test_why_tcgs_loop_ended_is_no_exception():
    values = {
        "halted": 1,
        "interrupt_request": 0,
        "subsections": {"cpu_common/exception_index": {"exception_index": 0x10003}},
    }
    target = common()
    CPU_COMMON.load(target, values, LoadContext())
    assert target.cpu.exception_nr == -1
    values["subsections"]["cpu_common/exception_index"]["exception_index"] = 99
    with pytest.raises(MigrationError):
        CPU_COMMON.check(values, LoadContext())


def test_an_interrupt_being_delivered_must_be_in_service():
    values = broken(interrupt_injected=0x41)
    CPU.check(values, LoadContext())
    with pytest.raises(MigrationError, match="local APIC"):
        CPU.check(values, LoadContext(sections={"apic/0": {"isr": [0] * 8}}))
    CPU.check(values, LoadContext(sections={"apic/0": {"isr": [0, 0, 2] + [0] * 5}}))
    CPU.check(broken(interrupt_injected=0x41, soft_interrupt=1), LoadContext(sections={"apic/0": {"isr": [0] * 8}}))


def test_tcgs_pending_exception():
    holder = common(exception_nr=13)
    values = saved(holder)
    assert values["subsections"] == {"cpu_common/exception_index": {"exception_index": 13}}
    assert "subsections" not in saved(holder, "qemu-7.2-kvm")
    target = common()
    CPU_COMMON.load(target, values, LoadContext())
    assert (target.cpu.exception_nr, target.cpu.exception_injected) == (13, 1)
