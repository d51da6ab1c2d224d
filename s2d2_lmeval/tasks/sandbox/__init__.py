"""Run what a model wrote, so that it harms nothing and cannot forge a pass.

Each program gets three processes of its own (:mod:`.jail`): a supervisor, which starts the other two and ends whatever
they leave; one that runs the program; and a judge, which runs the tests. The tests call the program's function through
a pipe, with plain data as arguments and results. So what is expected is never where the program is, and no code of the
program runs where it is decided whether it passed.

The kernel keeps both processes from files, processes and network; which of its layers are active here is what
:func:`active_layers` says, and what the results record. docs/sandbox.md says what holds.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import subprocess
import threading
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.tasks.sandbox import modes, starting
from s2d2_lmeval.tasks.sandbox.jail import values

logger = logging.getLogger(__name__)

PAUSES = (0.1, 1.0, 5.0)
"""Seconds between tries where the sandbox itself failed."""


@dataclass(frozen=True)
class Limits:
    """What a program may use: seconds of CPU and wall time; bytes of memory, of a file, of its folder, and of one
    result.
    """

    cpu_seconds: int = 2
    wall_seconds: float = 5.0
    memory_bytes: int = 256 * 2**20
    file_bytes: int = 2**24
    folder_bytes: int = 2**26
    answer_bytes: int = 2**20


@dataclass(frozen=True)
class Outcome:
    """Whether a program passed, and if not, why.

    ``sandbox_failed``: it never ran, since the machine had no room for it; nothing is known about the program.
    """

    passed: bool
    detail: str
    sandbox_failed: bool = False


def run_tests(program: str, name: str, tests: str, limits: Limits | None = None) -> Outcome:
    """Whether ``tests``, in which ``name`` is the function ``name`` of ``program``, run to their end.

    Both are Python. Arguments and results travel by value: the function cannot change what it is given, and what it
    returns arrives as the plain data that it holds.
    """
    answer = _judged(program, name, {"source": tests, "calls": []}, limits or Limits())
    detail = answer.get("error") or answer.get("sandbox") or "passed"
    return Outcome("results" in answer, str(detail), "sandbox" in answer)


def call(program: str, name: str, arguments: list[list[Any]], limits: Limits | None = None) -> list[Any] | None:
    """Results of ``name(*a)`` for every ``a`` in ``arguments``, or None when any call fails in any way."""
    results = _judged(program, name, {"source": None, "calls": arguments}, limits or Limits()).get("results")
    return None if results is None or _is_foreign(results) else results


def active_layers() -> list[str]:
    """What surrounds programs here, outermost first; ConfigError when none can be run as S2D2_SANDBOX asks."""
    return list(_probe()[1])


def prepare() -> None:
    """Find out whether programs can be run, before anything is decoded for them, and say so where little protects;
    ConfigError as of :func:`active_layers`.
    """
    layers = active_layers()
    if "audit hook" in layers:
        logger.warning(
            "model-written code runs here with these layers only: %s. They stop accidents, not attacks: run the "
            "evaluation in a container, or set S2D2_SANDBOX=docker (docs/sandbox.md).",
            ", ".join(layers),
        )


def record() -> str | None:
    """For the results: mode and layers of this process's programs; None where it has not come to any."""
    return _record


_record: str | None = None
_starter: starting.Starter | None = None
_ONE_AT_A_TIME = threading.Lock()


def _probe() -> tuple[modes.Mode, tuple[str, ...]]:
    """The mode in use and its layers."""
    global _record
    asked = os.environ.get(modes.VARIABLE)
    mode, layers = _probed(modes.mode_of(asked) if asked else None)
    _record = f"{mode.name}: {', '.join(layers)}"
    return mode, layers


@functools.cache
def _probed(wanted: modes.Mode | None) -> tuple[modes.Mode, tuple[str, ...]]:
    """A mode that works and its layers: ``wanted``; else this machine's own, or bwrap where that may do more."""
    if not hasattr(os, "fork"):
        raise ConfigError("model-written code runs on Linux and macOS only; on Windows, evaluate inside WSL.")
    mode = wanted or modes.Mode("process")
    answer = _run(mode, "def f(): return 1", "f", {"source": None, "calls": [[]]}, Limits(wall_seconds=60.0))
    if answer.get("results") != [1]:
        said = str(answer.get("sandbox") or answer.get("error") or "").strip().splitlines()
        why = [line for line in said if "--help" not in line]  # docker's last line
        raise ConfigError(
            f"the sandbox for model-written code ({mode.name}) does not start: {why[-1] if why else 'no answer'}. "
            f"{mode.hint()}"
        )
    layers = tuple(answer["layers"]) if mode.name == "process" else (mode.name, *answer["layers"])
    if wanted is None and "pid namespace" not in layers:
        with contextlib.suppress(ConfigError):
            return _probed(modes.Mode("bwrap"))
    return mode, layers


def _judged(program: str, name: str, tests: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """The verdict on a program; where the sandbox itself failed again and again, that."""
    mode, _ = _probe()
    for pause in (*PAUSES, None):
        answer = _run(mode, program, name, tests, limits)
        if "sandbox" not in answer or pause is None:
            break
        time.sleep(pause)
    if "sandbox" in answer:
        logger.warning("a program was not run and counts as failed: the sandbox failed: %s", answer["sandbox"])
    return answer


def _run(
    mode: modes.Mode, program: str, name: str, tests: dict[str, Any], limits: Limits, without: Collection[str] = ()
) -> dict[str, Any]:
    """What became of one run: ``results`` of tests that ran to their end, an ``error``, or what failed in ``sandbox``.
    Layers ``without`` which it runs are for tests.
    """
    global _starter
    with _ONE_AT_A_TIME:
        if _starter is None or _starter.mode != mode or not _starter.is_mine:
            _starter = starting.Starter(mode)
        job = {
            "program": program,
            "name": name,
            "limits": asdict(limits),
            "packages": mode.packages and list(mode.packages),
            "without": list(without),
        }
        try:
            return _starter.run(job, tests)
        except (OSError, values.Malformed, subprocess.SubprocessError) as error:
            return {"sandbox": f"{type(error).__name__}: {error}"}


def _is_foreign(value: Any) -> bool:
    """Whether there is something in ``value`` that is not plain data."""
    if isinstance(value, dict):
        return any(map(_is_foreign, (*value, *value.values())))
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(map(_is_foreign, value))
    return isinstance(value, values.Foreign)
