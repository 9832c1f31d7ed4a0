"""The bundled guests: ``--guest NAME[,PARAMETER=VALUE...]``.

An image is loaded, and entered in real mode, at 8000; its parameters are u64 values at offset F00. What
each guest shows and prints stands in ``guests/NAME/README.md``.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

from pyvcpu.errors import ConfigurationError
from pyvcpu.machine.config import Image

LOAD_ADDRESS = 0x8000
_PARAMETERS_OFFSET = 0xF00

PARAMETERS: dict[str, tuple[str, ...]] = {
    "counter": ("limit", "mask"),
    "ticker": ("period", "rate", "pages", "ticks", "beats"),
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
