"""Every descriptor, by strategies made from it: what goes in comes out, and damage is refused or is what it says."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvcpu.apic.local import LocalApic
from pyvcpu.apic.vmstate import APIC
from pyvcpu.clock import IcountClock
from pyvcpu.cpu.state import CpuState
from pyvcpu.cpu.vmstate import CPU, CPU_COMMON, CpuCommon
from pyvcpu.devices.serial import Serial16550
from pyvcpu.devices.vmstate import SERIAL
from pyvcpu.errors import MigrationError
from pyvcpu.machine.vmstate import GLOBALSTATE, KVM_TPR_OPT, TIMER, GlobalState, Timers
from pyvcpu.migration.vmstate.codec import decode_section
from pyvcpu.migration.vmstate.compat import differences, incompatibilities
from pyvcpu.migration.vmstate.cursor import Cursor, NeedMore
from pyvcpu.migration.vmstate.description import Description, LoadContext, Struct
from pyvcpu.migration.vmstate.fields import I16, U8, U32, Array, Bool, Buffer, Unused, VarArray, VarBuffer
from pyvcpu.testing.strategies import values as values_of
from tests import streams

# Every kind of field, and subsections inside an embedded structure with data after it.
_INNER = Description("in", 2, [U8("a"), I16("b")], subsections=[Description("in/sub", 1, [U8("c"), Buffer("d", 3)])])
SAMPLER = Description(
    "sampler",
    4,
    [
        U32("count"),
        VarArray(Struct("items", _INNER), "count", limit=100),
        Struct("one", _INNER),
        Array(Struct("three", Description("counted", 1, [U8("n"), VarArray(U8("m"), "n", limit=9)])), 3),
        Unused(5),
        U8("length"),
        VarBuffer("bytes", "length", limit=200),
        Array(Bool("flags"), 4),
        Struct("tmp", Description("tmp", 1, [U8("flat1"), U8("flat2")]), kind="tmp", flat=True),
    ],
    subsections=[Description("sampler/s", 3, [U32("x")])],
)
DESCRIPTIONS = (TIMER, CPU_COMMON, CPU, KVM_TPR_OPT, APIC, SERIAL, GLOBALSTATE, SAMPLER)
EVERY = pytest.mark.parametrize("description", DESCRIPTIONS, ids=[d.name for d in DESCRIPTIONS])


def target_of(description):
    """A fresh object that sections of this description can be loaded into."""
    clock, cpu = IcountClock(), CpuState()
    cpu.reset()
    return {
        "timer": Timers(clock, cpu),
        "cpu_common": CpuCommon(cpu, LocalApic(clock)),
        "cpu": cpu,
        "kvm-tpr-opt": None,
        "apic": LocalApic(clock),
        "serial": Serial16550(lambda data: None),
        "globalstate": GlobalState(),
    }[description.name]


# A section has all its fields, so there is no small example of a large one.
SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.large_base_example])


@EVERY
@SETTINGS
@given(data=st.data())
def test_values_encode_and_decode_to_themselves(description, data):
    values = data.draw(values_of(description))
    encoded = description.encode(values)
    decoded, spans = decode_section(description, encoded, base=1000)
    assert decoded == values
    assert differences(values, decoded) == []
    assert description.encode(decoded) == encoded
    assert description.size(values) == len(encoded)
    assert all(span.offset >= 1000 and span.offset + span.size <= 1000 + len(encoded) for span in spans.values())


@EVERY
@SETTINGS
@given(data=st.data())
def test_the_vmdesc_says_the_layout_of_what_was_sent(description, data):
    values = data.draw(values_of(description))
    described = json.loads(json.dumps(description.describe(values)))
    assert incompatibilities(described, description) == []

    def bytes_in(piece):
        total = sum(entry["size"] * entry.get("array_len", 1) for entry in piece["fields"])
        return total + sum(6 + len(sub["vmsd_name"]) + bytes_in(sub) for sub in piece.get("subsections", ()))

    assert bytes_in(described) == len(description.encode(values))


@EVERY
@SETTINGS
@given(data=st.data())
def test_any_chunking_decodes_the_same(description, data):
    values = data.draw(values_of(description))
    stream = description.encode(values) + b"\x7e\0\0\0\1"
    size = 0
    while True:
        cursor = Cursor(stream[:size])
        try:
            assert description.decode(cursor) == values
            break
        except NeedMore as need:
            assert need.missing > 0
            size += data.draw(st.integers(1, max(1, len(stream) // 4)))
    assert cursor.pos == len(stream) - 5


@EVERY
@SETTINGS
@given(data=st.data())
def test_a_shortened_section_is_refused_or_lacks_a_subsection(description, data):
    values = data.draw(values_of(description))
    encoded = description.encode(values)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    try:
        shorter, _ = decode_section(description, encoded[:cut])
    except MigrationError as error:
        assert error.offset is not None and error.offset <= cut
    else:
        assert description.encode(shorter) == encoded[:cut]


@EVERY
@settings(max_examples=100, deadline=None)
@given(data=st.data(), noise=st.binary(max_size=400))
def test_random_bytes_are_refused_or_mean_what_they_say(description, data, noise):
    try:
        values, _ = decode_section(description, noise)
    except MigrationError:
        return
    assert description.encode(values) == noise


def _whole(description):
    """A real section and what else of its stream a check may look at."""
    name = "microvm-7.2-serial-tcg"
    found = streams.section(name, description.name)
    sections = {}
    for each in DESCRIPTIONS:
        other = streams.section(name, each.name)
        if other is not None:
            sections[f"{each.name}/0"], _ = decode_section(each, other.data)
    return found, sections


@pytest.mark.parametrize("description", DESCRIPTIONS[:-1], ids=[d.name for d in DESCRIPTIONS[:-1]])
def test_each_single_bit_flipped_is_refused_or_loads_as_what_the_bytes_say(description):
    """Checksums would catch them all; without, nothing but MigrationError may come, and nothing half-done."""
    found, sections = _whole(description)
    refused, bits = 0, 8 * len(found.data)
    for bit in range(bits):
        damaged = bytearray(found.data)
        damaged[bit >> 3] ^= 1 << (bit & 7)
        try:
            values, _ = decode_section(description, damaged, base=found.offset)
        except MigrationError as error:
            refused += 1
            assert error.offset is not None and error.section == f"{description.name}/0"
            continue
        assert description.encode(values) == damaged
        target = target_of(description)
        context = LoadContext(clock=IcountClock(), sections=sections | {f"{description.name}/0": values})
        try:
            description.load(target, values, context)
        except MigrationError as error:
            refused += 1
            assert error.field is not None and error.expected is not None and error.got is not None, error
    assert 0 < refused < bits or description is KVM_TPR_OPT
