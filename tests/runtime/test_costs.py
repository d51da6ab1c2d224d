"""What forwards cost: the curve between and beyond what was measured, and when measuring stops."""

from __future__ import annotations

import numpy as np
import pytest

from s2d2_lmeval.runtime.costs import CostCurve, in_a_line, usual, widths_to_measure


def test_between_and_beyond_measured_points() -> None:
    curve = CostCurve.measured(np.array([1, 2, 4]), np.array([1.0, 0.9, 2.0]))
    assert curve(1.5) == 1.0, "a wider forward is never cheaper"
    assert curve(3) == pytest.approx(1.5)
    assert curve(np.array([0, 8])).tolist() == pytest.approx([1.0, 4.0])


def test_widths_rise_to_the_most() -> None:
    widths = widths_to_measure(256)
    assert widths[0] == 1
    assert widths[-1] == 256
    assert (np.diff(widths) > 0).all()
    assert widths_to_measure(1).tolist() == [1]


@pytest.mark.parametrize(
    ("seconds", "stops"),
    [
        ([1, 1, 1, 1], False),
        ([1, 1, 2, 4], True),
        ([1, 2], False),
        ([1, 1, 2, 3], False),
        ([1, 2, 4], True),
        ([2, 3, 5], True),
        ([10, 10.1, 10.3], False),
        ([4, 3, 2], False),
    ],
    ids=["flat", "flat, then in proportion", "two", "bent", "in proportion", "in a line", "barely rising", "falling"],
)
def test_measuring_stops_where_time_grows_in_a_steep_line(seconds: list[float], stops: bool) -> None:
    assert in_a_line(np.array([1, 2, 4, 8, 16]), np.array(seconds, dtype=float)) is stops


@pytest.mark.parametrize(
    ("seconds", "runs", "found"),
    [
        ([9, 0.04, 0.01, 0.03, 0.02], 5, 0.02),
        ([0.9, 0.2, 0.2, 0.2, 0.2], 4, 0.2),
        ([5, 4, 1, 1, 1], 2, 4),
    ],
    ids=["short: two warm up", "longer: one repeat less", "long: timed once"],
)
def test_long_forwards_are_timed_less_often(seconds: list[float], runs: int, found: float) -> None:
    run = iter(seconds)
    assert usual(lambda: next(run)) == found
    assert len(list(run)) == 5 - runs
