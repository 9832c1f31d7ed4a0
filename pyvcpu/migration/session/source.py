"""The sending end of a migration.

    setup            header, configuration, return path, handshake, RAM's START
    active           passes over dirty pages while the guest runs, until the rest fits the downtime
    pre-switchover   (asked for) waits for the operator
    device           the guest stops: engine -> CpuState, last pages, END, device sections,
                     READY = the PONG to a PING with the CRC of everything so far
                     ---- hand-over: the first byte of EOF ----
                     VMDESC, then SHUT 0 from the destination
    completed        the guest lives over there; this one is ``postmigrate``

Before the hand-over, whatever happens (an error here or there, a cut, a cancel), the guest
resumes here as if nothing had been. After it this side never resumes by itself: without SHUT 0 it
stays paused until an operator says ``cont``. So at most one guest runs.

A session is a step machine: :meth:`SourceSession.steps` does the work between yields and may be
driven by hand, one thread for everything; :meth:`SourceSession.run` drives it and waits where a
step asks for it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING

from pyvcpu.errors import ChannelError, MigrationError
from pyvcpu.migration.channel import Channel
from pyvcpu.migration.channel.base import Data
from pyvcpu.migration.ram.iterative import Batch, IterativeSource
from pyvcpu.migration.ram.precopy import BATCH_PAGES, PAGE_RECORD, RamSource
from pyvcpu.migration.session.handshake import MAGIC, Hello, check_hello, describe_machine
from pyvcpu.migration.session.hold import Hold
from pyvcpu.migration.session.policy import (
    WINDOW,
    Bandwidth,
    MigrationParameters,
    RateLimit,
    expected_downtime,
    should_stop,
)
from pyvcpu.migration.session.replies import ReturnPath
from pyvcpu.migration.session.states import StateMachine, Status
from pyvcpu.migration.session.statistics import Iteration, Statistics
from pyvcpu.migration.session.step import Step
from pyvcpu.migration.session.trace import Trace, trace_save, trace_section
from pyvcpu.migration.vmstate.description import SaveContext
from pyvcpu.migration.wire.profile import target_profile
from pyvcpu.migration.wire.writer import StreamWriter

if TYPE_CHECKING:
    from pyvcpu.machine.machine import Machine


class MigrationCancelled(MigrationError):
    """Somebody called ``cancel()``."""


class HandOverUnconfirmed(MigrationError):
    """EOF went out and SHUT 0 did not come back: the destination may run, so this guest stays paused."""


SWITCH_INTERVAL = 0.0005
"""Seconds; Python's default is 0.005."""


