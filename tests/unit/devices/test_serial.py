"""The 16550A, register by register. That a QEMU answers the same is tested in tests/interop."""

from __future__ import annotations

import pytest

from pyvcpu.devices.serial import FIFO_SIZE, Serial16550

RBR, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
THR, FCR = RBR, IIR


class Port(Serial16550):
    """With byte accesses and a note of what comes out."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.irqs: list[int] = []
        self.accepts = 0
        super().__init__(self.sent.extend)
        self.on_irq = self.irqs.append
        self.on_accept = self._accepts

    def _accepts(self) -> None:
        self.accepts += 1

    def get(self, register: int) -> int:
        return self.read(register, 1)

    def set(self, register: int, value: int) -> None:
        self.write(register, 1, value)


@pytest.fixture
def port() -> Port:
    return Port()


def test_after_reset(port: Port) -> None:
    assert [port.get(register) for register in range(8)] == [0, 0, 1, 0, 8, 0x60, 0xB0, 0]
    port.set(LCR, 0x80)
    assert (port.get(0), port.get(1)) == (12, 0)  # 9600 baud


def test_reset_undoes_everything(port: Port) -> None:
    for register, value in (
        (LCR, 0x80),
        (0, 1),
        (1, 2),
        (LCR, 3),
        (FCR, 0xC1),
        (IER, 0xF),
        (MCR, 0x1F),
        (SCR, 9),
        (THR, 5),
    ):
        port.set(register, value)
    port.reset()
    assert port.irqs[-1] == 0
    assert [port.get(register) for register in range(8)] == [0, 0, 1, 0, 8, 0x60, 0xB0, 0]
    assert port.divider == 12


class TestOutput:
    def test_goes_out_at_once_and_the_transmitter_is_always_empty(self, port: Port) -> None:
        for byte in b"hello":
            port.set(THR, byte)
            assert port.get(LSR) == 0x60
        assert port.sent == b"hello"

    def test_a_wide_write_is_several_registers(self, port: Port) -> None:
        port.write(THR, 2, 0x0F41)
        assert port.sent == b"A" and port.get(IER) == 0x0F
        port.write(SCR, 2, 0x1234)  # the second byte is beyond the last register
        assert port.get(SCR) == 0x34
        assert port.read(SCR, 2) == 0xFF34
        assert port.read(LSR, 2) == 0xB060

    def test_the_divisor_hides_the_data_registers(self, port: Port) -> None:
        port.set(LCR, 0x83)
        port.set(0, 0x34)
        port.set(1, 0x12)
        assert (port.get(0), port.get(1), port.divider) == (0x34, 0x12, 0x1234)
        port.set(LCR, 3)
        assert port.sent == b"" and port.get(IER) == 0

    def test_empty_interrupt(self, port: Port) -> None:
        port.set(IER, 2)
        assert port.get(IIR) == 2  # and reading it has served it
        assert port.get(IIR) == 1
        port.set(THR, 65)
        assert port.irqs[-1] == 1
        assert port.get(IIR) == 2
        assert port.irqs[-1] == 0
        port.set(IER, 0)
        port.set(IER, 2)
        assert port.get(IIR) == 2


class TestInput:
    def test_without_fifo_one_byte_at_a_time(self, port: Port) -> None:
        assert port.receive_bytes(b"xyz") == 1
        assert port.get(LSR) == 0x61
        assert port.receive_bytes(b"yz") == 0
        assert port.get(RBR) == ord("x")
        assert port.get(LSR) == 0x60 and port.accepts == 1
        assert port.receive_bytes(b"yz") == 1
        assert port.get(RBR) == ord("y")

    def test_with_fifo_sixteen(self, port: Port) -> None:
        port.set(FCR, 1)
        data = bytes(range(100, 120))
        assert port.receive_bytes(data) == FIFO_SIZE
        assert [port.get(RBR) for _ in range(FIFO_SIZE)] == list(data[:FIFO_SIZE])
        assert port.get(LSR) == 0x60 and port.get(RBR) == 0

    def test_changing_the_mode_or_asking_empties_the_fifo(self, port: Port) -> None:
        for fcr in (0, 3):
            port.set(FCR, 1)
            port.receive_bytes(b"abc")
            accepts = port.accepts
            port.set(FCR, fcr)
            assert port.get(LSR) == 0x60 and port.accepts == accepts + 1
            assert port.receive_bytes(b"d") == 1
            assert port.get(RBR) == ord("d")

    @pytest.mark.parametrize(("trigger", "level"), [(0, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
    def test_trigger_levels(self, port: Port, trigger: int, level: int) -> None:
        port.set(FCR, trigger | 1)
        port.set(IER, 1)
        identities = []
        for _ in range(FIFO_SIZE):
            port.receive_bytes(b"x")
            identities.append(port.get(IIR))
        assert identities == [0xCC] * (level - 1) + [0xC4] * (FIFO_SIZE + 1 - level)
        assert port.irqs[-1] == 1
        for _ in range(FIFO_SIZE):
            port.get(RBR)
        assert port.get(IIR) == 0xC1 and port.irqs[-1] == 0

    def test_urgency(self, port: Port) -> None:
        """Line status, then data, then the empty transmitter."""
        port.set(MCR, 0x10)
        port.set(IER, 7)
        port.set(THR, 1)
        port.set(THR, 2)
        assert port.get(IIR) == 6
        assert port.get(LSR) == 0x63  # overrun, and reading it has cleared it
        assert port.get(IIR) == 4
        assert port.get(RBR) == 2
        assert port.get(IIR) == 2
        assert port.get(IIR) == 1


class TestLoopback:
    def test_what_is_sent_comes_back_and_goes_nowhere(self, port: Port) -> None:
        port.set(MCR, 0x1F)
        port.set(THR, 0xA5)
        assert port.sent == b"" and port.get(LSR) == 0x61 and port.get(RBR) == 0xA5

    @pytest.mark.parametrize(("mcr", "msr"), [(0, 0), (1, 0x20), (2, 0x10), (4, 0x40), (8, 0x80), (0xF, 0xF0)])
    def test_modem_outputs_are_its_inputs(self, port: Port, mcr: int, msr: int) -> None:
        port.set(MCR, 0x10 | mcr)
        assert port.get(MSR) == msr

    def test_the_line_is_cut_off(self, port: Port) -> None:
        port.set(MCR, 0x10)
        assert port.receive_bytes(b"x") == 0
        port.set(MCR, 0)
        assert port.receive_bytes(b"x") == 1

    def test_overrun(self, port: Port) -> None:
        port.set(MCR, 0x10)
        port.set(FCR, 1)
        for byte in range(FIFO_SIZE + 1):
            port.set(THR, byte)
        assert port.get(LSR) == 0x63
        assert [port.get(RBR) for _ in range(FIFO_SIZE)] == list(range(FIFO_SIZE))
