"""Our devices and memory map against QEMU's, access for access."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pyvcpu.devices.serial import PORT, Serial16550
from pyvcpu.machine.loader import map_bios
from pyvcpu.memory.bus import Bus
from pyvcpu.memory.ram import GuestRam
from tests.interop.qtest import QTest, available

pytestmark = [pytest.mark.interop, pytest.mark.skipif(not available(), reason="qemu-system-x86 is not installed")]

MIB = 1 << 20
SMALL = 64 << 10


def image(directory: Path, size: int) -> Path:
    """A firmware image whose every 4 KiB are different."""
    path = directory / "bios.bin"
    path.write_bytes(b"".join(bytes([page]) * 4096 for page in range(size // 4096)))
    return path


@pytest.mark.parametrize("seed", range(4))
def test_serial_port(tmp_path: Path, seed: int) -> None:
    """Random accesses of every width. Not with FIFO trigger levels above 1: QEMU's time-out needs time to pass."""
    rng = random.Random(seed)
    sent = bytearray()
    port = Serial16550(sent.extend)
    out = tmp_path / "serial.out"
    bios = image(tmp_path, SMALL)
    with QTest("-M", "microvm,isa-serial=on", "-m", "2", "-bios", str(bios), "-serial", f"file:{out}") as qemu:
        for step in range(2000):
            offset = rng.choice([0, 0, 0, 1, 2, 2, 3, 4, 5, 6, 7])
            size = rng.choice([1] * 8 + [2, 4])
            if offset + size > 8:
                size = 1
            if rng.random() < 0.5:
                registers = [rng.getrandbits(8) for _ in range(8)]
                registers[2] &= 0x3F
                if rng.random() < 0.8:
                    registers[3] &= 0x7F
                registers[4] |= rng.choice([0, 0x10])
                value = int.from_bytes(registers[offset : offset + size], "little")
                qemu.io_write(PORT + offset, size, value)
                port.write(offset, size, value)
            else:
                assert port.read(offset, size) == qemu.io_read(PORT + offset, size), (step, offset, size)
    assert bytes(sent) == out.read_bytes()
    assert sent


@pytest.mark.parametrize("size", [64 << 10, 128 << 10, 192 << 10, 256 << 10])
def test_firmware_is_mapped_where_qemu_maps_it(tmp_path: Path, size: int) -> None:
    path = image(tmp_path, size)
    ram = GuestRam([("microvm.ram", 2 * MIB), ("pc.bios", size)])
    bus = Bus(ram)
    bus.map_ram(0, 2 * MIB, ram.block("microvm.ram"))
    map_bios(bus, ram.block("pc.bios"))
    ram.write(ram.block("pc.bios").offset, path.read_bytes())
    low = range(MIB - (256 << 10), MIB, 4096)
    high = range((1 << 32) - size - 4096, 1 << 32, 4096)
    with QTest("-M", "microvm", "-m", "2", "-bios", str(path)) as qemu:
        for gpa in (*low, *high):
            assert bus.read(gpa, 1) == qemu.read(gpa), hex(gpa)
        for gpa, value in ((0xFFFF0, 0x77), (0xFFFFFFF1, 0x66), ((1 << 32) - size, 0x55)):
            qemu.write(gpa, value)
            bus.write(gpa, 1, value)
        for gpa in (0xFFFF0, 0xFFFF1, 0xFFFFFFF0, 0xFFFFFFF1, (1 << 32) - size, 0xF0000, 0xE0000):
            assert bus.read(gpa, 1) == qemu.read(gpa), hex(gpa)
    ram.close()


def test_what_is_not_there(tmp_path: Path) -> None:
    ram = GuestRam([("microvm.ram", 2 * MIB)])
    bus = Bus(ram)
    bus.map_ram(0, 2 * MIB, ram.block("microvm.ram"))
    bus.map_io(PORT, 8, Serial16550(lambda data: None), "serial")
    with QTest(
        "-M", "microvm,isa-serial=on", "-m", "2", "-bios", str(image(tmp_path, SMALL)), "-serial", "null"
    ) as qemu:
        for gpa in (2 * MIB, 0xD0000000, (1 << 32) + 5):
            assert bus.read(gpa, 1) == qemu.read(gpa) == 0
        for at, size in ((0x80, 1), (0x80, 2), (0x80, 4), (PORT - 1, 1), (PORT - 2, 4), (PORT - 1, 2), (PORT + 7, 2)):
            assert bus.io_read(at, size) == qemu.io_read(at, size), (hex(at), size)
    ram.close()
