"""Guest time: one clock feeds the TSC, the LAPIC timer and every other timed device.

    icount   now = instructions retired + nanoseconds skipped     (1 instruction = 1 ns = 1 TSC tick)
    host     now = host monotonic time while running, frozen while stopped

Both count retired instructions (``instructions``): the engine writes it at every point where
anybody else may look. Devices ask for a :class:`Timer`; the engine never runs past
``next_deadline()`` on the icount clock, so an event due at count *n* is taken before
instruction *n + 1*.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pyvcpu.errors import ConfigurationError

NEVER = (1 << 63) - 1
"""The deadline of a timer that is not armed, in nanoseconds."""


class Timer:
    """A one-shot alarm on a clock's virtual time; ``expiry`` is -1 while it is off."""

    __slots__ = ("_clock", "callback", "expiry", "name")

    def __init__(self, clock: Clock, callback: Callable[[], None], name: str) -> None:
        self._clock, self.callback, self.name = clock, callback, name
        self.expiry = -1

    def arm(self, expiry: int) -> None:
        """Fire once at virtual time ``expiry`` (ns); a time already past fires at the next check."""
        self.expiry = expiry
        self._clock.deadlines_changed()

    def cancel(self) -> None:
        self.expiry = -1
        self._clock.deadlines_changed()


class Clock:
    """What both clocks share: the timers and the count of retired instructions."""

    name = "abstract"
    deterministic = False

    def __init__(self) -> None:
        self.instructions = 0
        self._timers: list[Timer] = []
        self._deadline = NEVER

    def now(self) -> int:
        """Virtual time in nanoseconds."""
        raise NotImplementedError

    def resume(self) -> None:
        """The guest is about to run."""

    def pause(self) -> None:
        """The guest has stopped: virtual time stands still until :meth:`resume`."""

    def set_now(self, now: int) -> None:
        """Set virtual time (ns), as after a load; the clock must be paused."""
        raise NotImplementedError

    def timer(self, callback: Callable[[], None], name: str = "") -> Timer:
        """A new timer, off. Timers due at the same time fire in the order they were made."""
        timer = Timer(self, callback, name)
        self._timers.append(timer)
        return timer

    def deadlines_changed(self) -> None:
        self._deadline = min((t.expiry for t in self._timers if t.expiry >= 0), default=NEVER)

    def next_deadline(self) -> int:
        """Virtual time of the earliest armed timer, or ``NEVER``."""
        return self._deadline

    def run_due(self) -> None:
        """Fire every timer whose time has come, earliest first; callbacks may arm again."""
        now = self.now()
        while self._deadline <= now:
            due = min((t for t in self._timers if t.expiry >= 0), key=lambda t: t.expiry)
            due.cancel()
            due.callback()


class IcountClock(Clock):
    """Deterministic time: the guest's own progress is the clock."""

    name = "icount"
    deterministic = True

    def __init__(self) -> None:
        super().__init__()
        self.skipped = 0

    def now(self) -> int:
        return self.instructions + self.skipped

    def set_now(self, now: int) -> None:
        self.skipped = now - self.instructions

    def skip_to(self, deadline: int) -> None:
        """In HLT: jump to ``deadline`` (ns). Time never goes backwards."""
        self.skipped += max(0, deadline - self.now())


class HostClock(Clock):
    """The host's monotonic time, less the time spent stopped."""

    name = "host"

    def __init__(self) -> None:
        super().__init__()
        self._base = 0
        self._started_at: int | None = None

    def now(self) -> int:
        if self._started_at is None:
            return self._base
        return self._base + time.monotonic_ns() - self._started_at

    def set_now(self, now: int) -> None:
        self._base = now
        if self._started_at is not None:
            self._started_at = time.monotonic_ns()

    def resume(self) -> None:
        if self._started_at is None:
            self._started_at = time.monotonic_ns()

    def pause(self) -> None:
        self._base = self.now()
        self._started_at = None


def make_clock(name: str) -> IcountClock | HostClock:
    """``"icount"`` or ``"host"``; ConfigurationError for anything else."""
    if name == "icount":
        return IcountClock()
    if name == "host":
        return HostClock()
    raise ConfigurationError(f"--clock {name}: there is icount and host")
