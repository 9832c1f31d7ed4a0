"""The section "apic" version 3: 181 bytes, one local APIC.

    apicbase u32 | id arb_id tpr u8 | spurious_vec u32 | log_dest dest_mode u8
    | isr[8] tmr[8] irr[8] u32 | lvt[6] u32 | esr u32 | icr[2] u32
    | divide_conf u32 | count_shift i32 | initial_count u32
    | initial_count_load_time next_time timer_expiry i64 (ns of virtual time; expiry -1 = off)
    | apic_sipi: sipi_vector wait_for_sipi i32        (only while it waits for a start-up IPI)

``esr`` holds what the register shows; between two pyvcpus bits 8 to 15 are the errors that its next write will show.

The current count follows from the load time, the interrupt from the expiry; neither follows from
the other, so both travel. A stream of KVM has no expiry of its own: QEMU sends a full period from
the stop.

ESR is two registers, of which QEMU has one: towards another pyvcpu the second one is in bits 8 to 15 of
``esr``, towards QEMU both are one.

``count_shift`` and the bits of ``apicbase`` are used as shift count and index after a load (the class of
CVE-2017-16845), so nothing is taken unchecked.
"""

from __future__ import annotations

from pyvcpu.apic.local import LVT_BITS, LocalApic
from pyvcpu.apic.timer import count_shift
from pyvcpu.migration.vmstate.description import Description, LoadContext, SaveContext, refuse
from pyvcpu.migration.vmstate.fields import I32, I64, U8, U32, Array, Integer, Values

_BASE_BSP, _BASE_X2APIC, _BASE_ENABLE = 1 << 8, 1 << 10, 1 << 11

ESR_PENDING_SHIFT = 8
"""Errors that a write of ESR has yet to make visible; QEMU has no such register and shows them at once."""

_LVT_NAMES = ("timer", "thermal", "performance counter", "LINT0", "LINT1", "error")

_FIELDS: tuple[Integer | Array, ...] = (
    U32("apicbase"),
    U8("id"),
    U8("arb_id"),
    U8("tpr"),
    U32("spurious_vec"),
    U8("log_dest"),
    U8("dest_mode"),
    Array(U32("isr"), 8),
    Array(U32("tmr"), 8),
    Array(U32("irr"), 8),
    Array(U32("lvt"), 6),
    U32("esr"),
    Array(U32("icr"), 2),
    U32("divide_conf"),
    I32("count_shift"),
    U32("initial_count"),
    I64("initial_count_load_time"),
    I64("next_time"),
    I64("timer_expiry"),
)


def _save(apic: LocalApic, ctx: SaveContext) -> Values:
    if apic.apicbase & _BASE_X2APIC and ctx.peer.endswith("-tcg"):
        raise refuse("apicbase", f"{ctx.peer} has no x2APIC", apic.apicbase & ~_BASE_X2APIC, apic.apicbase)
    values: Values = {}
    for field in _FIELDS:
        field.get(apic, values, ctx)
    # QEMU has one register of errors, visible at once; we have two, and a peer of ours gets both.
    values["esr"] |= apic.esr_pending << 8 if ctx.to_pyvcpu else apic.esr_pending
    return values


def _limit(values: Values, name: str, bits: int) -> None:
    if values[name] & ~bits:
        raise refuse(name, "a register has bits that do not exist", f"none but {bits:#x}", values[name])


def _check(values: Values, ctx: LoadContext) -> None:
    base = values["apicbase"]
    if base & _BASE_X2APIC:
        raise refuse("apicbase", "x2APIC mode is not there", base & ~_BASE_X2APIC, base)
    _limit(values, "apicbase", 0xFFFFF000 | _BASE_BSP | _BASE_ENABLE)
    _limit(values, "spurious_vec", 0x13FF)
    _limit(values, "dest_mode", 0xF)
    _limit(values, "esr", 0xE0FF)
    _limit(values, "divide_conf", 0xB)
    # A divider that the guest has never written: QEMU's TCG leaves the shift 0 although 0 selects 2.
    if values["count_shift"] != (
        count_shift(values["divide_conf"]) if values["divide_conf"] else values["count_shift"] & 1
    ):
        raise refuse(
            "count_shift", "the timer's shift is not that of its divider",
            count_shift(values["divide_conf"]), values["count_shift"],
        )  # fmt: skip
    for index, bits in enumerate(LVT_BITS):
        if values["lvt"][index] & ~bits:
            raise refuse(
                f"lvt[{index}]", f"the LVT entry {_LVT_NAMES[index]} has bits that do not exist",
                f"none but {bits:#x}", values["lvt"][index],
            )  # fmt: skip
    if values["isr"][0] & 0xFFFF:
        # One may wait in IRR: QEMU's timer puts it there on "none", whose APIC is never reset.
        raise refuse("isr[0]", "vectors 0 to 15 are never in service", "bits 16 to 31", values["isr"][0])
    if values["timer_expiry"] < -1:
        raise refuse("timer_expiry", "an expiry is before the beginning of time", "-1 or more", values["timer_expiry"])
    if values["timer_expiry"] >= 0 and values["timer_expiry"] != values["next_time"]:
        raise refuse(
            "timer_expiry", "the timer is due at another time than its next_time",
            values["next_time"], values["timer_expiry"],
        )  # fmt: skip


def _load(apic: LocalApic, values: Values, ctx: LoadContext) -> None:
    for field in _FIELDS:
        field.set(apic, values, ctx)
    apic.esr, apic.esr_pending = apic.esr & 0xFF, apic.esr >> 8
    if not apic.initial_count:
        # Such a timer is stopped. QEMU never resets the APIC of "none", so that it says "due at 0".
        apic.timer_expiry = -1
    apic.post_load()


def _check_sipi(values: Values, ctx: LoadContext) -> None:
    if values["wait_for_sipi"]:
        raise refuse("wait_for_sipi", "the only CPU waits for a start-up IPI that nobody can send", 0, 1)


APIC = Description(
    "apic",
    3,
    _FIELDS,
    pre_save=_save,
    check=_check,
    post_load=_load,
    # The timer is armed on the clock, which "timer" sets.
    loads_after=("timer",),
    subsections=[
        Description(
            "apic_sipi",
            1,
            [I32("sipi_vector"), I32("wait_for_sipi")],
            needed=lambda apic, ctx: False,
            pre_save=lambda apic, ctx: {"sipi_vector": 0, "wait_for_sipi": 0},
            check=_check_sipi,
            post_load=lambda apic, values, ctx: None,
        )
    ],
)
"""The section "apic"; its object is a :class:`~pyvcpu.apic.local.LocalApic`."""
