"""The local APIC in xAPIC mode: one page of registers at FEE00000 (SDM 3A chapter 10).

    020 ID        080 TPR   0B0 EOI   0F0 SVR             280 ESR      320 LVT timer    380 initial count
    030 version   090 APR   0D0 LDR   100-170 ISR         300 ICR low  330 .. 370       390 current count
                  0A0 PPR   0E0 DFR   180-1F0 TMR         310 ICR high LVT thermal,     3E0 divide
                                      200-270 IRR                      perf, LINT0,1, error

The state has QEMU's field names, because it is what goes over the wire. Bits of ISR, TMR and
IRR: vector v is bit v & 31 of word v >> 5. An interrupt is taken when its priority class (vector >> 4)
is above that of PPR, the higher of TPR and of what is in service.

Errors collect in ESR until reset and a write of ESR leaves them, as in QEMU.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvcpu.apic.timer import LVT_MASKED, ApicTimer, count_shift
from pyvcpu.clock import Clock
from pyvcpu.errors import PyvcpuError

VERSION = 0x50014
"""Six LVT entries (highest index 5), version 14H: integrated APIC, as QEMU's."""

DEFAULT_BASE = 0xFEE00000
BASE_BSP, BASE_EXTD, BASE_ENABLE = 1 << 8, 1 << 10, 1 << 11
_BASE_ADDRESS = (1 << 40) - 1 & ~0xFFF  # MAXPHYADDR 40

SVR_ENABLE = 1 << 8
LVT_TIMER, LVT_THERMAL, LVT_PERFORMANCE, LVT_LINT0, LVT_LINT1, LVT_ERROR = range(6)
FIXED, LOWEST, SMI, NMI_MODE, INIT, STARTUP, EXTINT = 0, 1, 2, 4, 5, 6, 7
ESR_SEND_ILLEGAL, ESR_RECEIVE_ILLEGAL, ESR_ILLEGAL_REGISTER = 0x20, 0x40, 0x80

# Bits of each LVT entry that can be written.
_LVT_WRITABLE = (0x300FF, 0x107FF, 0x107FF, 0x1F7FF, 0x1F7FF, 0x100FF)


