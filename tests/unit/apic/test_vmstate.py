"""The section "apic"."""

from __future__ import annotations

import pytest

from pyvcpu.apic.local import LocalApic
from pyvcpu.apic.vmstate import APIC
from pyvcpu.clock import IcountClock
from pyvcpu.errors import MigrationError
from pyvcpu.migration.vmstate.codec import decode_section, load_section, save_section
from pyvcpu.migration.vmstate.description import LoadContext, SaveContext, SectionEntry
from tests import streams

WIRE = (
    "apicbase", "id", "arb_id", "tpr", "spurious_vec", "log_dest", "dest_mode", "isr", "tmr", "irr", "lvt", "esr",
    "icr", "divide_conf", "count_shift", "initial_count", "initial_count_load_time", "next_time", "timer_expiry",
)  # fmt: skip
SVR, LVT_TIMER, INITIAL, DIVIDE, TPR, ESR, ICR_LOW, ICR_HIGH = 0xF0, 0x320, 0x380, 0x3E0, 0x80, 0x280, 0x300, 0x310
VECTOR = 0x41


def apic_at(now=0):
    clock = IcountClock()
    clock.set_now(now)
    return LocalApic(clock)


def running(now=5_000, periodic=True):
    """An APIC that is on, with a timer running, one vector waiting and one in service."""
    apic = apic_at(now)
    apic.write(SVR, 4, 0x1F0)
    apic.write(DIVIDE, 4, 3)
    apic.write(LVT_TIMER, 4, VECTOR | (1 << 17 if periodic else 0))
    apic.write(INITIAL, 4, 999)
    apic.raise_vector(0x80)
    assert apic.acknowledge() == 0x80
    apic.raise_vector(0x33, level=True)
    apic.write(TPR, 4, 0x20)
    apic.write(ICR_HIGH, 4, 7 << 24)
    return apic


def state(apic):
    return {name: getattr(apic, name) for name in WIRE} | {"esr_pending": apic.esr_pending}


def through(apic, now, peer="pyvcpu"):
    data, _ = save_section(SectionEntry(APIC, 0, apic), SaveContext(profile=peer))
    values, _ = decode_section(APIC, data)
    target = apic_at(now)
    target.write(SVR, 4, 0x1FF)
    load_section(SectionEntry(APIC, 0, target), values, LoadContext(clock=target.clock))
    return target, data


@pytest.mark.parametrize(
    "make", [apic_at, running, lambda: running(periodic=False)], ids=["reset", "periodic", "one-shot"]
)
@pytest.mark.parametrize("peer", ["pyvcpu", "qemu-7.2-tcg", "qemu-10.0-kvm"])
def test_it_comes_back_as_it_was(make, peer):
    apic = make()
    target, data = through(apic, apic.clock.now(), peer)
    assert len(data) == 181
    assert state(target) == state(apic)


def test_the_timer_goes_on_where_it_was():
    apic = running()
    apic.clock.instructions += 6_000
    target, _ = through(apic, apic.clock.now())
    assert target.clock.next_deadline() == apic.clock.next_deadline() == 5_000 + 16_000
    assert target.read(0x390, 4) == apic.read(0x390, 4) == 999 - 6_000 // 16
    for each in (apic, target):
        each.irr[1] = 0
        each.clock.set_now(21_000)
        each.clock.run_due()
    assert state(target) == state(apic)
    assert target.irr[VECTOR >> 5] == 1 << (VECTOR & 31)


def test_a_timer_that_is_off_stays_off():
    target, _ = through(apic_at(), 0)
    assert target.clock.next_deadline() == IcountClock().next_deadline()


def test_the_apic_of_none_which_qemu_never_resets_does_not_fire():
    found = streams.section("none-7.2-counter-tcg", "apic")
    values, _ = decode_section(APIC, found.data)
    assert values["timer_expiry"] == 0 and values["lvt"][0] == 0
    apic = apic_at(100)
    APIC.load(apic, values, LoadContext(clock=apic.clock))
    assert apic.timer_expiry == -1
    assert apic.clock.next_deadline() == IcountClock().next_deadline()


def test_the_page_moves_with_the_base():
    apic = apic_at()
    apic.set_base(0xFEC80900)
    target = apic_at()
    moves = []
    target.on_move = lambda base, enabled: moves.append((base, enabled))
    APIC.load(target, APIC.save(apic, SaveContext()), LoadContext())
    assert moves[-1] == (0xFEC80000, True)


def test_errors_that_do_not_show_yet_travel_between_pyvcpus_and_show_in_qemu():
    apic = running()
    apic.write(ICR_LOW, 4, 0x4000 | 1 << 18 | 5)  # vector 5, to ourselves
    assert apic.esr_pending and not apic.esr
    target, _ = through(apic, apic.clock.now())
    assert (target.esr, target.esr_pending) == (0, apic.esr_pending)
    target, _ = through(apic, apic.clock.now(), "qemu-7.2-tcg")
    assert (target.esr, target.esr_pending) == (apic.esr_pending, 0)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"apicbase": 0xFEE00D00}, "apicbase"),  # x2APIC
        ({"apicbase": 0xFEE00901}, "apicbase"),
        ({"count_shift": 200}, "count_shift"),
        ({"count_shift": -1}, "count_shift"),
        ({"count_shift": 5}, "count_shift"),
        ({"divide_conf": 4}, "divide_conf"),
        ({"lvt": [1 << 18, 0, 0, 0, 0, 0]}, "lvt[0]"),  # TSC-deadline mode
        ({"lvt": [0, 0, 0, 0, 0, 1 << 20]}, "lvt[5]"),
        ({"spurious_vec": 1 << 31}, "spurious_vec"),
        ({"dest_mode": 16}, "dest_mode"),
        ({"esr": 1 << 16}, "esr"),
        ({"isr": [1] + [0] * 7}, "isr[0]"),
        ({"timer_expiry": -2}, "timer_expiry"),
        ({"timer_expiry": 1}, "timer_expiry"),
        ({"subsections": {"apic_sipi": {"sipi_vector": 0, "wait_for_sipi": 1}}}, "apic_sipi/wait_for_sipi"),
    ],
)
def test_what_no_apic_can_be_is_refused(change, path):
    apic = running()
    values = APIC.save(apic, SaveContext()) | change
    before = state(apic)
    with pytest.raises(MigrationError) as error:
        APIC.load(apic, values, LoadContext())
    assert error.value.field == path
    assert state(apic) == before


def test_the_subsection_without_a_slash_in_its_name():
    data = APIC.encode(APIC.save(apic_at(), SaveContext())) + b"\x05\x09apic_sipi\0\0\0\x01" + bytes(8)
    values, _ = decode_section(APIC, data)
    assert values["subsections"] == {"apic_sipi": {"sipi_vector": 0, "wait_for_sipi": 0}}
    APIC.check(values, LoadContext())
