"""Regions: the unit of translation. Up to eight basic blocks of one page, with their back edges inside."""

from __future__ import annotations

from collections.abc import Iterable

from iced_x86 import FlowControl

from pyvcpu.accel.tcg.builder import Builder, Mode, StaticFlags
from pyvcpu.accel.tcg.decode import Insn, decode_block
from pyvcpu.accel.tcg.ops import SPECS, Op
from pyvcpu.accel.tcg.optimise import optimise
from pyvcpu.accel.tcg.target.python import Block
from pyvcpu.accel.tcg.translate import TRANSLATORS, UseHelper, alu, bits, control, data, muldiv, shift
from pyvcpu.accel.tcg.verify import verify

MAX_BLOCKS = 8
MAX_INSNS = 64
"""Instructions a block: stop-at-N falls back to single steps for at most this many."""

FAMILIES = (alu, bits, control, data, muldiv, shift)
"""The translator modules: importing them fills TRANSLATORS."""

_INSIDE = frozenset({FlowControl.NEXT, FlowControl.CONDITIONAL_BRANCH, FlowControl.UNCONDITIONAL_BRANCH})


def translate(
    code: bytes, base_ip: int, ip: int, mode: Mode, *, blocks: int = MAX_BLOCKS, insns: int = MAX_INSNS
) -> list[Block]:
    """The region that starts at offset ``ip``; ``code`` holds the bytes from offset ``base_ip`` on.

    Block 0 is the entry; where two blocks have the same RIP, jumps inside the region go to the later one.
    Empty where the first instruction is undefined or does not fit into ``code``.
    """
    found = _discover(code, base_ip, ip, mode, blocks, insns)
    if not found:
        return []
    order = [ip, *sorted(start for start in found if start != ip)]
    translated: dict[int, Block] = {}
    ends: dict[int, StaticFlags | None] = {}
    for start in order:
        translated[start], ends[start] = _translate_block(found[start], mode, None)
    # What needs the flags at its start without knowing their kind is done again where all ways there agree on it.
    again = [start for start in order if any(op[0] == "ccd" for op in translated[start].ops)]
    out = [translated[start] for start in order]
    for start in again:
        kinds = {ends[s] for s in order if start in _successors(found[s])}
        if len(kinds) != 1 or None in kinds:
            continue
        better, _ = _translate_block(found[start], mode, kinds.pop())
        if start == ip:
            out.append(better)  # a second copy of the entry, to which the back edges go
        else:
            out[order.index(start)] = better
    return out


def _discover(code: bytes, base_ip: int, ip: int, mode: Mode, blocks: int, insns: int) -> dict[int, list[Insn]]:
    """Basic blocks reachable by direct jumps within ``code``, by their first offset."""
    found: dict[int, list[Insn]] = {}
    queue = [ip]
    while queue and len(found) < blocks:
        start = queue.pop(0)
        if start in found or not 0 <= start - base_ip < len(code):
            continue
        block = decode_block(code[start - base_ip :], start, mode.bits, insns)
        for at, insn in enumerate(block):
            if insn.mnemonic not in TRANSLATORS:  # a helper's, or nobody's: it ends the block
                del block[at + 1 :]
                break
        if block:
            found[start] = block
            queue += _successors(block)
    for start, block in found.items():
        cut = next((i for i, insn in enumerate(block) if insn.ip != start and insn.ip in found), None)
        if cut is not None:
            del block[cut:]
    return found


def _successors(block: list[Insn]) -> list[int]:
    last = block[-1]
    if last.mnemonic not in TRANSLATORS or last.flow not in _INSIDE:
        return []
    if last.flow == FlowControl.NEXT:
        return [last.next_ip]
    target = last.iced.near_branch_target
    return [target] if last.flow == FlowControl.UNCONDITIONAL_BRANCH else [last.next_ip, target]


def _translate_block(insns: Iterable[Insn], mode: Mode, known: StaticFlags | None) -> tuple[Block, StaticFlags | None]:
    b = Builder(mode, known)
    for insn in insns:
        b.begin(insn)
        before = len(b.ops)
        translator = TRANSLATORS.get(insn.mnemonic)
        try:
            if translator is None:
                raise UseHelper
            translator(b, insn)
        except UseHelper:
            assert len(b.ops) == before, f"{insn}: ops emitted before handing over to the helper"
            b.end("helper", b.index)
        if b.ops and SPECS[b.ops[-1][0]].effect == "end":
            break
    if not b.ops or SPECS[b.ops[-1][0]].effect != "end":
        b.end("goto", b.insns[-1].next_ip)
    ops: list[Op] = optimise(b.ops, b.consts)
    if __debug__:
        verify(ops, b.consts, len(b.insns))
    # The left operand of a SUB is a temporary of this block.
    end = None if b.flags is None else StaticFlags(b.flags.kind, b.flags.width)
    return Block(b.insns[0].ip, b.insns, ops, b.consts), end
