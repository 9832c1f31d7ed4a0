"""The reader on streams made by hand: what each kind of record becomes, and each kind of error."""

from __future__ import annotations

import numpy as np
import pytest

from pyvcpu.errors import MigrationError
from pyvcpu.migration.vmstate.description import Description
from pyvcpu.migration.vmstate.fields import U8, U32
from pyvcpu.migration.wire.reader import StreamReader
from pyvcpu.migration.wire.records import (
    Command,
    CommandType,
    Configuration,
    Footer,
    Header,
    RamBlocks,
    RamEos,
    RamPages,
    SectionEnd,
    SectionFull,
    SectionPart,
    SectionStart,
)
from tests.unit.migration.wire.build import (
    BLOCKS,
    CONTENT,
    EOS,
    REGISTRY,
    block_list,
    filled,
    own_stream,
    page,
    read,
    u64,
)

ENVELOPE = b"QEVM\0\0\0\3" + b"\7\0\0\0\4none"
START = b"\1\0\0\0\2\3ram\0\0\0\0\0\0\0\4"
FOOTER = b"\x7e\0\0\0\2"
DEVICE = Description("device", 2, [U8("x"), U32("y")], minimum_version_id=1)


def feed(data: bytes, **options):
    """The records of an unfinished stream."""
    reader = StreamReader(options.pop("registry", {("device", 0): DEVICE}), **options)
    return list(reader.feed(data))


def refused(data: bytes, match: str, **options) -> MigrationError:
    with pytest.raises(MigrationError, match=match) as caught:
        feed(data, **options)
    return caught.value


def full(data: bytes, *, name: bytes = b"device", number: int = 5, instance: int = 0, version: int = 2) -> bytes:
    head = b"\4" + number.to_bytes(4, "big") + bytes((len(name),)) + name
    head += instance.to_bytes(4, "big") + version.to_bytes(4, "big")
    return head + data + b"\x7e" + number.to_bytes(4, "big")


def test_the_records_of_a_small_stream():
    part = b"\2\0\0\0\2" + page(4096, CONTENT, "a") + filled(8192, 7) + EOS + FOOTER
    end = b"\3\0\0\0\2" + EOS + FOOTER
    data = ENVELOPE + b"\x08\0\1\0\0" + START + block_list() + FOOTER + part + end + full(b"\x01\0\0\0\x2a") + b"\x00"
    records = feed(data, all_pages=False)
    kinds = [type(r) for r in records]
    assert kinds[:3] == [Header, Configuration, Command]
    assert kinds[3:7] == [SectionStart, RamBlocks, RamEos, Footer]
    assert kinds[7:12] == [SectionPart, RamPages, RamPages, RamEos, Footer]
    assert kinds[12:15] == [SectionEnd, RamEos, Footer]
    assert records[2].command == CommandType.OPEN_RETURN_PATH
    assert records[4].blocks == tuple(BLOCKS.items())
    whole, fill = records[8], records[9]
    assert (whole.block, whole.addresses.tolist(), whole.data.tobytes()) == ("a", [4096], CONTENT)
    assert (fill.block, fill.addresses.tolist(), fill.fill.tolist()) == ("a", [8192], [7])
    section = records[15]
    assert isinstance(section, SectionFull) and section.values == {"x": 1, "y": 42}
    assert section.spans["y"].offset == section.data_offset + 1


def test_runs_of_pages_are_one_batch_without_a_copy():
    count = 700
    data = bytearray(
        ENVELOPE + START + block_list({"a": count * 4096}) + FOOTER + b"\2\0\0\0\2" + page(0, CONTENT, "a")
    )
    for number in range(1, count):
        data += page(number * 4096, number.to_bytes(2, "big") * 2048)
    batches = [r for r in feed(data) if isinstance(r, RamPages)]
    assert [len(b) for b in batches] == [1, count - 1]
    assert batches[1].addresses.tolist() == [number * 4096 for number in range(1, count)]
    assert (batches[1].data[:, 1] == np.arange(1, count) % 256).all()
    assert np.shares_memory(batches[1].data, np.frombuffer(data, np.uint8))


def test_runs_end_where_the_kind_changes():
    pieces = [page(0, CONTENT, "a")]
    pieces += [filled(4096 * i, i) for i in range(1, 100)]
    pieces += [page(4096 * i, CONTENT) for i in range(100, 120)]
    pieces += [filled(0, 1, "rom"), page(0, CONTENT)]
    data = ENVELOPE + START + block_list({"a": 120 * 4096, "rom": 4096}) + FOOTER + b"\2\0\0\0\2" + b"".join(pieces)
    batches = [r for r in feed(data) if isinstance(r, RamPages)]
    assert [(b.block, len(b)) for b in batches] == [("a", 1), ("a", 99), ("a", 20), ("rom", 1), ("rom", 1)]
    assert batches[1].fill.tolist() == list(range(1, 100))


def test_continue_outlives_a_part():
    data = ENVELOPE + START + block_list() + FOOTER + b"\2\0\0\0\2" + filled(0, 0, "rom") + EOS + FOOTER
    data += b"\2\0\0\0\2" + filled(0, 1)
    assert [r.block for r in feed(data) if isinstance(r, RamPages)] == ["rom", "rom"]


