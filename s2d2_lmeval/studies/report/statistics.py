"""Statistics of comparisons: intervals, tests and Pareto fronts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import integrate, stats

CONFIDENCE = 0.95
RESAMPLES = 2000


def interval(documents: Sequence[Sequence[float]]) -> tuple[float, float]:
    """A 95 % confidence interval of the mean over documents; a document has a value per seed.

    Wilson's for yes and no, which holds near 0 and 1 too; else a bootstrap over documents. The seeds of a document are
    not independent samples, so Wilson's is of as many as have the spread that the documents' means have: of all where
    seeds differ within documents as between them, of one per document where they agree. NaN where there are no
    documents.
    """
    if not documents:
        return float("nan"), float("nan")
    means, scores = np.array([np.mean(document) for document in documents]), np.concatenate(documents)
    if not np.isin(scores, (0, 1)).all():
        return _bootstrap(means)
    mean, spread = means.mean(), means.var()
    if spread:
        samples = min(mean * (1 - mean) / spread * len(means), len(scores))
    else:
        samples = len(means) if mean in (0, 1) else len(scores)
    z = stats.norm.ppf((1 + CONFIDENCE) / 2)
    middle = (mean + z**2 / (2 * samples)) / (1 + z**2 / samples)
    half = z / (1 + z**2 / samples) * np.sqrt(mean * (1 - mean) / samples + (z / (2 * samples)) ** 2)
    return float(max(middle - half, 0)), float(min(middle + half, 1))


def _bootstrap(means: np.ndarray) -> tuple[float, float]:
    if len(means) == 1:
        return float(means[0]), float(means[0])
    settings = {"n_resamples": RESAMPLES, "confidence_level": CONFIDENCE, "rng": np.random.default_rng(0)}
    bounds = stats.bootstrap((means,), np.mean, method="percentile", **settings).confidence_interval
    return float(bounds.low), float(bounds.high)


def paired_p_value(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """The probability of an at least equally large difference if both configurations were equally good.

    McNemar's exact test for one yes or no per document; else a sign-flip permutation test of the documents' mean
    differences. Both are paired: only documents on which the two differ count.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} documents: a paired test needs the same ones.")
    differences = np.array([np.mean(a) - np.mean(b) for a, b in zip(first, second, strict=True)])
    differences = differences[differences != 0]
    if len(differences) < 2:
        return 1.0
    if _binary(first) and _binary(second):
        return float(stats.binomtest(int((differences > 0).sum()), len(differences)).pvalue)
    settings = {"n_resamples": RESAMPLES, "rng": np.random.default_rng(0)}
    return float(stats.permutation_test((differences,), np.sum, permutation_type="samples", **settings).pvalue)


def difference_interval(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> tuple[float, float]:
    """A 95 % confidence interval of the mean difference, first less second, on the same documents.

    Agresti and Min's (2005) for one yes or no per document, which is not empty where no document differs; else a
    bootstrap over documents.
    """
    differences = np.array([np.mean(a) - np.mean(b) for a, b in zip(first, second, strict=True)])
    if not (_binary(first) and _binary(second)):
        return _bootstrap(differences)
    count, more, less = len(differences) + 2, (differences > 0).sum() + 0.5, (differences < 0).sum() + 0.5
    middle = (more - less) / count
    spread = stats.norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt(more + less - (more - less) ** 2 / count) / count
    return float(max(middle - spread, -1)), float(min(middle + spread, 1))


def _binary(documents: Sequence[Sequence[float]]) -> bool:
    return all(len(document) == 1 and document[0] in (0.0, 1.0) for document in documents)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several comparisons, adjusted for their number (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda one: p_values[one])):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        adjusted[place] = largest
    return adjusted


AUP_DECAY = 3.0
AUP_TOLERANCE = 5.0


def accuracy_under_parallelism(
    points: Sequence[tuple[float, float]], best: float
) -> tuple[float, list[tuple[float, float]]]:
    """AUP, the score of the d3LLM leaderboard: the area under accuracy over tokens per forward, where accuracy below
    the ``best`` counts for exponentially less.

    Args:
        points: (tokens per forward, accuracy in per cent) of one method at its settings, one or more.
        best: the best accuracy of all methods that are compared on the task, in per cent.

    Returns:
        The score, and the points that count: those at most 5 below the accuracy of the slowest. (The published function
        stops where the fastest is not among them.) The slowest counts in full, whatever its accuracy.
    """
    ordered = sorted(points)
    kept = [point for point in ordered if point[1] >= ordered[0][1] - AUP_TOLERANCE]
    speed, accuracy = np.array(kept).T
    worth = accuracy * np.minimum(np.exp(-AUP_DECAY * (1 - accuracy / best)), 1) if best else accuracy
    return float(speed[0] * accuracy[0] + integrate.trapezoid(worth, speed)), kept


def speed_interval(timings: Sequence[float]) -> tuple[float, float]:
    """A 95 % confidence interval of a speed from its repeated ``timings``: Student's, of their logarithms, as noise is
    a share of a speed. Of one timing nothing is known but itself.
    """
    logs = np.log(timings)
    spread = 0.0
    if len(logs) > 1:
        spread = stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * stats.sem(logs)
    return float(np.exp(logs.mean() - spread)), float(np.exp(logs.mean() + spread))


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points are on the front: no other is at least as good in both coordinates and better in one. One with a
    coordinate that is not known (NaN) is not.
    """
    return front([((first, first), second) for first, second in points])


def front(points: Sequence[tuple[tuple[float, float], float]]) -> list[bool]:
    """As :func:`pareto`, where the first coordinate is an interval: two that overlap are equal."""

    def beats(one: tuple[tuple[float, float], float], other: tuple[tuple[float, float], float]) -> bool:
        ((low, high), value), ((least, most), least_value) = one, other
        return (low > most and value >= least_value) or (high >= least and value > least_value)

    return [
        not np.isnan([*point[0], point[1]]).any() and not any(beats(other, point) for other in points)
        for point in points
    ]
