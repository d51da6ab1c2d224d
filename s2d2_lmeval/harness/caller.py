"""What the harness knows and does not hand to a model: the arguments of the call that we are in.

``simple_evaluate`` seeds torch, asks for a model, and evaluates; neither a model class nor a ready model object is told
the seed, where its requests come from, or what the results are written into. So this looks at the caller's variables.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from typing import Any


def variables(function: str) -> Mapping[str, Any]:
    """The local variables of the innermost call of ``lm_eval.evaluator.<function>`` around us; empty outside of one."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == "lm_eval.evaluator":
            return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def seed() -> int | None:
    """The harness's ``--seed`` for torch, which is what samples; None where it set none, or does not evaluate."""
    return variables("simple_evaluate").get("torch_random_seed")


def uses_no_cache() -> bool:
    """Whether the evaluation that we are in has no ``--use_cache``: a model object may keep one from before."""
    return variables("simple_evaluate").get("use_cache", "unknown") is None


def tasks_with_cached_requests() -> Mapping[str, Any]:
    """Name -> task of the evaluation that we are in, if it reads requests from ``--cache_requests``."""
    known = variables("evaluate")
    tasks = known.get("eval_tasks", {}) if known.get("cache_requests") else {}
    if isinstance(tasks, Mapping):
        return tasks
    return {output.task_name: output.task for output in tasks if hasattr(output, "task")}  # older releases


def model_args() -> Any:
    """``--model_args``: a text or a mapping; None outside of an evaluation."""
    return variables("simple_evaluate").get("model_args")


def results() -> Any:
    """What ``simple_evaluate`` is about to return; None before there is something."""
    return variables("simple_evaluate").get("results")


class Evaluations:
    """Tells one evaluation from the next of the same model object.

    An evaluation makes its requests anew, so it is known by the first of them. Requests that come from no evaluation
    belong together.
    """

    def __init__(self) -> None:
        self._known: weakref.ref[Any] | None = None
        self._begun = False

    def entered(self) -> bool:
        """Whether the evaluation that we are in is another than at the last call."""
        several = variables("evaluate").get("requests")
        first = next((group[0] for group in several.values() if group), None) if isinstance(several, Mapping) else None
        same = self._begun and (self._known() if self._known is not None else None) is first
        self._begun, self._known = True, None if first is None else weakref.ref(first)
        return not same
