"""The APIC timer: what it counts, when it fires, and that it never drifts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvcpu.apic.local import LocalApic
from pyvcpu.apic.timer import LVT_MASKED, LVT_PERIODIC, count_shift
from pyvcpu.clock import NEVER, IcountClock

DIVIDERS = {0x0: 2, 0x1: 4, 0x2: 8, 0x3: 16, 0x8: 32, 0x9: 64, 0xA: 128, 0xB: 1}
LVT, INITIAL, CURRENT, DIVIDE, SVR = 0x320, 0x380, 0x390, 0x3E0, 0xF0
VECTOR = 0x40


class Bench:
    """A clock and an APIC that is on; ``fired`` notes when the timer's interrupt came."""

    def __init__(self, start: int = 0) -> None:
        self.clock = IcountClock()
        self.clock.set_now(start)
        self.apic = LocalApic(self.clock)
        self.write(SVR, 0x1FF)
        self.fired: list[int] = []

    def read(self, offset: int) -> int:
        return self.apic.read(offset, 4)

    def write(self, offset: int, value: int) -> None:
        self.apic.write(offset, 4, value)

    def advance(self, to: int) -> None:
        """Go to virtual time ``to``, taking each interrupt at its time, as the engine does."""
        while self.clock.next_deadline() <= to:
            self.clock.skip_to(self.clock.next_deadline())
            self.take()
        self.clock.skip_to(to)

    def take(self) -> None:
        self.clock.run_due()
        if self.apic.pending_vector() >= 0:
            assert self.apic.acknowledge() == VECTOR
            self.write(0xB0, 0)
            self.fired.append(self.clock.now())


@pytest.mark.parametrize(("divide", "divider"), DIVIDERS.items())
class TestEveryDivider:
    def test_shift(self, divide: int, divider: int) -> None:
        assert 1 << count_shift(divide) == divider

    def test_one_shot(self, divide: int, divider: int) -> None:
        bench = Bench(start=777)
        bench.write(DIVIDE, divide | 4)  # bit 2 does not exist
        assert bench.read(DIVIDE) == divide
        bench.write(LVT, VECTOR)
        bench.write(INITIAL, 10)
        seen = []
        for tick in range(13):
            bench.advance(777 + tick * divider)
            seen.append(bench.read(CURRENT))
        assert seen == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0]
        bench.advance(1_000_000)
        assert bench.fired == [777 + 11 * divider]
        assert bench.apic.timer_expiry == -1 and bench.clock.next_deadline() == NEVER

    def test_periodic(self, divide: int, divider: int) -> None:
        bench = Bench(start=777)
        bench.write(DIVIDE, divide)
        bench.write(LVT, VECTOR | LVT_PERIODIC)
        bench.write(INITIAL, 4)
        seen = []
        for tick in range(12):
            bench.advance(777 + tick * divider)
            seen.append(bench.read(CURRENT))
        assert seen == [4, 3, 2, 1, 0, 4, 3, 2, 1, 0, 4, 3]
        assert bench.fired == [777 + 5 * divider, 777 + 10 * divider]


class TestPeriodic:
    def test_does_not_drift_when_served_late(self) -> None:
        bench = Bench()
        bench.write(LVT, VECTOR | LVT_PERIODIC)
        bench.write(INITIAL, 49)  # 50 counts of 2 ns
        for late in range(1, 20):
            bench.clock.skip_to(100 * late + late)
            bench.take()
            assert bench.apic.timer_expiry == bench.apic.next_time == 100 * (late + 1)
        assert len(bench.fired) == 19

    def test_missed_periods_are_one_interrupt(self) -> None:
        bench = Bench()
        bench.write(LVT, VECTOR | LVT_PERIODIC)
        bench.write(INITIAL, 49)
        bench.clock.skip_to(1_000_000_000_050)  # ten thousand million periods: must not be walked through
        bench.take()
        bench.take()
        assert bench.fired == [1_000_000_000_050]
        assert bench.apic.timer_expiry == 1_000_000_000_100


class TestMasking:
    def test_a_masked_timer_counts_but_does_not_interrupt(self) -> None:
        bench = Bench()
        bench.write(INITIAL, 100)
        bench.advance(20)
        assert bench.read(CURRENT) == 90
        assert bench.clock.next_deadline() == NEVER
        bench.advance(10_000)
        assert bench.apic.irr == [0] * 8

    def test_unmasked_in_time_it_fires_at_its_time(self) -> None:
        bench = Bench()
        bench.write(INITIAL, 100)
        bench.advance(200)  # within the last tick, where the register shows 0
        assert bench.read(CURRENT) == 0
        bench.write(LVT, VECTOR)
        bench.advance(1000)
        assert bench.fired == [202]

    def test_unmasked_too_late_it_never_fires(self) -> None:
        bench = Bench()
        bench.write(INITIAL, 100)
        bench.advance(202)
        bench.write(LVT, VECTOR)
        bench.advance(10_000)
        assert bench.fired == []

    def test_masking_takes_back_what_is_not_due_yet(self) -> None:
        bench = Bench()
        bench.write(LVT, VECTOR | LVT_PERIODIC)
        bench.write(INITIAL, 49)
        bench.advance(150)
        bench.write(LVT, VECTOR | LVT_PERIODIC | LVT_MASKED)
        bench.advance(330)
        bench.write(LVT, VECTOR | LVT_PERIODIC)
        bench.advance(450)
        assert bench.fired == [100, 400]

    def test_software_disable_masks_it(self) -> None:
        bench = Bench()
        bench.write(LVT, VECTOR)
        bench.write(INITIAL, 49)
        bench.write(SVR, 0xFF)
        assert bench.read(LVT) == VECTOR | LVT_MASKED
        assert bench.clock.next_deadline() == NEVER


