"""The python target: ops -> the source of one Python function a region.

    def region(S, r, n, R, W, B, H, I, Q, M, N):
        rax = r[0]; ...                                  guest registers become locals
        b = 0
        try:
            while 1:
                if b == 0:                               one `if` a block, in address order
                    n -= 3                               the budget, checked at the head
                    if n < 0: n += 3; return 0x8000
                    rax = (rax + 0x1) & 0xffff...        one line an op, single uses folded in
                    a = rbx + 0x8
                    t0 = Q[(R[a >> 12] + a) >> 3] if not a & 7 else M.load8(a)
                    if t0 != 0x0: b = 0; continue        a back edge
                    return 0x8010                        an exit: the next RIP, or a HelperCall
        finally:
            r[0] = rax; ...; N[0] = n                    whatever happens, state is written back

    S CpuState   r its regs   n budget   R W load and store TLB: page -> byte offset in RAM less page address
    B H I Q RAM as 1, 2, 4 and 8-byte items   M the mmu's slow accessors   N where n goes

An access whose page is not in the TLB asks the TLB's ``__missing__`` for it; an exception leaves at
a line that ``fault_lines`` maps to the instruction, at no cost on the fast path. 64-bit addresses are
not wrapped here: a sum outside 64 bits misses the TLB and takes the slow path, which wraps.
"""

from __future__ import annotations

import types
from functools import lru_cache
from typing import NamedTuple

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import MASK
from pyvcpu.accel.tcg.decode import Insn
from pyvcpu.accel.tcg.ops import FIRST_TEMP, SPECS, Op, dest_width
from pyvcpu.cpu.events import DE, GuestException
from pyvcpu.cpu.layout import REG_NAMES

_NAMES = (*REG_NAMES, "cc_op", "cc_dst", "cc_src")
_FIELDS = -1  # a pseudo-register: what getf depends on and setf changes
_VIEWS = {8: ("B", 0), 16: ("H", 1), 32: ("I", 2), 64: ("Q", 3)}
_COMPARE = {"eq": "==", "ne": "!=", "ltu": "<", "geu": ">=", "leu": "<=", "gtu": ">"}
_SIGNED = {"lts": "<", "ges": ">=", "les": "<=", "gts": ">"}


class HelperCall(NamedTuple):
    """What a region returns when its last instruction is a helper's."""

    insn: Insn


class Block(NamedTuple):
    """One basic block of a region: its RIP, its instructions and its ops, terminator last."""

    rip: int
    insns: list[Insn]
    ops: list[Op]
    consts: list[int]


class Code(NamedTuple):
    """What a target makes of a region."""

    function: types.FunctionType
    fault_lines: dict[int, tuple[int, int, int]]  # line -> (RIP, instructions done in the block, block length)
    source: str


def lower(blocks: list[Block], *, slow: bool = False) -> Code:
    """The region as a Python function; block 0 is the entry.

    ``slow`` makes every access a call of the mmu that serves MMIO and code pages at once, for
    the one instruction that needs it.
    """
    return _Region(blocks, slow).build()


def divide(signed: bool, width: int, high: int, low: int, divisor: int) -> tuple[int, int]:
    """Quotient and remainder of high:low by divisor; #DE as the SDM says (vol. 2A, DIV and IDIV)."""
    dividend = high << width | low
    if divisor == 0:
        raise GuestException(DE)
    if not signed:
        quotient, remainder = divmod(dividend, divisor)
        if quotient >> width:
            raise GuestException(DE)
        return quotient, remainder
    dividend -= dividend >> (2 * width - 1) << (2 * width)
    divisor -= divisor >> (width - 1) << width
    quotient, remainder = divmod(abs(dividend), abs(divisor))
    if (dividend < 0) != (divisor < 0):
        quotient = -quotient
    if dividend < 0:
        remainder = -remainder
    if not -(1 << (width - 1)) <= quotient < 1 << (width - 1):
        raise GuestException(DE)
    mask = MASK[width]
    return quotient & mask, remainder & mask


def _divider(signed: bool, part: int) -> types.FunctionType:
    def run(width: int, high: int, low: int, divisor: int) -> int:
        return divide(signed, width, high, low, divisor)[part]

    return run  # type: ignore[return-value]


