"""In bfloat16 too, on a CPU, an answer does not depend on its batch, and ``sliding`` writes what ``ar`` writes.

Random weights are the worst case: nearly every choice is close. Attention reads whole vectors of positions
(:func:`s2d2_lmeval.runtime.attention.grain_of`); where it does not, half of these answers differ.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest

from s2d2_lmeval import BlockDiffusionModel, load

from .tiny import DATA

SAMPLED = {"do_sample": True, "temperature": 1.0}


@cache
def model() -> BlockDiffusionModel:
    return load(DATA / "sdar_checkpoint", dtype="bfloat16", device="cpu")


def answers(rows: int, **options: Any) -> list[list[int]]:
    draw, facts = random.Random(0), model().facts
    tokens = [token for token in range(facts.vocab_size) if token != facts.mask_token_id]
    prompts = [draw.choices(tokens, k=draw.randrange(5, 41)) for _ in range(16)]
    model().max_batch = rows
    config = {"max_new_tokens": 32, "stop_token_ids": [], **options}
    return [answer.token_ids for answer in model().generate(prompts, config)]


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_sliding_is_ar_in_any_batch(sampling: dict[str, Any]) -> None:
    alone = answers(1, decoder="ar", **sampling)
    assert answers(8, decoder="ar", **sampling) == alone
    assert answers(1, decoder="sliding", **sampling) == alone
    assert answers(8, decoder="sliding", **sampling) == alone


@pytest.mark.parametrize("options", [{"decoder": "dynamic"}, {"decoder": "s2d2", **SAMPLED}], ids=["dynamic", "s2d2"])
def test_an_answer_does_not_depend_on_its_batch(options: dict[str, Any]) -> None:
    assert answers(8, block_length=4, **options) == answers(1, block_length=4, **options)


def test_with_ragged_reads_they_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model()._runner, "grain", 1)
    assert answers(8, decoder="ar") != answers(1, decoder="ar")
