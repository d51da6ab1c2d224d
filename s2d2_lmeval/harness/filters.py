"""Decoding statistics in task YAML files: the filter ``s2d2_stats``, and metrics of its output.

A task that reports decoding statistics in addition to its own metric has two filters::

    filter_list:
      - name: strict-match
        filter: [{function: regex, regex_pattern: "#### (\\-?[0-9\\.\\,]+)"}, {function: take_first}]
      - name: decode
        filter: [{function: s2d2_stats}]

Its ``process_results`` is then called once per filter: with text by the first, with a dictionary by the second
(:func:`with_decoding_metrics`). In the YAML, list what :func:`decoding_metrics` returns under ``metric_list``, each
with ``aggregation: mean`` and its ``higher_is_better``. The table then shows means over documents; sums over a whole
task (all new tokens over all forwards) are under ``config.s2d2.tasks`` of the results file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lm_eval.api.filter import Filter
from lm_eval.api.registry import filter_registry, register_filter

from s2d2_lmeval._autoload import FILTER_NAME
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
    """A ``process_results`` that serves both kinds of filter.

    ``process_results(doc, results)`` is asked for text, :func:`decoding_metrics` for what ``s2d2_stats`` made of it::

        @with_decoding_metrics
        def process_results(doc, results):
            return {"exact_match": float(results[0].strip() == doc["answer"])}
    """

    @functools.wraps(process_results)
    def both(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
        if results and isinstance(results[0], Mapping):
            return dict(decoding_metrics(results[0]))
        return process_results(doc, results)

    return both


class StatsFilter(Filter):
    """Replaces the responses of a document by one dictionary of statistics.

    If a document was decoded several times (``repeats``), counts are means over the responses, and ratios are ratios
    of sums. Responses without statistics (of another model class) give an empty dictionary.
    """

    def apply(self, resps: Iterable[Iterable[str]], docs: Any) -> list[dict[str, Any]]:
        return [merged([getattr(response, "stats", {}) for response in responses]) for responses in resps]


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
