"""Channels: how a stream travels."""

from pyvcpu.migration.channel.base import Channel, Listener, split_uri
from pyvcpu.migration.channel.faulty import Faults, FaultyChannel
from pyvcpu.migration.channel.memory import BytesReader, BytesWriter, MemoryChannel, memory_pair
from pyvcpu.migration.channel.uri import CONNECT_TIMEOUT, connect, listen

__all__ = [
    "CONNECT_TIMEOUT", "BytesReader", "BytesWriter", "Channel", "Faults", "FaultyChannel", "Listener",
    "MemoryChannel", "connect", "listen", "memory_pair", "split_uri",
]  # fmt: skip
