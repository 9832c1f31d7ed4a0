"""Assembles the guests: ``python guests/build.py`` writes the images, ``--check`` compares them.

A source is Intel syntax for keystone, with a little more:

    ; comment                 include lib/boot.s        NAME = 0x123 (a constant, usable anywhere)
    org 0x9000                bits 16|32|64             string "text\\n" (zero-terminated)

Each stretch between ``org``/``bits`` lines is assembled by itself; labels are local to it. Images load at
8000. Every image is decoded again after assembly, because keystone gets some encodings wrong silently.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
GUESTS = ("counter", "ticker", "dirtier", "irqs")
ORIGIN = 0x8000


def read_source(path: Path, constants: dict[str, str]) -> list[tuple[int, str, int]]:
    """(line number, statement, 0) of a source and what it includes; constants are collected on the way."""
    lines: list[tuple[int, str, int]] = []
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
            lines.append((number, line, 0))
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


def assemble(name: str) -> bytes:
    """The image of a guest, from its source."""
    import keystone

    modes = {16: keystone.KS_MODE_16, 32: keystone.KS_MODE_32, 64: keystone.KS_MODE_64}
    constants: dict[str, str] = {}
    lines = read_source(HERE / name / f"{name}.s", constants)
    image = bytearray()
    bits, chunk = 16, list[tuple[int, str]]()

    def flush() -> None:
        if not chunk:
            return
        assembler = keystone.Ks(keystone.KS_ARCH_X86, modes[bits])
        text = "\n".join(line for _, line in chunk)
        try:
            code, _ = assembler.asm(text, ORIGIN + len(image))
        except keystone.KsError as error:
            for number, line in chunk:  # find the line: those that only lack a label are not it
                try:
                    assembler.asm(line, 0)
                except keystone.KsError as reason:
                    if "SYMBOL" not in str(reason):
                        raise SystemExit(f"{name}: line {number}: {line}: {reason}") from error
            raise SystemExit(f"{name}: {error}") from error
        image.extend(code or b"")
        chunk.clear()

    for number, line, _ in lines:
        if line.startswith("bits "):
            flush()
            bits = int(line.split()[1])
        elif line.startswith("org "):
            flush()
            address = int(line.split()[1], 0)
            if address - ORIGIN < len(image):
                raise SystemExit(f"{name}: org {address:#x} is {ORIGIN + len(image) - address} bytes too low")
            image.extend(bytes(address - ORIGIN - len(image)))
        else:
            chunk.append((number, substitute(line, constants)))
    flush()
    image.extend(bytes(-len(image) % 16))
    return bytes(image)


def image_path(name: str) -> Path:
    return HERE / name / f"{name}.bin"


def main() -> int:
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
