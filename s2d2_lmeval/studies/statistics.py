"""Intervals, tests and fronts: what a comparison of configurations rests on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2000


def interval(documents: Sequence[Sequence[float]]) -> tuple[float, float]:
    """A 95 % confidence interval of the mean over documents; a document has a value per seed.

    Wilson's for one yes or no per document, which holds near 0 and 1 too; else a bootstrap over documents, since the
    seeds of a document are not independent samples. NaN where there are no documents.
    """
    if not documents:
        return float("nan"), float("nan")
    if _binary(documents):
        values = [document[0] for document in documents]
        bounds = stats.binomtest(int(sum(values)), len(values)).proportion_ci(CONFIDENCE, method="wilson")
        return float(bounds.low), float(bounds.high)
    means = np.array([np.mean(document) for document in documents])
    rng = np.random.default_rng(0)
    drawn = means[rng.integers(0, len(means), (RESAMPLES, len(means)))].mean(axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return float(low), float(high)


def paired_p_value(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """The probability of a difference at least as large if both configurations were equally good on these documents.

    McNemar's exact test for one yes or no per document; else a sign-flip permutation test of the documents' mean
    differences. Both are paired: only documents on which the two differ count.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} documents: a paired test needs the same ones.")
    if _binary(first) and _binary(second):
        won = sum(a[0] > b[0] for a, b in zip(first, second, strict=True))
        lost = sum(a[0] < b[0] for a, b in zip(first, second, strict=True))
        return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
    differences = np.array([np.mean(a) - np.mean(b) for a, b in zip(first, second, strict=True)])
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], (RESAMPLES, len(differences)))
    more_extreme = np.abs((signs * differences).sum(axis=1)) >= abs(differences.sum()) - 1e-12
    return float((more_extreme.sum() + 1) / (RESAMPLES + 1))


def _binary(documents: Sequence[Sequence[float]]) -> bool:
    return all(len(document) == 1 and document[0] in (0.0, 1.0) for document in documents)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several comparisons, adjusted for their number (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda one: p_values[one])):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        adjusted[place] = largest
    return adjusted


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points are on the front: no other is at least as good in both coordinates and better in one. One with a
    coordinate that is not known (NaN) is not.
    """
    return [
        not np.isnan(point).any()
        and not any(other[0] >= point[0] and other[1] >= point[1] and other != point for other in points)
        for point in points
    ]