def test_what_was_fed_is_read_once_even_by_several_iterators():
    data = own_stream()
    reader = StreamReader(REGISTRY)
    first = reader.feed(data[:20000])
    head = [next(first), next(first)]
    rest = list(reader.feed(data[20000:]))
    assert [r.offset for r in head + rest] == [r.offset for r in read(data)]
    assert reader.finished


def test_an_error_comes_after_the_records_before_it_and_stays():
    reader = StreamReader({})
    found = []
    with pytest.raises(MigrationError, match="unknown") as caught:
        for record in reader.feed(ENVELOPE + b"\x55"):
            found.append(record)  # noqa: PERF402
    assert [type(r) for r in found] == [Header, Configuration]
    with pytest.raises(MigrationError) as again:
        list(reader.feed(b""))
    assert again.value is caught.value


def test_the_header():
    error = refused(b"QEMU\0\0\0\3", "not a migration stream")
    assert (error.offset, error.expected, error.got) == (0, b"QEVM", b"QEMU")
    error = refused(b"QEVM\0\0\0\2", "another version")
    assert (error.offset, error.expected, error.got) == (4, 3, 2)


def test_the_configuration():
    assert refused(b"QEVM\0\0\0\3\1", "configuration is missing").offset == 8
    error = refused(ENVELOPE + b"\0", "another machine", machine="microvm")
    assert (error.field, error.expected, error.got) == ("name", "microvm", "none")
    assert refused(b"QEVM\0\0\0\3\7\0\0\0\0\0", "name is not one").field == "name"
    assert refused(b"QEVM\0\0\0\3\7\0\0\0\2n\xff\0", "name is not one").got == b"n\xff"


def test_subsections_of_the_configuration():
    def with_capability(name: bytes) -> bytes:
        sub = b"configuration/capabilities"
        return ENVELOPE + b"\5" + bytes((len(sub),)) + sub + b"\0\0\0\1\0\0\0\1" + bytes((len(name),)) + name + b"\0"

    (configuration,) = (r for r in feed(with_capability(b"return-path")) if isinstance(r, Configuration))
    assert configuration.subsections["configuration/capabilities"]["capabilities"] == ["return-path"]
    assert refused(with_capability(b"mapped-ram"), "mapped-ram: not supported").got == "mapped-ram"
    sub = b"configuration/target-page-bits"
    other = ENVELOPE + b"\5" + bytes((len(sub),)) + sub + b"\0\0\0\1\0\0\0\x0e\0"
    assert refused(other, "other pages").got == 14


def test_footers():
    data = ENVELOPE + full(b"\x01\0\0\0\x2a")
    error = refused(data[:-5] + b"\x04", "footer is missing")
    assert (error.section, error.offset, error.got) == ("device/0", len(data) - 5, 4)
    error = refused(data[:-1] + b"\x09", "footer is of another section")
    assert (error.expected, error.got, error.offset) == (5, 9, len(data) - 4)


def test_versions_of_sections():
    assert feed(ENVELOPE + full(b"\x01\0\0\0\x2a", version=1))[2].version_id == 1
    error = refused(ENVELOPE + full(b"\x01\0\0\0\x2a", version=3), "newer than ours")
    assert (error.section, error.got) == ("device/0", 3)
    assert refused(ENVELOPE + START[:-1] + b"\3", "another version").section == "ram/0"


def test_sections_that_are_out_of_place():
    device = full(b"\x01\0\0\0\x2a")
    assert refused(ENVELOPE + device + device, "twice").section == "device/0"
    assert refused(ENVELOPE + b"\2\0\0\0\2", "not started").got == 2
    assert refused(ENVELOPE + START.replace(b"ram", b"dbm"), "nobody knows").section == "dbm/0"
    started = ENVELOPE + START + block_list() + FOOTER
    assert refused(started + b"\0", "before the end of a section").section == "ram"
    ended = started + b"\3\0\0\0\2" + EOS + FOOTER
    assert refused(ended + b"\2\0\0\0\2", "not started").got == 2
    assert refused(ENVELOPE + b"\5\1x", "SUBSECTION cannot stand here").got == 5
    assert refused(ENVELOPE + b"\0\1", "no description").offset == len(ENVELOPE) + 1


def test_commands():
    assert refused(ENVELOPE + b"\x08\0\x0c\0\0", "unknown command").got == 12
    assert refused(ENVELOPE + b"\x08\0\2\0\1", "another length").expected == 4
    for number in (3, 4, 5, 6, 7, 8, 9, 10):
        refused(ENVELOPE + b"\x08\0" + bytes((number,)) + b"\0\4", "known, not supported")
    (command,) = (r for r in feed(ENVELOPE + b"\x08\0\x0b\0\0") if isinstance(r, Command))
    assert command.command is CommandType.SWITCHOVER_START


RAM = ENVELOPE + START + block_list() + FOOTER + b"\2\0\0\0\2"


