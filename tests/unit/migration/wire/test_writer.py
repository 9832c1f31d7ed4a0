"""The writer: what a reader makes of it, what QEMU would, and the checksums."""

from __future__ import annotations

import base64
import json
import zlib

import numpy as np
import pytest

from pyvcpu.errors import ConfigurationError, MigrationError
from pyvcpu.migration.vmstate.description import Description, SaveContext, SectionEntry
from pyvcpu.migration.vmstate.fields import U8
from pyvcpu.migration.wire import checksums
from pyvcpu.migration.wire.profile import PROFILES, target_profile
from pyvcpu.migration.wire.records import Command, SectionFull, Vmdesc, pages
from pyvcpu.migration.wire.writer import StreamWriter
from tests import streams
from tests.unit.migration.wire.build import CONTENT, EOS, LAST, PART, block_list, own_stream, page, read, sections


def described(data: bytes) -> dict:
    record = read(data)[-1]
    assert isinstance(record, Vmdesc)
    return json.loads(record.json)


def test_what_was_written_is_read():
    records = read(own_stream(), require_checksums=True)
    full = [r for r in records if isinstance(r, SectionFull)]
    assert [r.values for r in full] == [values for _, values in sections()]
    assert records[-1].checked
    before = [r for r in records if isinstance(r, Command)][-1]
    assert before.value == before.crc  # a PING with the CRC-32 of everything before it


def test_a_golden_stream_written_again_is_the_same_bytes():
    """Everything between the header and the description, from records alone."""
    name = "none-7.2-counter-tcg"
    golden = streams.stream(name)
    records = read(golden)
    full = [r for r in records if isinstance(r, SectionFull)]
    first = full[0].offset
    start = golden.index(b"\3ram") - 5
    writer = StreamWriter()
    out = writer.header() + writer.configuration("none")
    assert out == golden[:start]
    for record, (description, values) in zip(full, sections(name), strict=True):
        data = description.encode(values)
        out += writer.section_full(
            record.name, 0, record.version_id, data, description.describe(values), section_id=record.section_id
        )
    assert out[start:] == golden[first : first + len(out) - start]
    assert writer.crc == zlib.crc32(out) and writer.offset == len(out)


def test_the_description_has_qemus_shape():
    vmdesc = described(own_stream())
    assert list(vmdesc) == ["configuration", "page_size", "devices", "pyvcpu"]
    golden = json.loads(streams.devices("none-7.2-counter-tcg")["cpu/0"])
    ours = {f"{d['name']}/{d['instance_id']}": d for d in vmdesc["devices"]}
    assert ours["cpu/0"] == golden
    assert vmdesc["configuration"] == {
        "vmsd_name": "configuration",
        "version": 1,
        "fields": [{"name": "len", "type": "uint32", "size": 4}, {"name": "name", "type": "buffer", "size": 4}],
    }


def test_the_checksums_are_of_what_was_sent_last():
    sums = described(own_stream())["pyvcpu"]
    packed = {name: zlib.decompress(base64.b64decode(text)) for name, text in sums["pages"].items()}
    of = {name: np.frombuffer(data, "<u4").tolist() for name, data in packed.items()}
    zeros = zlib.crc32(bytes(4096))
    assert of == {"a": [zeros, zlib.crc32(CONTENT[::-1]), zeros], "rom": [zlib.crc32(CONTENT)]}


def test_pages_that_were_not_sent_have_no_checksum_and_lost_ones_are_found():
    def stream(part: bytes, sealed: bytes | None = None) -> bytes:
        writer = StreamWriter()
        out = [writer.header(), writer.configuration("none")]
        out += writer.section_start("ram", 0, 4, block_list(), section_id=3)
        out += writer.section_end(3, part)
        out += [writer.eof(), sealed or writer.vmdesc()]
        return b"".join(out)

    short, whole = page(0, CONTENT, "a") + EOS, page(0, CONTENT, "a") + page(4096, CONTENT) + EOS
    read(stream(short), all_pages=False)
    seal = stream(whole)[-(len(stream(whole)) - stream(whole).rindex(b"\0\6")) + 1 :]
    with pytest.raises(MigrationError, match="1 pages of RAM") as caught:
        read(stream(short, seal), all_pages=False)
    assert caught.value.field == "a[0x1000]"


