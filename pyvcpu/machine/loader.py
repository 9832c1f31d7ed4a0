"""Getting software into a machine: BIOS images and raw images, where QEMU puts them.

    4 GiB  +--------------------+      1 MiB  +--------------------+
           | bios               |             | last 128 KiB of it |
           +--------------------+ 4G - size   +--------------------+ 1M - min(size, 128K)

Raw images go to any address of RAM, and the vCPU can be started at one of them.
"""

from __future__ import annotations

from pyvcpu.cpu.state import CpuState
from pyvcpu.errors import ConfigurationError
from pyvcpu.machine.config import Image
from pyvcpu.memory.bus import Bus
from pyvcpu.memory.ram import GuestRam, RamBlock

BIOS_UNIT = 64 << 10
BIOS_MAXIMUM = 16 << 20
_LOW_WINDOW = 128 << 10


def check_bios(image: bytes) -> None:
    """Raise ConfigurationError unless the size is one that QEMU takes: a multiple of 64 KiB up to 16 MiB."""
    if not image or len(image) % BIOS_UNIT or len(image) > BIOS_MAXIMUM:
        raise ConfigurationError(
            f"a BIOS image has a multiple of 64 KiB, up to 16 MiB; this one has {len(image)} bytes"
        )


def map_bios(bus: Bus, block: RamBlock) -> None:
    """Show the block ``pc.bios`` below 4 GiB, and its last 128 KiB below 1 MiB.

    As on QEMU's microvm the guest can write to it; a reset brings the image back.
    """
    bus.map_ram((1 << 32) - block.size, block.size, block)
    low = min(block.size, _LOW_WINDOW)
    bus.map_ram((1 << 20) - low, low, block, block.size - low)


def write_image(ram: GuestRam, block: RamBlock, image: Image) -> None:
    """Copy a raw image into main memory; ConfigurationError if it does not fit."""
    if image.address < 0 or image.address + len(image.data) > block.size:
        raise ConfigurationError(
            f"an image of {len(image.data):#x} bytes at {image.address:#x} goes beyond RAM, which has {block.size:#x}"
        )
    ram.write(block.offset + image.address, image.data)


def start_at(cpu: CpuState, address: int) -> None:
    """Let a vCPU in its reset state begin at a physical address below 4 GiB, in real mode.

    As with QEMU's ``-device loader,addr=ADDRESS+0x10000,cpu-num=0``: CS keeps its base FFFF0000, and EIP makes the sum
    wrap to the address.
    """
    cpu.rip = (address + 0x10000) & 0xFFFFFFFF
