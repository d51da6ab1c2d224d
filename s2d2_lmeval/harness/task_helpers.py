"""For the Python files beside task YAML files: metrics from decoding statistics.

In the YAML, list what :func:`decoding_metrics` returns under ``metric_list``, each with ``aggregation: mean`` and its
``higher_is_better``. The table then shows means over documents; sums over a whole task (all new tokens over all
forwards) are under ``config.s2d2.tasks`` of the results file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

METRICS = {"nfe": False, "new_tokens": False, "tokens_per_forward": True, "acceptance": True, "seconds": False}
"""Metric name -> whether higher is better."""


def decoding_metrics(stats: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of one document from its decoding statistics.

    ``nfe`` counts the forwards that the document took part in, of every kind; ``new_tokens`` the tokens up to and
    including the stop; ``tokens_per_forward`` is their ratio; ``acceptance`` the share of drafted tokens that the
    verifier accepted; ``seconds`` the time in which the document was in flight. A statistic that is not there (a
    response from the harness's cache has no ``seconds``, a custom decoding function may report only ``nfe``) gives no
    metric.

    :param stats: the dictionary that the filter ``s2d2_stats`` hands to ``process_results``; may be empty.
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