@pytest.mark.parametrize("size", [1, 8, 9, 100, 4103, 4104, 4105, 10**9])
def test_ram_may_come_in_any_pieces(size):
    """The checksums do not depend on how the data was cut up."""

    def pieces(data: bytes) -> list[bytes]:
        return [data[at : at + size] for at in range(0, len(data), size)]

    writer = StreamWriter()
    out = [writer.header(), writer.configuration("none")]
    out += writer.section_start("ram", 0, 4, pieces(block_list()))
    number = writer.id_of("ram")
    out += writer.section_part(number, pieces(PART)) + writer.section_end(number, pieces(LAST))
    out += [writer.eof(), writer.vmdesc()]
    records = read(b"".join(out), require_checksums=True)
    reference = own_stream()
    assert described(b"".join(out))["pyvcpu"]["pages"] == described(reference)["pyvcpu"]["pages"]
    assert len(list(pages(records))) > 8


def test_bytes_that_a_reader_would_refuse_are_not_sent():
    writer = StreamWriter()
    writer.section_start("ram", 0, 4, block_list())
    with pytest.raises(MigrationError, match="outside"):
        writer.section_part(writer.id_of("ram"), page(1 << 20, CONTENT, "a") + EOS)


def test_sections_get_ids_of_their_own():
    writer = StreamWriter()
    writer.section_start("ram", 0, 4, block_list(), section_id=3)
    for _ in range(3):
        writer.section_full("x", writer.offset, 1, b"")
    ids = [int.from_bytes(writer.section_full("y", i, 1, b"")[1:5], "big") for i in range(2)]
    # 0 and 1 are not given: QEMU takes 0 for any device of its own that the stream has not named.
    assert ids == [6, 7] and writer.id_of("ram") == 3


def test_a_section_from_an_object():
    class Lamp:
        on = 1

    lamp = Description("lamp", 1, [U8("on")])
    writer = StreamWriter()
    data = writer.section(SectionEntry(lamp, 2, Lamp()), SaveContext())
    assert data == b"\4\0\0\0\2\4lamp\0\0\0\2\0\0\0\1" + b"\1" + b"\x7e\0\0\0\2"
    assert writer.devices == [
        {
            "name": "lamp",
            "instance_id": 2,
            "vmsd_name": "lamp",
            "version": 1,
            "fields": [{"name": "on", "type": "uint8", "size": 1}],
        }
    ]


def test_what_else_is_sealed_comes_back():
    writer = StreamWriter()
    data = writer.header() + writer.configuration("none") + writer.eof() + writer.vmdesc(extra={"wish": [1, 2]})
    assert described(data)["pyvcpu"]["wish"] == [1, 2]


def test_checksums_of_another_version_are_not_guessed_at():
    text = checksums.seal({"page_size": 4096}, {"version": 2})
    with pytest.raises(MigrationError, match="another version"):
        checksums.unseal(text, json.loads(text))


@pytest.mark.parametrize("pages", ["", "!", "AAAA", base64.b64encode(zlib.compress(bytes(1 << 20))).decode(), None, 7])
def test_page_checksums_that_cannot_be_read(pages):
    sums = checksums.PageSums([("a", 4096)])
    with pytest.raises(MigrationError, match="cannot be read"):
        sums.verify({"a": pages})


def test_profiles():
    assert set(PROFILES) == {"pyvcpu", "qemu-7.2-tcg", "qemu-7.2-kvm", "qemu-10.0-tcg", "qemu-10.0-kvm"}
    for name, profile in PROFILES.items():
        assert target_profile(name) is profile is target_profile(profile)
        assert profile.kvm == name.endswith("-kvm")
        assert profile.switchover_start == name.startswith("qemu-10")
        assert profile.understands_pyvcpu == (name == "pyvcpu")
    with pytest.raises(ConfigurationError, match="qemu-9"):
        target_profile("qemu-9")
