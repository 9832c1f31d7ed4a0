"""Writing and reading a stream, beside the least that either could do: one CRC-32 over the same bytes."""

from __future__ import annotations

import os
import zlib

from benchmarks.timing import in_turn, median, rate_of, ratio
from pyvcpu.machine import MIB, MachineConfig, make_machine
from pyvcpu.migration.snapshot import load_snapshot, save_snapshot

FILLED = 64 * MIB


def main() -> None:
    """Print the table."""
    config = MachineConfig(machine="none", memory=FILLED)
    machine = make_machine(config)
    machine.ram.write(0, os.urandom(FILLED))
    stream = save_snapshot(machine)
    target = make_machine(config)

    def save() -> float:
        return rate_of(lambda: len(save_snapshot(machine)))

    def load() -> float:
        def work() -> float:
            load_snapshot(target, stream)
            return len(stream)

        return rate_of(work)

    def checksum() -> float:
        def work() -> float:
            zlib.crc32(stream)
            return len(stream)

        return rate_of(work)

    results = in_turn({"save": save, "load": load, "crc32": checksum})
    print(f"codec: {len(stream) / MIB:.0f} MiB of random pages; ratios are of runs in turn, [min .. max]")
    for name in ("save", "load"):
        rate = median(results[name]) / 1e6
        print(f"{name:5} {rate:7.0f} MB/s   {name}/crc32 {ratio(results[name], results['crc32'])}")
