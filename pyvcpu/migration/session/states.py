"""The states of a migration: QEMU's names, and every move between them.

    source        none -> setup -> active -> [pre-switchover] -> device -> completed
    destination   none -> setup -> active -> completed
    both          ... -> failed,   ... -> cancelling -> cancelled

``device`` begins when the guest stops. The hand-over lies inside it: before it a failure or a
cancel resumes the guest, after it ``cancelling`` is refused and ``failed`` leaves the guest
paused (``postmigrate``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Status = Literal[
    "none", "setup", "active", "pre-switchover", "device", "completed", "failed", "cancelling", "cancelled"
]

TRANSITIONS: dict[Status, tuple[Status, ...]] = {
    "none": ("setup",),
    "setup": ("active", "failed", "cancelling"),
    "active": ("pre-switchover", "device", "completed", "failed", "cancelling"),
    "pre-switchover": ("device", "failed", "cancelling"),
    "device": ("completed", "failed", "cancelling"),
    "cancelling": ("cancelled",),
    "cancelled": (),
    "completed": (),
    "failed": (),
}
"""From where to where. Only a destination goes from ``active`` straight to ``completed``."""

FINAL: frozenset[Status] = frozenset(status for status, after in TRANSITIONS.items() if not after)


class StateMachine:
    """Holds one status; ``listeners`` hear of every move as (old, new)."""

    def __init__(self) -> None:
        self.status: Status = "none"
        self.history: list[Status] = ["none"]
        self.listeners: list[Callable[[Status, Status], None]] = []

    def to(self, status: Status) -> None:
        """Move. A move that the table lacks is a bug of ours, never of a peer: AssertionError."""
        old = self.status
        if status not in TRANSITIONS[old]:
            raise AssertionError(f"no transition from {old} to {status}")
        self.status = status
        self.history.append(status)
        for listener in self.listeners:
            listener(old, status)

    @property
    def final(self) -> bool:
        return self.status in FINAL
