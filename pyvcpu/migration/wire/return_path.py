"""The reverse direction of a migration: what a destination tells its source.

    message = u16 type, u16 length, payload (length bytes)

    0001 SHUT            u32: 0 all is well, the guest runs here; else failed
    0002 PONG            u32: the value of the PING
    0003 REQ_PAGES_ID    start u64, length u32, block (u8 length)     postcopy
    0004 REQ_PAGES       start u64, length u32                        postcopy
    0005 RECV_BITMAP     block (u8 length), then outside of length: u64 size, bitmap, u64 0123456789abcdef
    0006 RESUME_ACK      u32 = 1                                      postcopy recovery
    0007 SWITCHOVER_ACK  -                                            10.0, capability switchover-ack
    7076 MESSAGE         JSON, an object                              pyvcpu to pyvcpu only

Only our own MESSAGE may be longer than 512 bytes; it goes to a source that was found to be a pyvcpu.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeAlias

from pyvcpu.errors import MigrationError

MAX_PAYLOAD = 512
"""What QEMU sends at most."""

MAX_MESSAGE = 0xFFFF
"""What our own MESSAGE can hold."""

_BITMAP_END = 0x0123456789ABCDEF


class ReplyType(IntEnum):
    """The numbers of messages (MIG_RP_MSG_*; MESSAGE is ours)."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7
    MESSAGE = 0x7076


@dataclass(frozen=True, slots=True)
class Shut:
    offset: int
    value: int

    @property
    def ok(self) -> bool:
        return self.value == 0


@dataclass(frozen=True, slots=True)
class Pong:
    offset: int
    value: int


@dataclass(frozen=True, slots=True)
class RequestPages:
    """Postcopy: pages are wanted now; ``block`` None means the block of the request before."""

    offset: int
    start: int
    size: int
    block: str | None


@dataclass(frozen=True, slots=True)
class ReceivedBitmap:
    """Postcopy recovery: which pages of ``block`` have arrived, bit 0 of byte 0 first."""

    offset: int
    block: str
    bitmap: bytes


@dataclass(frozen=True, slots=True)
class ResumeAck:
    offset: int
    value: int


@dataclass(frozen=True, slots=True)
class SwitchoverAck:
    offset: int


@dataclass(frozen=True, slots=True)
class Message:
    """``payload`` is JSON text; ``content`` the object in it."""

    offset: int
    payload: bytes
    content: dict[str, Any]


Reply: TypeAlias = Shut | Pong | RequestPages | ReceivedBitmap | ResumeAck | SwitchoverAck | Message

_LENGTHS = {
    ReplyType.SHUT: (4, 4),
    ReplyType.PONG: (4, 4),
    ReplyType.REQ_PAGES_ID: (14, 13 + 255),
    ReplyType.REQ_PAGES: (12, 12),
    ReplyType.RECV_BITMAP: (2, 256),
    ReplyType.RESUME_ACK: (4, 4),
    ReplyType.SWITCHOVER_ACK: (0, 0),
    ReplyType.MESSAGE: (2, MAX_MESSAGE),
}


