"""The commands of the documentation do what it says they do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def environment() -> dict[str, str]:
    """The commands are found as a reader finds them."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "100"}


def run(command: str, directory: Path) -> str:
    """What a command says, on both outputs."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=directory, env=environment(), text=True, timeout=120, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.stdout


def steps(text: str) -> list[tuple[str, str]]:
    """(command, expected output) of every console block, in order."""
    found: list[tuple[str, list[str]]] = []
    for block in CONSOLE.findall(text):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return [(command, "\n".join(lines)) for command, lines in found]


def matches(expected: str, got: str) -> bool:
    """``...`` stands for anything, over lines too."""
    pattern = ".*".join(re.escape(part) for part in expected.strip().split("..."))
    return re.fullmatch(pattern, got.strip(), re.DOTALL) is not None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_console_blocks(document: Path, tmp_path: Path) -> None:
    for command, expected in steps(document.read_text()):
        got = run(command, tmp_path)
        assert matches(expected, got), f"$ {command}\nexpected:\n{expected}\ngot:\n{got}"


def test_the_lesson_has_steps() -> None:
    assert len(steps((ROOT / "docs" / "rax.md").read_text())) > 8


def test_the_three_things_to_try(tmp_path: Path) -> None:
    """README's indented commands, from a folder with the project's .venv in it."""
    section = (ROOT / "README.md").read_text().split("## Three things to try next", 1)[1].split("## ", 1)[0]
    commands = [line.strip() for line in section.splitlines() if line.startswith("    .venv/bin/pyvcpu")]
    assert len(commands) == 3
    outputs = [run(command.removeprefix(".venv/bin/"), tmp_path) for command in commands]
    assert "irqs: OK" in outputs[0]
    assert "saved at instruction 2000000" in outputs[1]
    assert "rip" in outputs[2]


def test_python_blocks(tmp_path: Path) -> None:
    for block in PYTHON.findall((ROOT / "README.md").read_text()):
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, env=environment(), text=True, timeout=120, check=False,
            capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    for document in [*DOCUMENTS, ROOT / "ARCHITECTURE.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
