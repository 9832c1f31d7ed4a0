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
from pyvcpu.migration.vmstate.codec import locate
from pyvcpu.migration.vmstate.cursor import Span
from pyvcpu.migration.vmstate.description import SUBSECTIONS, short_name

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


def vmdesc_tree(device: Mapping[str, Any], data: bytes, offset: int) -> list[Node]:
    """The nodes of ``data``, byte ``offset`` of the stream, by its entry in the vmdesc's "devices"."""
    nodes, _ = _described(device, data, 0, offset, 0)
    return nodes


def _described(shape: Mapping[str, Any], data: bytes, at: int, base: int, depth: int) -> tuple[list[Node], int]:
    nodes: list[Node] = []
    if depth > 32:
        return nodes, at
    for entry in shape.get("fields", ()):
        name, size = str(entry["name"]), int(entry["size"])
        count = entry.get("array_len")
        if "index" in entry:
            name = f"{name}[{entry['index']}]"
        if count is None:
            nodes.append(_entry(name, entry, data, at, base, depth))
            at += size
            continue
        children = []
        start = at
        for index in range(int(count)):
            children.append(_entry(f"[{index}]", entry, data, at, base, depth))
            at += size
        values = [child.value for child in children]
        known = None if any(value is None for value in values) else values
        nodes.append(Node(name, base + start, at - start, known, explain("", "", known), children=children))
    for sub in shape.get("subsections", ()):
        name = str(sub["vmsd_name"])
        start = at
        children, at = _described(sub, data, at + 2 + len(name) + 4, base, depth + 1)
        nodes.append(Node(short_name(name), base + start, at - start, children=children))
    return nodes, at


def _entry(name: str, entry: Mapping[str, Any], data: bytes, at: int, base: int, depth: int) -> Node:
    """One field, or one element of an array."""
    size = int(entry["size"])
    shape = entry.get("struct") or (entry if "fields" in entry else None)
    if shape is not None:
        children, _ = _described(shape, data, at, base, depth + 1)
        return Node(name, base + at, size, children=children)
    raw = data[at : at + size]
    layout = _INTEGERS.get(str(entry.get("type")))
    value: Any = raw
    if layout is not None and struct.calcsize(layout) == len(raw):
        (value,) = struct.unpack(layout, raw)
    return Node(name, base + at, size, value, explain("", "", value))
