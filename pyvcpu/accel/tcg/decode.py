"""Decoding: bytes -> :class:`Insn`, by iced-x86.

``ip`` is the offset within CS (RIP, EIP or IP), not the linear address: near branch targets wrap
as the processor's do.
"""

from __future__ import annotations

from iced_x86 import Code, Decoder, FlowControl, Formatter, FormatterSyntax, Instruction, Mnemonic

# Mnemonic is a module of int constants: the names come back from it, for errors and logs.
_NAMES = {value: name.lower().rstrip("_") for name, value in vars(Mnemonic).items() if isinstance(value, int)}
_FORMATTER = Formatter(FormatterSyntax.INTEL)

MAX_LENGTH = 15
"""The longest x86 instruction, in bytes (SDM 2A 2.3.11)."""


class Insn:
    """One decoded instruction and where it stands.

    ``iced`` is the iced-x86 object (operands, prefixes), ``code`` its bytes, ``bits`` the code
    size (16, 32 or 64), ``ip``/``next_ip`` the offsets of it and of its successor within CS (not wrapped to
    16 bits: beyond FFFF the limit of CS decides, and QEMU starts loaded images there).
    """

    __slots__ = ("bits", "code", "iced", "ip", "length", "mnemonic", "next_ip")

    def __init__(self, iced: Instruction, code: bytes, bits: int) -> None:
        self.iced, self.code, self.bits = iced, code, bits
        self.ip, self.length, self.mnemonic = iced.ip, iced.len, iced.mnemonic
        self.next_ip = (iced.ip + iced.len) & (0xFFFFFFFFFFFFFFFF if bits == 64 else 0xFFFFFFFF)

    @property
    def name(self) -> str:
        return _NAMES.get(self.mnemonic, "?")

    def __str__(self) -> str:
        return _FORMATTER.format(self.iced)

    @property
    def valid(self) -> bool:
        return self.iced.code != Code.INVALID

    @property
    def flow(self) -> int:
        """iced's FlowControl of the instruction."""
        return self.iced.flow_control


def decode(code: bytes, ip: int, bits: int) -> Insn:
    """The first instruction in ``code``, at offset ``ip``; ``valid`` is False for an undefined opcode.

    A truncated instruction is invalid too: pass at least ``MAX_LENGTH`` bytes where there are as many.
    """
    iced = Decoder(bits, code, ip=ip).decode()
    return Insn(iced, code[: iced.len], bits)


_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))


def is_too_long(code: bytes, ip: int, bits: int) -> bool:
    """Whether undecodable ``code`` is an instruction that repeated prefixes stretch beyond ``MAX_LENGTH``.

    That is #GP(0), not #UD (SDM 3A 6.15, interrupt 13).
    """
    count = next((i for i, byte in enumerate(code) if byte not in _PREFIXES), len(code))
    distinct = bytes(dict.fromkeys(code[:count]))
    shortened = decode(distinct + code[count:] + bytes(MAX_LENGTH), ip, bits)
    return shortened.valid and shortened.length + count - len(distinct) > MAX_LENGTH


def may_go_on(head: bytes, ip: int, bits: int) -> bool:
    """Whether undecodable ``head`` is the beginning of an instruction; if not, no byte behind it is fetched."""
    return any(decode(head + bytes([byte]) + bytes(MAX_LENGTH), ip, bits).valid for byte in (0, 0xC0, *range(256)))


def decode_block(code: bytes, ip: int, bits: int, limit: int) -> list[Insn]:
    """Instructions from ``ip`` on, up to ``limit``, to the end of ``code`` or to the first that ends a basic block.

    An instruction that is undefined, or does not fit into ``code``, is left out.
    """
    out: list[Insn] = []
    at = 0
    decoder = Decoder(bits, code, ip=ip)
    while len(out) < limit and at < len(code):
        iced = decoder.decode()
        if iced.code == Code.INVALID:
            break
        out.append(Insn(iced, code[at : at + iced.len], bits))
        at += iced.len
        if iced.flow_control != FlowControl.NEXT:
            break
    return out
