"""The configuration section: the machine's name, and what both ends must agree on.

07  len u32  name  [05 "configuration/capabilities" v1     caps_count u32, then caps_count names (u8 length)]
                   [05 "configuration/target-page-bits" v1 target_page_bits u32]
                   [05 "configuration/uuid" v1             uuid 16 bytes]
"""

from __future__ import annotations

from typing import Any

from pyvcpu.errors import MigrationError
from pyvcpu.migration.vmstate.cursor import Cursor
from pyvcpu.migration.vmstate.description import SUBSECTIONS, Description
from pyvcpu.migration.vmstate.fields import U32, Buffer, Field, Values, VarArray, VarBuffer, encode_error

MAX_MACHINE_NAME = 255

IMPLIED_CAPABILITIES = frozenset(
    {"return-path", "events", "auto-converge", "pause-before-switchover", "late-block-activate"}
)
"""Capabilities that leave the bytes of a precopy stream as they are."""


class Name(Field):
    """A name of up to 255 bytes after a u8 with its length."""

    type_name = "capability"

    def put(self, out: bytearray, value: Any, path: str) -> None:
        raw = value.encode("ascii")
        if len(raw) > 255:
            raise encode_error(path, "a name is too long", "at most 255 bytes", len(raw))
        out += bytes((len(raw),)) + raw

    def take(self, cursor: Cursor) -> str:
        start = cursor.offset
        raw = bytes(cursor.take(cursor.u8()))
        if not raw.isascii() or not raw.decode("ascii").isprintable():
            raise cursor.error("the name of a capability is not one", expected="printable ASCII", got=raw, offset=start)
        return raw.decode("ascii")

    def size(self, values: Values | None) -> int:
        return 1 + len(values[self.name]) if values else 1


CONFIGURATION = Description(
    "configuration",
    1,
    [U32("len"), VarBuffer("name", "len", MAX_MACHINE_NAME)],
    subsections=[
        Description(
            "configuration/capabilities", 1, [U32("caps_count"), VarArray(Name("capabilities"), "caps_count", 64)]
        ),
        Description("configuration/target-page-bits", 1, [U32("target_page_bits")]),
        Description("configuration/uuid", 1, [Buffer("uuid", 16)]),
    ],
)


def check_configuration(values: Values, cursor: Cursor, machine: str | None) -> str:
    """The machine's name. MigrationError where it is another machine, or has what our stream does not do."""
    raw = values["name"]
    spans = cursor.spans or {}

    def at(path: str) -> int | None:
        return spans[path].offset if path in spans else None

    name = str(raw.decode("ascii", "replace"))
    if not raw or not raw.isascii() or not name.isprintable():
        raise MigrationError(
            "the machine's name is not one", offset=at("name"), section="configuration", field="name",
            expected="printable ASCII", got=raw,
        )  # fmt: skip
    if machine is not None and name != machine:
        raise MigrationError(
            "the stream is of another machine", offset=at("name"), section="configuration", field="name",
            expected=machine, got=name,
        )  # fmt: skip
    found = values.get(SUBSECTIONS, {})
    for capability in found.get("configuration/capabilities", {}).get("capabilities", ()):
        if capability not in IMPLIED_CAPABILITIES:
            raise MigrationError(
                f"capability {capability}: not supported", offset=at("capabilities"), section="configuration",
                field="capabilities/capabilities", expected="a plain precopy stream", got=capability,
            )  # fmt: skip
    bits = found.get("configuration/target-page-bits", {}).get("target_page_bits", 12)
    if bits != 12:
        raise MigrationError(
            "the stream is of a machine with other pages", offset=at("target-page-bits"), section="configuration",
            field="target-page-bits/target_page_bits", expected=12, got=bits,
        )  # fmt: skip
    return name
