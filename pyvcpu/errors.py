"""Every error that pyvcpu raises on purpose.

One family: catching :class:`PyvcpuError` catches all of them, and nothing of ours
escapes as a ``KeyError`` or a ``struct.error``.
"""

from __future__ import annotations


class PyvcpuError(Exception):
    """The root of the family."""


class ConfigurationError(PyvcpuError):
    """The user asked for something that cannot be built (an option, a size, a file)."""


class UnsupportedInstruction(PyvcpuError):
    """The guest executed something that is not there yet.

    It is never guessed: ``bytes`` are the instruction's bytes, ``mnemonic`` its name,
    ``mode`` the processor mode ("real", "protected16", "protected32", "long64", ...), ``rip``
    the instruction pointer, and ``reason`` what exactly is missing.
    """

    def __init__(self, code: bytes, mnemonic: str, mode: str, rip: int, reason: str = "") -> None:
        self.code, self.mnemonic, self.mode, self.rip, self.reason = code, mnemonic, mode, rip, reason
        tail = f": {reason}" if reason else ""
        super().__init__(f"unsupported instruction {code.hex(' ')} ({mnemonic}) in {mode} mode at RIP {rip:#x}{tail}")


class UnsupportedOperation(PyvcpuError):
    """The guest asked a device for something that is not there yet (an SMI, an INIT); it is never guessed."""


class MigrationError(PyvcpuError):
    """A stream, or the other end, is not what it should be.

    ``offset`` counts bytes from the start of the stream, ``section`` is "name/instance",
    ``field`` the path inside it ("regs[3]", "xsave/ymmh[2]"), ``expected`` and ``got`` say the rest.
    Any of them may be None where it makes no sense (a refused connection has no offset).
    """

    def __init__(
        self,
        message: str,
        *,
        offset: int | None = None,
        section: str | None = None,
        field: str | None = None,
        expected: object = None,
        got: object = None,
    ) -> None:
        self.message, self.offset, self.section, self.field = message, offset, section, field
        self.expected, self.got = expected, got
        super().__init__(message)

    def __str__(self) -> str:
        where = []
        if self.offset is not None:
            where.append(f"offset {self.offset:#x}")
        if self.section is not None:
            where.append(f"section {self.section}")
        if self.field is not None:
            where.append(f"field {self.field}")
        text = self.message
        if where:
            text += f" ({', '.join(where)})"
        if self.expected is not None or self.got is not None:
            text += f": expected {_show(self.expected)}, got {_show(self.got)}"
        # Names and texts are the other end's, and this goes to a terminal.
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class ChannelError(MigrationError):
    """The transport failed: refused, closed early, timed out."""


def _show(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        text = value.hex(" ") if isinstance(value, bytes) else str(value)
        return text if len(text) <= 120 else text[:117] + "..."
    return f"{value:#x}" if abs(value) > 9 else str(value)
