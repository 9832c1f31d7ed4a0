"""Descriptions: versions, subsections and their traps, hooks, errors that say where, load order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pyvcpu.errors import MigrationError
from pyvcpu.migration.vmstate.codec import (
    check_section,
    decode_section,
    describe_section,
    load_order,
    load_section,
    load_sections,
    locate,
    save_section,
)
from pyvcpu.migration.vmstate.cursor import Cursor, NeedMore, Span
from pyvcpu.migration.vmstate.description import (
    Description,
    LoadContext,
    SaveContext,
    SectionEntry,
    Struct,
    refuse,
)
from pyvcpu.migration.vmstate.fields import U8, U16, U32, Array


def subsection(name, *fields, **more):
    return Description(name, 1, fields, **more)


DEVICE = Description(
    "dev", 1, [U8("a")], subsections=[subsection("dev/more", U8("b")), subsection("dev/other", U16("c"))]
)
MORE = b"\x05\x08dev/more\0\0\0\x01"
OTHER = b"\x05\x09dev/other\0\0\0\x01"


# -- versions

GROWN = Description("dev", 3, [U8("a"), U8("b", since=2, default=7), Array(U8("c"), 2, since=3)], minimum_version_id=1)


@pytest.mark.parametrize(
    ("version", "data", "values"),
    [
        (1, b"\x01", {"a": 1, "b": 7, "c": [0, 0]}),
        (2, b"\x01\x02", {"a": 1, "b": 2, "c": [0, 0]}),
        (3, b"\x01\x02\x03\x04", {"a": 1, "b": 2, "c": [3, 4]}),
    ],
)
def test_older_versions_get_defaults(version, data, values):
    assert decode_section(GROWN, data, version_id=version)[0] == values


@pytest.mark.parametrize(("version", "word"), [(0, "older"), (4, "newer"), (0xFFFFFFFF, "newer")])
def test_other_versions_are_refused(version, word):
    with pytest.raises(MigrationError, match=word) as error:
        decode_section(GROWN, bytes(64), version_id=version, base=0x40)
    assert (error.value.section, error.value.expected, error.value.got) == ("dev/0", "version 1 to 3", version)


def test_defaults_are_not_shared():
    grown = Description("dev", 2, [Array(Struct("s", EMBEDDED), 1, since=2, default=[{"a": 0}])], minimum_version_id=1)
    decode_section(grown, b"", version_id=1)[0]["s"][0]["a"] = 9
    assert decode_section(grown, b"", version_id=1)[0]["s"] == [{"a": 0}]


# -- subsections


def test_subsections_come_in_any_order_and_go_out_as_they_came():
    for data in (b"\x01", b"\x01" + MORE + b"\x02", b"\x01" + OTHER + b"\0\x03" + MORE + b"\x02"):
        values, _ = decode_section(DEVICE, data)
        assert DEVICE.encode(values) == data


def test_an_unknown_subsection_of_ours_is_refused_where_it_stands():
    with pytest.raises(MigrationError, match="no subsection") as error:
        decode_section(DEVICE, b"\x01" + MORE + b"\x02" + b"\x05\x07dev/new\0\0\0\x01", base=0x10)
    assert (error.value.offset, error.value.got) == (0x10 + 1 + len(MORE) + 1, "dev/new")


def test_a_subsection_of_another_name_is_left_to_the_reader():
    """As QEMU: a foreign prefix is no subsection, so that what stands there is a missing footer."""
    cursor = Cursor(b"\x01\x05\x06foo/xx\0\0\0\x01")
    assert DEVICE.decode(cursor) == {"a": 1}
    assert cursor.pos == 1


def test_twice_the_same_subsection_is_refused():
    with pytest.raises(MigrationError, match="twice"):
        decode_section(DEVICE, b"\x01" + 2 * (MORE + b"\x02"))


def test_a_subsections_version_is_checked_too():
    with pytest.raises(MigrationError, match="newer") as error:
        decode_section(DEVICE, b"\x01\x05\x08dev/more\0\0\0\x02\x02")
    assert error.value.field == "more"


def test_subsections_nest_and_paths_say_so():
    inner = subsection("dev/more/deep", U8("x"))
    d = Description("dev", 1, [U8("a")], subsections=[subsection("dev/more", U8("b"), subsections=[inner])])
    data = b"\x01" + MORE + b"\x02" + b"\x05\x0ddev/more/deep\0\0\0\x01\x09"
    values, spans = decode_section(d, data, base=100)
    assert values == {"a": 1, "subsections": {"dev/more": {"b": 2, "subsections": {"dev/more/deep": {"x": 9}}}}}
    assert spans["more/deep/x"] == Span(100 + len(data) - 1, 1)
    assert d.encode(values) == data


def test_the_byte_after_a_section_must_have_arrived():
    with pytest.raises(NeedMore):
        DEVICE.decode(Cursor(b"\x01"))
    assert DEVICE.decode(Cursor(b"\x01\x7e")) == {"a": 1}


def test_every_prefix_of_a_section_asks_for_more_or_is_whole():
    data = b"\x01" + MORE + b"\x02" + OTHER + b"\0\x03" + b"\x7e"
    for size in range(len(data)):
        with pytest.raises(NeedMore):
            DEVICE.decode(Cursor(data[:size]))
    cursor = Cursor(data)
    assert DEVICE.decode(cursor)["subsections"].keys() == {"dev/more", "dev/other"}
    assert cursor.remaining == 1


def test_truncated_at_every_byte_a_whole_section_is_refused_or_was_whole_there():
    data = b"\x01" + MORE + b"\x02" + OTHER + b"\0\x03"
    whole = {1, 1 + len(MORE) + 1, len(data)}
    for size in range(len(data) + 1):
        if size in whole:
            decode_section(DEVICE, data[:size])
        else:
            with pytest.raises(MigrationError):
                decode_section(DEVICE, data[:size])


# -- the trap: a byte 05 that is data

EMBEDDED = Description("in", 1, [U8("a")], subsections=[subsection("in/more", U8("b"))])
OUTER = Description("out", 1, [Struct("s", EMBEDDED), U32("n"), U32("m")])


@pytest.mark.parametrize("tail", [b"\x05\x01\2\3\4\5\6\7", b"\x05\x05\x05\x05" * 2, b"\x05\x02in\0\0\0\0"])
def test_a_byte_05_after_an_embedded_structure_is_data(tail):
    values, _ = decode_section(OUTER, b"\x01" + tail)
    assert values == {"s": {"a": 1}, "n": int.from_bytes(tail[:4], "big"), "m": int.from_bytes(tail[4:], "big")}


def test_data_that_reads_as_an_unknown_subsection_is_refused_not_guessed():
    with pytest.raises(MigrationError, match="no subsection"):
        decode_section(OUTER, b"\x01\x05\x03in/\0\0\0")


def test_a_structure_that_never_has_subsections_never_looks_for_one():
    """Even where the data after it reads like one of its own."""
    plain = Description("in", 1, [U8("a")])
    outer = Description("out", 1, [Struct("s", plain), Array(U8("text"), 9)])
    data = b"\x01\x05\x07in/more"
    assert decode_section(outer, data)[0] == {"s": {"a": 1}, "text": list(data[1:])}


def test_subsections_of_an_embedded_structure_lie_inside_it():
    data = b"\x01" + b"\x05\x07in/more\0\0\0\x01\x09" + b"\0\0\0\x02\0\0\0\x03"
    values, _ = decode_section(OUTER, data)
    assert values == {"s": {"a": 1, "subsections": {"in/more": {"b": 9}}}, "n": 2, "m": 3}
    assert OUTER.encode(values) == data


def test_no_more_is_waited_for_than_decides():
    """After a difference in the name the rest may never come: the guest's end waits for our answer."""
    cursor = Cursor(b"\x01\x05\x08d\xff")
    assert DEVICE.decode(cursor) == {"a": 1}


