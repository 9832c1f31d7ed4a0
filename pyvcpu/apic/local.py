"""The local APIC in xAPIC mode: one page of registers, interrupts by priority, a timer.

    020 ID        080 TPR       0D0 LDR       100-170 ISR   280 ESR       320 LVT timer     380 initial count
    030 version   0A0 PPR       0E0 DFR       180-1F0 TMR   300 ICR low   330 .. 370 LVT    390 current count
                  0B0 EOI       0F0 SVR       200-270 IRR   310 ICR high  (see LVT_*)       3E0 divider

    raise_vector -> IRR --[class above PPR]--> acknowledge -> ISR --EOI--> gone

Registers are 32 bits wide, one every 16 bytes. Attributes have the names and meanings of QEMU's section
"apic", which :mod:`pyvcpu.apic.vmstate` carries. What the manual and QEMU do differently is done as the manual says:
reserved bits stay 0, vectors below 16 are errors, software disable masks the LVT, a divider written while the timer
runs changes its pace from there on.

Source: SDM 3A chapter 10 (Advanced Programmable Interrupt Controller).
"""

from __future__ import annotations

from collections.abc import Callable

from pyvcpu.apic.timer import LVT_MASKED, ApicTimer, count_shift
from pyvcpu.clock import Clock
from pyvcpu.errors import UnsupportedOperation

DEFAULT_BASE = 0xFEE00000
BASE_BSP, BASE_X2APIC, BASE_ENABLE = 1 << 8, 1 << 10, 1 << 11
VERSION = 0x50014
"""Version 14h with 6 LVT entries (bits 16-23: the number of the last), as QEMU's."""

LVT_TIMER, LVT_THERMAL, LVT_PERF, LVT_LINT0, LVT_LINT1, LVT_ERROR = range(6)
LVT_BITS = (0x310FF, 0x117FF, 0x117FF, 0x1F7FF, 0x1F7FF, 0x110FF)
"""The bits that exist in each; 12 (delivery status) and 14 (remote IRR) are read-only."""
_LVT_READ_ONLY = 1 << 12 | 1 << 14

SVR_ENABLE = 1 << 8
ESR_SEND_ILLEGAL, ESR_RECEIVE_ILLEGAL, ESR_ADDRESS = 1 << 5, 1 << 6, 1 << 7
FIXED, LOWEST_PRIORITY, SMI, _, NMI, INIT, STARTUP, EXTINT = range(8)
_ICR_BITS = 0x000CCFFF
_ICR_LEVEL, _ICR_TRIGGER_LEVEL = 1 << 14, 1 << 15


