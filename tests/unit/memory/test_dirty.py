"""DirtyBitmap: nothing that was marked is lost, nothing comes twice."""

from __future__ import annotations

import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pyvcpu.memory.dirty import DirtyBitmap

PAGES = 100
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("mark"), st.integers(0, PAGES - 1)),
        st.tuples(st.just("range"), st.integers(0, PAGES - 1), st.integers(0, 20)),
        st.tuples(st.just("merge"), st.lists(st.integers(0, PAGES - 1))),
        st.tuples(st.just("all")),
        st.tuples(st.just("harvest")),
    )
)


@given(ACTIONS)
def test_agrees_with_a_set(actions: list[tuple]) -> None:
    bitmap, model = DirtyBitmap(PAGES), set()
    for action in actions:
        match action:
            case ("mark", page):
                bitmap.mark(page)
                model.add(page)
            case ("range", first, count):
                count = min(count, PAGES - first)
                bitmap.mark_range(first, count)
                model |= set(range(first, first + count))
            case ("merge", pages):
                bitmap.merge(np.array(pages, np.int64))
                model |= set(pages)
            case ("all",):
                bitmap.mark_all()
                model = set(range(PAGES))
            case ("harvest",):
                assert bitmap.harvest().tolist() == sorted(model)
                model = set()
        assert bitmap.count == len(model)
    assert [page for page in range(PAGES) if bitmap.is_dirty(page)] == sorted(model)


def test_no_mark_is_lost_to_a_harvest_in_another_thread() -> None:
    """Each page is marked once, while another thread harvests as fast as it can."""
    npages = 30_000
    bitmap = DirtyBitmap(npages)
    seen: list[int] = []
    done = threading.Event()

    def harvest() -> None:
        while not done.is_set():
            seen.extend(bitmap.harvest().tolist())

    thread = threading.Thread(target=harvest)
    thread.start()
    for page in range(npages):
        bitmap.mark(page)
    done.set()
    thread.join()
    seen.extend(bitmap.harvest().tolist())
    assert sorted(seen) == list(range(npages))
