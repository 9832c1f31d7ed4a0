"""The local APIC's timer: one-shot and periodic, on the machine's virtual clock (SDM 3A 10.5.4).

    load_time                                                due
    |   N   |  N-1  |  N-2  |   ...   |   1   |   0   |       interrupt; periodic: N again
     a tick is 2**count_shift ns: 1 GHz, divided by 1 to 128

One load counts N, N - 1, ... 0 and is due N + 1 ticks after it, as in QEMU. Nothing is counted step by step:
all follows from ``initial_count_load_time``, and a periodic timer is due at multiples of its period after
it, so it never drifts. ``timer_expiry`` is -1 while nothing is due.
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

    # -- registers ----------------------------------------------------------------------------

    def current_count(self) -> int:
        """The current-count register. A masked timer counts too; one whose initial count is 0 is stopped."""
        apic = self._apic
        elapsed = max(0, self._clock.now() - apic.initial_count_load_time) >> apic.count_shift
        if apic.lvt[0] & LVT_PERIODIC:
            return apic.initial_count - elapsed % (apic.initial_count + 1)
        return max(0, apic.initial_count - elapsed)

    def load(self, initial: int) -> None:
        """A write of the initial-count register: the count starts anew."""
        apic = self._apic
        apic.initial_count = initial
        apic.initial_count_load_time = self._clock.now()
        self.update(apic.initial_count_load_time)

    def set_divider(self, divide_conf: int) -> None:
        """A write of the divide configuration register: the count goes on from where it is at the new pace."""
        count = self.current_count()
        self._apic.divide_conf = divide_conf
        self._apic.count_shift = count_shift(divide_conf)
        self._go_on_from(count)

    def set_entry(self, entry: int) -> None:
        """A write of the timer's LVT entry. In another mode the count goes on from where it is, too."""
        apic = self._apic
        count = self.current_count()
        mode_changed = (apic.lvt[0] ^ entry) & LVT_PERIODIC
        apic.lvt[0] = entry
        if mode_changed:
            self._go_on_from(count)
        else:
            self.update(self._clock.now())

    def _go_on_from(self, count: int) -> None:
        """Let the register show ``count`` now, whatever mode and pace are now."""
        apic, now = self._apic, self._clock.now()
        if apic.initial_count:
            # A one-shot that is over must stay so: its last tick, which shows 0 as well, has passed.
            over = count == 0 and apic.timer_expiry < 0
            gone = apic.initial_count - count + over
            apic.initial_count_load_time = now - (gone << apic.count_shift)
        self.update(now)

    # -- when it is due -----------------------------------------------------------------------

    def update(self, now: int) -> None:
        """Work out when the timer fires next, seen from virtual time ``now``, and arm it.

        Periods that passed unserved are one interrupt, not many: an IRR bit cannot count.
        """
        apic = self._apic
        apic.timer_expiry = -1
        if apic.initial_count and not apic.lvt[0] & LVT_MASKED:
            load, period = apic.initial_count_load_time, (apic.initial_count + 1) << apic.count_shift
            if apic.lvt[0] & LVT_PERIODIC:
                apic.timer_expiry = load + ((now - load) // period + 1) * period
            elif now < load + period:
                apic.timer_expiry = load + period
            if apic.timer_expiry >= 0:
                apic.next_time = apic.timer_expiry
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
        if apic.lvt[0] & LVT_PERIODIC:
            self.update(max(apic.next_time, self._clock.now()))
        else:
            apic.timer_expiry = -1
