"""Streams that are not what they should be: one error that says where, or exactly the state of the bytes.

The reader's own tests feed it all of this too; here a whole session and a machine stand behind it.
"""

from __future__ import annotations

import random
import resource
import struct
from collections.abc import Callable

import pytest

from pyvcpu.errors import ChannelError, MigrationError
from pyvcpu.machine import Machine, MachineConfig, make_machine
from pyvcpu.migration.channel import BytesReader, memory_pair
from pyvcpu.migration.session import DestinationSession
from pyvcpu.migration.snapshot import load_snapshot, save_snapshot
from pyvcpu.migration.wire import return_path
from pyvcpu.migration.wire.reader import StreamReader
from pyvcpu.migration.wire.records import CommandType, Record, SectionFull
from pyvcpu.migration.wire.writer import StreamWriter
from tests.moving import make_walker

MEMORY = 0x10000


def small(memory: int = MEMORY, kind: str = "none") -> Machine:
    return make_machine(MachineConfig(kind, memory))


def records(data: bytes) -> list[Record]:
    sections = {(e.description.name, e.instance_id): e.description for e in small().sections()}
    return list(StreamReader(sections).feed(data))


STREAM = save_snapshot(small())
BARE = save_snapshot(small(), checksums=False)
SECTIONS = [record for record in records(STREAM) if isinstance(record, SectionFull)]


def refuse(data: bytes, machine: Machine | None = None) -> MigrationError:
    """Load, and expect the one error; nothing has started."""
    machine = machine or small()
    started: list[bool] = []
    session = DestinationSession(machine, BytesReader(data), start=lambda: started.append(True))
    with pytest.raises(MigrationError) as caught:
        session.run()
    assert session.status == "failed" and machine.status == "inmigrate" and not started
    return caught.value


@pytest.mark.parametrize("part", range(4))
def test_truncated_at_every_byte(part: int) -> None:
    machine = small()
    for length in range(part, len(STREAM), 4):
        error = refuse(STREAM[:length], machine)
        assert error.offset is not None and error.offset <= length
    load_snapshot(machine, STREAM)


@pytest.mark.parametrize("bit", range(8))
def test_every_bit_of_the_device_sections(bit: int) -> None:
    machine = small()
    for section in SECTIONS:
        for at in range(section.offset, section.offset + section.length):
            damaged = bytearray(STREAM)
            damaged[at] ^= 1 << bit
            refuse(bytes(damaged), machine)


def test_a_stream_without_checksums_is_refused_or_is_what_its_bytes_say() -> None:
    """Any state that loads is one that saves, and saves as itself for ever after."""
    rng = random.Random(1)
    machine, copy = small(), small()
    loaded = 0
    for section in SECTIONS:
        for at in range(section.offset, section.offset + section.length):
            damaged = bytearray(BARE)
            damaged[at] ^= 1 << rng.randrange(8)
            try:
                load_snapshot(machine, bytes(damaged))
            except MigrationError:
                continue
            loaded += 1
            once = save_snapshot(machine, runstate=machine.status)
            load_snapshot(copy, once)
            assert save_snapshot(copy, runstate=copy.status) == once
            # Which components are in use is worked out at every save: the stream may have said less.
            assert copy.cpu.architectural() | {"xstate_bv": 0} == machine.cpu.architectural() | {"xstate_bv": 0}
    assert loaded > 1000, "most single bits of a state are another state"


def test_without_checksums_is_refused_where_they_were_asked_for() -> None:
    load_snapshot(small(), BARE)
    load_snapshot(small(), STREAM, require_checksums=True)
    with pytest.raises(MigrationError, match="no checksums"):
        load_snapshot(small(), BARE, require_checksums=True)


def test_random_bytes() -> None:
    rng = random.Random(2)
    for _ in range(300):
        noise = rng.randbytes(rng.randrange(1, 3000))
        refuse(noise)
        refuse(STREAM[: rng.randrange(8, 400)] + noise)


