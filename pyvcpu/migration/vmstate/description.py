"""Descriptions: one table per device, from which everything else about its section is made.

    section data   = field field field ... subsection*
    subsection     = 05  name (u8 length)  version u32  field field ... subsection*

A :class:`Description` encodes and decodes values, writes the self-description (vmdesc),
takes values from an object and puts them into one. Decoding and encoding are pure: bytes to
values and back. Only the hooks know objects:

    save   pre_save(obj, ctx) -> values      without it: attributes with the names of the fields
           needed(obj, ctx) -> bool          a subsection is sent only where this is true
           post_save(obj, ctx)
    load   check(values, ctx)                refuses values that cannot be a state; changes nothing
           pre_load(obj, ctx)                before anything is changed
           post_load(obj, values, ctx)       puts the values into the object; without it: attributes
           absent(obj, ctx)                  for a subsection: what it means that it was not sent

Values are plain dicts: field name -> value, and ``"subsections"`` -> {name: values} where
there are any, in the order of the stream.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyvcpu.errors import MigrationError
from pyvcpu.migration.vmstate.cursor import Cursor, NeedMore
from pyvcpu.migration.vmstate.fields import Field, Values, Vmdesc, encode_error

SUBSECTION = 0x05
"""The byte before a subsection (QEMU_VM_SUBSECTION)."""

SUBSECTIONS = "subsections"
"""The key in values under which the subsections are."""


@dataclass
class SaveContext:
    """What a save hook may want to know besides its object.

    ``profile`` says what the other end understands (:mod:`pyvcpu.migration.wire.profile`), ``clock`` is
    the machine's clock, paused; ``runstate`` is what globalstate will say.
    """

    profile: Any = "pyvcpu"
    machine: str = ""
    clock: Any = None
    runstate: str = "running"

    @property
    def peer(self) -> str:
        """The profile's name: "pyvcpu", "qemu-7.2-tcg", ... (a profile may be given as its name)."""
        return str(getattr(self.profile, "name", self.profile))

    @property
    def to_pyvcpu(self) -> bool:
        return self.peer == "pyvcpu"

    @property
    def takes_icount(self) -> bool:
        """True if ``timer/icount`` with its nested subsection is understood."""
        return bool(getattr(self.profile, "icount_timer", self.to_pyvcpu))

    @property
    def to_kvm(self) -> bool:
        return self.peer.endswith("-kvm")


@dataclass
class LoadContext:
    """What a load hook may want to know besides its object.

    ``clock`` is the machine's, paused. ``sections`` holds the values of every section of the stream by
    "name/instance": a few meanings depend on another section (the TSC of a TCG stream lies in
    ``timer``). ``icount_shift`` is QEMU's ``-icount shift=``, which its streams do not carry.
    """

    machine: str = ""
    clock: Any = None
    icount_shift: int | None = None
    sections: Mapping[str, Values] = field(default_factory=dict)


def short_name(subsection: str) -> str:
    """A subsection's name in field paths: "cpu/xss" is "xss"."""
    return subsection.rpartition("/")[2]


def refuse(field_path: str, message: str, expected: object, got: object) -> MigrationError:
    """The error of a check hook; the caller raises it. Section and offset are added on the way out."""
    return MigrationError(message, field=field_path, expected=expected, got=got)


PreSave = Callable[[Any, SaveContext], Values]
PostSave = Callable[[Any, SaveContext], None]
PreLoad = Callable[[Any, LoadContext], None]
PostLoad = Callable[[Any, Values, LoadContext], None]
Check = Callable[[Values, LoadContext], None]
Needed = Callable[[Any, SaveContext], bool]


