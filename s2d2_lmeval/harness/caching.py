"""The harness's two caches, kept from mixing configurations.

``--use_cache`` finds a response by (context, generation arguments) alone, so a second run with another checkpoint or
other decoding options in ``--model_args`` would get the first one's answers. :func:`separate` puts the run's
fingerprint in front of every key.

``--cache_requests true`` stores whole requests, with the generation arguments of the run that wrote them.
:func:`refuse_stale` compares them with those of the tasks that are being evaluated.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from s2d2_lmeval.errors import ConfigError, RequestError
from s2d2_lmeval.harness.responses import TracedResponse


def fingerprint(facts_of_run: Mapping[str, Any]) -> str:
    """A short stable name for everything that a response depends on besides its request."""
    return hashlib.sha256(json.dumps(facts_of_run, sort_keys=True, default=str).encode()).hexdigest()[:16]


def separate(hook: Any, run: str) -> Any:
    """Make the response cache behind ``hook`` (what the harness's ``CachingLM`` hands to ``set_cache_hook``) hold
    ``run``'s responses apart.

    ``CachingLM`` computes its keys itself and shares only the store, so it is the store that learns to prefix them.
    Responses that it finds say so: ``stats["cached"]`` is 1, and there are no ``seconds``, which would be another
    run's.

    :raises ConfigError: when the store is none that this can be done to.
    """
    store = getattr(hook, "dbdict", None)
    if store is None:
        return hook
    plain = type(store)
    if getattr(plain, "separates_runs", False):
        store.run = run
        return hook

    class SeparatedStore(plain):  # type: ignore[misc, valid-type]
        separates_runs = True
        run: str
        hits = 0

        def __contains__(self, key: str) -> bool:
            return super().__contains__(f"{self.run}:{key}")

        def __getitem__(self, key: str) -> Any:
            found = super().__getitem__(f"{self.run}:{key}")
            self.hits += 1
            if isinstance(found, TracedResponse):
                kept = {name: value for name, value in found.stats.items() if name != "seconds"}
                return TracedResponse(str(found), {**kept, "cached": 1})
            return found

        def __setitem__(self, key: str, value: Any) -> None:
            super().__setitem__(f"{self.run}:{key}", value)

    try:
        store.__class__ = SeparatedStore
        store.run = run
    except (TypeError, AttributeError) as error:
        raise ConfigError(
            f"--use_cache would mix the responses of different options on this lm_eval ({error}); run without it."
        ) from None
    return hook


def hits(hook: Any) -> int:
    """Responses found in the cache so far."""
    return getattr(getattr(hook, "dbdict", None), "hits", 0)


def refuse_stale(requests: Iterable[Any]) -> None:
    """Refuse requests that ``--cache_requests`` brought along from a run with other generation arguments.

    :param requests: the harness's Instances.
    :raises RequestError: when a request's arguments are not those of its task.
    """
    tasks = _tasks_under_evaluation()
    for request in requests:
        task = tasks.get(request.task_name)
        if task is None or not isinstance(request.args[1], Mapping):
            continue
        asked = getattr(getattr(task, "config", None), "generation_kwargs", None)
        if isinstance(asked, Mapping) and dict(request.args[1]) != dict(asked):
            raise RequestError(
                f"task {request.task_name}: --cache_requests brought an earlier run's requests, with generation_kwargs "
                f"{request.args[1]}, but this run has {dict(asked)}. Use --cache_requests refresh, or none."
            )


def _tasks_under_evaluation() -> Mapping[str, Any]:
    """The task objects of the ``evaluate`` call that we are in, if it reads requests from its cache.

    The harness tells a model nothing about where requests come from, so this looks at the caller's variables.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "evaluate" and frame.f_globals.get("__name__") == "lm_eval.evaluator":
            variables = frame.f_locals
            tasks = variables.get("eval_tasks", {})
            return _by_name(tasks) if variables.get("cache_requests") else {}
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def _by_name(tasks: Any) -> Mapping[str, Any]:
    """Older releases keep a list of outputs that hold their task."""
    if isinstance(tasks, Mapping):
        return tasks
    return {output.task_name: output.task for output in tasks if hasattr(output, "task")}
