"""The options of ``run`` and ``save``: QEMU's names, and what machine they describe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from pyvcpu.errors import ConfigurationError
from pyvcpu.machine import MACHINES, MIB, Image, Machine, MachineConfig, make_machine
from pyvcpu.machine.config import discard
from pyvcpu.machine.guests import parse_guest


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """What a machine is made of, and how it runs."""
    parser.add_argument("-M", "--machine", default="microvm", choices=sorted(MACHINES), help="default: microvm")
    parser.add_argument("-m", "--memory", default=128, type=_number, metavar="MiB", help="RAM, default: 128")
    parser.add_argument("--accel", default="auto", choices=("auto", "interp"), help="the engine, default: auto")
    parser.add_argument("--clock", default="icount", choices=("icount", "host"),
                        help="icount: the guest's own progress (default); host: real time")  # fmt: skip
    parser.add_argument("--sleep", default="off", choices=("on", "off"), help="with icount: wait in real time in HLT")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-bios", "--bios", metavar="FILE", help="firmware, a multiple of 64 KiB")
    what.add_argument("--loader", metavar="FILE,addr=N", help="load a raw image there and start vCPU 0 at it")
    what.add_argument("--guest", metavar="NAME[,PARAM=N...]", help="a bundled guest, such as ticker,rate=8")
    parser.add_argument("-device", "--device", action="append", default=[], metavar="NAME,...",
                        help="isa-debug-exit,iobase=0xf4,iosize=4")  # fmt: skip
    parser.add_argument("-serial", "--serial", default="stdio", metavar="stdio|file:PATH|null",
                        help="where the guest's serial output goes")  # fmt: skip
    parser.add_argument("--incoming", metavar="URI", help="take the guest from unix: tcp: file: exec:, or defer")
    parser.add_argument("-no-reboot", "--no-reboot", action="store_true", help="a triple fault ends the run")
    parser.add_argument("--max-instructions", type=_number, metavar="N", help="end after N instructions, exit code 0")
    parser.add_argument("--require-checksums", action="store_true", help="refuse incoming streams without checksums")
    parser.add_argument("--trace-sync", action="store_true", help="print both synchronisations, step by step")


def _number(text: str) -> int:
    value = int(text, 0)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _settings(text: str, what: str) -> tuple[str, dict[str, str]]:
    """``NAME,key=value,...`` as (name, settings)."""
    name, *rest = text.split(",")
    settings = {}
    for part in rest:
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigurationError(f"{what} {text}: {part!r} is not NAME=VALUE")
        settings[key] = value
    return name, settings


def _integer(text: str, what: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise ConfigurationError(f"{what}: {text!r} is not a number") from None


def _read(path: str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{what}: {error}") from error


def parse_device(text: str) -> tuple[int, int]:
    """(iobase, iosize) of ``isa-debug-exit,iobase=...,iosize=...``, with QEMU's defaults 501 and 2."""
    name, settings = _settings(text, "--device")
    if name != "isa-debug-exit":
        raise ConfigurationError(f"--device {name}: there is isa-debug-exit")
    unknown = settings.keys() - {"iobase", "iosize"}
    if unknown:
        raise ConfigurationError(f"--device {name}: no property {min(unknown)!r}")
    return (
        _integer(settings.get("iobase", "0x501"), "iobase"),
        _integer(settings.get("iosize", "2"), "iosize"),
    )


def parse_loader(text: str) -> Image:
    """The image of ``FILE,addr=N``."""
    path, settings = _settings(text, "--loader")
    if settings.keys() != {"addr"}:
        raise ConfigurationError(f"--loader {text}: FILE,addr=N is wanted")
    return Image(_read(path, "--loader"), _integer(settings["addr"], "addr"))


def _writer(stream: BinaryIO) -> Callable[[bytes], None]:
    def write(data: bytes) -> None:
        stream.write(data)
        stream.flush()

    return write


def open_serial(text: str) -> Callable[[bytes], None]:
    """Where bytes of the guest go: ``stdio``, ``file:PATH`` or ``null``."""
    if text == "stdio":
        return _writer(sys.stdout.buffer)
    if text == "null":
        return discard
    kind, _, path = text.partition(":")
    if kind != "file" or not path:
        raise ConfigurationError(f"--serial {text}: there is stdio, file:PATH and null")
    try:
        return _writer(open(path, "wb", buffering=0))
    except OSError as error:
        raise ConfigurationError(f"--serial: {error}") from error


def machine_of(options: argparse.Namespace) -> Machine:
    """The machine that the options describe. Raises ConfigurationError."""
    loader: tuple[Image, ...] = ()
    if options.guest:
        loader = (parse_guest(options.guest),)
    elif options.loader:
        loader = (parse_loader(options.loader),)
    elif not options.bios and not options.incoming:
        raise ConfigurationError("there is nothing to run: --bios, --loader, --guest or --incoming")
    if len(options.device) > 1:
        raise ConfigurationError("isa-debug-exit is there once")
    return make_machine(
        MachineConfig(
            machine=options.machine,
            memory=options.memory * MIB,
            accel=options.accel,
            clock=options.clock,
            bios=_read(options.bios, "--bios") if options.bios else None,
            loader=loader,
            serial=open_serial(options.serial),
            debug_exit=parse_device(options.device[0]) if options.device else None,
            no_reboot=options.no_reboot,
            pace=options.sleep == "on",
        )
    )
