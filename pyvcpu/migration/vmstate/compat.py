"""Comparing: two versions of a description, a description and a stream's vmdesc, two sets of values.

All of it works on one flat form. A layout is the list of (path, type, size) of every field, which both
a :class:`~pyvcpu.migration.vmstate.description.Description` and the JSON that QEMU appends to a
stream can give; so "would this receiver read that sender's section?" is a question about two
lists, with or without the sender at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile, zip_longest
from typing import Any, NamedTuple

from pyvcpu.migration.vmstate.codec import flatten
from pyvcpu.migration.vmstate.description import SUBSECTIONS, Description, Struct
from pyvcpu.migration.vmstate.fields import Array, Field, Values, VarArray, VarBuffer, Vmdesc


class LayoutField(NamedTuple):
    """One field of a layout; ``size`` in bytes, of all its elements together."""

    path: str
    type: str
    size: int


class Incompatibility(NamedTuple):
    """Why a receiver would not read a sender's section: ``where`` (path), and what each has."""

    where: str
    sender: object
    receiver: object
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}: sender {self.sender}, receiver {self.receiver}"


class Difference(NamedTuple):
    """Two values of one field; None where a side does not have it."""

    path: str
    left: object
    right: object


def layout_of(described: Vmdesc) -> list[LayoutField]:
    """The layout of a section's or a structure's vmdesc, without its subsections."""
    return list(_layout(described, ""))


def _layout(described: Vmdesc, prefix: str) -> Iterator[LayoutField]:
    for entry in described.get("fields", ()):
        path = prefix + str(entry["name"])
        if "index" in entry:
            path += f"[{entry['index']}]"
        count = int(entry.get("array_len", 1))
        inner = entry.get("struct") or (entry if "fields" in entry else None)
        if inner is None:
            yield LayoutField(path, str(entry["type"]), count * int(entry["size"]))
            continue
        for index in range(count):
            yield from _layout(inner, f"{path}[{index}]/" if count > 1 else f"{path}/")


def incompatibilities(sender: Description | Vmdesc, receiver: Description) -> list[Incompatibility]:
    """What keeps ``receiver`` from reading the section that ``sender`` describes; empty if nothing does.

    ``sender`` is a description, or an entry of the "devices" list of a stream's vmdesc. A vmdesc shows
    only the subsections that were sent; of a description all are taken to be possible.
    """
    described = sender.describe() if isinstance(sender, Description) else sender
    return list(_incompatibilities(described, receiver))


def _incompatibilities(sender: Vmdesc, receiver: Description) -> Iterator[Incompatibility]:
    name, version = sender["vmsd_name"], int(sender["version"])
    if name != receiver.name:
        yield Incompatibility(receiver.name, name, receiver.name, "another section")
        return
    if not receiver.minimum_version_id <= version <= receiver.version_id:
        versions = f"{receiver.minimum_version_id} to {receiver.version_id}"
        yield Incompatibility(name, version, versions, "a version that is not read")
        return
    fields = [f for f in receiver.fields if f.since <= version]
    fixed = list(takewhile(lambda f: not _is_counted(f), fields))
    ours = layout_of({"fields": [entry for f in fixed for entry in f.describe(None)]})
    sent = layout_of(sender)
    if len(fixed) < len(fields):
        sent = sent[: len(ours)]  # what follows a count depends on what was counted
    for theirs, mine in zip_longest(sent, ours):
        if theirs != mine:
            # Sections are positional: after the first difference nothing means what it says.
            where = f"{name}: {(theirs or mine).path}"
            yield Incompatibility(where, theirs and tuple(theirs), mine and tuple(mine), "the layouts part here")
            break
    for sub in sender.get(SUBSECTIONS, ()):
        known = receiver.subsections.get(sub["vmsd_name"])
        if known is None:
            yield Incompatibility(name, sub["vmsd_name"], None, "a subsection that the receiver does not know")
        else:
            yield from _incompatibilities(sub, known)


def _is_counted(field: Field) -> bool:
    """True if the field's size depends on another field's value."""
    if isinstance(field, Struct):
        return any(_is_counted(f) for f in field.description.fields)
    return isinstance(field, VarArray | VarBuffer) or (isinstance(field, Array) and _is_counted(field.element))


def differences(left: Values, right: Values) -> list[Difference]:
    """The fields in which two sets of values differ, by path, in the order of ``left``."""
    ours, theirs = dict(flatten(left)), dict(flatten(right))
    paths = [*ours, *(path for path in theirs if path not in ours)]
    return [
        Difference(path, ours.get(path), theirs.get(path))
        for path in paths
        if path not in ours or path not in theirs or ours[path] != theirs[path]
    ]


def table(description: Description) -> list[tuple[str, str, int, int]]:
    """Rows for the documentation: (path, type, count, bytes of one), subsections after the fields."""
    return list(_table(description.describe(), ""))


def _table(described: Vmdesc, prefix: str) -> Iterator[tuple[str, str, int, int]]:
    for entry in described["fields"]:
        path, count = prefix + entry["name"], int(entry.get("array_len", 1))
        yield path, entry["type"], count, int(entry["size"])
        inner: Any = entry.get("struct") or (entry if "fields" in entry else None)
        if inner is not None:
            yield from _table(inner, f"{path}/")
    for sub in described.get(SUBSECTIONS, ()):
        yield (
            f"{prefix}{sub['vmsd_name']}",
            "subsection",
            1,
            sum(int(f["size"]) * int(f.get("array_len", 1)) for f in sub["fields"]),
        )
        yield from _table(sub, f"{prefix}{sub['vmsd_name']}: ")
