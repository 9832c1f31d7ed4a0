"""Numbers of a machine's state as people write them: bit names, descriptors, instants.

Every function takes a number and returns a short text. Bit positions: Intel SDM 1-3.4.3 (RFLAGS), 3A 2.5 (CR0,
CR4), 3A 2.2.1 (EFER), 3A 3.4.5 (segment descriptors), 3A 10.4 and 10.5 (local APIC), 1-10.2.3 (MXCSR);
hflags as QEMU packs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pyvcpu.cpu.layout import REG_NAMES, SEG_NAMES

RFLAGS = {0: "CF", 2: "PF", 4: "AF", 6: "ZF", 7: "SF", 8: "TF", 9: "IF", 10: "DF", 11: "OF", 14: "NT", 16: "RF",
          17: "VM", 18: "AC", 19: "VIF", 20: "VIP", 21: "ID"}  # fmt: skip
CR0 = {0: "PE", 1: "MP", 2: "EM", 3: "TS", 4: "ET", 5: "NE", 16: "WP", 18: "AM", 29: "NW", 30: "CD", 31: "PG"}
CR4 = {0: "VME", 1: "PVI", 2: "TSD", 3: "DE", 4: "PSE", 5: "PAE", 6: "MCE", 7: "PGE", 8: "PCE", 9: "OSFXSR",
       10: "OSXMMEXCPT", 11: "UMIP", 12: "LA57", 13: "VMXE", 14: "SMXE", 16: "FSGSBASE", 17: "PCIDE", 18: "OSXSAVE",
       20: "SMEP", 21: "SMAP", 22: "PKE", 23: "CET", 24: "PKS"}  # fmt: skip
EFER = {0: "SCE", 8: "LME", 10: "LMA", 11: "NXE", 12: "SVME", 14: "FFXSR"}
MXCSR = {0: "IE", 1: "DE", 2: "ZE", 3: "OE", 4: "UE", 5: "PE", 6: "DAZ", 7: "IM", 8: "DM", 9: "ZM", 10: "OM",
         11: "UM", 12: "PM", 15: "FTZ"}  # fmt: skip
XCR0 = {0: "x87", 1: "SSE", 2: "AVX", 3: "BNDREGS", 4: "BNDCSR", 5: "opmask", 6: "ZMM_Hi256", 7: "Hi16_ZMM", 9: "PKRU"}
HFLAGS = {3: "INHIBIT_IRQ", 4: "CS32", 5: "SS32", 6: "ADDSEG", 7: "PE", 8: "TF", 9: "MP", 10: "EM", 11: "TS",
          14: "LMA", 15: "CS64", 16: "RF", 17: "VM", 18: "AC", 19: "SMM", 20: "SVME", 21: "GUEST", 22: "OSFXSR",
          23: "SMAP", 24: "IOBPT", 25: "MPX", 26: "BND", 27: "UMIP", 28: "AVX"}  # fmt: skip
HFLAGS2 = {0: "GIF", 1: "HIF", 2: "NMI", 3: "VINTR", 4: "SMM_INSIDE_NMI", 5: "MPX_PR", 6: "NPT", 7: "IGNNE", 8: "VGIF"}
INTERRUPT_REQUEST = {1: "HARD", 4: "POLL", 6: "SMI", 9: "NMI", 10: "INIT", 11: "SIPI", 12: "MCE"}
FPU_STATUS = {0: "IE", 1: "DE", 2: "ZE", 3: "OE", 4: "UE", 5: "PE", 6: "SF", 7: "ES", 8: "C0", 9: "C1", 10: "C2",
              14: "C3", 15: "B"}  # fmt: skip
MP_STATES = ("runnable", "uninitialised", "INIT received", "halted", "SIPI received")
PAT = {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB", 7: "UC-"}
SYSTEM_TYPES = {1: "TSS16", 2: "LDT", 3: "busy TSS16", 4: "call gate 16", 5: "task gate", 6: "interrupt gate 16",
                7: "trap gate 16", 9: "TSS", 11: "busy TSS", 12: "call gate", 14: "interrupt gate",
                15: "trap gate"}  # fmt: skip
LVT_NAMES = ("timer", "thermal", "perf", "lint0", "lint1", "error")
DELIVERY = ("fixed", "lowest", "SMI", "reserved", "NMI", "INIT", "SIPI", "ExtINT")
TIMER_MODES = ("one-shot", "periodic", "TSC-deadline", "reserved")


def number(value: int) -> str:
    """Hex from ten on; negative numbers in decimal."""
    return f"{value:#x}" if value > 9 else str(value)


def bits(value: int, names: dict[int, str], *extra: str) -> str:
    """``0x246 [PF ZF IF]``; bits without a name as bit numbers are left out, ``extra`` goes last."""
    words = [name for bit, name in names.items() if value >> bit & 1]
    return f"{value:#x} [{' '.join([*words, *(e for e in extra if e)])}]"


def rflags(value: int) -> str:
    iopl = value >> 12 & 3
    return bits(value, RFLAGS, f"IOPL={iopl}" if iopl else "")


def hflags(value: int) -> str:
    iopl = value >> 12 & 3
    return bits(value, HFLAGS, f"CPL={value & 3}", f"IOPL={iopl}" if iopl else "")


def fpu_status(value: int) -> str:
    return bits(value, FPU_STATUS, f"TOP={value >> 11 & 7}")


def fpu_control(value: int) -> str:
    rounding = ("nearest", "down", "up", "zero")[value >> 10 & 3]
    precision = ("24", "reserved", "53", "64")[value >> 8 & 3]
    masked = [name for bit, name in enumerate(("IM", "DM", "ZM", "OM", "UM", "PM")) if value >> bit & 1]
    return f"{value:#x} [{' '.join(masked)} precision={precision} rounding={rounding}]"


def mxcsr(value: int) -> str:
    return bits(value, MXCSR, "rounding=" + ("nearest", "down", "up", "zero")[value >> 13 & 3])


def segment_flags(flags: int) -> str:
    """The attributes of a descriptor: bits 8 to 23 of its second dword, in place."""
    kind = flags >> 8 & 15
    if not flags >> 12 & 1:
        words = [SYSTEM_TYPES.get(kind, f"system type {kind}")]
    elif kind & 8:
        words = ["code", "conforming" if kind & 4 else "", "read" if kind & 2 else "execute-only"]
    else:
        words = ["data", "expand-down" if kind & 4 else "", "write" if kind & 2 else "read-only"]
    if flags >> 12 & 1:
        words.append("accessed" if kind & 1 else "")
        words.append("64-bit" if flags >> 21 & 1 else "32-bit" if flags >> 22 & 1 else "16-bit")
    words.append(f"DPL={flags >> 13 & 3}")
    words.append("" if flags >> 15 & 1 else "not present")
    words.append("4K" if flags >> 23 & 1 else "")
    return f"{flags:#x} [{' '.join(w for w in words if w)}]"


def segment(values: dict[str, Any]) -> str:
    """One line for a segment register."""
    return (
        f"{values['selector']:04x} base={values['base']:#x} limit={values['limit']:#x} {segment_flags(values['flags'])}"
    )


def table(values: dict[str, Any]) -> str:
    """GDTR or IDTR: of the four fields two have a meaning."""
    return f"base={values['base']:#x} limit={values['limit']:#x}"


def vector(values: dict[str, Any]) -> str:
    """128 bits, the high half first."""
    low, high = values.values()
    return f"{high:016x}_{low:016x}" if low or high else "0"


def extended(values: dict[str, Any]) -> str:
    """An x87 register: its bits and its value (SDM 1-4.2)."""
    mantissa, exponent = values["tmp_mant"], values["tmp_exp"]
    sign = -1.0 if exponent >> 15 else 1.0
    power = exponent & 0x7FFF
    if power == 0x7FFF:
        shown = "infinity" if mantissa == 1 << 63 else "NaN"
    else:
        try:
            shown = repr(math.ldexp(sign * mantissa, max(power, 1) - 16383 - 63))
        except OverflowError:
            shown = "beyond double"
    return f"{exponent:04x}:{mantissa:016x} [{shown}]" if mantissa or exponent else "0"


def mtrr(values: dict[str, Any]) -> str:
    return f"base={values['base']:#x} mask={values['mask']:#x}"


def pat(value: int) -> str:
    types = [PAT.get(value >> 8 * i & 0xFF, "?") for i in range(8)]
    return f"{value:#x} [{' '.join(types)}]"


def mp_state(value: int) -> str:
    return f"{value} [{MP_STATES[value] if value < len(MP_STATES) else 'unknown'}]"


def apicbase(value: int) -> str:
    return bits(value, {8: "BSP", 10: "x2APIC", 11: "enabled"}, f"at {value & ~0xFFF:#x}")


def spurious(value: int) -> str:
    return f"{value:#x} [{'enabled' if value >> 8 & 1 else 'disabled'} vector={value & 0xFF:#x}]"


def lvt(value: int) -> str:
    words = [f"vector={value & 0xFF:#x}", DELIVERY[value >> 8 & 7]]
    words += [
        name
        for bit, name in {12: "pending", 13: "low", 14: "remote-IRR", 15: "level", 16: "masked"}.items()
        if value >> bit & 1
    ]
    return f"{value:#x} [{' '.join(words)}]"


def lvt_timer(value: int) -> str:
    masked = " masked" if value >> 16 & 1 else ""
    return f"{value:#x} [vector={value & 0xFF:#x} {TIMER_MODES[value >> 17 & 3]}{masked}]"


def divider(value: int) -> str:
    """The timer's divide configuration (SDM 3A figure 11-10)."""
    shift = (((value & 3) | (value >> 1 & 4)) + 1) & 7
    return f"{value:#x} [by {1 << shift}]"


