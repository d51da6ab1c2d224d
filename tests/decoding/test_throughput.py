"""Verifying where it pays: the rule, what it learns, and what its answers depend on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from s2d2_lmeval import DecodingConfig
from s2d2_lmeval.decoding.routing.policies import BINS, AcceptanceCurve, DraftView, ThroughputPolicy
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.runtime.costs import CostCurve
from s2d2_lmeval.runtime.graphs import Tables

from . import pipelined_cases
from .drawn import MASK
from .tiny import engine

CPU, L = torch.device("cpu"), 4
ONE = torch.ones(1, dtype=torch.long)
OPTIONS: dict[str, Any] = {
    "block_length": L,
    "do_verify_policy": "throughput",
    "token_acceptance_estimator": "soft_clipped_linear_margin",
}


def policy(rows: int = 1, **options: Any) -> ThroughputPolicy:
    return ThroughputPolicy(DecodingConfig(**{**OPTIONS, **options}), rows, L, Tables(CPU))


def view(guess: list[float], denoised: int = 1, masks: int = L) -> DraftView:
    """A row with ``masks`` masks, which are its span."""
    span = (torch.arange(L) < masks).unsqueeze(0)
    table = torch.tensor([guess])
    return DraftView(
        torch.tensor([True]), span, span, table, table, None, torch.tensor([0]), torch.tensor([denoised]), ONE
    )


def settled(one: ThroughputPolicy, pace: float = 1.0) -> ThroughputPolicy:
    """Without doubt left in the curve, and at a pace of so many tokens per draft."""
    rows = len(one.decided)
    one.curve.tried[:] = 1e18
    one.curve.accepted[:] = 1e18 * (torch.arange(BINS) + 0.5) / BINS
    one.decided, one.spent = torch.full((rows,), pace).double(), torch.ones(rows).double()
    return one


def test_verifies_exactly_where_the_gain_pays_for_the_time() -> None:
    # Guesses in the range around 0.5 + 1/16: expected prefix p + p² + p³ + p⁴, and a token after a rejection.
    p = 0.5 + 0.5 / BINS
    gain = sum(p**n for n in range(1, L + 1)) + 1 - p**L
    for pace in (0.5, 1.0, 3.0):
        for denoised in (0, 1, 2):
            edge = (gain - denoised) / pace
            for ratio, expected in ((edge - 1e-6, True), (edge + 1e-6, False)):
                if ratio >= 0:
                    one = settled(policy(verify_cost_ratio=ratio), pace)
                    assert one.decide(view([0.5] * L, denoised)).item() == expected


def test_without_a_token_behind_a_rejection_there_is_less_to_gain() -> None:
    p = 0.5 + 0.5 / BINS
    gain = sum(p**n for n in range(1, L + 1))
    for ratio, expected in ((gain - 1e-6, True), (gain + 1e-6, False)):
        one = settled(policy(verify_cost_ratio=ratio, allow_resample=False))
        assert one.decide(view([0.5] * L, 0)).item() == expected


def test_lookahead_counts_the_draft_that_it_saves() -> None:
    ahead = {"schedule": "lookahead", "cache_ver": True, "draft_ver": True}
    p = 0.5 + 0.5 / BINS
    edge = sum(p**n for n in range(1, L + 1)) + 1 - p**L
    for ratio, expected in ((edge + p**L - 1e-6, True), (edge + p**L + 1e-6, False)):
        one = settled(policy(verify_cost_ratio=ratio, **ahead))
        assert one.decide(view([0.5] * L, 0)).item() == expected


def test_an_empty_span_is_never_verified() -> None:
    assert not settled(policy(verify_cost_ratio=0.0)).decide(view([1.0] * L, 0, masks=0)).any()


def test_costs_come_from_the_measured_curve() -> None:
    """A verification of k masks is as wide as the block and k masks, shared by the rows in flight."""
    seconds = CostCurve(np.array([1.0, 100.0]), np.array([1.0, 100.0]))  # as many seconds as queries
    one = policy(rows=3)
    one.calibrate_costs(lambda most: seconds, 0)
    torch.testing.assert_close(one.costs[1], 1 + torch.arange(L + 1).double() / L)
    torch.testing.assert_close(one.costs[3], 1 + torch.arange(L + 1).double() / L)
    flat = CostCurve(np.array([1.0, 100.0]), np.array([2.0, 2.0]))  # bound by reading the weights
    ahead = policy(rows=3, schedule="lookahead", cache_ver=True, draft_ver=True)
    ahead.calibrate_costs(lambda most: flat, L)
    torch.testing.assert_close(ahead.costs[2], torch.ones(L + 1).double())


def test_the_curve_learns_what_is_accepted() -> None:
    curve = AcceptanceCurve(1, False, Tables(CPU))
    guess = torch.tensor([[0.9] * L])
    assert curve(guess)[0, 0] == 1  # the benefit of the doubt
    everything = torch.ones(1, L, dtype=torch.bool)
    for _ in range(200):
        curve.learn(curve.bin(guess), everything, torch.zeros(1, L, dtype=torch.bool))
    assert curve(guess)[0, 0] < 0.03
    assert curve(torch.tensor([[0.1] * L]))[0, 0] > 0.5  # another range: nothing is known of it


def test_only_what_was_judged_is_learned() -> None:
    one = policy(verify_cost_ratio=0.1)
    one.decide(view([0.9, 0.9, 0.1, 0.1]))
    span = torch.ones(1, L, dtype=torch.bool)
    one.judged(span, torch.tensor([[True, False, False, False]]), torch.tensor([1]))
    high, low = one.curve.bin(torch.tensor(0.9)), one.curve.bin(torch.tensor(0.1))
    assert (one.curve.tried[0, high].item(), one.curve.accepted[0, high].item()) == (2, 1)
    assert one.curve.tried[0, low].item() == 0


@pytest.mark.parametrize("ratio", [0.3, None])
def test_with_a_given_cost_a_request_learns_from_itself_only(ratio: float | None) -> None:
    one = policy(rows=2, verify_cost_ratio=ratio)
    guess = torch.full((2, L), 0.9)
    other_row = torch.tensor([[False] * L, [True] * L])
    one.curve.learn(one.curve.bin(guess), other_row, torch.zeros_like(other_row))
    one.reward(torch.tensor([False, True]), True, torch.tensor([0, 9]))
    pooled = ratio is None
    assert (one.curve(guess)[0, 0] < 1) == pooled
    assert (one.pace[0] > 1) == pooled
    one.reset(1)
    assert (one.curve(guess)[1, 0] < 1) == pooled
    assert (one.pace[1] > 1) == pooled


def scripted(ratio: float) -> CostCurve:
    """Forwards of the block take a second, any wider one ``ratio`` seconds."""
    return CostCurve(np.array([1, L, L + 1, 1000]), np.array([1.0, 1.0, ratio, ratio]))


def test_a_run_measures_once_and_follows_the_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[(3 * i + j) % MASK for j in range(1 + i % 6)] for i in range(12)]
    model = engine(max_batch=1)
    routed = []
    for ratio in (1.0, 2.0, 50.0):
        asked: list[int] = []

        def measure(rows: int, most: int, ratio: float = ratio, asked: list[int] = asked) -> CostCurve:
            asked.append(most)
            return scripted(ratio)

        monkeypatch.setattr(model._runner, "measure_costs", measure)
        model.trace.reset()
        model.generate(prompts, {**OPTIONS, "max_new_tokens": 24})
        assert asked == [2 * L]
        routed.append(model.trace.totals()["routed"])
    assert routed[0] > routed[1] > routed[2]
    assert routed[0] > 0.3
    assert routed[2] < 0.1


def test_measured_costs_are_used_as_they_come() -> None:
    answers = engine().generate([[1, 2, 3]] * 3, {**OPTIONS, "max_new_tokens": 12})
    assert all(len(answer.token_ids) == 12 for answer in answers)


@pytest.mark.parametrize("schedule", ["reference", "fused"])
def test_with_a_given_cost_answers_do_not_depend_on_the_batch(schedule: str) -> None:
    prompts = [[(5 * i + j) % MASK for j in range(1 + i % 6)] for i in range(7)]
    config = {**OPTIONS, "verify_cost_ratio": 0.8, "max_new_tokens": 20, "do_sample": True, "schedule": schedule}
    alone = [engine(max_batch=1).generate([p], config, seeds=[i])[0] for i, p in enumerate(prompts)]
    together = engine(max_batch=3).generate(prompts, config)
    assert [answer.steps for answer in together] == [answer.steps for answer in alone]
    assert {step.kind for answer in alone for step in answer.steps} == {"draft", "verify"}


def test_options() -> None:
    with pytest.raises(ConfigError, match="too small"):
        policy(verify_cost_ratio=-1.0)
    with pytest.raises(ConfigError, match="made for one block at a time"):
        pipelined_cases.engine("llada").generate(
            [[1, 2]], {"decoder": "s2d2", "do_verify_policy": "throughput", "max_new_tokens": 8}
        )
    with pytest.raises(ConfigError, match="verify_cost_ratio is an option of decoder s2d2"):
        engine().generate([[1, 2]], {"decoder": "dynamic", "verify_cost_ratio": 1.0})


def test_the_view_of_other_policies_needs_no_counts() -> None:
    with pytest.raises(AssertionError):
        policy().decide(replace(view([0.5] * L), denoised=None))
