"""What ``pyvcpu inspect`` shows, of every golden stream and of damaged ones."""

from __future__ import annotations

import io
import json
import lzma
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvcpu.analysis import explain
from pyvcpu.analysis.inspect import inspect_command, inspect_file
from pyvcpu.errors import ConfigurationError
from pyvcpu.migration.vmstate.codec import flatten
from pyvcpu.migration.wire.records import SectionFull
from tests import streams
from tests.unit.migration.wire.build import CONTENT, data_of, own_stream, read


def golden(name: str) -> str:
    return str(streams.GOLDEN / f"{name}.mig.xz")


def shown(path: str, selector: str | None = None) -> str:
    out = io.StringIO()
    assert inspect_command(path, selector, False, out) == 0
    return out.getvalue()


def as_json(path: str, selector: str | None = None) -> dict:
    out = io.StringIO()
    assert inspect_command(path, selector, True, out) == 0
    return json.loads(out.getvalue())


@pytest.mark.parametrize("name", streams.NAMES)
def test_every_golden_stream(name):
    data = streams.stream(name)
    found = as_json(golden(name))
    assert (found["size"], found["checksums"], found["error"], found["notes"]) == (len(data), "none", None, [])
    sections = [r for r in read(data) if isinstance(r, SectionFull)]
    assert [f"{s['name']}/{s['instance']}" for s in found["sections"]] == list(streams.devices(name))
    for section, record in zip(found["sections"], sections, strict=True):
        assert (section["offset"], section["size"], section["by"]) == (record.offset, len(record.data), record.by)
        fields = section["fields"]
        for field in fields:
            assert record.data_offset <= field["offset"]
            assert field["offset"] + field["size"] <= record.data_offset + len(record.data)
    text = shown(golden(name))
    unknown = [f"{r.name}/{r.instance_id}" for r in sections if r.values is None]
    assert text.count("(by the stream's vmdesc)") == len(unknown)
    if unknown:
        assert text.splitlines()[-1] == f"{len(unknown)} sections that pyvcpu does not know: {', '.join(unknown)}"


@pytest.mark.parametrize("name", streams.NAMES)
def test_fields_by_the_vmdesc_tile_their_section(name):
    """Where nothing has a head of its own (no subsections), offsets and sizes of the leaves leave no gap."""

    def leaves(node):
        if not node.children:
            yield node
        for child in node.children:
            yield from leaves(child)

    found = inspect_file(golden(name))
    for section, fields in found.sections:
        entry = json.loads(streams.devices(name)[section.key])
        if section.by != "vmdesc" or '"subsections"' in json.dumps(entry):
            continue
        at = section.data_offset
        for field in fields:
            for leaf in leaves(field):
                assert leaf.offset == at, (section.key, leaf.name)
                at += leaf.size
        assert at == section.data_offset + len(section.data)


