"""Decodes what keystone made, and holds it against the source, statement by statement.

keystone 0.9.2 gets some inputs wrong without a word: an absolute ``[address]`` becomes RIP-relative, a far jump is cut
to 16 bits, ``push word`` has the wrong size. So every instruction is decoded by iced-x86 and must have the source's
mnemonic, registers, memory operand with its size, immediates, and the address of the label that was named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from iced_x86 import (
    CodeSize,
    Decoder,
    FormatMnemonicOptions,
    Formatter,
    FormatterSyntax,
    Instruction,
    MemorySizeExt,
    Mnemonic,
    OpKind,
    Register,
    RegisterExt,
)

_SAME = {"jz": "je", "jnz": "jne", "jc": "jb", "jnae": "jb", "jnc": "jae", "jnb": "jae", "jna": "jbe", "jnbe": "ja"}
_SIZES = {"byte": 1, "word": 2, "dword": 4, "qword": 8, "fword": 6, "tbyte": 10}
_DATA = {".byte": 1, ".word": 2, ".long": 4, ".quad": 8}
_BRANCHES = {OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32, OpKind.NEAR_BRANCH64}
_IMMEDIATE_BITS = {
    OpKind.IMMEDIATE8: 8, OpKind.IMMEDIATE16: 16, OpKind.IMMEDIATE32: 32, OpKind.IMMEDIATE64: 64,
    OpKind.IMMEDIATE8TO16: 16, OpKind.IMMEDIATE8TO32: 32, OpKind.IMMEDIATE8TO64: 64, OpKind.IMMEDIATE32TO64: 64,
}  # fmt: skip
_REGISTERS = {name.lower(): value for name, value in vars(Register).items() if isinstance(value, int)}
_FORMATTER = Formatter(FormatterSyntax.INTEL)


class Mismatch(Exception):
    """What the bytes say is not what the source says."""


@dataclass
class _Statement:
    line: int
    text: str
    instruction: Instruction


def verify(statements: list[tuple[int, str]], code: bytes, bits: int, address: int) -> int:
    """Compare a stretch of source with ``code``, whose first byte is at ``address``; how many bytes it takes there.

    ``statements`` are (line, text) as keystone gets them. Raises Mismatch.
    """
    labels: dict[str, int] = {}
    decoded: list[_Statement] = []
    decoder = Decoder(bits, code, ip=address)
    at = 0
    for line, text in statements:
        word, _, rest = text.partition(" ")
        if text.endswith(":"):
            labels[text[:-1]] = address + at
        elif word in _DATA:
            at += _DATA[word] * len(rest.split(","))
        else:
            decoder.position, decoder.ip = at, address + at
            instruction = decoder.decode()
            if instruction.is_invalid:
                raise Mismatch(f"line {line}: {text}: {code[at : at + 15].hex(' ')} is no instruction")
            decoded.append(_Statement(line, text, instruction))
            at += instruction.len
    if at > len(code):
        raise Mismatch(f"the source makes {at} bytes, and there are {len(code)}")
    for statement in decoded:
        try:
            _compare(statement.text, statement.instruction, labels)
        except Mismatch as error:
            raise Mismatch(
                f"line {statement.line}: {statement.text}: assembled as {statement.instruction}: {error}"
            ) from None
    return at


def _compare(text: str, instruction: Instruction, labels: dict[str, int]) -> None:
    mnemonic, _, rest = text.partition(" ")
    if mnemonic in ("rep", "repe", "repne", "lock"):
        if not (instruction.has_rep_prefix or instruction.has_repne_prefix or instruction.has_lock_prefix):
            raise Mismatch("the prefix is not there")
        mnemonic, _, rest = rest.strip().partition(" ")
    name = _FORMATTER.format_mnemonic(instruction, FormatMnemonicOptions.NO_PREFIXES)
    if _SAME.get(mnemonic, mnemonic) != _SAME.get(name, name):
        raise Mismatch("another mnemonic")
    operands = [operand.strip() for operand in rest.split(",")] if rest.strip() else []
    if operands and len(operands) != instruction.op_count:
        raise Mismatch(f"{instruction.op_count} operands")
    if mnemonic == "push" and instruction.op_kind(0) in _IMMEDIATE_BITS:
        size = 8 if instruction.code_size == CodeSize.CODE64 else 4 if instruction.code_size == CodeSize.CODE32 else 2
        if instruction.stack_pointer_increment != -size:
            raise Mismatch(f"pushes {-instruction.stack_pointer_increment} bytes")
    for number, operand in enumerate(operands):
        _compare_operand(operand, number, instruction, labels)


def _compare_operand(text: str, number: int, instruction: Instruction, labels: dict[str, int]) -> None:
    kind = instruction.op_kind(number)
    if kind == OpKind.REGISTER:
        wanted, got = _REGISTERS.get(text), instruction.op_register(number)
        if instruction.mnemonic == Mnemonic.LTR:  # takes 16 bits, of a register of any width
            wanted, got = _REGISTERS.get(f"e{text}"), RegisterExt.full_register32(got)
        if wanted != got:
            raise Mismatch(f"{text} is another register")
    elif kind in _BRANCHES:
        target = labels[text] if text in labels else int(text, 0)
        if instruction.near_branch_target != target:
            raise Mismatch(f"{text} is at {target:#x}")
    elif kind in _IMMEDIATE_BITS:
        if (instruction.immediate(number) - _number(text)) % (1 << _IMMEDIATE_BITS[kind]):
            raise Mismatch(f"{text} is another number")
    elif kind == OpKind.MEMORY:
        _compare_memory(text, instruction, labels)
    else:
        raise Mismatch(f"{text}: an operand of kind {kind}")


def _number(text: str) -> int:
    """A number, or a sum of some."""
    return sum(int(term, 0) for term in text.split("+"))


def _compare_memory(text: str, instruction: Instruction, labels: dict[str, int]) -> None:
    found = re.fullmatch(r"(?:(\w+) ptr )?\[(.*)\]", text)
    if found is None:
        raise Mismatch(f"{text} is not memory")
    size, inside = found.groups()
    if size is not None and MemorySizeExt.size(instruction.memory_size) != _SIZES[size]:
        raise Mismatch(f"{MemorySizeExt.size(instruction.memory_size)} bytes of memory")
    registers, displacement, scale = [], 0, 1
    for sign, term in re.findall(r"([+-]?)\s*([^+-]+)", inside):
        factors = [factor.strip() for factor in term.split("*")]
        if factors[0] in _REGISTERS:
            registers.append(_REGISTERS[factors[0]])
            scale = int(factors[1], 0) if len(factors) > 1 else scale
        elif factors[0] in labels:
            displacement += labels[factors[0]]
        else:
            displacement += int(sign + factors[0], 0)
    wanted = sorted(r for r in (instruction.memory_base, instruction.memory_index) if r != Register.NONE)
    if sorted(registers) != wanted:
        raise Mismatch("other registers of the address")
    if scale != instruction.memory_index_scale:
        raise Mismatch(f"scale {instruction.memory_index_scale}")
    if (instruction.memory_displacement - displacement) % (1 << 64):
        raise Mismatch(f"displacement {instruction.memory_displacement:#x}, not {displacement:#x}")
