"""isa-debug-exit: the exit code is the value, shifted left, with bit 0 set, as a process can return it."""

from __future__ import annotations

import pytest

from pyvcpu.devices.debug_exit import DebugExit


@pytest.mark.parametrize(("value", "code"), [(0, 1), (1, 3), (0x10, 33), (0x7F, 255), (0x80, 1), (0xFFFFFFFF, 255)])
def test_exit_code(value: int, code: int) -> None:
    codes: list[int] = []
    device = DebugExit(codes.append)
    device.write(0, 4, value)
    assert codes == [code]


def test_reads_as_zero() -> None:
    assert DebugExit(lambda code: None).read(0, 4) == 0
