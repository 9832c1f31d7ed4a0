"""Whole sections: values of a machine's devices to bytes and back, with errors that say where.

Saving goes through the entries in the order given (QEMU's order of sections). Loading decodes
first, then checks every section, then applies them in an order that honours ``loads_after``:
a stream that is refused leaves the machine as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from pyvcpu.errors import MigrationError
from pyvcpu.migration.vmstate.cursor import Cursor, Span
from pyvcpu.migration.vmstate.description import (
    SUBSECTIONS,
    Description,
    LoadContext,
    SaveContext,
    SectionEntry,
    short_name,
)
from pyvcpu.migration.vmstate.fields import Values, Vmdesc

Spans = dict[str, Span]


def save_section(entry: SectionEntry, ctx: SaveContext) -> tuple[bytes, Values]:
    """The data of one section (without envelope) and the values that it holds."""
    try:
        values = entry.description.save(entry.obj, ctx)
        return entry.description.encode(values), values
    except MigrationError as error:
        raise in_section(error, entry.name)  # noqa: B904 - the same error, completed


def describe_section(entry: SectionEntry, values: Values | None = None) -> Vmdesc:
    """The section's object in the "devices" list of the stream's vmdesc."""
    return {"name": entry.description.name, "instance_id": entry.instance_id, **entry.description.describe(values)}


def decode_section(
    description: Description,
    data: bytes | bytearray | memoryview,
    *,
    version_id: int | None = None,
    instance_id: int = 0,
    base: int = 0,
) -> tuple[Values, Spans]:
    """Decode data that is exactly one section; ``base`` is its offset in the stream.

    Bytes left over are an error. Returns the values, and where each field lies.
    """
    spans: Spans = {}
    cursor = Cursor(data, base, final=True, section=f"{description.name}/{instance_id}", spans=spans)
    values = description.decode(cursor, version_id)
    if cursor.remaining:
        raise cursor.error("bytes are left over after the section", expected="0 bytes", got=f"{cursor.remaining} bytes")
    return values, spans


def in_section(error: MigrationError, section: str, spans: Mapping[str, Span] | None = None) -> MigrationError:
    """Complete an error from a hook with the section and, by the field path, the offset."""
    if error.section is None:
        error.section = section
    if error.offset is None and spans and error.field:
        error.offset = locate(spans, error.field)
    return error


def locate(spans: Mapping[str, Span], path: str) -> int | None:
    """The offset of a field, or of what encloses it; None where nothing of it is known."""
    while path:
        if path in spans:
            return spans[path].offset
        match = re.fullmatch(r"(.*)\[(\d+)\]", path)
        if match and match[1] in spans:
            span = spans[match[1]]
            if int(match[2]) < span.items:
                return span.offset + int(match[2]) * (span.size // span.items)
            return span.offset
        path = path.rpartition("/")[0]
    return None


def check_section(
    entry: SectionEntry, values: Values, ctx: LoadContext, spans: Mapping[str, Span] | None = None
) -> None:
    """Refuse values that cannot be this device's state; nothing is changed."""
    try:
        entry.description.check(values, ctx)
    except MigrationError as error:
        raise in_section(error, entry.name, spans)  # noqa: B904 - the same error, completed


def load_section(
    entry: SectionEntry, values: Values, ctx: LoadContext, spans: Mapping[str, Span] | None = None
) -> None:
    """Check ``values`` and put them into the entry's object."""
    try:
        entry.description.load(entry.obj, values, ctx)
    except MigrationError as error:
        raise in_section(error, entry.name, spans)  # noqa: B904 - the same error, completed


def load_order(entries: Sequence[SectionEntry]) -> list[SectionEntry]:
    """The entries in an order in which each comes after those in its ``loads_after``; else as given.

    ValueError where they wait for each other.
    """
    waiting, ordered = list(entries), []
    while waiting:
        names = {e.description.name for e in waiting}
        ready = next((e for e in waiting if not names & set(e.description.loads_after)), None)
        if ready is None:
            raise ValueError(f"sections wait for each other: {', '.join(sorted(names))}")
        waiting.remove(ready)
        ordered.append(ready)
    return ordered


def load_sections(
    entries: Sequence[SectionEntry],
    sections: Mapping[str, Values],
    ctx: LoadContext,
    spans: Mapping[str, Mapping[str, Span]] | None = None,
) -> list[str]:
    """Load a whole stream: ``sections`` maps "name/instance" to values.

    Every section is checked before any is applied. Returns the names of the entries that the
    stream did not hold. Sections without an entry are the caller's to judge.
    """
    ctx.sections = sections
    spans = spans or {}
    present = [entry for entry in entries if entry.name in sections]
    for entry in present:
        check_section(entry, sections[entry.name], ctx, spans.get(entry.name))
    for entry in load_order(present):
        load_section(entry, sections[entry.name], ctx, spans.get(entry.name))
    return [entry.name for entry in entries if entry.name not in sections]


def flatten(values: Values) -> Iterator[tuple[str, object]]:
    """(path, value) of every leaf, in order; paths are those of errors and spans."""
    return _flatten(values, "")


def _flatten(value: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == SUBSECTIONS:
                for name, sub in item.items():
                    yield from _flatten(sub, _join(path, short_name(name)))
            else:
                yield from _flatten(item, _join(path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _flatten(item, f"{path}[{index}]")
    else:
        yield path, value


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
