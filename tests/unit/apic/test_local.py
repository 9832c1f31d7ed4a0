"""The local APIC: registers, priorities, delivery, errors, enabling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvcpu.apic.local import DEFAULT_BASE, LVT_LINT1, LVT_PERF, LVT_TIMER, LocalApic
from pyvcpu.clock import IcountClock
from pyvcpu.errors import UnsupportedOperation

ID, VERSION, TPR, APR, PPR, EOI, RRD, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xC0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR_LOW, ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
TIMER, THERMAL, PERF, LINT0, LINT1, ERROR, INITIAL, CURRENT, DIVIDE = (
    0x320,
    0x330,
    0x340,
    0x350,
    0x360,
    0x370,
    0x380,
    0x390,
    0x3E0,
)
MASKED = 1 << 16
VECTORS = st.integers(16, 255)


class Apic(LocalApic):
    """With 32-bit accesses and a note of what it asks for."""

    def __init__(self, apic_id: int = 0, on: bool = True) -> None:
        super().__init__(IcountClock(), apic_id)
        self.events: list[object] = []
        self.on_nmi = lambda: self.events.append("nmi")
        self.on_eoi = lambda vector: self.events.append(("eoi", vector))
        self.on_move = lambda base, enabled: self.events.append((base, enabled))
        if on:
            self.set(SVR, 0x1FF)

    def get(self, offset: int) -> int:
        return self.read(offset, 4)

    def set(self, offset: int, value: int) -> None:
        self.write(offset, 4, value)

    def bits(self, offset: int) -> set[int]:
        return {32 * i + b for i in range(8) for b in range(32) if self.get(offset + 16 * i) >> b & 1}

    def errors(self) -> int:
        self.set(ESR, 0)
        return self.get(ESR)


class TestRegisters:
    def test_after_reset(self) -> None:
        apic = Apic(apic_id=3, on=False)
        expected = {ID: 3 << 24, VERSION: 0x50014, TPR: 0, APR: 0, PPR: 0, LDR: 0, DFR: 0xFFFFFFFF, SVR: 0xFF, ESR: 0,
                    ICR_LOW: 0, ICR_HIGH: 0, INITIAL: 0, CURRENT: 0, DIVIDE: 0}  # fmt: skip
        assert {offset: apic.get(offset) for offset in expected} == expected
        assert [apic.get(offset) for offset in range(TIMER, ERROR + 1, 16)] == [MASKED] * 6
        assert apic.bits(ISR) == apic.bits(TMR) == apic.bits(IRR) == set()
        assert apic.get_base() == 0xFEE00900 and not apic.enabled

    @pytest.mark.parametrize(
        ("offset", "kept"),
        [(ID, 0xFF000000), (TPR, 0xFF), (LDR, 0xFF000000), (SVR, 0x1FF), (ICR_HIGH, 0xFF000000), (DIVIDE, 0xB),
         (TIMER, 0x300FF | MASKED), (THERMAL, 0x107FF), (PERF, 0x107FF), (LINT0, 0x1A7FF), (LINT1, 0x1A7FF),
         (ERROR, 0x100FF)],
    )  # fmt: skip
    def test_reserved_and_read_only_bits_stay_zero(self, offset: int, kept: int) -> None:
        apic = Apic()
        apic.set(offset, 0xFFFFFFFF)
        assert apic.get(offset) == kept
        apic.set(SVR, 0x1FF)
        apic.set(offset, 0)
        assert apic.get(offset) == 0

    def test_dfr(self) -> None:
        apic = Apic()
        apic.set(DFR, 0)
        assert apic.get(DFR) == 0x0FFFFFFF

    def test_read_only_registers(self) -> None:
        apic = Apic()
        apic.raise_vector(0x31)
        for offset in (VERSION, APR, PPR, RRD, CURRENT, *range(ISR, ESR, 16)):
            before = apic.get(offset)
            apic.set(offset, 0x12345678)
            assert apic.get(offset) == before
        assert apic.errors() == 0

    @pytest.mark.parametrize("size", [1, 2, 8])
    def test_other_sizes_do_nothing(self, size: int) -> None:
        apic = Apic()
        apic.set(TPR, 0x55)
        assert apic.read(TPR, size) == 0
        apic.write(TPR, size, 0xAA)
        assert apic.get(TPR) == 0x55

    def test_a_register_answers_in_all_its_16_bytes(self) -> None:
        apic = Apic()
        assert apic.get(VERSION + 4) == apic.get(VERSION + 12) == 0x50014


class TestPriorities:
    @given(st.sets(VECTORS), st.integers(0, 255), VECTORS | st.none())
    def test_delivery_follows_the_manual(self, pending: set[int], tpr: int, serving: int | None) -> None:
        """SDM 3A 10.8.3: the highest of IRR goes first, if its class is above TPR's and that of what is in service."""
        apic = Apic()
        if serving is not None:
            apic.raise_vector(serving)
            assert apic.acknowledge() == serving
        apic.set(TPR, tpr)
        for vector in pending:
            apic.raise_vector(vector)
        floor = max(tpr >> 4, (serving or 0) >> 4)
        assert apic.get(PPR) >> 4 == floor
        assert apic.get(PPR) & 0xF == (tpr & 0xF if tpr >> 4 == floor else 0)
        expected = max((v for v in pending if v >> 4 > floor), default=-1)
        assert apic.pending_vector() == expected
        assert apic.bits(IRR) == pending
        if expected >= 0:
            assert apic.acknowledge() == expected
            assert apic.bits(IRR) == pending - {expected}
            assert apic.bits(ISR) == {expected} | ({serving} if serving else set())

    @given(st.lists(VECTORS, min_size=1))
    def test_everything_comes_once_and_ends(self, vectors: list[int]) -> None:
        apic, served = Apic(), []
        for vector in vectors:
            apic.raise_vector(vector)
        while (vector := apic.pending_vector()) >= 0:
            assert apic.acknowledge() == vector
            served.append(vector)
            apic.set(EOI, 0)
        assert served == sorted(set(vectors), reverse=True)
        assert apic.bits(ISR) == apic.bits(IRR) == set()

    def test_nested(self) -> None:
        apic = Apic()
        for vector in (0x31, 0x52, 0x91):
            apic.raise_vector(vector)
            assert apic.acknowledge() == vector
        apic.raise_vector(0x95)  # of the same class as what is in service
        assert apic.pending_vector() == -1
        apic.set(EOI, 0)
        assert apic.bits(ISR) == {0x31, 0x52}
        assert apic.acknowledge() == 0x95

    def test_an_interrupt_in_service_can_be_pending_again(self) -> None:
        apic = Apic()
        for _ in range(3):
            apic.raise_vector(0x40)
        assert apic.acknowledge() == 0x40
        apic.raise_vector(0x40)
        assert apic.bits(IRR) == apic.bits(ISR) == {0x40}
        apic.set(EOI, 0)
        assert apic.acknowledge() == 0x40
        apic.set(EOI, 0)
        assert apic.pending_vector() == -1

    def test_spurious_vector_when_tpr_rises_in_between(self) -> None:
        """SDM 3A 10.9: nothing is in service afterwards, so no EOI."""
        apic = Apic()
        apic.set(SVR, 0x1EF)
        apic.raise_vector(0x40)
        assert apic.pending_vector() == 0x40
        apic.set(TPR, 0x40)
        assert apic.acknowledge() == 0xEF
        assert apic.bits(ISR) == set() and apic.bits(IRR) == {0x40}

    def test_cr8_is_the_class_of_tpr(self) -> None:
        apic = Apic()
        apic.set(TPR, 0x57)
        assert apic.get_cr8() == 5
        apic.set_cr8(0xA)
        assert apic.get(TPR) == 0xA0

    def test_eoi_with_nothing_in_service(self) -> None:
        apic = Apic()
        apic.set(EOI, 0)
        assert apic.events == []

    def test_level_triggered_interrupts_report_their_end(self) -> None:
        apic = Apic()
        apic.raise_vector(0x50, level=True)
        assert apic.bits(TMR) == {0x50}
        apic.acknowledge()
        apic.set(EOI, 0)
        apic.raise_vector(0x50)
        assert apic.bits(TMR) == set()
        apic.acknowledge()
        apic.set(EOI, 0)
        assert apic.events == [("eoi", 0x50)]


