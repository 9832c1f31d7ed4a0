"""The fields of a section as a tree: where each lies, what it holds, how people write it.

A tree is made from values and spans that a description decoded, or, for a section that nobody here
described, from the stream's own vmdesc. Paths are those of errors: ``regs[0]``, ``segs[1]/base``,
``icount/qemu_icount``; an alias (``rax``, ``cs/base``) does as well.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyvcpu.analysis.explain import ALIASES, explain
from pyvcpu.errors import MigrationError
from pyvcpu.migration.vmstate.codec import locate
from pyvcpu.migration.vmstate.cursor import Span
from pyvcpu.migration.vmstate.description import SUBSECTIONS, short_name
from pyvcpu.migration.wire.vmdesc import MAX_DEPTH, field_size, section_size, subsection_head

_INTEGERS = {
    "int8": ">b", "uint8": ">B", "int16": ">h", "uint16": ">H", "int32": ">i", "uint32": ">I", "int64": ">q",
    "uint64": ">Q", "int32 le": ">i", "int32 equal": ">i", "uint8 equal": ">B", "uint16 equal": ">H",
    "uint32 equal": ">I", "timer": ">q", "bool": ">B",
}  # fmt: skip


@dataclass
class Node:
    """A field: ``offset`` from the start of the stream (None where unknown), ``size`` in bytes."""

    name: str
    offset: int | None
    size: int | None
    value: Any = None
    text: str = ""
    alias: str = ""
    children: list[Node] = field(default_factory=list)
    brief: bool = False
    """A structure that ``text`` says in one line (a segment, a vector)."""

    def find(self, path: str) -> Node | None:
        """The node at ``path`` below this one. Names may contain slashes and brackets themselves."""
        if not path:
            return self
        elements = [item for child in self.children for item in child.children if item.alias]
        for child in (*self.children, *elements):
            for name in (child.name if child not in elements else "", child.alias):
                if name and path == name:
                    return child
                if name and path.startswith(name) and path[len(name)] in "/[":
                    rest = path[len(name) :]
                    found = child.find(rest[1:] if rest[0] == "/" else rest)
                    if found is not None:
                        return found
        return None

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Node]]:
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)

    def to_json(self) -> dict[str, Any]:
        """As JSON: bytes in hex."""
        result: dict[str, Any] = {"name": self.name, "offset": self.offset, "size": self.size}
        if self.alias:
            result["alias"] = self.alias
        if self.value is not None:
            result["value"] = plain(self.value)
        if self.text:
            result["text"] = self.text
        if self.children:
            result["fields"] = [child.to_json() for child in self.children]
        return result


def plain(value: Any) -> Any:
    """A value with nothing in it that JSON lacks."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def values_tree(section: str, values: Mapping[str, Any], spans: Mapping[str, Span]) -> list[Node]:
    """The nodes of decoded values."""
    return _Builder(section, spans).fields(values, "")


class _Builder:
    def __init__(self, section: str, spans: Mapping[str, Span]) -> None:
        self.section, self.spans = section, spans

    def fields(self, values: Mapping[str, Any], prefix: str) -> list[Node]:
        nodes = []
        for key, value in values.items():
            if key == SUBSECTIONS:
                nodes += [self.node(short_name(name), sub, prefix) for name, sub in value.items()]
            else:
                nodes.append(self.node(key, value, prefix))
        return nodes

    def node(self, name: str, value: Any, prefix: str) -> Node:
        path = prefix + name
        span = self.spans.get(path)
        offset = span.offset if span else locate(self.spans, path)
        size = span.size if span else None
        if span is None and "[" in name:
            whole = self.spans.get(path.rpartition("[")[0])
            size = whole.size // whole.items if whole else None
        made = Node(
            name, offset, size, text=explain(self.section, path, value), alias=ALIASES.get((self.section, path), "")
        )
        if isinstance(value, dict):
            made.children = self.fields(value, path + "/")
            made.brief = bool(made.text)
        else:
            made.value = value
            if isinstance(value, list):
                made.children = [self.node(f"{name}[{i}]", item, prefix) for i, item in enumerate(value)]
                for index, child in enumerate(made.children):
                    child.name = f"[{index}]"
                if any(isinstance(item, dict) for item in value):
                    made.value = None
        return made