def nanoseconds(value: int) -> str:
    return f"{value} [{value / 1e9:.9f} s]"


def expiry(value: int) -> str:
    return "-1 [off]" if value == -1 else nanoseconds(value)


def text(value: bytes) -> str:
    """A C string in a buffer."""
    return repr(value.partition(b"\0")[0].decode("latin-1"))


def vectors(words: list[int]) -> str:
    """ISR, TMR or IRR as the vectors in it."""
    found = [f"{32 * i + bit:#x}" for i, word in enumerate(words) for bit in range(32) if word >> bit & 1]
    return f"[{' '.join(found)}]" if found else "[none]"


def fill(value: bytes) -> str:
    """A buffer; many equal bytes as one."""
    if len(value) > 16 and len(set(value)) == 1:
        return f"{len(value)} x {value[0]:02x}"
    return value.hex(" ") if len(value) <= 64 else f"{value[:64].hex(' ')} ... ({len(value)} bytes)"


Explain = Callable[[Any], str]

FIELDS: dict[tuple[str, str], Explain] = {
    ("cpu", "eflags"): rflags,
    ("cpu", "hflags"): hflags,
    ("cpu", "hflags2"): lambda v: bits(v, HFLAGS2),
    ("cpu", "fpuc"): fpu_control,
    ("cpu", "fpus_vmstate"): fpu_status,
    ("cpu", "mxcsr"): mxcsr,
    ("cpu", "cr0"): lambda v: bits(v, CR0),
    ("cpu", "cr4"): lambda v: bits(v, CR4),
    ("cpu", "efer"): lambda v: bits(v, EFER),
    ("cpu", "xcr0"): lambda v: bits(v, XCR0),
    ("cpu", "xstate_bv"): lambda v: bits(v, XCR0),
    ("cpu", "pat"): pat,
    ("cpu", "mp_state"): mp_state,
    ("cpu", "gdt"): table,
    ("cpu", "idt"): table,
    ("cpu_common", "interrupt_request"): lambda v: bits(v, INTERRUPT_REQUEST),
    ("apic", "apicbase"): apicbase,
    ("apic", "spurious_vec"): spurious,
    ("apic", "divide_conf"): divider,
    ("apic", "isr"): vectors,
    ("apic", "tmr"): vectors,
    ("apic", "irr"): vectors,
    ("apic", "lvt[0]"): lvt_timer,
    **{("apic", f"lvt[{i}]"): lvt for i in range(1, 6)},
    ("apic", "initial_count_load_time"): nanoseconds,
    ("apic", "next_time"): nanoseconds,
    ("apic", "timer_expiry"): expiry,
    ("timer", "cpu_clock_offset"): nanoseconds,
    ("globalstate", "runstate"): text,
    ("configuration", "name"): text,
}
"""(section, field path) -> how to write it."""

