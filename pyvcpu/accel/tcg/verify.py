"""The verifier: what every list of ops must satisfy, checked after each translation (not under ``python -O``)."""

from __future__ import annotations

from pyvcpu.accel.tcg.ops import CONDITIONS, FIRST_TEMP, SPECS, WIDTHS, Op


def verify(ops: list[Op], consts: list[int], insns: int) -> None:
    """Raise AssertionError, naming the op, where a block breaks the rules of :mod:`pyvcpu.accel.tcg.ops`."""
    defined: set[int] = set()
    for at, op in enumerate(ops):
        _check(op, at, len(ops), defined, len(consts), insns)
        if op[2] is not None and op[2] >= FIRST_TEMP:
            assert op[2] not in defined, f"{op}: temporary written twice"
            defined.add(op[2])


def _check(op: Op, at: int, count: int, defined: set[int], consts: int, insns: int) -> None:
    name, x, dest, sources = op[0], op[1], op[2], op[3:]
    assert name in SPECS, f"{op}: no such op"
    spec = SPECS[name]
    assert (dest is not None) == spec.dest, f"{op}: destination"
    assert len(sources) == spec.sources, f"{op}: {spec.sources} sources wanted"
    assert (spec.effect == "end") == (at == count - 1), f"{op}: terminators stand last, and only there"
    for source in sources:
        if source is None:
            assert name == "lea", f"{op}: missing source"
        elif source >= FIRST_TEMP:
            assert source in defined, f"{op}: temporary {source} read before it is written"
        elif source < 0:
            assert -source <= consts, f"{op}: constant {source} is not interned"
        else:
            assert source <= 18, f"{op}: no register {source}"
    if dest is not None:
        assert 0 <= dest <= 18 or dest >= FIRST_TEMP, f"{op}: no register {dest}"
    assert _x_legal(spec.x, x, insns), f"{op}: x is not legal"


def _x_legal(kind: str, x: object, insns: int) -> bool:
    if kind == "w":
        return x in WIDTHS
    if kind == "":
        return x is None
    if kind == "i":
        return isinstance(x, int) and 0 <= x < insns
    if kind == "rip":
        return isinstance(x, int) and 0 <= x < 1 << 64
    if not isinstance(x, tuple):
        return False
    if kind == "cond,w,t,f":
        return x[0] in CONDITIONS and x[1] in WIDTHS and all(0 <= rip < 1 << 64 for rip in x[2:])
    if kind == "cond,w":
        return x[0] in CONDITIONS and x[1] in WIDTHS
    if kind in ("kind,w", "field"):
        return len(x) == 2
    if kind == "w,i":
        return x[0] in WIDTHS and 0 <= x[1] < insns
    if kind == "from,to":
        return x[0] in WIDTHS and x[1] in WIDTHS and x[0] < x[1]
    if kind == "lo,len":
        return bool(0 <= x[0] < 64 and 0 < x[1] <= 64 - x[0])
    return bool(kind == "scale,disp,w" and x[0] in (1, 2, 4, 8) and x[2] in WIDTHS)