# -- values


def test_unknown_and_missing_values_are_refused_by_name():
    for values, field in (
        ({}, "a"),
        ({"a": 1, "z": 2}, "z"),
        ({"a": 1, "subsections": {"dev/none": {}}}, "dev/none"),
        ({"a": 1, "subsections": {"dev/more": {}}}, "more/b"),
    ):
        with pytest.raises(MigrationError) as error:
            DEVICE.encode(values)
        assert error.value.field == field


def test_two_fields_of_one_name_are_a_mistake_of_ours():
    with pytest.raises(ValueError, match="share"):
        Description("d", 1, [U8("a"), U8("a")])


# -- hooks

SEGMENT = Description("segment", 1, [U8("kind")], check=lambda values, ctx: below_ten(values, "kind"))


def below_ten(values, name):
    if values[name] >= 10:
        raise refuse(name, "too much", "0 to 9", values[name])


HOOKED = Description(
    "hooked",
    1,
    [U8("a"), Array(Struct("segs", SEGMENT), 2)],
    check=lambda values, ctx: below_ten(values, "a"),
    pre_save=lambda device, ctx: {"a": device.a, "segs": [{"kind": k} for k in device.kinds]},
    post_load=lambda device, values, ctx: device.__dict__.update(
        a=values["a"], kinds=[s["kind"] for s in values["segs"]]
    ),
    subsections=[
        Description(
            "hooked/extra",
            1,
            [U8("extra")],
            needed=lambda device, ctx: device.extra != 3,
            check=lambda values, ctx: below_ten(values, "extra"),
            absent=lambda device, ctx: setattr(device, "extra", 3),
        )
    ],
)


