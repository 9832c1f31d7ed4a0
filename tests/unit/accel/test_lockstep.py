"""The python target against unicorn: random programs, registers, flags, memory and RIP."""

from __future__ import annotations

import pytest

from tests.unit.accel.snippets import Outcome, Program, listing, make_program, run_python_target, run_unicorn

BATCH = 150

# Programs that once went wrong, as seeds of (seed, length).
FOUND = [(10, 1), (126, 1), (128, 1), (4201, 20), (5338, 20), (7577, 20), (7841, 20), (116525, 6), (119778, 19)]
FOUND_BY_ADDRESS = [(7, 8), (38, 39)]


def differences(ours: Outcome, theirs: Outcome, program: Program) -> list[str]:
    defined = ~program.undefined
    out = [
        f"register {i}: {a:#x}, unicorn {b:#x}"
        for i, (a, b) in enumerate(zip(ours.regs, theirs.regs, strict=True))
        if a != b
    ]
    if ours.rflags & defined != theirs.rflags & defined:
        out.append(f"flags {ours.rflags:#x}, unicorn {theirs.rflags:#x}, undefined {program.undefined:#x}")
    out += [name for name in ("data", "stack", "rip") if getattr(ours, name) != getattr(theirs, name)]
    return out


def check(seed: int, length: int, *, addresses: bool = False) -> None:
    program = make_program(seed, length, addresses=addresses)
    found = differences(run_python_target(program), run_unicorn(program), program)
    assert not found, f"seed {seed}, length {length}\n{listing(program)}\n" + "\n".join(found)


@pytest.mark.parametrize("first", range(0, 6 * BATCH, BATCH))
def test_random_programs(first: int) -> None:
    pytest.importorskip("unicorn")
    for seed in range(first, first + BATCH):
        check(seed, 1 + seed % 30)


@pytest.mark.parametrize("first", range(0, 3 * BATCH, BATCH))
def test_random_programs_with_every_form_of_address(first: int) -> None:
    pytest.importorskip("unicorn")
    for seed in range(first, first + BATCH):
        check(seed, 1 + seed % 30, addresses=True)


@pytest.mark.parametrize(("seed", "length"), FOUND_BY_ADDRESS)
def test_programs_with_addresses_that_failed_once(seed: int, length: int) -> None:
    pytest.importorskip("unicorn")
    check(seed, length, addresses=True)


@pytest.mark.parametrize(("seed", "length"), FOUND)
def test_programs_that_failed_once(seed: int, length: int) -> None:
    pytest.importorskip("unicorn")
    check(seed, length)


def test_a_short_budget_stops_at_the_block_head() -> None:
    """The region returns its entry, having done nothing, when the block does not fit into the budget."""
    program = make_program(1, 10)
    outcome = run_python_target(program, slice_budget=3)
    assert outcome.rip == 0x1000
    assert outcome.regs == program.regs
