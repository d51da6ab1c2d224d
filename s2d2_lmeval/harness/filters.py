"""The filter ``s2d2_stats``: hands the statistics of a document's responses to ``process_results``.

A task YAML that reports decoding statistics beside its own metric has two filters::

    filter_list:
      - name: strict-match
        filter: [{function: regex, regex_pattern: "#### (\\-?[0-9\\.\\,]+)"}, {function: take_first}]
      - name: decode
        filter: [{function: s2d2_stats}]

``process_results`` is then called once per filter: with text by the first, with a dictionary by the second (see
:mod:`s2d2_lmeval.harness.task_helpers`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lm_eval.api.filter import Filter
from lm_eval.api.registry import filter_registry, register_filter

from s2d2_lmeval._autoload import FILTER_NAME
from s2d2_lmeval.runtime.statistics import ratios, without_ratios


class StatsFilter(Filter):
    """Replaces the responses of a document by one dictionary of statistics.

    Where a document was decoded several times (``repeats``), counts are means over the responses and ratios are taken
    of the sums. Responses without statistics (of another model class) give an empty dictionary.
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
    # A time in flight is no denominator.
    rates = ratios({name: value for name, value in means.items() if name != "seconds"})
    return {**means, **rates, "responses": len(several)}


if FILTER_NAME not in filter_registry:  # a name in waiting (see _autoload) finds the class by itself
    register_filter(FILTER_NAME)(StatsFilter)