_GLOBALS = {
    "image": flags.image,
    "PARITY": flags.PARITY,
    "udivq": _divider(False, 0), "udivr": _divider(False, 1), "sdivq": _divider(True, 0), "sdivr": _divider(True, 1),
    "__builtins__": {"int": int},
}  # fmt: skip


@lru_cache(maxsize=8192)
def _compile(source: str) -> types.CodeType:
    return compile(source, "<region>", "exec")


class _Region:
    def __init__(self, blocks: list[Block], slow: bool) -> None:
        self.blocks, self.slow = blocks, slow
        self.index = {block.rip: i for i, block in enumerate(blocks)}
        self.lines: list[str] = []
        self.faults: dict[int, tuple[int, int, int]] = {}
        self.calls: list[HelperCall] = []
        self.used: set[int] = set()
        self.written: set[int] = set()

    def build(self) -> Code:
        for block in self.blocks:
            for op in block.ops:
                self.used.update(s for s in op[3:] if s is not None and 0 <= s < FIRST_TEMP)
                if op[2] is not None and op[2] < FIRST_TEMP:
                    self.written.add(op[2])
        self.used |= self.written
        self._head()
        for i, block in enumerate(self.blocks):
            _Block(self, block, i).emit()
        self.lines.append(" finally:")
        self.lines += [f"  {_home(i)} = {_NAMES[i]}" for i in sorted(self.written)]
        self.lines.append("  N[0] = n")
        source = "\n".join(self.lines)
        names = dict(_GLOBALS)
        for i, call in enumerate(self.calls):
            names[f"K{i}"] = call
        exec(_compile(source), names)
        function = names["region"]
        assert isinstance(function, types.FunctionType)
        return Code(function, self.faults, source)

    def _head(self) -> None:
        self.lines.append("def region(S, r, n, R, W, B, H, I, Q, M, N):")
        self.lines += [f" {_NAMES[i]} = {_home(i)}" for i in sorted(self.used)]
        self.lines.append(" b = 0")
        self.lines.append(" try:")
        self.lines.append("  while 1:")


def _home(i: int) -> str:
    return f"r[{i}]" if i < 16 else f"S.{_NAMES[i]}"


