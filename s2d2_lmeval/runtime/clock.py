"""The clock of all timings: wall-clock time, or this process's CPU time.

On a shared machine wall-clock time includes other processes; with one thread on a CPU, CPU time does not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.ranks import ALONE, Ranks

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}

logger = logging.getLogger("s2d2_lmeval")

_chosen = "wall"
_ranks = ALONE


def now() -> float:
    """Seconds since some moment."""
    return CLOCKS[_chosen]()


def agreed() -> float:
    """:func:`now` as the first rank's clock says it, for what decisions depend on."""
    return _ranks.of_first(now())


def share(ranks: Ranks) -> None:
    """From here on :func:`agreed` is agreed between ``ranks``."""
    global _ranks
    _ranks = ranks


def since(started: float) -> float:
    """Seconds since ``started``; warns if the clock went backwards, because rates are then wrong."""
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
