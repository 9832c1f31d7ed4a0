"""The source's end of the return path: what the destination says, and waiting for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from pyvcpu.errors import ChannelError, MigrationError
from pyvcpu.migration.channel import Channel
from pyvcpu.migration.session.handshake import Hello, Refusal, parse_message
from pyvcpu.migration.session.step import Step
from pyvcpu.migration.wire.return_path import Message, Pong, Reply, ReplyReader, Shut, SwitchoverAck


class ReturnPath:
    """Reads replies from ``channel``. PONGs may come early; each is consumed once, in order."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._reader = ReplyReader()
        self._pongs: list[int] = []
        self._refusal: str | None = None
        self.hello: Hello | None = None
        self.shut: int | None = None
        self.expect_shut = False
        """EOF is out: SHUT 0 is right from now on, and the end of the stream after it."""

    def poll(self) -> None:
        """Take in what has arrived, without waiting. MigrationError where it says that nothing will come of this."""
        while self.shut is None and (data := self._channel.read_now()) is not None:
            if not data:
                self._reader.close()
                raise ChannelError("the destination closed the channel")
            for reply in self._reader.feed(data):
                self._take(reply)

    def _take(self, reply: Reply) -> None:
        match reply:
            case Pong():
                self._pongs.append(reply.value)
            case Message():
                said = parse_message(reply.content)
                if isinstance(said, Refusal):
                    self._refusal = said.text
                else:
                    self.hello = said
            case Shut():
                self.shut = reply.value
                if reply.value or self._refusal:
                    raise MigrationError(
                        f"the destination refused: {self._refusal}" if self._refusal else "the destination failed",
                        section="return path", expected="SHUT 0", got=f"SHUT {reply.value}",
                    )  # fmt: skip
                if not self.expect_shut:
                    raise MigrationError(
                        "the destination says that it is done before it has the guest", section="return path"
                    )
            case SwitchoverAck():
                pass
            case _:
                raise MigrationError(
                    f"the destination asks for {type(reply).__name__}, which belongs to post-copy",
                    section="return path", offset=reply.offset,
                )  # fmt: skip

    def wait_for_pong(self, value: int, timeout: float, what: str) -> Iterator[Step]:
        """Until PONG ``value`` has come; ``what`` it means, for the error. Raises MigrationError."""
        yield from self._wait(lambda: bool(self._pongs), timeout, what)
        got = self._pongs.pop(0)
        if got != value:
            raise MigrationError(
                "the destination answers a PING that was not sent",
                section="return path",
                field="PONG",
                expected=value,
                got=got,
            )

    def wait_for_shut(self, timeout: float) -> Iterator[Step]:
        """Until the destination says SHUT 0. Raises MigrationError."""
        yield from self._wait(lambda: self.shut is not None, timeout, "SHUT")

    def _wait(self, ready: Callable[[], bool], timeout: float, what: str) -> Iterator[Step]:
        end = time.monotonic() + timeout
        while True:
            self.poll()
            if ready():
                return
            left = end - time.monotonic()
            if left <= 0:
                raise ChannelError(f"the destination has not sent {what} within {timeout:g} s")
            yield Step("return-path", what, left)
