"""The command line, as processes: exit codes, one line an error, files, the human monitor."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

DEBUG_EXIT = ("--device", "isa-debug-exit,iobase=0xf4,iosize=4")


def pyvcpu(*arguments: str, stdin: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyvcpu", *arguments], input=stdin, capture_output=True, text=True, timeout=120, cwd=cwd,
        check=False,
    )  # fmt: skip


def one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """The error is one line of ours, with these parts in it, and no traceback."""
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("pyvcpu: "), done.stderr
    for part in parts:
        assert part in lines[-1], done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def real_mode(path: Path, code: str) -> str:
    """A raw image of real-mode code, as ``--loader`` takes it."""
    # jmp 0:8005 first: CS keeps the base of the reset vector until a far jump.
    path.write_bytes(bytes.fromhex("ea05800000") + bytes.fromhex(code))
    return f"{path},addr=0x8000"


def test_debug_exit_gives_twice_the_value_plus_one(tmp_path: Path) -> None:
    image = real_mode(tmp_path / "image", "b010 e6f4 f4")  # mov al, 16; out f4h, al
    assert pyvcpu("run", "--loader", image, *DEBUG_EXIT).returncode == 33


def test_a_triple_fault_ends_the_run_with_no_reboot(tmp_path: Path) -> None:
    image = real_mode(tmp_path / "image", "0f011e2080 cc" + "00" * 32)  # lidt [8020h], all zeros; int3
    assert pyvcpu("run", "--loader", image, "--no-reboot").returncode == 0


def test_without_no_reboot_the_guest_begins_again(tmp_path: Path) -> None:
    # print 'x', then fault for good
    image = real_mode(tmp_path / "image", "baf803 b078 ee 0f011e2080 cc" + "00" * 32)
    done = pyvcpu("run", "--loader", image, "--max-instructions", "30")
    assert done.returncode == 0
    assert done.stdout.startswith("xxx")


def test_max_instructions_ends_with_0(tmp_path: Path) -> None:
    done = pyvcpu("run", "--guest", "counter", "--serial", "null", "--max-instructions", "1000")
    assert done.returncode == 0


def test_a_guest_that_halts_for_good_ends(tmp_path: Path) -> None:
    done = pyvcpu("run", "--loader", real_mode(tmp_path / "image", "fa f4"))
    assert done.returncode == 0
    assert "halted" in done.stderr


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    done = pyvcpu("run", "--loader", real_mode(tmp_path / "image", "d9e8"))  # fld1
    assert done.returncode == 3
    one_line(done, "d9 e8", "fld1", "real mode", "0x8005")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "--guest", "nobody"],
        ["run", "--guest", "ticker,speed=1"],
        ["run", "--loader", "/nowhere/image,addr=0"],
        ["run", "--loader", "image"],
        ["run", "--bios", "/nowhere/bios"],
        ["run", "--guest", "counter", "--device", "vga"],
        ["run", "--guest", "counter", "--serial", "pty"],
        ["run", "--guest", "counter", "-m", "0"],
        ["run", "--guest", "counter", "-m", "100000000"],
        ["run", "-M", "none", "--bios", "/dev/null"],
        ["run", "--incoming", "file:/nowhere/stream"],
        ["run", "--incoming", "carrier:pigeon"],
        ["run", "--incoming", "defer", "--monitor", "none"],
        ["save", "--guest", "counter", "-o", "x"],
        ["save", "--guest", "counter", "--max-instructions", "10", "-o", "/nowhere/x"],
        ["save", "--guest", "counter", "--max-instructions", "10", "-o", "/dev/null", "--profile", "vmware"],
        ["inspect", "/nowhere/stream"],
        ["inspect", "/dev/null"],
    ],
)
def test_errors_are_one_line(arguments: list[str]) -> None:
    done = pyvcpu(*arguments)
    assert done.returncode == 1
    one_line(done)


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run", "-M", "pc"], ["run", "-m", "much"]])
def test_a_command_line_that_is_not_understood(arguments: list[str]) -> None:
    done = pyvcpu(*arguments)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_bios(tmp_path: Path) -> None:
    """A 64 KiB image: the reset vector jumps to its start, which leaves through isa-debug-exit."""
    image = bytearray(64 << 10)
    image[0:5] = bytes.fromhex("b001 e6f4 f4")  # mov al, 1; out f4h, al; hlt
    image[0xFFF0:0xFFF3] = bytes.fromhex("e90d00")  # jmp F000:0000, by wrapping
    path = tmp_path / "bios"
    path.write_bytes(image)
    assert pyvcpu("run", "--bios", str(path), *DEBUG_EXIT).returncode == 3
    path.write_bytes(image[:-1])
    one_line(pyvcpu("run", "--bios", str(path)), "64 KiB")


def test_serial_to_a_file(tmp_path: Path) -> None:
    out = tmp_path / "serial"
    done = pyvcpu("run", "--guest", "irqs", "--serial", f"file:{out}", *DEBUG_EXIT)
    assert done.returncode == 1
    assert out.read_text() == "irqs: OK 75 checks\n"
    assert done.stdout == ""


def test_save_and_go_on(tmp_path: Path) -> None:
    whole = pyvcpu("run", "--guest", "counter,limit=30000,mask=8191", "-m", "4", *DEBUG_EXIT)
    stream = tmp_path / "stream"
    first = pyvcpu(
        "save", "--guest", "counter,limit=30000,mask=8191", "-m", "4", "--max-instructions", "100000", "-o", str(stream)
    )
    rest = pyvcpu("run", "--incoming", f"file:{stream}", "-m", "4", *DEBUG_EXIT)
    assert first.returncode == 0
    assert rest.returncode == whole.returncode == 1
    assert first.stdout + rest.stdout == whole.stdout


def test_inspect(tmp_path: Path) -> None:
    stream = tmp_path / "stream"
    pyvcpu("save", "--guest", "counter", "-m", "4", "--max-instructions", "5000", "-o", str(stream), "--serial", "null")
    tree = json.loads(pyvcpu("inspect", str(stream), "--json").stdout)
    assert tree
    text = pyvcpu("inspect", str(stream), "cpu/regs[3]")
    assert "(rbx)" in text.stdout
    one_line(pyvcpu("inspect", str(stream), "cpu/nonsense"), "nonsense")
    stream.write_bytes(stream.read_bytes()[:-100])
    cut = pyvcpu("inspect", str(stream))
    assert "cpu/0" in cut.stdout
    assert cut.returncode == 1
    one_line(cut)


def test_an_interrupt_from_the_keyboard() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pyvcpu", "run", "--guest", "counter", "--serial", "null"], stderr=subprocess.PIPE
    )
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in stderr


class Monitored:
    """A ``run`` with its monitor on stdin."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pyvcpu", "run", "--monitor", "stdio", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def read_until(self, text: str) -> str:
        assert self.process.stderr is not None
        seen = ""
        while text not in seen:
            line = self.process.stderr.readline()
            assert line, f"{text!r} did not come: {seen}"
            seen += line
        return seen

    def end(self) -> int:
        self.say("quit")
        return self.process.wait(20)