class Description:
    """The layout and the meaning of one section, subsection or embedded structure.

    A stream's version must lie between ``minimum_version_id`` and ``version_id``. ``loads_after``
    names the sections that must have been loaded before this one.
    """

    def __init__(
        self,
        name: str,
        version_id: int,
        fields: Iterable[Field],
        *,
        minimum_version_id: int | None = None,
        subsections: Iterable[Description] = (),
        pre_save: PreSave | None = None,
        post_save: PostSave | None = None,
        pre_load: PreLoad | None = None,
        post_load: PostLoad | None = None,
        check: Check | None = None,
        needed: Needed | None = None,
        absent: PreLoad | None = None,
        loads_after: Sequence[str] = (),
    ) -> None:
        self.name, self.version_id = name, version_id
        self.minimum_version_id = version_id if minimum_version_id is None else minimum_version_id
        self.fields = tuple(fields)
        self.subsections = {sub.name: sub for sub in subsections}
        self.pre_save, self.post_save, self.pre_load, self.post_load = pre_save, post_save, pre_load, post_load
        self.check_hook, self.needed, self.absent = check, needed, absent
        self.loads_after = tuple(loads_after)
        self._keys = {key for f in self.fields for key in f.value_keys()} | {SUBSECTIONS}
        if len(self._keys) != sum(len(f.value_keys()) for f in self.fields) + 1:
            raise ValueError(f"{name}: two fields share a name")

    def __repr__(self) -> str:
        return f"<Description {self.name} v{self.version_id}>"

    # -- bytes <-> values

    def encode(self, values: Values, path: str = "") -> bytes:
        """The bytes of ``values``, of our version, subsections included in the order of the dict.

        MigrationError names the field whose value is missing or does not fit.
        """
        unknown = values.keys() - self._keys
        if unknown:
            raise encode_error(path + min(unknown), f"{self.name} has no such field", None, values[min(unknown)])
        out = bytearray()
        for f in self.fields:
            f.encode(out, values, path)
        for name, sub_values in values.get(SUBSECTIONS, {}).items():
            sub = self.subsections.get(name)
            if sub is None:
                raise encode_error(path + name, f"{self.name} has no such subsection", sorted(self.subsections), name)
            encoded = name.encode("ascii")
            out += bytes((SUBSECTION, len(encoded))) + encoded + struct.pack(">I", sub.version_id)
            out += sub.encode(sub_values, f"{path}{short_name(name)}/")
        return bytes(out)

    def decode(self, cursor: Cursor, version_id: int | None = None, *, embedded: bool = False) -> Values:
        """Read one structure of version ``version_id`` (None: ours) and its subsections.

        Raises NeedMore where bytes have not arrived yet, MigrationError where they are wrong.
        After a section's data the next byte decides whether a subsection follows, so it must have
        arrived too, unless the cursor is final. An ``embedded`` structure is followed by
        data of the structure around it.
        """
        version = self.version_id if version_id is None else version_id
        self.check_version(version, cursor)
        values: Values = {}
        for f in self.fields:
            if f.since <= version:
                f.decode(cursor, values)
            else:
                f.fill(values)
        # A structure that never has subsections is not followed by one: a byte 05 after it is data.
        if self.subsections or not embedded:
            found = self._decode_subsections(cursor)
            if found:
                values[SUBSECTIONS] = found
        return values

    def check_version(self, version_id: int, cursor: Cursor) -> None:
        """MigrationError unless streams of this version can be read."""
        if not self.minimum_version_id <= version_id <= self.version_id:
            if self.minimum_version_id == self.version_id:
                expected = str(self.version_id)
            else:
                expected = f"{self.minimum_version_id} to {self.version_id}"
            newer = "newer than ours" if version_id > self.version_id else "older than we can read"
            raise cursor.error(f"the version of {self.name} is {newer}", expected=f"version {expected}", got=version_id)

    def _decode_subsections(self, cursor: Cursor) -> dict[str, Values]:
        found: dict[str, Values] = {}
        while True:
            name = self._peek_subsection(cursor)
            if name is None:
                return found
            start = cursor.offset
            sub = self.subsections.get(name)
            if sub is None:
                raise cursor.error(
                    f"{self.name} has no subsection of this name", expected=sorted(self.subsections), got=name
                )
            if name in found:
                raise cursor.error("a subsection comes twice", expected=f"one {name}", got="another")
            cursor.take(2 + len(name))
            cursor.push(short_name(name))
            version_id = cursor.u32()
            found[name] = sub.decode(cursor, version_id)
            cursor.record(start)
            cursor.pop()

    def _peek_subsection(self, cursor: Cursor) -> str | None:
        """The name of the subsection that starts here, None where something else does.

        A byte 05 may also be data of the structure around us. As in QEMU it starts a
        subsection only where a name follows that begins with ours and is longer. Bytes are looked at
        one after the other, so that data is never waited for beyond the first difference.
        """
        prefix = self.name.encode("ascii")
        head = cursor.peek(2 + 255)
        if not head:
            if cursor.final:
                return None
            raise NeedMore(1)
        if head[0] != SUBSECTION:
            return None
        if len(head) < 2:
            return self._cut_short(cursor, 2)
        length = head[1]
        if length <= len(prefix):
            return None
        seen = bytes(head[2 : 2 + length])
        if not prefix.startswith(seen[: len(prefix)]):
            return None
        if len(seen) < length:
            return self._cut_short(cursor, 2 + length)
        try:
            return seen.decode("ascii")
        except UnicodeDecodeError:
            return None

    @staticmethod
    def _cut_short(cursor: Cursor, size: int) -> None:
        """What could be the start of a subsection ends too early."""
        if not cursor.final:
            raise NeedMore(size - cursor.remaining)

    # -- the self-description

    def describe(self, values: Values | None = None) -> Vmdesc:
        """The vmdesc of this structure; of what ``values`` hold, or of everything there could be."""
        described: Vmdesc = {
            "vmsd_name": self.name,
            "version": self.version_id,
            "fields": [entry for f in self.fields for entry in f.describe(values)],
        }
        if values is None:
            subs = [sub.describe() for sub in self.subsections.values()]
        else:
            subs = [self.subsections[name].describe(v) for name, v in values.get(SUBSECTIONS, {}).items()]
        if subs:
            described[SUBSECTIONS] = subs
        return described

    def size(self, values: Values | None = None) -> int:
        """Bytes on the wire: of ``values``, or of the fields alone."""
        size = sum(f.size(values) for f in self.fields)
        for name, sub_values in (values or {}).get(SUBSECTIONS, {}).items():
            size += 2 + len(name) + 4 + self.subsections[name].size(sub_values)
        return size

    # -- objects

    def save(self, obj: Any, ctx: SaveContext) -> Values:
        """The values of ``obj``, by the hooks, with the subsections that are needed."""
        if self.pre_save is not None:
            values = self.pre_save(obj, ctx)
        else:
            values = {}
            for f in self.fields:
                f.get(obj, values, ctx)
        subs = {
            name: sub.save(obj, ctx)
            for name, sub in self.subsections.items()
            if sub.needed is None or sub.needed(obj, ctx)
        }
        if subs:
            values[SUBSECTIONS] = subs
        if self.post_save is not None:
            self.post_save(obj, ctx)
        return values

    def check(self, values: Values, ctx: LoadContext) -> None:
        """MigrationError (field path, expected, got) where ``values`` cannot be a state. Changes nothing."""
        if self.check_hook is not None:
            self.check_hook(values, ctx)
        for f in self.fields:
            f.check(values, ctx)
        for name, sub_values in values.get(SUBSECTIONS, {}).items():
            try:
                self.subsections[name].check(sub_values, ctx)
            except MigrationError as error:
                error.field = f"{short_name(name)}/{error.field}" if error.field else short_name(name)
                raise

    def load(self, obj: Any, values: Values, ctx: LoadContext) -> None:
        """Put ``values`` into ``obj``. They are checked first: a refused load changes nothing."""
        self.check(values, ctx)
        self._apply(obj, values, ctx)

    def _apply(self, obj: Any, values: Values, ctx: LoadContext) -> None:
        if self.pre_load is not None:
            self.pre_load(obj, ctx)
        if self.post_load is not None:
            self.post_load(obj, values, ctx)
        else:
            for f in self.fields:
                f.set(obj, values, ctx)
        found = values.get(SUBSECTIONS, {})
        for name, sub in self.subsections.items():
            if name in found:
                sub._apply(obj, found[name], ctx)
            elif sub.absent is not None:
                sub.absent(obj, ctx)