class TestIpi:
    """ICR (SDM 3A 10.6): what reaches the processor itself arrives, the rest reaches nobody."""

    @pytest.mark.parametrize(
        ("low", "high", "arrives"),
        [
            (0x40000, 0, True),  # shorthand: self
            (0x80000, 0, True),  # all including self
            (0xC0000, 0, False),  # all excluding self
            (0, 3 << 24, True),  # physical
            (0, 2 << 24, False),
            (0, 0xFF << 24, True),  # broadcast
            (0x800, 0x08 << 24, True),  # logical, flat: bit 3 is ours
            (0x800, 0x0C << 24, True),
            (0x800, 0x04 << 24, False),
            (0x800, 0xFF << 24, True),
            (0x100, 3 << 24, True),  # lowest priority, of one
            (0x4000, 3 << 24, True),  # level assert
        ],
    )
    def test_destination(self, low: int, high: int, arrives: bool) -> None:
        apic = Apic(apic_id=3)
        apic.set(LDR, 0x08 << 24)
        apic.set(ICR_HIGH, high)
        apic.set(ICR_LOW, low | 0x61)
        assert apic.bits(IRR) == ({0x61} if arrives else set())
        assert apic.get(ICR_LOW) == low | 0x61  # delivery status is idle
        assert apic.errors() == 0

    @pytest.mark.parametrize(("destination", "arrives"), [(0x32, True), (0x3F, True), (0x22, False), (0x3D, False)])
    def test_logical_cluster(self, destination: int, arrives: bool) -> None:
        apic = Apic()
        apic.set(DFR, 0)
        apic.set(LDR, 0x32 << 24)
        apic.set(ICR_HIGH, destination << 24)
        apic.set(ICR_LOW, 0x861)
        assert (apic.pending_vector() == 0x61) == arrives

    def test_nmi(self) -> None:
        apic = Apic()
        apic.set(ICR_LOW, 0x40400)
        assert apic.events == ["nmi"]

    @pytest.mark.parametrize("low", [0x40200, 0x40500, 0x84500])
    def test_smi_and_init_to_the_only_processor_are_refused_by_name(self, low: int) -> None:
        with pytest.raises(UnsupportedOperation, match=r"SMI|INIT"):
            Apic().set(ICR_LOW, low)

    @pytest.mark.parametrize("low", [0xC4500, 0xC0600, 0x88500, 0x40600])
    def test_the_start_of_other_processors_goes_nowhere(self, low: int) -> None:
        apic = Apic()
        apic.set(ICR_LOW, low | 0x10)
        assert apic.events == [] and apic.bits(IRR) == set()


