"""Damage of every kind: the reader says where it is, or what it gives is exactly what the bytes say."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvcpu.errors import MigrationError
from pyvcpu.migration.vmstate.description import Description
from pyvcpu.migration.vmstate.fields import U8, U32, VarBuffer
from pyvcpu.migration.wire.reader import Limits, StreamReader
from pyvcpu.migration.wire.records import Record, pages
from tests import streams
from tests.unit.migration.wire.build import (
    CONTENT,
    REGISTRY,
    block_list,
    data_of,
    own_stream,
    page,
    u64,
)


def outcome(data: bytes, chunk: int | None = None, registry=REGISTRY) -> tuple[list[object], str]:
    """The records before the error, pages one by one, and the error."""
    reader = StreamReader(registry)
    records: list[Record] = []
    error = ""
    try:
        for at in range(0, len(data), chunk or max(len(data), 1)):
            for record in reader.feed(data[at : at + (chunk or len(data))]):
                records.append(record)  # noqa: PERF402 - an error comes in between
        reader.close()
    except MigrationError as caught:
        error = str(caught)
        assert caught.offset is not None or caught.section is not None, error
    return list(pages(records)), error


def test_cut_at_every_byte():
    data = own_stream()
    for size in range(len(data)):
        reader = StreamReader(REGISTRY)
        for _ in reader.feed(data[:size]):
            pass
        with pytest.raises(MigrationError) as caught:
            reader.close()
        # A field knows where it begins, everything else where the bytes ended.
        assert caught.value.offset is not None and size - 512 < caught.value.offset <= size, str(caught.value)


def test_a_cut_inside_a_section_names_the_field():
    data = own_stream()
    at = data_of(data, "cpu/0")
    reader = StreamReader(REGISTRY)
    list(reader.feed(data[: at + 16 * 8 + 3]))
    with pytest.raises(MigrationError) as caught:
        reader.close()
    assert (caught.value.section, caught.value.field, caught.value.offset) == ("cpu/0", "eip", at + 16 * 8)
    assert (caught.value.expected, caught.value.got) == ("8 bytes", "3 bytes")


ENVELOPE = b"QEVM\0\0\0\3" + b"\7\0\0\0\4none"
START = b"\1\0\0\0\2\3ram\0\0\0\0\0\0\0\4"


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("machine", b"QEVM\0\0\0\3\7\xff\xff\xff\xff"),
        ("vmdesc", ENVELOPE + b"\0\6\xff\xff\xff\xff"),
        ("block", ENVELOPE + START + u64(1 << 32 | 4) + b"\1a" + u64(1 << 62)),
        ("total", ENVELOPE + START + u64(0xFFFFFFFFFFFFF000 | 4) + b"\1a" + u64(4097)),
        ("packaged", ENVELOPE + b"\x08\0\7\0\4\xff\xff\xff\xff"),
        ("buffer", ENVELOPE + b"\4\0\0\0\1\6victim\0\0\0\0\0\0\0\1" + b"\xff\xff\xff\xff"),
    ],
)
def test_four_gibibytes_are_refused_before_they_are_waited_for(what, data):
    victim = Description("victim", 1, [U32("length"), VarBuffer("data", "length", 4096)])
    reader = StreamReader({("victim", 0): victim})
    tracemalloc.start()
    try:
        with pytest.raises(MigrationError) as caught:
            list(reader.feed(data + b"x" * 4096))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert caught.value.offset is not None


def test_a_block_list_without_end_is_bounded():
    entries = b"".join(b"\4%04d" % number + u64(4096) for number in range(10_000))
    with pytest.raises(MigrationError, match="too many RAM blocks"):
        list(StreamReader().feed(ENVELOPE + START + u64(1 << 37 | 4) + entries))


def test_huge_ram_takes_no_memory_before_pages_come():
    """A list may promise more than there is: what is kept for each page is bounded by what the machine has."""
    data = ENVELOPE + START + block_list({"a": 1 << 50})
    reader = StreamReader(ram_blocks={"a": 4096})
    with pytest.raises(MigrationError, match="another size"):
        list(reader.feed(data))
    reader = StreamReader()
    with pytest.raises(MigrationError, match="more RAM than"):
        list(reader.feed(data))


def test_unknown_sections_are_bounded():
    head = ENVELOPE + b"\4\0\0\0\1\5alien\0\0\0\0\0\0\0\1"
    reader = StreamReader(limits=Limits(unknown=100_000))
    with pytest.raises(MigrationError, match="too long") as caught:
        for _ in range(1000):
            list(reader.feed(head + b"\x55" * 1000))
            head = b""
    assert caught.value.section == "alien/0" and caught.value.offset == len(ENVELOPE)


def test_a_flood_of_false_descriptions_ends():
    head = ENVELOPE + b"\4\0\0\0\1\5alien\0\0\0\0\0\0\0\1"
    for bait in (b'\0\6\0\0\0\x08{"a":1}}', b'\0\6\0\1\0\0{"'):
        reader = StreamReader()
        with pytest.raises(MigrationError, match="too many places"):
            list(reader.feed(head + bait * 10_000))


def test_deeply_nested_json_is_an_error_like_any_other():
    text = b'{"a":' * 200_000
    data = ENVELOPE + b"\0\6" + struct.pack(">I", len(text)) + text
    with pytest.raises(MigrationError, match="not a JSON object"):
        list(StreamReader().feed(data))


@given(st.binary(max_size=200), st.integers(1, 50))
def test_random_bytes(data, chunk):
    records, error = outcome(data)
    assert error
    assert outcome(data, chunk) == (records, error)


@given(st.integers(0, 10**9), st.binary(min_size=1, max_size=40), st.booleans(), st.sampled_from([13, 1000]))
def test_random_bytes_inside_a_stream(place, junk, insert, chunk):
    data = own_stream(with_checksums=False)
    at = place % len(data)
    damaged = data[:at] + junk + data[at if insert else at + len(junk) :]
    whole = outcome(damaged)
    assert outcome(damaged, chunk) == whole


@given(st.sampled_from(streams.NAMES), st.integers(0, 10**9), st.binary(min_size=1, max_size=8))
def test_random_bytes_inside_qemus_streams(name, place, junk):
    data = streams.stream(name)
    at = place % len(data)
    damaged = data[:at] + junk + data[at + len(junk) :]
    whole = outcome(damaged)
    assert outcome(damaged, 1009) == whole


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 0xFFFFFFFFFFFFFFFF), st.binary(max_size=20)), max_size=30))
def test_random_ram(pieces):
    data = ENVELOPE + START + block_list()
    data += b"\x7e\0\0\0\2\2\0\0\0\2"
    for kind, number, junk in pieces:
        match kind:
            case 0:
                data += page(number & 0x3000, CONTENT, "a")
            case 1:
                data += page(number & 0x1000, CONTENT)
            case 2:
                data += u64(number & 0x3FF) + junk
            case 3:
                data += u64(number) + junk
            case 4:
                data += u64(0x10) + b"\x7e\0\0\0\2\2\0\0\0\2"
            case _:
                data += u64(number & 0x3000 | 0x22) + junk[:1]
    whole = outcome(data)
    assert whole[1]
    assert outcome(data, 4000) == whole
    assert outcome(data, 29) == whole


def test_a_section_that_nobody_knows_ends_no_field_of_a_known_one():
    """U8 then nothing: what looks like a subsection of it is one, unless it is not named after it."""
    short = Description("short", 1, [U8("x")])
    data = ENVELOPE + b"\4\0\0\0\1\5short\0\0\0\0\0\0\0\1\x2a" + b"\5\7short/y\0\0\0\1"
    reader = StreamReader({("short", 0): short})
    with pytest.raises(MigrationError, match="no subsection of this name") as caught:
        list(reader.feed(data))
    assert caught.value.section == "short/0" and caught.value.got == "short/y"
