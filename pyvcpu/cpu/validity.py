"""What can be the state of a CPU of ours: the check of the section "cpu" before anything is loaded.

Refused are bits that the processor reserves or that our engines do not have (what is not there would be lost without a
word), combinations that no sequence of instructions leads to, and numbers out of range. Every refusal names
the field, what could have been there and what was. Streams of QEMU's qemu64 pass, and so does every
state between two instructions of our own engine.

Sources: SDM 3A 2.5 (control registers), 3.4.5 (descriptors), 5.13 and 10.8.5 (IA-32e mode), 12.12 (PAT).
"""

from __future__ import annotations

from collections.abc import Iterator

from pyvcpu.cpu.hflags import SHADOW, compute_hflags, hflags_difference
from pyvcpu.cpu.injection import NOT_RESTARTED
from pyvcpu.cpu.layout import CS, DS, ES, MP_HALTED, MP_RUNNABLE, SEG_NAMES, SS
from pyvcpu.migration.vmstate.description import LoadContext, refuse
from pyvcpu.migration.vmstate.fields import Values

CR0_BITS = 0xE005003F  # PE MP EM TS ET NE WP AM NW CD PG
CR4_BITS = 0x000007FC  # TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT
EFER_BITS = 0xD01  # SCE LME LMA NXE
DR7_BREAKPOINTS = 0x20FF  # L0 to G3, GD
RFLAGS_BITS = 0x3F7FD7
HFLAGS2_BITS = 0x185  # GIF, NMI, IGNNE, VGIF; the others belong to nested guests, SMM and MPX
HF2_GIF, HF2_NMI = 1 << 0, 1 << 2
SEG_FLAGS_BITS = 0x00FFFF00  # 16-19 are bits of the limit, kept though they mean nothing here
MAXPHYADDR = 40

_PE, _PG = 1 << 0, 1 << 31
_PAE = 1 << 5
_LME, _LMA = 1 << 8, 1 << 10
_VM = 1 << 17
_SEG_P, _SEG_S, _SEG_L, _SEG_D = 1 << 15, 1 << 12, 1 << 21, 1 << 22


_SEGMENT_PATHS = (*(f"segs[{i}]" for i in range(6)), "ldt", "tr")
"""The field paths of the segments in the order of CpuState."""


def segments_of(values: Values) -> Iterator[tuple[str, Values]]:
    """(field path, values) of ES CS SS DS FS GS LDTR TR."""
    yield from zip(_SEGMENT_PATHS, [*values["segs"], values["ldt"], values["tr"]], strict=True)


def check_cpu(values: Values, ctx: LoadContext) -> None:
    """MigrationError unless the values of "cpu" can be loaded."""
    _check_control(values)
    _check_segments(values)
    _check_addresses(values)
    _check_events(values, ctx)
    _check_vectors(values)
    hflags = values["hflags"]
    segs = values["segs"]
    computed = compute_hflags(
        cr0=values["cr0"],
        cr4=values["cr4"],
        efer=values["efer"],
        rflags=values["eflags"],
        cs_flags=segs[CS]["flags"],
        ss_flags=segs[SS]["flags"],
        data_bases=segs[DS]["base"] | segs[ES]["base"] | segs[SS]["base"],
        dr7=values["dr"][7],
        xcr0=values["xcr0"],
        shadow=bool(hflags & SHADOW),
    )
    if hflags_difference(hflags, computed, values["eflags"]):
        raise refuse("hflags", "hflags contradict CR0, CR4, EFER, EFLAGS and the segments", computed, hflags)


def only_bits(values: Values, name: str, allowed: int, what: str) -> None:
    """Only bits of ``allowed`` may be set."""
    if values[name] & ~allowed:
        raise refuse(name, f"{what} has bits that this CPU does not have", f"none but {allowed:#x}", values[name])


def one_of(values: Values, name: str, allowed: tuple[int, ...] | range, message: str) -> None:
    """The value must be one of ``allowed``."""
    if values[name] not in allowed:
        if isinstance(allowed, range):
            expected = f"{allowed.start} to {allowed.stop - 1}"
        else:
            expected = " or ".join(f"{v:#x}" if v > 9 else str(v) for v in allowed)
        raise refuse(name, message, expected, values[name])


def _check_control(values: Values) -> None:
    cr0, cr4, efer, rflags = (values[name] for name in ("cr0", "cr4", "efer", "eflags"))
    only_bits(values, "cr0", CR0_BITS, "CR0")
    only_bits(values, "cr4", CR4_BITS, "CR4")
    only_bits(values, "efer", EFER_BITS, "EFER")
    only_bits(values, "eflags", RFLAGS_BITS, "RFLAGS")
    if not rflags & 2:
        raise refuse("eflags", "bit 1 of RFLAGS is always 1", rflags | 2, rflags)
    if cr0 & _PG and not cr0 & _PE:
        raise refuse("cr0", "paging needs protected mode", cr0 | _PE, cr0)
    if bool(efer & _LMA) != bool(efer & _LME and cr0 & _PG):
        raise refuse("efer", "LMA is set exactly when LME and paging are", efer ^ _LMA, efer)
    if efer & _LMA and not cr4 & _PAE:
        raise refuse("cr4", "long mode needs PAE", cr4 | _PAE, cr4)
    if rflags & _VM and (not cr0 & _PE or efer & _LMA):
        raise refuse("eflags", "virtual-8086 mode is part of 32-bit protected mode", rflags & ~_VM, rflags)
    if values["cr3"] >> MAXPHYADDR:
        raise refuse("cr3", "CR3 is beyond the physical address space", f"below 2**{MAXPHYADDR}", values["cr3"])
    for i in (6, 7):
        if values["dr"][i] >> 32:
            raise refuse(f"dr[{i}]", f"the upper half of DR{i} is 0", values["dr"][i] & 0xFFFFFFFF, values["dr"][i])
    if values["dr"][7] & DR7_BREAKPOINTS:
        raise refuse("dr[7]", "hardware breakpoints are not there", values["dr"][7] & ~DR7_BREAKPOINTS, values["dr"][7])
    one_of(values, "a20_mask", (-1, -1 - (1 << 20)), "the A20 mask is neither open nor closed")