def test_another_machine() -> None:
    error = refuse(STREAM, small(kind="microvm"))
    assert (error.expected, error.got) == ("microvm", "none") and error.section == "configuration"


@pytest.mark.parametrize("memory", [MEMORY // 2, MEMORY * 2])
def test_ram_of_another_size(memory: int) -> None:
    error = refuse(STREAM, small(memory))
    assert error.section == "ram/0" and (error.expected, error.got) == (memory, MEMORY)
    assert error.field == "blocks[0]/size" and STREAM[error.offset or 0 :].startswith(struct.pack(">Q", MEMORY))


def edited(change: Callable[[StreamWriter, list[bytes], SectionFull], None]) -> bytes:
    """A stream in which each device section is written by ``change``; checksums fit the result."""
    writer = StreamWriter(check_pages=False)
    out = [writer.header(), writer.configuration("none")]
    ram = struct.pack(">QB3sQ", MEMORY | 4, 3, b"ram", MEMORY)
    out += [bytes(c) for c in writer.section_start("ram", 0, 4, ram + struct.pack(">Q", 0x10))]
    out += [bytes(c) for c in writer.section_end(writer.id_of("ram"), struct.pack(">Q", 0x10))]
    for section in SECTIONS:
        change(writer, out, section)
    out += [writer.eof(), writer.vmdesc()]
    return b"".join(out)


def copy_section(writer: StreamWriter, out: list[bytes], s: SectionFull, **changes: int) -> None:
    version = changes.get("version", s.version_id)
    out.append(writer.section_full(s.name, changes.get("instance", s.instance_id), version, s.data))


def test_an_edited_stream_as_such_is_taken() -> None:
    machine = small()
    load_snapshot(machine, edited(copy_section))
    assert machine.cpu.architectural() == small().cpu.architectural()


@pytest.mark.parametrize("name", [section.name for section in SECTIONS])
def test_a_newer_version(name: str) -> None:
    def change(writer: StreamWriter, out: list[bytes], section: SectionFull) -> None:
        copy_section(writer, out, section, version=section.version_id + (section.name == name))

    error = refuse(edited(change))
    assert error.section == f"{name}/0" and "newer" in error.message and "version" in str(error.expected)


def test_a_section_that_the_machine_lacks_is_named() -> None:
    def change(writer: StreamWriter, out: list[bytes], section: SectionFull) -> None:
        if section.name == "apic":
            out.append(writer.section_full("fw_cfg", 0, 2, bytes(6)))
            out.append(writer.section_full("i8254", 0, 3, bytes(60)))
        copy_section(writer, out, section)

    error = refuse(edited(change))
    assert "fw_cfg/0" in str(error.got) and "i8254/0" in str(error.got)


def test_another_instance_of_a_known_section() -> None:
    def change(writer: StreamWriter, out: list[bytes], section: SectionFull) -> None:
        copy_section(writer, out, section, instance=int(section.name == "cpu"))

    assert "cpu/1" in str(refuse(edited(change)).got)


def test_a_stream_without_a_cpu() -> None:
    def change(writer: StreamWriter, out: list[bytes], section: SectionFull) -> None:
        if section.name != "cpu":
            copy_section(writer, out, section)

    assert "cpu/0" in str(refuse(edited(change)).expected)


def test_a_stream_without_ram() -> None:
    writer = StreamWriter(check_pages=False)
    out = [writer.header(), writer.configuration("none")]
    for section in SECTIONS:
        copy_section(writer, out, section)
    out += [writer.eof(), writer.vmdesc()]
    assert "ram/0" in str(refuse(b"".join(out)).expected)


def test_sections_are_applied_in_the_order_that_they_need_not_in_which_they_come() -> None:
    source = make_walker()
    source.run(50)
    source.apic.write(0x3E0, 4, 0b1011)  # divide by 1
    source.apic.write(0xF0, 4, 0x1FF)
    source.apic.write(0x320, 4, 0x20030)
    source.apic.write(0x380, 4, 1000)  # timer, periodic
    stream = save_snapshot(source)
    whole = [r for r in records(stream) if isinstance(r, SectionFull)]
    for order in (whole[::-1], sorted(whole, key=lambda r: r.name)):
        writer = StreamWriter(check_pages=False)
        size = source.ram.size
        out = [writer.header(), writer.configuration("none")]
        ram = struct.pack(">QB3sQQ", size | 4, 3, b"ram", size, 0x10)
        out += [bytes(c) for c in writer.section_start("ram", 0, 4, ram)]
        out += [bytes(c) for c in writer.section_end(writer.id_of("ram"), struct.pack(">Q", 0x10))]
        for section in order:
            copy_section(writer, out, section)
        out += [writer.eof(), writer.vmdesc()]
        machine = small(size)
        load_snapshot(machine, b"".join(out))
        assert machine.cpu.architectural() == source.cpu.architectural()
        assert machine.clock.now() == source.clock.now() and machine.instructions == 50
        assert machine.clock.next_deadline() == source.clock.next_deadline()


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x80000000])
def test_a_length_of_4_gib_allocates_nothing(length: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    big = struct.pack(">I", length)
    vmdesc = next(r.offset for r in records(BARE) if type(r).__name__ == "Vmdesc")
    streams = {
        "configuration": b"QEVM" + struct.pack(">I", 3) + b"\x07" + big + b"none",
        "vmdesc": BARE[: vmdesc + 1] + big + BARE[vmdesc + 5 :],
        "ram": BARE.replace(struct.pack(">QB3sQ", MEMORY | 4, 3, b"ram", MEMORY), struct.pack(
            ">QB3sQ", length << 12 | 4, 3, b"ram", length << 12)),
    }  # fmt: skip
    for what, data in streams.items():
        error = refuse(data)
        assert error.offset is not None and error.offset < len(data), what
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 64 << 10, "KiB; nothing is allocated on the word of a length"


def test_a_stream_that_ends_after_eof_is_not_whole() -> None:
    end = next(r.offset for r in records(STREAM) if type(r).__name__ == "Eof")
    assert "too early" in str(refuse(STREAM[: end + 1]))


def test_bytes_after_the_end_are_ignored_as_by_qemu() -> None:
    machine = small()
    load_snapshot(machine, STREAM + b"junk")
    assert machine.status == "running"


def test_a_source_that_knows_the_handshake_and_lies_about_the_crc() -> None:
    machine = small()
    out, incoming = memory_pair()
    writer = StreamWriter()
    out.write(writer.header() + writer.configuration("none") + writer.open_return_path() + writer.ping(0x70766370))
    out.write(writer.command(CommandType.PING, struct.pack(">I", writer.crc ^ 1)))
    session = DestinationSession(machine, incoming)
    with pytest.raises(MigrationError, match="damaged on its way") as caught:
        session.run()
    assert caught.value.section == "command" and caught.value.field == "PING"
    replies = list(return_path.ReplyReader().feed(out.read()))
    while data := out.read():
        replies += list(return_path.ReplyReader().feed(data))
    kinds = [type(reply).__name__ for reply in replies]
    assert kinds == ["Pong", "Message", "Message", "Shut"]


def test_a_source_that_closes_early_is_a_migration_error() -> None:
    out, incoming = memory_pair()
    out.write(STREAM[:100])
    out.close()
    session = DestinationSession(small(), incoming)
    with pytest.raises(MigrationError):
        session.run()
    assert session.status == "failed"


def test_closing_the_channel_under_a_waiting_destination() -> None:
    _, incoming = memory_pair()
    session = DestinationSession(small(), incoming)
    session.start()
    incoming.close()
    with pytest.raises(ChannelError):
        session.wait(5)


def test_cancel_of_an_incoming_migration() -> None:
    _, incoming = memory_pair()
    machine = small()
    session = DestinationSession(machine, incoming)
    session.start()
    assert session.cancel()
    with pytest.raises(MigrationError, match="cancelled"):
        session.wait(5)
    assert session.status == "cancelled" and not session.cancel()
