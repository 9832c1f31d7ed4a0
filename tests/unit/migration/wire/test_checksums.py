"""The checksums in the trailer: each finds its own damage, without the help of the others."""

from __future__ import annotations

import base64
import json
import struct
import zlib

import numpy as np
import pytest

from pyvcpu.errors import MigrationError
from pyvcpu.migration.wire.checksums import KEY, PageSums, seal, unseal, verify
from pyvcpu.migration.wire.records import PAGE_SIZE, RamPages
from tests.unit.migration.wire.build import own_stream, read

BLOCKS = (("a", 3 * PAGE_SIZE), ("rom", PAGE_SIZE))
SUMS = {"version": 1, "stream": 0x12345678, "length": 1000, "sections": {"cpu/0": 7, "apic/0": 8}, "pages": {}}
READ = {"cpu/0": (7, 0x100), "apic/0": (8, 0x200)}


def whole(block: str, *pages: tuple[int, bytes]) -> RamPages:
    data = np.frombuffer(b"".join(content for _, content in pages), np.uint8).reshape(len(pages), PAGE_SIZE)
    return RamPages(0, 0, block, np.array([at for at, _ in pages], np.int64), data=data)


def filled(block: str, *pages: tuple[int, int]) -> RamPages:
    addresses = np.array([at for at, _ in pages], np.int64)
    return RamPages(0, 0, block, addresses, fill=np.array([fill for _, fill in pages], np.uint8))


def pack(*sums: int) -> str:
    return base64.b64encode(zlib.compress(struct.pack(f"<{len(sums)}I", *sums))).decode()


A, B = b"A" * PAGE_SIZE, bytes(range(256)) * 16


def test_the_last_version_of_a_page_counts():
    sums = PageSums(BLOCKS)
    sums.add(whole("a", (4096, A), (0, A)))
    sums.add(whole("a", (0, A), (0, B)))  # twice in one batch, and backwards
    sums.add(filled("rom", (0, 0x41)))
    assert sums.to_json() == {
        "a": base64.b64encode(zlib.compress(struct.pack("<3I", zlib.crc32(B), zlib.crc32(A), 0), 1)).decode(),
        "rom": base64.b64encode(zlib.compress(struct.pack("<I", zlib.crc32(A)), 1)).decode(),
    }


def test_the_page_that_differs_is_named():
    sums = PageSums(BLOCKS)
    sums.add(whole("a", (0, A), (4096, B), (8192, B)))
    sums.verify({"a": pack(zlib.crc32(A), zlib.crc32(B), zlib.crc32(B)), "rom": pack(0)})
    with pytest.raises(MigrationError, match="2 pages") as caught:
        sums.verify({"a": pack(zlib.crc32(A), zlib.crc32(A), zlib.crc32(A)), "rom": pack(0)})
    error = caught.value
    assert (error.section, error.field) == ("ram/0", "a[0x1000]")
    assert (error.expected, error.got) == (f"CRC-32 {zlib.crc32(A):08x}", f"{zlib.crc32(B):08x}")


@pytest.mark.parametrize(
    "packed",
    [
        None,
        7,
        "",
        "?",
        base64.b64encode(b"no zlib").decode(),
        pack(0, 0),
        pack(0, 0, 0, 0),
        base64.b64encode(zlib.compress(bytes(12))[:-1]).decode(),
        base64.b64encode(zlib.compress(bytes(1 << 24))).decode(),
    ],
)
def test_page_sums_that_cannot_be_read(packed):
    with pytest.raises(MigrationError, match="cannot be read") as caught:
        PageSums(BLOCKS).verify({"a": packed, "rom": pack(0)})
    assert (caught.value.section, caught.value.field) == ("vmdesc", "pyvcpu/pages/a")


@pytest.mark.parametrize("blocks", [(), ("a",), ("rom", "a"), ("a", "b")])
def test_page_sums_of_other_blocks(blocks):
    with pytest.raises(MigrationError, match="other RAM blocks"):
        PageSums(BLOCKS).verify(dict.fromkeys(blocks, pack(0, 0, 0)))


def sealed(content=None, **more) -> bytes:
    return seal({"page_size": 4096, "devices": [], **more}, content or SUMS)


def test_what_is_sealed_can_be_opened_and_is_json():
    text = sealed()
    description = json.loads(text)
    assert unseal(text, description) == description[KEY]
    assert {key: description[KEY][key] for key in SUMS} == SUMS


def test_a_stream_without_any_has_none():
    text = json.dumps({"page_size": 4096, "devices": []}).encode()
    assert unseal(text, json.loads(text)) is None


def test_every_character_is_under_the_seal():
    text = sealed()
    for at in range(len(text)):
        for other in {*b'0 x"', text[at] ^ 1, text[at] ^ 0x20}:
            damaged = text[:at] + bytes((other,)) + text[at + 1 :]
            try:
                description = json.loads(damaged)
            except ValueError:
                continue
            if damaged == text or not isinstance(description, dict):
                continue
            with pytest.raises(MigrationError) as caught:
                unseal(damaged, description)
            assert caught.value.section == "vmdesc"


def test_a_key_that_hides_is_found():
    """As no checksums at all, damage would go through."""
    text = sealed().replace(b'"pyvcpu"', b'"pyvcp\\u0075"')
    with pytest.raises(MigrationError, match="themselves are damaged"):
        unseal(text, json.loads(text))
    bare = json.dumps({"devices": [], KEY: SUMS}).encode()
    with pytest.raises(MigrationError, match="not sealed"):
        unseal(bare, json.loads(bare))


@pytest.mark.parametrize("key", ["version", "stream", "length", "sections", "pages"])
@pytest.mark.parametrize("value", [None, "1", [1]])
def test_a_sum_that_is_none(key, value):
    text = sealed({**SUMS, key: value})
    with pytest.raises(MigrationError, match=r"another version|is missing") as caught:
        unseal(text, json.loads(text))
    assert caught.value.field == f"pyvcpu/{key}"


def test_everything_is_as_it_was_sent():
    verify(SUMS, crc=0x12345678, length=1000, sections=READ, pages=None)


@pytest.mark.parametrize(
    ("change", "match", "where"),
    [
        ({"crc": 0x12345679}, "whole stream", (None, 1000)),
        ({"length": 999}, "whole stream", (None, 999)),
        ({"sections": {**READ, "cpu/0": (6, 0x100)}}, "section's checksum", ("cpu/0", 0x100)),
        ({"sections": {"cpu/0": (7, 0x100)}}, "sent is missing", ("apic/0", None)),
        ({"sections": {**READ, "serial/0": (9, 0x300)}}, "section's checksum", ("serial/0", 0x300)),
    ],
)
def test_each_sum_on_its_own(change, match, where):
    given = {"crc": 0x12345678, "length": 1000, "sections": READ, "pages": None, **change}
    with pytest.raises(MigrationError, match=match) as caught:
        verify(SUMS, **given)
    assert (caught.value.section, caught.value.offset) == where


def test_ram_that_was_sent_and_never_came():
    sums = {**SUMS, "pages": {"a": pack(0, 0, 0)}}
    given = {"crc": 0x12345678, "length": 1000, "sections": READ, "pages": None}
    with pytest.raises(MigrationError, match="RAM was sent"):
        verify(sums, **given)
    verify(sums, **given, check_pages=False)


def test_the_whole_stream_is_under_one_sum():
    """A byte that no other sum covers: the argument of a PING."""
    data = own_stream()
    at = data.index(b"\x08\0\2\0\4") + 5
    with pytest.raises(MigrationError, match="whole stream"):
        read(data[:at] + b"\xff" + data[at + 1 :])
