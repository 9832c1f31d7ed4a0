"""For all tests: Hypothesis profiles, the ``interop`` mark, and no silent skip where QEMU is promised."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

INTEROP = Path(__file__).parent / "interop"

settings.register_profile(
    "default",
    deadline=None,  # machines are shared and noisy: nothing here is timed
    derandomize=True,  # the same examples everywhere; what a search finds is kept as an example
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("search", parent=settings.get_profile("default"), derandomize=False, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if INTEROP in item.path.parents:
            item.add_marker(pytest.mark.interop)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """With PYVCPU_INTEROP_REQUIRED=1 a skipped interop test is a failure."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("PYVCPU_INTEROP_REQUIRED") == "1" and item.get_closest_marker("interop"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped where it must run: {reason}"
