"""Intervals, tests and fronts against what is known of them."""

from __future__ import annotations

import math
import random

import pytest

from s2d2_lmeval.studies.report.statistics import (
    accuracy_under_parallelism,
    front,
    holm,
    interval,
    paired_p_value,
    pareto,
    speed_interval,
)


def yes_no(right: int, of: int) -> list[list[float]]:
    return [[1.0]] * right + [[0.0]] * (of - right)


def test_wilson_intervals() -> None:
    assert interval(yes_no(8, 10)) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = interval(yes_no(10, 10))
    assert (low, high) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert all(map(math.isnan, interval([])))


def test_intervals_of_several_seeds_take_documents_as_the_sample() -> None:
    """Repeating every document says nothing new about documents."""
    rng = random.Random(0)
    once = [[float(rng.random() < 0.6)] for _ in range(100)]
    low, high = interval(once)
    assert interval([document * 20 for document in once]) == pytest.approx((low, high))
    for same in (0.0, 1.0):  # nothing differs, which says as much as one seed does
        assert interval([[same] * 2] * 4) == pytest.approx(interval([[same]] * 4))
    # Seeds that differ within documents as independent samples do count as such.
    assert interval([[1.0, 0.0]] * 50) == pytest.approx(interval(yes_no(50, 100)))
    assert interval([[0.25, 0.5]] * 3) == pytest.approx((0.375, 0.375))


def test_the_paired_test_is_mcnemars() -> None:
    first, second = yes_no(8, 20), yes_no(0, 20)
    assert paired_p_value(first, second) == pytest.approx(2 * 0.5**8)
    assert paired_p_value(second, first) == pytest.approx(2 * 0.5**8)
    assert paired_p_value(first, first) == 1.0


def test_the_permutation_test_agrees_with_mcnemar() -> None:
    rng = random.Random(1)
    first = [[float(rng.random() < 0.7)] for _ in range(80)]
    second = [[float(rng.random() < 0.5)] for _ in range(80)]
    exact = paired_p_value(first, second)
    permuted = paired_p_value([a * 2 for a in first], [b * 2 for b in second])
    assert permuted == pytest.approx(exact, abs=0.03)
    assert paired_p_value([[0.5]], [[0.5]]) == 1.0


def test_a_paired_test_needs_the_same_documents() -> None:
    with pytest.raises(ValueError, match="the same ones"):
        paired_p_value(yes_no(1, 2), yes_no(1, 3))


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_fronts() -> None:
    assert pareto([(1, 5), (2, 4), (1, 4), (3, 1), (2, 4)]) == [True, True, False, True, True]


def test_accuracy_under_parallelism_by_hand() -> None:
    def worth(accuracy: float) -> float:
        return accuracy * math.exp(-3 * (1 - accuracy / 75.4))

    points = [(3.1, 74.0), (1.0, 74.2), (9.9, 60.1), (5.6, 72.9)]
    area, kept = accuracy_under_parallelism(points, 75.4)
    by_hand = 74.2 + 2.1 * (worth(74.2) + worth(74.0)) / 2 + 2.5 * (worth(74.0) + worth(72.9)) / 2
    assert area == pytest.approx(by_hand)
    assert kept == [(1.0, 74.2), (3.1, 74.0), (5.6, 72.9)]


def test_accuracy_under_parallelism_of_lossless_decoders_is_that_of_their_speed() -> None:
    assert accuracy_under_parallelism([(2.0, 80.0)], 80.0)[0] == 160.0
    assert accuracy_under_parallelism([(1.0, 80.0), (4.0, 80.0)], 80.0)[0] == pytest.approx(320.0)
    assert accuracy_under_parallelism([(1.0, 0.0), (4.0, 0.0)], 0.0)[0] == 0.0


def test_speeds_have_intervals_on_the_scale_of_ratios() -> None:
    low, high = speed_interval([10.0, 40.0])
    assert 0 < low < 10 < 40 < high
    assert low * high == pytest.approx(400.0)
    assert speed_interval([7.0]) == pytest.approx((7.0, 7.0))
    assert speed_interval([20.0, 20.0, 20.0]) == pytest.approx((20.0, 20.0))


def test_overlapping_speeds_are_equal_on_the_front() -> None:
    slow, even, better, apart = ((9.0, 11.0), 0.9), ((18.0, 22.0), 0.5), ((17.0, 19.0), 0.6), ((30.0, 31.0), 0.5)
    assert front([slow, even, better]) == [True, False, True]
    assert front([slow, even, better, apart]) == [True, False, True, True]
