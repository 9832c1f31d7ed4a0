"""A guest as bytes, or as a file: the same sessions, over a channel that keeps what it gets.

A snapshot is a migration stream like any other: ``run --incoming file:FILE`` takes it, ``inspect``
shows it, and with a profile of QEMU's a QEMU loads it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pyvcpu.migration.channel import BytesReader, BytesWriter, listen
from pyvcpu.migration.channel.base import Data
from pyvcpu.migration.channel.file import write_file
from pyvcpu.migration.session import DestinationSession, MigrationParameters, SourceSession
from pyvcpu.migration.session.trace import Trace

if TYPE_CHECKING:
    from pyvcpu.machine.machine import Machine
    from pyvcpu.migration.channel import Channel

RUNNING = "running"


def _save(machine: Machine, channel: Channel, profile: str, trace_sync: Trace, runstate: str, checksums: bool) -> None:
    parameters = MigrationParameters(max_bandwidth=None, profile=profile, checksums=checksums)
    status = machine.status
    SourceSession(machine, channel, parameters, live=False, runstate=runstate, trace_sync=trace_sync).run()
    machine.status = status  # the guest was copied, not moved


def save_snapshot(
    machine: Machine,
    profile: str = "pyvcpu",
    *,
    trace_sync: Trace = None,
    runstate: str = RUNNING,
    checksums: bool = True,
) -> bytes:
    """The whole guest as a stream; ``machine`` must not be running, and may go on afterwards.

    ``runstate`` is what a destination reads: "running" goes on there at once. Raises MigrationError where
    ``profile`` cannot hold the state.
    """
    channel = BytesWriter()
    _save(machine, channel, profile, trace_sync, runstate, checksums)
    return channel.getvalue()


def save_snapshot_file(
    machine: Machine,
    path: str | os.PathLike[str],
    profile: str = "pyvcpu",
    trace_sync: Trace = None,
    *,
    runstate: str = RUNNING,
    checksums: bool = True,
) -> None:
    """As :func:`save_snapshot`, into a file, which gets its name only when it is whole. Raises ChannelError too."""
    _save(machine, write_file(os.fspath(path)), profile, trace_sync, runstate, checksums)


def load_snapshot(machine: Machine, data: Data, *, require_checksums: bool = False, trace_sync: Trace = None) -> None:
    """Put a guest into ``machine``, which was freshly made and has not run; it is left stopped.

    ``machine.status`` is the run state of the stream ("running" for one to go on at once). Raises MigrationError.
    """
    _load(machine, BytesReader(data), require_checksums, trace_sync)


def load_snapshot_file(
    machine: Machine, path: str | os.PathLike[str], *, require_checksums: bool = False, trace_sync: Trace = None
) -> None:
    """As :func:`load_snapshot`, from a file. Raises ChannelError too."""
    with listen(f"file:{os.fspath(path)}") as listener:
        _load(machine, listener.accept(), require_checksums, trace_sync)


def _load(machine: Machine, channel: Channel, require_checksums: bool, trace_sync: Trace) -> None:
    parameters = MigrationParameters(require_checksums=require_checksums)
    with channel:
        DestinationSession(machine, channel, parameters, autostart=False, trace_sync=trace_sync).run()
