"""Stopping the guest so that it can go on as if nothing had been.

    take       the thread that runs the guest stands at a region edge, in an edge call of the machine;
               the clock is paused
    release    it leaves the edge call and goes on, with the limit and the waiters it had
    end        the run ends: the guest lives elsewhere

A stop and a new start would do for the guest, but not for whoever waits for the end of the run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pyvcpu.machine.machine import Machine

T = TypeVar("T")


class Hold:
    """The hold of one session on ``machine``'s guest."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._decided = threading.Event()
        self._end_status: str | None = None
        self._helper: threading.Thread | None = None
        self.taken = False
        self.was_running = False
        """The guest was running when the hold was taken."""

    def take(self) -> None:
        """Stop the guest; returns when it stands still. A guest that does not run is left as it is."""
        assert not self.taken
        machine = self._machine
        held = threading.Event()

        def hold() -> None:
            # Also called when the run has just ended by itself (shutdown, a limit): then there is nothing to hold.
            if threading.current_thread() is self._helper or machine.status != "running":
                held.set()
                return
            self.was_running = True
            machine.clock.pause()
            machine.status = "finish-migrate"
            held.set()
            self._wait_for_decision()
            if self._end_status is None:
                machine.status = "running"
                machine.clock.resume()
            else:
                machine.status = self._end_status
                machine.request_stop()

        if machine.running:
            self._helper = threading.Thread(target=machine.at_edge, args=(hold,), name="hold", daemon=True)
            self._helper.start()
            held.wait()
        self.taken = True

    def _wait_for_decision(self) -> None:
        while True:
            try:
                self._decided.wait()
                return
            except KeyboardInterrupt:
                # The guest must not move while its state is on its way; it stops when the hold has ended.
                self._machine.request_stop()

    def at_edge(self, function: Callable[[], T]) -> T:
        """``machine.at_edge``, or directly while the guest is held."""
        return function() if self.taken else self._machine.at_edge(function)

    def release(self) -> None:
        """Let the guest go on."""
        self._decided.set()
        self._join()

    def end(self, status: str) -> None:
        """The guest does not go on here; the machine is left in ``status``."""
        self._end_status = status
        self._decided.set()
        self._join()
        if self.was_running:
            self._machine.stop()
        self._machine.status = status

    def _join(self) -> None:
        self.taken = False
        if self._helper is not None:
            self._helper.join()
