"""The receiving end of a migration.

    setup       nothing has come yet
    active      RAM goes into place as it arrives; device sections are decoded and kept
                READY? (PING, from a pyvcpu)  the CRC of everything so far is compared, every section is
                                              checked, then applied                         -> PONG
                EOF, VMDESC                   checksums of the trailer                      -> SHUT 0
    completed   the guest is here, and runs unless its run state or ``autostart=False`` says otherwise

A source that does not ask (a QEMU, a file) has its sections checked and applied after the VMDESC. Whatever is
wrong is found before any device is changed, said to the source (MESSAGE and SHUT 1, where there is a
way back), and ends in one MigrationError. The machine must be a fresh one: RAM is written before the rest
can be judged, so a refused stream leaves a machine that must not run (``inmigrate``).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

from pyvcpu.errors import ChannelError, MigrationError
from pyvcpu.migration.channel import Channel
from pyvcpu.migration.ram.incoming import RamDestination
from pyvcpu.migration.session.handshake import MAGIC, Refusal, describe_machine
from pyvcpu.migration.session.policy import MigrationParameters
from pyvcpu.migration.session.source import MigrationCancelled
from pyvcpu.migration.session.states import StateMachine, Status
from pyvcpu.migration.session.statistics import Statistics
from pyvcpu.migration.session.step import Step
from pyvcpu.migration.session.trace import LoadTrace, Trace, trace_load
from pyvcpu.migration.vmstate.codec import check_section, load_order, load_section
from pyvcpu.migration.vmstate.description import Description, LoadContext
from pyvcpu.migration.wire import return_path
from pyvcpu.migration.wire.reader import StreamReader
from pyvcpu.migration.wire.records import (
    Command,
    CommandType,
    Eof,
    RamBlocks,
    RamPages,
    Record,
    SectionFull,
    Vmdesc,
)

if TYPE_CHECKING:
    from pyvcpu.machine.machine import Machine

REQUIRED = ("cpu/0",)
"""Sections without which there is no guest, besides RAM."""


class DestinationSession:
    """One incoming migration into ``machine``, freshly made and not started, from ``channel``.

    With ``autostart`` a guest that was running goes on here: ``start`` is called (None: ``machine.start()``). Without,
    ``machine.status`` says what it was ("running", "paused", ...) and the caller goes on from there.
    """

    def __init__(
        self,
        machine: Machine,
        channel: Channel,
        parameters: MigrationParameters | None = None,
        *,
        autostart: bool = True,
        start: Callable[[], None] | None = None,
        trace_sync: Trace = None,
    ) -> None:
        self.machine, self.channel = machine, channel
        self.parameters = parameters or MigrationParameters()
        self.states = StateMachine()
        self.statistics = Statistics()
        self.error: MigrationError | None = None
        self.runstate = ""
        """What the guest's run state was at the source, once it is known."""
        self.unknown: list[str] = []
        """Sections ("name/instance") of the stream that this machine does not have."""
        self._autostart, self._start, self._trace = autostart, start or machine.start, trace_sync
        self._entries = machine.sections()
        self._by_name = {entry.name: entry for entry in self._entries}
        self._sections: dict[str, SectionFull] = {}
        self._ram = RamDestination(machine.ram)
        self._ram_listed = False
        self._reader = StreamReader(
            self._describe,
            machine=machine.name,
            ram_blocks={block.name: block.size for block in machine.ram.blocks},
            required_blocks=[machine.ram.blocks[0].name],
            require_checksums=self.parameters.require_checksums,
            check_pages=not channel.duplex,
        )
        self._reply = False  # the source has opened the return path
        self._peer = False  # the source is a pyvcpu: every PING carries a CRC
        self._applied = False
        self._eof = False
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._thread: threading.Thread | None = None

    # -- for everyone else

    @property
    def status(self) -> Status:
        return self.states.status

    def cancel(self) -> bool:
        """Give up, from any thread. False when it is too late."""
        with self._lock:
            if self.states.final or self._eof:
                return False
            self._cancelled.set()
            if self.states.status not in ("none", "cancelling"):
                self.states.to("cancelling")
        self.channel.close()
        return True

    def run(self) -> Statistics:
        """Receive the guest; returns when it is here. Raises MigrationError otherwise."""
        with contextlib.closing(self.steps()) as steps:
            for step in steps:
                if step.name == "read":
                    # What fails here fails again at the next read, inside the session.
                    with contextlib.suppress(ChannelError):
                        self.channel.wait_readable()
        return self.statistics

    def start(self) -> None:
        """:meth:`run` in a thread; :meth:`wait` for its outcome."""

        def body() -> None:
            with contextlib.suppress(MigrationError):  # kept in self.error
                self.run()

        self._thread = threading.Thread(target=body, name="incoming migration", daemon=True)
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
        """Receive, one piece of work between two yields.

        ``read`` means that nothing more has arrived; ``record`` names what was just taken in (its detail).
        Abandoning the iterator is a cancel.
        """
        self.statistics.begin()
        try:
            yield from self._receive()
        except GeneratorExit:
            if not self.states.final:
                self.cancel()
                self._fail(MigrationCancelled("the migration was abandoned"))
            raise
        except MigrationError as error:
            raise self._fail(error) from None
        except BaseException as error:
            self._fail(MigrationError(f"the migration ended with {type(error).__name__}: {error}"))
            raise

    def _receive(self) -> Iterator[Step]:
        self.machine.status = "inmigrate"
        self._to("setup")
        while not self._reader.finished:
            data = self.channel.read_now()
            if data is None:
                yield Step("read")
                continue
            if self.states.status == "setup":
                self._to("active")
            if not data:
                self._reader.close()
            self.statistics.received += len(data)
            for record in self._reader.feed(data):
                self._take(record)
                yield Step("record", record)
                if self.states.final:
                    break  # bytes after the end are not looked at, as by QEMU
                if self._cancelled.is_set():
                    raise MigrationCancelled("the migration was cancelled")
        yield Step("completed", self.statistics)

    def _to(self, status: Status) -> None:
        with self._lock:
            if self._cancelled.is_set():
                raise MigrationCancelled("the migration was cancelled")
            self.states.to(status)

    def _take(self, record: Record) -> None:
        match record:
            case RamPages():
                self._ram.take(record)
            case RamBlocks():
                self._ram_listed = True
                self.statistics.total_pages = sum(size for _, size in record.blocks) // self.statistics.page_size
            case Command():
                self._command(record)
            case SectionFull():
                if record.values is None:
                    self.unknown.append(record.key)
                else:
                    self._sections[record.key] = record
            case Eof():
                self._eof = True
            case Vmdesc():
                self._finish(record)
            case _:
                pass

    def _describe(self, name: str, instance_id: int) -> Description | None:
        """For the reader: what describes a section of the stream."""
        entry = self._by_name.get(f"{name}/{instance_id}")
        if entry is None and self._peer:
            # Nothing could be read up to the PING that the other end waits on with its guest stopped.
            raise self._unknown([f"{name}/{instance_id}"])
        return entry.description if entry is not None else None

    def _unknown(self, names: list[str]) -> MigrationError:
        several = "sections" if len(names) > 1 else "section"
        return MigrationError(
            f"this machine has no such {several}", offset=self._reader.offset, section=names[0],
            expected=", ".join(self._by_name), got=", ".join(names),
        )  # fmt: skip

    # -- the way back

    def _command(self, record: Command) -> None:
        if record.command == CommandType.OPEN_RETURN_PATH:
            if not self.channel.duplex:
                # Kept in a file: nobody waits for an answer.
                return
            self._reply = True
        elif record.command == CommandType.PING:
            self._ping(record)

    def _ping(self, record: Command) -> None:
        if not self._reply:
            return
        if self._peer and record.value != record.crc:
            raise MigrationError(
                "the stream was damaged on its way", offset=record.offset, section="command", field="PING",
                expected=f"CRC-32 {record.value:08x} of all bytes before", got=f"{record.crc:08x}",
            )  # fmt: skip
        if self._peer and "cpu/0" in self._sections:
            self._apply()  # READY?
        self.channel.write(return_path.pong(record.value))
        if record.value == MAGIC and not self._peer:
            self._peer = True
            self.channel.write(return_path.message(describe_machine(self.machine).to_message()))

    # -- the guest

    def _apply(self) -> None:
        """Check every section, then put all of them into the machine."""
        machine = self.machine
        if self.unknown:
            raise self._unknown(self.unknown)
        missing = [name for name in REQUIRED if name not in self._sections]
        if missing or not self._ram_listed:
            raise MigrationError(
                "the stream lacks what makes a guest", offset=self._reader.offset,
                expected="ram/0, " + ", ".join(REQUIRED), got=", ".join(self._sections) or "no section",
            )  # fmt: skip
        values = {name: record.values or {} for name, record in self._sections.items()}
        context = LoadContext(machine.name, machine.clock, sections=values)
        present = [entry for entry in self._entries if entry.name in values]
        for entry in present:
            check_section(entry, values[entry.name], context, self._sections[entry.name].spans)
        self._applied = True
        trace = LoadTrace(machine, self._trace)
        for entry in load_order(present):
            spans = self._sections[entry.name].spans
            load_section(entry, values[entry.name], context, spans)
            trace.loaded(entry, values[entry.name], spans)
        self.runstate = machine.global_state.runstate if "globalstate/0" in values else "running"
        trace_load(machine, self._trace)

    def _finish(self, record: Vmdesc) -> None:
        """Everything is here and right."""
        if not self._applied:
            self._apply()
        self._compensate(record)
        self.statistics.total_time_ms = self.statistics.elapsed_ms()
        self.machine.status = self.runstate
        if self._autostart and self.runstate == "running":
            self._start()
        with self._lock:
            self.states.to("completed")
        if self._reply:
            # The guest is here; if this cannot be said any more, the source stays paused, and that is all.
            with contextlib.suppress(ChannelError):
                self.channel.write(return_path.shut(0))
                self.channel.finish()

    def _compensate(self, record: Vmdesc) -> None:
        """A guest on the host's clock has stood still; its clocks go on as if it had not. Never backwards.

        Only from one pyvcpu to another, and not out of a file, where any time may have passed. On
        the icount clock no time passes without instructions.
        """
        clock = self.machine.clock
        stopped_at = (record.description.get("pyvcpu") or {}).get("stopped_at")
        if clock.deterministic or self.channel.stored or not record.checked or not isinstance(stopped_at, int):
            return
        clock.set_now(clock.now() + max(0, time.time_ns() - stopped_at))

    # -- failure

    def _fail(self, error: MigrationError) -> MigrationError:
        cancelled = self._cancelled.is_set()
        if cancelled:
            error = MigrationCancelled("the migration was cancelled")
        elif self.channel.duplex and not isinstance(error, ChannelError):
            with contextlib.suppress(ChannelError):
                # A QEMU that has opened the return path would not know our message; one that has not does not listen.
                if self._peer or not self._reply:
                    self.channel.write(return_path.message(Refusal(str(error)).to_message()))
                self.channel.write(return_path.shut(1))
                self.channel.finish()
        self.channel.close()
        self.machine.status = "inmigrate"
        self.error = error
        self.statistics.total_time_ms = self.statistics.elapsed_ms()
        with self._lock:
            if self.states.status == "none":
                self.states.to("setup")
            if cancelled and self.states.status != "cancelling":
                self.states.to("cancelling")
            self.states.to("cancelled" if cancelled else "failed")
        return error
