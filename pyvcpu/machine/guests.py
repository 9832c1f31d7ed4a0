"""The bundled guests: ``--guest NAME[,PARAMETER=VALUE...]``.

An image is loaded, and entered in real mode, at 8000; its parameters are u64 values at offset F00. What
each guest shows and prints stands in ``guests/NAME/README.md``.

As firmware (``guests/build.py --bios``), for machines that can be given nothing else:

    F0000  the image, up to FF00 bytes
    FFF00  copies it to 8000 and jumps there
    FFFF0  reset vector: jmp F000:FF00
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

from pyvcpu.errors import ConfigurationError
from pyvcpu.machine.config import Image

LOAD_ADDRESS = 0x8000
_PARAMETERS_OFFSET = 0xF00

_BIOS_SIZE = 64 << 10
_COPIER, _RESET_VECTOR = 0xFF00, 0xFFF0
_COPY_AND_JUMP = bytes.fromhex(
    "fa"  # cli
    "fc"  # cld
    "8cc8"  # mov ax, cs            F000
    "8ed8"  # mov ds, ax
    "b80008"  # mov ax, 0x800       8000
    "8ec0"  # mov es, ax
    "31f6"  # xor si, si
    "31ff"  # xor di, di
    "b9807f"  # mov cx, 0x7f80      FF00 bytes
    "f3a5"  # rep movsw
    "ea00800000"  # jmp 0:8000
)
_JUMP_TO_COPIER = bytes.fromhex("ea00ff00f0")  # jmp F000:FF00

PARAMETERS: dict[str, tuple[str, ...]] = {
    "counter": ("limit", "mask"),
    "ticker": ("period", "rate", "pages", "ticks", "beats", "sequence"),
    "dirtier": ("pattern", "pages", "writes", "reports"),
    "irqs": ("rounds",),
}
"""The guests, and the names of their parameters in order."""


def guest_directory() -> Path:
    """Where the images are: beside the package in a checkout, below the prefix when installed."""
    checkout = Path(__file__).resolve().parents[2] / "guests"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "pyvcpu" / "guests"


def load_guest(name: str, **parameters: int) -> Image:
    """The image of a guest with its parameters set. ConfigurationError for an unknown guest or parameter."""
    names = PARAMETERS.get(name)
    if names is None:
        raise ConfigurationError(f"there is no guest {name!r}: {', '.join(PARAMETERS)}")
    directory = guest_directory()
    path = next((p for p in (directory / name / f"{name}.bin", directory / f"{name}.bin") if p.is_file()), None)
    if path is None:
        raise ConfigurationError(f"the image of guest {name!r} is not in {directory}")
    image = bytearray(path.read_bytes())
    for key, value in parameters.items():
        if key not in names:
            raise ConfigurationError(f"guest {name} has no parameter {key!r}: {', '.join(names)}")
        if not 0 <= value < 1 << 64:
            raise ConfigurationError(f"guest {name}: {key}={value} is not an unsigned 64-bit number")
        struct.pack_into("<Q", image, _PARAMETERS_OFFSET + 8 * names.index(key), value)
    return Image(bytes(image), LOAD_ADDRESS)


def as_bios(image: Image) -> bytes:
    """A guest as 64 KiB of firmware, for ``-bios``, of pyvcpu and of QEMU. ConfigurationError if it is too large."""
    if image.address != LOAD_ADDRESS or len(image.data) > _COPIER:
        raise ConfigurationError(f"{len(image.data):#x} bytes for {image.address:#x} do not fit into the firmware")
    bios = bytearray(_BIOS_SIZE)
    bios[: len(image.data)] = image.data
    bios[_COPIER : _COPIER + len(_COPY_AND_JUMP)] = _COPY_AND_JUMP
    bios[_RESET_VECTOR : _RESET_VECTOR + len(_JUMP_TO_COPIER)] = _JUMP_TO_COPIER
    return bytes(bios)


def parse_guest(text: str) -> Image:
    """The image for the option's text, such as ``ticker,rate=8,beats=3``."""
    name, *settings = text.split(",")
    parameters = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            parameters[key] = int(value, 0)
        except ValueError:
            raise ConfigurationError(f"--guest {text}: {setting!r} is not NAME=NUMBER") from None
    return load_guest(name, **parameters)