class TestLocalInterrupts:
    def test_masked(self) -> None:
        apic = Apic()
        apic.set(TIMER, MASKED | 0x40)
        apic.local_interrupt(LVT_TIMER)
        assert apic.bits(IRR) == set()
        apic.set(TIMER, 0x40)
        apic.local_interrupt(LVT_TIMER)
        assert apic.bits(IRR) == {0x40}

    def test_nmi_by_lint1_and_performance_counter(self) -> None:
        apic = Apic()
        apic.set(LINT1, 0x400)
        apic.set(PERF, 0x400)
        apic.local_interrupt(LVT_LINT1)
        apic.local_interrupt(LVT_PERF)
        assert apic.events == ["nmi", "nmi"] and apic.bits(IRR) == set()


class TestErrors:
    def test_a_register_that_is_not_there(self) -> None:
        apic = Apic()
        assert apic.get(0x2F0) == 0  # LVT CMCI: not with 6 LVT entries
        assert apic.get(ESR) == 0  # not before it is written
        assert apic.errors() == 0x80
        assert apic.errors() == 0
        apic.set(0x40, 1)
        assert apic.errors() == 0x80

    @pytest.mark.parametrize("vector", [0, 15])
    def test_illegal_vectors(self, vector: int) -> None:
        apic = Apic()
        apic.set(ICR_LOW, 0xC0000 | vector)
        assert apic.errors() == 0x20
        apic.set(ICR_LOW, 0x40000 | vector)
        assert apic.errors() == 0x60
        apic.set(TIMER, vector)
        apic.local_interrupt(LVT_TIMER)
        assert apic.errors() == 0x40
        assert apic.bits(IRR) == set()

    def test_the_error_interrupt_comes_once_until_esr_is_written(self) -> None:
        apic = Apic()
        apic.set(ERROR, 0x77)
        apic.get(0x40)
        assert apic.acknowledge() == 0x77
        apic.set(EOI, 0)
        apic.get(0x40)
        assert apic.pending_vector() == -1
        apic.set(ESR, 0)
        apic.get(0x40)
        assert apic.pending_vector() == 0x77

    def test_an_illegal_error_vector_does_not_feed_itself(self) -> None:
        apic = Apic()
        apic.set(ERROR, 5)
        apic.get(0x40)
        assert apic.errors() == 0xC0


