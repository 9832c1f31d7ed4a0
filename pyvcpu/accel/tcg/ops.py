"""The ops: a small typed IR between decoded instructions and a target's code.

An op is a tuple ``(name, x, dest, *sources)``. Ids say where values live:

      0 .. 15   guest registers RAX .. R15, 64 bits each
     16 17 18   cc_op cc_dst cc_src: the lazy flags (flags.py)
     32 ..      temporaries of one block, each written once
     negative   interned constants: the value of id i is consts[-1 - i]

``x`` holds the width in bits, a condition, a field or an instruction index, as the table says.

The rule of widths: **inputs ignore bits above the width, outputs are zero-extended.**
The rule of faults: **all loads and stores of an instruction come before its first write of a guest
register or of the flags**, so the state at each access is that of the instruction's start.

    pure        mov w        d a          low w bits
                sext (f, t)  d a          sign-extend f bits to t
                add sub and or xor mul w  d a b
                mulhu mulhs w             d a b   upper half of the product
                shl shr sar rotl w        d a n   count taken modulo 64 (w = 64) or 32; rotl modulo w
                dep (lo, len) d a v       a with bits lo .. lo+len-1 replaced by v
                extr (lo, len) d a        those bits
                lea (scale, disp, w) d base index      base or index may be None
                setc (cond, w) d a b      1 if the condition holds, else 0
                movc (cond, w) d a b t f  t if it holds, else f (64-bit values)
                ctz bsr bswap w          d a     (ctz, bsr: of a non-zero value)
                getf (name, index) d      a field of CpuState; index None for a scalar
                cce (kind, w) d dst src   EFLAGS image of a static kind (flags.py)
                ccd -  d op dst src       EFLAGS image, kind not known in advance
    effects     setf (name, index) - a
    may fault   ld (w, i) d addr          i: the instruction's index in the block
                st (w, i) - addr value
                udivq udivr sdivq sdivr (w, i) d hi lo divisor   quotient, remainder; #DE
    terminators goto target -             target: RIP
                br (cond, w, t, f) - a b  to t if the condition holds, else to f
                exiti w - a               to the RIP in a, taken to w bits
                helper i -                run the helper of instruction i, then wherever it says
"""

from __future__ import annotations

from typing import Any, NamedTuple

Op = tuple[Any, ...]

CC_OP, CC_DST, CC_SRC = 16, 17, 18
FIRST_TEMP = 32

WIDTHS = frozenset({8, 16, 32, 64})

# Conditions of setc, movc and br: unsigned and signed comparisons of width w.
CONDITIONS = {
    "eq": "ne", "ne": "eq", "ltu": "geu", "geu": "ltu", "leu": "gtu", "gtu": "leu",
    "lts": "ges", "ges": "lts", "les": "gts", "gts": "les",
}  # fmt: skip
"""Each condition and its negation."""


class Spec(NamedTuple):
    """What an op looks like: the shape of ``x``, whether it has a dest, how many sources."""

    x: str  # "w", "cond,w", "from,to", "lo,len", "scale,disp,w", "field", "kind,w", "w,i", "rip", "cond,w,t,f", "i", ""
    dest: bool
    sources: int
    effect: str  # "pure", "field", "fault", "end"


SPECS: dict[str, Spec] = {
    "mov": Spec("w", True, 1, "pure"),
    "sext": Spec("from,to", True, 1, "pure"),
    **{name: Spec("w", True, 2, "pure") for name in
       ("add", "sub", "and", "or", "xor", "mul", "mulhu", "mulhs", "shl", "shr", "sar", "rotl")},
    "dep": Spec("lo,len", True, 2, "pure"),
    "extr": Spec("lo,len", True, 1, "pure"),
    "lea": Spec("scale,disp,w", True, 2, "pure"),
    "setc": Spec("cond,w", True, 2, "pure"),
    "movc": Spec("cond,w", True, 4, "pure"),
    **{name: Spec("w", True, 1, "pure") for name in ("ctz", "bsr", "bswap")},
    "getf": Spec("field", True, 0, "field"),
    "cce": Spec("kind,w", True, 2, "pure"),
    "ccd": Spec("", True, 3, "pure"),
    "setf": Spec("field", False, 1, "field"),
    "ld": Spec("w,i", True, 1, "fault"),
    "st": Spec("w,i", False, 2, "fault"),
    **{name: Spec("w,i", True, 3, "fault") for name in ("udivq", "udivr", "sdivq", "sdivr")},
    "goto": Spec("rip", False, 0, "end"),
    "br": Spec("cond,w,t,f", False, 2, "end"),
    "exiti": Spec("w", False, 1, "end"),
    "helper": Spec("i", False, 0, "end"),
}  # fmt: skip


def source_width(op: Op, position: int) -> int:
    """How many low bits of source ``position`` (0-based) the op looks at."""
    name, x = op[0], op[1]
    kind = SPECS[name].x
    if name == "ld" or (name == "st" and position == 0):
        return 64
    if name in ("shl", "shr", "sar", "rotl") and position == 1:
        return 8
    if name == "movc" and position >= 2:
        return 64
    if kind == "w":
        return int(x)
    if kind in ("cond,w", "kind,w"):
        return int(x[1])
    if kind in ("w,i", "from,to"):
        return int(x[0])
    if kind == "cond,w,t,f":
        return int(x[1])
    if name == "dep" and position == 1:
        return int(x[1])
    return 64


def dest_width(op: Op) -> int:
    """How many low bits of the result can be non-zero."""
    name, x = op[0], op[1]
    if name == "sext":
        return int(x[1])
    if name == "extr":
        return int(x[1])
    if name == "lea":
        return int(x[2])
    if name == "setc":
        return 1
    if name in ("ld", "udivq", "udivr", "sdivq", "sdivr"):
        return int(x[0])
    if name in ("ctz", "bsr"):
        return 7
    if name in ("cce", "ccd"):
        return 12
    if SPECS[name].x == "w":
        return int(x)
    return 64
