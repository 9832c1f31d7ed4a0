"""The engine: runs a vCPU by translating regions of its code to Python (``--accel interp``).

    run(limit)
      |  at the limit? asked to stop?      -> back to the caller, state whole
      |  timers due, HLT, interrupts       -> delivered between instructions only
      v
    _run_slice(budget)                       budget: up to the next timer or the limit
      |  region = jumps[rip]  ->  region(...)  ->  next rip            the hot path
      |                                        ->  HelperCall: a helper runs on whole state
      |  SlowAccess                            ->  that one instruction again, by slow accessors
      |  GuestException                        ->  delivered through the IDT
      v
    clock.instructions is exact at every arrow

The count: each retired instruction is one, each completed iteration of a REP string instruction is one; a
faulting instruction and an interrupt delivery are none. An event due at count n is taken before
instruction n + 1.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import NoReturn

from iced_x86 import FlowControl, Mnemonic, OpKind, Register

from pyvcpu.accel.base import Accelerator, Exit
from pyvcpu.accel.tcg import flags
from pyvcpu.accel.tcg.builder import Mode
from pyvcpu.accel.tcg.cache import CodeCache, Region
from pyvcpu.accel.tcg.decode import MAX_LENGTH, Insn, decode, is_too_long, may_go_on
from pyvcpu.accel.tcg.helpers import HELPERS
from pyvcpu.accel.tcg.interrupts import deliver_exception, deliver_interrupt
from pyvcpu.accel.tcg.mmu import EFER_LMA, Mmu, NonCanonical, SlowAccess
from pyvcpu.accel.tcg.target.python import HelperCall
from pyvcpu.apic.local import LocalApic
from pyvcpu.clock import NEVER, Clock, IcountClock
from pyvcpu.cpu.events import DB, GP, NMI, UD, GuestException
from pyvcpu.cpu.events import SS as STACK_FAULT
from pyvcpu.cpu.injection import restart_events
from pyvcpu.cpu.layout import CS, DS, ES, MP_HALTED, MP_RUNNABLE, RSP, SS
from pyvcpu.cpu.state import CpuState
from pyvcpu.errors import UnsupportedInstruction
from pyvcpu.memory.bus import Bus
from pyvcpu.memory.pages import PAGE_SHIFT, PAGE_SIZE
from pyvcpu.memory.ram import GuestRam

QUANTUM = 20_000
"""Instructions between two looks at ``request_exit`` and, on the host clock, at the timers: about a millisecond."""

REP_QUANTUM = 1 << 20
"""Iterations of a REP string instruction between two such looks: they are copied in large pieces."""

DESCRIPTOR_L, DESCRIPTOR_DB = 1 << 21, 1 << 22

_OWN_TRAP = frozenset({Mnemonic.SYSCALL, Mnemonic.SYSRET, Mnemonic.SYSRETQ})
"""Their helpers look at TF themselves, when they are done."""


class TcgEngine(Accelerator):
    """A vCPU run by generated Python."""

    name = "interp"

    def __init__(self, state: CpuState, ram: GuestRam, bus: Bus, apic: LocalApic | None, clock: Clock) -> None:
        self.state, self.ram, self.bus, self.apic, self.clock = state, ram, bus, apic, clock
        self.mmu = Mmu(state, ram, bus)
        self.mmu.flushed = self._jumps_dropped
        self.mmu.code_written = self._code_written
        ram.add_code_listener(self._page_of_code_written)
        self.cache = CodeCache()
        self.pace = False  # in HLT on the icount clock: wait in real time instead of skipping at once
        self.budget = 0
        self.iterations = 0
        self._beyond = 0  # instructions up to the next event, beyond the quantum
        self._left = [0]
        self._wake = threading.Event()
        self._exit_requested = False
        self._jumps: dict[int, Region] = {}
        self.mode = Mode(16, 16, False, False)
        self.load_state()

    # -- Accelerator --------------------------------------------------------------------------

    def request_exit(self) -> None:
        """Make :meth:`run` return "request" at the next region edge; from any thread."""
        self._exit_requested = True
        self._wake.set()

    def save_state(self) -> None:
        """Engine -> CpuState: only the lazy flags are not there already."""
        self.get_rflags()

    def load_state(self) -> None:
        """CpuState -> engine: the state was written from outside."""
        restart_events(self.state, self.apic)
        self._take_flags(self.state.rflags)
        self.cache.drop_jumps()
        self.mode_changed()
        self.mmu.flush()

    def flush_tlb(self) -> None:
        self.mmu.flush()

    def run(self, limit: int) -> Exit:
        """Run until ``clock.instructions`` reaches ``limit`` (absolute), or something else ends it."""
        state, clock = self.state, self.clock
        while True:
            if self._exit_requested:
                self._exit_requested = False
                self._wake.clear()
                return "request"
            if clock.instructions >= limit:
                return "limit"
            if state.shutdown:
                return "shutdown"
            if clock.next_deadline() <= clock.now():
                clock.run_due()
            if state.mp_state != MP_RUNNABLE and not self._leave_halt():
                return "halted"
            if state.mp_state != MP_RUNNABLE:
                continue
            if not state.interrupt_shadow:
                self._deliver_pending()
                if state.shutdown or state.mp_state != MP_RUNNABLE:
                    continue
            budget = limit - clock.instructions
            if clock.deterministic:
                budget = min(budget, clock.next_deadline() - clock.now())
                if budget <= 0:  # a device armed a timer for now
                    continue
            self._beyond = min(max(0, budget - QUANTUM), REP_QUANTUM)
            budget = min(budget, QUANTUM)
            if state.rflags & flags.RF:  # it lasts for one instruction; without breakpoints nothing else depends on it
                state.rflags &= ~flags.RF
            if state.interrupt_shadow or state.rflags & flags.TF:
                self._single()
            else:
                self._run_slice(budget)

    # -- what helpers use ---------------------------------------------------------------------

    @property
    def cpl(self) -> int:
        """The current privilege level: DPL of SS (0 in real mode)."""
        return self.state.seg_flags[SS] >> 13 & 3 if self.state.cr0 & 1 else 0

    @property
    def mode_name(self) -> str:
        if not self.state.cr0 & 1:
            return "real"
        if self.state.efer & EFER_LMA:
            return "long64" if self.mode.bits == 64 else f"compatibility{self.mode.bits}"
        return f"protected{self.mode.bits}"

    def get_rflags(self) -> int:
        """RFLAGS with the arithmetic flags worked out."""
        state = self.state
        image = flags.image(state.cc_op, state.cc_dst, state.cc_src)
        state.rflags = (state.rflags & ~flags.ARITHMETIC) | image
        state.cc_op, state.cc_src = flags.CC_EFLAGS, image
        return int(state.rflags)

    def set_rflags(self, value: int) -> None:
        """Replace RFLAGS as a whole; bit 1 is always 1."""
        self.state.rflags = value | 2
        self._take_flags(value)

    def _take_flags(self, value: int) -> None:
        self.state.cc_op, self.state.cc_dst, self.state.cc_src = flags.CC_EFLAGS, 0, value & flags.ARITHMETIC

    def mode_changed(self) -> None:
        """CS, SS, CR0, CR4, EFER or a segment base changed: what code means may have changed with it."""
        state = self.state
        protected = bool(state.cr0 & 1)
        if state.efer & EFER_LMA and state.seg_flags[CS] & DESCRIPTOR_L:
            bits = stack = 64
            flat = True
        else:
            bits = 32 if state.seg_flags[CS] & DESCRIPTOR_DB else 16
            stack = 32 if state.seg_flags[SS] & DESCRIPTOR_DB else 16
            flat = not (state.seg_base[ES] or state.seg_base[CS] or state.seg_base[SS] or state.seg_base[DS])
        self.mode = Mode(bits, stack, protected, flat)
        self.mmu.long = bool(state.efer & EFER_LMA)
        self.mmu.set_user(self.cpl == 3)
        self._base = 0 if bits == 64 else state.seg_base[CS]
        self._jumps = self.cache.jumps.setdefault((self.mode, self._base, self.mmu.user), {})

    # -- events -------------------------------------------------------------------------------

    def _deliver_pending(self) -> None:
        """NMI before maskable interrupts (SDM 3A 6.9, table 6-2)."""
        state = self.state
        if state.nmi_pending and not state.nmi_masked:
            state.nmi_pending = 0
            state.nmi_masked = 1
            state.mp_state = MP_RUNNABLE
            deliver_exception(self, GuestException(NMI))
        elif self.apic is not None and state.rflags & flags.IF and self.apic.pending_vector() >= 0:
            state.mp_state = MP_RUNNABLE
            deliver_interrupt(self, self.apic.acknowledge())

    def _interruptible(self) -> bool:
        """Whether an event is there that ends HLT."""
        state = self.state
        if state.nmi_pending and not state.nmi_masked:
            return True
        return bool(state.rflags & flags.IF) and self.apic is not None and self.apic.pending_vector() >= 0

    def _leave_halt(self) -> bool:
        """In HLT: let time pass up to the next timer. False if nothing can ever end it."""
        state, clock = self.state, self.clock
        if state.mp_state != MP_HALTED:
            return False  # waiting for INIT or SIPI, which only another processor could send
        if self._interruptible():
            state.interrupt_shadow = 0
            state.mp_state = MP_RUNNABLE
            return True
        deadline = clock.next_deadline()
        masked = not state.rflags & flags.IF and (self.apic is None or self.apic.lvt[0] >> 8 & 7 != 4)
        if deadline == NEVER or masked:
            return False
        remaining = deadline - clock.now()
        if remaining > 0 and (self.pace or not isinstance(clock, IcountClock)):
            self._wake.wait(remaining / 1e9)
            if self._exit_requested:
                return True
        if isinstance(clock, IcountClock):
            clock.skip_to(deadline)
        if clock.next_deadline() <= clock.now():
            clock.run_due()
        return True

    # -- running ------------------------------------------------------------------------------

    def _run_slice(self, budget: int) -> None:
        """Run up to ``budget`` instructions; ends early when events must be looked at again."""
        state, mmu, clock, ram, left = self.state, self.mmu, self.clock, self.ram, self._left
        regs = state.regs
        v8, v16, v32, v64 = ram.view8, ram.view16, ram.view32, ram.view64
        end = clock.instructions + budget
        todo = budget
        rip = state.rip
        jumps, loads, stores = self._jumps, mmu.loads, mmu.stores
        region: Region | None = None
        try:
            while todo > 0:
                region = jumps.get(rip)
                if region is None:
                    state.rip = rip
                    clock.instructions = end - todo
                    region = self._find(rip)
                    if region is None:
                        break
                if region.first > todo:
                    break
                result = region.function(state, regs, todo, loads, stores, v8, v16, v32, v64, mmu, left)
                todo = left[0]
                if result.__class__ is HelperCall:
                    state.rip = result.insn.ip
                    clock.instructions = end - todo - 1
                    region = None
                    self._help(result.insn, todo + 1 + self._beyond)
                    return
                rip = result
        except (SlowAccess, GuestException) as event:
            if region is None:  # the fetch
                self._deliver(event)
                return
            rip, index, count = self._fault_place(region, event.__traceback__)
            state.rip = rip
            clock.instructions = end - left[0] - count + index
            if isinstance(event, GuestException):
                self._deliver(event)
            else:
                self._single()
            return
        state.rip = rip
        clock.instructions = end - todo
        if todo > 0:
            self._single()

    def _deliver(self, event: Exception) -> None:
        assert isinstance(event, GuestException)
        deliver_exception(self, event)

    def _fault_place(self, region: Region, traceback: TracebackType | None) -> tuple[int, int, int]:
        """(RIP, instructions done in the block, block length) of the line that raised."""
        while traceback is not None:
            if traceback.tb_frame.f_code is region.code:
                return region.faults[traceback.tb_lineno]
            traceback = traceback.tb_next
        raise AssertionError("an access faulted outside of its region")

    def _help(self, insn: Insn, budget: int) -> None:
        """Run a helper on whole state; ``clock.instructions`` counts what was retired before it."""
        state, clock = self.state, self.clock
        helper = HELPERS.get(insn.mnemonic)
        if helper is None:
            raise UnsupportedInstruction(insn.code, insn.name, self.mode_name, insn.ip)
        self.budget, self.iterations = budget, 0
        try:
            next_ip = helper(self, insn)
        except GuestException as exception:
            clock.instructions += self.iterations  # of a REP; anything else has completed none
            known = self._by_segment(exception, insn) if isinstance(exception, NonCanonical) else exception
            deliver_exception(self, known)
            return
        clock.instructions += self.iterations or 1
        state.rip = insn.next_ip if next_ip is None else next_ip

    def _single(self) -> None:
        """Run exactly one instruction (or one REP iteration), by the slow accessors; #DB after it if TF was set."""
        state, clock = self.state, self.clock
        trap = state.rflags & flags.TF
        state.interrupt_shadow = 0
        rip = state.rip
        before = clock.instructions
        region: Region | None = None
        try:
            region = self._find(rip, slow=True)
            assert region is not None
            result = region.function(
                state, state.regs, 1, self.mmu.loads, self.mmu.stores, self.ram.view8, self.ram.view16, self.ram.view32,
                self.ram.view64, self.mmu, self._left,
            )  # fmt: skip
        except NonCanonical as exception:
            state.rip = rip
            deliver_exception(self, self._of_the_stack(exception, region))
            return
        except GuestException as exception:
            state.rip = rip
            deliver_exception(self, exception)
            return
        if result.__class__ is HelperCall:
            self._help(result.insn, 1)
            shadow_of_ss = state.interrupt_shadow and result.insn.mnemonic != Mnemonic.STI
            if result.insn.flow == FlowControl.INTERRUPT:  # a handler starts without the trap (SDM 3B 17.3.1.4)
                trap &= state.rflags
            elif shadow_of_ss or result.insn.mnemonic in _OWN_TRAP:  # a load of SS holds it back
                trap = 0
        else:
            clock.instructions += 1
            state.rip = result
        if trap and clock.instructions > before and not state.shutdown:
            self.single_step_trap()

    def single_step_trap(self) -> None:
        """#DB by TF, after the instruction before RIP."""
        self.state.dr[6] |= 1 << 14  # BS
        deliver_exception(self, GuestException(DB))

    def _of_the_stack(self, exception: NonCanonical, region: Region | None) -> GuestException:
        """#SS(0) instead of #GP(0) where the instruction used SS (SDM 3A 6.15, interrupt 12)."""
        if region is None:
            return exception  # the fetch
        start = self._base + self.state.rip
        insn = decode(self.mmu.read_bytes(start, region.spans[0][1], supervisor=True), self.state.rip, self.mode.bits)
        return self._by_segment(exception, insn)

    def _by_segment(self, exception: NonCanonical, insn: Insn) -> GuestException:
        iced = insn.iced
        in_memory = OpKind.MEMORY in (iced.op0_kind, iced.op1_kind)
        near_top = abs(exception.linear - self.state.regs[RSP]) <= 16
        pushes_or_pops = iced.is_stack_instruction and (near_top or not in_memory)
        if pushes_or_pops or (in_memory and iced.memory_segment == Register.SS):
            return GuestException(STACK_FAULT, 0)
        return exception

    # -- code ---------------------------------------------------------------------------------

    def _find(self, rip: int, *, slow: bool = False) -> Region | None:
        """The region at ``rip``, translated if need be. None if only a single step can
        tell what is there (it crosses the page, or is undefined). Raises #PF, #GP and, for a step, #UD."""
        mmu, cache = self.mmu, self.cache
        linear = rip + self._base
        if self.mode.bits != 64:
            linear &= 0xFFFFFFFF
        offset = mmu.fetch_page(linear)
        if offset < 0:
            self._not_ram(rip, linear)
        key = (self.mode, self._base, rip, offset)
        region = (cache.steps if slow else cache.regions).get(key)
        if region is None:
            page, inside = offset >> PAGE_SHIFT, offset & (PAGE_SIZE - 1)
            code = bytes(mmu.bytes[page << PAGE_SHIFT : (page + 1) << PAGE_SHIFT])
            region = cache.get(code, inside, self.mode, rip - inside, slow=slow)
            if region is None:
                return self._crossing(rip, linear, code[inside:]) if slow else None
            cache.insert(region, key, page, slow=slow)
            self.ram.set_code(page)
        if not slow:
            self._jumps[rip] = region
        return region

    def _crossing(self, rip: int, linear: int, head: bytes) -> Region:
        """An instruction that crosses into the next page, as a single step. It is kept nowhere by address:
        the shared store compares its bytes each time, so neither page needs to be watched."""
        if len(head) >= MAX_LENGTH or not may_go_on(head, rip, self.mode.bits):
            raise self._undefined(head, rip)
        second = self.mmu.fetch_page((linear + len(head)) & ((1 << 64) - 1 if self.mode.bits == 64 else 0xFFFFFFFF))
        if second < 0:
            self._not_ram(rip, linear + len(head))
        code = head + bytes(self.mmu.bytes[second : second + MAX_LENGTH])
        region = self.cache.get(code, 0, self.mode, rip, slow=True)
        if region is None:
            raise self._undefined(code, rip)
        return region

    def _undefined(self, code: bytes, rip: int) -> GuestException:
        too_long = is_too_long(code[: 2 * MAX_LENGTH], rip, self.mode.bits)
        return GuestException(GP, 0) if too_long else GuestException(UD)

    def _not_ram(self, rip: int, linear: int) -> NoReturn:
        raise UnsupportedInstruction(b"", "fetch", self.mode_name, rip, f"code at {linear:#x} is not in RAM or ROM")

    def _jumps_dropped(self) -> None:
        self.cache.drop_jumps()

    def _code_written(self, page: int, start: int, end: int) -> None:
        self.cache.invalidate(page, start, end)

    def _page_of_code_written(self, page: int) -> None:
        self.cache.invalidate(page)
