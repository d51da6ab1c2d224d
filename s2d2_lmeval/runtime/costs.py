"""Measured costs of forwards on this machine, the basis of every ``auto`` option.

Reading the weights costs the same for one query as for many, so up to some width extra queries are nearly free, and
beyond it every query costs. That width depends on the model, the device and the batch size; it is measured once, before
a run that needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

STEADY, STEEP = 1.15, 0.5
"""A forward's time grows in a straight line where what a further query takes differs by at most so many times; and
steeply where it is at least this share of what a query takes on average. Before that, wider forwards may cost more.
"""

WARM_UPS, REPEATS, LONG = 2, 3, 0.5
"""How often a forward is run to warm up and to time it; and seconds after which it has been timed enough."""


@dataclass(frozen=True)
class CostCurve:
    """Seconds of a forward (K,) at K rising numbers of ``queries``, all rows together."""

    queries: np.ndarray
    seconds: np.ndarray

    @classmethod
    def measured(cls, queries: np.ndarray, seconds: np.ndarray) -> CostCurve:
        """From raw measurements, smoothed so that a wider forward is never cheaper."""
        return cls(queries, np.maximum.accumulate(seconds))

    def __call__(self, queries: np.ndarray | float) -> np.ndarray:
        """Seconds at ``queries`` (any shape): straight lines between measured points, the last one's slope beyond."""
        inside = np.interp(queries, self.queries, self.seconds)
        if len(self.queries) < 2:
            return inside
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.queries[-1] - self.queries[-2])
        return inside + slope * np.maximum(np.asarray(queries) - self.queries[-1], 0)


MeasureCosts = Callable[..., CostCurve]
"""``measure(most, model=TARGET)`` times forwards in which every row brings 1 to ``most`` queries; ``model`` says whose,
where a drafter is loaded beside the target.
"""


def widths_to_measure(most: int) -> np.ndarray:
    """About two widths per doubling, from 1 to ``most``."""
    steps = int(np.ceil(2 * np.log2(max(most, 1)))) + 1
    return np.unique(np.geomspace(1, most, steps).round().astype(np.int64))


def usual(once: Callable[[], float]) -> float:
    """The seconds that ``once`` usually says it took: the median of some runs after others that warm up, of fewer the
    longer they take. The first always warms up.
    """
    taken = [once()]
    while len(taken) < WARM_UPS + REPEATS and sum(taken[1:]) < LONG:
        taken.append(once())
    return float(np.median(taken[min(WARM_UPS, len(taken) - 1) :]))


def in_a_line(widths: np.ndarray, seconds: np.ndarray) -> bool:
    """Whether the last two steps of ``seconds`` (of the first ``widths``) lie on a straight line, and a steep one: then
    the curve goes on as it is, and wider forwards need no measuring.
    """
    if len(seconds) < 3:
        return False
    measured = widths[: len(seconds)]
    slopes = np.diff(seconds[-3:]) / np.diff(measured[-3:])
    return bool(slopes.max() <= STEADY * slopes.min() and slopes.min() >= STEEP * seconds[-1] / measured[-1])
