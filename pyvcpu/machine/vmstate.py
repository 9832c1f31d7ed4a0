"""The sections of a machine as a whole: "timer", "globalstate" and "kvm-tpr-opt".

    timer        cpu_ticks_offset i64 | 8 unused | cpu_clock_offset i64
                 timer/icount: qemu_icount_bias i64 | qemu_icount i64
                   timer/icount/warp_timer: vm_clock_warp_start i64 | icount_warp_timer i64
                   timer/icount/timers, timer/icount/shift: only read
    globalstate  size u32 (strlen + 1) | runstate char[32] | has_vm_was_suspended vm_was_suspended u8 | 66 unused
                 (QEMU 7.2: runstate char[100], padded with zeros: the same bytes)
    kvm-tpr-opt  144 bytes, all 0 unless QEMU has patched a 32-bit Windows guest

With V the virtual time and T the guest's TSC at the stop:

    written by        cpu_ticks_offset   cpu_clock_offset   qemu_icount_bias, qemu_icount
    pyvcpu            T                  V                  V - n, n         (n instructions retired)
    QEMU, TCG         T                  V                  -
    QEMU, KVM         unused             V                  -                (T is "cpu".tsc)
    QEMU, -icount     unused             unused             V = T = bias + (n << shift)

So both come back exactly between two pyvcpus, whatever clocks they run on. QEMU's own
-icount streams do not carry the shift; they are told by their clock offset, which differs from bias + n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyvcpu.cpu.vmstate import from_kvm, guest_tsc
from pyvcpu.migration.vmstate.description import SUBSECTIONS, Description, LoadContext, SaveContext, Struct, refuse
from pyvcpu.migration.vmstate.fields import I16, I64, U8, U32, Array, Buffer, Timer, Unused, Values

_MASK64 = (1 << 64) - 1


def _signed64(value: int) -> int:
    return ((value + (1 << 63)) & _MASK64) - (1 << 63)


@dataclass
class Timers:
    """What "timer" speaks of: ``clock`` (:class:`~pyvcpu.clock.Clock`, paused) and ``cpu``, whose TSC hangs on it."""

    clock: Any
    cpu: Any


def _save_timers(timers: Timers, ctx: SaveContext) -> Values:
    return {
        "cpu_ticks_offset": _signed64(guest_tsc(timers.cpu, timers.clock)),
        "cpu_clock_offset": timers.clock.now(),
    }


def _virtual_time(values: Values, ctx: LoadContext) -> tuple[int, int, int | None]:
    """(V in ns, instructions retired, T or None where cpu_ticks_offset is not the guest's TSC)."""
    icount = values.get(SUBSECTIONS, {}).get("timer/icount")
    ticks, offset = values["cpu_ticks_offset"], values["cpu_clock_offset"]
    if icount is None:
        return offset, 0, ticks
    bias, count = icount["qemu_icount_bias"], icount["qemu_icount"]
    if count < 0:
        raise refuse("icount/qemu_icount", "a count of instructions is negative", "0 or more", count)
    if bias + count == offset:
        return offset, count, ticks
    shift = icount.get(SUBSECTIONS, {}).get("timer/icount/shift", {}).get("icount_time_shift", ctx.icount_shift)
    if shift is None:
        raise refuse(
            "icount/qemu_icount_bias",
            "this is a stream of QEMU -icount, which does not carry its shift, and none was given",
            f"bias + icount = {offset:#x}, as pyvcpu writes it",
            bias + count,
        )
    if not 0 <= shift <= 10:
        raise refuse("icount/shift/icount_time_shift", "a shift is out of range", "0 to 10", shift)
    now = bias + (count << shift)
    return now, count, None


def _check_timers(values: Values, ctx: LoadContext) -> None:
    now, _, _ = _virtual_time(values, ctx)
    if not 0 <= now < 1 << 63:
        raise refuse("cpu_clock_offset", "virtual time is out of range", "0 to 2**63 - 1 ns", now)


def _load_timers(timers: Timers, values: Values, ctx: LoadContext) -> None:
    now, count, tsc = _virtual_time(values, ctx)
    cpu_values = ctx.sections.get("cpu/0")
    if tsc is None:
        tsc = now
    elif cpu_values is not None and from_kvm(cpu_values, ctx):
        tsc = cpu_values["tsc"]
    timers.clock.instructions = count
    timers.clock.set_now(now)
    timers.cpu.tsc_offset = _signed64(tsc - now)


_WARP_TIMER = Description(
    "timer/icount/warp_timer",
    1,
    [I64("vm_clock_warp_start"), Timer("icount_warp_timer")],
    # Without it QEMU -icount adds cpu_clock_offset to the virtual time once more.
    pre_save=lambda timers, ctx: {"vm_clock_warp_start": -1, "icount_warp_timer": -1},
    post_load=lambda timers, values, ctx: None,
)

_ICOUNT = Description(
    "timer/icount",
    1,
    [I64("qemu_icount_bias"), I64("qemu_icount")],
    # QEMU without -icount dies of it.
    needed=lambda timers, ctx: ctx.takes_icount,
    pre_save=lambda timers, ctx: {
        "qemu_icount_bias": timers.clock.now() - timers.clock.instructions,
        "qemu_icount": timers.clock.instructions,
    },
    post_load=lambda timers, values, ctx: None,
    subsections=[
        _WARP_TIMER,
        Description(
            "timer/icount/timers",
            1,
            [Timer("icount_rt_timer"), Timer("icount_vm_timer")],
            needed=lambda timers, ctx: False,  # of -icount shift=auto
            pre_save=lambda timers, ctx: {"icount_rt_timer": -1, "icount_vm_timer": -1},
            post_load=lambda timers, values, ctx: None,
        ),
        Description(
            "timer/icount/shift",
            2,
            [I16("icount_time_shift"), I64("last_delta")],
            needed=lambda timers, ctx: False,  # of -icount shift=auto
            pre_save=lambda timers, ctx: {"icount_time_shift": 0, "last_delta": 0},
            post_load=lambda timers, values, ctx: None,
        ),
    ],
)

TIMER = Description(
    "timer",
    2,
    [I64("cpu_ticks_offset"), Unused(8), I64("cpu_clock_offset")],
    pre_save=_save_timers,
    check=_check_timers,
    post_load=_load_timers,
    # "cpu" sets the TSC of a KVM stream on the clock as it was before.
    loads_after=("cpu",),
    subsections=[_ICOUNT],
)
"""The section "timer"; its object is a :class:`Timers`."""


# -- globalstate

RUNSTATES = (
    "debug", "inmigrate", "internal-error", "io-error", "paused", "postmigrate", "prelaunch", "finish-migrate",
    "restore-vm", "running", "save-vm", "shutdown", "suspended", "watchdog", "guest-panicked", "colo", "preconfig",
)  # fmt: skip
"""QEMU's run states; a destination goes on only in "running"."""

RUNSTATE_SIZE = 32


@dataclass
class GlobalState:
    """What "globalstate" speaks of: the run state in which the source's guest was (saved from the context)."""

    runstate: str = "running"


def _save_globalstate(state: GlobalState, ctx: SaveContext) -> Values:
    name = ctx.runstate.encode("ascii")
    return {
        "size": len(name) + 1,
        "runstate": name.ljust(RUNSTATE_SIZE, b"\0"),
        "has_vm_was_suspended": 0,  # the next field says nothing
        "vm_was_suspended": 0,
        "unused": bytes(66),
    }


def _check_globalstate(values: Values, ctx: LoadContext) -> None:
    name, zero, rest = values["runstate"].partition(b"\0")
    if not zero or name.decode("latin-1") not in RUNSTATES:
        raise refuse("runstate", "there is no such run state", " ".join(RUNSTATES), name)
    if any(rest):
        raise refuse("runstate", "bytes follow the run state", "zeros", rest)
    if values["size"] != len(name) + 1:
        raise refuse("size", "the size is not that of the run state", len(name) + 1, values["size"])
    for flag in ("has_vm_was_suspended", "vm_was_suspended"):
        if values[flag] > 1:
            raise refuse(flag, "a flag is neither 0 nor 1", "0 or 1", values[flag])


def _load_globalstate(state: GlobalState, values: Values, ctx: LoadContext) -> None:
    state.runstate = values["runstate"].partition(b"\0")[0].decode("ascii")


GLOBALSTATE = Description(
    "globalstate",
    1,
    [
        U32("size"),
        Buffer("runstate", RUNSTATE_SIZE),
        U8("has_vm_was_suspended"),
        U8("vm_was_suspended"),
        Buffer("unused", 66),
    ],
    pre_save=_save_globalstate,
    check=_check_globalstate,
    post_load=_load_globalstate,
)
"""The section "globalstate"; its object is a :class:`GlobalState`."""


# -- kvm-tpr-opt

_ROM_WORDS = ("vaddr", "fixup_start", "fixup_end", "vapic_vaddr", "vapic_size", "vcpu_shift", "real_tpr_addr")
_STATE_WORDS = ("state", "real_tpr_addr", "rom_state_vaddr", "vapic_paddr", "rom_state_paddr")

_HANDLERS = Description(
    "kvmvapic-handlers", 1, [U32("set_tpr"), U32("set_tpr_eax"), Array(U32("get_tpr"), 8), U32("get_tpr_stack")]
)
_GUEST_ROM = Description(
    "kvmvapic-guest-rom",
    1,
    [
        Unused(8),
        *(
            U32(name)
            for name in [
                "vaddr",
                "fixup_start",
                "fixup_end",
                "vapic_vaddr",
                "vapic_size",
                "vcpu_shift",
                "real_tpr_addr",
            ]
        ),
        Struct("up", _HANDLERS),
        Struct("mp", _HANDLERS),
    ],
)


def _no_handlers() -> Values:
    return {"set_tpr": 0, "set_tpr_eax": 0, "get_tpr": [0] * 8, "get_tpr_stack": 0}


def _save_tpr_opt(obj: object, ctx: SaveContext) -> Values:
    rom: Values = dict.fromkeys(
        ["vaddr", "fixup_start", "fixup_end", "vapic_vaddr", "vapic_size", "vcpu_shift", "real_tpr_addr"], 0
    )
    values: Values = {"rom_state": {**rom, "up": _no_handlers(), "mp": _no_handlers()}}
    return values | dict.fromkeys(_STATE_WORDS, 0)


def _check_tpr_opt(values: Values, ctx: LoadContext) -> None:
    if values["state"]:
        raise refuse("state", "the guest's code was patched for QEMU's virtual APIC", 0, values["state"])


KVM_TPR_OPT = Description(
    "kvm-tpr-opt",
    1,
    [
        Struct("rom_state", _GUEST_ROM),
        *(U32(name) for name in _STATE_WORDS),
    ],
    pre_save=_save_tpr_opt,
    check=_check_tpr_opt,
    post_load=lambda obj, values, ctx: None,
)
"""The section "kvm-tpr-opt", always inactive; it needs no object."""
