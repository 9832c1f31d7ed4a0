"""Comparing layouts, versions and values."""

from __future__ import annotations

from pyvcpu.migration.vmstate.compat import differences, incompatibilities, table
from pyvcpu.migration.vmstate.description import Description, Struct
from pyvcpu.migration.vmstate.fields import U8, U16, U32, Array

PAIR = Description("pair", 1, [U8("x"), U8("y")])
V1 = Description("dev", 1, [U8("a"), Array(Struct("p", PAIR), 2)])
V2 = Description("dev", 2, [U8("a"), Array(Struct("p", PAIR), 2), U16("b", since=2)], minimum_version_id=1)
SUB = Description("dev", 1, V1.fields, subsections=[Description("dev/more", 1, [U8("m")])])


def test_a_newer_receiver_reads_an_older_sender_but_not_the_other_way_round():
    assert incompatibilities(V1, V2) == []
    (problem,) = incompatibilities(V2, V1)
    assert (problem.sender, problem.receiver) == (2, "1 to 1")
    assert "version" in str(problem)


def test_a_field_that_changed_without_a_version_is_found_where_the_layouts_part():
    changed = Description("dev", 1, [U8("a"), Array(Struct("p", Description("pair", 1, [U8("x"), U32("y")])), 2)])
    (problem,) = incompatibilities(changed, V1)
    assert problem.where == "dev: p[0]/y"
    longer = Description("dev", 1, [*V1.fields, U8("more")])
    assert incompatibilities(longer, V1)[0].where == "dev: more"
    assert incompatibilities(V1, longer)[0].where == "dev: more"


def test_a_subsection_that_the_receiver_lacks_matters_if_it_is_sent():
    assert [p.sender for p in incompatibilities(SUB, V1)] == ["dev/more"]
    assert incompatibilities(V1, SUB) == []
    values = {"a": 1, "p": [{"x": 1, "y": 2}] * 2}
    assert incompatibilities(SUB.describe(values), V1) == []
    assert len(incompatibilities(SUB.describe(values | {"subsections": {"dev/more": {"m": 1}}}), V1)) == 1


def test_another_section_is_another_section():
    assert incompatibilities(PAIR, V1)[0].reason == "another section"


def test_differences_are_by_field():
    left = {"a": 1, "p": [{"x": 1, "y": 2}, {"x": 3, "y": 4}], "subsections": {"dev/more": {"m": 1}}}
    right = {"a": 1, "p": [{"x": 1, "y": 9}, {"x": 3, "y": 4}], "b": b"z"}
    assert differences(left, right) == [("p[0]/y", 2, 9), ("more/m", 1, None), ("b", None, b"z")]
    assert differences(left, left) == []


def test_the_table_lists_every_field():
    assert table(SUB) == [
        ("a", "uint8", 1, 1),
        ("p", "struct", 2, 2),
        ("p/x", "uint8", 1, 1),
        ("p/y", "uint8", 1, 1),
        ("dev/more", "subsection", 1, 1),
        ("dev/more: m", "uint8", 1, 1),
    ]
