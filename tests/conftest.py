"""Fixtures of all tests."""

from __future__ import annotations

import itertools

import pytest

from s2d2_lmeval.runtime import clock


@pytest.fixture(autouse=True)
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of the test's own, a millisecond between two reads: what is measured does not depend on how busy the
    machine is, so every forward costs the same, however wide. A test about time sets another.
    """
    ticks = itertools.count()
    for name in clock.CLOCKS:
        monkeypatch.setitem(clock.CLOCKS, name, lambda: next(ticks) / 1000)


@pytest.fixture(autouse=True)
def sandbox_unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test inherits the sandbox that another's command line chose."""
    monkeypatch.setenv("S2D2_SANDBOX", "")
