"""When memory runs out the batch is halved and the run goes on: same answers, and it is told."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from s2d2_lmeval import BlockDiffusionModel
from s2d2_lmeval.errors import CapacityError
from s2d2_lmeval.ranks import Ranks
from s2d2_lmeval.runtime.runner import Runner

from .drawn import MASK
from .tiny import engine

PROMPTS = [[(3 * i + j) % MASK for j in range(1 + i % 6)] for i in range(9)]
OPTIONS: dict[str, dict[str, Any]] = {
    "ar": {"decoder": "ar", "do_sample": True},
    "dynamic": {"decoder": "dynamic", "block_length": 4, "do_sample": True},
    "s2d2": {"decoder": "s2d2", "block_length": 4, "do_sample": True},
    "lookahead": {"block_length": 4, "schedule": "lookahead", "cache_ver": True, "draft_ver": True},
    "sliding": {"decoder": "sliding", "do_sample": True},
}


class SmallRunner(Runner):
    """Holds so many rows in its memory and no more."""

    holds = 8

    def run(self, *arguments: Any) -> torch.Tensor:
        logits = super().run(*arguments)
        if len(arguments[5].layout.slots) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return logits


def small(holds: int, max_batch: int | str = 8) -> BlockDiffusionModel:
    model = engine()
    runner = SmallRunner(model.hf_model)
    runner.holds = holds
    return BlockDiffusionModel(model.hf_model, model.facts, max_batch=max_batch, runner=runner)


@pytest.mark.parametrize("decoder", OPTIONS)
@pytest.mark.parametrize("holds", [1, 3])
def test_answers_are_the_same_with_half_the_rows(decoder: str, holds: int) -> None:
    options = {**OPTIONS[decoder], "max_new_tokens": 10, "seed": 5}
    expected = engine().generate(PROMPTS, options)
    model, told = small(holds), []
    got = model.generate(PROMPTS, options, on_finished=lambda index, answer: told.append(index))
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
    if decoder != "sliding":  # its trees follow what the run has learned; its tokens do not
        assert [answer.steps for answer in got] == [answer.steps for answer in expected]
    assert sorted(told) == list(range(len(PROMPTS)))
    halvings = {1: 3, 3: 2}[holds]  # 8 to 4 to 2 (to 1)
    assert model.trace.totals()["batch_halvings"] == halvings
    assert model.trace.totals()["requests"] == len(PROMPTS)
    assert model.max_batch == 8 >> halvings


def test_it_is_said_and_remembered(caplog: pytest.LogCaptureFixture) -> None:
    model = small(holds=4)
    with caplog.at_level(logging.WARNING, "s2d2_lmeval"):
        model.generate(PROMPTS, {"block_length": 4, "max_new_tokens": 4})
        assert "ran out with 8 requests in flight; going on with 4" in caplog.text
        caplog.clear()
        model.generate(PROMPTS, {"block_length": 4, "max_new_tokens": 4})
        assert not caplog.text


def test_memory_that_runs_out_in_the_middle_keeps_what_is_finished() -> None:
    """Short requests are through before the long ones meet the shortage; nobody is told of them twice."""
    model = small(holds=8)
    budgets = [2, 30, 2, 30, 2, 30, 2, 30, 30]
    told: list[int] = []

    def finished(index: int, answer: object) -> None:
        told.append(index)
        model._runner.holds = 3  # type: ignore[attr-defined]

    got = model.generate(PROMPTS, {"block_length": 4}, max_new_tokens=budgets, on_finished=finished)
    expected = engine().generate(PROMPTS, {"block_length": 4}, max_new_tokens=budgets)
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
    assert sorted(told) == list(range(len(PROMPTS)))
    assert model.trace.batch_halvings == 2


def test_not_even_one_row() -> None:
    with pytest.raises(CapacityError, match="with a single request in flight"):
        small(holds=0).generate(PROMPTS[:1], {"block_length": 4, "max_new_tokens": 4})
    with pytest.raises(CapacityError, match="on a single text"):
        small(holds=0).score([([1], [2])])


def test_one_of_several_ranks_does_not_begin_again() -> None:
    """The others wait for it inside of a forward."""
    model = small(holds=4)
    model._runner.ranks = Ranks(rank=1, size=2)
    with pytest.raises(CapacityError, match=r"rank 1 of 2 with 8 requests in flight.*Give max_batch=4 or less"):
        model.generate(PROMPTS, {"block_length": 4, "max_new_tokens": 4})
    with pytest.raises(CapacityError, match="rank 1 of 2"):
        model.score([([1, 2, 3 + i], [4]) for i in range(7)])


def test_other_errors_are_not_taken_for_a_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(holds=8)

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("something else")

    monkeypatch.setattr(model._runner, "run", broken)
    with pytest.raises(RuntimeError, match="something else"):
        model.generate(PROMPTS, {"block_length": 4, "max_new_tokens": 4})


def test_auto_takes_what_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(holds=99, max_batch="auto")
    monkeypatch.setattr(model._runner, "rows_that_fit", lambda needs: 3)
    model.trace.reset(keep_records=True)
    answers = model.generate(PROMPTS, {"block_length": 4, "max_new_tokens": 6})
    assert max(len(record.kinds) for record in model.trace.records) == 3
    monkeypatch.setattr(model._runner, "rows_that_fit", lambda needs: 1000)
    model.trace.reset(keep_records=True)
    assert [answer.token_ids for answer in answers] == [
        answer.token_ids for answer in model.generate(PROMPTS, {"block_length": 4, "max_new_tokens": 6})
    ]
    assert max(len(record.kinds) for record in model.trace.records) == len(PROMPTS)


def test_shorter_texts_are_scored_in_the_room_of_longer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows of shorter texts would fit, but not twice as many."""
    model, caches = small(holds=99, max_batch="auto"), []
    reserve = model._runner.reserve
    monkeypatch.setattr(model._runner, "rows_that_fit", lambda needs: 2 + (560 - needs.capacity) // 10)

    def reserved(slots: int, capacity: int) -> None:
        reserve(slots, capacity)
        caches.append(model._runner.cache)

    monkeypatch.setattr(model._runner, "reserve", reserved)
    pairs = [([3] * length, [4, 5]) for length in range(40, 0, -1)]
    scores = model.score(pairs)
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in engine().score(pairs)])
    assert [cache.slots for cache in caches] == sorted(cache.slots for cache in caches)
    assert 1 < len({id(cache) for cache in caches}) < len(caches)


def test_scores_are_the_same_with_half_the_rows() -> None:
    pairs = [([1, 2, 3 + i], [4] * (1 + i)) for i in range(7)]
    model = small(holds=2)
    for (score, best), (expected, greedy) in zip(model.score(pairs), engine().score(pairs), strict=True):
        assert score == pytest.approx(expected)
        assert best == greedy
    assert model.trace.batch_halvings == 2
