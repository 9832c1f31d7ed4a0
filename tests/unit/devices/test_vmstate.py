"""The section "serial"."""

from __future__ import annotations

import pytest

from pyvcpu.devices.serial import Serial16550
from pyvcpu.devices.vmstate import SERIAL
from pyvcpu.errors import MigrationError
from pyvcpu.migration.vmstate.codec import decode_section, load_section, save_section
from pyvcpu.migration.vmstate.description import LoadContext, SaveContext, SectionEntry
from tests import streams

STATE = ("divider", "rbr", "ier", "iir", "lcr", "mcr", "lsr", "msr", "scr", "fcr", "thr_ipending", "receive_fifo")


def port(sent=None):
    return Serial16550((sent if sent is not None else []).append)


def state(serial):
    return {name: getattr(serial, name) for name in STATE}


def through(serial):
    data, _ = save_section(SectionEntry(SERIAL, 0, serial), SaveContext())
    values, _ = decode_section(SERIAL, data)
    target = port()
    for offset in range(8):
        target.write(offset, 1, 0xFF)
    load_section(SectionEntry(SERIAL, 0, target), values, LoadContext())
    return target, data


def used(fifo=True, ier=0, received=b""):
    serial = port()
    serial.write(3, 1, 0x83)
    serial.write(0, 1, 0x34)
    serial.write(1, 1, 0x12)
    serial.write(3, 1, 0x03)
    serial.write(7, 1, 0x5A)
    serial.write(4, 1, 0x0B)
    serial.write(2, 1, 0x81 if fifo else 0)
    serial.write(1, 1, ier)
    assert serial.receive_bytes(received) == len(received)
    return serial


@pytest.mark.parametrize(
    "serial",
    [
        port(),
        used(),
        used(fifo=False, received=b"x"),
        used(received=b"hello"),
        used(received=bytes(range(16)), ier=1),
        used(ier=2),
        used(ier=7, received=b"ab"),
    ],
    ids=["reset", "used", "byte", "fifo", "full", "empty interrupt", "all interrupts"],
)
def test_it_comes_back_as_it_was(serial):
    target, _ = through(serial)
    assert state(target) == state(serial)


def test_at_reset_it_is_11_bytes_as_qemus():
    _, data = through(port())
    assert data == bytes.fromhex("000c 00 00 01 00 08 60 b0 00 00")


def test_an_interrupt_that_iir_hides_has_a_subsection():
    serial = used(ier=3, received=bytes(16))  # data is more urgent than an empty transmitter
    assert serial.thr_ipending and serial.iir & 0xF == 4
    _, data = through(serial)
    assert b"serial/thr_ipending" in data
    target, _ = through(serial)
    assert target.thr_ipending == 1


def test_real_qemus_port_with_a_byte_in_its_fifo():
    found = streams.section("microvm-7.2-serial-tcg", "serial")
    values, _ = decode_section(SERIAL, found.data)
    serial = port()
    load_section(SectionEntry(SERIAL, 0, serial), values, LoadContext())
    assert serial.read(5, 1) & 1 and serial.read(2, 1) == 0xC1
    assert serial.read(0, 1) == ord("h")
    assert not serial.read(5, 1) & 1


def values_with(subsections=None, **registers):
    base = SERIAL.save(port(), SaveContext())
    base["state"] |= registers
    if subsections:
        base["state"]["subsections"] = subsections
    return base


def test_a_fifo_is_a_ring():
    data = bytes(range(16))
    serial = port()
    ring = {"serial/recv_fifo": {"recv_fifo": {"data": data, "head": 14, "num": 4}}}
    SERIAL.load(serial, values_with(ring, fcr_vmstate=1, lsr=0x61), LoadContext())
    assert list(serial.receive_fifo) == [14, 15, 0, 1]


def test_bytes_on_their_way_out_are_sent_in_order():
    sent: list[bytes] = []
    stuck = {
        "serial/xmit_fifo": {"xmit_fifo": {"data": b"bc".ljust(16, b"\0"), "head": 0, "num": 2}},
        "serial/tsr": {"tsr_retry": 1, "thr": 0, "tsr": ord("a")},
    }
    serial = port(sent)
    SERIAL.load(serial, values_with(stuck, lsr=0), LoadContext())
    assert b"".join(sent) == b"abc"
    assert serial.lsr & 0x60 == 0x60


@pytest.mark.parametrize(
    ("values", "path"),
    [
        (values_with(ier=0x10), "state/ier"),
        (values_with(mcr=0x20), "state/mcr"),
        (values_with(iir=0x10), "state/iir"),
        (values_with(fcr_vmstate=6), "state/fcr_vmstate"),
        (values_with(lsr=0x20), "state/lsr"),
        (values_with({"serial/tsr": {"tsr_retry": 1, "thr": 0, "tsr": 0}}), "state/lsr"),
        (values_with({"serial/thr_ipending": {"thr_ipending": 2}}), "state/thr_ipending/thr_ipending"),
        (
            values_with({"serial/recv_fifo": {"recv_fifo": {"data": bytes(16), "head": 16, "num": 1}}}),
            "state/recv_fifo/recv_fifo/head",
        ),
        (
            values_with({"serial/xmit_fifo": {"xmit_fifo": {"data": bytes(16), "head": 0, "num": 17}}}),
            "state/xmit_fifo/xmit_fifo/num",
        ),
    ],
)
def test_what_no_port_can_be_is_refused(values, path):
    serial = used(received=b"zz")
    before = state(serial) | {"receive_fifo": list(serial.receive_fifo)}
    with pytest.raises(MigrationError) as error:
        load_section(SectionEntry(SERIAL, 0, serial), values, LoadContext())
    assert (error.value.section, error.value.field) == ("serial/0", path)
    assert state(serial) | {"receive_fifo": list(serial.receive_fifo)} == before
