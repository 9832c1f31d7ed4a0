"""The section "serial" version 3: one 16550 on the ISA bus, 11 bytes of registers.

    The section holds one embedded structure, "state", also called "serial"; the subsections are the
    structure's, so they lie inside it.

    divider u16 | rbr ier iir lcr mcr lsr msr scr fcr u8
    | thr_ipending: i32                               THR-empty interrupt not as IIR says
    | tsr:          tsr_retry u32, thr u8, tsr u8     a byte is stuck in the transmitter
    | recv_fifo, xmit_fifo: data[16], head u32, num u32
    | fifo_timeout_timer: i64  | timeout_ipending: i32 | poll: poll_msl i32, modem_status_poll i64

A ring buffer's ``head`` and ``num`` are indexes, checked before use. Our transmitter is always
empty: bytes that were still on their way at the source go out when the section is loaded. Our receive
timeout passes at once, so ``timeout_ipending`` follows from the FIFO, and no timer ever runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pyvcpu.devices.serial import FIFO_SIZE, IIR_EMPTY, LSR_TEMT, LSR_THRE
from pyvcpu.migration.vmstate.description import SUBSECTIONS, Description, LoadContext, SaveContext, Struct, refuse
from pyvcpu.migration.vmstate.fields import I32, U8, U16, U32, Buffer, Timer, Values

if TYPE_CHECKING:
    from pyvcpu.devices.serial import Serial16550

_REGISTERS = ("divider", "rbr", "ier", "iir", "lcr", "mcr", "lsr", "msr", "scr")
_IIR_ID = 0x6


def _save(serial: Serial16550, ctx: SaveContext) -> Values:
    return {name: int(getattr(serial, name)) for name in _REGISTERS} | {"fcr_vmstate": serial.fcr}


def _check(values: Values, ctx: LoadContext) -> None:
    for name, bits in (("ier", 0x0F), ("iir", 0xCF), ("mcr", 0x1F), ("fcr_vmstate", 0xC9)):
        if values[name] & ~bits:
            raise refuse(name, "a register has bits that do not exist", f"none but {bits:#x}", values[name])
    sent = "serial/tsr" not in values.get(SUBSECTIONS, {})
    if bool(values["lsr"] & LSR_TEMT) != sent:
        raise refuse(
            "lsr", "TEMT is 0 exactly while a byte is stuck in the transmitter", values["lsr"] ^ LSR_TEMT, values["lsr"]
        )


def _load(serial: Serial16550, values: Values, ctx: LoadContext) -> None:
    for name in _REGISTERS:
        setattr(serial, name, values[name])
    serial.fcr = values["fcr_vmstate"]
    serial.thr_ipending = int(values["iir"] & _IIR_ID == IIR_EMPTY)
    serial.receive_fifo.clear()
    serial.lsr |= LSR_THRE | LSR_TEMT


def _thr_ipending_needed(serial: Serial16550, ctx: SaveContext) -> bool:
    """IIR says it, unless a more urgent interrupt hides it or its own is off (then QEMU does not send it)."""
    return bool(serial.thr_ipending) != (serial.iir & _IIR_ID == IIR_EMPTY)


def _check_thr_ipending(values: Values, ctx: LoadContext) -> None:
    if values["thr_ipending"] not in (0, 1):
        raise refuse("thr_ipending", "a flag is neither 0 nor 1", "0 or 1", values["thr_ipending"])


def _load_thr_ipending(serial: Serial16550, values: Values, ctx: LoadContext) -> None:
    serial.thr_ipending = values["thr_ipending"]


def _load_tsr(serial: Serial16550, values: Values, ctx: LoadContext) -> None:
    serial.output(bytes([values["tsr"]]))


# -- FIFOs

_FIFO8 = Description("Fifo8", 1, [Buffer("data", FIFO_SIZE), U32("head"), U32("num")])


def _fifo_values(data: bytes) -> Values:
    return {"data": data.ljust(FIFO_SIZE, b"\0"), "head": 0, "num": len(data)}


def _fifo_bytes(fifo: Values) -> bytes:
    return bytes(fifo["data"][(fifo["head"] + i) % FIFO_SIZE] for i in range(fifo["num"]))


def _check_fifo(name: str) -> Callable[[Values, LoadContext], None]:
    def check(values: Values, ctx: LoadContext) -> None:
        for index, limit in (("head", FIFO_SIZE - 1), ("num", FIFO_SIZE)):
            if values[name][index] > limit:
                raise refuse(f"{name}/{index}", "a FIFO index is out of range", f"0 to {limit}", values[name][index])

    return check


def _load_recv_fifo(serial: Serial16550, values: Values, ctx: LoadContext) -> None:
    serial.receive_fifo.extend(_fifo_bytes(values["recv_fifo"]))


def _load_xmit_fifo(serial: Serial16550, values: Values, ctx: LoadContext) -> None:
    serial.output(_fifo_bytes(values["xmit_fifo"]))


def _never(serial: Serial16550, ctx: SaveContext) -> bool:
    """What a polled port, or one that sends at once, never has."""
    return False


def _ignore(serial: Serial16550, values: Values, ctx: LoadContext) -> None:
    """It only matters to interrupts that are not there."""


_STATE = Description(
    "serial",
    3,
    [
        U16("divider"),
        *(U8(name) for name in _REGISTERS[1:]),
        U8("fcr_vmstate"),
    ],
    pre_save=_save,
    check=_check,
    post_load=_load,
    subsections=[
        Description(
            "serial/thr_ipending",
            1,
            [I32("thr_ipending")],
            needed=_thr_ipending_needed,
            check=_check_thr_ipending,
            post_load=_load_thr_ipending,
        ),
        Description(
            "serial/tsr",
            1,
            [U32("tsr_retry"), U8("thr"), U8("tsr")],
            needed=_never,
            pre_save=lambda serial, ctx: {"tsr_retry": 0, "thr": 0, "tsr": 0},
            post_load=_load_tsr,
        ),
        Description(
            "serial/recv_fifo",
            1,
            [Struct("recv_fifo", _FIFO8)],
            needed=lambda serial, ctx: bool(serial.receive_fifo),
            pre_save=lambda serial, ctx: {"recv_fifo": _fifo_values(bytes(serial.receive_fifo))},
            check=_check_fifo("recv_fifo"),
            post_load=_load_recv_fifo,
        ),
        Description(
            "serial/xmit_fifo",
            1,
            [Struct("xmit_fifo", _FIFO8)],
            needed=_never,
            pre_save=lambda serial, ctx: {"xmit_fifo": _fifo_values(b"")},
            check=_check_fifo("xmit_fifo"),
            post_load=_load_xmit_fifo,
        ),
        Description(
            "serial/fifo_timeout_timer",
            1,
            [Timer("fifo_timeout_timer")],
            needed=_never,
            pre_save=lambda serial, ctx: {"fifo_timeout_timer": -1},
            post_load=_ignore,
        ),
        Description(
            "serial/timeout_ipending",
            1,
            [I32("timeout_ipending")],
            needed=lambda serial, ctx: bool(serial.timeout_ipending),
            pre_save=lambda serial, ctx: {"timeout_ipending": serial.timeout_ipending},
            post_load=_ignore,  # it follows from what is in the FIFO
        ),
        Description(
            "serial/poll",
            1,
            [I32("poll_msl"), Timer("modem_status_poll")],
            needed=_never,
            pre_save=lambda serial, ctx: {"poll_msl": -1, "modem_status_poll": -1},
            post_load=_ignore,
        ),
    ],
)

SERIAL = Description(
    "serial",
    3,
    [Struct("state", _STATE)],
    pre_save=lambda serial, ctx: {"state": _STATE.save(serial, ctx)},
    post_load=lambda serial, values, ctx: _STATE.load(serial, values["state"], ctx),
)
"""The section "serial"; its object is a :class:`~pyvcpu.devices.serial.Serial16550`."""
