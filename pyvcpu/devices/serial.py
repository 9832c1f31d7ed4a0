"""A 16550A serial port, polled. Output goes out at once, so the transmitter is always empty.

    offset    DLAB = 0 read / write           DLAB = 1
    0         RBR / THR                       divisor low
    1         IER                             divisor high
    2         IIR / FCR
    3         LCR (bit 7 is DLAB)     4  MCR (bit 4: loopback)     5  LSR     6  MSR     7  SCR

    IIR, most urgent first    6 line status (overrun)    4 data, or FIFO at its trigger level
                              C data in the FIFO, below that level (the 4-character timeout passes at once)
                              2 transmitter empty         1 nothing                  | C0 with FIFOs on

State has QEMU's field names and reset values (a 16550A of QEMU 7.2 answers the same, access for access). The
interrupt line is computed, and offered as ``on_irq``, though nothing is wired to it yet.

Source: National Semiconductor PC16550D data sheet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

PORT = 0x3F8

IER_RECEIVED, IER_EMPTY, IER_LINE = 1, 2, 4
IIR_NONE, IIR_EMPTY, IIR_RECEIVED, IIR_LINE, IIR_TIMEOUT, IIR_FIFO = 1, 2, 4, 6, 0xC, 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVER, FCR_CLEAR_TRANSMITTER = 1, 2, 4
LCR_DLAB, MCR_LOOPBACK, MCR_OUT2 = 0x80, 0x10, 8
LSR_DATA, LSR_OVERRUN, LSR_THRE, LSR_TEMT = 1, 2, 0x20, 0x40
LSR_ERRORS = 0x1E
FIFO_SIZE = 16
_TRIGGER_LEVELS = (1, 4, 8, 14)


class Serial16550:
    """``output(data)`` is called with each byte that the guest sends, as bytes of length 1.

    ``on_irq(level)`` follows the interrupt line; ``on_accept()`` is called when the guest has made room for input.
    """

    def __init__(self, output: Callable[[bytes], None]) -> None:
        self.output = output
        self.on_irq: Callable[[int], None] = lambda level: None
        self.on_accept: Callable[[], None] = lambda: None
        self.receive_fifo: deque[int] = deque()
        self.reset()

    def reset(self) -> None:
        """Power-up state; the modem-status inputs say that somebody is there."""
        self.divider = 12
        self.rbr = self.ier = self.lcr = self.scr = self.fcr = 0
        self.iir = IIR_NONE
        self.mcr = MCR_OUT2
        self.lsr = LSR_THRE | LSR_TEMT
        self.msr = 0xB0
        self.thr_ipending = 0
        self.receive_fifo.clear()
        self.on_irq(0)

    # -- from outside -------------------------------------------------------------------------

    def receive_bytes(self, data: bytes) -> int:
        """Bytes arrive on the line. As many as fit are taken, and their number returned: none is ever lost.

        In loopback the line is cut off, so none is taken. At a region edge only, as the guest sees it at once.
        """
        if self.mcr & MCR_LOOPBACK:
            return 0
        taken = 0
        for byte in data:
            if len(self.receive_fifo) == FIFO_SIZE if self.fcr & FCR_ENABLE else self.lsr & LSR_DATA:
                break
            self._receive(byte)
            taken += 1
        return taken

    @property
    def timeout_ipending(self) -> int:
        """1 while there is data in the FIFO, but less than its trigger level."""
        return int(bool(self.fcr & FCR_ENABLE) and 0 < len(self.receive_fifo) < _TRIGGER_LEVELS[self.fcr >> 6])

    def _receive(self, byte: int) -> None:
        if not self.fcr & FCR_ENABLE:
            if self.lsr & LSR_DATA:
                self.lsr |= LSR_OVERRUN
            self.rbr = byte
        elif len(self.receive_fifo) == FIFO_SIZE:
            self.lsr |= LSR_OVERRUN  # the FIFO keeps what it has
        else:
            self.receive_fifo.append(byte)
        self.lsr |= LSR_DATA
        self._update_irq()

    # -- ports --------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Read ``size`` registers from ``offset`` on, one byte each; what lies beyond the last is all ones."""
        if size == 1:
            return self._read(offset)
        return sum((self._read(offset + i) if offset + i < 8 else 0xFF) << 8 * i for i in range(size))

    def write(self, offset: int, size: int, value: int) -> None:
        """The opposite of :meth:`read`."""
        for i in range(min(size, 8 - offset)):
            self._write(offset + i, value >> 8 * i & 0xFF)

    def _read(self, offset: int) -> int:
        if offset < 2 and self.lcr & LCR_DLAB:
            return self.divider >> 8 * offset & 0xFF
        match offset:
            case 0:
                return self._take()
            case 2:
                value = self.iir
                if value & 6 == IIR_EMPTY:
                    self.thr_ipending = 0
                    self._update_irq()
                return value
            case 5:
                value = self.lsr
                self.lsr &= ~LSR_ERRORS
                self._update_irq()
                return value
            case 6 if self.mcr & MCR_LOOPBACK:
                # DTR RTS OUT1 OUT2 come back as DSR CTS RI DCD.
                return (self.mcr & 0xC) << 4 | (self.mcr & 2) << 3 | (self.mcr & 1) << 5
        return (0, self.ier, 0, self.lcr, self.mcr, 0, self.msr, self.scr)[offset]

    def _take(self) -> int:
        if self.fcr & FCR_ENABLE:
            value = self.receive_fifo.popleft() if self.receive_fifo else 0
        else:
            value = self.rbr
        if not self.receive_fifo:
            self.lsr &= ~LSR_DATA
        self._update_irq()
        if not self.mcr & MCR_LOOPBACK:
            self.on_accept()
        return value

    def _write(self, offset: int, value: int) -> None:
        if offset < 2 and self.lcr & LCR_DLAB:
            self.divider = self.divider & 0xFF00 >> 8 * offset | value << 8 * offset
            return
        match offset:
            case 0:
                self._send(value)
            case 1:
                if (value ^ self.ier) & IER_EMPTY:  # switched on while the transmitter is empty, which it is: pending
                    self.thr_ipending = value >> 1 & 1
                self.ier = value & 0xF
                self._update_irq()
            case 2:
                self._control_fifo(value)
            case 3:
                self.lcr = value
            case 4:
                self.mcr = value & 0x1F
            case 7:
                self.scr = value

    def _send(self, value: int) -> None:
        self.thr_ipending = 1
        if self.mcr & MCR_LOOPBACK:
            self._receive(value)
        else:
            self.output(bytes([value]))
            self._update_irq()

    def _control_fifo(self, value: int) -> None:
        if (value ^ self.fcr) & FCR_ENABLE:
            value |= FCR_CLEAR_RECEIVER | FCR_CLEAR_TRANSMITTER  # changing the mode empties the FIFOs
        if value & FCR_CLEAR_RECEIVER:
            self.receive_fifo.clear()
            self.lsr &= ~LSR_DATA
        if value & FCR_CLEAR_TRANSMITTER:
            self.thr_ipending = 1
        self.fcr = value & 0xC9
        self._update_irq()
        if value & FCR_CLEAR_RECEIVER:
            self.on_accept()

    def _update_irq(self) -> None:
        identity = IIR_NONE
        if self.ier & IER_LINE and self.lsr & LSR_ERRORS:
            identity = IIR_LINE
        elif self.ier & IER_RECEIVED and self.timeout_ipending:
            identity = IIR_TIMEOUT
        elif self.ier & IER_RECEIVED and self.lsr & LSR_DATA:
            identity = IIR_RECEIVED
        elif self.ier & IER_EMPTY and self.thr_ipending:
            identity = IIR_EMPTY
        self.iir = identity | (IIR_FIFO if self.fcr & FCR_ENABLE else 0)
        self.on_irq(int(identity != IIR_NONE))