class LocalApic:
    """One processor's APIC. ``on_nmi`` is called for an NMI; ``on_move(base, enabled)`` when the page moves."""

    def __init__(self, clock: Clock, apic_id: int = 0) -> None:
        self.clock = clock
        self._initial_id = apic_id
        self.on_nmi: Callable[[], None] = lambda: None
        self.on_move: Callable[[int, bool], None] = lambda base, enabled: None
        self.timer = ApicTimer(self, clock)
        self.apicbase = DEFAULT_BASE | BASE_BSP | BASE_ENABLE
        self.reset()

    def reset(self) -> None:
        """Power-up state (SDM 3A 10.4.7.1)."""
        self.apicbase = DEFAULT_BASE | BASE_ENABLE | BASE_BSP
        self.id = self._initial_id
        self.arb_id = 0
        self.tpr = 0
        self.spurious_vec = 0xFF
        self.log_dest = 0
        self.dest_mode = 0xF
        self.isr, self.tmr, self.irr = [0] * 8, [0] * 8, [0] * 8
        self.lvt = [LVT_MASKED] * 6
        self.esr = 0
        self.icr = [0, 0]
        self.divide_conf = 0
        self.count_shift = count_shift(0)
        self.initial_count = 0
        self.initial_count_load_time = 0
        self.next_time = 0
        self.timer_expiry = -1
        self.timer.rearm()
        self.on_move(self.base, True)

    def post_load(self) -> None:
        """The fields were set from outside: move the page and arm the timer accordingly."""
        self.on_move(self.base, bool(self.apicbase & BASE_ENABLE))
        self.timer.rearm()

    # -- what the processor asks --------------------------------------------------------------

    @property
    def base(self) -> int:
        """Guest physical address of the register page."""
        return self.apicbase & _BASE_ADDRESS

    @property
    def enabled(self) -> bool:
        """Enabled in IA32_APIC_BASE and, by software, in SVR."""
        return bool(self.apicbase & BASE_ENABLE and self.spurious_vec & SVR_ENABLE)

    def pending_vector(self) -> int:
        """The vector that would be delivered now, or -1."""
        irr = self.irr
        if not (irr[7] | irr[6] | irr[5] | irr[4] | irr[3] | irr[2] | irr[1] | irr[0]) or not self.enabled:
            return -1
        vector = _highest(irr)
        return vector if vector >> 4 > self.ppr >> 4 else -1

    def acknowledge(self) -> int:
        """Take the pending interrupt into service; the spurious vector if there is none any more."""
        vector = self.pending_vector()
        if vector < 0:
            return self.spurious_vec & 0xFF
        _clear(self.irr, vector)
        _set(self.isr, vector)
        return vector

    @property
    def ppr(self) -> int:
        """The processor priority register."""
        in_service = max(_highest(self.isr), 0)
        return self.tpr if self.tpr >> 4 >= in_service >> 4 else in_service & 0xF0

    def get_cr8(self) -> int:
        """CR8: the upper half of TPR."""
        return self.tpr >> 4

    def set_cr8(self, value: int) -> None:
        self.tpr = (value & 0xF) << 4

    def set_base(self, value: int) -> None:
        """Write IA32_APIC_BASE. Raises ValueError where the processor raises #GP: reserved bits, x2APIC mode."""
        if value & ~(_BASE_ADDRESS | BASE_BSP | BASE_ENABLE):
            raise ValueError(f"IA32_APIC_BASE {value:#x}: reserved bits")
        self.apicbase = value
        if not value & BASE_ENABLE:
            self.spurious_vec &= ~SVR_ENABLE
        self.on_move(self.base, bool(value & BASE_ENABLE))

    # -- interrupts in ------------------------------------------------------------------------

    def raise_vector(self, vector: int, level: bool = False) -> None:
        """Request a fixed interrupt. Vectors 0 to 15 are illegal and go to ESR."""
        if vector < 16:
            self._error(ESR_RECEIVE_ILLEGAL)
            return
        _set(self.irr, vector)
        (_set if level else _clear)(self.tmr, vector)

    def local_interrupt(self, entry: int) -> None:
        """A local source fires: deliver as its LVT entry says."""
        lvt = self.lvt[entry]
        if lvt & LVT_MASKED:
            return
        mode = lvt >> 8 & 7 if entry not in (LVT_TIMER, LVT_ERROR) else FIXED
        if mode == FIXED:
            self.raise_vector(lvt & 0xFF, bool(lvt & 1 << 15) and entry in (LVT_LINT0, LVT_LINT1))
        elif mode == NMI_MODE:
            self.on_nmi()

    def _error(self, bit: int) -> None:
        self.esr |= bit
        if not self.lvt[LVT_ERROR] & LVT_MASKED and self.lvt[LVT_ERROR] & 0xFF >= 16:
            self.raise_vector(self.lvt[LVT_ERROR] & 0xFF)

    # -- the register page --------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """A 32-bit register; narrower reads give 0, as in QEMU (undefined in the SDM)."""
        if size < 4:
            return 0
        index = offset >> 4
        if 0x10 <= index <= 0x27:
            return (self.isr, self.tmr, self.irr)[(index - 0x10) >> 3][index & 7]
        if 0x32 <= index <= 0x37:
            return self.lvt[index - 0x32]
        reader = _READERS.get(index)
        if reader is None:
            self._error(ESR_ILLEGAL_REGISTER)
            return 0
        return reader(self)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a 32-bit register; narrower writes are ignored."""
        if size < 4:
            return
        value &= 0xFFFFFFFF
        index = offset >> 4
        if 0x32 <= index <= 0x37:
            self._write_lvt(index - 0x32, value)
            return
        writer = _WRITERS.get(index)
        if writer is not None:
            writer(self, value)
        elif index not in _READERS and not 0x10 <= index <= 0x27:
            self._error(ESR_ILLEGAL_REGISTER)

    def _write_lvt(self, entry: int, value: int) -> None:
        value &= _LVT_WRITABLE[entry]
        if not self.spurious_vec & SVR_ENABLE:
            value |= LVT_MASKED  # SDM 3A 10.4.7.2: while disabled by software the mask bits stay set
        self.lvt[entry] = value
        if entry == LVT_TIMER:
            self.timer.update(self.clock.now())

    def _write_svr(self, value: int) -> None:
        self.spurious_vec = value & 0x1FF
        if not value & SVR_ENABLE:
            self.lvt = [lvt | LVT_MASKED for lvt in self.lvt]
            self.timer.update(self.clock.now())

    def _write_eoi(self, value: int) -> None:
        vector = _highest(self.isr)
        if vector >= 0:
            _clear(self.isr, vector)

    def _write_divide(self, value: int) -> None:
        self.divide_conf = value & 0xB
        self.count_shift = count_shift(self.divide_conf)
        self.timer.update(self.clock.now())

    def _write_icr(self, value: int) -> None:
        """Send an interrupt: this processor is the only one, so what is meant for others is lost."""
        self.icr[0] = value & ~(1 << 12)  # delivery status: idle
        mode, vector = value >> 8 & 7, value & 0xFF
        if mode == INIT and value >> 14 & 3 == 2:
            return  # INIT level de-assert only synchronises arbitration ids
        if not self._addressed(value):
            return
        if mode in (FIXED, LOWEST):
            if vector < 16:
                self._error(ESR_SEND_ILLEGAL)
            else:
                self.raise_vector(vector, bool(value & 1 << 15))
        elif mode == NMI_MODE:
            self.on_nmi()
        elif mode != STARTUP:  # a start-up IPI to a processor that runs is ignored
            raise PyvcpuError(f"local APIC: delivery mode {mode} (ICR {value:#x}) to the only processor is not there yet")

    def _addressed(self, value: int) -> bool:
        """Whether an ICR value names this processor (SDM 3A 10.6.2)."""
        shorthand = value >> 18 & 3
        if shorthand:
            return shorthand != 3  # 1 self, 2 all, 3 all but self
        destination = self.icr[1] >> 24
        if destination == 0xFF or not value & 1 << 11:
            return destination in (0xFF, self.id)
        if self.dest_mode == 0xF:
            return bool(destination & self.log_dest)
        return destination >> 4 == self.log_dest >> 4 and bool(destination & self.log_dest & 0xF)


def _set_tpr(apic: LocalApic, value: int) -> None:
    apic.tpr = value & 0xFF


def _set_id(apic: LocalApic, value: int) -> None:
    apic.id = value >> 24


def _set_log_dest(apic: LocalApic, value: int) -> None:
    apic.log_dest = value >> 24


def _set_dest_mode(apic: LocalApic, value: int) -> None:
    apic.dest_mode = value >> 28


def _set_icr_high(apic: LocalApic, value: int) -> None:
    apic.icr[1] = value


def _nothing(apic: LocalApic, value: int) -> None:
    """ESR: a write updates it, and it is always up to date."""


_READERS: dict[int, Callable[[LocalApic], int]] = {
    0x02: lambda a: a.id << 24,
    0x03: lambda a: VERSION,
    0x08: lambda a: a.tpr,
    0x09: lambda a: a.ppr,
    0x0A: lambda a: a.ppr,
    0x0B: lambda a: 0,
    0x0D: lambda a: a.log_dest << 24,
    0x0E: lambda a: a.dest_mode << 28 | 0xFFFFFFF,
    0x0F: lambda a: a.spurious_vec,
    0x28: lambda a: a.esr,
    0x30: lambda a: a.icr[0],
    0x31: lambda a: a.icr[1],
    0x38: lambda a: a.initial_count,
    0x39: lambda a: a.timer.current_count(),
    0x3E: lambda a: a.divide_conf,
}
_WRITERS: dict[int, Callable[[LocalApic, int], None]] = {
    0x02: _set_id,
    0x08: _set_tpr,
    0x0B: LocalApic._write_eoi,
    0x0D: _set_log_dest,
    0x0E: _set_dest_mode,
    0x0F: LocalApic._write_svr,
    0x28: _nothing,
    0x30: LocalApic._write_icr,
    0x31: _set_icr_high,
    0x38: lambda a, value: a.timer.load(value),
    0x3E: LocalApic._write_divide,
}


def _highest(words: list[int]) -> int:
    """The highest vector whose bit is set, or -1."""
    for at in range(7, -1, -1):
        if words[at]:
            return 32 * at + words[at].bit_length() - 1
    return -1


def _set(words: list[int], vector: int) -> None:
    words[vector >> 5] |= 1 << (vector & 31)


def _clear(words: list[int], vector: int) -> None:
    words[vector >> 5] &= ~(1 << (vector & 31))