@pytest.mark.parametrize(
    ("data", "match", "field"),
    [
        (page(3 * 4096, CONTENT, "a"), "outside its RAM block", "a"),
        (filled(1 << 40, 0, "a"), "outside its RAM block", "a"),
        (page(0, CONTENT, "a") + page(3 * 4096, CONTENT), "outside its RAM block", "a"),
        (page(0, CONTENT, "a") + page(0xFFFFFFFFFFFFF000, CONTENT), "outside its RAM block", "a"),
        (page(0, CONTENT, "b"), "not listed", "block"),
        (page(0, CONTENT), "before any was named", "flags"),
        (u64(0x08) + b"\0" + CONTENT, "not one", "block"),
        (u64(0x08) + b"\1\xff" + CONTENT, "not one", "block"),
        (u64(0x1010), "has an address", "eos"),
        (u64(0), "unknown flags", "flags"),
        (u64(0x0A), "unknown flags", "flags"),
        (u64(0x01), "unknown flags", "flags"),
        (u64(0x30), "unknown flags", "flags"),
        (u64(0x40), "xbzrle.*not supported", "flags"),
        (u64(0x60), "xbzrle.*not supported", "flags"),
        (u64(0x80), "RDMA.*not supported", "flags"),
        (u64(0x100), "compress.*not supported", "flags"),
        (u64(0x200), "multifd.*not supported", "flags"),
        (u64(0x3004), "twice", "blocks"),
    ],
)
def test_bad_pieces_of_ram(data, match, field):
    error = refused(RAM + data, match)
    assert (error.section, error.field) == ("ram/0", field)
    assert error.offset is not None and len(RAM) <= error.offset < len(RAM) + len(data)


@pytest.mark.parametrize(
    ("blocks", "match", "field"),
    [
        ({"a": 4096 * 2, "rom": 4096}, "another size", "blocks[0]/size"),
        ({"a": 4096 * 3, "b": 4096}, "no such RAM block", "blocks[1]/name"),
        ({"a": 4096 * 3}, "missing", "blocks"),
        ({"a": 4095}, "impossible", "blocks[0]/size"),
        ({"": 4096}, "not one", "block"),
    ],
)
def test_blocks_that_are_not_ours(blocks, match, field):
    data = ENVELOPE + START + u64(-(-sum(blocks.values()) // 4096) * 4096 | 4) + block_list(blocks)[8:]
    error = refused(data, match, ram_blocks=BLOCKS)
    assert (error.section, error.field) == ("ram/0", field)


def test_blocks_may_be_missing_where_they_are_not_required():
    data = ENVELOPE + START + block_list({"a": BLOCKS["a"]}) + FOOTER
    assert len(feed(data, ram_blocks=BLOCKS, required_blocks=["a"])) == 6
    refused(data, "missing", ram_blocks=BLOCKS, required_blocks=["rom"])


def test_a_block_list_may_not_repeat_or_overrun():
    twice = u64(2 * 4096 | 4) + b"\1a" + u64(4096) + b"\1a" + u64(4096)
    assert refused(ENVELOPE + START + twice, "comes twice").field == "blocks[1]/name"
    assert refused(ENVELOPE + START + u64(4096 | 4) + b"\1a" + u64(8192), "impossible").got == 8192
    assert refused(ENVELOPE + START + u64(4), "without memory").field == "blocks"
    empty = ENVELOPE + START + EOS + FOOTER + b"\2\0\0\0\2"
    assert refused(empty + filled(0, 0, "a"), "before the list").offset == len(empty)


def test_bytes_after_the_end():
    data = own_stream()
    reader = StreamReader(REGISTRY)
    list(reader.feed(data))
    reader.close()
    with pytest.raises(MigrationError, match="follow the end") as caught:
        list(reader.feed(b"x"))
    assert caught.value.offset == len(data)


def test_a_bare_description_is_enough():
    for tail in (b"\6\0\0\0\0", b"\6\0\0\0\2{}"):
        reader = StreamReader()
        assert len(list(reader.feed(ENVELOPE + b"\0" + tail))) == 4
        reader.close()
    refused(ENVELOPE + b"\0\6\0\0\0\3[1]", "not a JSON object")


def test_a_section_may_end_the_stream_or_be_followed_by_anything():
    """The byte after a section decides whether a subsection follows; without it nothing is made yet."""
    data = ENVELOPE + full(b"\x01\0\0\0\x2a")
    reader = StreamReader({("device", 0): DEVICE})
    assert not [r for r in reader.feed(data[:-5]) if isinstance(r, SectionFull)]
    assert [type(r) for r in reader.feed(data[-5:])] == [SectionFull, Footer]


def test_pages_that_went_another_way_are_missed():
    """As with multifd of QEMU 7.2, which leaves only the pages of zeros in this stream."""
    data = RAM + filled(0, 0, "a") + filled(8192, 0) + EOS + FOOTER + b"\3\0\0\0\2" + EOS
    error = refused(data, "multifd")
    assert (error.section, error.field, error.offset) == ("ram/0", "a[0x1000]", len(data) - 8)
    feed(data, all_pages=False)
    feed(RAM + EOS + FOOTER + b"\3\0\0\0\2" + EOS)