class TestEnabling:
    def test_disabled_by_software_it_holds_what_is_pending_and_takes_nothing_new(self) -> None:
        """SDM 3A 10.4.7.2."""
        apic = Apic()
        apic.set(LINT0, 0x20)
        apic.raise_vector(0x40)
        apic.raise_vector(0x30)
        assert apic.acknowledge() == 0x40
        apic.set(SVR, 0xFF)
        assert apic.pending_vector() == -1 and apic.acknowledge() == 0xFF
        apic.raise_vector(0x60)
        apic.set(LINT0, 0x20)
        assert apic.get(LINT0) == MASKED | 0x20
        assert apic.bits(IRR) == {0x30} and apic.bits(ISR) == {0x40}
        apic.set(SVR, 0x1FF)
        apic.set(EOI, 0)
        assert apic.acknowledge() == 0x30
        assert apic.get(LINT0) == MASKED | 0x20  # enabling does not unmask

    def test_nmis_come_through(self) -> None:
        apic = Apic(on=False)
        apic.set(ICR_LOW, 0x40400)
        assert apic.events == ["nmi"]

    def test_moving_the_page(self) -> None:
        apic = Apic()
        apic.set_base(0xD0000000 | 0x900)
        assert apic.events == [(0xD0000000, True)]
        assert apic.get_base() == 0xD0000900 and apic.enabled
        apic.set_base(0xD0000900)
        assert len(apic.events) == 1

    def test_switched_off_and_on_it_is_as_after_reset(self) -> None:
        apic = Apic()
        apic.set(TPR, 0x20)
        apic.raise_vector(0x40)
        apic.set_base(DEFAULT_BASE)
        assert apic.events == [(DEFAULT_BASE, False)] and not apic.enabled
        assert apic.get_base() == DEFAULT_BASE | 0x100  # the BSP flag is not the guest's to clear
        apic.raise_vector(0x50)
        apic.set_base(DEFAULT_BASE | 0x800)
        assert apic.events[1:] == [(DEFAULT_BASE, True)]
        assert apic.get(TPR) == 0 and apic.get(SVR) == 0xFF and apic.bits(IRR) == set()

    @pytest.mark.parametrize("value", [0xFEE00901, 0xFEE00B00, 0xFEE00D00, 1 << 40 | 0x800])
    def test_reserved_bits_and_x2apic(self, value: int) -> None:
        apic = Apic()
        with pytest.raises(ValueError, match="reserved"):
            apic.set_base(value)
        assert apic.get_base() == 0xFEE00900 and apic.events == []

    def test_above_4_gib_is_refused_by_name(self) -> None:
        with pytest.raises(UnsupportedOperation, match="4 GiB"):
            Apic().set_base(0x1_0000_0900)

    def test_reset(self) -> None:
        apic = Apic(apic_id=2)
        fresh = {
            k: v for k, v in vars(Apic(apic_id=2, on=False)).items() if isinstance(v, int | list) and k != "events"
        }
        apic.set_base(0xD0000900)
        for offset in range(0, 0x400, 16):
            if offset != ICR_LOW:
                apic.set(offset, 0x31)
        apic.raise_vector(0x40, level=True)
        apic.raise_vector(0x55)
        apic.acknowledge()
        apic.reset()
        assert {name: getattr(apic, name) for name in fresh} == fresh
        assert apic.events[-1] == (DEFAULT_BASE, True)
        assert apic.clock.next_deadline() == (1 << 63) - 1
