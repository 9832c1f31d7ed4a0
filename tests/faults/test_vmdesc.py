"""A vmdesc that lies: the stream's description of itself is a stranger's, and is held against the bytes.

What it claims about sections that nobody here describes decides how a stream is split and what ``inspect``
shows. Whatever it says: an answer or a MigrationError, soon, and in little memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tempfile
import tracemalloc
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvcpu.analysis.inspect import MAX_COMMANDS, inspect_command, inspect_file
from pyvcpu.analysis.tree import Described
from pyvcpu.errors import MigrationError
from pyvcpu.migration.wire.reader import StreamReader
from pyvcpu.migration.wire.records import Vmdesc
from pyvcpu.migration.wire.vmdesc import MAX_VALUES, count_values
from tests import streams
from tests.unit.migration.wire.build import own_stream, read

ENVELOPE = b"QEVM\0\0\0\3" + b"\7\0\0\0\4none"
SECTION = b"\4\0\0\0\1\5alien\0\0\0\0\0\0\0\1" + b"abcd" + b"\x7e\0\0\0\1"
WORD = {"name": "d", "size": 4}


def vmdesc(content: Any) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return b"\0\6" + struct.pack(">I", len(text)) + text


def alien(*fields: Any, **more: Any) -> bytes:
    """A stream with one unknown section of 4 bytes, and what its vmdesc says of it."""
    return ENVELOPE + SECTION + vmdesc({"devices": [{"name": "alien", "instance_id": 0, "fields": [*fields], **more}]})


def inside(*fields: Any, **more: Any) -> bytes:
    """The same with the fields inside a structure, where no size is needed to split the stream."""
    return alien({**WORD, "struct": {"fields": [*fields], **more}})


def nested(depth: int, count: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": "x", "size": 0, "array_len": count}
    for _ in range(depth):
        entry = {"name": "s", "size": 0, "array_len": count, "struct": {"fields": [entry]}}
    return entry


def shown(data: bytes) -> tuple[str, str, dict[str, Any]]:
    """(text, what went to stderr, JSON) of what ``inspect`` makes of a stream."""
    text, errors, encoded = io.StringIO(), io.StringIO(), io.StringIO()
    with tempfile.NamedTemporaryFile() as file, contextlib.redirect_stderr(errors):
        file.write(data)
        file.flush()
        inspect_command(file.name, None, False, text)
        inspect_command(file.name, None, True, encoded)
    text.getvalue().encode("ascii")
    return text.getvalue(), errors.getvalue(), json.loads(encoded.getvalue())


LIES = {
    "devices is a number": ENVELOPE + vmdesc({"devices": 5}),
    "devices is null": ENVELOPE + vmdesc({"devices": None}),
    "a device has no text for a name": ENVELOPE + vmdesc({"devices": [{"name": [1], "instance_id": {}}, 7]}),
    "billions of nothing": alien({"name": "z", "size": 0, "array_len": 0xFFFFFFFF}, WORD),
    "nothing to the power of nothing": alien(nested(20, 10), WORD),
    "no size": inside({"name": "q"}),
    "no name": inside({"size": 4}),
    "a structure of text": alien({**WORD, "struct": "x"}),
    "fields is a number": alien({**WORD, "struct": {"fields": 3}}),
    "a negative size": inside({"name": "q", "size": -4}, {"name": "w", "size": 8}),
    "a size without end": inside({"name": "q", "size": 10**30}),
    "elements without end": inside({"name": "q", "size": 1, "array_len": 10**9}),
    "elements are text": inside({"name": "q", "size": 1, "array_len": "4"}),
    "one byte short": inside({"name": "q", "size": 3}),
    "a subsection that is not there": inside(
        {"name": "q", "size": 1}, subsections=[{"vmsd_name": "", "version": 0, "fields": []}]
    ),
    "a surrogate": alien({"name": "\ud800", "size": 4}),
    "a terminal's command": alien({"name": "\x1b[2J\nfake", "size": 4}, vmsd_name="\x1b"),
    "an index that is an object": alien({**WORD, "index": {"a": "\x1b"}}),
    "a type that is a list": alien({**WORD, "type": ["\x1b"]}),
}


@pytest.mark.parametrize("data", LIES.values(), ids=LIES)
def test_lies_are_shown_as_raw_bytes(data):
    tracemalloc.start()
    try:
        text, errors, found = shown(data)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert not errors and found["error"] is None
    assert "\x1b" not in text
    for section in found["sections"]:
        assert section["name"] == "alien" and section["size"] == 4
        assert "61 62 63 64" in text


REFUSED = {
    "a size that is true": (alien({"name": "d", "size": True, "array_len": 4}), "impossible"),
    "a size with a point": (alien({"name": "d", "size": 4.0}), "impossible"),
    "fields by name": (ENVELOPE + SECTION + vmdesc({"devices": [{"name": "alien", "instance_id": 0, "fields": {}}]}),
                       "how long"),
    "subsections is a number": (alien(WORD, subsections=5), "how long"),
    "a subsection is a number": (alien(WORD, subsections=[5]), "how long"),
    "a subsection's name is a number": (alien(WORD, subsections=[{"vmsd_name": 7, "fields": []}]), "how long"),
    "UTF-16": (ENVELOPE + vmdesc('{"devices": []}'.encode("utf-16")), "not a JSON object"),
    "half a character": (ENVELOPE + vmdesc(b'{"devices": "\xff"}'), "not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "match"), REFUSED.values(), ids=REFUSED)
def test_lies_that_decide_where_a_section_ends_are_refused(data, match):
    with pytest.raises(MigrationError, match=match) as caught:
        read(data, registry={})
    assert caught.value.offset is not None and caught.value.section == "vmdesc"
    text, errors, _ = shown(data)
    assert match in errors and "machine none" in text


@pytest.mark.parametrize("value", [b"[],", b"{},", b'"",', b"0,", b'{"a":0},'])
@pytest.mark.parametrize("section", [b"", SECTION], ids=["known", "unknown"])
def test_values_are_counted_before_they_are_made(value, section):
    """30 MiB of them would be up to 800 MiB of objects."""
    text = b'{"devices":[' + value * ((30 << 20) // len(value)) + b"0]}"
    data = ENVELOPE + section + vmdesc(text)
    reader = StreamReader({})
    tracemalloc.start()
    try:
        with pytest.raises(MigrationError):
            list(reader.feed(data))
            reader.close()
        # The text itself, and copies of it; not what it would become.
        assert tracemalloc.get_traced_memory()[1] < 4 * len(text)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", streams.NAMES)
def test_real_streams_are_far_from_the_bounds(name):
    found = inspect_file(str(streams.GOLDEN / f"{name}.mig.xz"))
    assert found.vmdesc is not None and count_values(found.vmdesc.json) * 30 < MAX_VALUES


def test_only_so_many_fields_are_made_and_the_rest_is_raw():
    array = {"name": "a", "size": 1, "array_len": 40, "type": "uint8"}
    device = {"fields": [array, array, {"name": "z", "size": 1, "type": "uint8"}]}
    data = bytes(range(81))
    first, second, last = Described(max_nodes=60).tree(device, data, 0)
    assert first.value == list(range(40)) and len(first.children) == 40
    assert (second.value, second.children, second.offset) == (data[40:80], [], 40)
    assert last.value == 80
    (raw,) = Described(max_nodes=2).tree(device, data, 0)
    assert (raw.name, raw.value) == ("data", data)


def test_a_subsection_is_shown_where_its_head_is_and_nowhere_else():
    sub = {"vmsd_name": "alien/x", "version": 2, "fields": [{"name": "y", "size": 1, "type": "uint8"}]}
    device = {"fields": [{"name": "z", "size": 1, "type": "uint8"}], "subsections": [sub]}
    data = b"\x07" + b"\5\7alien/x\0\0\0\2" + b"\x09"
    first, second = Described().tree(device, data, 100)
    assert (first.value, second.name, second.offset, second.size) == (7, "x", 101, 14)
    assert (second.children[0].value, second.children[0].offset) == (9, 114)
    for at in range(1, len(data) - 1):
        (raw,) = Described().tree(device, data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :], 100)
        assert raw.name == "data"


def test_a_flood_of_commands_is_counted_and_not_kept():
    count = MAX_COMMANDS + 5
    data = ENVELOPE + b"\x08\0\2\0\4ping" * count + b"\0\6\0\0\0\2{}"
    text, errors, found = shown(data)
    assert not errors and (found["command_count"], len(found["commands"])) == (count, MAX_COMMANDS)
    assert f"commands {count}, of which the last 5 are not shown" in text


def test_errors_say_nothing_to_a_terminal():
    name = b"configuration/capabilities"
    data = ENVELOPE + b"\5" + bytes((len(name),)) + name + b"\0\0\0\1" + b"\0\0\0\1" + b"\5\x1b[2J\n" + b"\0" * 300
    with pytest.raises(MigrationError, match="the name of a capability is not one"):
        list(StreamReader({}).feed(data))
    error = MigrationError("said\x1b[2J", section="a\nb", expected="\x07", got="\ud800 \u00e9")
    assert str(error) == "said\\x1b[2J (section a\\nb): expected \\x07, got \\ud800 \u00e9"


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found.append((value, key))
        places(item, found)
    return found


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 20), st.integers(0, 1 << 70), st.floats(allow_nan=False),
    st.text(max_size=3), st.just([]), st.just({}), st.just([{"name": "x", "size": 1}]),
    st.just({"fields": [{"name": "x", "size": 0, "array_len": 1 << 31}]}),
)  # fmt: skip
NAMES = [name for name in streams.NAMES if name.startswith(("microvm", "pc"))]


@cache
def taken_apart(name: str) -> tuple[bytes, bytes]:
    """A golden stream up to EOF, and its JSON."""
    record = read(streams.stream(name))[-1]
    assert isinstance(record, Vmdesc)
    return streams.stream(name)[: record.offset - 1], record.json


@given(st.sampled_from(NAMES), st.lists(st.tuples(st.integers(0, 10**6), JUNK), min_size=1, max_size=3))
def test_any_change_of_the_json_ends_in_an_answer(name, changes):
    data, content = taken_apart(name)
    content = json.loads(content)
    for place, junk in changes:
        where = places(content, [])
        if not where:
            break
        container, key = where[place % len(where)]
        container[key] = junk
    _, errors, found = shown(data + vmdesc(content))
    assert bool(errors) == (found["error"] is not None)


def test_our_own_description_is_taken():
    assert read(own_stream(unknown=("alien", b"x")))[-1].checked
