"""``pyvcpu demo``: the guest ``ticker`` moves between two processes while it works.

    this process        shows what happens
      |-- source        runs the guest, then migrates it over a unix socket      } JSON, a line an
      |-- destination   waits for it, and runs it to its end                     } event, on stdout
      |-- reference     runs the same guest, which never moves

The guest noticed nothing if its own checks passed (a page that is not what was written, a tick lost or
doubled would be a FAIL line), if both halves of its serial output make exactly the output of the run that
never moved, and if both runs ended at the same instruction.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyvcpu.errors import MigrationError
from pyvcpu.machine import MIB, Machine, MachineConfig, make_machine
from pyvcpu.machine.guests import load_guest
from pyvcpu.migration.channel import connect, listen
from pyvcpu.migration.session import DestinationSession, MigrationParameters, SourceSession, Step

MEMORY = 64 * MIB
GUEST = {"rate": 4, "pages": 1024, "ticks": 500, "beats": 10, "sequence": 1}
HEAD_START = 1.5
"""Seconds that the guest runs at the source before it is moved."""
MAX_BANDWIDTH, DOWNTIME_LIMIT = 32 * MIB, 10


# -- the child processes: one event a line


def _emit(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


def _build(output: bytearray, *, with_guest: bool) -> Machine:
    return make_machine(
        MachineConfig(
            memory=MEMORY,
            loader=(load_guest("ticker", **GUEST),) if with_guest else (),
            serial=output.extend,
            debug_exit=(0xF4, 4),
        )
    )


def _ended(machine: Machine, output: bytearray) -> None:
    _emit("ended", exit_code=machine.exit_code, serial=output.decode(), instructions=machine.instructions)


def _source(uri: str) -> None:
    output = bytearray()
    machine = _build(output, with_guest=True)
    machine.start()
    time.sleep(HEAD_START)
    session = SourceSession(
        machine, connect(uri), MigrationParameters(max_bandwidth=MAX_BANDWIDTH, downtime_limit=DOWNTIME_LIMIT)
    )
    session.states.listeners.append(lambda old, new: _emit("status", status=new))
    to_send = 0

    def report(step: Step) -> None:
        nonlocal to_send
        if step.name == "synchronised":
            to_send = step.detail
        elif step.name in ("batch", "iteration"):
            now = session.statistics.iterations[-1]
            _emit("progress", iteration=now.number, sent=now.pages + now.zero_pages, total=to_send)

    try:
        session.run(report)
    except MigrationError as error:
        _emit("failed", message=str(error))
        machine.stop()
        return
    _emit(
        "migrated",
        status=session.status,
        statistics=session.statistics.to_dict(),
        serial=output.decode(),
        instructions=machine.instructions,
        runstate=machine.status,
    )


def _destination(uri: str) -> None:
    output = bytearray()
    machine = _build(output, with_guest=False)
    with listen(uri) as listener:
        _emit("listening")
        channel = listener.accept(60)
    DestinationSession(machine, channel, autostart=False).run()
    _emit("running", instructions=machine.instructions)
    machine.run()
    _ended(machine, output)


def _reference() -> None:
    output = bytearray()
    machine = _build(output, with_guest=True)
    machine.run()
    _ended(machine, output)


# -- the parent


class _Child:
    """A role in a process of its own, and what it says."""

    def __init__(self, role: str, uri: str) -> None:
        self.role = role
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pyvcpu.demo", role, uri], stdout=subprocess.PIPE, text=True
        )

    def events(self) -> Iterator[dict[str, Any]]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield json.loads(line)
        if self._process.wait() != 0:
            raise MigrationError(f"the {self.role} process ended with exit code {self._process.returncode}")

    def wait_for(self, name: str) -> dict[str, Any]:
        for event in self.events():
            if event["event"] == name:
                return event
            if event["event"] == "failed":
                raise MigrationError(f"{self.role}: {event['message']}")
        raise MigrationError(f"the {self.role} process ended without {name!r}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def _play(show: _Show) -> dict[str, Any]:
    """The whole demo; what came out, as one JSON object."""
    with tempfile.TemporaryDirectory() as directory:
        uri = f"unix:{Path(directory) / 'migration.sock'}"
        children: list[_Child] = []

        def child(role: str) -> _Child:
            children.append(_Child(role, uri))
            return children[-1]

        try:
            destination = child("destination")
            destination.wait_for("listening")
            source = child("source")
            show.say(f"source: the guest ticker runs; it moves in {HEAD_START} s")
            migrated: dict[str, Any] = {}
            for event in source.events():
                if event["event"] == "failed":
                    raise MigrationError(f"source: {event['message']}")
                if event["event"] == "migrated":
                    migrated = event
                show.event(event)
            running = destination.wait_for("running")
            show.say(f"destination: the guest goes on at instruction {running['instructions']:,}")
            ended = destination.wait_for("ended")
            show.say("reference: the same guest, unmoved, for comparison")
            reference = child("reference").wait_for("ended")
        finally:
            show.close()
            for process in children:
                process.kill()
    moved = migrated["serial"] + ended["serial"]
    checks = {
        "guest_checks_passed": "ticker: OK" in moved and "FAIL" not in moved and ended["exit_code"] == 1,
        "same_output_as_unmoved": moved == reference["serial"],
        "same_instruction_count_as_unmoved": ended["instructions"] == reference["instructions"],
        "resumed_at_the_next_instruction": running["instructions"] == migrated["instructions"],
    }
    return {
        "status": migrated["status"],
        **migrated["statistics"],
        "bytes": migrated["statistics"]["ram"]["transferred"],
        "guest_verified": all(checks.values()),
        "checks": checks,
        "moved_at_instruction": migrated["instructions"],
        "ended_at_instruction": ended["instructions"],
        "guest_says": moved.splitlines()[-1] if moved else "",
    }


class _Show:
    """Progress for people: a bar on a terminal, lines elsewhere, nothing for JSON."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.console = Console(quiet=quiet)
        self._progress: Progress | None = None
        self._tasks: dict[int, Any] = {}
        if self.console.is_terminal and not quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("pages"))
            self._progress = Progress(*columns, console=self.console)
            self._progress.start()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def event(self, event: dict[str, Any]) -> None:
        if event["event"] == "status":
            self.say(f"source: {event['status']}")
        elif event["event"] == "progress":
            number, sent, total = event["iteration"], event["sent"], event["total"]
            if self._progress is None:
                if number not in self._tasks:
                    self._tasks[number] = None
                    self.say(f"iteration {number}: {total:,} pages")
                return
            if number not in self._tasks:
                self._tasks[number] = self._progress.add_task(f"iteration {number}", total=total)
            self._progress.update(self._tasks[number], completed=sent, total=max(total, sent))

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def table(self, result: dict[str, Any]) -> None:
        from rich.table import Table

        passes = Table(title="Pre-copy")
        for heading in ("iteration", "pages", "zero pages", "pages left", "bytes", "ms", "guest"):
            passes.add_column(heading, justify="right")
        for row in result["iterations"]:
            passes.add_row(
                str(row["iteration"]), f"{row['pages']:,}", f"{row['zero-pages']:,}", f"{row['remaining-pages']:,}",
                f"{row['bytes']:,}", f"{row['ms']:.1f}", "stopped" if row["guest-stopped"] else "running",
            )  # fmt: skip
        self.console.print(passes)
        times = Table(title="Migration", show_header=False)
        times.add_column()
        times.add_column(justify="right")
        times.add_row("status", result["status"])
        times.add_row("total time", f"{result['total_time_ms']:.0f} ms")
        times.add_row("bytes", f"{result['bytes']:,}")
        times.add_row("downtime", f"{result['downtime_ms']:.1f} ms")
        for name, ms in result["downtime"].items():
            times.add_row(f"  {name}", f"{ms:.2f} ms")
        self.console.print(times)
        proof = Table(
            title="The guest noticed nothing" if result["guest_verified"] else "THE GUEST NOTICED", show_header=False
        )
        proof.add_row("moved at instruction", f"{result['moved_at_instruction']:,}")
        proof.add_row("ended at instruction", f"{result['ended_at_instruction']:,}")
        for name, passed in result["checks"].items():
            proof.add_row(name.replace("_", " "), "yes" if passed else "NO")
        proof.add_row("the guest says", result["guest_says"])
        self.console.print(proof)


def demo(*, as_json: bool) -> int:
    """Play the demo; exit code 0 if the guest noticed nothing."""
    show = _Show(quiet=as_json)
    result = _play(show)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show.table(result)
    return 0 if result["guest_verified"] else 1


if __name__ == "__main__":
    role, address = sys.argv[1], sys.argv[2]
    if role == "source":
        _source(address)
    elif role == "destination":
        _destination(address)
    else:
        _reference()
