"""A 16550A serial port, polled. Output goes out at once, so the transmitter is always empty.

    offset    DLAB = 0 read / write           DLAB = 1
    0         RBR / THR                       divisor low
    1         IER                             divisor high
    2         IIR / FCR
    3         LCR (bit 7 is DLAB)     4  MCR (bit 4: loopback)     5  LSR     6  MSR     7  SCR

State has QEMU's field names and reset values. The interrupt line is computed, and offered as
``on_irq``, though nothing is wired to it yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

PORT = 0x3F8

IER_RECEIVED, IER_EMPTY = 1, 2
IIR_NONE, IIR_EMPTY, IIR_RECEIVED, IIR_FIFO = 1, 2, 4, 0xC0
LCR_DLAB, MCR_LOOPBACK, MCR_OUT2 = 0x80, 0x10, 8
LSR_DATA, LSR_OVERRUN, LSR_THRE, LSR_TEMT = 1, 2, 0x20, 0x40
FIFO_SIZE = 16


class Serial16550:
    """``output(data)`` is called with each byte that the guest sends, as bytes of length 1."""

    def __init__(self, output: Callable[[bytes], None]) -> None:
        self.output = output
        self.on_irq: Callable[[int], None] = lambda level: None
        self.receive_fifo: deque[int] = deque()
        self.reset()

    def reset(self) -> None:
        self.divider = 12
        self.rbr = self.ier = self.lcr = self.scr = self.fcr = 0
        self.iir = IIR_NONE
        self.mcr = MCR_OUT2
        self.lsr = LSR_THRE | LSR_TEMT
        self.msr = 0xB0
        self.thr_ipending = 0
        self.receive_fifo.clear()

    # -- from outside -------------------------------------------------------------------------

    def receive_bytes(self, data: bytes) -> int:
        """Bytes arrive on the line; as many as fit are taken, and their number returned."""
        taken = 0
        for byte in data:
            if not self._receive(byte):
                break
            taken += 1
        return taken

    def _receive(self, byte: int) -> bool:
        if self.fcr & 1:
            if len(self.receive_fifo) >= FIFO_SIZE:
                return False
            self.receive_fifo.append(byte)
        else:
            if self.lsr & LSR_DATA:
                return False
            self.rbr = byte
        self.lsr |= LSR_DATA
        self._update_irq()
        return True

    # -- ports --------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset == 0:
            return self.divider & 0xFF if self.lcr & LCR_DLAB else self._take()
        if offset == 1:
            return self.divider >> 8 if self.lcr & LCR_DLAB else self.ier
        if offset == 2:
            value = self.iir
            if value & 0xF == IIR_EMPTY:
                self.thr_ipending = 0
                self._update_irq()
            return value
        if offset == 6 and self.mcr & MCR_LOOPBACK:
            # DTR RTS OUT1 OUT2 come back as DSR CTS RI DCD.
            return (self.mcr & 0xC) << 4 | (self.mcr & 2) << 3 | (self.mcr & 1) << 5
        if offset == 5:
            value = self.lsr
            self.lsr &= ~LSR_OVERRUN
            return value
        return (0, 0, 0, self.lcr, self.mcr, 0, self.msr, self.scr)[offset]

    def _take(self) -> int:
        if self.fcr & 1:
            value = self.receive_fifo.popleft() if self.receive_fifo else 0
            if not self.receive_fifo:
                self.lsr &= ~LSR_DATA
        else:
            value = self.rbr
            self.lsr &= ~LSR_DATA
        self._update_irq()
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset == 0:
            if self.lcr & LCR_DLAB:
                self.divider = self.divider & 0xFF00 | value
            else:
                self._send(value)
        elif offset == 1:
            if self.lcr & LCR_DLAB:
                self.divider = self.divider & 0xFF | value << 8
            else:
                rising = value & ~self.ier & IER_EMPTY
                self.ier = value & 0xF
                if rising:
                    self.thr_ipending = 1
                self._update_irq()
        elif offset == 2:
            self._control_fifo(value)
        elif offset == 3:
            self.lcr = value
        elif offset == 4:
            self.mcr = value & 0x1F
        elif offset == 7:
            self.scr = value

    def _send(self, value: int) -> None:
        if self.mcr & MCR_LOOPBACK:
            if not self._receive(value):
                self.lsr |= LSR_OVERRUN
        else:
            self.output(bytes([value]))
        self.thr_ipending = 1
        self._update_irq()

    def _control_fifo(self, value: int) -> None:
        if (value ^ self.fcr) & 1 or value & 2:  # changing the mode empties the FIFOs
            self.receive_fifo.clear()
            self.lsr &= ~LSR_DATA
        self.fcr = value & 0xC9
        self._update_irq()

    def _update_irq(self) -> None:
        identity = IIR_NONE
        if self.ier & IER_RECEIVED and self.lsr & LSR_DATA:
            identity = IIR_RECEIVED
        elif self.ier & IER_EMPTY and self.thr_ipending:
            identity = IIR_EMPTY
        self.iir = identity | (IIR_FIFO if self.fcr & 1 else 0)
        self.on_irq(int(identity != IIR_NONE))