@contextlib.contextmanager
def _brisk_switching() -> Iterator[None]:
    """Let the interpreter lock change hands sooner while a guest and its migration share it.

    Every system call and array operation gives the lock away, and a busy vCPU gives it back only after
    this interval: at the default a stop takes two of them, and so does every batch.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_INTERVAL))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class SourceSession:
    """One outgoing migration of ``machine`` over ``channel``.

    ``live`` says whether the guest is to be treated as running (None: ask the machine); a caller that drives
    both the guest and :meth:`steps` from one thread sets it. ``runstate`` is what the destination will read in
    globalstate (None: the guest's). ``handlers`` are the iterative sections (None: RAM). ``trace_sync`` gets one
    line for every step of both synchronisations.
    """

    def __init__(
        self,
        machine: Machine,
        channel: Channel,
        parameters: MigrationParameters | None = None,
        *,
        live: bool | None = None,
        runstate: str | None = None,
        handlers: Sequence[IterativeSource] | None = None,
        trace_sync: Trace = None,
    ) -> None:
        self.machine, self.channel = machine, channel
        self.parameters = parameters or MigrationParameters()
        self.parameters.validate()
        self.states = StateMachine()
        self.statistics = Statistics()
        self.error: MigrationError | None = None
        self.peer: Hello | None = None
        """The pyvcpu at the other end, once it has said who it is."""
        self.handed_over = False
        self._live, self._trace = live, trace_sync
        self._runstate = runstate or ("running" if live else None)
        self._profile = target_profile(self.parameters.profile)
        self._hold = Hold(machine)
        self._handlers = [RamSource(machine.ram, self._hold.at_edge)] if handlers is None else list(handlers)
        two_ways = channel.duplex if self.parameters.return_path is None else self.parameters.return_path
        self._return_path = ReturnPath(channel) if two_ways else None
        # With a return path the READY check covers every byte; a sum for each page is for streams at rest.
        self._writer = StreamWriter(check_pages=self.parameters.checksums and not two_ways)
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._continued = threading.Event()
        self._thread: threading.Thread | None = None

    # -- for everyone else

    @property
    def status(self) -> Status:
        return self.states.status

    def cancel(self) -> bool:
        """Give up, from any thread: the guest resumes here. False when it is too late (handed over, or ended)."""
        with self._lock:
            if self.handed_over or self.states.final:
                return False
            if not self._cancelled.is_set():
                self._cancelled.set()
                if self.states.status != "none":
                    self.states.to("cancelling")
        self._continued.set()
        self.channel.close()
        return True

    def switch_over(self) -> None:
        """Leave ``pre-switchover`` (QEMU's ``migrate-continue``)."""
        self._continued.set()

    def run(self, on_step: Callable[[Step], None] | None = None) -> Statistics:
        """Migrate; returns when the guest lives over there. Raises MigrationError otherwise (see the module).

        ``on_step`` hears of each step when it is done, from this thread.
        """
        with _brisk_switching(), contextlib.closing(self.steps()) as steps:
            for step in steps:
                if on_step is not None:
                    on_step(step)
                if step.name == "pause":
                    self._cancelled.wait(step.seconds)
                elif step.name == "return-path":
                    # What fails here fails again at the next read, inside the session.
                    with contextlib.suppress(ChannelError):
                        self.channel.wait_readable(step.seconds)
                elif step.name == "pre-switchover":
                    self._continued.wait()
        return self.statistics

    def start(self) -> None:
        """:meth:`run` in a thread; :meth:`wait` for its outcome."""

        def body() -> None:
            with contextlib.suppress(MigrationError):  # kept in self.error
                self.run()

        self._thread = threading.Thread(target=body, name="migration", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> Statistics:
        """The outcome of :meth:`start`: the statistics, or the MigrationError. TimeoutError when neither is there."""
        assert self._thread is not None, "start() first"
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError("the migration is still under way")
        if self.error is not None:
            raise self.error
        return self.statistics

    # -- the work

    def steps(self) -> Generator[Step]:
        """Migrate, one piece of work between two yields.

        Three steps ask for time before the next: ``pause`` (the rate limit), ``return-path`` (nothing to do
        until the other end says something) and ``pre-switchover`` (the operator). Abandoning the
        iterator is a cancel.
        """
        self.statistics.begin()
        try:
            yield from self._migrate()
        except GeneratorExit:
            if self.states.final:
                raise
            self.cancel()
            self._recover(MigrationCancelled("the migration was abandoned"))
            raise
        except MigrationError as error:
            raise self._recover(error) from None
        except BaseException as error:
            self._recover(MigrationError(f"the migration ended with {type(error).__name__}: {error}"))
            raise

    def _to(self, status: Status) -> None:
        with self._lock:
            if self._cancelled.is_set():
                raise MigrationCancelled("the migration was cancelled")
            self.states.to(status)

    def _recover(self, error: MigrationError) -> MigrationError:
        """Put everything in its place after a failure; returns the error that the caller should see."""
        if isinstance(error, ChannelError) and self._return_path is not None and not self._cancelled.is_set():
            # The destination may have said why before it closed.
            try:
                self._return_path.poll()
            except ChannelError:
                pass
            except MigrationError as reason:
                error = reason
        self.channel.close()
        self._clean_up()
        with self._lock:
            cancelled = self._cancelled.is_set() and not self.handed_over
            if self.states.status == "none":
                self.states.to("setup")
            if cancelled and self.states.status != "cancelling":
                self.states.to("cancelling")
        if cancelled:
            error = MigrationCancelled("the migration was cancelled")
        if self.handed_over:
            error = HandOverUnconfirmed(f"{error}; the destination may run, so the guest stays paused here")
            self._hold.end("postmigrate")
        elif self._hold.taken:
            self._hold.release()
        self.error = error
        self.statistics.total_time_ms = self.statistics.elapsed_ms()
        with self._lock:
            self.states.to("cancelled" if cancelled else "failed")
        return error

    def _migrate(self) -> Iterator[Step]:
        statistics = self.statistics
        if self.machine.status == "inmigrate":
            raise MigrationError("there is no guest here: the machine waits for an incoming migration")
        self._to("setup")
        self._send(self._writer.header(), self._writer.configuration(self.machine.name))
        yield Step("setup")
        if self._return_path is not None:
            yield from self._shake_hands(self._return_path)
        for handler in self._handlers:
            started = self._writer.section_start(
                handler.name, handler.instance_id, handler.version_id, handler.setup().chunks
            )
            self._send(*started)
        statistics.total_pages = self.machine.ram.size // statistics.page_size
        statistics.setup_time_ms = statistics.elapsed_ms()
        self._to("active")
        yield from self._precopy()
        if self.parameters.pause_before_switchover:
            self._to("pre-switchover")
            yield Step("pre-switchover")
        self._to("device")
        yield from self._switch_over()

    def _shake_hands(self, return_path: ReturnPath) -> Iterator[Step]:
        """Find out who is at the other end; see :mod:`pyvcpu.migration.session.handshake`."""
        self._send(self._writer.open_return_path(), self._writer.ping(MAGIC))
        check = self._writer.crc
        self._send(self._writer.ping(check))
        for value in (MAGIC, check):
            yield from return_path.wait_for_pong(
                value, self.parameters.handshake_timeout, "an answer to the first PING"
            )
        self.peer = return_path.hello
        if self.peer is not None:
            check_hello(self.peer, describe_machine(self.machine))
        yield Step("handshake", self.peer)

    # -- active: passes over what is dirty

    def _precopy(self) -> Iterator[Step]:
        rate, bandwidth = RateLimit(self.parameters), Bandwidth()
        before: int | None = None
        while True:
            to_send = sum(handler.synchronise() for handler in self._handlers)
            self.statistics.dirty_sync_count += 1
            yield Step("synchronised", to_send)
            if self._may_stop(to_send, before, bandwidth.estimate()):
                return
            yield from self._pass(rate, bandwidth)
            before = to_send

    def _may_stop(self, to_send: int, before: int | None, bandwidth: float) -> bool:
        """Whether to stop the guest, with ``to_send`` pages to go; the last pass had ``before`` (None: no pass yet)."""
        if before is None:
            # A guest that does not run makes nothing dirty: all of RAM goes once, at the end.
            return not (self.machine.running if self._live is None else self._live)
        expected = expected_downtime(to_send * PAGE_RECORD, bandwidth)
        self.statistics.expected_downtime_ms = expected
        if self.parameters.max_iterations is not None:
            return len(self.statistics.iterations) >= self.parameters.max_iterations
        return should_stop(to_send, before, expected, self.parameters)

    def _pass(self, rate: RateLimit, bandwidth: Bandwidth) -> Iterator[Step]:
        """Send what was dirty at the synchronisation, in batches."""
        started = at = time.monotonic()
        iteration = self._new_iteration()
        for handler in self._handlers:
            while (batch := handler.iterate(self._batch_pages())) is not None:
                size = self._send_part(handler, batch, iteration)
                yield Step("batch", batch)
                pause = rate.sent(size)
                if pause > 0:
                    yield Step("pause", seconds=pause)
                now = time.monotonic()
                bandwidth.sent(size, now - at)
                at = now
                self._check_in()
        seconds = max(time.monotonic() - started, 1e-6)
        iteration.ms = seconds * 1000
        iteration.remaining = sum(handler.pending() for handler in self._handlers) // PAGE_RECORD
        self.statistics.mbps = iteration.bytes * 8 / seconds / 1e6
        self.statistics.dirty_pages_rate = iteration.remaining / seconds
        self.statistics.transferred = self.channel.bytes_written
        yield Step("iteration", iteration)

    def _new_iteration(self, *, stopped: bool = False) -> Iteration:
        iteration = Iteration(len(self.statistics.iterations) + 1, stopped=stopped)
        self.statistics.iterations.append(iteration)
        return iteration

    def _batch_pages(self) -> int:
        """As many pages as a rate-limit window carries, at most a whole batch."""
        limit = self.parameters.max_bandwidth
        return max(1, min(BATCH_PAGES, int(limit * WINDOW) // PAGE_RECORD)) if limit else BATCH_PAGES

    def _send_part(self, handler: IterativeSource, batch: Batch, iteration: Iteration, *, end: bool = False) -> int:
        make = self._writer.section_end if end else self._writer.section_part
        size = self._send(*make(self._writer.id_of(handler.name), batch.chunks))
        iteration.pages += batch.pages
        iteration.zero_pages += batch.zero_pages
        iteration.bytes += size
        return size

    # -- device: the guest stands still

    def _switch_over(self) -> Iterator[Step]:
        statistics, machine = self.statistics, self.machine
        down = time.monotonic()
        with statistics.part("stop"):
            self._hold.take()
            stopped_at = time.time_ns()
        runstate = self._runstate or ("running" if self._hold.was_running else machine.status)
        yield Step("stopped", runstate)
        with statistics.part("synchronise"):
            trace_save(machine, self._trace)
        with statistics.part("ram"):
            if self._profile.switchover_start:
                self._send(self._writer.switchover_start())
            yield from self._last_pass()
        with statistics.part("device-state"):
            self._send_devices(runstate)
        yield Step("device")
        if self._return_path is not None:
            with statistics.part("ready"):
                check = self._writer.crc
                self._send(self._writer.ping(check))
                yield from self._return_path.wait_for_pong(check, self.parameters.ready_timeout, "READY")
            yield Step("ready")
        with statistics.part("hand-over"):
            self._hand_over(stopped_at)
            yield Step("hand-over")
            yield from self._confirm()
        statistics.downtime_ms = (time.monotonic() - down) * 1000
        self._clean_up()
        self._hold.end("postmigrate")
        self.channel.close()
        statistics.transferred = self.channel.bytes_written
        statistics.total_time_ms = statistics.elapsed_ms()
        with self._lock:
            self.states.to("completed")
        yield Step("completed", statistics)

    def _last_pass(self) -> Iterator[Step]:
        iteration = self._new_iteration(stopped=True)
        started = time.monotonic()
        self.statistics.dirty_sync_count += 1
        for handler in self._handlers:
            waiting: Batch | None = None
            for batch in handler.complete():
                if waiting is not None:
                    self._send_part(handler, waiting, iteration)
                    yield Step("batch", waiting)
                    self._check_in()
                waiting = batch
            assert waiting is not None
            self._send_part(handler, waiting, iteration, end=True)
        iteration.ms = (time.monotonic() - started) * 1000
        yield Step("iteration", iteration)

    def _send_devices(self, runstate: str) -> None:
        """CpuState and devices -> stream. All of it is made before the first byte goes: a refusal sends nothing."""
        context = SaveContext(self._profile, self.machine.name, self.machine.clock, runstate)
        sections = []
        for entry in self.machine.sections():
            start = self._writer.offset
            sections.append(self._writer.section(entry, context))
            trace_section(entry, sections[-1], start, self._trace)
        self._send(*sections)

    def _hand_over(self, stopped_at: int) -> None:
        """Send EOF and VMDESC. From the first byte on the guest is the destination's."""
        eof = self._writer.eof()
        extra = {"stopped_at": stopped_at} if self._hold.was_running else {}
        trailer = self._writer.vmdesc(with_checksums=self.parameters.checksums, extra=extra)
        self._check_in()
        if self._return_path is not None:
            self._return_path.expect_shut = True
        before = self.channel.bytes_written
        with self._lock:
            if self._cancelled.is_set():
                raise MigrationCancelled("the migration was cancelled")
            self.handed_over = True
        try:
            self.channel.write_many((eof, trailer))
        except ChannelError:
            # A channel counts every byte that may have left: none did, so nothing was handed over.
            self.handed_over = self.channel.bytes_written > before
            raise

    def _confirm(self) -> Iterator[Step]:
        """Wait until the destination says that it has the guest; on a one-way channel, until all bytes are safe."""
        if self._return_path is None:
            self.channel.finish()
            return
        yield from self._return_path.wait_for_shut(self.parameters.hand_over_timeout)

    # -- sending

    def _send(self, *chunks: Data) -> int:
        """Everything goes through here; returns the bytes."""
        self.channel.write_many(chunks)
        return sum(map(len, chunks))

    def _check_in(self) -> None:
        """Between two pieces of work: a cancel, or news from the other end."""
        if self._cancelled.is_set():
            raise MigrationCancelled("the migration was cancelled")
        if self._return_path is not None:
            self._return_path.poll()

    def _clean_up(self) -> None:
        for handler in self._handlers:
            handler.cleanup()