def test_every_value_of_a_known_section_has_a_path():
    name = "none-7.2-icount-tcg"
    found = inspect_file(golden(name))
    for record in read(streams.stream(name)):
        if isinstance(record, SectionFull) and record.values is not None:
            for path, value in flatten(record.values):
                node = found.find(f"{record.name}/{path}")
                assert node is not None and node.value == value, path
                assert found.find(f"{record.key}/{path}") is node
                data = streams.stream(name)[node.offset : node.offset + node.size]
                if isinstance(value, int):
                    assert int.from_bytes(data, "big", signed=value < 0) == value, path
                else:
                    assert data == value, path


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        ("cpu/regs[3]", "[3] (rbx) = 0x1122334455667788"),
        ("cpu/0/regs[3]", "[3] (rbx) = 0x1122334455667788"),
        ("cpu/rbx", "[3] (rbx) = 0x1122334455667788"),
        ("cpu/rip", "eip (rip) = 0x80dd"),
        ("cpu/cr0", "cr0 = 0xe0000013 [PE MP ET NW CD PG]"),
        ("cpu/cr4", "cr4 = 0x620 [PAE OSFXSR OSXMMEXCPT]"),
        ("cpu/efer", "efer = 0xd00 [LME LMA NXE]"),
        ("cpu/cs", "[1] (cs) 0008 base=0x0 limit=0x0 0x209a00 [code read 64-bit DPL=0]"),
        ("cpu/cs/limit", "limit = 0"),
        ("cpu/xmm3", "[3] (xmm3) 0000000000000000_deadbeefcafef00d"),
        ("cpu/pat", "pat = 0x7040600070406 [WB WT UC- UC WB WT UC- UC]"),
        ("apic/apicbase", "apicbase = 0xfee00900 [BSP enabled at 0xfee00000]"),
        ("apic/lvt[0]", "[0] (lvt_timer) = 0x10000 [vector=0x0 one-shot masked]"),
        ("timer/cpu_clock_offset", "cpu_clock_offset = 891301449 [0.891301449 s]"),
        ("globalstate/runstate", "runstate = 'running'"),
        ("i8254/channels[2]/gate", "gate = 0"),
        ("ioapic/1/ioredtbl[23]", "[23] = 0x10000"),
        ("configuration/name", "name = microvm"),
        ("ram/pc.bios", "pc.bios = 0x10000 bytes, 16 pages: 16 sent, 14 of them zero, 0 sent again, 0 never sent"),
    ],
)
def test_paths(selector, text):
    line = shown(golden("microvm-10.0-counter-tcg"), selector).splitlines()[0]
    assert line.split(maxsplit=2 if line[0] == "0" else 1)[-1].strip() == text


def test_a_structure_that_was_asked_for_shows_its_fields():
    lines = shown(golden("microvm-10.0-counter-tcg"), "cpu/cs").splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["selector", "base", "limit", "flags"]


@pytest.mark.parametrize(
    "selector", ["nothing", "cpu/nothing", "cpu/regs[16]", "cpu/1/eip", "ram/x", "ram/microvm.ram[1]]"]
)
def test_a_path_to_nowhere_says_what_there_is(selector):
    with pytest.raises(ConfigurationError, match=r"microvm|address"):
        shown(golden("microvm-10.0-counter-tcg"), selector)


def test_ram_in_numbers():
    (block, rom) = inspect_own(own_stream())["ram"]["blocks"]
    assert block == {
        "name": "a",
        "size": 12288,
        "pages": 3,
        "sent": 3,
        "never_sent": 0,
        "zero": 2,
        "duplicates": 1,
        "whole_records": 2,
        "fill_records": 2,
    }
    assert (rom["sent"], rom["zero"], rom["duplicates"]) == (1, 0, 1)


def inspect_own(data: bytes) -> dict:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        found = inspect_file(file.name)
    return found.to_json()


def test_a_page(tmp_path):
    path = tmp_path / "stream"
    path.write_bytes(own_stream())
    lines = shown(str(path), "ram/a[0x1234]").splitlines()
    assert len(lines) == 256 and lines[0].startswith("0x00001000  ff fe fd") and lines[-1].startswith("0x00001ff0")
    assert shown(str(path), "ram/a[0]").splitlines() == [
        "0x00000000  " + " ".join(["00"] * 16) + "  ................",
        "*",
    ]
    assert bytes.fromhex(as_json(str(path), "ram/rom[0]")["data"]) == CONTENT
    with pytest.raises(ConfigurationError, match="no page"):
        shown(str(path), "ram/a[0x3000]")
    with pytest.raises(ConfigurationError, match="not an address"):
        shown(str(path), "ram/a[x]")


def test_our_own_stream_says_that_it_was_verified(tmp_path):
    path = tmp_path / "stream.xz"
    path.write_bytes(lzma.compress(own_stream()))
    assert "checksums verified" in shown(str(path)).splitlines()[0]
    assert [c["command"] for c in as_json(str(path))["commands"]] == ["OPEN_RETURN_PATH", "PING", "PING"]


