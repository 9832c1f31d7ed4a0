"""Lazy flags: what the last flag-setting instruction did, from which EFLAGS can be had at any time.

    kind    cc_dst         cc_src                         CF
    EFLAGS  -              the image itself               bit 0
    ADD     a + b          b                              dst < src
    SUB     a - b          b                              a < b, where a = dst + src
    LOGIC   result         -                              0
    INC DEC result         the old CF                     src
    SHL     result         a << (n - 1)                   its top bit
    SHR SAR result         a >> (n - 1)                   its bit 0
    MUL     low half       1 if the high half matters     src

``cc_op`` is ``kind * 4 + log2(width / 8)``. AF after shifts, logic and multiplication is undefined
in the SDM and 0 here; OF after shifts by more than one is the formula of a shift by one.
"""

from __future__ import annotations

EFLAGS, ADD, SUB, LOGIC, INC, DEC, SHL, SHR, SAR, MUL = range(10)
KIND_NAMES = ("eflags", "add", "sub", "logic", "inc", "dec", "shl", "shr", "sar", "mul")

CF, PF, AF, ZF, SF, TF, IF, DF, OF = 1, 4, 0x10, 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
IOPL, NT, RF, VM, AC, VIF, VIP, ID = 0x3000, 0x4000, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20, 1 << 21
ARITHMETIC = CF | PF | AF | ZF | SF | OF

CC_EFLAGS = EFLAGS * 4

_LOG2 = {8: 0, 16: 1, 32: 2, 64: 3}
PARITY = bytes(PF if bin(i).count("1") % 2 == 0 else 0 for i in range(256))


def cc_op(kind: int, width: int) -> int:
    """The number that ``cc_op`` holds for a kind at a width in bits."""
    return kind * 4 + _LOG2[width]


def image(op: int, dst: int, src: int) -> int:
    """The arithmetic bits of EFLAGS (CF PF AF ZF SF OF) for a lazy triple; inputs are zero-extended."""
    kind = op >> 2
    if kind == EFLAGS:
        return src & ARITHMETIC
    width = 8 << (op & 3)
    mask = (1 << width) - 1
    top = width - 1
    out = PARITY[dst & 0xFF] | (0 if dst else ZF) | (dst >> top << 7)
    if kind == SUB:
        a = (dst + src) & mask
        return out | (a < src) | ((dst ^ a ^ src) & AF) | (((a ^ src) & (a ^ dst)) >> top << 11)
    if kind == ADD:
        a = (dst - src) & mask
        return out | (dst < src) | ((dst ^ a ^ src) & AF) | (((a ^ dst) & (src ^ dst)) >> top << 11)
    if kind == LOGIC:
        return out
    if kind == INC:
        return out | src | (0 if dst & 0xF else AF) | (OF if dst == 1 << top else 0)
    if kind == DEC:
        return out | src | (AF if dst & 0xF == 0xF else 0) | (OF if dst == (1 << top) - 1 else 0)
    if kind == SHL:
        return out | (src >> top & 1) | (((src ^ dst) >> top & 1) << 11)
    if kind in (SHR, SAR):
        return out | (src & 1) | (((src ^ dst) >> top & 1) << 11)
    return out | (CF | OF if src else 0)  # MUL
