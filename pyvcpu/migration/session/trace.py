"""Both synchronisations, step by step (``--trace-sync``).

    1  engine   <-> CpuState     save_state() / load_state()
    2  CpuState <-> stream       one description a section, in the order of the stream

Each function does its work whether or not anyone listens; with ``trace`` it also says what changed
and where every field lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from pyvcpu.migration.vmstate.codec import decode_section, flatten, locate
from pyvcpu.migration.vmstate.cursor import Span
from pyvcpu.migration.vmstate.description import SectionEntry
from pyvcpu.migration.vmstate.fields import Values

if TYPE_CHECKING:
    from pyvcpu.machine.machine import Machine

Trace = Callable[[str], None] | None
"""Gets one line at a time."""


def trace_save(machine: Machine, trace: Trace) -> None:
    """Engine -> CpuState."""
    before = machine.cpu.architectural() if trace else {}
    machine.engine.save_state()
    if trace:
        trace(f"engine {machine.engine.name} -> CpuState: save_state() at instruction {machine.clock.instructions}")
        for line in _changes(before, machine.cpu.architectural()):
            trace(line)


def trace_load(machine: Machine, trace: Trace) -> None:
    """CpuState -> engine."""
    machine.engine.load_state()
    if trace:
        trace(f"CpuState -> engine {machine.engine.name}: load_state() at instruction {machine.clock.instructions}")


def trace_section(entry: SectionEntry, record: bytes, offset: int, trace: Trace) -> None:
    """CpuState and devices -> stream: the FULL section ``record``, which starts at byte ``offset``."""
    if not trace:
        return
    description = entry.description
    head = 14 + len(description.name)
    values, spans = decode_section(description, record[head:-5], instance_id=entry.instance_id, base=offset + head)
    trace(f"CpuState -> stream: {entry.name} version {description.version_id}, {len(record)} bytes at {offset:#x}")
    for line in fields(values, spans):
        trace(line)


class LoadTrace:
    """Stream -> CpuState: what each section changed there."""

    def __init__(self, machine: Machine, trace: Trace) -> None:
        self._machine, self._trace = machine, trace
        self._before = machine.cpu.architectural() if trace else {}

    def loaded(self, entry: SectionEntry, values: Values, spans: Mapping[str, Span]) -> None:
        """``entry`` has just been loaded from ``values``."""
        if not self._trace:
            return
        self._trace(f"stream -> CpuState: {entry.name}")
        for line in fields(values, spans):
            self._trace(line)
        after = self._machine.cpu.architectural()
        changed = list(_changes(self._before, after))
        self._trace(f"  {len(changed)} fields of CpuState changed" + (":" if changed else ""))
        for line in changed:
            self._trace(line)
        self._before = after


def fields(values: Values, spans: Mapping[str, Span]) -> Iterator[str]:
    """One line a field: where it lies, its path, its value."""
    for path, value in flatten(values):
        at = locate(spans, path)
        yield f"  {'' if at is None else f'{at:#010x}':10}  {path} = {_show(value)}"


def _changes(before: Mapping[str, object], after: Mapping[str, object]) -> Iterator[str]:
    for name, new in after.items():
        old = before[name]
        if old == new:
            continue
        if isinstance(old, tuple) and isinstance(new, tuple):
            for index, (one, other) in enumerate(zip(old, new, strict=True)):
                if one != other:
                    yield f"    {name}[{index}]: {_show(one)} -> {_show(other)}"
        else:
            yield f"    {name}: {_show(old)} -> {_show(new)}"


def _show(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        return value.hex(" ") if isinstance(value, bytes) else str(value)
    return f"{value:#x}"
