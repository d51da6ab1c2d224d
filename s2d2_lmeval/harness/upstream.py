"""Access to the internals of lm-evaluation-harness: state that it does not pass to a model, its results, and the
registration of this package.

``simple_evaluate`` seeds torch, creates a model, and evaluates, but tells the model neither the seed nor the source of
its requests nor where results go. So this module reads the caller's local variables.
"""

from __future__ import annotations

import logging
import re
import sys
import weakref
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from s2d2_lmeval.errors import S2D2Error

ADVICE = (
    "a hub token that is given as an argument shows in command lines and files of yours; set the environment variable "
    "HF_TOKEN instead. It is left out of everything that is recorded here."
)
HIDDEN = "(hidden)"
_SECRETS = ("token", "hf_token", "hub_token", "use_auth_token", "api_key")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=\btoken=)[^,\s)}'\"]+")


def include_path() -> Path:
    """Folder of the packaged task YAML files.

    Raises:
        S2D2Error: the package is imported from a checkout that is not installed.
    """
    spec = find_spec("s2d2_lmeval.task_configs")
    if spec is None or not spec.submodule_search_locations:
        raise S2D2Error(
            "The packaged tasks are not installed (s2d2_lmeval.task_configs). In a checkout, run: pip install -e ."
        )
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def register() -> None:
    """Make model ``s2d2`` and its filter known to the harness in this process, whatever its release and the
    environment.
    """
    # Both must have been imported before anything is registered: see _autoload.
    import lm_eval.filters
    import lm_eval.models  # noqa: F401

    from s2d2_lmeval import _autoload

    _autoload.register()


def variables(function: str = "simple_evaluate") -> Mapping[str, Any]:
    """The local variables of the innermost call of ``lm_eval.evaluator.<function>`` around us; empty outside of one."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == "lm_eval.evaluator":
            return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def seed() -> int | None:
    """The harness's ``--seed`` for torch, which samples; None if it set none, or is not evaluating."""
    return variables().get("torch_random_seed")


def caches_requests() -> bool:
    """Whether the evaluation that we are in reads requests from ``--cache_requests``."""
    return bool(variables("evaluate").get("cache_requests"))


def tasks() -> Mapping[str, Any]:
    """Name -> task of the evaluation that we are in."""
    tasks = variables("evaluate").get("eval_tasks", {})
    if isinstance(tasks, Mapping):
        return tasks
    return {output.task_name: output.task for output in tasks if hasattr(output, "task")}  # older releases


class Evaluations:
    """Distinguishes successive evaluations of the same model object.

    Every evaluation creates new requests, so its first one identifies it. Requests outside any evaluation belong
    together.
    """

    def __init__(self) -> None:
        self._known: weakref.ref[Any] | None = None
        self._begun = False

    def entered(self) -> bool:
        """Whether this is another evaluation than at the last call."""
        several = variables("evaluate").get("requests")
        first = next((group[0] for group in several.values() if group), None) if isinstance(several, Mapping) else None
        same = self._begun and (self._known() if self._known is not None else None) is first
        self._begun, self._known = True, None if first is None else weakref.ref(first)
        return not same


def redacted(value: Any) -> Any:
    """A copy of plain data without hub tokens: under their usual names, and by what they look like."""
    if isinstance(value, Mapping):
        return {name: HIDDEN if holds_token({name: one}) else redacted(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(one) for one in value]
    return _TOKEN.sub(HIDDEN, value) if isinstance(value, str) else value


def holds_token(arguments: Mapping[str, Any]) -> bool:
    """Whether model arguments hold a token (``True`` stands for the one of the environment)."""
    return any(name in _SECRETS and isinstance(value, str) and bool(value) for name, value in arguments.items())


def redact_results() -> None:
    """Take hub tokens out of the results of the evaluation that we are in: the harness has written the arguments down
    by its end, once for the model and once for every task.
    """
    results = variables().get("results")
    if results is not None:
        results["configs"] = redacted(results.get("configs", {}))


class ResultsLost(S2D2Error):
    """Results that the harness could not write."""


def refuse_to_lose_results() -> None:
    """From now on a result that cannot be saved ends the run with an error; idempotent.

    The harness catches every error of saving, logs that it "could not save", and exits with 0, so that hours of results
    are lost silently. That log message becomes an error; the results are printed first.
    """
    source = logging.getLogger("lm_eval.loggers.evaluation_tracker")
    source.setLevel(logging.WARNING)  # at a higher level of the harness's loggers nothing would be said
    if _raise_if_lost not in source.filters:
        source.addFilter(_raise_if_lost)


def _raise_if_lost(record: logging.LogRecord) -> bool:
    if not record.getMessage().startswith("Could not save"):
        return True
    error, frame = sys.exc_info()[1], sys._getframe()
    while frame is not None and not frame.f_code.co_name.startswith("save_results"):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is not None and "results" in frame.f_locals:
        from lm_eval.utils import make_table

        print(make_table(frame.f_locals["results"]))
    raise ResultsLost(
        f"{record.getMessage()}: {error}. The results are not on disk, or in part; make room or choose another "
        "--output_path, and run again (with --use_cache, answers are kept)."
    ) from None
