"""Decoding statistics in task YAML files: as metrics beside a task's own, or by the filter ``s2d2_stats``.

A task with a ``process_results`` of its own returns them with its metrics (:func:`with_decoding_metrics`): its filters
must hand on the response itself (``take_first``), not a part of it. Every document is then in the samples once.

Where the scores are of filtered text, a second filter brings the statistics, and the same ``process_results`` scores
what either filter made::

    process_results: !function utils.process_results

    filter_list:
      - name: strict-match
        filter: [{function: regex, regex_pattern: "#### (\\-?[0-9\\.\\,]+)"}, {function: take_first}]
      - name: decode
        filter: [{function: s2d2_stats}]

In the YAML, list what :func:`decoding_metrics` returns under ``metric_list``, each
with ``aggregation: mean`` and its ``higher_is_better``. The table then shows means over documents; sums over a whole
task (all new tokens over all forwards) are under ``config.s2d2.tasks`` of the results file.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lm_eval.api.filter import Filter
from lm_eval.api.registry import filter_registry, register_filter
from lm_eval.api.task import ConfigurableTask

from s2d2_lmeval._autoload import FILTER_NAME
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.runtime.statistics import ratios, without_ratios

METRICS = {"nfe": False, "new_tokens": False, "tokens_per_forward": True, "acceptance": True, "seconds": False}
"""Metric name -> whether higher is better."""


def decoding_metrics(stats: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of one document from its decoding statistics.

    ``nfe`` counts the forwards that the document took part in, of every kind; ``new_tokens`` the tokens up to and
    including the stop; ``tokens_per_forward`` is their ratio; ``acceptance`` the share of drafted tokens that the
    verifier accepted; ``seconds`` the time in which the document was in flight. A statistic that is not there (a
    response from the harness's cache has no ``seconds``, a custom decoding function may report only ``nfe``) gives no
    metric; ``stats`` may be empty.
    """
    return {name: float(stats[name]) for name in METRICS if name in stats}


def with_decoding_metrics(
    process_results: Callable[[dict[str, Any], list[Any]], dict[str, Any]],
) -> Callable[[dict[str, Any], list[Any]], dict[str, Any]]:
    """A ``process_results`` that adds the decoding metrics of a response, or of several to one document. For what the
    filter ``s2d2_stats`` made of responses, these are all::

        @with_decoding_metrics
        def process_results(doc, results):
            return {"exact_match": float(results[0].strip() == doc["answer"])}
    """

    @functools.wraps(process_results)
    def both(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
        if results and isinstance(results[0], Mapping):
            return dict(decoding_metrics(results[0]))
        responses = [one for result in results for one in (result if isinstance(result, list) else [result])]
        stats = merged([getattr(response, "stats", {}) for response in responses])
        return {**process_results(doc, results), **decoding_metrics(stats)}

    return both


class StatsFilter(Filter):
    """Replaces the responses of a document by one dictionary of statistics.

    If a document was decoded several times (``repeats``), counts are means over the responses, and ratios are ratios
    of sums. Responses without statistics (of another model class) give an empty dictionary.
    """

    def apply(self, resps: Iterable[Iterable[str]], docs: Any) -> list[dict[str, Any]]:
        return [Figures(merged([getattr(response, "stats", {}) for response in responses])) for responses in resps]


def refuse_unscored(tasks: Mapping[str, Any]) -> None:
    """Refuse, before anything is decoded, tasks whose figures would be scored by the harness as if they were text.

    Raises:
        ConfigError: naming the task.
    """
    for name, task in tasks.items():
        filters = getattr(getattr(task, "config", None), "filter_list", None) or ()
        brings = any(one.get("function") == FILTER_NAME for several in filters for one in several.get("filter", ()))
        # A task in Python may score by a method of its own.
        plain = getattr(type(task), "process_results", None) is ConfigurableTask.process_results
        if brings and plain and not task.config.process_results:
            raise ConfigError(
                f"task {name}: the harness cannot score what the filter {FILTER_NAME} makes of responses. Give it "
                "a process_results in s2d2_lmeval.harness.filters.with_decoding_metrics, or leave the filter out: the "
                "results file has the statistics of every task under config.s2d2."
            )


class Figures(dict[str, Any]):
    """Statistics of a document; as text JSON, because the harness writes what is filtered as text into the samples."""

    def __str__(self) -> str:
        return json.dumps(self)


def merged(several: list[Mapping[str, Any]]) -> dict[str, Any]:
    """One dictionary of statistics for several responses to the same document."""
    several = [stats for stats in several if stats]
    if not several:
        return {}
    if len(several) == 1:
        return dict(several[0])
    numbers = [without_ratios(stats) for stats in several]
    common = [name for name in numbers[0] if all(name in counts for counts in numbers)]
    means = {name: sum(counts[name] for counts in numbers) / len(numbers) for name in common}
    # The time in flight is shared, so it is not a denominator.
    rates = ratios({name: value for name, value in means.items() if name != "seconds"})
    return {**means, **rates, "responses": len(several)}


if FILTER_NAME not in filter_registry:  # a name in waiting (see _autoload) finds the class by itself
    register_filter(FILTER_NAME)(StatsFilter)