class Struct(Field):
    """A structure inside a structure; its values are a dict under ``name``.

    ``flat`` puts its fields among those of the structure around it, as QEMU's "tmp" fields are
    (values that exist only on the wire, ``kind="tmp"``).
    """

    def __init__(
        self,
        name: str,
        description: Description,
        *,
        wire_name: str | None = None,
        since: int = 0,
        kind: str = "struct",
        flat: bool = False,
        version_id: int | None = None,
    ) -> None:
        super().__init__(name, wire_name=wire_name, since=since)
        self.description, self.type_name, self.flat = description, kind, flat
        self.version_id = description.version_id if version_id is None else version_id

    def put(self, out: bytearray, value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise encode_error(path, "a value does not fit its field", "a structure", value)
        out += self.description.encode(value, path + "/")

    def take(self, cursor: Cursor) -> Values:
        return self.description.decode(cursor, self.version_id, embedded=True)

    def encode(self, out: bytearray, values: Values, path: str) -> None:
        if self.flat:
            out += self.description.encode(self._own(values), path)
        else:
            super().encode(out, values, path)

    def decode(self, cursor: Cursor, values: Values) -> None:
        if self.flat:
            values.update(self.take(cursor))
        else:
            super().decode(cursor, values)

    def fill(self, values: Values) -> None:
        own: Values = {}
        for f in self.description.fields:
            f.fill(own)
        if self.flat:
            values.update(own)
        else:
            values[self.name] = own

    def value_keys(self) -> tuple[str, ...]:
        if self.flat:
            return tuple(key for f in self.description.fields for key in f.value_keys())
        return (self.name,)

    def describe(self, values: Values | None) -> list[Vmdesc]:
        body = self.description.describe(self._inner(values))
        entry: Vmdesc = {"name": self.wire_name, "type": self.type_name}
        if self.type_name == "struct":
            entry["struct"] = body
        else:
            entry |= body
        entry["size"] = self.size(values)
        return [entry]

    def size(self, values: Values | None) -> int:
        return self.description.size(self._inner(values))

    def varies(self) -> bool:
        return bool(self.description.subsections) or any(f.varies() for f in self.description.fields)

    def check(self, values: Values, ctx: Any) -> None:
        if self.flat:
            self.description.check(self._own(values), ctx)
        else:
            super().check(values, ctx)

    def check_value(self, value: Any, path: str, ctx: Any) -> None:
        try:
            self.description.check(value, ctx)
        except MigrationError as error:
            error.field = f"{path}/{error.field}" if error.field else path
            raise

    def get(self, obj: Any, values: Values, ctx: Any) -> None:
        if self.flat:
            values.update(self.description.save(obj, ctx))
        else:
            super().get(obj, values, ctx)

    def set(self, obj: Any, values: Values, ctx: Any) -> None:
        if self.flat:
            self.description._apply(obj, self._own(values), ctx)
        else:
            self.description._apply(getattr(obj, self.name), values[self.name], ctx)

    def get_value(self, attribute: Any, ctx: Any) -> Values:
        return self.description.save(attribute, ctx)

    def set_item(self, target: Any, index: int, value: Any, ctx: Any) -> None:
        self.description._apply(target[index], value, ctx)

    def _inner(self, values: Values | None) -> Values | None:
        """Our structure's values, in those of the structure around us."""
        if values is None:
            return None
        inner: Values = self._own(values) if self.flat else values[self.name]
        return inner

    def _own(self, values: Values) -> Values:
        """The values that are ours among those of the structure around us."""
        return {key: values[key] for key in self.value_keys() if key in values}


@dataclass
class SectionEntry:
    """A section of a machine: what describes it, which instance it is, whose state it is."""

    description: Description
    instance_id: int
    obj: Any

    @property
    def name(self) -> str:
        """As "name/instance", in errors and in :attr:`LoadContext.sections`."""
        return f"{self.description.name}/{self.instance_id}"
