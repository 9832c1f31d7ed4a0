"""Translators: one function a family of instructions, from :class:`Insn` to ops.

``@translates(Mnemonic.ADD, ...)`` registers a function ``(builder, insn) -> None``. What has no
translator here but a helper in :mod:`pyvcpu.accel.tcg.helpers` ends the block with that helper;
what has neither is unsupported, and says so when it is reached.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvcpu.accel.tcg.builder import Builder
from pyvcpu.accel.tcg.decode import Insn

Translator = Callable[[Builder, Insn], None]

TRANSLATORS: dict[int, Translator] = {}
"""iced Mnemonic -> translator."""


class UseHelper(Exception):
    """Raised by a translator, before it emits anything: this form is the helper's."""


def translates(*mnemonics: int) -> Callable[[Translator], Translator]:
    """Register a translator for these iced mnemonics."""

    def register(function: Translator) -> Translator:
        for mnemonic in mnemonics:
            assert mnemonic not in TRANSLATORS, mnemonic
            TRANSLATORS[mnemonic] = function
        return function

    return register
