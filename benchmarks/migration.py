"""A whole migration over a unix socket: ours, and QEMU's to QEMU where it is installed, in turn."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.timing import median, ratio
from pyvcpu.machine import MIB, MachineConfig, make_machine
from pyvcpu.machine.guests import guest_directory, load_guest
from pyvcpu.migration.channel import connect, listen
from pyvcpu.migration.session import DestinationSession, MigrationParameters, SourceSession

MEMORY = 128 * MIB
ROUNDS = 5
BANDWIDTH = 128 * MIB


class Times(NamedTuple):
    total_ms: float
    downtime_ms: float


def ours(filled: int, guest: str | None) -> Times:
    """One migration between two machines of this process; ``filled`` bytes of RAM are random."""
    loader = (load_guest(guest),) if guest else ()
    source = make_machine(MachineConfig(machine="none", memory=MEMORY, loader=loader))
    target = make_machine(MachineConfig(machine="none", memory=MEMORY))
    if filled:
        source.ram.write(MEMORY - filled, os.urandom(filled))
    with tempfile.TemporaryDirectory() as directory:
        uri = f"unix:{directory}/migration"
        with listen(uri) as listener:
            if guest:
                source.start()
                time.sleep(0.3)
            channel = connect(uri)
            receiving = DestinationSession(target, listener.accept(), autostart=False)
            thread = threading.Thread(target=receiving.run)
            thread.start()
            session = SourceSession(source, channel, MigrationParameters(max_bandwidth=0 if filled else BANDWIDTH))
            statistics = session.run()
            thread.join()
    source.close()
    target.close()
    return Times(statistics.total_time_ms, statistics.downtime_ms or 0.0)


def qemu(filled: int, guest: str | None) -> Times:
    """The same between two QEMUs (TCG), from ``query-migrate``."""
    from tests.interop.qemu import NONE, Qemu

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        image = guest_directory() / str(guest) / f"{guest}.bin"
        arguments = [*NONE, "-m", str(MEMORY // MIB)]
        load = [
            "-device", f"loader,file={image},addr=0x8000,force-raw=on", "-device", "loader,addr=0x18000,cpu-num=0",
        ] if guest else []  # fmt: skip
        if filled:
            noise = directory / "noise"
            noise.write_bytes(os.urandom(filled))
            load += ["-device", f"loader,file={noise},addr={MEMORY - filled},force-raw=on"]
        uri = f"unix:{directory}/migration"
        with (
            Qemu(directory, *arguments, *load, *([] if guest else ["-S"]), name="source") as source,
            Qemu(directory, *arguments, "-incoming", uri, name="target"),
        ):
            time.sleep(0.3)
            source.command("migrate-set-parameters", **{"max-bandwidth": 1 << 40 if filled else BANDWIDTH})
            result = source.migrate(uri)
    return Times(result["total-time"], result["downtime"])


def main() -> None:
    """Print the table."""
    from tests.interop.qemu import version

    contestants: dict[str, Callable[[int, str | None], Times]] = {"pyvcpu": ours}
    if version():
        contestants["qemu"] = qemu
    print(f"migration: {MEMORY // MIB} MiB over a unix socket, {ROUNDS} rounds in turn, medians")
    for title, filled, guest in (
        ("stopped, zero RAM", 0, None),
        ("stopped, 96 MiB filled", 96 * MIB, None),
        ("dirtier running", 0, "dirtier"),
    ):
        results: dict[str, list[Times]] = {name: [] for name in contestants}
        for _ in range(ROUNDS):
            for name, migrate in contestants.items():
                results[name].append(migrate(filled, guest))
        for name, times in results.items():
            total, downtime = median([t.total_ms for t in times]), median([t.downtime_ms for t in times])
            print(f"{title:24} {name:7} total {total:7.0f} ms   downtime {downtime:6.1f} ms")
        if "qemu" in results:
            totals = {name: [max(t.total_ms, 1) for t in times] for name, times in results.items()}
            print(f"{'':24} total, pyvcpu/qemu: {ratio(totals['pyvcpu'], totals['qemu'])}")
    if not version():
        print("(qemu-system-x86_64 is not installed: no comparison)")
