"""The return path: every message there and back at any chunking, and every kind of damage."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvcpu.errors import MigrationError
from pyvcpu.migration.wire import return_path as rp

ALL = (
    rp.pong(0x70766370)
    + rp.message({"hello": {"machine": "none"}})
    + rp.request_pages(0x1000, 8192, "pc.ram")
    + rp.request_pages(0x3000, 4096)
    + rp.received_bitmap("pc.ram", bytes(range(16)))
    + rp.resume_ack()
    + rp.switchover_ack()
    + rp.shut(0)
)

STARTS = (0, 8, 40, 63, 79, 122, 130, 134)


def read(data: bytes, chunk: int = 1 << 20) -> list[rp.Reply]:
    reader = rp.ReplyReader()
    found: list[rp.Reply] = []
    for at in range(0, len(data), chunk):
        found += reader.feed(data[at : at + chunk])
    reader.close()
    return found


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
def test_every_message_at_any_chunking(chunk):
    found = read(ALL, chunk)
    assert [type(reply) for reply in found] == [
        rp.Pong,
        rp.Message,
        rp.RequestPages,
        rp.RequestPages,
        rp.ReceivedBitmap,
        rp.ResumeAck,
        rp.SwitchoverAck,
        rp.Shut,
    ]
    pong, message, first, second, bitmap, ack, _, shut = found
    assert (pong.value, message.content) == (0x70766370, {"hello": {"machine": "none"}})
    assert (first.start, first.size, first.block) == (0x1000, 8192, "pc.ram")
    assert (second.start, second.size, second.block) == (0x3000, 4096, None)
    assert (bitmap.block, bitmap.bitmap) == ("pc.ram", bytes(range(16)))
    assert (ack.value, shut.value, shut.ok) == (1, 0, True)
    assert [reply.offset for reply in found] == list(STARTS)


def test_the_bytes_are_qemus():
    assert rp.pong(1) == bytes.fromhex("0002 0004 00000001")
    assert rp.shut(1) == bytes.fromhex("0001 0004 00000001")
    assert rp.switchover_ack() == bytes.fromhex("0007 0000")
    assert rp.request_pages(4096, 4096, "a") == bytes.fromhex("0003 000e 0000000000001000 00001000 01 61")


@pytest.mark.parametrize(
    ("data", "match", "field"),
    [
        (struct.pack(">HH", 0, 0), "unknown type", "type"),
        (struct.pack(">HH", 8, 4), "unknown type", "type"),
        (struct.pack(">HH", 1, 5), "length of a SHUT", "length"),
        (struct.pack(">HH", 2, 0xFFFF), "length of a PONG", "length"),
        (struct.pack(">HH", 3, 512), "length of a REQ_PAGES_ID", "length"),
        (struct.pack(">HH", 3, 14) + bytes(12) + b"\2a", "name of a RAM block", "block"),
        (struct.pack(">HH", 5, 2) + b"\1\xff", "name of a RAM block", "block"),
        (rp.received_bitmap("a", b"")[:6] + b"\xff" * 8, "bitmap is too long", "size"),
        (rp.received_bitmap("a", b"12345678")[:-1] + b"\0", "end of a bitmap", "end"),
        (struct.pack(">HH", 0x7076, 2) + b"[]", "not one", "payload"),
        (struct.pack(">HH", 0x7076, 2) + b'{"', "not one", "payload"),
        (struct.pack(">HH", 0x7076, 60000) + b"[" * 60000, "not one", "payload"),
    ],
)
def test_damage(data, match, field):
    reader = rp.ReplyReader()
    found = []
    with pytest.raises(MigrationError, match=match) as caught:
        for reply in reader.feed(rp.pong(3) + data):
            found.append(reply)  # noqa: PERF402
    assert [reply.value for reply in found] == [3]
    assert (caught.value.section, caught.value.field) == ("return path", field)
    assert caught.value.offset is not None and 8 <= caught.value.offset < 8 + len(data)
    with pytest.raises(MigrationError):
        list(reader.feed(rp.pong(4)))


def test_a_cut_at_every_byte():
    for size in range(len(ALL) + 1):
        if size in (*STARTS, len(ALL)):
            read(ALL[:size])
            continue
        with pytest.raises(MigrationError, match="inside a message") as caught:
            read(ALL[:size])
        assert caught.value.offset == size


def test_a_message_is_bounded():
    with pytest.raises(ValueError, match="at most 65535"):
        rp.message(b"x" * 65536)


@given(st.binary(max_size=100), st.integers(1, 9))
def test_random_bytes(junk, chunk):
    def outcome(size: int) -> tuple[list[rp.Reply], str]:
        reader = rp.ReplyReader()
        found: list[rp.Reply] = []
        try:
            for at in range(0, len(junk), size):
                for reply in reader.feed(junk[at : at + size]):
                    found.append(reply)  # noqa: PERF402
            reader.close()
        except MigrationError as error:
            return found, str(error)
        return found, ""

    assert outcome(chunk) == outcome(1 << 20)
