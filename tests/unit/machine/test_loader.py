"""Images: where they go, where the vCPU starts, what is refused."""

from __future__ import annotations

import pytest

from pyvcpu.cpu.layout import CS
from pyvcpu.cpu.state import CpuState
from pyvcpu.errors import ConfigurationError
from pyvcpu.machine import MIB, Image, MachineConfig, make_machine
from pyvcpu.machine.loader import start_at
from tests.unit.machine.fake import FakeEngine

KIB = 1 << 10


@pytest.fixture(autouse=True)
def _fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvcpu.machine.machine.make_accelerator", FakeEngine)


@pytest.mark.parametrize("size", [64 * KIB, 128 * KIB, 192 * KIB, 256 * KIB])
def test_bios_below_4_gib_and_its_end_below_1_mib(size: int) -> None:
    bios = b"".join(page.to_bytes(2, "little") * 2048 for page in range(1, size // 4096 + 1))
    machine = make_machine(MachineConfig(memory=2 * MIB, bios=bios))
    bus = machine.bus
    for i in range(0, size, 4096):
        assert bus.read((1 << 32) - size + i, 2) == i // 4096 + 1
    low = min(size, 128 * KIB)
    for i in range(0, low, 4096):
        assert bus.read(MIB - low + i, 2) == (size - low + i) // 4096 + 1
    assert bus.read(MIB - low - 4096, 2) == 0 == bus.read((1 << 32) - size - 4096, 2)
    bus.write(MIB - 1, 1, 0x5A)  # RAM, as on QEMU's microvm, seen through both windows
    assert bus.read((1 << 32) - 1, 1) == 0x5A
    assert machine.ram.read(MIB - 1, 1) == b"\0"  # and RAM lies hidden behind it
    machine.close()


@pytest.mark.parametrize("size", [0, 1, 4096, 65537, 16 * MIB + 64 * KIB])
def test_bios_sizes_that_cannot_be(size: int) -> None:
    with pytest.raises(ConfigurationError, match="64 KiB"):
        make_machine(MachineConfig(memory=2 * MIB, bios=bytes(size)))


def test_none_has_no_firmware() -> None:
    with pytest.raises(ConfigurationError, match="none"):
        make_machine(MachineConfig(machine="none", bios=bytes(64 * KIB)))


@pytest.mark.parametrize(("address", "rip"), [(0x8000, 0x18000), (0, 0x10000), (0x7C00, 0x17C00), (0xFFFF0010, 0x10)])
def test_the_start_is_qemus(address: int, rip: int) -> None:
    """CS as after reset; EIP wraps the sum to the address."""
    cpu = CpuState()
    cpu.reset()
    start_at(cpu, address)
    assert (cpu.seg_selector[CS], cpu.seg_base[CS], cpu.rip) == (0xF000, 0xFFFF0000, rip)
    assert (cpu.seg_base[CS] + cpu.rip) & 0xFFFFFFFF == address


@pytest.mark.parametrize("name", ["none", "microvm"])
def test_the_first_image_is_where_it_starts(name: str) -> None:
    images = [Image(b"first", 0x8000), Image(b"second", 0x10000 - 3)]
    machine = make_machine(MachineConfig(machine=name, memory=MIB, loader=images))
    assert machine.ram.read(0x8000, 5) == b"first" and machine.ram.read(0xFFFD, 6) == b"second"
    assert machine.cpu.rip == 0x18000
    machine.close()


def test_without_an_image_it_starts_at_the_reset_vector() -> None:
    machine = make_machine(MachineConfig(memory=MIB, bios=bytes(64 * KIB)))
    assert (machine.cpu.seg_base[CS] + machine.cpu.rip) == 0xFFFFFFF0
    machine.close()


@pytest.mark.parametrize("address", [-1, MIB - 3, MIB, 1 << 40])
def test_an_image_must_fit(address: int) -> None:
    with pytest.raises(ConfigurationError, match="beyond RAM"):
        make_machine(MachineConfig(machine="none", memory=MIB, loader=[Image(b"four", address)]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"machine": "pc"}, "none and microvm"),
        ({"memory": 0}, "multiple"),
        ({"memory": 4095}, "multiple"),
        ({"memory": 4096 * MIB}, "3072 MiB"),
        ({"clock": "sundial"}, "icount"),
    ],
)
def test_what_cannot_be_built(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make_machine(MachineConfig(**options))
