"""A command of the source to the destination, between sections.

    08  command u16  length u16  payload (length bytes)

    1 OPEN_RETURN_PATH  -      2 PING  u32      b SWITCHOVER_START  -

The others belong to postcopy and COLO: they are known, so that an error can say what is asked for.
"""

from __future__ import annotations

import struct

from pyvcpu.errors import MigrationError
from pyvcpu.migration.vmstate.cursor import NeedMore
from pyvcpu.migration.wire.records import COMMAND_LENGTHS, Command, CommandType


def read_command(buffer: memoryview, pos: int, offset: int, crc: int) -> Command:
    """The command at ``buffer[pos]``, which is byte ``offset`` of the stream; ``crc`` is of all bytes before it.

    NeedMore, MigrationError. No length is waited for that the command does not have.
    """
    left = len(buffer) - pos
    if left < 5:
        raise NeedMore(5 - left)
    number, length = struct.unpack_from(">HH", buffer, pos + 1)
    if number not in CommandType._value2member_map_:
        raise MigrationError(
            "an unknown command", offset=offset + 1, section="command", field="command",
            expected="1 to 11", got=number,
        )  # fmt: skip
    command = CommandType(number)
    if command not in COMMAND_LENGTHS:
        raise MigrationError(
            f"command {command.name}: known, not supported", offset=offset, section="command", field="command",
            expected="a precopy stream", got=number,
        )  # fmt: skip
    if length != COMMAND_LENGTHS[command]:
        raise MigrationError(
            f"command {command.name} has another length", offset=offset + 3, section="command", field="length",
            expected=COMMAND_LENGTHS[command], got=length,
        )  # fmt: skip
    if left < 5 + length:
        raise NeedMore(5 + length - left)
    return Command(offset, 5 + length, command, bytes(buffer[pos + 5 : pos + 5 + length]), crc)
