"""The harness's two caches, kept from mixing configurations.

``--use_cache`` finds a response by (context, generation arguments) alone, so another checkpoint, other options in
``--model_args``, another seed, or the next of a document's repeats would get an earlier one's answer.
:func:`separate` puts the run's fingerprint in front of every key, and has answers looked up by the model, which knows
what they depend on (:class:`ResponseCache`).

``--cache_requests true`` stores whole requests, with the generation arguments of the run that wrote them.
:func:`refuse_stale` compares them with those of the tasks that are being evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from sqlite3 import Error as DatabaseError
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.errors import ConfigError, RequestError
from s2d2_lmeval.harness import caller
from s2d2_lmeval.harness.responses import TracedResponse

if TYPE_CHECKING:
    from s2d2_lmeval.decoding.generation import Step
    from s2d2_lmeval.harness.prompts import Prompt


class ResponseCache:
    """The answers in the harness's response cache, by everything that makes a sample
    (a :class:`~s2d2_lmeval.harness.responses.ResponseStore`).

    Responses that it finds say so: ``stats["cached"]`` is 1, and there are no ``seconds``, which would be another
    run's.
    """

    shows_progress = False

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def find(self, prompt: Prompt) -> TracedResponse | None:
        """See :class:`~s2d2_lmeval.harness.responses.ResponseStore`."""
        if prompt.name not in self._rows:
            return None
        found = self._rows[prompt.name]
        kept = {name: value for name, value in found.stats.items() if name != "seconds"}
        return TracedResponse(str(found), {**kept, "cached": 1})

    def decoding_begins(self) -> None:
        """See :class:`~s2d2_lmeval.harness.responses.ResponseStore`."""

    def add(self, prompt: Prompt, response: TracedResponse, steps: Sequence[Step]) -> None:
        """See :class:`~s2d2_lmeval.harness.responses.ResponseStore`."""
        self._rows.keep(prompt.name, response)


def separate(hook: Any, run: str) -> ResponseCache | None:
    """Make the response cache behind ``hook`` (what the harness's ``CachingLM`` hands to ``set_cache_hook``) hold
    ``run``'s responses apart; the cache of answers in it, or None where there is no cache.

    ``CachingLM`` computes its keys itself and shares only the store, so it is the store that learns to prefix them. It
    takes no answers under the harness's keys, so that every request for one reaches the model.

    :raises ConfigError: if the cache store cannot be wrapped.
    """
    store = getattr(hook, "dbdict", None)
    if store is None:
        return None
    plain = type(store)
    if getattr(plain, "separates_runs", False):
        store.run = run
        return ResponseCache(store)

    class SeparatedStore(plain):  # type: ignore[misc, valid-type]
        separates_runs = True
        run: str
        hits = 0

        def __contains__(self, key: str) -> bool:
            return super().__contains__(f"{self.run}:{key}")

        def __getitem__(self, key: str) -> Any:
            found = super().__getitem__(f"{self.run}:{key}")
            self.hits += 1
            return found

        def __setitem__(self, key: str, value: Any) -> None:
            if not isinstance(value, TracedResponse):
                self.keep(key, value)

        def keep(self, key: str, value: Any) -> None:
            try:
                super().__setitem__(f"{self.run}:{key}", value)
            except DatabaseError as error:
                raise ConfigError(f"--use_cache: the cache cannot be written ({error}); make room.") from None

    try:
        store.__class__ = SeparatedStore
        store.run = run
    except (TypeError, AttributeError) as error:
        raise ConfigError(
            f"--use_cache would mix the responses of different options on this lm_eval ({error}); run without it."
        ) from None
    return ResponseCache(store)


def hits(hook: Any) -> int:
    """Responses found in the cache so far."""
    return getattr(getattr(hook, "dbdict", None), "hits", 0)


def refuse_stale(requests: Iterable[Any]) -> None:
    """Refuse requests that ``--cache_requests`` brought along from a run with other generation arguments.

    :param requests: the harness's Instances.
    :raises RequestError: when a request's arguments are not those of its task.
    """
    tasks = caller.tasks_with_cached_requests()
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
