"""Single bits flipped: with checksums every one is found; without, the values are exactly what the bytes say."""

from __future__ import annotations

import pytest

from pyvcpu.errors import MigrationError
from pyvcpu.migration.wire.records import SectionFull, pages
from tests.unit.migration.wire.build import CONTENT, REGISTRY, data_of, device_bytes, own_stream, read


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_every_single_bit_of_the_device_sections():
    data = own_stream(ram=False)
    first, end = device_bytes(data)
    read(data)
    missed = []
    for bit in range(first * 8, end * 8):
        try:
            read(flipped(data, bit))
            missed.append(bit)
        except MigrationError:
            pass
    assert missed == []


@pytest.mark.parametrize("check_pages", [True, False])
def test_single_bits_of_ram(check_pages):
    """Every bit of what is not a page's content, and some of every page."""
    data = own_stream(check_pages=check_pages)
    first, _ = device_bytes(data)
    at, bits = 0, []
    for record in pages(read(data)):
        offset = getattr(record, "offset", None)
        if offset is not None and offset < first:
            bits += range(offset * 8, (offset + min(record.length, 64)) * 8)
    ram = data.index(b"\x03ram")
    bits += range(ram * 8, first * 8, 331)
    missed = []
    for at in sorted(set(bits)):
        try:
            read(flipped(data, at))
            missed.append(at)
        except MigrationError:
            pass
    assert missed == []


def test_single_bits_of_the_description_with_the_checksums():
    data = own_stream()
    start = data.rindex(b'{"configuration"') - 5
    seal = data.rindex(b'"pyvcpu"')
    bits = [
        *range(start * 8, start * 8 + 400),
        *range(start * 8 + 400, seal * 8, 97),
        *range(seal * 8, len(data) * 8, 3),
    ]
    missed = []
    for bit in bits:
        try:
            read(flipped(data, bit))
            missed.append(bit)
        except MigrationError:
            pass
    assert missed == []


def test_without_checksums_the_values_are_what_the_bytes_say():
    data = own_stream(ram=False, with_checksums=False)
    first, end = device_bytes(data)
    taken = 0
    for bit in range(first * 8, end * 8, 5):
        damaged = flipped(data, bit)
        try:
            records = read(damaged)
        except MigrationError:
            continue
        taken += 1
        for record in records:
            if isinstance(record, SectionFull) and record.values is not None:
                assert damaged[record.data_offset : record.data_offset + len(record.data)] == record.data
                assert REGISTRY[record.name, 0].encode(record.values) == record.data
    assert taken > 1000  # most of a state is numbers: nothing but a checksum can tell


def test_an_error_in_ram_says_which_page():
    data = own_stream()
    at = data.index(CONTENT[::-1])
    with pytest.raises(MigrationError, match="not as they were sent") as caught:
        read(flipped(data, (at + 5) * 8))
    assert (caught.value.section, caught.value.field) == ("ram/0", "a[0x1000]")


def test_an_error_in_a_section_says_which():
    data = own_stream()
    at = data_of(data, "cpu/0")
    with pytest.raises(MigrationError, match="checksum is wrong") as caught:
        read(flipped(data, at * 8))
    assert caught.value.section == "cpu/0" and caught.value.offset == at - 17
