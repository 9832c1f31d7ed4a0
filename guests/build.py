"""Assembles the guests: ``python guests/build.py`` writes the images, ``--check`` compares them.

``--bios NAME[,PARAMETER=VALUE...] FILE`` writes a guest as firmware, for ``-bios`` of QEMU's microvm and ours.

A source is Intel syntax for keystone, with a little more:

    ; comment                 include lib/boot.s        NAME = 0x123 (a constant, usable anywhere)
    org 0x9000                bits 16|32|64             string "text\\n" (zero-terminated)

Each stretch between ``org``/``bits`` lines is assembled by itself; labels are local to it. Images load at
8000. Every stretch is decoded again and held against its source (``verify.py``), because keystone gets some
encodings wrong silently.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

from verify import Mismatch, verify

HERE = Path(__file__).resolve().parent
GUESTS = ("counter", "ticker", "dirtier", "irqs")
ORIGIN = 0x8000


def read_source(path: Path, constants: dict[str, str]) -> list[tuple[int, str]]:
    """(line number, statement) of a source and what it includes; constants are collected on the way."""
    lines: list[tuple[int, str]] = []
    for number, raw in enumerate(path.read_text().splitlines(), 1):
        line = raw if raw.strip().startswith("string") else raw.split(";", 1)[0]
        line = line.strip()
        if not line:
            continue
        if line.startswith("include "):
            lines += read_source(HERE / line.split(None, 1)[1], constants)
        elif found := re.fullmatch(r"([A-Z][A-Z0-9_]*)\s*=\s*(.+)", line):
            constants[found[1]] = found[2]
        else:
            lines.append((number, line))
    return lines


def substitute(line: str, constants: dict[str, str]) -> str:
    """Constants and ``string`` replaced by what keystone knows."""
    if line.startswith("string "):
        text = ast.literal_eval(line.split(None, 1)[1])
        return ".byte " + ", ".join(str(byte) for byte in (*text.encode("ascii"), 0))
    for _ in range(4):
        line = re.sub(r"\b[A-Z][A-Z0-9_]*\b", lambda m: f"({constants[m[0]]})" if m[0] in constants else m[0], line)
    # keystone takes one number where it takes one: fold constant sums, which stand in parentheses.
    while True:
        folded = re.sub(r"\(([0-9a-fA-Fx +*<|-]+)\)", lambda m: str(eval(m[1], {})), line)
        if folded == line:
            break
        line = folded
    return re.sub(r"(?<![\w.])(\d+ *[+*] *)+\d+(?![\w.])", lambda m: str(eval(m[0], {})), line)


class Stretch(NamedTuple):
    """Consecutive statements, (line, text) each; they begin at ``address``, or where the last stretch ended."""

    bits: int
    address: int | None
    statements: list[tuple[int, str]]


def stretches(name: str) -> list[Stretch]:
    """A guest's source, as it is assembled piece by piece."""
    constants: dict[str, str] = {}
    found = [Stretch(16, ORIGIN, [])]
    for number, line in read_source(HERE / name / f"{name}.s", constants):
        if line.startswith("bits "):
            found.append(Stretch(int(line.split()[1]), None, []))
        elif line.startswith("org "):
            found.append(Stretch(found[-1].bits, int(line.split()[1], 0), []))
        else:
            found[-1].statements.append((number, substitute(line, constants)))
    return [stretch for stretch in found if stretch.statements]


def assemble(name: str) -> bytes:
    """The image of a guest, from its source."""
    image = bytearray()
    for stretch in stretches(name):
        start = ORIGIN + len(image) if stretch.address is None else stretch.address
        if start - ORIGIN < len(image):
            raise SystemExit(f"{name}: org {start:#x} is {ORIGIN + len(image) - start} bytes too low")
        image.extend(bytes(start - ORIGIN - len(image)))
        code = assemble_stretch(name, stretch, start)
        try:
            size = verify(stretch.statements, code, stretch.bits, start)
        except Mismatch as error:
            raise SystemExit(f"{name}: {error}") from error
        if size != len(code):
            raise SystemExit(f"{name}: the source makes {size} bytes at {start:#x}, the assembler made {len(code)}")
        image.extend(code)
    image.extend(bytes(-len(image) % 16))
    return bytes(image)


def assemble_stretch(name: str, stretch: Stretch, start: int) -> bytes:
    """What keystone makes of a stretch. SystemExit naming the line that it refuses."""
    import keystone

    modes = {16: keystone.KS_MODE_16, 32: keystone.KS_MODE_32, 64: keystone.KS_MODE_64}
    assembler = keystone.Ks(keystone.KS_ARCH_X86, modes[stretch.bits])
    try:
        code, _ = assembler.asm("\n".join(text for _, text in stretch.statements), start)
    except keystone.KsError as error:
        for number, text in stretch.statements:  # find the line: those that only lack a label are not it
            try:
                assembler.asm(text, 0)
            except keystone.KsError as reason:
                if "SYMBOL" not in str(reason):
                    raise SystemExit(f"{name}: line {number}: {text}: {reason}") from error
        raise SystemExit(f"{name}: {error}") from error
    return bytes(code or b"")


def verify_image(name: str, image: bytes) -> None:
    """Decode an image and hold it against the source, without an assembler. Raises Mismatch."""
    at = 0
    for stretch in stretches(name):
        at = at if stretch.address is None else stretch.address - ORIGIN
        at += verify(stretch.statements, image[at:], stretch.bits, ORIGIN + at)


def image_path(name: str) -> Path:
    return HERE / name / f"{name}.bin"


def write_bios(guest: str, path: str) -> int:
    from pyvcpu.machine.guests import as_bios, parse_guest

    Path(path).write_bytes(as_bios(parse_guest(guest)))
    return 0


def main() -> int:
    if sys.argv[1:2] == ["--bios"]:
        if len(sys.argv) != 4:
            raise SystemExit("guests/build.py --bios NAME[,PARAMETER=VALUE...] FILE")
        return write_bios(sys.argv[2], sys.argv[3])
    check = "--check" in sys.argv
    worst = 0
    for name in GUESTS:
        image = assemble(name)
        path = image_path(name)
        if not check:
            path.write_bytes(image)
            print(f"{name}: {len(image)} bytes")
        elif path.read_bytes() != image:
            print(f"{name}: the committed image is not what the source gives")
            worst = 1
        else:
            print(f"{name}: as committed")
    return worst


if __name__ == "__main__":
    sys.exit(main())
