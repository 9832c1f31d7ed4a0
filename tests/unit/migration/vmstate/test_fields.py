"""Fields: bytes, limits, vmdesc entries, and what they do with an object's attributes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from pyvcpu.errors import MigrationError
from pyvcpu.migration.vmstate.codec import decode_section
from pyvcpu.migration.vmstate.cursor import Cursor, NeedMore
from pyvcpu.migration.vmstate.description import Description, LoadContext, SaveContext, Struct
from pyvcpu.migration.vmstate.fields import (
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    Array,
    Bool,
    Buffer,
    Timer,
    Unused,
    VarArray,
    VarBuffer,
)


def bytes_of(field, value):
    return Description("d", 1, [field]).encode({field.name: value})


@pytest.mark.parametrize(
    ("kind", "value", "encoded"),
    [
        (U8, 0xAB, "ab"),
        (U16, 0xABCD, "abcd"),
        (U32, 0x01020304, "01020304"),
        (U64, 0x0102030405060708, "0102030405060708"),
        (I8, -2, "fe"),
        (I16, -2, "fffe"),
        (I32, -1, "ffffffff"),
        (I64, -(1 << 63), "8000000000000000"),
        (Timer, -1, "ffffffffffffffff"),
    ],
)
def test_integers_are_big_endian(kind, value, encoded):
    field = kind("x")
    assert bytes_of(field, value).hex() == encoded
    assert field.take(Cursor(bytes.fromhex(encoded))) == value


@pytest.mark.parametrize("kind", [U8, U16, U32, U64, I8, I16, I32, I64])
def test_an_integer_out_of_range_is_refused_by_name(kind):
    low, high = kind("x").limits
    assert bytes_of(kind("x"), low) and bytes_of(kind("x"), high)
    for value in (low - 1, high + 1, "1", None, 1.0):
        with pytest.raises(MigrationError) as error:
            bytes_of(kind("x"), value)
        assert error.value.field == "x" and error.value.got == value


def test_a_boolean_is_0_or_1():
    assert bytes_of(Bool("b"), True) == b"\x01"
    with pytest.raises(MigrationError) as error:
        decode_section(Description("d", 1, [U8("a"), Bool("b")]), b"\x00\x02", base=0x100)
    assert (error.value.offset, error.value.field, error.value.got) == (0x101, "b", 2)
    with pytest.raises(MigrationError):
        bytes_of(Bool("b"), 2)


def test_unused_bytes_are_zeros_and_others_are_given_back():
    d = Description("d", 1, [U8("a"), Unused(2), U8("b")])
    assert decode_section(d, bytes.fromhex("01 0000 02"))[0] == {"a": 1, "b": 2}
    values, _ = decode_section(d, bytes.fromhex("01 00ff 02"))
    assert d.encode(values) == bytes.fromhex("01 00ff 02")
    with pytest.raises(MigrationError):
        d.encode({"a": 1, "unused": b"x", "b": 2})


def test_a_buffer_has_its_length():
    assert bytes_of(Buffer("b", 3), b"abc") == b"abc"
    for value in (b"ab", b"abcd", "abc", 3):
        with pytest.raises(MigrationError):
            bytes_of(Buffer("b", 3), value)


def test_an_array_has_its_length_and_names_the_element():
    field = Array(U16("a"), 3)
    assert bytes_of(field, [1, 2, 3]) == bytes.fromhex("000100020003")
    with pytest.raises(MigrationError) as error:
        bytes_of(field, [1, 2, 0x10000])
    assert error.value.field == "a[2]"
    for value in ([1, 2], [1, 2, 3, 4], 5, None):
        with pytest.raises(MigrationError) as error:
            bytes_of(field, value)
        assert error.value.field == "a"


COUNTED = Description(
    "d", 1, [U32("n"), VarArray(U64("a"), "n", limit=4), U32("size"), VarBuffer("b", "size", limit=8)]
)


def test_counts_come_from_earlier_fields():
    values = {"n": 2, "a": [7, 8], "size": 3, "b": b"abc"}
    encoded = COUNTED.encode(values)
    assert decode_section(COUNTED, encoded) == (
        values,
        {"n": (0, 4, 1), "a": (4, 16, 2), "size": (20, 4, 1), "b": (24, 3, 1)},
    )
    for wrong in ({"n": 3}, {"size": 2}, {"n": 5, "a": [0] * 5}, {"size": 9, "b": bytes(9)}):
        with pytest.raises(MigrationError):
            COUNTED.encode(values | wrong)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ("00000005", "a"),
        ("ffffffff", "a"),
        ("00000000 00000009", "b"),
        ("00000000 ffffffff", "b"),
    ],
)
def test_a_count_above_its_limit_is_refused_before_anything_is_read(data, field):
    data = bytes.fromhex(data)
    with pytest.raises(MigrationError) as error:
        # Not NeedMore: what it promises must not be waited for either.
        COUNTED.decode(Cursor(data, 0x10))
    assert (error.value.field, error.value.offset) == (field, 0x10 + len(data))


def test_what_has_not_arrived_is_asked_for_and_what_cannot_arrive_is_an_error():
    d = Description("d", 1, [U32("a"), Array(U64("b"), 2)])
    with pytest.raises(NeedMore) as more:
        d.decode(Cursor(bytes(6)))
    assert more.value.missing == 14
    with pytest.raises(MigrationError) as error:
        d.decode(Cursor(bytes(6), 0x1000, final=True, section="d/0"))
    assert (error.value.offset, error.value.section, error.value.field) == (0x1004, "d/0", "b")


# -- vmdesc

PLAIN = Description("plain", 3, [U8("x")])
WITH_SUBSECTION = Description("deep", 1, [U8("x")], subsections=[Description("deep/more", 1, [U8("y")])])


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (U32("a", wire_name="env.a"), '[{"name": "env.a", "type": "uint32", "size": 4}]'),
        (I32("a"), '[{"name": "a", "type": "int32", "size": 4}]'),
        (Bool("a"), '[{"name": "a", "type": "bool", "size": 1}]'),
        (Timer("a"), '[{"name": "a", "type": "timer", "size": 8}]'),
        (Buffer("a", 7), '[{"name": "a", "type": "buffer", "size": 7}]'),
        (Unused(9), '[{"name": "unused", "type": "unused_buffer", "size": 9}]'),
        (Array(U16("a"), 3), '[{"name": "a", "array_len": 3, "type": "uint16", "size": 2}]'),
        (Array(U16("a"), 1), '[{"name": "a", "type": "uint16", "size": 2}]'),
        (
            Array(Struct("s", PLAIN), 2),
            '[{"name": "s", "array_len": 2, "type": "struct", "struct": {"vmsd_name": "plain", "version": 3, '
            '"fields": [{"name": "x", "type": "uint8", "size": 1}]}, "size": 1}]',
        ),
    ],
)
def test_vmdesc_entries_have_qemus_shape_and_order(field, expected):
    assert json.dumps(field.describe(None)) == expected


def test_structures_that_may_differ_are_described_one_by_one():
    d = Description("d", 1, [Array(Struct("s", WITH_SUBSECTION), 2)])
    values = {"s": [{"x": 1}, {"x": 2, "subsections": {"deep/more": {"y": 3}}}]}
    first, second = d.describe(values)["fields"]
    assert (first["index"], first["size"], "subsections" in first["struct"]) == (0, 1, False)
    assert (second["index"], second["size"]) == (1, 1 + 2 + 9 + 4 + 1)
    assert second["struct"]["subsections"][0]["vmsd_name"] == "deep/more"


# -- attributes


def test_without_hooks_attributes_are_taken_and_set():
    d = Description(
        "d",
        1,
        [
            U8("n"),
            Bool("on"),
            Buffer("raw", 2),
            Array(U8("list"), 3),
            Struct("inner", PLAIN),
            Array(Struct("many", PLAIN), 2),
        ],
    )

    def device(n, on, raw, items, inner, many):
        return SimpleNamespace(
            n=n, on=on, raw=raw, list=items, inner=SimpleNamespace(x=inner), many=[SimpleNamespace(x=x) for x in many]
        )

    source = device(5, 1, bytearray(b"hi"), [1, 2, 3], 9, [6, 7])
    values = d.save(source, SaveContext())
    assert values == {
        "n": 5, "on": True, "raw": b"hi", "list": [1, 2, 3], "inner": {"x": 9}, "many": [{"x": 6}, {"x": 7}]
    }  # fmt: skip
    target = device(0, False, b"", [0, 0, 0], 0, [0, 0])
    same_list, same_inner = target.list, target.inner
    d.load(target, values, LoadContext())
    assert d.save(target, SaveContext()) == values
    # In place: somebody may hold a view.
    assert target.list is same_list and target.inner is same_inner
