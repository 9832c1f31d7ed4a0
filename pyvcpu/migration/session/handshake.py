"""How two pyvcpu ends recognise each other on QEMU's protocol, and what they say.

    source                                        destination
    COMMAND OPEN_RETURN_PATH
    COMMAND PING 70766370 ("pvcp")  ----------->  any QEMU echoes it; a pyvcpu answers
                                    <-----------  PONG 70766370
                                    <-----------  MESSAGE {"hello": ...}        (pyvcpu only)
    COMMAND PING crc                ----------->
                                    <-----------  PONG crc
    ... RAM, device sections ...
    COMMAND PING crc   (READY?)     ----------->  checks the CRC-32 of all bytes before this
                                    <-----------  PONG crc                      (READY), or
                                    <-----------  MESSAGE {"error": ...}, SHUT 1
    EOF  <- the hand-over
    VMDESC                          ----------->  starts the guest
                                    <-----------  SHUT 0

The second PING follows the first at once: its PONG without a MESSAGE before it says "not a
pyvcpu" with no timeout and no guess. After the magic PING a pyvcpu reads every PING as the
CRC-32 of all bytes of the stream before that command.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyvcpu import __version__
from pyvcpu.cpu.cpuid import cpuid
from pyvcpu.errors import MigrationError

if TYPE_CHECKING:
    from pyvcpu.machine.machine import Machine

MAGIC = 0x70766370
"""The payload of the first PING."""

PROTOCOL = 1
"""Of our own messages; a peer with another number is refused."""


@dataclass(frozen=True)
class Hello:
    """Who the destination is. ``ram`` maps block names to bytes, ``cpuid`` leaves to feature words."""

    machine: str
    version: str = __version__
    protocol: int = PROTOCOL
    clock: str = ""
    ram: dict[str, int] = field(default_factory=dict)
    cpuid: dict[str, list[int]] = field(default_factory=dict)
    wishes: dict[str, Any] = field(default_factory=dict)

    def to_message(self) -> dict[str, Any]:
        """The content of the MESSAGE."""
        return {"hello": dict(self.__dict__)}


@dataclass(frozen=True)
class Refusal:
    """What a destination says before SHUT 1: why."""

    text: str

    def to_message(self) -> dict[str, Any]:
        """The content of the MESSAGE."""
        return {"error": self.text[:2000]}


_HELLO = {"machine": str, "version": str, "protocol": int, "clock": str, "ram": dict, "cpuid": dict, "wishes": dict}


def parse_message(content: dict[str, Any]) -> Hello | Refusal:
    """What the other end says. Raises MigrationError on what is neither."""
    if isinstance(content.get("error"), str):
        return Refusal(content["error"])
    hello = content.get("hello")
    if not isinstance(hello, dict):
        raise _not_hello("hello", "an object", hello)
    for key, kind in _HELLO.items():
        if not isinstance(hello.get(key), kind):
            raise _not_hello(key, kind.__name__, hello.get(key))
    return Hello(**{key: hello[key] for key in _HELLO})


def _not_hello(path: str, expected: object, got: object) -> MigrationError:
    return MigrationError(
        "the destination's message is not one", section="return path", field=path, expected=expected, got=got
    )


CPUID_LEAVES = {"1": (1, 0), "7": (7, 0), "80000001": (0x80000001, 0)}
"""The leaves whose ECX, EDX and (of leaf 7) EBX are feature bits."""


def describe_machine(machine: Machine) -> Hello:
    """What the other end must know of ``machine``."""
    return Hello(
        machine=machine.name,
        clock=machine.clock.name,
        ram={block.name: block.size for block in machine.ram.blocks},
        cpuid={name: _features(*leaf) for name, leaf in CPUID_LEAVES.items()},
    )


def _features(leaf: int, subleaf: int) -> list[int]:
    _, ebx, ecx, edx = cpuid(leaf, subleaf)
    return [ebx if leaf == 7 else 0, ecx, edx]


def check_hello(hello: Hello, ours: Hello) -> None:
    """Refuse a destination that cannot take our guest, before any RAM is sent. ``ours`` describes the source."""
    for name in ("protocol", "machine"):
        if getattr(hello, name) != getattr(ours, name):
            raise MigrationError(
                f"the destination has another {name}",
                field=name,
                expected=getattr(ours, name),
                got=getattr(hello, name),
            )
    for block, size in ours.ram.items():
        if hello.ram.get(block) != size:
            raise MigrationError(
                f"the destination's RAM block {block} differs",
                field=f"ram/{block}",
                expected=size,
                got=hello.ram.get(block),
            )
    for leaf, features in ours.cpuid.items():
        theirs = hello.cpuid.get(leaf, [0, 0, 0])
        if not isinstance(theirs, list) or len(theirs) != 3 or not all(isinstance(word, int) for word in theirs):
            raise _not_hello(f"cpuid/{leaf}", "EBX, ECX and EDX", theirs)
        for register, had, has in zip(("ebx", "ecx", "edx"), features, theirs, strict=True):
            if had & ~has:
                raise MigrationError(
                    "the destination's CPU lacks features that the guest was shown",
                    field=f"cpuid/{leaf}/{register}", expected=f"{had:#x}", got=f"{has:#x}",
                )  # fmt: skip
