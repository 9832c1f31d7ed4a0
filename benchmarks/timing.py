"""Timing several contestants in turn, so that a drifting machine drifts for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def in_turn(contestants: Mapping[str, Callable[[], float]], rounds: int = 5) -> dict[str, list[float]]:
    """``rounds`` results of each; each call returns its own rate. One round before does not count."""
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            rate = run()
            if number:
                results[name].append(rate)
    return results


def rate_of(work: Callable[[], float]) -> float:
    """Units a second of ``work``, which returns how many units it did."""
    start = time.perf_counter()
    units = work()
    return units / (time.perf_counter() - start)


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Median of the pairwise ratios, with the smallest and the largest."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(pairs):.3g} [{min(pairs):.3g} .. {max(pairs):.3g}]"


def median(values: list[float]) -> float:
    return statistics.median(values)
