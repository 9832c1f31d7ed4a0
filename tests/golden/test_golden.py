"""The reader on every captured stream of real QEMU, at any chunking."""

from __future__ import annotations

import zlib

import pytest

from pyvcpu.errors import MigrationError
from pyvcpu.migration.wire.reader import StreamReader
from pyvcpu.migration.wire.records import (
    Command,
    Configuration,
    Eof,
    Page,
    RamBlocks,
    RamEos,
    SectionFull,
    SectionStart,
    Vmdesc,
    pages,
)
from tests import streams
from tests.unit.migration.wire.build import REGISTRY, read

EVERYTHING_KNOWN = {"none-7.2-counter-kvm", "none-7.2-counter-tcg"}


@pytest.mark.parametrize("name", streams.NAMES)
def test_any_chunking_gives_the_same_records(name):
    data = streams.stream(name)
    whole = list(pages(read(data)))
    sizes = [7, 4096]
    if len(data) < 100_000:
        sizes.append(1)
    for size in sizes:
        assert list(pages(read(data, size))) == whole, f"chunks of {size}"


@pytest.mark.parametrize("name", streams.NAMES)
def test_the_records_tile_the_stream(name):
    data = streams.stream(name)
    at, crc = 0, 0
    for record in read(data, 5000):
        if isinstance(record, Command):
            assert record.crc == crc
        assert record.offset == at
        at += record.length
        crc = zlib.crc32(data[record.offset : at], crc)
        if isinstance(record, Eof):
            assert record.crc == crc
    assert at == len(data)


@pytest.mark.parametrize("name", streams.NAMES)
def test_what_every_stream_has(name):
    records = read(streams.stream(name))
    (configuration,) = (r for r in records if isinstance(r, Configuration))
    machine = {"pc": "pc-i440fx-7.2"}.get(name.partition("-")[0], name.partition("-")[0])
    assert configuration.name == machine
    assert isinstance(records[-1], Vmdesc) and not records[-1].checked
    (start,) = (r for r in records if isinstance(r, SectionStart))
    assert (start.name, start.instance_id, start.version_id) == ("ram", 0, 4)
    (blocks,) = (r for r in records if isinstance(r, RamBlocks))
    sizes = dict(blocks.blocks)
    found = [p for p in pages(records) if isinstance(p, Page)]
    assert sum(isinstance(r, RamEos) for r in records) >= 2
    # The first pass sends every page, at the latest when the guest stands still.
    assert {(p.block, p.address) for p in found} == {
        (block, address) for block, size in sizes.items() for address in range(0, size, 4096)
    }


@pytest.mark.parametrize("name", streams.NAMES)
def test_every_section_is_there_with_its_own_bytes(name):
    data = streams.stream(name)
    records = read(data)
    full = {r.key: r for r in records if isinstance(r, SectionFull)}
    assert list(full) == list(streams.devices(name))
    for record in full.values():
        section = streams.section(name, record.name, record.instance_id)
        if record.values is not None:
            assert section is not None and (record.data, record.data_offset) == (section.data, section.offset)
            assert record.by == "description"
        else:
            assert record.by == "vmdesc" and (record.name, record.instance_id) not in REGISTRY
            assert data[record.data_offset : record.data_offset + len(record.data)] == record.data
    assert (name in EVERYTHING_KNOWN) == all(record.values is not None for record in full.values())


@pytest.mark.parametrize("name", streams.NAMES)
def test_nothing_known_is_as_good_for_splitting(name):
    """The vmdesc alone finds the same boundaries as the descriptions."""

    def boundaries(records):
        return [(r.key, r.offset, r.length, r.data) for r in records if isinstance(r, SectionFull)]

    data = streams.stream(name)
    assert boundaries(read(data, registry={})) == boundaries(read(data))


@pytest.mark.parametrize("name", [n for n in streams.NAMES if n not in EVERYTHING_KNOWN])
def test_a_cut_in_unknown_sections_can_be_salvaged_by_footers(name):
    data = streams.stream(name)
    records = read(data)
    last = [r for r in records if isinstance(r, SectionFull)][-1]
    reader = StreamReader(REGISTRY)
    before = list(reader.feed(data[: last.offset + 9]))
    with pytest.raises(MigrationError, match="ends too early, in sections that nobody described") as caught:
        reader.close()
    assert caught.value.offset == last.offset + 9
    guessed = [r for r in reader.salvage() if isinstance(r, SectionFull)]
    assert guessed and all(r.guess and r.values is None for r in guessed)
    known = [r for r in before if isinstance(r, SectionFull)]
    assert [r.offset for r in known + guessed] == [r.offset for r in records if isinstance(r, SectionFull)][:-1]


@pytest.mark.parametrize("name", streams.NAMES)
def test_checksums_that_are_not_there_can_be_insisted_on(name):
    with pytest.raises(MigrationError, match="no checksums"):
        read(streams.stream(name), require_checksums=True)


@pytest.mark.parametrize("name", streams.NAMES)
def test_another_machine_is_refused(name):
    with pytest.raises(MigrationError, match="another machine") as caught:
        read(streams.stream(name), machine="isapc")
    assert (caught.value.section, caught.value.field, caught.value.offset) == ("configuration", "name", 13)
