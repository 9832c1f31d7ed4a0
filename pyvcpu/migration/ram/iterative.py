"""What a session asks of state that is sent while the guest runs.

    setup          once, before the first pass               -> data of the START section
    synchronise    at the head of a pass: what is dirty now?
    iterate        a batch of the pass                        -> data of a PART section
    complete       the guest stands still: the rest           -> data of PARTs, then of the END section
    cleanup        after success, failure or cancel

RAM is one client. Whatever else is too big for the downtime can be another: it registers a
handler, and the session treats all alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Buffer = bytes | bytearray | memoryview | npt.NDArray[np.uint8]


class Batch(NamedTuple):
    """Data of one section, in pieces that need no joining, and what it carries."""

    chunks: list[memoryview]
    pages: int
    zero_pages: int

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(len(chunk) for chunk in self.chunks)


class IterativeSource(Protocol):
    """The sending half of a handler."""

    name: str
    instance_id: int
    version_id: int

    def setup(self) -> Batch: ...

    def synchronise(self) -> int:
        """Take over what has become dirty; returns the pages to send now."""

    def pending(self) -> int:
        """Bytes that would have to be sent if the guest stopped now: an upper bound."""

    def iterate(self, max_pages: int) -> Batch | None:
        """The next batch of this pass, None when the pass is over."""

    def complete(self) -> Iterator[Batch]:
        """After the guest has stopped: the last batches; the END section's data comes last."""

    def cleanup(self) -> None: ...
