"""Two passes over one block: copies and constants forwards, dead code backwards.

A fault leaves the state of the faulting instruction's start, so every guest register and the
lazy flags are live at each op that may fault, and at the end of the block.
"""

from __future__ import annotations

from pyvcpu.accel.tcg.ops import FIRST_TEMP, SPECS, Op, dest_width, source_width

_MASK = {8: 0xFF, 16: 0xFFFF, 32: 0xFFFFFFFF, 64: 0xFFFFFFFFFFFFFFFF}


def optimise(ops: list[Op], consts: list[int]) -> list[Op]:
    """The block's ops, fewer; ``consts`` may grow."""
    return _drop_dead(_propagate(ops, consts))


def _propagate(ops: list[Op], consts: list[int]) -> list[Op]:
    """Replace uses of copies and zero-extensions by what they copy, and fold constants."""
    interned = {value: -1 - i for i, value in enumerate(consts)}
    version = [0] * FIRST_TEMP  # of the registers: a copy of a register holds until its next write
    copies: dict[int, tuple[int, int, int]] = {}  # temp -> (source, its version, width taken)
    widths: dict[int, int] = {}  # id -> how many bits can be set
    out: list[Op] = []

    def constant(value: int) -> int:
        found = interned.get(value)
        if found is None:
            consts.append(value)
            found = interned[value] = -len(consts)
        return found

    def resolve(op: Op) -> Op:
        sources = list(op[3:])
        for at, source in enumerate(sources):
            if source is None or source < FIRST_TEMP or source not in copies:
                continue
            origin, born, width = copies[source]
            if origin >= 0 and origin < FIRST_TEMP and version[origin] != born:
                continue
            if width >= source_width(op, at):
                sources[at] = origin
        return (*op[:3], *sources)

    for original in ops:
        op = resolve(original)
        name, x, dest = op[0], op[1], op[2]
        folded = _fold(op, consts)
        if folded is not None:
            op = ("mov", 64, dest, constant(folded))
            name, x = "mov", 64
        if dest is not None:
            if dest < FIRST_TEMP:
                version[dest] += 1
                if op[:2] == ("mov", 64) and op[3] == dest:
                    version[dest] -= 1
                    continue
            elif name == "mov":
                source = op[3]
                width = 64 if widths.get(source, 64) <= x else x  # already narrow: a plain copy
                if source < 0:
                    value = consts[-1 - source] & _MASK[x]
                    source, width = constant(value), 64
                if source < 0 or source >= FIRST_TEMP:
                    copies[dest] = (source, 0, width)
                else:
                    copies[dest] = (source, version[source], width)
            widths[dest] = min(dest_width(op), widths.get(op[3], 64)) if name == "mov" else dest_width(op)
        out.append(op)
    return out


def _fold(op: Op, consts: list[int]) -> int | None:
    """The value of a pure op whose sources are constants, for the few ops where that happens."""
    name, x = op[0], op[1]
    if name not in ("add", "sub", "and", "or", "xor", "shl", "sext", "lea") or any(
        s is not None and s >= 0 for s in op[3:]
    ):
        return None
    values = [0 if s is None else consts[-1 - s] for s in op[3:]]
    if name == "sext":
        value = values[0] & _MASK[x[0]]
        return int(value - ((value >> (x[0] - 1)) << x[0])) & _MASK[x[1]]
    if name == "lea":
        return int(values[0] + values[1] * x[0] + x[1]) & _MASK[x[2]]
    a, b = values
    if name == "shl":
        return (a << (b & (63 if x == 64 else 31))) & _MASK[x]
    result = {"add": a + b, "sub": a - b, "and": a & b, "or": a | b, "xor": a ^ b}[name]
    return result & _MASK[x]


def _drop_dead(ops: list[Op]) -> list[Op]:
    live_registers = set(range(19))
    live = set(live_registers)
    out: list[Op] = []
    for op in reversed(ops):
        effect, dest = SPECS[op[0]].effect, op[2]
        if effect == "fault":
            live |= live_registers
        if dest is not None:
            if dest not in live and effect in ("pure", "field"):
                continue
            live.discard(dest)
        live.update(s for s in op[3:] if s is not None and s >= 0)
        out.append(op)
    out.reverse()
    return out
