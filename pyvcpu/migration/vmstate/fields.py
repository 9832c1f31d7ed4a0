"""Typed fields: what a section consists of. All integers are big-endian.

    U8 .. U64, I8 .. I64, Bool, Timer     one value
    Buffer, VarBuffer                     bytes, of fixed size or of the size in an earlier field
    Array, VarArray                       a list of any of these, or of structures
    Unused                                bytes that once meant something

A field knows five things: how its value becomes bytes and comes back, how QEMU's
self-description (vmdesc) shows it, and how it is taken from and put into an object's
attribute where no hook says otherwise. ``name`` is the key in the values and the attribute;
``wire_name`` is what QEMU prints in the vmdesc, where that differs ("env.regs").

A field that came with version n of its section has ``since=n``; a stream of an older version
gets ``default``.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Sequence
from typing import Any, ClassVar

from pyvcpu.errors import MigrationError
from pyvcpu.migration.vmstate.cursor import Cursor

Values = dict[str, Any]
"""What a decoded structure is: field name -> int, bool, bytes, list, or Values again."""

Vmdesc = dict[str, Any]
"""A piece of the self-description, as JSON."""


def encode_error(path: str, message: str, expected: object, got: object) -> MigrationError:
    return MigrationError(message, field=path, expected=expected, got=got)


class Field:
    """One field. Subclasses define :meth:`put` and :meth:`take`, and more where they need it."""

    type_name: str = ""

    def __init__(self, name: str, *, wire_name: str | None = None, since: int = 0, default: object = None) -> None:
        self.name = name
        self.wire_name = name if wire_name is None else wire_name
        self.since, self.default = since, default

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    # -- one value

    def put(self, out: bytearray, value: Any, path: str) -> None:
        """Append the bytes of ``value``; MigrationError where it does not fit the field."""
        raise NotImplementedError

    def take(self, cursor: Cursor) -> Any:
        """Read one value."""
        raise NotImplementedError

    # -- in a structure

    def encode(self, out: bytearray, values: Values, path: str) -> None:
        """Append this field of ``values``."""
        if self.name not in values:
            raise encode_error(path + self.name, "a value is missing", self.type_name, None)
        self.put(out, values[self.name], path + self.name)

    def decode(self, cursor: Cursor, values: Values) -> None:
        """Read this field into ``values``; earlier fields of the structure are there already."""
        cursor.push(self.name)
        start = cursor.offset
        values[self.name] = self.take(cursor)
        cursor.record(start)
        cursor.pop()

    def fill(self, values: Values) -> None:
        """The stream is older than the field: it gets its default."""
        values[self.name] = self.default

    def value_keys(self) -> tuple[str, ...]:
        """The keys of ``values`` that are this field's."""
        return (self.name,)

    def describe(self, values: Values | None) -> list[Vmdesc]:
        """The vmdesc entries, in QEMU's shape and order of keys.

        ``values`` is what was sent; None describes the layout in general.
        """
        return [{"name": self.wire_name, "type": self.type_name, "size": self.size(values)}]

    def size(self, values: Values | None) -> int:
        """Bytes on the wire."""
        raise NotImplementedError

    def varies(self) -> bool:
        """True where two of them can have different layouts."""
        return False

    # -- the attribute of an object, where there are no hooks

    def get(self, obj: Any, values: Values, ctx: Any) -> None:
        values[self.name] = self.get_value(getattr(obj, self.name), ctx)

    def set(self, obj: Any, values: Values, ctx: Any) -> None:
        setattr(obj, self.name, values[self.name])

    def get_value(self, attribute: Any, ctx: Any) -> Any:
        """The value of an attribute, or of an element of one."""
        return attribute

    def set_item(self, target: Any, index: int, value: Any, ctx: Any) -> None:
        """Put one element's value into the attribute that is the array."""
        target[index] = value

    # -- checks before a load

    def check(self, values: Values, ctx: Any) -> None:
        """Run the checks of what is inside; MigrationError names the path from here."""
        self.check_value(values.get(self.name), self.name, ctx)

    def check_value(self, value: Any, path: str, ctx: Any) -> None:
        """Every value of a plain field is a value."""


