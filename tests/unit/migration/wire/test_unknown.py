"""Sections that nobody described: kept, split by the stream's own description, given back unchanged."""

from __future__ import annotations

import json
import struct

import pytest

from pyvcpu.errors import MigrationError
from pyvcpu.migration.vmstate.description import Description
from pyvcpu.migration.vmstate.fields import U64
from pyvcpu.migration.wire.reader import StreamReader
from pyvcpu.migration.wire.records import Opaque, SectionFull, Vmdesc
from pyvcpu.migration.wire.vmdesc import section_size
from tests.unit.migration.wire.build import REGISTRY, own_stream, read

ENVELOPE = b"QEVM\0\0\0\3" + b"\7\0\0\0\4none"

TRAPS = [
    b"\x7e\0\0\0\1" * 3,  # its own footer
    b"\0\6\0\0\0\2{}",  # an end and an empty description
    b'\0\6\0\0\0\x08{"a": 1}',
    b'\0\6\0\0\xff\xff{"',
    b"\4\0\0\0\1\3cpu\0\0\0\0\0\0\0\x0c",
    b"",
]


@pytest.mark.parametrize("data", TRAPS)
@pytest.mark.parametrize("chunk", [None, 1, 100])
def test_data_that_looks_like_the_envelope_is_still_data(data, chunk):
    records = read(own_stream(unknown=("alien", data)), chunk)
    sections = {r.key: r for r in records if isinstance(r, SectionFull)}
    assert (sections["alien/0"].data, sections["alien/0"].values, sections["alien/0"].by) == (data, None, "vmdesc")
    others = [r for key, r in sections.items() if key != "alien/0"]
    assert len(others) == 6 and all(r.values is not None and r.by == "description" for r in others)
    assert isinstance(records[-1], Vmdesc) and records[-1].checked


def described(devices, section: bytes) -> bytes:
    text = json.dumps({"page_size": 4096, "devices": devices}).encode()
    return ENVELOPE + section + b"\0\6" + struct.pack(">I", len(text)) + text


SECTION = b"\4\0\0\0\1\5alien\0\0\0\0\0\0\0\1" + b"12345678" + b"\x7e\0\0\0\1"


def device(*fields, **more):
    return {"name": "alien", "instance_id": 0, "fields": list(fields), **more}


def size(value):
    return {"name": "f", "type": "x", "size": value}


@pytest.mark.parametrize(
    "entry",
    [
        device(size(8)),
        device({**size(2), "array_len": 4}),
        device({**size(4), "index": 0}, {**size(4), "index": 1}),
        device({**size(8), "struct": {"fields": [size(1)]}}),
    ],
)
def test_sizes_from_the_description(entry):
    (section,) = (r for r in read(described([entry], SECTION), registry={}) if isinstance(r, SectionFull))
    assert section.data == b"12345678"


def test_subsections_count_with_their_head():
    entry = device(size(1), subsections=[{"vmsd_name": "a/b", "fields": [size(1)]}])
    assert section_size(entry) == 1 + (1 + 1 + 3 + 4) + 1


@pytest.mark.parametrize(
    ("devices", "match"),
    [
        ([device(size(7))], "footer is not where"),
        ([device(size(9))], "footer is not where"),
        ([device(size(1 << 40))], "impossible"),
        ([device(size(-1))], "impossible"),
        ([device(size("8"))], "impossible"),
        ([{"name": "alien", "instance_id": 0}], "how long"),
        ([{**device(size(8)), "instance_id": 1}], "the vmdesc neither"),
        ([], "the vmdesc neither"),
        ([7, None], "the vmdesc neither"),
    ],
)
def test_descriptions_that_do_not_fit(devices, match):
    with pytest.raises(MigrationError, match=match):
        read(described(devices, SECTION), registry={})


def test_a_known_section_after_an_unknown_one_is_decoded_and_checked():
    data = own_stream(unknown=("alien", b"x"), with_checksums=False)
    at = next(r for r in read(data) if isinstance(r, SectionFull) and r.key == "timer/0").offset
    newer = bytearray(data)
    newer[at + 1 + 4 + 6 + 4 + 3] = 9
    with pytest.raises(MigrationError, match="newer than ours") as caught:
        read(bytes(newer))
    assert caught.value.section == "timer/0"


@pytest.mark.parametrize("name", ["alien", "known"])
def test_no_section_comes_twice_after_an_unknown_one_either(name):
    """Neither the unknown one itself, nor one that was there before it."""
    known = SECTION.replace(b"alien", b"known")
    sections = SECTION + SECTION if name == "alien" else known + SECTION + known
    entries = [device(size(8)), {**device(size(8)), "name": name}]
    with pytest.raises(MigrationError, match="comes twice") as caught:
        read(described(entries, sections), registry={("known", 0): Description("known", 1, [U64("x")])})
    assert caught.value.section == f"{name}/0"
    assert caught.value.offset == len(ENVELOPE) + len(sections) - len(SECTION)


def test_without_a_description_it_never_ends_but_says_so():
    reader = StreamReader(REGISTRY)
    list(reader.feed(ENVELOPE + SECTION + b"\0\6\0\0\0\0"))
    with pytest.raises(MigrationError, match="nobody described") as caught:
        reader.close()
    assert caught.value.section == "alien/0"
    full, footer, rest = reader.salvage()
    assert isinstance(full, SectionFull) and (full.data, full.guess) == (b"12345678", True)
    assert isinstance(rest, Opaque) and rest.data == b"\0\6\0\0\0\0"
    assert (full.offset, footer.offset) == (len(ENVELOPE), len(ENVELOPE) + len(SECTION) - 5)
