"""``pyvcpu inspect``: what a migration stream holds.

    OFFSET     SIZE  WHAT
    0x8          12  configuration microvm
    0x1a6d       40  timer/0 version 2, id 0
    0x1a7d        8    cpu_ticks_offset = 0x1b2...

A stream is read as a destination reads it, so everything shown was checked. Sections that pyvcpu does
not know are shown by name and size, with the fields that the stream's own vmdesc names, marked "by
the stream's vmdesc". A stream that is damaged or cut is shown up to there, with the error.
"""

from __future__ import annotations

import json
import lzma
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from pyvcpu.analysis.explain import number
from pyvcpu.analysis.tree import Described, Node, values_tree
from pyvcpu.apic.vmstate import APIC
from pyvcpu.cpu.vmstate import CPU, CPU_COMMON
from pyvcpu.devices.vmstate import SERIAL
from pyvcpu.errors import ConfigurationError, MigrationError
from pyvcpu.machine.vmstate import GLOBALSTATE, KVM_TPR_OPT, TIMER
from pyvcpu.migration.vmstate.description import Description, short_name
from pyvcpu.migration.wire.reader import StreamReader
from pyvcpu.migration.wire.records import (
    PAGE_SIZE,
    Command,
    Configuration,
    Opaque,
    RamBlocks,
    RamPages,
    Record,
    SectionEnd,
    SectionFull,
    SectionPart,
    SectionStart,
    Vmdesc,
)
from pyvcpu.migration.wire.vmdesc import devices_of

KNOWN = {d.name: d for d in (TIMER, CPU_COMMON, CPU, KVM_TPR_OPT, APIC, SERIAL, GLOBALSTATE)}
"""The descriptions by which sections are shown."""

CHUNK = 1 << 20

MAX_COMMANDS = 4096
"""Commands that are kept to be shown; a migration has a few, plus one for each pass over RAM at most."""


@dataclass
class RamBlock:
    """What a stream says of one RAM block. Arrays have one item a page."""

    name: str
    size: int
    sent: npt.NDArray[np.uint32]
    """How often each page was sent."""
    zero: npt.NDArray[np.bool_]
    """Pages that were zeros when they were sent last."""
    whole_records: int = 0
    fill_records: int = 0
    zero_records: int = 0

    def to_json(self) -> dict[str, Any]:
        sent = int(np.count_nonzero(self.sent))
        return {
            "name": self.name,
            "size": self.size,
            "pages": self.size // PAGE_SIZE,
            "sent": sent,
            "never_sent": self.size // PAGE_SIZE - sent,
            "zero": int(np.count_nonzero(self.zero)),
            "duplicates": int(self.sent.sum()) - sent,
            "whole_records": self.whole_records,
            "fill_records": self.fill_records,
        }


