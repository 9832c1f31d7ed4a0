"""What the sessions' step machines yield."""

from __future__ import annotations

from typing import Any, NamedTuple


class Step(NamedTuple):
    """Where a session stands: ``name``, with ``detail`` as the session documents it.

    ``seconds`` is how long a step that waits for something may be waited for.
    """

    name: str
    detail: Any = None
    seconds: float = 0.0
