"""``exec:COMMAND``: a shell command's standard input (outgoing) or output (incoming).

A command that fails fails the migration: the outgoing side waits for its exit status in
``finish``, the incoming side asks for it at the end of the stream.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess

from pyvcpu.errors import ChannelError
from pyvcpu.migration.channel.base import Channel, Listener
from pyvcpu.migration.channel.descriptor import DescriptorChannel


class ExecChannel(DescriptorChannel):
    """A pipe to or from ``/bin/sh -c COMMAND``, which runs in a session of its own."""

    def __init__(self, command: str, outgoing: bool) -> None:
        uri = f"exec:{command}"
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=subprocess.PIPE if outgoing else subprocess.DEVNULL,
                stdout=None if outgoing else subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise ChannelError(f"{uri}: cannot start: {error}") from error
        self._pipe = self._process.stdin if outgoing else self._process.stdout
        assert self._pipe is not None
        fd = self._pipe.fileno()
        super().__init__(uri, -1 if outgoing else fd, fd if outgoing else -1)

    def finish(self) -> None:
        """Close the command's input and wait for it; :meth:`close` from another thread ends the wait."""
        with self._waker:
            if self._write_fd < 0:
                return
            self._write_fd = -1
            assert self._pipe is not None
            self._pipe.close()
            self._wait_for_exit()

    def _at_end(self) -> None:
        self._wait_for_exit()

    def _wait_for_exit(self) -> None:
        if self._process.returncode is None:
            pidfd = os.pidfd_open(self._process.pid)
            try:
                self._waker.wait(pidfd, select.POLLIN)
            finally:
                os.close(pidfd)
        status = self._process.wait()
        if status:
            how = f"exit status {status}" if status > 0 else f"signal {signal.Signals(-status).name}"
            raise ChannelError(f"{self.uri}: the command failed with {how}")

    def _release(self) -> None:
        self._read_fd = self._write_fd = -1
        assert self._pipe is not None
        self._pipe.close()
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


class ExecListener(Listener):
    """``accept`` starts the command."""

    def __init__(self, command: str) -> None:
        self.uri = f"exec:{command}"
        self._command, self._closed = command, False

    def accept(self, timeout: float | None = None) -> Channel:
        if self._closed:
            raise ChannelError(f"{self.uri}: the listener is closed")
        return ExecChannel(self._command, outgoing=False)

    def close(self) -> None:
        self._closed = True
