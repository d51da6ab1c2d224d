"""Bad input on purpose: every try ends in time, with an answer or with one of the package's own sentences."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from s2d2_lmeval.errors import S2D2Error

LONGEST_MESSAGE = 1500


class OutOfTime(BaseException):
    """Not an Exception: nothing under test may catch it."""


@dataclass
class Tries:
    """Counts what became of tries; :meth:`check` fails for tracebacks, hangs and messages nobody would read."""

    answered: int = 0
    refused: int = 0
    tracebacks: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.answered + self.refused + len(self.tracebacks) + len(self.hangs)

    def attempt(self, label: str, run: Callable[[], Any], seconds: float = 10.0) -> None:
        """Run ``run``; more than ``seconds`` of processor time is a hang, or ten times as much of wall time: a busy
        machine is not one.
        """
        try:
            with time_limit(seconds):
                run()
        except S2D2Error as error:
            self.refused += 1
            if not str(error).strip() or len(str(error)) > LONGEST_MESSAGE:
                self.unreadable.append(f"{label}: {str(error)[:200]!r}")
        except OutOfTime:
            self.hangs.append(label)
        except KeyboardInterrupt:
            raise
        except BaseException:
            self.tracebacks.append(f"{label}: {traceback.format_exc(limit=-4)}")
        else:
            self.answered += 1

    def check(self, refused_at_least: int = 1) -> None:
        """Assert that nothing went wrong, and that enough was refused for the tries to mean something."""
        wrong = [*self.tracebacks[:5], *(f"hang: {label}" for label in self.hangs[:5]), *self.unreadable[:5]]
        summary = f"{self.count} tries: {len(self.tracebacks)} tracebacks, {len(self.hangs)} hangs"
        assert not wrong, "\n".join([summary, *wrong])
        assert self.refused >= refused_at_least, f"{summary}; only {self.refused} refused"


TIMERS = ((signal.SIGPROF, signal.ITIMER_PROF, 1), (signal.SIGALRM, signal.ITIMER_REAL, 10))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` in this (main) thread after ``seconds`` of processor time."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = [signal.signal(name, stop) for name, _, _ in TIMERS]
    for _, timer, factor in TIMERS:
        signal.setitimer(timer, factor * seconds)
    try:
        yield
    finally:
        for (name, timer, _), handler in zip(TIMERS, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(name, handler)
