"""The optimiser, the verifier and the lazy flags."""

from __future__ import annotations

import itertools

import pytest

from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import Mode
from pyvcpu.accel.tcg.ops import FIRST_TEMP, Op
from pyvcpu.accel.tcg.optimise import optimise
from pyvcpu.accel.tcg.region import translate
from pyvcpu.accel.tcg.verify import verify

T = FIRST_TEMP
LONG = Mode(64, 64, True, True)
RAX, RBX = 0, 3


def names(ops: list[Op]) -> list[str]:
    return [op[0] for op in ops]


def test_a_copy_is_looked_through_until_its_source_changes() -> None:
    ops: list[Op] = [
        ("mov", 64, T, RAX),
        ("add", 64, T + 1, T, RBX),  # may read RAX itself
        ("mov", 64, RAX, T + 1),
        ("mov", 64, RBX, T),  # may not: RAX has changed
        ("goto", 0, None),
    ]
    out = optimise(ops, [])
    assert ("add", 64, T + 1, RAX, RBX) in out
    assert ("mov", 64, RBX, T) in out


def test_constants_fold() -> None:
    consts = [5, 7]
    out = optimise([("add", 64, T, -1, -2), ("mov", 64, RAX, T), ("goto", 0, None)], consts)
    assert names(out) == ["mov", "goto"]
    assert consts[-1 - out[0][3]] == 12


def test_dead_values_go_but_not_across_a_fault() -> None:
    dead: list[Op] = [("mov", 64, RAX, RBX), ("mov", 64, RAX, -1), ("goto", 0, None)]
    assert names(optimise(dead, [1])) == ["mov", "goto"]
    seen: list[Op] = [("mov", 64, RAX, RBX), ("ld", (64, 0), T, RBX), ("mov", 64, RAX, -1), ("goto", 0, None)]
    assert names(optimise(seen, [1])) == ["mov", "ld", "mov", "goto"]


@pytest.mark.parametrize(
    "ops",
    [
        [("nonsense", 64, T, RAX), ("goto", 0, None)],
        [("mov", 24, T, RAX), ("goto", 0, None)],
        [("mov", 64, None, RAX), ("goto", 0, None)],
        [("add", 64, T, RAX), ("goto", 0, None)],
        [("mov", 64, T, T + 1), ("goto", 0, None)],
        [("mov", 64, T, -3), ("goto", 0, None)],
        [("mov", 64, 25, RAX), ("goto", 0, None)],
        [("mov", 64, T, RAX), ("mov", 64, T, RAX), ("goto", 0, None)],
        [("mov", 64, T, RAX)],
        [("goto", 0, None), ("mov", 64, T, RAX)],
        [("setc", ("above", 64), T, RAX, RBX), ("goto", 0, None)],
        [("ld", (64, 5), T, RAX), ("goto", 0, None)],
    ],
)
def test_the_verifier_refuses(ops: list[Op]) -> None:
    with pytest.raises(AssertionError):
        verify(ops, [1], insns=1)


@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_images_of_add_and_sub_against_the_definition(width: int) -> None:
    """CF, OF, AF from the definition in the SDM (1, 3.4.3.1), on edge values."""
    mask, top = (1 << width) - 1, 1 << (width - 1)
    edges = [0, 1, 0xF, 0x10, top - 1, top, top + 1, mask - 1, mask]
    signed = lambda v: v - ((v & top) << 1)  # noqa: E731
    for a, b in itertools.product(edges, edges):
        for kind, exact, result in (
            (flags.ADD, a + b, (a + b) & mask), (flags.SUB, a - b, (a - b) & mask),
        ):  # fmt: skip
            image = flags.image(flags.cc_op(kind, width), result, b)
            exact_signed = signed(a) + signed(b) if kind == flags.ADD else signed(a) - signed(b)
            low = (a & 0xF) + (b & 0xF) if kind == flags.ADD else (a & 0xF) - (b & 0xF)
            assert bool(image & flags.CF) == (not 0 <= exact <= mask)
            assert bool(image & flags.OF) == (not -top <= exact_signed < top)
            assert bool(image & flags.AF) == (not 0 <= low <= 0xF)
            assert bool(image & flags.ZF) == (result == 0)
            assert bool(image & flags.SF) == bool(result & top)
            assert bool(image & flags.PF) == ((result & 0xFF).bit_count() % 2 == 0)


def test_a_comparison_and_its_branch_become_one() -> None:
    (block, *_) = translate(bytes.fromhex("4839d8 7205"), 0x1000, 0x1000, LONG)  # cmp rax, rbx; jb
    assert block.ops[-1][:2] == ("br", ("ltu", 64, 0x100A, 0x1005))
    assert not any(op[0] in ("cce", "ccd") for op in block.ops)


def test_a_loop_head_that_needs_the_flags_knows_their_kind() -> None:
    """``inc`` keeps CF: at the head of a loop that ends with ``cmp`` the kind is known on the way round."""
    blocks = translate(bytes.fromhex("48ffc0 488b0b 4839d8 75f5"), 0x1000, 0x1000, LONG)
    heads = [block for block in blocks if block.rip == 0x1000]
    assert len(heads) == 2
    assert any(op[0] == "ccd" for op in heads[0].ops)
    assert not any(op[0] == "ccd" for op in heads[1].ops)


def test_a_region_is_cut_at_helpers_and_pages() -> None:
    blocks = translate(bytes.fromhex("90 0fa2 90"), 0x1000, 0x1000, LONG)  # nop; cpuid; nop
    assert [len(block.insns) for block in blocks] == [2]
    assert blocks[0].ops[-1] == ("helper", 1, None)