class _Block:
    """Lowers one block. Single-use temporaries stay expressions until they are used."""

    def __init__(self, region: _Region, block: Block, number: int) -> None:
        self.region, self.block, self.number = region, block, number
        self.pad = "   " if len(region.blocks) == 1 else "    "
        self.uses: dict[int, int] = {}
        for op in block.ops:
            for s in op[3:]:
                if s is not None and s >= FIRST_TEMP:
                    self.uses[s] = self.uses.get(s, 0) + 1
        self.pending: dict[int, tuple[str, frozenset[int]]] = {}
        self.width: dict[int, int] = {}

    def line(self, text: str) -> None:
        self.region.lines.append(self.pad + text)

    def emit(self) -> None:
        count = len(self.block.insns)
        if len(self.region.blocks) > 1:
            self.region.lines.append(f"   if b == {self.number}:")
        self.line(f"n -= {count}")
        self.line(f"if n < 0: n += {count}; return {self.block.rip:#x}")
        ops = self.block.ops
        skip = -1
        for at, op in enumerate(ops):
            if at == skip:
                continue
            effect = SPECS[op[0]].effect
            if effect == "fault":
                if op[0] == "ld" and at + 1 < len(ops) and self._load_into(op, ops[at + 1]):
                    skip = at + 1
                    continue
                self._fault(op, f"t{op[2]}" if op[2] is not None else None)
                if op[2] is not None:
                    self.width[op[2]] = dest_width(op)
            elif effect == "end":
                self._end(op)
            elif op[0] == "setf":
                value, _ = self._source(op[3])
                self._flush({_FIELDS})
                self.line(f"{self._field(op[1])} = {value}")
            else:
                self._pure(op)

    # -- values -------------------------------------------------------------------------------

    def _source(self, i: int) -> tuple[str, frozenset[int]]:
        """Text of an id, and the registers that the text reads."""
        if i < 0:
            return f"{self.block.consts[-1 - i]:#x}", frozenset()
        if i < FIRST_TEMP:
            return _NAMES[i], frozenset({i})
        found = self.pending.pop(i, None)
        return found if found is not None else (f"t{i}", frozenset())

    def _known(self, i: int) -> int:
        return self.block.consts[-1 - i].bit_length() if i < 0 else self.width.get(i, 64)

    def _at(self, i: int, width: int) -> tuple[str, frozenset[int]]:
        """Text of the low ``width`` bits of an id."""
        if i < 0:
            return f"{self.block.consts[-1 - i] & ((1 << width) - 1):#x}", frozenset()
        text, reads = self._source(i)
        if self._known(i) > width:
            text = f"({text} & {(1 << width) - 1:#x})"
        return text, reads

    def _pure(self, op: Op) -> None:
        dest = op[2]
        text, reads, width = self._expression(op)
        if dest >= FIRST_TEMP:
            self.width[dest] = width
            if self.uses.get(dest, 0) == 1:
                self.pending[dest] = (text, reads)
            else:
                self.line(f"t{dest} = {_bare(text)}")
            return
        self._assign(dest, text, width)

    def _assign(self, dest: int, text: str, width: int) -> None:
        self._flush({dest})
        self.width[dest] = width
        if text != _NAMES[dest]:
            self.line(f"{_NAMES[dest]} = {_bare(text)}")

    def _flush(self, changing: set[int]) -> None:
        """Fix the value of every waiting expression that reads what is about to change."""
        for temp in [t for t, (_, reads) in self.pending.items() if reads & changing]:
            text, _ = self.pending.pop(temp)
            self.line(f"t{temp} = {_bare(text)}")

    def _named(self, i: int, width: int) -> tuple[str, frozenset[int]]:
        """Like :meth:`_at`, but a name or a constant, so that it can be used twice."""
        text, reads = self._at(i, width)
        if text.isidentifier() or text.startswith("0x"):
            return text, reads
        self.region.lines.append(f"{self.pad}x{len(self.region.lines)} = {_bare(text)}")
        return f"x{len(self.region.lines) - 1}", frozenset()

    def _signed(self, i: int, width: int) -> tuple[str, frozenset[int]]:
        text, reads = self._at(i, width)
        sign = 1 << (width - 1)
        return f"(({text} ^ {sign:#x}) - {sign:#x})", reads

    def _condition(self, cond: str, width: int, a: int, b: int) -> tuple[str, frozenset[int]]:
        if cond in _COMPARE:
            left, reads = self._at(a, width)
            right, more = self._at(b, width)
            return f"{left} {_COMPARE[cond]} {right}", reads | more
        sign = 1 << (width - 1)
        if b < 0 and cond in ("lts", "ges") and self.block.consts[-1 - b] & MASK[width] == 0:
            left, reads = self._at(a, width)
            return f"{left} {'>=' if cond == 'lts' else '<'} {sign:#x}", reads
        left, reads = self._at(a, width)
        right, more = self._at(b, width)
        # Flipping the sign bit turns a signed comparison into an unsigned one.
        left = f"{int(left, 16) ^ sign:#x}" if a < 0 else f"({left} ^ {sign:#x})"
        right = f"{int(right, 16) ^ sign:#x}" if b < 0 else f"({right} ^ {sign:#x})"
        return f"{left} {_SIGNED[cond]} {right}", reads | more

    def _count(self, i: int, width: int) -> tuple[str, frozenset[int]]:
        bits = 6 if width == 64 else 5
        return self._at(i, bits)

    def _expression(self, op: Op) -> tuple[str, frozenset[int], int]:
        """Text (parenthesised or atomic), registers read, width of the result."""
        name, x = op[0], op[1]
        width = dest_width(op)
        if name == "mov":
            text, reads = self._at(op[3], x)
            return text, reads, min(x, self._known(op[3]))
        if name == "getf":
            return self._field(x), frozenset({_FIELDS}), 64
        if name == "lea":
            return (*self._sum(op, MASK[x[2]]), width)
        if name == "setc":
            text, reads = self._condition(x[0], x[1], op[3], op[4])
            return f"(1 if {text} else 0)", reads, 1
        if name == "movc":
            text, reads = self._condition(x[0], x[1], op[3], op[4])
            yes, more = self._source(op[5])
            no, most = self._source(op[6])
            return f"({yes} if {text} else {no})", reads | more | most, max(self._known(op[5]), self._known(op[6]))
        if name == "dep":
            (lo, length), base, value = x, op[3], op[4]
            left, reads = self._source(base)
            right, more = self._at(value, length)
            keep = MASK[64] ^ ((1 << length) - 1 << lo)
            right = right if lo == 0 else f"({right} << {lo})"
            return f"({left} & {keep:#x} | {right})", reads | more, max(self._known(base), lo + length)
        if name == "extr":
            lo, length = x
            text, reads = self._source(op[3])
            text = f"({text} >> {lo})" if lo else text
            return (text if self._known(op[3]) <= lo + length else f"({text} & {(1 << length) - 1:#x})"), reads, length
        if name == "sext":
            text, reads = self._signed(op[3], x[0])
            return f"({text} & {MASK[x[1]]:#x})", reads, width
        if name in ("ctz", "bsr"):
            text, reads = self._named(op[3], x) if name == "ctz" else self._at(op[3], x)
            text = f"({text} & -{text})" if name == "ctz" else f"({text})"
            return f"({text}.bit_length() - 1)", reads, 7
        if name == "bswap":
            text, reads = self._at(op[3], x)
            return f'int.from_bytes(({text}).to_bytes({x // 8}, "little"), "big")', reads, width
        if name == "cce":
            return self._image(op)
        if name == "ccd":
            parts = [self._source(s) for s in op[3:]]
            return f"image({', '.join(p[0] for p in parts)})", parts[0][1] | parts[1][1] | parts[2][1], 12
        return self._binary(op)

    def _image(self, op: Op) -> tuple[str, frozenset[int], int]:
        (kind, width), dst, src = op[1], op[3], op[4]
        if kind == flags.LOGIC:
            text, reads = self._named(dst, width)
            return f"(PARITY[{text} & 255] | (0 if {text} else 64) | ({text} >> {width - 1} << 7))", reads, 12
        left, reads = self._at(dst, width)
        right, more = self._at(src, width)
        return f"image({flags.cc_op(kind, width)}, {left}, {right})", reads | more, 12

    def _binary(self, op: Op) -> tuple[str, frozenset[int], int]:
        name, width, a, b = op[0], op[1], op[3], op[4]
        mask = f"{MASK[width]:#x}"
        if name in ("shl", "shr", "sar"):
            count, more = self._count(b, width)
            if name == "sar":
                left, reads = self._signed(a, width)
                return f"({left} >> {count} & {mask})", reads | more, width
            if name == "shr":
                left, reads = self._at(a, width)
                return f"({left} >> {count})", reads | more, min(width, self._known(a))
            left, reads = self._source(a) if a >= 0 else self._at(a, width)
            return f"({left} << {count} & {mask})", reads | more, width
        if name == "rotl":
            left, reads = self._named(a, width)
            count, more = self._named(b, 6)
            return f"(({left} << {count} | {left} >> {width} - {count}) & {mask})", reads | more, width
        if name == "mulhu":
            left, reads = self._at(a, width)
            right, more = self._at(b, width)
            return f"({left} * {right} >> {width})", reads | more, width
        if name == "mulhs":
            left, reads = self._signed(a, width)
            right, more = self._signed(b, width)
            return f"({left} * {right} >> {width} & {mask})", reads | more, width
        known_a, known_b = self._known(a), self._known(b)
        left, reads = self._source(a) if a >= 0 else self._at(a, width)
        right, more = self._source(b) if b >= 0 else self._at(b, width)
        reads |= more
        if name in ("and", "or", "xor"):
            sign = {"and": "&", "or": "|", "xor": "^"}[name]
            known = min(known_a, known_b) if name == "and" else max(known_a, known_b)
            if b < 0 and name == "and":
                known = min(known_a, (self.block.consts[-1 - b] & MASK[width]).bit_length())
            if known <= width:
                return f"({left} {sign} {right})", reads, known
            return (
                f"({left} {sign} {right} & {mask})" if name == "and" else f"(({left} {sign} {right}) & {mask})",
                reads,
                width,
            )
        sign = {"add": "+", "sub": "-", "mul": "*"}[name]
        return f"({left} {sign} {right} & {mask})", reads, width

    def _sum(self, op: Op, mask: int | None) -> tuple[str, frozenset[int]]:
        """base + index * scale + disp of a lea, wrapped by ``mask`` or left as it falls."""
        scale, disp, _ = op[1]
        parts: list[str] = []
        reads: frozenset[int] = frozenset()
        for i, factor in ((op[3], 1), (op[4], scale)):
            if i is not None:
                text, more = self._source(i)
                parts.append(text if factor == 1 else f"{text} * {factor}")
                reads |= more
        text = " + ".join(parts)
        if disp:
            text += f" + {disp:#x}" if disp > 0 else f" - {-disp:#x}"
        return (f"({text} & {mask:#x})" if mask is not None else f"({text})"), reads

    def _field(self, x: tuple[str, int | None]) -> str:
        return f"S.{x[0]}" if x[1] is None else f"S.{x[0]}[{x[1]}]"

    # -- what may fault -----------------------------------------------------------------------

    def _load_into(self, op: Op, following: Op) -> bool:
        """``ld`` whose only use is the move after it: one line."""
        if following[0] != "mov" or following[3] != op[2] or self.uses.get(op[2]) != 1 or following[2] >= FIRST_TEMP:
            return False
        if following[1] < op[1][0]:
            return False
        self._flush({following[2]})
        self._fault(op, _NAMES[following[2]])
        self.width[following[2]] = op[1][0]
        return True

    def _mark(self, index: int) -> None:
        """The next line may fault on behalf of instruction ``index``."""
        count = len(self.block.insns)
        self.region.faults[len(self.region.lines) + 1] = (self.block.insns[index].ip, index, count)

    def _fault(self, op: Op, target: str | None) -> None:
        name, (width, index) = op[0], op[1]
        if name == "st":
            value, _ = self._at(op[4], width)
            if not (value.isidentifier() or value.startswith("0x")):
                self.line(f"v = {_bare(value)}")
                value = "v"
            address = self._address(op[3])
            self._store(address, width, value, index)
            return
        if name == "ld":
            address = self._address(op[3])
            self._mark(index)
            self.line(f"{target} = {self._load(address, width)}")
            return
        values = [self._at(s, width)[0] for s in op[3:]]
        self._mark(index)
        self.line(f"{target} = {name}({width}, {', '.join(values)})")

    def _address(self, i: int) -> str:
        """A name or constant for an address; a 64-bit sum used only here is not wrapped."""
        text, _ = self._source(i)
        if text.endswith(f" & {MASK[64]:#x})"):
            text = text[: -len(f" & {MASK[64]:#x})")] + ")"
        if text.isidentifier() or text.startswith("0x"):
            return text
        self.line(f"a = {_bare(text)}")
        return "a"

    def _load(self, a: str, width: int) -> str:
        if self.region.slow:
            return f"M.read({a}, {width // 8})"
        view, shift = _VIEWS[width]
        if shift == 0:
            return f"B[R[{a} >> 12] + {a}]"
        fast = f"{view}[(R[{a} >> 12] + {a}) >> {shift}]"
        return f"{fast} if not {a} & {(1 << shift) - 1} else M.load{width // 8}({a})"

    def _store(self, a: str, width: int, value: str, index: int) -> None:
        if self.region.slow:
            self._mark(index)
            self.line(f"M.write({a}, {width // 8}, {value})")
            return
        view, shift = _VIEWS[width]
        if shift == 0:
            self._mark(index)
            self.line(f"B[W[{a} >> 12] + {a}] = {value}")
            return
        self._mark(index)
        self.line(f"if {a} & {(1 << shift) - 1}: M.store{width // 8}({a}, {value})")
        self._mark(index)
        self.line(f"else: {view}[(W[{a} >> 12] + {a}) >> {shift}] = {value}")

    # -- terminators --------------------------------------------------------------------------

    def _end(self, op: Op) -> None:
        name, x = op[0], op[1]
        if name == "goto":
            self.line(self._go(x))
        elif name == "br":
            cond, width, yes, no = x
            text, _ = self._condition(cond, width, op[3], op[4])
            self.line(f"if {text}: {self._go(yes)}")
            self.line(f"else: {self._go(no)}")
        elif name == "exiti":
            text, _ = self._at(op[3], x)
            self.line(f"return {_bare(text)}")
        else:
            call = HelperCall(self.block.insns[x])
            self.line(f"return K{len(self.region.calls)}")
            self.region.calls.append(call)

    def _go(self, rip: int) -> str:
        """To another block of the region, or out of it."""
        target = self.region.index.get(rip)
        if target is None or self.region.slow:
            return f"return {rip:#x}"
        if len(self.region.blocks) == 1:
            return "continue"
        if target > self.number:
            return f"b = {target}"
        return f"b = {target}; continue"


def _bare(text: str) -> str:
    """Without one pair of enclosing parentheses, if the first and the last belong together."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for at, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0 and at < len(text) - 1:
            return text
    return text[1:-1]