def _check_segments(values: Values) -> None:
    long_mode, protected = values["efer"] & _LMA, values["cr0"] & _PE
    for index, (path, segment) in enumerate(segments_of(values)):
        if segment["selector"] > 0xFFFF:
            raise refuse(f"{path}/selector", "a selector has 16 bits", "0 to 0xffff", segment["selector"])
        # FS, GS, LDTR and TR have 64-bit bases; the others are 32 bits wide in every mode.
        if index in (ES, CS, SS, DS) and segment["base"] >> 32:
            raise refuse(f"{path}/base", f"the base of {SEG_NAMES[index]} has 32 bits", "below 2**32", segment["base"])
    for table in ("gdt", "idt"):
        for name in ("selector", "flags"):
            if values[table][name]:
                raise refuse(
                    f"{table}/{name}", "a descriptor-table register has only base and limit", 0, values[table][name]
                )
        if values[table]["limit"] > 0xFFFF:
            raise refuse(f"{table}/limit", "a table limit has 16 bits", "0 to 0xffff", values[table]["limit"])
    cs = values["segs"][CS]["flags"]
    if long_mode and cs & _SEG_L and cs & _SEG_D:
        raise refuse("segs[1]/flags", "a 64-bit code segment has D = 0", cs & ~_SEG_D, cs)
    if protected and not values["eflags"] & _VM and cs & (_SEG_P | _SEG_S) != _SEG_P | _SEG_S:
        raise refuse("segs[1]/flags", "CS is not a code segment that is present", cs | _SEG_P | _SEG_S, cs)


def _canonical(value: int) -> bool:
    return value >> 47 in (0, 0x1FFFF)


def _check_addresses(values: Values) -> None:
    flat: list[tuple[str, int]] = [
        (name, values[name]) for name in ("kernelgsbase", "lstar", "cstar", "sysenter_esp", "sysenter_eip")
    ]
    flat += [(f"{path}/base", segment["base"]) for path, segment in segments_of(values)]
    flat += [("gdt/base", values["gdt"]["base"]), ("idt/base", values["idt"]["base"])]
    # RIP itself may be not canonical: SYSRET and falling through the edge fault at the next fetch.
    wide = values["efer"] & _LMA and values["segs"][CS]["flags"] & _SEG_L
    if not wide and values["eip"] >> 32:
        raise refuse("eip", "EIP has 32 bits outside 64-bit mode", "below 2**32", values["eip"])
    for path, value in flat:
        if not _canonical(value):
            raise refuse(path, "an address is not canonical", "bits 63 to 47 equal", value)


def _check_events(values: Values, ctx: LoadContext) -> None:
    one_of(values, "mp_state", (MP_RUNNABLE, MP_HALTED), "a single CPU is either runnable or halted")
    one_of(values, "interrupt_injected", range(-1, 256), "an interrupt vector is out of range")
    one_of(values, "exception_nr", range(-1, 32), "an exception vector is out of range")
    if values["exception_nr"] in NOT_RESTARTED:
        raise refuse(
            "exception_nr", "this exception was being delivered and cannot begin again", -1, values["exception_nr"]
        )
    for name in ("soft_interrupt", "nmi_injected", "nmi_pending", "has_error_code"):
        one_of(values, name, (0, 1), "a flag is neither 0 nor 1")
    one_of(values, "sipi_vector", range(256), "a start-up vector is out of range")
    vector, apic = values["interrupt_injected"], ctx.sections.get("apic/0")
    if vector >= 0 and not values["soft_interrupt"] and apic and not apic["isr"][vector >> 5] >> (vector & 31) & 1:
        message = "an interrupt was being delivered that is not the local APIC's"
        raise refuse("interrupt_injected", message, "a vector in service", vector)
    only_bits(values, "hflags2", HFLAGS2_BITS, "hflags2")
    if not values["hflags2"] & HF2_GIF:
        raise refuse("hflags2", "GIF is 0: no interrupt would ever be taken", values["hflags2"] | 1, values["hflags2"])
    if values["tsc_offset"]:
        raise refuse("tsc_offset", "a nested guest's TSC offset is in force", 0, values["tsc_offset"])


def _check_vectors(values: Values) -> None:
    one_of(values, "fpregs_format_vmstate", (0,), "the x87 registers are in a format of long ago")
    one_of(values, "fptag_vmstate", range(256), "the abridged x87 tag has 8 bits")
    one_of(values, "mxcsr", range(0x10000), "the upper half of MXCSR is 0")
    one_of(values, "xcr0", (1, 3, 7), "XCR0 enables what this CPU does not have")
    only_bits(values, "xstate_bv", 7, "XSTATE_BV")
    for i in range(8):
        if (values["pat"] >> (8 * i)) & 0xFF not in (0, 1, 4, 5, 6, 7):
            raise refuse("pat", "a memory type in PAT does not exist", "each byte 0, 1 or 4 to 7", values["pat"])