class Integer(Field):
    """An integer of ``bits`` bits; negative values are two's complement."""

    bits: ClassVar[int] = 0
    signed: ClassVar[bool] = False
    code: ClassVar[str] = ""

    def __init__(self, name: str, *, wire_name: str | None = None, since: int = 0, default: int = 0) -> None:
        super().__init__(name, wire_name=wire_name, since=since, default=default)

    def __init_subclass__(cls) -> None:
        if cls.bits:
            code = {8: "b", 16: "h", 32: "i", 64: "q"}[cls.bits]
            cls.code = code if cls.signed else code.upper()
            if "type_name" not in cls.__dict__:
                cls.type_name = f"{'' if cls.signed else 'u'}int{cls.bits}"

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest value."""
        if self.signed:
            return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        return 0, (1 << self.bits) - 1

    def put(self, out: bytearray, value: Any, path: str) -> None:
        low, high = self.limits
        if not isinstance(value, int) or not low <= value <= high:
            raise encode_error(path, "a value does not fit its field", f"{low} to {high}", value)
        out += value.to_bytes(self.bits // 8, "big", signed=self.signed)

    def take(self, cursor: Cursor) -> int:
        return int.from_bytes(cursor.take(self.bits // 8), "big", signed=self.signed)

    def size(self, values: Values | None) -> int:
        return self.bits // 8

    def get_value(self, attribute: Any, ctx: Any) -> int:
        return int(attribute)


class U8(Integer):
    bits = 8


class U16(Integer):
    bits = 16


class U32(Integer):
    bits = 32


class U64(Integer):
    bits = 64


class I8(Integer):
    bits, signed = 8, True


class I16(Integer):
    bits, signed = 16, True


class I32(Integer):
    bits, signed = 32, True


class I64(Integer):
    bits, signed = 64, True


class Timer(Integer):
    """The expiry of a timer in ns of virtual time; -1 while it is off (u64 all ones on the wire)."""

    bits, signed = 64, True
    type_name = "timer"


class Bool(Field):
    """One byte, 0 or 1; anything else is damage."""

    type_name = "bool"

    def put(self, out: bytearray, value: Any, path: str) -> None:
        if value not in (0, 1):
            raise encode_error(path, "a value does not fit its field", "0 or 1", value)
        out.append(int(value))

    def take(self, cursor: Cursor) -> bool:
        start = cursor.offset
        value = cursor.u8()
        if value > 1:
            raise cursor.error("a boolean is neither 0 nor 1", expected="0 or 1", got=value, offset=start)
        return bool(value)

    def size(self, values: Values | None) -> int:
        return 1

    def get_value(self, attribute: Any, ctx: Any) -> bool:
        return bool(attribute)


class Buffer(Field):
    """``length`` bytes as they are."""

    type_name = "buffer"

    def __init__(
        self, name: str, length: int, *, wire_name: str | None = None, since: int = 0, default: bytes | None = None
    ) -> None:
        super().__init__(name, wire_name=wire_name, since=since, default=bytes(length) if default is None else default)
        self.length = length

    def put(self, out: bytearray, value: Any, path: str) -> None:
        if not isinstance(value, bytes | bytearray | memoryview) or len(value) != self.length:
            raise encode_error(path, "a value does not fit its field", f"{self.length} bytes", value)
        out += value

    def take(self, cursor: Cursor) -> bytes:
        return bytes(cursor.take(self.length))

    def size(self, values: Values | None) -> int:
        return self.length

    def get_value(self, attribute: Any, ctx: Any) -> bytes:
        return bytes(attribute)


class Unused(Field):
    """``length`` bytes without a meaning (any more): written as zeros.

    Bytes that are not zero are kept under the field's name, so that a stream that
    goes through us comes out as it came in; zeros leave no key.
    """

    type_name = "unused_buffer"

    def __init__(self, length: int, name: str = "unused", *, wire_name: str | None = None, since: int = 0) -> None:
        super().__init__(name, wire_name=wire_name, since=since)
        self.length = length

    def encode(self, out: bytearray, values: Values, path: str) -> None:
        value = values.get(self.name, bytes(self.length))
        if not isinstance(value, bytes) or len(value) != self.length:
            raise encode_error(path + self.name, "a value does not fit its field", f"{self.length} bytes", value)
        out += value

    def decode(self, cursor: Cursor, values: Values) -> None:
        cursor.push(self.name)
        start = cursor.offset
        data = bytes(cursor.take(self.length))
        if any(data):
            values[self.name] = data
        cursor.record(start)
        cursor.pop()

    def fill(self, values: Values) -> None:
        """Nothing was sent and nothing is missing."""

    def size(self, values: Values | None) -> int:
        return self.length

    def get(self, obj: Any, values: Values, ctx: Any) -> None:
        """No object has it."""

    def set(self, obj: Any, values: Values, ctx: Any) -> None:
        """No object has it."""


class Array(Field):
    """``count`` times ``element``; the name is the element's."""

    def __init__(self, element: Field, count: int, *, since: int = 0, default: Sequence[object] | None = None) -> None:
        super().__init__(element.name, wire_name=element.wire_name, since=since)
        self.element, self.count = element, count
        self.default = [element.default] * count if default is None else list(default)
        self.type_name = element.type_name
        # One struct for the whole array where the elements are integers.
        self._layout = struct.Struct(f">{count}{element.code}") if isinstance(element, Integer) else None

    def count_in(self, values: Values | None) -> int:
        """The number of elements."""
        return self.count

    def encode(self, out: bytearray, values: Values, path: str) -> None:
        path += self.name
        if self.name not in values:
            raise encode_error(path, "a value is missing", f"a list of {self.type_name}", None)
        items, count = values[self.name], self.count_in(values)
        if not isinstance(items, Sequence) or len(items) != count:
            got = f"{len(items)} values" if isinstance(items, Sequence) else items
            raise encode_error(path, "a list has the wrong length", f"{count} values", got)
        for index, item in enumerate(items):
            self.element.put(out, item, f"{path}[{index}]")

    def decode(self, cursor: Cursor, values: Values) -> None:
        cursor.push(self.name)
        start = cursor.offset
        count = self.checked_count(cursor, values)
        if isinstance(self.element, Integer):
            layout = self._layout or struct.Struct(f">{count}{self.element.code}")
            values[self.name] = list(cursor.unpack(layout))
        else:
            items = values[self.name] = []
            cursor.pop()
            for index in range(count):
                cursor.push(f"{self.name}[{index}]")
                at = cursor.offset
                items.append(self.element.take(cursor))
                cursor.record(at)
                cursor.pop()
            cursor.push(self.name)
        cursor.record(start, count)
        cursor.pop()

    def checked_count(self, cursor: Cursor, values: Values) -> int:
        """The number of elements to read, checked before anything is allocated."""
        return self.count

    def fill(self, values: Values) -> None:
        values[self.name] = copy.deepcopy(self.default)

    def describe(self, values: Values | None) -> list[Vmdesc]:
        """Elements that all look alike are shown once, with ``array_len``; others one by one.

        They look alike unless they are structures that may carry subsections or counted fields.
        """
        count = self.count_in(values)
        items = None if values is None else values.get(self.name)
        if count == 0:
            return []
        if count == 1:
            return self._describe_element(items, 0, {})
        if not self.element.varies():
            return self._describe_element(items, 0, {"array_len": count})
        return [entry for i in range(count) for entry in self._describe_element(items, i, {"index": i})]

    def _describe_element(self, items: Any, index: int, extra: Vmdesc) -> list[Vmdesc]:
        """The element's own entry, with ``extra`` after the name as QEMU has it."""
        values = None if items is None else {self.element.name: items[index]}
        return [
            {"name": entry["name"], **extra, **{k: v for k, v in entry.items() if k != "name"}}
            for entry in self.element.describe(values)
        ]

    def size(self, values: Values | None) -> int:
        if values is None or not self.element.varies():
            return self.count_in(values) * self.element.size(None)
        return sum(self.element.size({self.name: item}) for item in values[self.name])

    def varies(self) -> bool:
        return self.element.varies()

    def get_value(self, attribute: Any, ctx: Any) -> list[Any]:
        return [self.element.get_value(item, ctx) for item in attribute]

    def set(self, obj: Any, values: Values, ctx: Any) -> None:
        """In place, so that views of the array (and native code) see the new values."""
        target = getattr(obj, self.name)
        for index, item in enumerate(values[self.name]):
            self.element.set_item(target, index, item, ctx)

    def check_value(self, value: Any, path: str, ctx: Any) -> None:
        for index, item in enumerate(value or ()):
            self.element.check_value(item, f"{path}[{index}]", ctx)