@dataclass
class Inspection:
    """A stream, taken apart."""

    size: int = 0
    machine: str = ""
    checked: bool = False
    """The stream's checksums were there and are right."""
    configuration: Configuration | None = None
    ram: dict[str, RamBlock] = field(default_factory=dict)
    ram_parts: int = 0
    ram_offset: int | None = None
    ram_bytes: int = 0
    commands: list[Command] = field(default_factory=list)
    """The first of them, at most MAX_COMMANDS."""
    command_count: int = 0
    sections: list[tuple[SectionFull, list[Node]]] = field(default_factory=list)
    vmdesc: Vmdesc | None = None
    rest: Opaque | None = None
    error: MigrationError | None = None
    notes: list[str] = field(default_factory=list)
    page: bytes | None = None
    """The page that was asked for, as it was sent last."""

    def nodes(self) -> list[Node]:
        """Everything that a path can lead to, by its first part."""
        nodes = []
        if self.configuration is not None:
            values = {"name": self.configuration.name}
            children = values_tree("", values, self.configuration.spans)
            for name, sub in self.configuration.subsections.items():
                spans = {
                    path.partition("/")[2]: span
                    for path, span in self.configuration.spans.items()
                    if path.startswith(short_name(name) + "/")
                }
                children.append(Node(short_name(name), None, None, children=values_tree("", sub, spans)))
            at = self.configuration
            nodes.append(Node("configuration", at.offset, at.length, children=children))
        if self.ram:
            blocks = [
                Node(block.name, None, block.size, plain, ram_text(plain))
                for block in self.ram.values()
                for plain in [block.to_json()]
            ]
            nodes.append(Node("ram", self.ram_offset, self.ram_bytes, children=blocks, text=f"{self.ram_parts} parts"))
        if self.commands:
            nodes.append(
                Node("commands", None, None, text=self._more_commands(), children=[
                    Node(c.command.name, c.offset, c.length, c.value if c.payload else None, _payload(c))
                    for c in self.commands
                ])
            )  # fmt: skip
        for section, fields in self.sections:
            text = f"version {section.version_id}, id {section.section_id}, {len(section.data)} bytes"
            if section.by != "description":
                text += " (by the stream's vmdesc)" if section.by == "vmdesc" else " (a guess, by its footer)"
            nodes.append(Node(section.key, section.offset, section.length, None, text, section.name, fields))
        return nodes

    def _more_commands(self) -> str:
        more = self.command_count - len(self.commands)
        return f"{self.command_count}, of which the last {more} are not shown" if more else ""

    def find(self, path: str) -> Node | None:
        """The node at ``section[/instance][/field]``; the first instance where none is named."""
        return Node("", None, None, children=self.nodes()).find(path.strip("/"))

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON."""
        return {
            "size": self.size,
            "machine": self.machine,
            "checksums": "verified" if self.checked else "none",
            "error": str(self.error) if self.error else None,
            "notes": self.notes,
            "ram": {
                "offset": self.ram_offset,
                "bytes": self.ram_bytes,
                "parts": self.ram_parts,
                "blocks": [block.to_json() for block in self.ram.values()],
            },
            "command_count": self.command_count,
            "commands": [
                {"offset": c.offset, "command": c.command.name, "value": c.value if c.payload else None}
                for c in self.commands
            ],
            "sections": [
                {
                    "name": section.name,
                    "instance": section.instance_id,
                    "version": section.version_id,
                    "id": section.section_id,
                    "offset": section.offset,
                    "size": len(section.data),
                    "by": section.by,
                    "fields": [node.to_json() for node in fields],
                }
                for section, fields in self.sections
            ],
            "vmdesc": {"offset": self.vmdesc.offset, "size": self.vmdesc.length} if self.vmdesc else None,
        }


def ram_text(block: dict[str, Any]) -> str:
    return (
        f"{block['size']:#x} bytes, {block['pages']} pages: {block['sent']} sent, {block['zero']} of them zero, "
        f"{block['duplicates']} sent again, {block['never_sent']} never sent"
    )


def _payload(command: Command) -> str:
    return f"{command.value:#x}" if command.payload else ""


def read_chunks(path: str) -> Iterator[bytes]:
    """The bytes of a stream in a file; one compressed with xz is unpacked. ConfigurationError."""
    try:
        with Path(path).open("rb") as file:
            packed = file.read(6) == b"\xfd7zXZ\0"
            file.seek(0)
            with lzma.open(file) if packed else nullcontext(file) as source:
                while chunk := source.read(CHUNK):
                    yield chunk
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error


def inspect_file(path: str, page: tuple[str, int] | None = None) -> Inspection:
    """Read the stream in ``path``. ``page`` (block, address) is kept. ConfigurationError where there is no file.

    A known section that does not decode is taken as unknown, where that shows the rest.
    """
    first = found = _inspect(read_chunks(path), KNOWN, page)
    known, notes = dict(KNOWN), []
    while found.error is not None:
        name = (found.error.section or "").rpartition("/")[0]
        if name not in known:
            return first
        notes.append(str(found.error))
        del known[name]
        found = _inspect(read_chunks(path), known, page)
    found.notes = notes
    return found


def _inspect(chunks: Iterator[bytes], known: dict[str, Description], page: tuple[str, int] | None) -> Inspection:
    found = Inspection()
    reader = StreamReader(lambda name, _: known.get(name), all_pages=False)
    sections: list[SectionFull] = []
    try:
        for chunk in chunks:
            found.size += len(chunk)
            for record in reader.feed(chunk):
                _add(found, sections, record, page)
        reader.close()
    except MigrationError as error:
        found.error = error
        for record in reader.salvage():
            _add(found, sections, record, page)
        # What was not read counts too.
        found.size += sum(len(chunk) for chunk in chunks)
    devices = devices_of(found.vmdesc.description) if found.vmdesc else []
    entries = {(device["name"], device["instance_id"]): device for device in devices}
    described = Described()
    for section in sections:
        if section.values is not None:
            fields = values_tree(section.name, section.values, section.spans)
        else:
            entry = entries.get((section.name, section.instance_id)) if section.by == "vmdesc" else None
            fields = described.tree(entry, section.data, section.data_offset)
        found.sections.append((section, fields))
    return found


def _add(found: Inspection, sections: list[SectionFull], record: Record, page: tuple[str, int] | None) -> None:
    match record:
        case Configuration():
            found.configuration, found.machine = record, record.name
        case RamBlocks():
            for name, size in record.blocks:
                pages = size // PAGE_SIZE
                found.ram[name] = RamBlock(name, size, np.zeros(pages, np.uint32), np.zeros(pages, np.bool_))
        case RamPages():
            _add_pages(found, record, page)
        case SectionStart() | SectionPart() | SectionEnd():
            found.ram_parts += 1
            if found.ram_offset is None:
                found.ram_offset = record.offset
        case Command():
            found.command_count += 1
            if len(found.commands) < MAX_COMMANDS:
                found.commands.append(record)
        case SectionFull():
            sections.append(record)
        case Vmdesc():
            found.vmdesc, found.checked = record, record.checked
        case Opaque():
            found.rest = record
    if isinstance(record, SectionStart | SectionPart | SectionEnd | RamBlocks | RamPages):
        found.ram_bytes += record.length


def _add_pages(found: Inspection, batch: RamPages, page: tuple[str, int] | None) -> None:
    block = found.ram[batch.block]
    numbers = batch.addresses // PAGE_SIZE
    np.add.at(block.sent, numbers, 1)
    if batch.data is not None:
        block.whole_records += len(batch)
        block.zero[numbers] = ~batch.data.any(axis=1)
    else:
        assert batch.fill is not None
        block.fill_records += len(batch)
        block.zero[numbers] = batch.fill == 0
    if page is not None and page[0] == batch.block:
        for index in np.flatnonzero(batch.addresses == page[1]):
            if batch.data is not None:
                found.page = batch.data[index].tobytes()
            else:
                assert batch.fill is not None
                found.page = bytes((int(batch.fill[index]),)) * PAGE_SIZE


# -- as text


def _line(offset: int | None, size: int | None, text: str, out: TextIO) -> None:
    at = f"{offset:#x}" if offset is not None else ""
    out.write(f"{at:<10} {size if size is not None else '':>8}  {text}\n")


def write_node(node: Node, out: TextIO) -> None:
    """A node and all below it, a line each. What one line says well has no lines below, unless it was asked for."""
    _write(node, 0, out)


def _write(node: Node, depth: int, out: TextIO) -> None:
    structure = bool(node.children) and all(child.children or child.alias for child in node.children)
    text = node.text if depth == 0 or not structure or node.value is None else ""
    alias = f" ({node.alias})" if node.alias and not node.name.startswith(f"{node.alias}/") else ""
    equals = "= " if node.value is not None and text else ""
    _line(node.offset, node.size, f"{'  ' * depth}{node.name}{alias} {equals}{text}".rstrip(), out)
    if depth and node.brief:
        return
    if isinstance(node.value, list) and not structure:
        return
    for child in node.children:
        _write(child, depth + 1, out)


def write_text(found: Inspection, out: TextIO) -> None:
    """The whole stream."""
    checked = "checksums verified" if found.checked else "no checksums"
    out.write(f"{found.size} bytes, machine {found.machine or 'unknown'}, {checked}\n")
    out.write(f"{'OFFSET':<10} {'SIZE':>8}  WHAT\n")
    for node in found.nodes():
        write_node(node, out)
    if found.rest is not None:
        _line(found.rest.offset, found.rest.length, "data that could not be split into sections", out)
    if found.vmdesc is not None:
        count = len(devices_of(found.vmdesc.description))
        _line(found.vmdesc.offset, found.vmdesc.length, f"vmdesc: {count} devices", out)
    unknown = [section.key for section, _ in found.sections if section.values is None]
    if unknown:
        out.write(f"{len(unknown)} sections that pyvcpu does not know: {', '.join(unknown)}\n")
    out.writelines(f"note: {note}\n" for note in found.notes)


def hex_dump(data: bytes, address: int) -> Iterator[str]:
    """Lines of 16 bytes; lines that repeat the one before are one ``*``."""
    before = None
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        if row == before:
            if data[at - 16 : at] != data[at - 32 : at - 16] or at == 16:
                yield "*"
            continue
        before = row
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{address + at:#010x}  {row.hex(' '):<47}  {shown}"


def _wanted_page(selector: str | None) -> tuple[str, int] | None:
    """(block, page address) of a selector ``ram/BLOCK[ADDRESS]``."""
    if selector is None or not selector.startswith("ram/") or not selector.endswith("]"):
        return None
    block, bracket, address = selector[4:-1].rpartition("[")
    if not bracket:
        return None
    try:
        return block, int(address, 0) & -PAGE_SIZE
    except ValueError:
        raise ConfigurationError(f"not an address: {address!r}") from None


def inspect_command(path: str, selector: str | None, as_json: bool, out: TextIO | None = None) -> int:
    """Show the stream in ``path``, or what ``selector`` leads to in it. Returns 1 where the stream is damaged.

    Selectors: ``section``, ``section/field``, ``section/instance/field``, ``ram/BLOCK``,
    ``ram/BLOCK[ADDRESS]`` (a page), ``configuration``, ``commands``.
    """
    out = out or sys.stdout
    wanted = _wanted_page(selector)
    found = inspect_file(path, wanted)
    if found.error is not None:
        sys.stderr.write(f"pyvcpu: {path}: {found.error}\n")
    status = 1 if found.error is not None else 0
    if wanted is not None:
        block, address = wanted
        if found.page is None:
            raise ConfigurationError(f"no page {number(address)} of RAM block {block!r} in {path}")
        if as_json:
            json.dump({"block": block, "address": address, "data": found.page.hex()}, out)
            out.write("\n")
        else:
            out.writelines(line + "\n" for line in hex_dump(found.page, address))
        return status
    if selector:
        node = found.find(selector)
        if node is None:
            names = ", ".join(child.name for child in found.nodes())
            raise ConfigurationError(f"nothing at {selector!r} in {path} (there are: {names})")
        if as_json:
            json.dump(node.to_json(), out, indent=2)
            out.write("\n")
        else:
            write_node(node, out)
        return status
    if as_json:
        json.dump({"file": path, **found.to_json()}, out, indent=2)
        out.write("\n")
    else:
        write_text(found, out)
    return status
