"""Running, stopping, edge calls, ends and resets: the machine around its engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pyvcpu.apic.local import DEFAULT_BASE
from pyvcpu.cpu.layout import MP_HALTED
from pyvcpu.errors import ConfigurationError
from pyvcpu.machine import MIB, Image, Machine, MachineConfig, make_machine
from tests.unit.machine.fake import FakeEngine

Make = Callable[..., Machine]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Machines of 1 MiB with the fake engine."""
    monkeypatch.setattr("pyvcpu.machine.machine.make_accelerator", FakeEngine)
    made: list[Machine] = []

    def build(machine: str = "none", **options: object) -> Machine:
        made.append(make_machine(MachineConfig(machine=machine, memory=MIB, **options)))
        return made[-1]

    yield build
    for machine in made:
        machine.close()


def program(machine: Machine, function: Callable[[FakeEngine], None]) -> None:
    machine.engine.program = function


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)


class TestRun:
    def test_exactly_as_many_as_asked_for_and_again(self, make: Make) -> None:
        machine = make()
        assert machine.status == "prelaunch" and not machine.running
        for total in (10, 20):
            assert machine.run(10) == "limit"
            assert machine.instructions == total and machine.status == "paused" and not machine.running

    def test_nothing(self, make: Make) -> None:
        machine = make()
        assert machine.run(0) == "limit" and machine.instructions == 0

    def test_halted_for_ever(self, make: Make) -> None:
        machine = make()

        def halt(engine: FakeEngine) -> None:
            engine.state.mp_state = MP_HALTED

        program(machine, halt)
        assert machine.run() == "halted" and machine.instructions == 1 and machine.status == "paused"

    def test_request_stop_ends_it_after_the_instruction(self, make: Make) -> None:
        machine = make()
        program(machine, lambda e: machine.request_stop() if e.clock.instructions == 7 else None)
        assert machine.run() == "request" and machine.instructions == 8
        assert machine.run(5) == "limit" and machine.instructions == 13

    def test_a_failing_engine(self, make: Make) -> None:
        machine = make()

        def fail(engine: FakeEngine) -> None:
            raise RuntimeError("cannot")

        program(machine, fail)
        with pytest.raises(RuntimeError, match="cannot"):
            machine.run()
        assert machine.status == "internal-error" and not machine.running

    def test_on_exit_says_why(self, make: Make) -> None:
        machine, reasons = make(), []
        machine.on_exit = lambda reason: reasons.append((reason, machine.status))
        machine.run(1)
        program(machine, lambda engine: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            machine.run(1)
        assert reasons == [("limit", "paused"), (None, "internal-error")]

    def test_a_guest_cannot_be_run_twice_at_once(self, make: Make) -> None:
        machine = make()
        machine.start()
        with pytest.raises(ConfigurationError, match="runs already"):
            machine.run(1)
        with pytest.raises(ConfigurationError, match="runs already"):
            machine.start()


class TestClock:
    def test_host_time_stands_still_while_the_guest_does(self, make: Make) -> None:
        machine = make(clock="host")
        machine.run(1000)
        before = machine.clock.now()
        time.sleep(0.01)
        assert machine.clock.now() == before > 0
        machine.start()
        until(lambda: machine.clock.now() > before)
        machine.stop()
        before = machine.clock.now()
        time.sleep(0.01)
        assert machine.clock.now() == before

    def test_and_after_an_error(self, make: Make) -> None:
        machine = make(clock="host")
        program(machine, lambda engine: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            machine.run()
        before = machine.clock.now()
        time.sleep(0.01)
        assert machine.clock.now() == before


class TestThread:
    def test_start_and_stop(self, make: Make) -> None:
        machine = make()
        machine.start()
        assert machine.running and machine.status == "running"
        until(lambda: machine.instructions > 100)
        machine.stop()
        count = machine.instructions
        assert not machine.running and machine.status == "paused" and machine.last_exit == "request"
        machine.stop()
        time.sleep(0.01)
        assert machine.instructions == count
        machine.start()
        until(lambda: machine.instructions > count)

    def test_wait_for_the_limit(self, make: Make) -> None:
        machine = make()
        machine.start(1000)
        assert machine.wait(10) == "limit" and machine.instructions == 1000

    def test_wait_times_out(self, make: Make) -> None:
        machine = make()
        machine.start()
        assert machine.wait(0.01) is None and machine.running

    def test_wait_raises_what_the_guest_died_of_once(self, make: Make) -> None:
        machine = make()
        program(machine, lambda engine: 1 // 0)
        machine.start()
        with pytest.raises(ZeroDivisionError):
            machine.wait(10)
        assert machine.wait(10) is None and machine.status == "internal-error"

    def test_stop_from_inside_does_not_wait_for_itself(self, make: Make) -> None:
        machine = make()
        program(machine, lambda engine: machine.stop())
        machine.start()
        assert machine.wait(10) == "request" and machine.instructions == 1

    def test_stop_of_a_run_in_another_thread(self, make: Make) -> None:
        machine, ends = make(), []
        thread = threading.Thread(target=lambda: ends.append(machine.run()))
        thread.start()
        until(lambda: machine.instructions > 10)
        machine.stop()
        count = machine.instructions
        thread.join(10)
        assert ends == ["request"] and machine.instructions == count


class TestEdge:
    def test_here_when_nothing_runs(self, make: Make) -> None:
        machine = make()
        assert machine.at_edge(threading.current_thread) is threading.current_thread()

    @pytest.mark.parametrize("own_thread", [True, False])
    def test_between_instructions_in_the_running_thread(self, make: Make, own_thread: bool) -> None:
        """Both with start() and with run() in a thread of the caller's."""
        machine, inside = make(), []

        def instruction(engine: FakeEngine) -> None:
            inside.append(True)
            time.sleep(0.0001)
            inside.clear()

        program(machine, instruction)
        runner = threading.Thread(target=machine.run)
        (machine.start if own_thread else runner.start)()
        until(lambda: machine.instructions > 0)
        for _ in range(50):
            name, free = machine.at_edge(lambda: (threading.current_thread(), not inside))
            assert free and name is not threading.current_thread()
        machine.stop()

    def test_errors_come_back_and_the_guest_goes_on(self, make: Make) -> None:
        machine = make()
        machine.start()
        with pytest.raises(KeyError):
            machine.at_edge(lambda: {}["x"])
        count = machine.instructions
        until(lambda: machine.instructions > count)

    def test_an_edge_call_may_make_another(self, make: Make) -> None:
        machine = make()
        machine.start()
        assert machine.at_edge(lambda: machine.at_edge(lambda: 5)) == 5

    def test_an_edge_call_may_stop_the_guest(self, make: Make) -> None:
        machine = make()
        machine.start()
        count = machine.at_edge(lambda: (machine.stop(), machine.instructions)[1])
        machine.wait(10)
        assert machine.instructions == count and machine.last_exit == "request"

    def test_no_call_is_lost_however_the_guest_ends(self, make: Make) -> None:
        """Calls from several threads, while the guest ends and starts all the time."""
        machine, served = make(), []
        finished = threading.Event()

        def call(number: int) -> None:
            for i in range(100):
                machine.at_edge(lambda i=i: served.append((number, i)))

        def restart() -> None:
            while not finished.is_set():
                machine.start(3)
                machine.wait()

        restarter = threading.Thread(target=restart)
        callers = [threading.Thread(target=call, args=(number,)) for number in range(3)]
        restarter.start()
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join(60)
        finished.set()
        restarter.join(60)
        assert sorted(served) == [(number, i) for number in range(3) for i in range(100)]

    def test_the_guest_cannot_start_during_a_call_made_here(self, make: Make) -> None:
        machine = make()
        started = threading.Thread(target=lambda: machine.start(5))

        def call() -> int:
            started.start()
            time.sleep(0.02)
            return machine.instructions

        assert machine.at_edge(call) == 0
        started.join(10)
        assert machine.wait(10) == "limit" and machine.instructions == 5


class TestEnds:
    def test_debug_exit(self, make: Make) -> None:
        machine = make("microvm", debug_exit=(0xF4, 4))
        program(machine, lambda e: e.bus.io_write(0xF4, 4, 0x10) if e.clock.instructions == 4 else None)
        assert machine.run() == "debug-exit"
        assert (machine.exit_code, machine.status, machine.instructions) == (33, "shutdown", 5)
        assert machine.run(100) == "debug-exit" and machine.instructions == 5
        assert machine.status == "shutdown"
        machine.reset()
        assert machine.status == "prelaunch" and machine.exit_code is None
        assert machine.run(100) == "limit"

    @staticmethod
    def _triple_fault(engine: FakeEngine) -> None:
        if engine.clock.instructions == 4:
            engine.state.shutdown = 1

    def test_triple_fault_ends_the_run_with_no_reboot(self, make: Make) -> None:
        machine = make(no_reboot=True)
        program(machine, self._triple_fault)
        assert machine.run() == "shutdown" and machine.instructions == 5
        assert (machine.exit_code, machine.status) == (0, "shutdown")
        assert machine.run(100) == "shutdown" and machine.instructions == 5

    def test_triple_fault_resets_without(self, make: Make) -> None:
        machine = make()
        program(machine, self._triple_fault)
        machine.cpu.rip = 0x1234
        assert machine.run(100) == "limit"
        assert machine.instructions == 100 and machine.cpu.shutdown == 0 and machine.cpu.rip == 0xFFF0


class TestMap:
    def test_blocks_and_sections_of_none(self, make: Make) -> None:
        machine = make()
        assert [(b.name, b.size) for b in machine.ram.blocks] == [("ram", MIB)]
        assert machine.serial is None
        assert [s.name for s in machine.sections()] == [
            "timer/0", "cpu_common/0", "cpu/0", "kvm-tpr-opt/0", "apic/0", "globalstate/0",
        ]  # fmt: skip

    def test_blocks_and_sections_of_microvm(self, make: Make) -> None:
        machine = make("microvm", bios=bytes(0x20000))
        assert [(b.name, b.size) for b in machine.ram.blocks] == [("microvm.ram", MIB), ("pc.bios", 0x20000)]
        assert [s.name for s in machine.sections()] == [
            "timer/0", "cpu_common/0", "cpu/0", "kvm-tpr-opt/0", "apic/0", "serial/0", "globalstate/0",
        ]  # fmt: skip

    def test_the_apic_is_where_its_base_says(self, make: Make) -> None:
        machine = make()
        flushes = machine.engine.flushes
        assert machine.bus.read(DEFAULT_BASE + 0x30, 4) == 0x50014
        machine.apic.set_base(0x8000 | 0x900)
        assert machine.bus.read(DEFAULT_BASE + 0x30, 4) == 0
        assert machine.bus.read(0x8030, 4) == 0x50014
        assert machine.engine.flushes > flushes
        machine.apic.set_base(0x8000)
        assert machine.bus.read(0x8030, 4) == 0
        machine.bus.write(0x8030, 4, 7)
        assert machine.bus.read(0x8030, 4) == 7
        machine.reset()
        assert machine.bus.read(DEFAULT_BASE + 0x30, 4) == 0x50014

    def test_an_nmi_reaches_the_cpu(self, make: Make) -> None:
        machine = make()
        machine.bus.write(DEFAULT_BASE + 0x300, 4, 0x40400)
        assert machine.cpu.nmi_pending == 1

    def test_serial(self, make: Make) -> None:
        sent = bytearray()
        machine = make("microvm", serial=sent.extend)
        for byte in b"hi":
            machine.bus.io_write(0x3F8, 1, byte)
        assert sent == b"hi" and machine.bus.io_read(0x3FD, 1) == 0x60
        assert machine.at_edge(lambda: machine.serial.receive_bytes(b"x")) == 1
        assert machine.bus.io_read(0x3F8, 1) == ord("x")


class TestReset:
    def test_reset_brings_back_cpu_devices_and_images_but_not_ram_or_time(self, make: Make) -> None:
        bios = bytes(range(256)) * 256
        machine = make("microvm", bios=bios, loader=[Image(b"code", 0x8000), Image(b"data", 0x9000)])
        machine.run(10)
        loads = machine.engine.loads
        for gpa in (0x8000, 0x9000, 0xA000, 0xFFFFFFF0):
            machine.bus.write(gpa, 4, 0)
            machine.bus.write(gpa + 8, 1, 0x55)
        machine.cpu.regs[0] = 1
        machine.apic.write(0xF0, 4, 0x1FF)
        machine.serial.write(7, 1, 9)
        machine.reset()
        assert machine.engine.loads == loads + 1
        assert machine.instructions == 10
        assert machine.cpu.regs[0] == 0 and machine.apic.spurious_vec == 0xFF and machine.serial.scr == 0
        assert machine.bus.read(0x8000, 4).to_bytes(4, "little") == b"code"
        assert machine.bus.read(0x9000, 4).to_bytes(4, "little") == b"data"
        assert machine.bus.read(0xA008, 1) == 0x55
        assert machine.bus.read(0xFFFFFFF0, 1) == 0xF0