def device(a=1, kinds=(2, 3), extra=3):
    return SimpleNamespace(a=a, kinds=list(kinds), extra=extra)


def test_a_subsection_is_sent_where_it_is_needed_and_its_absence_means_something():
    entry = SectionEntry(HOOKED, 0, device(extra=3))
    data, values = save_section(entry, SaveContext())
    assert "subsections" not in values
    target = SectionEntry(HOOKED, 0, device(extra=9))
    load_section(target, decode_section(HOOKED, data)[0], LoadContext())
    assert target.obj.extra == 3
    _, values = save_section(SectionEntry(HOOKED, 0, device(extra=4)), SaveContext())
    load_section(target, values, LoadContext())
    assert target.obj.extra == 4


@pytest.mark.parametrize(
    ("change", "path", "offset"),
    [({"a": 77}, "a", 0x20), ({"kinds": (1, 99)}, "segs[1]/kind", 0x22), ({"extra": 50}, "extra/extra", 0x23 + 18)],
)
def test_a_refused_load_changes_nothing_and_says_where(change, path, offset):
    data, _ = save_section(SectionEntry(HOOKED, 4, device(extra=4)), SaveContext())
    bad, _ = save_section(SectionEntry(HOOKED, 4, device(**{"extra": 4} | change)), SaveContext())
    assert len(bad) == len(data)
    values, spans = decode_section(HOOKED, bad, base=0x20, instance_id=4)
    target = device(a=5, kinds=(6, 7), extra=8)
    for refuse_it in (check_section, load_section):
        with pytest.raises(MigrationError) as error:
            refuse_it(SectionEntry(HOOKED, 4, target), values, LoadContext(), spans)
        assert (error.value.section, error.value.field, error.value.offset) == ("hooked/4", path, offset)
    assert target == device(a=5, kinds=(6, 7), extra=8)


def test_locating_falls_back_to_what_encloses():
    spans = {"regs": Span(8, 32, 4), "s": Span(40, 10)}
    assert locate(spans, "regs[3]") == 32
    assert locate(spans, "regs[9]") == 8
    assert locate(spans, "s/unknown/deeper") == 40
    assert locate(spans, "nothing") is None


def test_a_section_is_described_as_qemu_lists_devices():
    entry = SectionEntry(DEVICE, 2, None)
    described = describe_section(entry, {"a": 1})
    assert list(described) == ["name", "instance_id", "vmsd_name", "version", "fields"]
    assert describe_section(entry, {"a": 1, "subsections": {"dev/more": {"b": 1}}})["subsections"] == [
        {"vmsd_name": "dev/more", "version": 1, "fields": [{"name": "b", "type": "uint8", "size": 1}]}
    ]


# -- whole machines


def entries(*rules):
    return [
        SectionEntry(Description(name, 1, [U8("v")], loads_after=after), 0, SimpleNamespace(v=0))
        for name, after in rules
    ]


def test_load_order_is_the_given_one_but_for_loads_after():
    order = load_order(
        entries(("timer", ("cpu",)), ("common", ("cpu", "apic")), ("cpu", ()), ("apic", ("timer",)), ("x", ()))
    )
    assert [e.description.name for e in order] == ["cpu", "timer", "apic", "common", "x"]


def test_sections_that_wait_for_each_other_are_a_mistake():
    with pytest.raises(ValueError, match="wait"):
        load_order(entries(("a", ("b",)), ("b", ("a",))))


def test_all_sections_are_checked_before_any_is_loaded():
    parts = [*entries(("first", ())), SectionEntry(HOOKED, 0, device())]
    bad = {"first/0": {"v": 5}, "hooked/0": {"a": 99, "segs": [{"kind": 0}, {"kind": 0}]}}
    with pytest.raises(MigrationError):
        load_sections(parts, bad, LoadContext())
    assert parts[0].obj.v == 0
    good = {"first/0": {"v": 5}}
    assert load_sections(parts, good, LoadContext()) == ["hooked/0"]
    assert parts[0].obj.v == 5
