"""The clock of all timings: the wall's, or this process's processor time.

On a machine that others use as well the wall clock measures them too. With one thread on a CPU, processor time does
not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from s2d2_lmeval.errors import ConfigError

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}

logger = logging.getLogger("s2d2_lmeval")

_chosen = "wall"


def now() -> float:
    """Seconds since some moment."""
    return CLOCKS[_chosen]()


def since(started: float) -> float:
    """Seconds since ``started``; says so where the clock went backwards, so that nobody trusts its rates."""
    seconds = now() - started
    if seconds < 0:
        logger.warning(
            "the clock went backwards by %g s: times of this run mean little, and rates are left out.", -seconds
        )
    return seconds


def choose(name: str) -> None:
    """Time everything from here on by ``name``, one of :data:`CLOCKS`."""
    global _chosen
    if name not in CLOCKS:
        raise ConfigError(f"There is no clock {name!r}; use {' or '.join(CLOCKS)}.")
    _chosen = name