class TestChangesWhileItRuns:
    def test_count_zero_stops(self) -> None:
        bench = Bench()
        bench.write(LVT, VECTOR | LVT_PERIODIC)
        bench.write(INITIAL, 49)
        bench.write(INITIAL, 0)
        assert bench.read(CURRENT) == 0 and bench.clock.next_deadline() == NEVER

    def test_a_new_count_starts_anew(self) -> None:
        bench = Bench()
        bench.write(LVT, VECTOR)
        bench.write(INITIAL, 49)
        bench.advance(50)
        bench.write(INITIAL, 9)
        bench.advance(1000)
        assert bench.fired == [70]

    def test_another_divider_changes_the_pace_from_there_on(self) -> None:
        bench = Bench()
        bench.write(LVT, VECTOR)
        bench.write(INITIAL, 100)
        bench.advance(100)
        assert bench.read(CURRENT) == 50
        bench.write(DIVIDE, 0xB)
        assert bench.read(CURRENT) == 50
        bench.advance(110)
        assert bench.read(CURRENT) == 40
        bench.advance(1000)
        assert bench.fired == [151]

    def test_another_divider_does_not_revive_a_one_shot_that_fired(self) -> None:
        bench = Bench()
        bench.write(LVT, VECTOR)
        bench.write(INITIAL, 100)
        bench.advance(1000)
        for divide in (0xA, 0xB, 0x0):
            bench.write(DIVIDE, divide)
            assert bench.read(CURRENT) == 0
        bench.advance(1_000_000)
        assert bench.fired == [202]

    def test_from_periodic_to_one_shot_the_count_goes_on(self) -> None:
        bench = Bench()
        bench.write(LVT, VECTOR | LVT_PERIODIC)
        bench.write(INITIAL, 49)
        bench.advance(320)
        assert bench.read(CURRENT) == 39
        bench.write(LVT, VECTOR)
        assert bench.read(CURRENT) == 39
        bench.advance(10_000)
        assert bench.fired == [100, 200, 300, 400]


class TestLoad:
    """After a load of a stream, the expiry says when it fires and the load time what it shows."""

    def test_the_two_are_independent(self) -> None:
        bench = Bench()
        apic = bench.apic
        bench.clock.set_now(5000)
        apic.lvt[0], apic.initial_count, apic.count_shift = VECTOR, 1000, 1
        apic.initial_count_load_time, apic.timer_expiry, apic.next_time = 4000, 5100, 5100
        apic.post_load()
        assert bench.read(CURRENT) == 500
        bench.advance(10_000)
        assert bench.fired == [5100]

    def test_a_past_expiry_fires_at_once_and_minus_one_never(self) -> None:
        for expiry, fired in ((4000, [5000]), (-1, [])):
            bench = Bench()
            apic = bench.apic
            bench.clock.set_now(5000)
            apic.lvt[0], apic.initial_count = VECTOR, 1000
            apic.initial_count_load_time, apic.timer_expiry, apic.next_time = -7000, expiry, expiry
            apic.post_load()
            bench.take()
            bench.advance(10_000)
            assert bench.fired == fired

    @given(
        st.sampled_from(sorted(DIVIDERS)),
        st.integers(1, 500),
        st.booleans(),
        st.integers(0, 1 << 40),
        st.lists(st.integers(1, 20_000), max_size=8),
    )
    def test_moving_to_another_machine_changes_nothing(
        self, divide: int, count: int, periodic: bool, start: int, stops: list[int]
    ) -> None:
        """The same life, once in one APIC and once in a new one after every stop."""
        stay, move = Bench(start), Bench(start)
        for bench in (stay, move):
            bench.write(DIVIDE, divide)
            bench.write(LVT, VECTOR | (LVT_PERIODIC if periodic else 0))
            bench.write(INITIAL, count)
        now = start
        for step in stops:
            now += step
            stay.advance(now)
            move.advance(now)
            after = Bench(now)
            for name in ("lvt", "divide_conf", "count_shift", "initial_count", "initial_count_load_time", "next_time"):
                setattr(after.apic, name, getattr(move.apic, name))
            after.apic.timer_expiry = move.apic.timer_expiry
            after.apic.post_load()
            after.fired = move.fired
            move = after
            assert move.read(CURRENT) == stay.read(CURRENT)
            assert move.clock.next_deadline() == stay.clock.next_deadline()
        assert move.fired == stay.fired