def test_the_monitor() -> None:
    machine = Monitored("--guest", "counter", "--serial", "null", "-S")
    machine.say("info status")
    assert "prelaunch" in machine.read_until("VM status")
    machine.say("cont")
    machine.say("info status")
    machine.read_until("running")
    machine.say("stop")
    machine.say("info status")
    machine.read_until("paused")
    machine.say("info registers")
    assert "RIP=" in machine.read_until("EFER")
    machine.say("dance")
    machine.read_until("unknown command")
    assert machine.end() == 0


@pytest.mark.parametrize("scheme", ["unix", "tcp"])
def test_live_between_two_processes(scheme: str, tmp_path: Path) -> None:
    uri = f"unix:{tmp_path / 'socket'}" if scheme == "unix" else f"tcp:127.0.0.1:{free_port()}"
    guest = "ticker,beats=12,ticks=100,pages=64"
    target = Monitored("-m", "16", "--incoming", "defer", *DEBUG_EXIT)
    source = Monitored("-m", "16", "--guest", guest, "--sleep", "on", *DEBUG_EXIT)
    target.say(f"migrate_incoming {uri}")
    time.sleep(1.0)
    for _ in range(50):
        source.say(f"migrate {uri}")
        assert source.process.stderr is not None
        if "migrated" in source.process.stderr.readline():
            break
        time.sleep(0.2)
    else:
        raise AssertionError("no migration")
    source.say("info status")
    source.read_until("postmigrate")
    source.end()
    assert target.process.wait(60) == 1  # the guest's own end
    assert source.process.stdout is not None
    assert target.process.stdout is not None
    said = source.process.stdout.read() + target.process.stdout.read()
    assert "ticker: OK beats 12" in said
    assert "FAIL" not in said
    assert [line for line in said.splitlines() if "beat " in line] == [
        line for line in pyvcpu("run", "-m", "16", "--guest", guest, *DEBUG_EXIT).stdout.splitlines() if "beat " in line
    ]


def test_the_demo() -> None:
    done = pyvcpu("demo", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == "completed"
    assert result["guest_verified"] is True
    assert all(result["checks"].values())
    assert 0 < result["downtime_ms"] < result["total_time_ms"]
    assert sum(result["downtime"].values()) <= result["downtime_ms"] + 1
    assert len(result["iterations"]) > 1
    assert result["bytes"] > 1 << 20