class LocalApic:
    """The only local APIC of a machine with one processor.

    ``on_nmi()`` is called for an NMI, ``on_eoi(vector)`` when a level-triggered interrupt ends, ``on_move(base,
    enabled)`` when the guest moves the page or switches it off.
    """

    def __init__(self, clock: Clock, apic_id: int = 0) -> None:
        self.clock = clock
        self._initial_id = apic_id
        self.on_nmi: Callable[[], None] = lambda: None
        self.on_eoi: Callable[[int], None] = lambda vector: None
        self.on_move: Callable[[int, bool], None] = lambda base, enabled: None
        self.timer = ApicTimer(self, clock)
        self.apicbase = DEFAULT_BASE | BASE_BSP | BASE_ENABLE
        self._init()

    def reset(self) -> None:
        """The state after power-up or reset (SDM 3A 10.4.7.1)."""
        self._init()
        self.apicbase = DEFAULT_BASE | BASE_BSP | BASE_ENABLE
        self.on_move(self.base, True)

    def _init(self) -> None:
        self.id, self.arb_id = self._initial_id, 0
        self.tpr = 0
        self.spurious_vec = 0xFF
        self.log_dest, self.dest_mode = 0, 0xF
        self.isr, self.tmr, self.irr = [0] * 8, [0] * 8, [0] * 8
        self.lvt = [LVT_MASKED] * 6
        self.esr = 0
        self.esr_pending = 0  # errors since the last write to ESR, which that write makes visible
        self.icr = [0, 0]
        self.divide_conf, self.count_shift = 0, count_shift(0)
        self.initial_count = self.initial_count_load_time = self.next_time = 0
        self.timer_expiry = -1
        self.timer.rearm()

    def post_load(self) -> None:
        """The attributes came from a stream: arm the timer, show the page where it belongs."""
        self.timer.rearm()
        self.on_move(self.base, self.hardware_enabled)

    # -- enabling and the base ----------------------------------------------------------------

    @property
    def base(self) -> int:
        """Guest physical address of the register page."""
        return self.apicbase & 0xFFFFF000

    @property
    def hardware_enabled(self) -> bool:
        """IA32_APIC_BASE bit 11: the page is there, CPUID reports an APIC."""
        return bool(self.apicbase & BASE_ENABLE)

    @property
    def enabled(self) -> bool:
        """Interrupts are accepted and delivered: enabled both in IA32_APIC_BASE and in SVR."""
        return bool(self.apicbase & BASE_ENABLE and self.spurious_vec & SVR_ENABLE)

    def get_base(self) -> int:
        """RDMSR of IA32_APIC_BASE (1Bh)."""
        return self.apicbase

    def set_base(self, value: int) -> None:
        """WRMSR of IA32_APIC_BASE. ValueError for reserved bits, which x2APIC's is too: #GP(0).

        The BSP flag stays as it is. UnsupportedOperation for an address that the wire format cannot hold.
        """
        if value & (0x2FF | BASE_X2APIC) or value >> 40:
            raise ValueError(f"IA32_APIC_BASE: reserved bits in {value:#x}")
        if value >> 32:
            raise UnsupportedOperation(f"a local APIC at {value & ~0xFFF:#x}, above 4 GiB")
        was_enabled = self.hardware_enabled
        if was_enabled and not value & BASE_ENABLE:
            self._init()  # SDM 3A 10.4.3: it is enabled again in the state after reset
        old = self.apicbase
        self.apicbase = value & (0xFFFFF000 | BASE_ENABLE) | old & BASE_BSP
        if self.apicbase != old:
            self.on_move(self.base, self.hardware_enabled)

    # -- priorities ---------------------------------------------------------------------------

    @property
    def ppr(self) -> int:
        """The processor priority: TPR, or the class of what is in service if that is higher (SDM 3A 10.8.3.1)."""
        in_service = max(_highest(self.isr), 0) & 0xF0
        return self.tpr if (self.tpr & 0xF0) >= in_service else in_service

    def pending_vector(self) -> int:
        """The vector that would be delivered now, or -1. RFLAGS.IF is not looked at."""
        vector = _highest(self.irr)
        if vector < 0 or not self.enabled or vector >> 4 <= self.ppr >> 4:
            return -1
        return vector

    def acknowledge(self) -> int:
        """The processor takes an interrupt: it is in service from here on.

        Returns its vector, or the spurious vector where nothing can be delivered any more.
        """
        vector = self.pending_vector()
        if vector < 0:
            return self.spurious_vec & 0xFF
        self.irr[vector >> 5] &= ~(1 << (vector & 31))
        self.isr[vector >> 5] |= 1 << (vector & 31)
        return vector

    def get_cr8(self) -> int:
        """MOV from CR8: the class in TPR."""
        return self.tpr >> 4

    def set_cr8(self, value: int) -> None:
        """MOV to CR8 (the caller has refused bits above 3)."""
        self.tpr = (value & 0xF) << 4

    def _eoi(self) -> None:
        vector = _highest(self.isr)
        if vector < 0:
            return
        word, bit = vector >> 5, 1 << (vector & 31)
        self.isr[word] &= ~bit
        if self.tmr[word] & bit:
            self.on_eoi(vector)

    # -- interrupts arrive --------------------------------------------------------------------

    def raise_vector(self, vector: int, level: bool = False) -> None:
        """An interrupt for this processor. Vectors 0 to 15 are an error (SDM 3A 10.5.2), not an interrupt."""
        if not self.enabled:
            return
        if vector < 16:
            self._error(ESR_RECEIVE_ILLEGAL)
            return
        word, bit = vector >> 5, 1 << (vector & 31)
        self.irr[word] |= bit
        if level:
            self.tmr[word] |= bit
        else:
            self.tmr[word] &= ~bit

    def local_interrupt(self, index: int) -> None:
        """The source of LVT entry ``index`` asks for its interrupt."""
        entry = self.lvt[index]
        if entry & LVT_MASKED:
            return
        self._deliver(entry >> 8 & 7 if index not in (LVT_TIMER, LVT_ERROR) else FIXED, entry & 0xFF)

    def _deliver(self, mode: int, vector: int) -> None:
        if mode in (FIXED, LOWEST_PRIORITY):
            self.raise_vector(vector)
        elif mode == NMI:
            self.on_nmi()
        elif mode == SMI:
            raise UnsupportedOperation("the local APIC was asked for an SMI; there is no system management mode")
        elif mode == INIT:
            raise UnsupportedOperation("the local APIC was asked for an INIT of the only processor")
        # A start-up IPI is ignored by a processor that runs; ExtINT needs a PIC, and there is none.

    def _error(self, bit: int) -> None:
        """SDM 3A 10.5.3. The error interrupt comes once, until ESR is written."""
        first = not self.esr_pending
        self.esr_pending |= bit
        if first:
            self.local_interrupt(LVT_ERROR)

    def _send(self) -> None:
        """ICR low was written (SDM 3A 10.6)."""
        low = self.icr[0]
        mode, vector, shorthand = low >> 8 & 7, low & 0xFF, low >> 18 & 3
        if mode == INIT and low & _ICR_TRIGGER_LEVEL and not low & _ICR_LEVEL:
            return  # INIT level de-assert: only arbitration IDs, which a single processor does not need
        if mode in (FIXED, LOWEST_PRIORITY) and vector < 16:
            self._error(ESR_SEND_ILLEGAL)
        # Whom it reaches beside ourselves is nobody: the machine has one processor.
        if shorthand in (1, 2) or (shorthand == 0 and self._is_destination(self.icr[1] >> 24, bool(low & 1 << 11))):
            self._deliver(mode, vector)

    def _is_destination(self, destination: int, logical: bool) -> bool:
        if destination == 0xFF:
            return True
        if not logical:
            return destination == self.id
        if self.dest_mode == 0xF:  # flat: a bit for each
            return bool(destination & self.log_dest)
        if self.dest_mode == 0:  # cluster: a number, and a bit within it
            return destination >> 4 == self.log_dest >> 4 and bool(destination & self.log_dest & 0xF)
        return False

    # -- registers ----------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Read a register. Only aligned 32-bit accesses are defined; others read as 0, as QEMU's."""
        if size != 4:
            return 0
        index = offset >> 4 & 0xFF
        if 0x10 <= index <= 0x27:
            return (self.isr, self.tmr, self.irr)[index - 0x10 >> 3][index & 7]
        if 0x32 <= index <= 0x37:
            return self.lvt[index - 0x32]
        match index:
            case 0x02:
                return self.id << 24
            case 0x03:
                return VERSION
            case 0x08:
                return self.tpr
            case 0x0A:
                return self.ppr
            case 0x09 | 0x0B | 0x0C:  # arbitration priority, EOI, remote read: nothing to be read
                return 0
            case 0x0D:
                return self.log_dest << 24
            case 0x0E:
                return self.dest_mode << 28 | 0x0FFFFFFF
            case 0x0F:
                return self.spurious_vec
            case 0x28:
                return self.esr
            case 0x30 | 0x31:
                return self.icr[index & 1]
            case 0x38:
                return self.initial_count
            case 0x39:
                return self.timer.current_count()
            case 0x3E:
                return self.divide_conf
        self._error(ESR_ADDRESS)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register; writes to read-only ones, and of another size than 4, are ignored."""
        if size != 4:
            return
        index = offset >> 4 & 0xFF
        if 0x32 <= index <= 0x37:
            self._write_lvt(index - 0x32, value)
            return
        match index:
            case 0x02:
                self.id = value >> 24
            case 0x08:
                self.tpr = value & 0xFF
            case 0x0B:
                self._eoi()
            case 0x0D:
                self.log_dest = value >> 24
            case 0x0E:
                self.dest_mode = value >> 28
            case 0x0F:
                self._write_svr(value)
            case 0x28:
                self.esr, self.esr_pending = self.esr_pending, 0
            case 0x30:
                self.icr[0] = value & _ICR_BITS
                self._send()
            case 0x31:
                self.icr[1] = value & 0xFF000000
            case 0x38:
                self.timer.load(value)
            case 0x3E:
                self.timer.set_divider(value & 0xB)
            case 0x03 | 0x09 | 0x0A | 0x0C | 0x39:
                pass
            case _:
                if not 0x10 <= index <= 0x27:
                    self._error(ESR_ADDRESS)

    def _write_lvt(self, index: int, value: int) -> None:
        value = value & LVT_BITS[index] & ~_LVT_READ_ONLY
        if not self.spurious_vec & SVR_ENABLE:
            value |= LVT_MASKED
        if index == LVT_TIMER:
            self.timer.set_entry(value)
        else:
            self.lvt[index] = value

    def _write_svr(self, value: int) -> None:
        self.spurious_vec = value & 0x1FF
        if not self.spurious_vec & SVR_ENABLE:
            # SDM 3A 10.4.7.2: while it is disabled by software all mask bits are set.
            self.lvt = [entry | LVT_MASKED for entry in self.lvt]
            self.timer.update(self.clock.now())


def _highest(words: list[int]) -> int:
    """The highest vector whose bit is set in a 256-bit register, or -1."""
    for index in range(7, -1, -1):
        if words[index]:
            return 32 * index + words[index].bit_length() - 1
    return -1
