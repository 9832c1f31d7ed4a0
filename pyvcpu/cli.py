"""The command line: ``pyvcpu run | save | demo | inspect``.

Exit codes of ``run``:

    (value << 1) | 1   the guest wrote value to isa-debug-exit
    0                  a triple fault with --no-reboot; --max-instructions was reached; HLT that nothing can end;
                       the guest was migrated away
    1                  an error of ours, in one line on stderr (a file, an option, a migration that failed)
    2                  a command line that is not understood
    3                  the guest executed something that is not there yet (named on stderr)
    130                interrupted
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from pyvcpu import __version__
from pyvcpu.errors import ConfigurationError, PyvcpuError, UnsupportedInstruction
from pyvcpu.machine import Machine
from pyvcpu.migration.channel import listen
from pyvcpu.migration.session import DestinationSession, MigrationParameters
from pyvcpu.migration.snapshot import save_snapshot_file
from pyvcpu.monitor.hmp import HumanMonitor
from pyvcpu.options import add_machine_options, machine_of

EXIT_ERROR, EXIT_UNSUPPORTED, EXIT_INTERRUPTED = 1, 3, 130


def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser = argparse.ArgumentParser(
        prog="pyvcpu", description="An x86-64 virtual machine in pure Python with QEMU-style live migration."
    )
    parser.add_argument("--version", action="version", version=f"pyvcpu {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a guest", description="Run a guest.")
    add_machine_options(run)
    run.add_argument("-S", dest="paused", action="store_true", help="do not start the guest: wait for cont")
    run.add_argument("-monitor", "--monitor", choices=("none", "stdio"), default=None,
                     help="commands on stdin; default: none, with --incoming defer or -S: stdio")  # fmt: skip
    run.set_defaults(function=run_command)

    save = commands.add_parser("save", help="run a guest up to an instruction and save it",
                               description="Run a guest up to an instruction and save it as a stream.")  # fmt: skip
    add_machine_options(save)
    save.add_argument("-o", "--output", required=True, metavar="FILE", help="the stream")
    save.add_argument("--profile", default="pyvcpu", metavar="NAME",
                      help="what will read it: pyvcpu (default), qemu-7.2-tcg, ...")  # fmt: skip
    save.set_defaults(function=save_command)

    demo = commands.add_parser("demo", help="a live migration between two processes")
    demo.add_argument("--json", action="store_true", help="the result as JSON")
    demo.set_defaults(function=demo_command)

    inspect = commands.add_parser("inspect", help="what a stream holds", description="Show what a stream holds.")
    inspect.add_argument("file", metavar="FILE", help="a stream, also .xz")
    inspect.add_argument("selector", nargs="?", metavar="SECTION[/FIELD]", help="such as cpu, cpu/regs[0], ram")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    inspect.set_defaults(function=inspect_command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The ``pyvcpu`` command. Returns the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.function(options))
    except UnsupportedInstruction as error:
        return _complain(error, EXIT_UNSUPPORTED)
    except PyvcpuError as error:
        return _complain(error, EXIT_ERROR)
    except BrokenPipeError:
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _complain(error: BaseException, code: int) -> int:
    print(f"pyvcpu: {error}", file=sys.stderr)
    return code


def _trace(line: str) -> None:
    print(line, file=sys.stderr)


def _receive(machine: Machine, uri: str, options: argparse.Namespace) -> None:
    """Take the guest from ``uri``; returns when its state is here."""
    machine.status = "inmigrate"
    with listen(uri) as listener:
        channel = listener.accept()
    session = DestinationSession(
        machine,
        channel,
        MigrationParameters(require_checksums=options.require_checksums),
        autostart=False,
        trace_sync=_trace if options.trace_sync else None,
    )
    session.run()


def run_command(options: argparse.Namespace) -> int:
    """``pyvcpu run``."""
    monitor_on_stdin = options.monitor == "stdio" or (
        options.monitor is None and (options.incoming == "defer" or options.paused)
    )
    if options.incoming == "defer" and not monitor_on_stdin:
        raise ConfigurationError("--incoming defer waits for migrate_incoming: --monitor stdio is wanted")
    machine = machine_of(options)
    signal.signal(signal.SIGINT, lambda *_: machine.request_stop())
    try:
        start = not options.paused
        if options.incoming and options.incoming != "defer":
            _receive(machine, options.incoming, options)
            start = start and machine.status == "running"
        if monitor_on_stdin:
            return HumanMonitor(machine, sys.stdin, sys.stderr, max_instructions=options.max_instructions).run(
                start=start and options.incoming != "defer"
            )
        reason = machine.run(options.max_instructions) if start else "request"
        if reason == "request":
            return EXIT_INTERRUPTED
        if reason == "halted":
            print("pyvcpu: the guest halted for good", file=sys.stderr)
        return machine.exit_code or 0
    finally:
        machine.close()


def save_command(options: argparse.Namespace) -> int:
    """``pyvcpu save``."""
    if options.max_instructions is None:
        raise ConfigurationError("save wants --max-instructions N: the instruction at which the guest is saved")
    machine = machine_of(options)
    try:
        if options.incoming:
            _receive(machine, options.incoming, options)
        machine.run(options.max_instructions)
        save_snapshot_file(machine, options.output, options.profile, _trace if options.trace_sync else None)
        print(f"saved at instruction {machine.instructions} to {options.output}", file=sys.stderr)
        return 0
    finally:
        machine.close()


def demo_command(options: argparse.Namespace) -> int:
    """``pyvcpu demo``."""
    from pyvcpu.demo import demo

    return demo(as_json=options.json)


def inspect_command(options: argparse.Namespace) -> int:
    """``pyvcpu inspect``."""
    from pyvcpu.analysis.inspect import inspect_command as inspect_stream

    return inspect_stream(options.file, options.selector, options.json)
