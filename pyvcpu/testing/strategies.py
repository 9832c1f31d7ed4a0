"""Hypothesis strategies for what goes over the wire; the only place that imports hypothesis.

``values(description)`` draws values that encode, and that decode from their encoding as they were.
They need not be a state that a device accepts: that is for its check, and for
``states`` of the tests to ask.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from pyvcpu.migration.vmstate.description import SUBSECTIONS, Description, Struct
from pyvcpu.migration.vmstate.fields import Array, Bool, Buffer, Field, Integer, Unused, Values, VarArray, VarBuffer


def values(description: Description, *, subsections: bool = True) -> st.SearchStrategy[Values]:
    """Values of every field, and with ``subsections`` any choice of subsections in any order."""

    @st.composite
    def draw_values(draw: st.DrawFn) -> Values:
        drawn: Values = {}
        for field in description.fields:
            _draw_field(draw, field, drawn, subsections)
        if subsections and description.subsections:
            chosen = draw(st.lists(st.sampled_from(sorted(description.subsections)), unique=True, max_size=4))
            if chosen:
                drawn[SUBSECTIONS] = {name: draw(values(description.subsections[name])) for name in chosen}
        return drawn

    return draw_values()


def _draw_field(draw: st.DrawFn, field: Field, drawn: Values, subsections: bool) -> None:
    """Add the values of one field; a field with a count sets the one before it that holds the count."""
    if isinstance(field, Unused):
        return
    if isinstance(field, Struct) and field.flat:
        drawn.update(draw(values(field.description, subsections=subsections)))
    elif isinstance(field, VarArray):
        items = draw(st.lists(element(field.element, subsections), max_size=min(field.limit, 8)))
        drawn[field.name], drawn[field.count_field] = items, len(items)
    elif isinstance(field, VarBuffer):
        data = draw(st.binary(max_size=min(field.limit, 64)))
        drawn[field.name], drawn[field.length_field] = data, len(data)
    elif isinstance(field, Array):
        item = element(field.element, subsections)
        drawn[field.name] = draw(st.lists(item, min_size=field.count, max_size=field.count))
    else:
        drawn[field.name] = draw(element(field, subsections))


def element(field: Field, subsections: bool = True) -> st.SearchStrategy[Any]:
    """One value of a field."""
    if isinstance(field, Integer):
        low, high = field.limits
        return st.one_of(st.integers(low, high), st.sampled_from([low, high, 0, 1, 5]))
    if isinstance(field, Bool):
        return st.booleans()
    if isinstance(field, Buffer):
        return st.binary(min_size=field.length, max_size=field.length)
    if isinstance(field, Struct):
        return values(field.description, subsections=subsections)
    raise TypeError(f"no strategy for {field!r}")
