"""A hang is found, busy or idle; a machine that is busy with something else is not one."""

from __future__ import annotations

import threading
import time

from .fuzzing import Tries


def test_work_without_end_and_waiting_without_end_are_hangs() -> None:
    tries = Tries()

    def work() -> None:
        while True:
            pass

    tries.attempt("works", work, seconds=0.05)
    tries.attempt("waits", lambda: threading.Event().wait(600), seconds=0.05)
    assert tries.hangs == ["works", "waits"]


def test_waiting_for_a_busy_machine_is_not() -> None:
    tries = Tries()
    tries.attempt("sleeps", lambda: time.sleep(0.2), seconds=0.1)
    assert (tries.hangs, tries.answered) == ([], 1)