class ReplyReader:
    """Bytes of the return path in, at any chunking; messages out.

    ``max_bitmap`` bounds a RECV_BITMAP (bytes). After an error the reader is dead.
    """

    def __init__(self, *, max_bitmap: int = 32 << 20) -> None:
        self.offset = 0
        """Bytes of the messages that were yielded."""
        self._data = bytearray()
        self._max_bitmap = max_bitmap
        self._error: MigrationError | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Reply]:
        """The messages that ``data`` completes. The bytes are taken at once. MigrationError after what was right."""
        self._data += data
        return self._replies()

    def close(self) -> None:
        """The other end has closed. MigrationError inside a message."""
        for _ in self._replies():
            pass
        if self._data:
            raise MigrationError(
                "the return path ends inside a message",
                offset=self.offset + len(self._data),
                section="return path",
                expected="the rest of it",
                got=f"{len(self._data)} bytes",
            )

    def _replies(self) -> Iterator[Reply]:
        while True:
            if self._error is not None:
                raise self._error
            try:
                found = self._next()
            except MigrationError as error:
                self._error = error
                raise
            if found is None:
                return
            reply, length = found
            del self._data[:length]
            self.offset += length
            yield reply

    def _next(self) -> tuple[Reply, int] | None:
        """The message at the start of the data and its length; None while it is incomplete."""
        if len(self._data) < 2:
            return None
        (number,) = struct.unpack_from(">H", self._data)
        if number not in ReplyType._value2member_map_:
            raise self._wrong("an unknown type of message", 0, "type", [int(t) for t in ReplyType], number)
        kind = ReplyType(number)
        if len(self._data) < 4:
            return None
        (length,) = struct.unpack_from(">H", self._data, 2)
        low, high = _LENGTHS[kind]
        if not low <= length <= high:
            expected = low if low == high else f"{low} to {high}"
            raise self._wrong(f"the length of a {kind.name} is wrong", 2, "length", expected, length)
        end = 4 + length
        if len(self._data) < end:
            return None
        payload = bytes(self._data[4:end])
        match kind:
            case ReplyType.SHUT:
                return Shut(self.offset, int.from_bytes(payload, "big")), end
            case ReplyType.PONG:
                return Pong(self.offset, int.from_bytes(payload, "big")), end
            case ReplyType.RESUME_ACK:
                return ResumeAck(self.offset, int.from_bytes(payload, "big")), end
            case ReplyType.SWITCHOVER_ACK:
                return SwitchoverAck(self.offset), end
            case ReplyType.REQ_PAGES | ReplyType.REQ_PAGES_ID:
                start, size = struct.unpack_from(">QI", payload)
                block = self._block(payload, 12) if kind == ReplyType.REQ_PAGES_ID else None
                return RequestPages(self.offset, start, size, block), end
            case ReplyType.RECV_BITMAP:
                return self._bitmap(self._block(payload, 0), end)
            case ReplyType.MESSAGE:
                return Message(self.offset, payload, self._json(payload)), end

    def _block(self, payload: bytes, at: int) -> str:
        raw = payload[at + 1 :]
        if payload[at] != len(raw) or not raw or not raw.isascii():
            raise self._wrong("the name of a RAM block is not one", 4 + at, "block", f"{payload[at]} ASCII bytes", raw)
        return raw.decode("ascii")

    def _bitmap(self, block: str, at: int) -> tuple[Reply, int] | None:
        if len(self._data) < at + 8:
            return None
        (size,) = struct.unpack_from(">Q", self._data, at)
        if size > self._max_bitmap:
            raise self._wrong("a bitmap is too long", at, "size", f"at most {self._max_bitmap:#x}", size)
        end = at + 8 + size + 8
        if len(self._data) < end:
            return None
        (mark,) = struct.unpack_from(">Q", self._data, end - 8)
        if mark != _BITMAP_END:
            raise self._wrong("the end of a bitmap is wrong", end - 8, "end", _BITMAP_END, mark)
        return ReceivedBitmap(self.offset, block, bytes(self._data[at + 8 : end - 8])), end

    def _json(self, payload: bytes) -> dict[str, Any]:
        try:
            content = json.loads(payload)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise self._wrong("the other end's message is not one", 4, "payload", "a JSON object", payload[:80])
        return content

    def _wrong(self, message: str, at: int, field: str, expected: object, got: object) -> MigrationError:
        return MigrationError(
            message, offset=self.offset + at, section="return path", field=field, expected=expected, got=got
        )


def _reply(kind: ReplyType, payload: bytes = b"") -> bytes:
    return struct.pack(">HH", kind, len(payload)) + payload


def shut(value: int = 0) -> bytes:
    """0: the guest runs here. Anything else: it does not, and the source may go on."""
    return _reply(ReplyType.SHUT, struct.pack(">I", value))


def pong(value: int) -> bytes:
    """The answer to PING ``value``."""
    return _reply(ReplyType.PONG, struct.pack(">I", value))


def switchover_ack() -> bytes:
    return _reply(ReplyType.SWITCHOVER_ACK)


def resume_ack() -> bytes:
    return _reply(ReplyType.RESUME_ACK, struct.pack(">I", 1))


def request_pages(start: int, size: int, block: str | None = None) -> bytes:
    """Postcopy: ``size`` bytes from ``start`` on; ``block`` None means the block of the request before."""
    payload = struct.pack(">QI", start, size)
    if block is None:
        return _reply(ReplyType.REQ_PAGES, payload)
    return _reply(ReplyType.REQ_PAGES_ID, payload + _name(block))


def received_bitmap(block: str, bitmap: bytes) -> bytes:
    """Which pages of ``block`` have arrived: bit 0 of byte 0 first, a multiple of 8 bytes."""
    return (
        _reply(ReplyType.RECV_BITMAP, _name(block))
        + struct.pack(">Q", len(bitmap))
        + bitmap
        + struct.pack(">Q", _BITMAP_END)
    )


def message(content: dict[str, Any] | bytes) -> bytes:
    """Our own MESSAGE: an object, or its JSON. ValueError where it is longer than 65,535 bytes."""
    payload = content if isinstance(content, bytes) else json.dumps(content, separators=(",", ":")).encode("utf-8")
    if len(payload) > MAX_MESSAGE:
        raise ValueError(f"a message of {len(payload)} bytes, at most {MAX_MESSAGE}")
    return _reply(ReplyType.MESSAGE, payload)


def _name(block: str) -> bytes:
    raw = block.encode("ascii")
    return bytes((len(raw),)) + raw