STRUCTURES: dict[frozenset[str], Explain] = {
    frozenset(("selector", "base", "limit", "flags")): segment,
    frozenset(("q0", "q1")): vector,
    frozenset(("q2", "q3")): vector,
    frozenset(("tmp_mant", "tmp_exp")): extended,
    frozenset(("base", "mask")): mtrr,
}
"""The fields of a structure -> how to write it in one line."""

ALIASES: dict[tuple[str, str], str] = {
    **{("cpu", f"regs[{i}]"): name for i, name in enumerate(REG_NAMES)},
    **{("cpu", f"segs[{i}]"): name for i, name in enumerate(SEG_NAMES[:6])},
    **{("cpu", f"xmm_regs[{i}]"): f"xmm{i}" for i in range(16)},
    **{("cpu", f"dr[{i}]"): f"dr{i}" for i in range(8)},
    ("cpu", "eip"): "rip",
    ("cpu", "eflags"): "rflags",
    **{("apic", f"lvt[{i}]"): f"lvt_{name}" for i, name in enumerate(LVT_NAMES)},
}
"""(section, field path) -> the name that people use for it; a path may use it too."""


def explain(section: str, path: str, value: Any) -> str:
    """A value as text, by what it is."""
    rule = FIELDS.get((section, path))
    if rule is not None:
        return rule(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return number(value)
    if isinstance(value, bytes):
        return fill(value)
    if isinstance(value, dict):
        shape = STRUCTURES.get(frozenset(value))
        return shape(value) if shape else ""
    if isinstance(value, list) and value and not any(isinstance(item, dict | list | bytes) for item in value):
        if not any(value):
            return f"{len(value)} x 0"
        return " ".join(number(item) if isinstance(item, int) else str(item) for item in value)
    return str(value) if isinstance(value, str) else ""
