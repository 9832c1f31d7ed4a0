"""``-M none`` between pyvcpu and Debian's QEMU 7.2, through files and live: the guest and its count go on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from pyvcpu.cpu.layout import RBX
from pyvcpu.machine import MIB, Machine, MachineConfig, make_machine
from pyvcpu.machine.guests import guest_directory, load_guest
from pyvcpu.migration.channel import connect, listen
from pyvcpu.migration.session import DestinationSession, MigrationParameters, SourceSession
from pyvcpu.migration.snapshot import load_snapshot, save_snapshot
from tests.interop.qemu import NONE, Qemu, version

pytestmark = pytest.mark.skipif(
    not (version() or "").startswith("7.2"), reason="Debian's QEMU 7.2 (qemu-system-x86) is not installed"
)

MEMORY = 16 * MIB
COUNT = 0x6000  # where the guest `counter` keeps its count
MEMORY_OPTION = ("-m", "16")
PROFILE = MigrationParameters(profile="qemu-7.2-tcg")


def counter() -> Machine:
    machine = make_machine(MachineConfig(machine="none", memory=MEMORY, loader=(load_guest("counter"),)))
    machine.run(1_000_000)
    return machine


def empty() -> Machine:
    return make_machine(MachineConfig(machine="none", memory=MEMORY))


def count(machine: Machine) -> int:
    return int.from_bytes(machine.ram.read(COUNT, 8), "little")


def qemu_counter(directory: Path) -> Qemu:
    image = guest_directory() / "counter" / "counter.bin"
    return Qemu(
        directory, *NONE, *MEMORY_OPTION,
        "-device", f"loader,file={image},addr=0x8000,force-raw=on", "-device", "loader,addr=0x18000,cpu-num=0",
    )  # fmt: skip


def check_goes_on_in_qemu(qemu: Qemu, before: int) -> None:
    """The count is at least what it was, goes up, and agrees with the register; the guest saw no damage."""
    qemu.wait_status("running")
    first = qemu.u64(COUNT)
    assert first >= before
    deadline = time.monotonic() + 20
    while qemu.u64(COUNT) <= first:
        assert time.monotonic() < deadline, "the count does not go up"
        time.sleep(0.02)
    qemu.command("stop")
    registers = qemu.human("info registers")
    rbx = int(registers.split("RBX=")[1][:16], 16)
    # Stopped anywhere in the loop: the register is at most one ahead of memory.
    assert rbx - qemu.u64(COUNT) in (0, 1)
    assert "HLT=0" in registers


def check_goes_on_here(machine: Machine, at_least: int) -> None:
    before = count(machine)
    assert before >= at_least
    assert machine.cpu.regs[RBX] - before in (0, 1)
    assert machine.run(900_000) == "limit"
    turns = count(machine) - before
    assert 90_000 < turns <= 100_000  # nine instructions a turn, and the reports between
    assert machine.cpu.regs[RBX] - count(machine) in (0, 1)


def test_a_saved_stream_runs_in_qemu(tmp_path: Path) -> None:
    machine = counter()
    stream = tmp_path / "none.mig"
    stream.write_bytes(save_snapshot(machine, profile="qemu-7.2-tcg"))
    with Qemu(tmp_path, *NONE, *MEMORY_OPTION, "-incoming", f"exec:cat {stream}") as qemu:
        check_goes_on_in_qemu(qemu, count(machine))


def test_a_stream_of_qemu_runs_here(tmp_path: Path) -> None:
    stream = tmp_path / "none.mig"
    with qemu_counter(tmp_path) as qemu:
        while qemu.u64(COUNT) < 100_000:
            time.sleep(0.01)
        qemu.migrate(f"exec:cat > {stream}")
        reached = qemu.u64(COUNT)
    machine = empty()
    load_snapshot(machine, stream.read_bytes())
    assert count(machine) == reached
    check_goes_on_here(machine, reached)


def test_live_to_qemu(tmp_path: Path) -> None:
    machine = counter()
    path = tmp_path / "live.sock"
    with Qemu(tmp_path, *NONE, *MEMORY_OPTION, "-incoming", f"unix:{path}") as qemu:
        machine.start()
        session = SourceSession(machine, connect(f"unix:{path}"), PROFILE)
        session.run()
        assert session.status == "completed"
        assert machine.status == "postmigrate"
        check_goes_on_in_qemu(qemu, count(machine))


def test_live_from_qemu(tmp_path: Path) -> None:
    path = tmp_path / "live.sock"
    machine = empty()
    with qemu_counter(tmp_path) as qemu, listen(f"unix:{path}") as listener:
        while qemu.u64(COUNT) < 100_000:
            time.sleep(0.01)
        sender = threading.Thread(target=lambda: qemu.command("migrate", uri=f"unix:{path}"))
        sender.start()
        channel = listener.accept(20)
        sender.join()
        DestinationSession(machine, channel, autostart=False).run()
        qemu.wait_migration()
        reached = qemu.u64(COUNT)
    check_goes_on_here(machine, reached)


def test_there_and_back(tmp_path: Path) -> None:
    """pyvcpu -> QEMU -> pyvcpu, live both times."""
    first, last = counter(), empty()
    there, back = tmp_path / "there.sock", tmp_path / "back.sock"
    before = count(first)
    waiting = Qemu(tmp_path, *NONE, *MEMORY_OPTION, "-incoming", f"unix:{there}")
    with waiting as qemu, listen(f"unix:{back}") as listener:
        first.start()
        SourceSession(first, connect(f"unix:{there}"), PROFILE).run()
        qemu.wait_status("running")
        sender = threading.Thread(target=lambda: qemu.command("migrate", uri=f"unix:{back}"))
        sender.start()
        channel = listener.accept(20)
        sender.join()
        DestinationSession(last, channel, autostart=False).run()
    check_goes_on_here(last, before)