MAX_NODES = 1 << 17
"""Fields that are shown by what a stream says of itself, in all its sections."""


class Described:
    """Makes nodes of sections by their entry in the stream's own vmdesc.

    A vmdesc is what a stranger says. A structure is taken apart only where its fields fill it exactly, and
    only as many are made as a reader could want; everything else is one node with its raw bytes.
    """

    def __init__(self, max_nodes: int = MAX_NODES) -> None:
        self._left = max_nodes

    def tree(self, device: Mapping[str, Any] | None, data: bytes, offset: int) -> list[Node]:
        """The nodes of a section's ``data``, which is byte ``offset`` of the stream."""
        nodes = self._structure(device, data, 0, len(data), offset, 0)
        return [_raw("data", data, offset)] if nodes is None else nodes

    def _structure(self, shape: Any, data: bytes, at: int, end: int, base: int, depth: int) -> list[Node] | None:
        """The fields of ``data[at:end]``, which is byte ``base + at`` of the stream; None where they do not fit."""
        try:
            if depth > MAX_DEPTH or section_size(shape) != end - at:
                return None
        except MigrationError:
            return None
        subsections = shape.get("subsections", [])
        if not self._may(len(shape["fields"]) + len(subsections)):
            return None
        nodes: list[Node] = []
        for entry in shape["fields"]:
            nodes.append(self._field(entry, data, at, base, depth))
            at += field_size(entry)
        for sub in subsections:
            head, size = subsection_head(sub), section_size(sub)
            if data[at : at + len(head)] != head:
                return None
            start, at = at + len(head), at + len(head) + size
            name = short_name(sub["vmsd_name"])
            children = self._structure(sub, data, start, at, base, depth + 1)
            if children is None:
                children = [_raw("data", data[start:at], base + start)]
            nodes.append(Node(label(name), base + start - len(head), len(head) + size, children=children))
        return nodes

    def _field(self, entry: Mapping[str, Any], data: bytes, at: int, base: int, depth: int) -> Node:
        """One field with all its elements."""
        name = str(entry.get("name", "?"))
        if "index" in entry:
            name = f"{name}[{entry['index']}]"
        name, count, size = label(name), entry.get("array_len"), entry["size"]
        if count is None:
            return self._element(name, entry, data, at, base, depth)
        if not size or not self._may(count):
            return _raw(name, data[at : at + count * size], base + at)
        children = [self._element(f"[{index}]", entry, data, at + index * size, base, depth) for index in range(count)]
        values = [child.value for child in children]
        known = None if any(value is None for value in values) else values
        return Node(name, base + at, count * size, known, explain("", "", known), children=children)

    def _element(self, name: str, entry: Mapping[str, Any], data: bytes, at: int, base: int, depth: int) -> Node:
        """One field, or one element of an array."""
        size = entry["size"]
        raw = data[at : at + size]
        # A structure of its own, or (what QEMU makes up while it saves) the fields in the entry itself.
        shape = entry.get("struct") or (entry if "fields" in entry else None)
        if shape is not None:
            children = self._structure(shape, data, at, at + size, base, depth + 1)
            return _raw(name, raw, base + at) if children is None else Node(name, base + at, size, children=children)
        layout = _INTEGERS.get(str(entry.get("type")))
        if layout is None or struct.calcsize(layout) != size:
            return _raw(name, raw, base + at)
        (value,) = struct.unpack(layout, raw)
        return Node(name, base + at, size, value, explain("", "", value))

    def _may(self, count: int) -> bool:
        """Whether ``count`` more nodes may be made; they are counted then."""
        if count > self._left:
            return False
        self._left -= count
        return True


def _raw(name: str, data: bytes, offset: int) -> Node:
    return Node(name, offset, len(data), data, explain("", "", data))


def label(name: str) -> str:
    """A name out of a vmdesc as it can be shown: it reaches terminals."""
    return name if name.isascii() and name.isprintable() else ascii(name)[1:-1]
