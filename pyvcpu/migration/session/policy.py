"""What the operator may set, how fast a source sends, and when it stops the guest."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from pyvcpu.errors import ConfigurationError

DEFAULT_MAX_BANDWIDTH = 128 << 20
"""Bytes a second; QEMU's default."""
DEFAULT_DOWNTIME_LIMIT = 300
"""Milliseconds; QEMU's default."""
WINDOW = 0.1
"""Seconds over which the bandwidth is limited and measured; QEMU's window."""

NEGLIGIBLE_MS = 2.0
"""An expected transfer time that no further pass is worth."""


@dataclass
class MigrationParameters:
    """QEMU's parameters and capabilities, by QEMU's names, and a few of ours.

    ``max_bandwidth`` and ``downtime_limit`` may be changed while a migration runs.
    """

    max_bandwidth: int | None = DEFAULT_MAX_BANDWIDTH  # bytes/s; 0 or None: unlimited
    downtime_limit: int = DEFAULT_DOWNTIME_LIMIT  # ms
    pause_before_switchover: bool = False
    profile: str = "pyvcpu"  # what the other end understands
    return_path: bool | None = None  # None: where the channel allows it
    checksums: bool = True  # source: in the trailer
    require_checksums: bool = False  # destination: refuse a stream without
    handshake_timeout: float = 10.0  # s until the other end must have answered the first PING
    ready_timeout: float = 60.0  # s that the stopped guest waits for READY before it resumes here
    hand_over_timeout: float = 60.0  # s until SHUT must have come after EOF
    max_iterations: int | None = None  # stop the guest after so many passes, converged or not

    def validate(self) -> None:
        """Raises ConfigurationError."""
        if self.max_bandwidth is not None and self.max_bandwidth < 0:
            raise ConfigurationError(f"max-bandwidth must not be negative, got {self.max_bandwidth}")
        if not 0 <= self.downtime_limit <= 2_000_000:
            raise ConfigurationError(f"downtime-limit must be 0 to 2000000 ms, got {self.downtime_limit}")
        if self.max_iterations is not None and self.max_iterations < 1:
            raise ConfigurationError(f"max-iterations must be at least 1, got {self.max_iterations}")


class RateLimit:
    """How long to pause so that no more than ``max_bandwidth`` flows."""

    def __init__(self, parameters: MigrationParameters) -> None:
        self._parameters = parameters
        self._free_at = time.monotonic()

    def sent(self, count: int) -> float:
        """``count`` bytes have gone; returns the seconds to wait before the next.

        What a slow guest or channel left unused is not saved up beyond one window.
        """
        limit = self._parameters.max_bandwidth
        now = time.monotonic()
        if not limit:
            self._free_at = now
            return 0.0
        self._free_at = max(self._free_at, now - WINDOW) + count / limit
        return max(0.0, self._free_at - now)


class Bandwidth:
    """The measured speed, over the last few windows, of pages on the wire (pauses included, waits for others not)."""

    def __init__(self) -> None:
        self._samples: deque[tuple[int, float]] = deque()
        self._bytes = 0
        self._seconds = 0.0

    def sent(self, count: int, seconds: float) -> None:
        """``count`` bytes took ``seconds``."""
        self._samples.append((count, seconds))
        self._bytes += count
        self._seconds += seconds
        while len(self._samples) > 1 and self._seconds - self._samples[0][1] > 2 * WINDOW:
            old_bytes, old_seconds = self._samples.popleft()
            self._bytes -= old_bytes
            self._seconds -= old_seconds

    def estimate(self) -> float:
        """Bytes a second; 0 before anything was sent."""
        return self._bytes / max(self._seconds, 1e-6)


def expected_downtime(pending_bytes: int, bandwidth: float) -> float:
    """Milliseconds that ``pending_bytes`` take at ``bandwidth`` bytes a second."""
    return pending_bytes * 1000 / max(bandwidth, 1.0)


def should_stop(to_send: int, before: int, expected_ms: float, parameters: MigrationParameters) -> bool:
    """Whether to stop the guest now: ``to_send`` pages are dirty, the pass before had ``before``.

    The downtime limit is a limit, not a budget to be used up: while a pass at least halves what is
    dirty, another one shortens the downtime, and the guest is not stopped yet unless what is left is negligible.
    """
    if expected_ms > parameters.downtime_limit:
        return False
    return to_send == 0 or expected_ms <= NEGLIGIBLE_MS or 2 * to_send >= before
