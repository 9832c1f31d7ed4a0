"""The local APIC's timer: one-shot and periodic, on the machine's virtual clock (SDM 3A 10.5.4).

    frequency   1 GHz / 2^count_shift: one count is 2^count_shift ns, as in QEMU
    one-shot    fires (initial + 1) counts after the load
    periodic    fires at every multiple of (initial + 1) counts after the load: it never drifts

Everything follows from ``initial_count_load_time``; ``timer_expiry`` is -1 while nothing is due.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyvcpu.clock import Clock

if TYPE_CHECKING:
    from pyvcpu.apic.local import LocalApic

LVT_MASKED, LVT_PERIODIC = 1 << 16, 1 << 17


def count_shift(divide_conf: int) -> int:
    """log2 of the divider that the divide configuration register asks for (SDM 3A, figure 10-10)."""
    value = (divide_conf & 3) | (divide_conf >> 1 & 4)
    return (value + 1) & 7


class ApicTimer:
    """Drives one LocalApic's timer fields, which stay in the APIC: they are its wire state."""

    def __init__(self, apic: LocalApic, clock: Clock) -> None:
        self._apic, self._clock = apic, clock
        self._timer = clock.timer(self._fired, "apic")

    def load(self, initial: int) -> None:
        """A write of the initial-count register: the count starts anew."""
        apic = self._apic
        apic.initial_count = initial
        apic.initial_count_load_time = self._clock.now()
        self.update(apic.initial_count_load_time)

    def current_count(self) -> int:
        """The current-count register."""
        apic = self._apic
        elapsed = (self._clock.now() - apic.initial_count_load_time) >> apic.count_shift
        if apic.lvt[0] & LVT_PERIODIC:
            return apic.initial_count - elapsed % (apic.initial_count + 1)
        return max(0, apic.initial_count - elapsed)

    def update(self, now: int) -> None:
        """Work out when the timer fires next, seen from virtual time ``now``, and arm it."""
        apic = self._apic
        apic.timer_expiry = -1
        if not apic.lvt[0] & LVT_MASKED:
            elapsed = (now - apic.initial_count_load_time) >> apic.count_shift
            period = apic.initial_count + 1
            if apic.lvt[0] & LVT_PERIODIC:
                counts = (elapsed // period + 1) * period if apic.initial_count else 0
            else:
                counts = period if elapsed < apic.initial_count else 0
            if counts:
                apic.next_time = apic.timer_expiry = apic.initial_count_load_time + (counts << apic.count_shift)
        self.rearm()

    def rearm(self) -> None:
        """Arm the clock from ``timer_expiry``, as after a load."""
        if self._apic.timer_expiry >= 0:
            self._timer.arm(self._apic.timer_expiry)
        else:
            self._timer.cancel()

    def _fired(self) -> None:
        apic = self._apic
        apic.local_interrupt(0)
        # Periods that passed unserved (a paused guest on the host clock) are one interrupt, not many.
        self.update(max(apic.next_time, self._clock.now()))