class VarArray(Array):
    """As many elements as the earlier integer field ``count_field`` says, at most ``limit``."""

    def __init__(self, element: Field, count_field: str, limit: int, *, since: int = 0) -> None:
        super().__init__(element, 0, since=since)
        self._layout = None
        self.count_field, self.limit = count_field, limit

    def varies(self) -> bool:
        return True

    def count_in(self, values: Values | None) -> int:
        if values is None:
            return 0
        count = int(values[self.count_field])
        if not 0 <= count <= self.limit:
            raise encode_error(self.count_field, "a count is out of range", f"at most {self.limit}", count)
        return count

    def checked_count(self, cursor: Cursor, values: Values) -> int:
        count = int(values[self.count_field])
        if not 0 <= count <= self.limit:
            raise cursor.error(
                f"the count in {self.count_field} is out of range", expected=f"at most {self.limit}", got=count
            )
        return count


class VarBuffer(Field):
    """As many bytes as the earlier integer field ``length_field`` says, at most ``limit``."""

    type_name = "buffer"

    def __init__(
        self, name: str, length_field: str, limit: int, *, wire_name: str | None = None, since: int = 0
    ) -> None:
        super().__init__(name, wire_name=wire_name, since=since, default=b"")
        self.length_field, self.limit = length_field, limit

    def encode(self, out: bytearray, values: Values, path: str) -> None:
        value, length = values.get(self.name), values[self.length_field]
        if not isinstance(value, bytes | bytearray | memoryview) or not len(value) == length <= self.limit:
            expected = f"{length} bytes, at most {self.limit}"
            raise encode_error(path + self.name, "a value does not fit its field", expected, value)
        out += value

    def decode(self, cursor: Cursor, values: Values) -> None:
        cursor.push(self.name)
        start = cursor.offset
        length = int(values[self.length_field])
        if not 0 <= length <= self.limit:
            raise cursor.error(
                f"the length in {self.length_field} is out of range", expected=f"at most {self.limit}", got=length
            )
        values[self.name] = bytes(cursor.take(length))
        cursor.record(start)
        cursor.pop()

    def size(self, values: Values | None) -> int:
        return 0 if values is None else len(values[self.name])

    def varies(self) -> bool:
        return True

    def get_value(self, attribute: Any, ctx: Any) -> bytes:
        return bytes(attribute)
