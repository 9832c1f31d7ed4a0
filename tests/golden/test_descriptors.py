"""Every section that we describe, in every captured stream of real QEMU."""

from __future__ import annotations

import json

import pytest

from pyvcpu.apic.local import LocalApic
from pyvcpu.apic.vmstate import APIC
from pyvcpu.clock import make_clock
from pyvcpu.cpu.layout import MP_HALTED
from pyvcpu.cpu.state import CpuState
from pyvcpu.cpu.vmstate import CPU, CPU_COMMON, CpuCommon, from_kvm, guest_tsc
from pyvcpu.devices.vmstate import SERIAL
from pyvcpu.errors import MigrationError
from pyvcpu.machine.vmstate import GLOBALSTATE, KVM_TPR_OPT, TIMER, Timers
from pyvcpu.migration.vmstate.codec import decode_section, load_sections
from pyvcpu.migration.vmstate.compat import differences, incompatibilities
from pyvcpu.migration.vmstate.description import Description, LoadContext, SaveContext, SectionEntry
from pyvcpu.migration.vmstate.fields import Values
from tests import streams

DESCRIPTIONS = (TIMER, CPU_COMMON, CPU, KVM_TPR_OPT, APIC, SERIAL, GLOBALSTATE)
CASES = [
    pytest.param(name, d, id=f"{name}-{d.name}")
    for name in streams.NAMES
    for d in DESCRIPTIONS
    if streams.section(name, d.name) is not None
]
# QEMU 9 cut up the padding of globalstate without a new version: our description is the later one, of the same size.
SAME_LAYOUT = [case for case in CASES if not (case.values[1] is GLOBALSTATE and "-7.2-" in case.values[0])]


def decode(name: str, description: Description) -> Values:
    found = streams.section(name, description.name)
    assert found is not None
    values, _ = decode_section(description, found.data, version_id=found.version_id, base=found.offset)
    return values


def everything(name: str) -> dict[str, Values]:
    return {f"{d.name}/0": decode(name, d) for d in DESCRIPTIONS if streams.section(name, d.name)}


def test_every_stream_and_every_section_is_covered():
    assert len(streams.NAMES) >= 8
    assert {case.values[1].name for case in CASES} == {d.name for d in DESCRIPTIONS}


@pytest.mark.parametrize(("name", "description"), CASES)
def test_decoded_and_encoded_it_is_the_same_bytes(name, description):
    found = streams.section(name, description.name)
    values = decode(name, description)
    assert description.encode(values) == found.data
    assert description.size(values) == len(found.data)


@pytest.mark.parametrize(("name", "description"), SAME_LAYOUT)
def test_the_vmdesc_is_qemus_to_the_letter(name, description):
    described = {"name": description.name, "instance_id": 0, **description.describe(decode(name, description))}
    assert json.dumps(described) == streams.devices(name)[f"{description.name}/0"]


@pytest.mark.parametrize(("name", "description"), SAME_LAYOUT)
def test_the_streams_own_vmdesc_is_compatible(name, description):
    entry = json.loads(streams.devices(name)[f"{description.name}/0"])
    assert incompatibilities(entry, description) == []


@pytest.mark.parametrize(("name", "description"), CASES)
def test_it_can_be_a_state(name, description):
    shift = 1 if "icount" in name else None
    description.check(decode(name, description), LoadContext(sections=everything(name), icount_shift=shift))


@pytest.mark.parametrize("name", streams.NAMES)
def test_the_cpu_goes_through_cpustate_and_comes_out_as_it_was(name):
    """All but what depends on who writes: XSTATE_BV (always 3 from us), KVM's TSC rate and redundant SS.B."""
    values = decode(name, CPU)
    clock = make_clock("icount")
    cpu = CpuState()
    cpu.reset()
    context = LoadContext(clock=clock, sections=everything(name))
    CPU.load(cpu, values, context)
    peer = "qemu-7.2-kvm" if from_kvm(values, context) else "qemu-7.2-tcg"
    again = CPU.save(cpu, SaveContext(profile=peer, clock=clock, machine=name.split("-", maxsplit=1)[0]))
    changed = {d.path for d in differences(values, again)}
    allowed = {"xstate_bv"} if peer.endswith("tcg") else {"xstate_bv", "tsc_khz/tsc_khz", "hflags"}
    assert changed <= allowed


def test_a_reset_cpu_is_qemus_reset_cpu():
    """The serial guest's BIOS ran 4 instructions: all the registers that it did not touch are as at reset."""
    cpu = CpuState()
    cpu.reset()
    ours = CPU.save(cpu, SaveContext(profile="qemu-7.2-tcg", clock=make_clock("icount")))
    changed = {d.path for d in differences(ours, decode("microvm-7.2-serial-tcg", CPU))}
    assert changed == {"regs[0]", "regs[2]", "eip", "segs[1]/base", "segs[1]/flags", "xstate_bv"} & changed
    assert {"regs[0]", "eip"} <= changed


def test_a_running_timer_is_due_when_qemu_meant_it():
    sections = everything("microvm-7.2-ticker-tcg")
    clock = make_clock("icount")
    cpu, apic = CpuState(), LocalApic(clock)
    entries = [SectionEntry(TIMER, 0, Timers(clock, cpu)), SectionEntry(APIC, 0, apic)]
    entries += [SectionEntry(CPU_COMMON, 0, CpuCommon(cpu, apic)), SectionEntry(CPU, 0, cpu)]
    load_sections(entries, sections, LoadContext(clock=clock))
    assert clock.now() == 3_446_944_223
    assert clock.next_deadline() == 3_447_009_481
    assert apic.read(0x390, 4) == 999_999 - (3_446_944_223 - 9_481) % 1_000_000
    assert cpu.mp_state == MP_HALTED
    assert guest_tsc(cpu, clock) == 8_512_427_585


def test_the_accelerator_is_recognised():
    for name in streams.NAMES:
        values = decode(name, CPU)
        assert from_kvm(values, LoadContext()) == name.endswith("kvm"), name


def test_qemus_icount_stream_needs_its_shift():
    values = decode("none-7.2-icount-tcg", TIMER)
    with pytest.raises(MigrationError, match="shift") as error:
        TIMER.check(values, LoadContext())
    assert error.value.field == "icount/qemu_icount_bias"