def test_a_damaged_stream_is_shown_up_to_there(tmp_path, capsys):
    path = tmp_path / "stream"
    data = own_stream()
    cut = data_of(data, "apic/0") + 20
    path.write_bytes(data[:cut])
    out = io.StringIO()
    assert inspect_command(str(path), None, False, out) == 1
    assert "cpu/0" in out.getvalue() and "apic/0" not in out.getvalue()
    assert "section apic/0" in capsys.readouterr().err


def test_a_known_section_that_does_not_decode_is_taken_as_unknown(tmp_path):
    path = tmp_path / "stream"
    data = bytearray(own_stream(with_checksums=False))
    at = data_of(bytes(data), "cpu/0")
    data[at - 1] = 99  # the version
    path.write_bytes(data)
    found = inspect_file(str(path))
    assert found.error is None and "newer than ours" in found.notes[0]
    (cpu,) = (section for section, _ in found.sections if section.name == "cpu")
    whole = next(r for r in read(own_stream()) if isinstance(r, SectionFull) and r.name == "cpu")
    assert cpu.by == "vmdesc" and found.find("cpu/env.eip").value == whole.values["eip"]
    assert found.find("apic/apicbase").text.endswith("[BSP enabled at 0xfee00000]")


@given(st.sampled_from(streams.NAMES), st.integers(0, 10**9), st.binary(min_size=1, max_size=8), st.booleans())
def test_no_damage_ends_in_anything_but_an_answer(name, place, junk, cut):
    data = streams.stream(name)
    at = place % len(data)
    found = inspect_own(data[:at] + junk + (b"" if cut else data[at + len(junk) :]))
    json.dumps(found)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot read"):
        shown(str(tmp_path / "absent"))
    torn = tmp_path / "torn.xz"
    torn.write_bytes(lzma.compress(own_stream())[:-100])
    with pytest.raises(ConfigurationError, match="cannot read"):
        shown(str(torn))


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (explain.rflags, 0x3246, "0x3246 [PF ZF IF IOPL=3]"),
        (explain.segment_flags, 0xCFFB00, "0xcffb00 [code read accessed 32-bit DPL=3 4K]"),
        (explain.segment_flags, 0xAF9B00, "0xaf9b00 [code read accessed 64-bit DPL=0 4K]"),
        (explain.segment_flags, 0x8B00, "0x8b00 [busy TSS DPL=0]"),
        (explain.segment_flags, 0, "0x0 [system type 0 DPL=0 not present]"),
        (explain.hflags, 0x40C2B3, "0x40c2b3 [CS32 SS32 PE MP LMA CS64 OSFXSR CPL=3]"),
        (explain.divider, 0b1011, "0xb [by 1]"),
        (explain.divider, 0, "0x0 [by 2]"),
        (explain.divider, 0b1010, "0xa [by 128]"),
        (explain.fpu_status, 0x3800, "0x3800 [TOP=7]"),
        (explain.expiry, -1, "-1 [off]"),
        (explain.lvt, 0x10400, "0x10400 [vector=0x0 NMI masked]"),
        (explain.lvt_timer, 0x20030, "0x20030 [vector=0x30 periodic]"),
        (explain.vectors, [0, 0x10000, 0, 0, 0, 0, 0, 1 << 31], "[0x30 0xff]"),
        (
            explain.extended,
            {"tmp_mant": 0xC90FDAA22168C235, "tmp_exp": 0x4000},
            "4000:c90fdaa22168c235 [3.141592653589793]",
        ),
        (explain.extended, {"tmp_mant": 1 << 63, "tmp_exp": 0xBFFF}, "bfff:8000000000000000 [-1.0]"),
        (explain.extended, {"tmp_mant": 1 << 63, "tmp_exp": 0x7FFF}, "7fff:8000000000000000 [infinity]"),
        (explain.extended, {"tmp_mant": 3 << 62, "tmp_exp": 0xFFFF}, "ffff:c000000000000000 [NaN]"),
        (explain.extended, {"tmp_mant": 1 << 63, "tmp_exp": 0x7FFE}, "7ffe:8000000000000000 [beyond double]"),
    ],
)
def test_numbers_as_people_write_them(function, value, text):
    assert function(value) == text
