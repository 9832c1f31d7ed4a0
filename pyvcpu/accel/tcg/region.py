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

    Empty where the first instruction is undefined or does not fit into ``code``.
    """
    found = _discover(code, base_ip, ip, mode, blocks, insns)
    order = [ip, *sorted(start for start in found if start != ip)] if found else []
    translated: dict[int, tuple[Block, StaticFlags | None]] = {}
    predecessors = {start: [s for s in order if start in _successors(found[s])] for start in order}
    for start in order:
        known = None
        if start != ip and all(s in translated for s in predecessors[start]):
            ends = {translated[s][1] for s in predecessors[start]}
            end = ends.pop() if len(ends) == 1 else None
            # The left operand of a SUB is a temporary of its own block.
            known = StaticFlags(end.kind, end.width) if end is not None else None
        translated[start] = _translate_block(found[start], mode, known)
    return [translated[start][0] for start in order]


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
    return Block(b.insns[0].ip, b.insns, ops, b.consts), b.flags
