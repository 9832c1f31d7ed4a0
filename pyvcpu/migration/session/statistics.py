"""What a migration measured, in the words of QEMU's ``query-migrate``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

DOWNTIME_PARTS = ("stop", "synchronise", "ram", "device-state", "ready", "hand-over")
"""The parts of the source's downtime, in the order in which they happen.

stop: until the vCPU stands still; synchronise: engine -> CpuState; ram: the last dirty pages;
device-state: encoding and sending the sections; ready: until the destination has loaded and
confirmed everything; hand-over: from the first byte of EOF until the destination says that it runs."""


@dataclass
class Iteration:
    """One pass over the pages that were dirty when it began."""

    number: int
    pages: int = 0  # sent whole
    zero_pages: int = 0  # sent as a fill byte
    remaining: int = 0  # dirty when the pass ended
    bytes: int = 0  # on the wire
    ms: float = 0.0
    stopped: bool = False  # the pass with the guest stopped

    def to_dict(self) -> dict[str, Any]:
        return {
            "iteration": self.number,
            "pages": self.pages,
            "zero-pages": self.zero_pages,
            "remaining-pages": self.remaining,
            "bytes": self.bytes,
            "ms": round(self.ms, 3),
            "guest-stopped": self.stopped,
        }


@dataclass
class Statistics:
    """Filled in by a session as it goes; times in milliseconds."""

    page_size: int = 4096
    total_pages: int = 0
    iterations: list[Iteration] = field(default_factory=list)
    setup_time_ms: float = 0.0
    total_time_ms: float = 0.0
    downtime_ms: float | None = None
    downtime_parts: dict[str, float] = field(default_factory=dict)
    expected_downtime_ms: float | None = None
    transferred: int = 0
    received: int = 0
    dirty_sync_count: int = 0
    mbps: float = 0.0
    dirty_pages_rate: float = 0.0

    def begin(self) -> None:
        self.started = time.monotonic()

    def elapsed_ms(self) -> float:
        return (time.monotonic() - self.started) * 1000

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time one part of the downtime; parts of the same name add up."""
        assert name in DOWNTIME_PARTS
        start = time.monotonic()
        try:
            yield
        finally:
            self.downtime_parts[name] = self.downtime_parts.get(name, 0.0) + (time.monotonic() - start) * 1000

    @property
    def normal(self) -> int:
        """Pages sent whole."""
        return sum(i.pages for i in self.iterations)

    @property
    def duplicate(self) -> int:
        """Pages sent as a fill byte."""
        return sum(i.zero_pages for i in self.iterations)

    @property
    def remaining_pages(self) -> int:
        return self.iterations[-1].remaining if self.iterations else self.total_pages

    def to_dict(self) -> dict[str, Any]:
        """As JSON: QEMU's names where QEMU has the number, ours for the rest."""
        result: dict[str, Any] = {
            "total_time_ms": round(self.total_time_ms, 3),
            "setup_time_ms": round(self.setup_time_ms, 3),
            "downtime_ms": None if self.downtime_ms is None else round(self.downtime_ms, 3),
            "downtime": {name: round(self.downtime_parts.get(name, 0.0), 3) for name in DOWNTIME_PARTS},
            "expected_downtime_ms": None if self.expected_downtime_ms is None else round(self.expected_downtime_ms, 3),
            "ram": {
                "transferred": self.transferred,
                "remaining": self.remaining_pages * self.page_size,
                "total": self.total_pages * self.page_size,
                "duplicate": self.duplicate,
                "normal": self.normal,
                "normal-bytes": self.normal * self.page_size,
                "dirty-pages-rate": round(self.dirty_pages_rate),
                "dirty-sync-count": self.dirty_sync_count,
                "mbps": round(self.mbps, 3),
                "page-size": self.page_size,
            },
            "iterations": [i.to_dict() for i in self.iterations],
        }
        return result
