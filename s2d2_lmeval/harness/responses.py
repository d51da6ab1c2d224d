"""Responses with their decoding statistics, their storage, and the harness's two caches, which must not mix
configurations.

``--use_cache`` finds a response by (context, generation arguments) alone, so another checkpoint, other options in
``--model_args``, another seed, or the next of a document's repeats would get an earlier one's answer.
:func:`separate` puts the run's fingerprint in front of every key, and has answers looked up by the model, which knows
what they depend on (:class:`ResponseCache`). ``--cache_requests true`` stores whole requests, with the generation
arguments of the run that wrote them: :func:`refuse_stale` compares them with those of the tasks being evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from sqlite3 import Error as DatabaseError
from typing import TYPE_CHECKING, Any, Protocol

from s2d2_lmeval.errors import ConfigError, RequestError
from s2d2_lmeval.harness import upstream

if TYPE_CHECKING:
    from s2d2_lmeval.decoding.generation import Step
    from s2d2_lmeval.harness.prompts import Prompt


class TracedResponse(str):
    """The text of a response, with the statistics of its decoding in ``stats``.

    It is equal to its text and survives pickling, copying and the harness's response cache. String methods (``split``,
    ``strip``) and the harness's filters return plain strings, so only a filter that comes first sees the statistics.
    """

    stats: dict[str, Any]

    def __new__(cls, text: str = "", stats: Mapping[str, Any] | None = None) -> TracedResponse:
        response = super().__new__(cls, text)
        response.stats = dict(stats or {})
        return response

    def __reduce__(self) -> tuple[type[TracedResponse], tuple[str, dict[str, Any]]]:
        return type(self), (str(self), self.stats)


class ResponseStore(Protocol):
    """Keeps the responses of a run that may be interrupted (``S2D2LM.store``).

    Known requests are not decoded again, and the others keep the same randomness as without the store.
    ``shows_progress``: the store itself shows progress.
    """

    shows_progress: bool

    def find(self, prompt: Prompt) -> TracedResponse | None:
        """The response to this very request, if it is kept."""

    def decoding_begins(self) -> None:
        """The time from here to the last :meth:`add` is decoding time."""
        return

    def add(self, prompt: Prompt, response: TracedResponse, steps: Sequence[Step]) -> None:
        """Store a response as soon as it is complete; ``steps`` are empty with a custom function."""


class ResponseCache(ResponseStore):
    """The answers in the harness's response cache, by everything that makes a sample.

    Cached responses have ``stats["cached"]`` = 1 and no ``seconds``, which would be another run's.
    """

    shows_progress = False

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def find(self, prompt: Prompt) -> TracedResponse | None:
        if prompt.name not in self._rows:
            return None
        found = self._rows[prompt.name]
        kept = {name: value for name, value in found.stats.items() if name != "seconds"}
        return TracedResponse(str(found), {**kept, "cached": 1})

    def add(self, prompt: Prompt, response: TracedResponse, steps: Sequence[Step]) -> None:
        self._rows.keep(prompt.name, response)


def separate(hook: Any, run: str) -> ResponseCache | None:
    """Make the response cache of ``hook`` (what the harness's ``CachingLM`` hands to ``set_cache_hook``) hold
    ``run``'s responses apart; the cache of answers in it, or None where there is no cache.

    ``CachingLM`` computes its keys itself and shares only the store, so it is the store that learns to prefix them. It
    takes no answers under the harness's keys, so that every request for one reaches the model.

    Raises:
        ConfigError: if the cache store cannot be wrapped.
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


def tell_samples(results: Mapping[str, Any] | None) -> None:
    """Put the statistics of every response beside it, as ``s2d2``, in the samples of the harness's ``results``."""
    for samples in ((results or {}).get("samples") or {}).values():
        for sample in samples:
            found = [getattr(one, "stats", {}) for several in sample.get("resps", ()) for one in several]
            if any(found):
                sample["s2d2"] = found


def hits(hook: Any) -> int:
    """Responses found in the cache so far."""
    return getattr(getattr(hook, "dbdict", None), "hits", 0)


def refuse_stale(requests: Iterable[Any]) -> None:
    """Refuse requests (the harness's Instances) that ``--cache_requests`` brought along from a run with other
    generation arguments than their task has here.
    """
    tasks = upstream.tasks() if upstream.caches_requests() else {}
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
